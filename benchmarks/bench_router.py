"""Time of the router, logits to choices and weights and back, with its draws (goal G5).

    python -m benchmarks router
    TRITON_INTERPRET=1 python -m benchmarks router --toy

Arms: the estimator's torch operators, the same compiled (on a GPU), and the fused kernel. The kernel runs on a GPU, or at
toy size in Triton's interpreter. With the same draws its weights and their gradient must be the reference's before anything
is timed. On a GPU the launches of one forward and backward are counted.

Shapes: T tokens, E experts, K = 2.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.protocol import Report, best_device, interleave, relative_error
from grinmoe.kernels import counter_noise
from grinmoe.provenance import markdown_table
from grinmoe.routing_grinmoe import route

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
    device = best_device()
    tokens = options.tokens or (32768 if device.type == "cuda" else 96 if options.toy else 2048)
    deadline = None if options.minutes is None else time.monotonic() + 60 * options.minutes
    report = Report("router", {**asdict(options), "tokens": tokens}, options.toy)
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    logits = torch.randn(tokens, options.experts, device=device).to(dtype).requires_grad_()
    upstream = torch.randn(tokens, TOP_K, device=device).to(dtype)
    arms: dict[str, Callable[[], torch.Tensor]] = {EAGER: lambda: route(logits, TOP_K, JITTER_EPS, True)[0]}
    errors = {EAGER: 0.0}
    if device.type == "cuda":
        compiled = torch.compile(lambda z: route(z, TOP_K, JITTER_EPS, True)[0])
        arms[COMPILED], errors[COMPILED] = lambda: compiled(logits), 0.0
    if device.type == "cuda" or options.toy:
        from grinmoe.kernels.triton_router import fused_route

        arms[FUSED] = lambda: fused_route(logits, TOP_K, JITTER_EPS, True, seed=SEED)[0]
        errors[FUSED] = gate(logits, upstream, arms[FUSED]())

    def step(weigh: Callable[[], torch.Tensor]) -> None:
        torch.autograd.grad(weigh(), logits, upstream)

    steps = {name: lambda _, weigh=weigh: step(weigh) for name, weigh in arms.items()}
    timings = interleave(
        steps, 0 if options.toy else options.warmup, 2 if options.toy else options.rounds, device, deadline
    )
    on_device = {name: count_launches(run) if device.type == "cuda" else (None, None) for name, run in steps.items()}
    rows = []
    for name, timing in timings.items():
        low, high = timing.quartiles_ms
        times = [f"{1e3 * value:.1f}" for value in (timing.median_ms, low, high)]
        ratio = f"{timing.ratio_to(timings[EAGER]):.2f}"
        launches, longest = on_device[name]
        kernels = ["-", "-"] if launches is None else [str(launches), f"{1e6 * longest:.1f}"]
        rows.append([name, times[0], f"{times[1]} to {times[2]}", ratio, *kernels, f"{errors[name]:.1e}"])
    header = ["arm", "forward and backward, us", "quartiles, us", "times faster than operators", "launches"]
    header += ["longest of them, us", "error"]
    facts = {
        name: {
            "seconds": timing.seconds,
            "launches": on_device[name][0],
            "longest_launch_seconds": on_device[name][1],
            "relative_error": errors[name],
        }
        for name, timing in timings.items()
    }
    note = "" if FUSED in arms else "\n\nThe kernel needs a GPU; its time here would be the interpreter's."
    text = f"{tokens} tokens, {options.experts} experts, top-{TOP_K}, {dtype}, draws included.\n\n"
    report.add("arms", facts, text + markdown_table(header, rows) + note)
    return report.finish()


def gate(logits: torch.Tensor, upstream: torch.Tensor, weights: torch.Tensor) -> float:
    """Error of the kernel's weights and gradient against the operators with the same draws; raises if it is too large."""
    noise = counter_noise(SEED, 0, *logits.shape, TOP_K, logits.device)
    expected = route(logits, TOP_K, JITTER_EPS, True, noise)[0]
    pairs = [[w, torch.autograd.grad(w, logits, upstream)[0]] for w in (weights, expected)]
    error = relative_error(*pairs)
    if error > GATE[logits.dtype]:
        raise RuntimeError(f"{FUSED}: relative error {error:.2g} against the operators; nothing was timed")
    return error


def count_launches(run: Callable[[int], object]) -> tuple[int, float]:
    """How many kernels one forward and backward launches, and the seconds that the longest takes on the device."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        run(0)
        torch.cuda.synchronize()
    kernels = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return len(kernels), 1e-6 * max((event.self_device_time_total for event in kernels), default=0.0)


__all__ = ["RouterSettings", "run"]
