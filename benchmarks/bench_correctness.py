"""Every Triton kernel against the reference in torch, on the device itself: what is not right here need not be timed.

    python -m benchmarks correctness
    TRITON_INTERPRET=1 python -m benchmarks correctness --toy

The tests hold the same kernels to the same references in Triton's interpreter. This is for a machine that has a GPU and no
pytest, so it imports nothing of the tests. Each check is run by itself: one that raises or exceeds its limit is refused
with a reason, and the others go on. Sizes are odd, and for bfloat16 the released layer's, whose tiles are those of a run.

Shapes: T tokens, K experts per token, N = T * K rows sorted by expert, E experts, H hidden size, I expert width.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from benchmarks.bench_router import decided
from benchmarks.block_arms import describe
from benchmarks.protocol import Report, best_device, relative_error
from grinmoe import GrinMoeConfig
from grinmoe.kernels import counter_noise
from grinmoe.kernels.philox import counter_jitter
from grinmoe.modeling_grinmoe import GrinMoeExperts
from grinmoe.provenance import markdown_table
from grinmoe.routing_grinmoe import ESTIMATORS, route

# Largest error over the largest expected number: of what only moves or rounds once, and of what multiplies and sums up.
EXACT = 0.0
LIMIT = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
SEED, STREAM, JITTER_EPS = 7, 3, 0.01


@dataclass(frozen=True)
class CorrectnessSettings:
    """
    Attributes:
        minutes: after which no check is begun.
        toy: on a CPU, in Triton's interpreter, small sizes alone.
    """

    minutes: float | None = None
    toy: bool = False


class Check(NamedTuple):
    """`error`: computes and returns the largest relative error, which may be `limit`."""

    name: str
    error: Callable[[], float]
    limit: float


class Sizes(NamedTuple):
    hidden: int
    width: int
    experts: int


SMALL, RELEASED = Sizes(72, 40, 5), Sizes(4096, 6400, 16)


def run(options: CorrectnessSettings) -> Path:
    """
    Run all checks, print the table, and return the path of the report.

    Raises:
        RuntimeError: a check was refused. The report is written all the same.
    """
    device = best_device()
    if device.type != "cuda" and not options.toy:
        raise ValueError("python -m benchmarks correctness: no GPU is visible; --toy checks in Triton's interpreter")
    deadline = None if options.minutes is None else time.monotonic() + 60 * options.minutes
    report = Report("correctness", asdict(options), options.toy)
    found: dict[str, dict[str, Any]] = {}
    for check in checks(device, options.toy):
        if deadline is not None and time.monotonic() > deadline:
            found[check.name] = {"limit": check.limit, "left_out": "no time was left"}
        else:
            found[check.name] = measure(check)
        report.update("checks", found, {"checks": table(found)})
    path = report.finish()
    if wrong := {name: one["refused"] for name, one in found.items() if "refused" in one}:
        raise RuntimeError(f"{len(wrong)} of {len(found)} checks were refused: {'; '.join(wrong)}")
    return path


def measure(check: Check) -> dict[str, Any]:
    """Facts of one check: `error`, `limit`, `seconds` with compiling, and `refused` with a reason where it is wrong."""
    started = time.monotonic()
    facts: dict[str, Any] = {"limit": check.limit}
    try:
        facts["error"] = check.error()
    # Whatever a compiler or a kernel raises here: the others are checked all the same.
    except Exception as raised:
        facts["refused"] = describe(raised)
    else:
        # Not `>`: NaN is refused.
        if not facts["error"] <= check.limit:
            facts["refused"] = f"relative error {facts['error']:.2g}, and {check.limit:.2g} is allowed"
    facts["seconds"] = time.monotonic() - started
    return facts


def table(found: dict[str, dict[str, Any]]) -> str:
    refused = sum("refused" in one for one in found.values())
    left_out = sum("left_out" in one for one in found.values())
    rows = [
        [
            name,
            f"{one['error']:.1e}" if "error" in one else "-",
            f"{one['limit']:.0e}" if one["limit"] else "exact",
            f"{one['seconds']:.1f}" if "seconds" in one else "-",
            one.get("refused") or one.get("left_out") or "right",
        ]
        for name, one in found.items()
    ]
    text = f"{len(found)} checks, {refused} refused, {left_out} not reached. `seconds` contains compiling."
    return f"{text}\n\n{markdown_table(['check', 'error', 'limit', 'seconds', 'outcome'], rows)}"


def checks(device: torch.device, toy: bool) -> Iterator[Check]:
    """All of them, those of what decoding and training run first."""
    sizes = {torch.float32: SMALL, torch.bfloat16: SMALL if toy else RELEASED}
    for dtype, size in sizes.items():
        name = str(dtype).removeprefix("torch.")
        for tokens in (1, 10) if toy else (1, 8, 32, 64):
            yield Check(
                f"few-token experts, {name}, {tokens} tokens",
                lambda t=tokens, d=dtype, s=size: few_tokens_error(s, t, d, device),
                LIMIT[dtype],
            )
        for routing in ROUTINGS:
            yield Check(
                f"experts and every gradient, {name}, {routing}",
                lambda r=routing, d=dtype, s=size: experts_error(s, r, d, device),
                LIMIT[dtype],
            )
    yield Check("an idle expert's gradient over poisoned memory", lambda: idle_expert_error(device), EXACT)
    yield Check("experts repeat bit for bit", lambda: repetition_error(sizes[torch.bfloat16], device), EXACT)
    tokens = 33 if toy else 1025
    for estimator, spec in ESTIMATORS.items():
        if spec.kernel:
            for dtype in LIMIT:
                yield from router_checks(estimator, dtype, tokens, device)
    for dtype in LIMIT:
        name = str(dtype).removeprefix("torch.")
        yield Check(f"input jitter and its gradient, {name}", lambda d=dtype: jitter_error(tokens, d, device), EXACT)
        for elsewhere in (False, True):
            where = ", some experts elsewhere" if elsewhere else ""
            for kernel, error in PERMUTE_ERRORS.items():
                yield Check(
                    f"{kernel}, {name}{where}",
                    lambda e=error, d=dtype, o=elsewhere: e(sizes[d], tokens, d, device, o),
                    EXACT if kernel in ("place_rows", "gather_rows") else LIMIT[dtype],
                )
    if device.type == "cuda":
        yield Check("few-token experts in a CUDA graph", lambda: captured_error(device), EXACT)
        if torch.cuda.device_count() > 1:
            yield Check(
                "launches on the tensors' device, not on the current one", second_device_error, LIMIT[torch.float32]
            )


def distinct(tokens: int, top_k: int, experts: int) -> torch.Tensor:
    """(T, K) different experts per token, the same for the same sizes."""
    return torch.rand(tokens, experts, generator=torch.Generator().manual_seed(tokens)).topk(top_k).indices


# Of E experts; E itself stands for an expert that another rank has.
ROUTINGS: dict[str, Callable[[int], torch.Tensor]] = {
    "one token": lambda experts: distinct(1, 2, experts),
    "uneven groups": lambda experts: distinct(301, 2, experts),
    "top-1": lambda experts: distinct(7, 1, experts),
    "top-3": lambda experts: distinct(40, 3, experts),
    "all tokens to one expert": lambda experts: torch.tensor([[3, 1]]).repeat(70, 1),
    "idle experts": lambda experts: distinct(133, 2, 3) + 2,
    "some experts elsewhere": lambda experts: distinct(90, 2, experts + 1),
    "all experts elsewhere": lambda experts: torch.full((5, 2), experts),
}


def build_experts(size: Sizes, top_k: int, dtype: torch.dtype, device: torch.device, name: str) -> GrinMoeExperts:
    config = GrinMoeConfig(
        hidden_size=size.hidden,
        intermediate_size=size.width,
        num_local_experts=size.experts,
        num_experts_per_tok=top_k,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    config._experts_implementation = name
    torch.manual_seed(0)
    with torch.device("meta"):
        experts = GrinMoeExperts(config)
    for key, parameter in list(experts.named_parameters()):
        drawn = torch.randn(parameter.shape, device=device, dtype=dtype).mul_(parameter.shape[-1] ** -0.5)
        setattr(experts, key, nn.Parameter(drawn))
    return experts


def as_reference(experts: GrinMoeExperts) -> GrinMoeExperts:
    """The reference loop in more precision, with the same rounded weights."""
    reference = copy.deepcopy(experts).to(precise(next(experts.parameters())))
    reference.config._experts_implementation = "eager"
    return reference


def precise(tensor: torch.Tensor) -> torch.dtype:
    """float64 for float32. For bfloat16 float32, which a GPU multiplies faster at the released size."""
    return torch.float64 if tensor.dtype == torch.float32 else torch.float32


def few_tokens_error(size: Sizes, tokens: int, dtype: torch.dtype, device: torch.device) -> float:
    from grinmoe.kernels import few_tokens_experts

    experts = build_experts(size, 2, dtype, device, "eager").requires_grad_(False)
    # Past the last expert: served elsewhere.
    chosen = distinct(tokens, 2, size.experts + (tokens > 1)).to(device)
    hidden_states = torch.randn(tokens, size.hidden, device=device).to(dtype)
    weights = torch.rand(tokens, 2, device=device).to(dtype)
    found = few_tokens_experts(hidden_states, chosen, weights, experts.gate_up_proj, experts.down_proj)
    exact = precise(hidden_states)
    expected = as_reference(experts)(hidden_states.to(exact), chosen, weights.to(exact))
    return error_of([found], [expected])


def results(experts: GrinMoeExperts, chosen: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
    """Output, and gradients of the input, of the routing weights and of both parameters; inputs drawn in bfloat16."""
    device = chosen.device
    torch.manual_seed(1)
    hidden_states = (
        torch.randn(chosen.shape[0], experts.hidden_dim, device=device).bfloat16().to(dtype).requires_grad_()
    )
    weights = torch.rand(chosen.shape, device=device).bfloat16().to(dtype).requires_grad_()
    upstream = torch.randn(chosen.shape[0], experts.hidden_dim, device=device).bfloat16().to(dtype)
    output = experts(hidden_states, chosen, weights)
    inputs = [hidden_states, weights, experts.gate_up_proj, experts.down_proj]
    return [output.detach(), *torch.autograd.grad(output, inputs, upstream)]


def experts_error(size: Sizes, routing: str, dtype: torch.dtype, device: torch.device) -> float:
    chosen = ROUTINGS[routing](size.experts).to(device)
    experts = build_experts(size, chosen.shape[1], dtype, device, "grinmoe_triton")
    found = results(experts, chosen, dtype)
    reference = as_reference(experts)
    return error_of(found, results(reference, chosen, precise(found[0])))


def idle_expert_error(device: torch.device) -> float:
    """Largest gradient of experts without tokens, which must be 0 whatever memory held before."""
    experts = build_experts(SMALL, 2, torch.bfloat16, device, "grinmoe_triton")
    chosen = torch.tensor([[0, 1]], device=device).repeat(20, 1)
    # What the allocator gives out next.
    for parameter in experts.parameters():
        poison = [torch.full_like(parameter, float("nan")) for _ in range(8)]
    del poison
    *_, gate_up, down = results(experts, chosen, torch.bfloat16)
    return error_of([gate_up[2:], down[2:]], [torch.zeros_like(gate_up[2:]), torch.zeros_like(down[2:])])


def repetition_error(size: Sizes, device: torch.device) -> float:
    experts = build_experts(size, 2, torch.bfloat16, device, "grinmoe_triton")
    chosen = distinct(301, 2, size.experts).to(device)
    return error_of(*(results(experts, chosen, torch.bfloat16) for _ in range(2)))


def router_checks(estimator: str, dtype: torch.dtype, tokens: int, device: torch.device) -> Iterator[Check]:
    name = f"router, {estimator}, {str(dtype).removeprefix('torch.')}"
    yield Check(f"{name}, training", lambda: router_error(estimator, dtype, tokens, True, False, device), LIMIT[dtype])
    yield Check(
        f"{name}, evaluation", lambda: router_error(estimator, dtype, tokens, False, False, device), LIMIT[dtype]
    )
    if estimator == "sparsemixer_v2":
        for given in (False, True):
            yield Check(
                f"{name}, training, one token{', draws given' if given else ''}",
                lambda g=given: router_error(estimator, dtype, 1, True, g, device),
                LIMIT[dtype],
            )


def router_error(
    estimator: str, dtype: torch.dtype, tokens: int, training: bool, given: bool, device: torch.device
) -> float:
    """Of the weights, the scale of the experts' gradient and the logits' gradient. Raises if an expert differs."""
    from grinmoe.kernels.triton_router import fused_route

    torch.manual_seed(2)
    logits = torch.randn(tokens, 16, device=device).to(dtype).requires_grad_()
    upstream = torch.randn(tokens, 2, device=device).to(dtype)
    noise = counter_noise(SEED, STREAM, tokens, 16, 2, device)
    draws: dict[str, Any] = {"noise": noise} if given else {"seed": SEED, "stream": STREAM}
    found = fused_route(logits, 2, JITTER_EPS, training, estimator, **draws)
    expected = route(logits, 2, JITTER_EPS, training, noise if training else None, estimator)
    differ = (found.selected_experts != expected.selected_experts).any(dim=1).sum().item()
    if differ:
        raise ValueError(f"{differ} of {tokens} tokens have other experts than the reference with the same draws")
    pairs = [
        [one.routing_weights, torch.autograd.grad(one.routing_weights, logits, upstream)[0]]
        + ([] if one.expert_gradient_scale is None else [one.expert_gradient_scale])
        for one in (found, expected)
    ]
    compared = decided(logits, expected.selected_experts, estimator)
    return error_of(*([tensor[compared] for tensor in pair] for pair in pairs))


def jitter_error(tokens: int, dtype: torch.dtype, device: torch.device) -> float:
    from grinmoe.kernels.triton_router import fused_input_jitter

    torch.manual_seed(3)
    hidden_states = torch.randn(tokens, 1100, device=device).to(dtype).requires_grad_()
    upstream = torch.randn(tokens, 1100, device=device).to(dtype)
    factors = counter_jitter(SEED, STREAM, tokens, 1100, JITTER_EPS, dtype, device)
    found = fused_input_jitter(hidden_states, JITTER_EPS, SEED, STREAM)
    gradient = torch.autograd.grad(found, hidden_states, upstream)[0]
    return error_of([found, gradient], [hidden_states * factors, upstream * factors])


def choices_of(size: Sizes, tokens: int, device: torch.device, elsewhere: bool) -> torch.Tensor:
    return distinct(tokens, 2, size.experts + elsewhere).to(device)


def place_rows_error(size, tokens, dtype, device, elsewhere) -> float:
    """0 if order, its inverse and ends are those of a stable sort, else 1."""
    from grinmoe.kernels.permute_kernels import place_rows

    chosen = choices_of(size, tokens, device, elsewhere)
    order, row_of_choice, ends = place_rows(chosen, size.experts)
    by_expert, expected = chosen.flatten().sort(stable=True)
    inverse = expected.argsort()
    last = (by_expert[None] <= torch.arange(size.experts, device=device)[:, None]).sum(1)
    pairs = (order, expected), (row_of_choice, inverse), (ends, last)
    return float(not all(torch.equal(found.long(), wanted) for found, wanted in pairs))


def gather_rows_error(size, tokens, dtype, device, elsewhere) -> float:
    from grinmoe.kernels.permute_kernels import gather_rows, place_rows

    order, row_of_choice, ends = place_rows(choices_of(size, tokens, device, elsewhere), size.experts)
    hidden_states = torch.randn(tokens, size.hidden, device=device).to(dtype)
    found = gather_rows(hidden_states, row_of_choice, ends, 2)[: ends[-1]]
    return error_of([found], [hidden_states[order.long() // 2][: ends[-1]]])


def swiglu_of(pre_activation: torch.Tensor) -> torch.Tensor:
    gate, up = pre_activation.chunk(2, dim=-1)
    return nn.functional.silu(gate) * up


def swiglu_error(size, tokens, dtype, device, elsewhere) -> float:
    from grinmoe.kernels.permute_kernels import place_rows, swiglu

    _, _, ends = place_rows(choices_of(size, tokens, device, elsewhere), size.experts)
    torch.manual_seed(4)
    pre_activation = torch.randn(2 * tokens, 2 * size.width, device=device).to(dtype)
    keep = torch.rand(2 * tokens, size.width, device=device).to(dtype)
    expected, rows = swiglu_of(pre_activation.double()), slice(0, int(ends[-1]))
    found = [swiglu(pre_activation, ends)[rows], swiglu(pre_activation, ends, keep)[rows]]
    return error_of(found, [expected[rows], (expected * keep)[rows]])


def swiglu_backward_error(size, tokens, dtype, device, elsewhere) -> float:
    """Of the pre-activation's gradient, the weighted activation and the routing weights' gradient."""
    from grinmoe.kernels.permute_kernels import place_rows, swiglu_backward

    chosen = choices_of(size, tokens, device, elsewhere)
    order, _, ends = place_rows(chosen, size.experts)
    torch.manual_seed(5)
    pre_activation = torch.randn(2 * tokens, 2 * size.width, device=device).to(dtype)
    gradient = torch.randn(2 * tokens, size.width, device=device).to(dtype)
    weights = torch.rand(tokens, 2, device=device).to(dtype)
    keep = torch.rand(2 * tokens, size.width, device=device).to(dtype)
    rows = slice(0, int(ends[-1]))
    errors = []
    for dropout in (None, keep):
        found = swiglu_backward(gradient, pre_activation, weights, order, ends, dropout)
        leaf = pre_activation.double().requires_grad_()
        activation = swiglu_of(leaf) * (1.0 if dropout is None else dropout.double())
        weighted = activation * weights.double().flatten()[order.long(), None]
        (grad_pre,) = torch.autograd.grad(weighted, leaf, gradient.double())
        by_row = (activation.detach() * gradient.double()).sum(-1)
        by_row[rows.stop :] = 0.0
        grad_weights = torch.empty_like(by_row).index_copy_(0, order.long(), by_row).view(tokens, 2)
        wanted = [grad_pre[rows], weighted.detach()[rows], grad_weights]
        errors.append(error_of([found[0][rows], found[1][rows], found[2]], wanted))
    return max(errors)


def combine_error(size, tokens, dtype, device, elsewhere) -> float:
    """With weights and without. Rows of choices served elsewhere hold NaN, which must not be read."""
    from grinmoe.kernels.permute_kernels import combine, place_rows

    _, row_of_choice, ends = place_rows(choices_of(size, tokens, device, elsewhere), size.experts)
    torch.manual_seed(6)
    rows = torch.randn(2 * tokens, size.hidden, device=device).to(dtype)
    weights = torch.rand(tokens, 2, device=device).to(dtype)
    exact = rows.double()
    exact[ends[-1] :] = 0.0
    rows[ends[-1] :] = float("nan")
    by_choice = exact[row_of_choice.long()].view(tokens, 2, size.hidden)
    found = [combine(rows, row_of_choice, ends, 2), combine(rows, row_of_choice, ends, 2, weights)]
    return error_of(found, [by_choice.sum(1), (by_choice * weights.double().unsqueeze(-1)).sum(1)])


PERMUTE_ERRORS = {
    "place_rows": place_rows_error,
    "gather_rows": gather_rows_error,
    "swiglu": swiglu_error,
    "swiglu_backward": swiglu_backward_error,
    "combine": combine_error,
}


def captured_error(device: torch.device) -> float:
    """Of a replayed graph over other inputs than it was captured with, against the same launches."""
    from grinmoe.kernels import few_tokens_experts

    experts = build_experts(SMALL, 2, torch.bfloat16, device, "eager").requires_grad_(False)
    fused = experts.gate_up_proj, experts.down_proj
    chosen = distinct(8, 2, SMALL.experts).to(device)
    hidden_states = torch.randn(8, SMALL.hidden, device=device).bfloat16()
    weights = torch.rand(8, 2, device=device).bfloat16()
    few_tokens_experts(hidden_states, chosen, weights, *fused)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = few_tokens_experts(hidden_states, chosen, weights, *fused)
    hidden_states.normal_()
    chosen.copy_(chosen.flip(0))
    graph.replay()
    return error_of([found], [few_tokens_experts(hidden_states, chosen, weights, *fused)])


def second_device_error() -> float:
    """Tensors on the second GPU while the first is the current one."""
    with torch.cuda.device(0):
        return experts_error(SMALL, "uneven groups", torch.float32, torch.device("cuda", 1))


def error_of(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Largest error over the largest expected number; where all expected are 0, the largest number found."""
    zeros = [f.float().abs().max().item() for f, e in zip(found, expected, strict=True) if e.numel() and not e.any()]
    # `max` would pass over NaN.
    if any(not tensor.isfinite().all() for tensor in found):
        return float("nan")
    pairs = [(f, e) for f, e in zip(found, expected, strict=True) if e.numel() and e.any()]
    return max([*zeros, *([relative_error(*map(list, zip(*pairs, strict=True)))] if pairs else []), 0.0])


__all__ = ["CorrectnessSettings", "run"]
