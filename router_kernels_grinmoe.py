"""The router in one Triton launch each way: logits to choices, weights, and what the balance loss counts; and the jitter.

The reference is `estimators_grinmoe.py`, rounding to the logits' dtype included; the draws are those of
`counter_draws_grinmoe.py`, or given. For the backward the logits and the choices are kept, and probabilities computed again.

Shapes: T tokens, E experts, K experts per token, H hidden size, P programs.

Imported only where Triton is. Under TRITON_INTERPRET=1 the kernels run on a CPU, for tests.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

try:  # in a `try`, Transformers does not ask those for it who load the model from the Hub
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the kernels need Triton; pip install triton") from error

from .counter_draws_grinmoe import STRIPE, STRIPES
from .estimators_grinmoe import RoutingNoise

MAX_EXPERTS = 128
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Logits of a program, which are in registers, and tokens at most.
_MOST_LOGITS, _MOST_TOKENS = 1024, 64
# How a draw's contribution to the loss is shared out among the draws' scores.
_OWN, _TO_GO, _JOINT = 0, 1, 2


class _Rule(NamedTuple):
    """What tells one estimator from another.

    Attributes:
        full_probability: of m = 1 where the draw is not the argmax; None: m is 1 always.
        third: what m is otherwise.
        shared: one m for all draws of a token, without an exception for the argmax.
        credit: how contributions are shared out.
        halves: whether the logits are halved.
        expert_scale: over m, what the experts' own gradient is multiplied with; None for 1.
    """

    full_probability: float | None
    third: float = 0.3333
    shared: bool = False
    credit: int = _OWN
    halves: bool = False
    expert_scale: float | None = None


_RULES = {
    "sparsemixer_v2": _Rule(1 / 4),
    "sparsemixer_v2_printed": _Rule(1 / 4, expert_scale=1.0),
    "sparsemixer_v2_star": _Rule(5 / 8, 1 / 3, halves=True, expert_scale=2.0),
    "sparsemixer_togo": _Rule(1 / 4, credit=_TO_GO),
    "sparsemixer_joint": _Rule(1 / 4, 1 / 3, shared=True, credit=_JOINT),
    "sparsemixer_unscaled": _Rule(None, credit=_TO_GO),
}
FUSED_ESTIMATORS = tuple(_RULES)


class FusedRouting(NamedTuple):
    """
    One routing decision: the fields of `Routing`, and what the balance loss counts.

    Attributes:
        routing_weights: (T, K) in the logits' dtype, differentiable.
        selected_experts: (T, K) int64.
        expert_gradient_scale: (T, K), or None for 1.
        tokens_per_expert: (P, E) int32; its sum over P is the number of choices that each expert got.
        prob_sums: (P, E) float32, differentiable; its sum over P is that of the tokens' plain softmax. Partial sums,
            because floats that are added atomically do not repeat.
    """

    routing_weights: torch.Tensor
    selected_experts: torch.Tensor
    expert_gradient_scale: torch.Tensor | None
    tokens_per_expert: torch.Tensor
    prob_sums: torch.Tensor


@triton.jit
def _rounded(values, logits_ptr):
    """To the logits' dtype and back: where the reference rounds."""
    if logits_ptr.dtype.element_ty == tl.bfloat16:
        # To the nearest, ties to even, by hand: Triton's interpreter cuts off. A GPU's NaN would become a zero by that.
        bits = values.to(tl.int32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        rounded = tl.where(values == values, (bits & -65536).to(tl.float32, bitcast=True), float("nan"))
    else:
        rounded = values.to(logits_ptr.dtype.element_ty).to(tl.float32)
    return rounded


@triton.jit
def _load_logits(logits_ptr, tokens, columns, num_tokens, NUM_EXPERTS: tl.constexpr):
    inside = (tokens < num_tokens)[:, None] & (columns < NUM_EXPERTS)[None, :]
    offsets = tokens[:, None].to(tl.int64) * NUM_EXPERTS + columns[None, :]
    logits = tl.load(logits_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    return tl.where((columns < NUM_EXPERTS)[None, :], logits, float("-inf"))


@triton.jit
def _masked_softmax(logits, remaining, threshold, logits_ptr):
    """`estimators_grinmoe.masked_softmax`: probabilities, and which experts have none."""
    top = tl.max(remaining, axis=1)[:, None]
    # Other divisions of Triton's are not rounded to the nearest, and could fall on the other side of the threshold.
    quotient = tl.div_rn(_rounded(top - logits, logits_ptr), tl.maximum(tl.abs(logits), top))
    # NaN (0/0) compares false: kept.
    dropped = (_rounded(quotient, logits_ptr) > threshold) | (remaining == float("-inf"))
    scores = tl.exp(tl.where(dropped, float("-inf"), remaining) - top)
    return _rounded(scores / tl.sum(scores, axis=1)[:, None], logits_ptr), dropped


@triton.jit
def _softmax(logits):
    scores = tl.exp(logits - tl.max(logits, axis=1)[:, None])
    return scores / tl.sum(scores, axis=1)[:, None]


@triton.jit
def _first_best(values):
    """Column of a row's largest number. With NaN among them, `tl.argmax` may return a column that is no expert."""
    return tl.argmax(tl.where(values == values, values, float("-inf")), axis=1)


@triton.jit
def _word(seed, tokens, numbers, draw, stream):
    """First word of Philox for the counter (token, number, draw, stream)."""
    zeros = tokens * 0 + numbers * 0
    word, _, _, _ = tl.philox(seed, tokens + zeros, numbers + zeros, zeros + draw, zeros + stream)
    return word


@triton.jit
def _exponential(
    exponential_ptr, seed, tokens, columns, draw, stream, num_tokens, NUM_EXPERTS: tl.constexpr, GIVEN: tl.constexpr
):
    """(TOKENS, COLUMNS) of `RoutingNoise.exponential`, given or as in `counter_noise`."""
    if GIVEN:
        offsets = (draw * num_tokens.to(tl.int64) + tokens)[:, None] * NUM_EXPERTS + columns[None, :]
        inside = (tokens < num_tokens)[:, None] & (columns < NUM_EXPERTS)[None, :]
        values = tl.load(exponential_ptr + offsets, mask=inside, other=1.0)
    else:
        word = _word(seed, tokens[:, None], columns[None, :], draw, stream)
        values = -tl.log(((word >> 9).to(tl.int32).to(tl.float32) + 0.5) * 1.1920928955078125e-07)
    return values


@triton.jit
def _uniform(uniform_ptr, seed, tokens, draw, stream, num_tokens, NUM_EXPERTS: tl.constexpr, GIVEN: tl.constexpr):
    """(TOKENS,) of `RoutingNoise.uniform`."""
    if GIVEN:
        offsets = draw * num_tokens.to(tl.int64) + tokens
        values = tl.load(uniform_ptr + offsets, mask=tokens < num_tokens, other=0.0)
    else:
        word = _word(seed, tokens, tokens * 0 + NUM_EXPERTS, draw, stream)
        values = (word >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08
    return values


@triton.jit(do_not_specialize=["seed", "stream"])
def _router_kernel(
    logits_ptr,
    exponential_ptr,
    uniform_ptr,
    seed,
    weights_ptr,
    experts_ptr,
    expert_scale_ptr,
    counts_ptr,
    prob_sums_ptr,
    stream,
    num_tokens,
    threshold,
    third,
    least_uniform,
    expert_scale,
    NUM_EXPERTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOP_K: tl.constexpr,
    SAMPLES: tl.constexpr,
    GIVEN: tl.constexpr,
    ON_DEVICE: tl.constexpr,
    SCALES: tl.constexpr,
    SCALES_EXPERTS: tl.constexpr,
    SHARED: tl.constexpr,
    HALVES: tl.constexpr,
    TOKENS: tl.constexpr,
):
    program = tl.program_id(0)
    tokens = program * TOKENS + tl.arange(0, TOKENS)
    columns = tl.arange(0, COLUMNS)
    exists, within = tokens < num_tokens, columns < NUM_EXPERTS
    if ON_DEVICE:
        seed = tl.load(seed)
    logits = _load_logits(logits_ptr, tokens, columns, num_tokens, NUM_EXPERTS)
    probs = tl.where(exists[:, None], _softmax(logits), 0.0)
    tl.store(prob_sums_ptr + program * NUM_EXPERTS + columns, tl.sum(probs, axis=0), mask=within)
    if HALVES:
        logits = _rounded(logits * 0.5, logits_ptr)
    remaining = logits
    taken = tl.zeros([TOKENS, COLUMNS], dtype=tl.int32)
    for k in tl.static_range(TOP_K):
        masked_probs, dropped = _masked_softmax(logits, remaining, threshold, logits_ptr)
        scores = remaining
        if SAMPLES:
            draws = _exponential(exponential_ptr, seed, tokens, columns, k, stream, num_tokens, NUM_EXPERTS, GIVEN)
            scores = tl.where(dropped, float("-inf"), remaining - tl.log(draws))
        choice = _first_best(scores)
        chosen = columns[None, :] == choice[:, None]
        weight = tl.sum(tl.where(chosen, masked_probs, 0.0), axis=1)
        if SCALES:
            draw = 0 if SHARED else k
            full = _uniform(uniform_ptr, seed, tokens, draw, stream, num_tokens, NUM_EXPERTS, GIVEN) > least_uniform
            if not SHARED:
                full = full | (choice == _first_best(masked_probs))
            scale = tl.where(full, 1.0, third)
            weight = _rounded(weight * scale, logits_ptr)
            if SCALES_EXPERTS:
                inverse = _rounded(tl.div_rn(tl.full([TOKENS], 1.0, tl.float32) * expert_scale, scale), logits_ptr)
                tl.store(expert_scale_ptr + tokens * TOP_K + k, inverse.to(logits_ptr.dtype.element_ty), mask=exists)
        tl.store(weights_ptr + tokens * TOP_K + k, weight.to(logits_ptr.dtype.element_ty), mask=exists)
        tl.store(experts_ptr + tokens * TOP_K + k, choice.to(tl.int64), mask=exists)
        taken += (chosen & exists[:, None]).to(tl.int32)
        remaining = tl.where(chosen, float("-inf"), remaining)
    tl.store(counts_ptr + program * NUM_EXPERTS + columns, tl.sum(taken, axis=0), mask=within)


@triton.jit
def _contribution(logits_ptr, experts_ptr, grad_weights_ptr, logits, remaining, threshold, columns, places, exists):
    """Of one draw: its probabilities, which expert it chose, and c = g p."""
    masked_probs, _ = _masked_softmax(logits, remaining, threshold, logits_ptr)
    chosen = columns[None, :] == tl.load(experts_ptr + places, mask=exists, other=0)[:, None]
    grad = tl.load(grad_weights_ptr + places, mask=exists, other=0.0).to(tl.float32)
    return masked_probs, chosen, grad * tl.sum(tl.where(chosen, masked_probs, 0.0), axis=1)


@triton.jit
def _router_backward_kernel(
    logits_ptr,
    experts_ptr,
    grad_weights_ptr,
    grad_prob_sums_ptr,
    grad_logits_ptr,
    num_tokens,
    threshold,
    NUM_EXPERTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOP_K: tl.constexpr,
    CREDIT: tl.constexpr,
    HALVES: tl.constexpr,
    HALF_GRADIENT: tl.constexpr,
    HAS_PROB_SUMS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    program = tl.program_id(0)
    tokens = program * TOKENS + tl.arange(0, TOKENS)
    columns = tl.arange(0, COLUMNS)
    exists, places = tokens < num_tokens, tokens * TOP_K
    raw = _load_logits(logits_ptr, tokens, columns, num_tokens, NUM_EXPERTS)
    logits = raw
    if HALVES:
        logits = _rounded(raw * 0.5, logits_ptr)
    # What the draws that are still to come contribute: all of them, at first.
    to_go = tl.zeros([TOKENS], dtype=tl.float32)
    if CREDIT != 0:
        remaining = logits
        for k in tl.static_range(TOP_K):
            _, chosen, own = _contribution(
                logits_ptr, experts_ptr, grad_weights_ptr, logits, remaining, threshold, columns, places + k, exists
            )
            to_go += own
            remaining = tl.where(chosen, float("-inf"), remaining)
    grad_logits = tl.zeros([TOKENS, COLUMNS], dtype=tl.float32)
    remaining = logits
    for k in tl.static_range(TOP_K):
        masked_probs, chosen, own = _contribution(
            logits_ptr, experts_ptr, grad_weights_ptr, logits, remaining, threshold, columns, places + k, exists
        )
        credit = own
        if CREDIT != 0:
            credit = to_go
        if CREDIT == 1:
            to_go -= own
        grad_logits += credit[:, None] * (tl.where(chosen, 1.0, 0.0) - masked_probs)
        remaining = tl.where(chosen, float("-inf"), remaining)
    if HALF_GRADIENT:
        grad_logits *= 0.5
    within = columns < NUM_EXPERTS
    if HAS_PROB_SUMS:
        grad = tl.load(grad_prob_sums_ptr + program * NUM_EXPERTS + columns, mask=within, other=0.0)[None, :]
        probs = _softmax(raw)
        grad_logits += probs * (grad - tl.sum(grad * probs, axis=1)[:, None])
    offsets = tokens[:, None].to(tl.int64) * NUM_EXPERTS + columns[None, :]
    inside = exists[:, None] & within[None, :]
    grad_logits = _rounded(grad_logits, logits_ptr)
    tl.store(grad_logits_ptr + offsets, grad_logits.to(logits_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["seed", "stream"])
def _jitter_kernel(
    input_ptr,
    output_ptr,
    seed,
    stream,
    num_tokens,
    hidden,
    jitter_eps,
    ON_DEVICE: tl.constexpr,
    TOKENS: tl.constexpr,
    STRIPE: tl.constexpr,
    STRIPES: tl.constexpr,
):
    """One Philox call for eight columns, a stripe apart, so that every load is of whole runs."""
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)[:, None]
    chunk = tl.program_id(1)
    lanes = tl.arange(0, STRIPE)[None, :]
    if ON_DEVICE:
        seed = tl.load(seed)
    numbers = chunk * STRIPE + lanes + tokens * 0
    zeros = numbers * 0
    words = tl.philox(seed, tokens + zeros, numbers, zeros - 1, zeros + stream)
    for stripe in tl.static_range(STRIPES):
        half = (words[stripe // 2] >> (16 * (stripe % 2))) & 0xFFFF
        uniform = (half.to(tl.int32).to(tl.float32) + 0.5) * 1.52587890625e-05
        factor = _rounded(1.0 + jitter_eps * (2.0 * uniform - 1.0), input_ptr)
        columns = (chunk * STRIPES + stripe) * STRIPE + lanes
        inside = (tokens < num_tokens) & (columns < hidden)
        offsets = tokens.to(tl.int64) * hidden + columns
        values = tl.load(input_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        values = _rounded(values * factor, input_ptr)
        tl.store(output_ptr + offsets, values.to(output_ptr.dtype.element_ty), mask=inside)


def _tile(num_experts: int) -> tuple[int, int]:
    """Tokens and columns of a program."""
    columns = max(2, triton.next_power_of_2(num_experts))
    return min(_MOST_TOKENS, _MOST_LOGITS // columns), columns


def _in_dtype(number: float, tensor: torch.Tensor) -> float:
    """What torch makes of a number beside a tensor."""
    return torch.tensor(number, dtype=tensor.dtype).item()


def router_forward(
    router_logits: torch.Tensor,
    exponential: torch.Tensor | None,
    uniform: torch.Tensor | None,
    seed_on_device: torch.Tensor | None,
    seed: int,
    stream: int,
    top_k: int,
    threshold: float,
    estimator: str,
    samples: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights (T, K), experts (T, K), scale of their gradient (T, K) or nothing, counts (P, E), probability sums (P, E)."""
    rule, (num_tokens, num_experts) = _RULES[estimator], router_logits.shape
    weights, experts, expert_scale, counts, prob_sums = _router_outputs(router_logits, top_k, estimator, samples)
    tokens, columns = _tile(num_experts)
    if num_tokens:
        _router_kernel[(counts.shape[0],)](
            router_logits,
            exponential,
            uniform,
            seed if seed_on_device is None else seed_on_device,
            weights,
            experts,
            expert_scale,
            counts,
            prob_sums,
            stream,
            num_tokens,
            _in_dtype(threshold, router_logits),
            _in_dtype(rule.third, router_logits),
            1.0 - (rule.full_probability or 0.0),
            rule.expert_scale or 1.0,
            NUM_EXPERTS=num_experts,
            COLUMNS=columns,
            TOP_K=top_k,
            SAMPLES=samples,
            GIVEN=exponential is not None,
            ON_DEVICE=seed_on_device is not None,
            SCALES=samples and rule.full_probability is not None,
            SCALES_EXPERTS=expert_scale.numel() > 0,
            SHARED=rule.shared,
            HALVES=rule.halves,
            TOKENS=tokens,
        )
    return weights, experts, expert_scale, counts, prob_sums


def _router_outputs(router_logits, top_k: int, estimator: str, samples: bool) -> tuple[torch.Tensor, ...]:
    num_tokens, num_experts = router_logits.shape
    programs = triton.cdiv(num_tokens, _tile(num_experts)[0])
    weights = router_logits.new_empty(num_tokens, top_k)
    experts = torch.empty_like(weights, dtype=torch.int64)
    scales_experts = samples and _RULES[estimator].expert_scale is not None
    expert_scale = router_logits.new_empty((num_tokens, top_k) if scales_experts else 0)
    prob_sums = router_logits.new_empty(programs, num_experts, dtype=torch.float32)
    return weights, experts, expert_scale, torch.empty_like(prob_sums, dtype=torch.int32), prob_sums


_router = torch.library.custom_op("grinmoe::router", router_forward, mutates_args=())


@_router.register_fake
def _(router_logits, exponential, uniform, seed_on_device, seed, stream, top_k, threshold, estimator, samples):
    return _router_outputs(router_logits, top_k, estimator, samples)


def router_backward(
    router_logits: torch.Tensor,
    experts: torch.Tensor,
    grad_weights: torch.Tensor | None,
    grad_prob_sums: torch.Tensor | None,
    threshold: float,
    estimator: str,
    samples: bool,
) -> torch.Tensor:
    """dL/dlogits (T, E), of the weights' gradient (T, K) and that of the sums of probabilities (P, E)."""
    rule, (num_tokens, num_experts) = _RULES[estimator], router_logits.shape
    grad_logits = torch.empty_like(router_logits)
    tokens, columns = _tile(num_experts)
    if grad_weights is None:
        grad_weights = torch.zeros_like(experts, dtype=router_logits.dtype)
    if num_tokens:
        _router_backward_kernel[(triton.cdiv(num_tokens, tokens),)](
            router_logits,
            experts,
            grad_weights.contiguous(),
            None if grad_prob_sums is None else grad_prob_sums.contiguous(),
            grad_logits,
            num_tokens,
            _in_dtype(threshold, router_logits),
            NUM_EXPERTS=num_experts,
            COLUMNS=columns,
            TOP_K=experts.shape[1],
            CREDIT=rule.credit if samples else _OWN,
            HALVES=rule.halves,
            # In training the halving is undone for the router (Algorithm 2).
            HALF_GRADIENT=rule.halves and not samples,
            HAS_PROB_SUMS=grad_prob_sums is not None,
            TOKENS=tokens,
        )
    return grad_logits


_router_backward = torch.library.custom_op("grinmoe::router_backward", router_backward, mutates_args=())


@_router_backward.register_fake
def _(router_logits, experts, grad_weights, grad_prob_sums, threshold, estimator, samples):
    return torch.empty_like(router_logits)


def _keep_for_backward(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[0], output[1])
    ctx.options = inputs[-3:]
    ctx.mark_non_differentiable(*output[1:4])
    ctx.set_materialize_grads(False)


def _router_gradient(ctx, grad_weights, _experts, _scale, _counts, grad_prob_sums):
    gradient = None
    if grad_weights is not None or grad_prob_sums is not None:
        gradient = _router_backward(*ctx.saved_tensors, grad_weights, grad_prob_sums, *ctx.options)
    return gradient, *(None,) * 9


_router.register_autograd(_router_gradient, setup_context=_keep_for_backward)


def fused_route(
    router_logits: torch.Tensor,
    top_k: int,
    jitter_eps: float,
    training: bool,
    estimator: str = "sparsemixer_v2",
    noise: RoutingNoise | None = None,
    seed: int | torch.Tensor | None = None,
    stream: int = 0,
) -> FusedRouting:
    """
    `routing_grinmoe.route` in one launch, and one for its backward; with the same draws it decides the same.

    Args:
        router_logits: (T, E), float32, bfloat16 or float16.
        top_k, jitter_eps, training: as in `routing_grinmoe.sparsemixer`.
        estimator: one of `FUSED_ESTIMATORS`.
        noise: the draws to use in training, or None for those of `counter_draws_grinmoe.counter_noise`.
        seed, stream: of these. `seed` is an int, or an int64 tensor of one element on the device, which compiled code needs;
            None draws one there from torch's generator.

    Raises:
        ValueError: an estimator that is not fused, more than 128 experts, a dtype, shape or number that the kernel does not
            take, or a device that it does not run on.
    """
    _check_arguments(router_logits, top_k, jitter_eps, noise if training else None, estimator)
    _check_device(router_logits.device)
    exponential = uniform = on_device = None
    number = 0
    if training and noise is not None:
        exponential, uniform = noise.exponential.float().contiguous(), noise.uniform.float().contiguous()
    elif training:
        number, on_device = _split_seed(seed, router_logits.device)
    options = (stream, top_k, 2.0 * jitter_eps, estimator, training)
    weights, experts, expert_scale, counts, prob_sums = _router(
        router_logits.contiguous(), exponential, uniform, on_device, number, *options
    )
    scales_experts = training and _RULES[estimator].expert_scale is not None
    return FusedRouting(weights, experts, expert_scale if scales_experts else None, counts, prob_sums)


def _check_arguments(router_logits, top_k: int, jitter_eps: float, noise: RoutingNoise | None, estimator: str) -> None:
    if estimator not in _RULES:
        raise ValueError(f"estimator={estimator!r} has no kernel; choose one of {', '.join(FUSED_ESTIMATORS)}")
    if router_logits.dim() != 2 or router_logits.dtype not in _DTYPES or router_logits.shape[1] > MAX_EXPERTS:
        raise ValueError(
            f"router_logits has shape {tuple(router_logits.shape)} and dtype {router_logits.dtype}; give (tokens, experts) "
            f"with at most {MAX_EXPERTS} experts, in float32, bfloat16 or float16"
        )
    num_tokens, num_experts = router_logits.shape
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k={top_k} is not between 1 and the {num_experts} experts; change it")
    if not jitter_eps >= 0:
        raise ValueError(f"jitter_eps={jitter_eps} is negative; give 0 or more")
    if noise is not None:
        expected = (top_k, num_tokens, num_experts), (top_k, num_tokens, 1)
        # The kernel would read beyond them.
        if (tuple(noise.exponential.shape), tuple(noise.uniform.shape)) != expected:
            raise ValueError(
                f"noise has other shapes than exponential {expected[0]} and uniform {expected[1]}; give these"
            )


def _check_device(device: torch.device) -> None:
    if device.type == "cpu" and not interpreted():
        raise ValueError(
            "the router's kernels run on a GPU, and the tensors are on the CPU; choose routing_grinmoe.route"
        )


def _split_seed(seed: int | torch.Tensor | None, device: torch.device) -> tuple[int, torch.Tensor | None]:
    """The seed as a number of 64 bits with a sign, or as a tensor that a kernel reads."""
    if seed is None:
        return 0, torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=device)
    if isinstance(seed, int):
        return (seed + 2**63) % 2**64 - 2**63, None
    if seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != device:
        raise ValueError(
            f"seed is a tensor of {seed.numel()} {seed.dtype} on {seed.device}; give one int64 on {device}"
        )
    return 0, seed


def jitter(
    hidden_states: torch.Tensor, seed_on_device: torch.Tensor | None, seed: int, stream: int, jitter_eps: float
) -> torch.Tensor:
    """(T, H) times the factors of the counter: forward and backward."""
    hidden_states = hidden_states.contiguous()
    output = torch.empty_like(hidden_states)
    num_tokens, hidden = hidden_states.shape
    if output.numel():
        tokens = 64 if interpreted() else 8
        _jitter_kernel[(triton.cdiv(num_tokens, tokens), triton.cdiv(hidden, STRIPE * STRIPES))](
            hidden_states,
            output,
            seed if seed_on_device is None else seed_on_device,
            stream,
            num_tokens,
            hidden,
            jitter_eps,
            ON_DEVICE=seed_on_device is not None,
            TOKENS=tokens,
            STRIPE=STRIPE,
            STRIPES=STRIPES,
        )
    return output


_jitter = torch.library.custom_op("grinmoe::input_jitter", jitter, mutates_args=())


@_jitter.register_fake
def _(hidden_states, seed_on_device, seed, stream, jitter_eps):
    return torch.empty_like(hidden_states, memory_format=torch.contiguous_format)


def _keep_seed(ctx, inputs, output) -> None:
    _, seed_on_device, *ctx.draw = inputs
    ctx.save_for_backward(seed_on_device)


def _jitter_gradient(ctx, gradient):
    # The product with the same factors.
    return _jitter(gradient, *ctx.saved_tensors, *ctx.draw), None, None, None, None


_jitter.register_autograd(_jitter_gradient, setup_context=_keep_seed)


def fused_input_jitter(
    hidden_states: torch.Tensor, jitter_eps: float, seed: int | torch.Tensor | None = None, stream: int = 0
) -> torch.Tensor:
    """
    The MoE block's input (T, H) times U(1 - eps, 1 + eps), the factors of `counter_draws_grinmoe.counter_jitter`.

    They are drawn again in the backward, so that nothing of the input's size is kept. `seed` and `stream` as in
    `fused_route`, whose draws have other counters.

    Raises:
        ValueError: a shape, dtype or seed that the kernel does not take, or a device that it does not run on.
    """
    if hidden_states.dim() != 2 or hidden_states.dtype not in _DTYPES:
        raise ValueError(
            f"hidden_states has shape {tuple(hidden_states.shape)} and dtype {hidden_states.dtype}; give (tokens, hidden "
            "size) in float32, bfloat16 or float16"
        )
    _check_device(hidden_states.device)
    number, on_device = _split_seed(seed, hidden_states.device)
    return _jitter(hidden_states, on_device, number, stream, jitter_eps)


def interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter, which decides when this module is imported."""
    return not isinstance(_jitter_kernel, triton.JITFunction)


__all__ = ["FUSED_ESTIMATORS", "MAX_EXPERTS", "FusedRouting", "fused_input_jitter", "fused_route", "interpreted"]
