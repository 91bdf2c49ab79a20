"""Triton kernels of the router and of the input jitter; triton_router.py launches them.

The reference is `routing_grinmoe.py`, rounding to the logits' dtype included; the draws are those of
`philox.py`, or given.

Shapes: T tokens, E experts, K experts per token, H hidden size.

Triton compiles a number that is 1 in as a constant, without a tensor's methods, and makes a kernel of its own for it and
for multiples of 16. Numbers that differ from call to call are therefore not specialised, and no method is called on one.

Imported only where Triton is. Under TRITON_INTERPRET=1 the kernels run on a CPU, for tests.
"""

from __future__ import annotations

import triton
import triton.language as tl


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
    """`routing_grinmoe.masked_softmax`: probabilities, and which experts have none."""
    top = tl.max(remaining, axis=1)[:, None]
    # Other divisions of Triton's are not rounded to the nearest, and could fall on the other side of the threshold.
    quotient = tl.div_rn(_rounded(top - logits, logits_ptr), tl.maximum(tl.abs(logits), top))
    # NaN (0/0) compares false: kept.
    dropped = (_rounded(quotient, logits_ptr) > threshold) | (remaining == float("-inf"))
    scores = tl.exp(tl.where(dropped, float("-inf"), remaining) - top)
    return _rounded(scores / tl.sum(scores, axis=1)[:, None], logits_ptr), dropped


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
        offsets = (draw * num_tokens + tokens).to(tl.int64)[:, None] * NUM_EXPERTS + columns[None, :]
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
        offsets = draw * num_tokens + tokens
        values = tl.load(uniform_ptr + offsets, mask=tokens < num_tokens, other=0.0)
    else:
        word = _word(seed, tokens, tokens * 0 + NUM_EXPERTS, draw, stream)
        values = (word >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08
    return values


@triton.jit(do_not_specialize=["seed", "stream", "num_tokens"])
def router_kernel(
    logits_ptr,
    exponential_ptr,
    uniform_ptr,
    seed,
    weights_ptr,
    experts_ptr,
    expert_scale_ptr,
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
    exists = tokens < num_tokens
    if ON_DEVICE:
        seed = tl.load(seed)
    logits = _load_logits(logits_ptr, tokens, columns, num_tokens, NUM_EXPERTS)
    if HALVES:
        logits = _rounded(logits * 0.5, logits_ptr)
    remaining = logits
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
        remaining = tl.where(chosen, float("-inf"), remaining)


@triton.jit
def _contribution(logits_ptr, experts_ptr, grad_weights_ptr, logits, remaining, threshold, columns, places, exists):
    """Of one draw: its probabilities, which expert it chose, and c = g p."""
    masked_probs, _ = _masked_softmax(logits, remaining, threshold, logits_ptr)
    chosen = columns[None, :] == tl.load(experts_ptr + places, mask=exists, other=0)[:, None]
    grad = tl.load(grad_weights_ptr + places, mask=exists, other=0.0).to(tl.float32)
    return masked_probs, chosen, grad * tl.sum(tl.where(chosen, masked_probs, 0.0), axis=1)


@triton.jit(do_not_specialize=["num_tokens"])
def router_backward_kernel(
    logits_ptr,
    experts_ptr,
    grad_weights_ptr,
    grad_logits_ptr,
    num_tokens,
    threshold,
    NUM_EXPERTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOP_K: tl.constexpr,
    CREDIT: tl.constexpr,
    HALVES: tl.constexpr,
    HALF_GRADIENT: tl.constexpr,
    TOKENS: tl.constexpr,
):
    program = tl.program_id(0)
    tokens = program * TOKENS + tl.arange(0, TOKENS)
    columns = tl.arange(0, COLUMNS)
    exists, places = tokens < num_tokens, tokens * TOP_K
    logits = _load_logits(logits_ptr, tokens, columns, num_tokens, NUM_EXPERTS)
    if HALVES:
        logits = _rounded(logits * 0.5, logits_ptr)
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
    offsets = tokens[:, None].to(tl.int64) * NUM_EXPERTS + columns[None, :]
    inside = exists[:, None] & within[None, :]
    grad_logits = _rounded(grad_logits, logits_ptr)
    tl.store(grad_logits_ptr + offsets, grad_logits.to(logits_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["seed", "stream", "num_tokens"])
def jitter_kernel(
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
