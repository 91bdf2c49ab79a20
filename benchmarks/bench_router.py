"""Time of the router, logits to choices and weights and back, with its draws (goal G5).

    python -m benchmarks router
    TRITON_INTERPRET=1 python -m benchmarks router --toy

Arms: the estimator's torch operators, the same compiled (on a GPU), and the fused kernel. The kernel runs on a GPU, or at
toy size in Triton's interpreter. With the same draws its weights and their gradient must be the reference's before it is
timed. On a GPU the launches of one forward and backward are counted.

Shapes: T tokens, E experts, K = 2.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.block_arms import describe
from benchmarks.profiling import count_launches
from benchmarks.protocol import Report, Timing, best_device, interleave, relative_error
from grinmoe.kernels import counter_noise
from grinmoe.provenance import markdown_table
from grinmoe.routing_grinmoe import ESTIMATORS, masked_softmax, route

TOP_K, JITTER_EPS, SEED = 2, 0.01, 7
EAGER, COMPILED, FUSED = "torch operators", "torch operators, compiled", "fused kernel"
GATE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class RouterSettings:
    tokens: int | None = None
    experts: int = 16
    warmup: int = 5
    rounds: int = 50
    minutes: float | None = None
    toy: bool = False


def run(options: RouterSettings) -> Path:
    """
    Measure all arms, print the table, and return the path of the report.

    Raises:
        RuntimeError: an arm failed the gate or does not run here. The report is written all the same.
    """
    device = best_device()
    on_gpu = device.type == "cuda"
    tokens = options.tokens or (32768 if on_gpu else 96 if options.toy else 2048)
    deadline = None if options.minutes is None else time.monotonic() + 60 * options.minutes
    report = Report("router", {**asdict(options), "tokens": tokens}, options.toy)
    torch.manual_seed(0)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    logits = torch.randn(tokens, options.experts, device=device).to(dtype).requires_grad_()
    upstream = torch.randn(tokens, TOP_K, device=device).to(dtype)
    weights_of = arms_for(logits, options.toy)

    def step_of(name: str) -> Callable[[int], object]:
        return lambda _: torch.autograd.grad(weights_of[name](), logits, upstream)

    steps: dict[str, Callable[[int], object]] = {}
    refused: dict[str, str] = {}
    errors: dict[str, float | None] = {}
    for name, weigh in weights_of.items():
        try:
            # The operators draw by torch's generator: there is nothing to compare.
            errors[name] = gate_error(logits, upstream, weigh()) if name == FUSED else None
            step_of(name)(0)
        # Of a compiler or a kernel that this device does not take: the others are measured all the same.
        except Exception as raised:
            refused[name] = describe(raised)
            continue
        if (errors[name] or 0.0) > GATE[dtype]:
            refused[name] = f"relative error {errors[name]:.2g} against the operators with the same draws"
        else:
            steps[name] = step_of(name)
    warmup, rounds = (0, 2) if options.toy else (options.warmup, options.rounds)
    timings = interleave(steps, warmup, rounds, device, deadline)
    facts: dict[str, dict[str, Any]] = {}
    for name, timing in timings.items():
        launches, longest = count_launches(steps[name]) if on_gpu else (None, None)
        facts[name] = timing.facts() | {
            "launches": launches,
            "longest_launch_seconds": longest,
            "relative_error": errors[name],
        }
    note = "" if FUSED in weights_of else "\n\nThe kernel needs a GPU; its time here would be the interpreter's."
    text = (
        f"{tokens} tokens, {options.experts} experts, top-{TOP_K}, {str(dtype).removeprefix('torch.')}, forward and "
        "backward, draws included. `host` is the time until Python has launched it all; `launches` counts kernels, copies "
        "and fills on the device. `error` is against the operators with the same draws.\n\n"
    )
    reasons = "".join(f"\n\n{name} was not timed. {reason}" for name, reason in refused.items())
    report.add("refused", refused)
    report.add("arms", facts, text + table(timings, facts) + note + reasons)
    path = report.finish()
    if refused:
        raise RuntimeError("; ".join(f"{name}: {reason}" for name, reason in refused.items()))
    return path


def arms_for(logits: torch.Tensor, toy: bool) -> dict[str, Callable[[], torch.Tensor]]:
    """What gives the weights (T, K), by name."""
    arms: dict[str, Callable[[], torch.Tensor]] = {EAGER: lambda: route(logits, TOP_K, JITTER_EPS, True)[0]}
    if logits.is_cuda:
        compiled = torch.compile(lambda z: route(z, TOP_K, JITTER_EPS, True)[0])
        arms[COMPILED] = lambda: compiled(logits)
    if logits.is_cuda or toy:
        from grinmoe.kernels.triton_router import fused_route

        arms[FUSED] = lambda: fused_route(logits, TOP_K, JITTER_EPS, True, seed=SEED)[0]
    return arms


def gate_error(logits: torch.Tensor, upstream: torch.Tensor, weights: torch.Tensor) -> float:
    """Error of the kernel's weights and of their gradient against the operators with the same draws, of `decided` tokens."""
    noise = counter_noise(SEED, 0, *logits.shape, TOP_K, logits.device)
    expected, selected, _ = route(logits, TOP_K, JITTER_EPS, True, noise)
    compared = decided(logits, selected)
    pairs = ([w, torch.autograd.grad(w, logits, upstream)[0]] for w in (weights, expected))
    return relative_error(*([tensor[compared] for tensor in pair] for pair in pairs))


def decided(logits: torch.Tensor, selected: torch.Tensor, estimator: str = "sparsemixer_v2") -> torch.Tensor:
    """
    Tokens whose weights do not depend on how the last digit of a probability was rounded, (T,) bool.

    A draw that is the most probable expert has another weight than one that is not. Two experts whose probabilities are next
    to each other in the logits' dtype are in that order, or equal, by an exponential's last bit in float32, which no two
    libraries have alike: in bfloat16 with one token in 500.

    Args:
        logits: (T, E).
        selected: (T, K) experts that were drawn.
    """
    logits = logits.detach() / (2 if ESTIMATORS[estimator].halves_logits else 1)
    remaining, apart = logits, torch.ones(len(logits), dtype=torch.bool, device=logits.device)
    for expert in selected.split(1, dim=-1):
        probs, _ = masked_softmax(logits, remaining, JITTER_EPS)
        first, second = probs.float().topk(2).values.unbind(-1)
        apart &= first - second > torch.finfo(logits.dtype).eps * first
        remaining = remaining.scatter(-1, expert, float("-inf"))
    return apart


def table(timings: dict[str, Timing], facts: dict[str, dict[str, Any]]) -> str:
    base = timings.get(EAGER)
    rows = []
    for name, timing in timings.items():
        low, high = timing.quartiles_ms
        one = facts[name]
        longest = one["longest_launch_seconds"]
        rows.append(
            [
                name,
                f"{1e3 * timing.median_ms:.1f}",
                f"{1e3 * low:.1f} to {1e3 * high:.1f}",
                "-" if timing.host_ms is None else f"{1e3 * timing.host_ms:.1f}",
                "-" if base is None else f"{timing.ratio_to(base):.2f}",
                "-" if one["launches"] is None else one["launches"],
                "-" if longest is None else f"{1e6 * longest:.1f}",
                "-" if one["relative_error"] is None else f"{one['relative_error']:.1e}",
            ]
        )
    header = ["arm", "median, us", "quartiles, us", "host, us", "times faster than operators", "launches"]
    return markdown_table([*header, "longest launch, us", "error"], rows)


__all__ = ["RouterSettings", "run"]
