"""Time and memory of one sparse block, against a dense MLP and Transformers' own (goals G1, G3, G4, G8).

    python -m benchmarks block
    python -m benchmarks block --hidden-size 1024 --intermediate-size 1600 --rounds 8

Every arm has the same weights and, in each round, the same input, whose routing is drawn beforehand: evenly over the
experts, or skewed (a quarter of the experts get four times as many tokens as the others). Every round has a draw of its
own (on a GPU one of three), so that group sizes vary as they do in training. The blocks are in training mode; with a mask
width of nearly zero each draw has one candidate, so sampling takes the intended expert in every arm. Input jitter is off,
since Transformers' block applies it twice. The dense MLP has K times an expert's width: as many active parameters.

Before anything is timed, the output and all gradients of each arm are held against the same block in float64 (on a GPU
float32). An arm that fails is not timed; the others are, and the run ends with an error. It also does if an arm is faster
than the floor: then the floor is none. On a CPU that is the best rate of any product at these shapes, measured before and
after the arms.

Shapes: T tokens, H hidden size, I expert width, E experts, K = 2.
"""

from __future__ import annotations

import contextlib
import copy
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.block_arms import (
    DEFAULT,
    DENSE,
    KERNELS,
    LIGER,
    PHIMOE_EAGER,
    PHIMOE_GROUPED,
    QUACK,
    REFERENCE,
    SONIC,
    BlockSize,
    DenseMlp,
    block_arms,
    describe,
    router_of,
    share_weights,
)
from benchmarks.figure import draw_block
from benchmarks.floors import STEP_OVER_FORWARD, block_floor_seconds, block_flops, kept_at_least
from benchmarks.product_rates import Rate, best_of, product_rates, rates_table
from benchmarks.profiling import grouped, profile, profile_table
from benchmarks.protocol import Report, Timing, best_device, interleave, rates, relative_error, saved_bytes
from grinmoe.provenance import markdown_table

TOP_K = 2
# Relative error in the maximum norm: float32 against float64, bfloat16 against float32.
GATE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
PROFILED = (DENSE, PHIMOE_GROUPED, DEFAULT, KERNELS, QUACK)


@dataclass(frozen=True)
class BlockSettings:
    """Sizes that are None are those of the device: a small block on a CPU, the released model's on a GPU.

    Attributes:
        tokens: T, or several in the order in which they are measured.
        minutes: after which rounds are saved.
        toy: a GPU's arms on a CPU at a size that measures nothing.
    """

    tokens: int | tuple[int, ...] | None = None
    hidden_size: int | None = None
    intermediate_size: int | None = None
    experts: int = 16
    warmup: int = 5
    rounds: int = 20
    minutes: float | None = None
    toy: bool = False

    def for_device(self, device: torch.device) -> BlockSettings:
        sizes: dict[str, Any] = {"tokens": (1024,), "hidden_size": 512, "intermediate_size": 800}
        if device.type == "cuda":
            # The sizes of the goals first, in case that time runs out.
            sizes = {"tokens": (16384, 8192, 32768, 2048), "hidden_size": 4096, "intermediate_size": 6400}
        filled = {name: value for name, value in sizes.items() if getattr(self, name) is None}
        if self.toy:
            filled = {
                "tokens": (40,),
                "hidden_size": 64,
                "intermediate_size": 32,
                "experts": 8,
                "warmup": 1,
                "rounds": 2,
            }
        settings = replace(self, **filled)
        return replace(settings, tokens=(settings.tokens,)) if isinstance(settings.tokens, int) else settings

    @property
    def size(self) -> BlockSize:
        return BlockSize(self.hidden_size or 0, self.intermediate_size or 0, self.experts, TOP_K)


@dataclass
class Case:
    """One number of tokens and one kind of load: facts by arm, and what was refused and why."""

    tokens: int
    skewed: bool
    arms: dict[str, dict[str, Any]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    kernels: dict[str, dict[str, float]] = field(default_factory=dict)
    groups: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{'4:1 skewed' if self.skewed else 'even'} load, {self.tokens} tokens"


def choose_experts(tokens: int, experts: int, skewed: bool) -> torch.Tensor:
    """(T, K) distinct experts per token, drawn with equal chances, or the first quarter with four times the others'."""
    chances = torch.ones(experts)
    if skewed:
        chances[: experts // 4] = 4.0
    return torch.multinomial(chances.expand(tokens, -1), TOP_K)


def routed_input(chosen: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
    """Input (1, T, H) for which a router with the orthonormal rows `directions` (E, H) chooses `chosen`, in that order."""
    chosen = chosen.to(directions.device)
    noise = torch.randn(chosen.shape[0], directions.shape[1], device=directions.device)
    noise -= noise @ directions.T @ directions
    return (noise + 4.0 * directions[chosen[:, 0]] + 2.0 * directions[chosen[:, 1]]).unsqueeze(0)


def step(block: nn.Module, hidden_states: torch.Tensor, upstream: torch.Tensor) -> list[torch.Tensor]:
    """One forward and backward. Returns the output and the gradients of the input and of every parameter."""
    leaf = hidden_states.detach().requires_grad_()
    output = block(leaf)
    output.backward(upstream)
    results = [output.detach(), leaf.grad, *(parameter.grad for parameter in block.parameters())]
    for parameter in block.parameters():
        parameter.grad = None
    return results


def gate(
    blocks: dict[str, nn.Module], hidden_states: torch.Tensor, upstream: torch.Tensor
) -> tuple[dict[str, float], dict[str, str]]:
    """
    Hold each arm's output and gradients against more precision.

    The router's gradient is zero here (one candidate per draw), which has no relative error.

    Returns:
        Largest relative error of each arm that may be timed; and why the others may not.
    """
    exact = torch.float32 if hidden_states.is_cuda else torch.float64
    expected: dict[bool, list[torch.Tensor]] = {}
    errors, refused = {}, {}
    # The dense arms together: one set of exact gradients is there at a time.
    for name, block in sorted(blocks.items(), key=lambda pair: isinstance(pair[1], DenseMlp)):
        is_dense = isinstance(block, DenseMlp)
        if is_dense not in expected:
            expected.clear()
            reference = copy.deepcopy(blocks[DENSE if is_dense else REFERENCE]).to(exact)
            expected[is_dense] = step(reference, hidden_states.to(exact), upstream.to(exact))
            del reference
        try:
            error = relative_error(step(block, hidden_states, upstream), expected[is_dense])
        # Of an arm that is not ours, or of a kernel that this device does not take: the others are measured all the same.
        except Exception as raised:
            refused[name] = describe(raised)
            continue
        if error <= GATE[hidden_states.dtype]:
            errors[name] = error
        else:
            refused[name] = f"relative error {error:.2g} against {str(exact).removeprefix('torch.')}"
    return errors, refused


def measure_memory(block: nn.Module, hidden_states: torch.Tensor, upstream: torch.Tensor) -> dict[str, int]:
    """Bytes that autograd saves, parameters left out; on a GPU also the peak of a step beyond what was there."""
    with saved_bytes(list(block.parameters())) as kept_bytes:
        output = block(hidden_states.detach().requires_grad_())
    del output
    memory = {"saved_bytes": kept_bytes()}
    if hidden_states.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(block, hidden_states, upstream)
        memory["peak_bytes"] = torch.cuda.max_memory_allocated() - before
    return memory


def misrouting(block: nn.Module, inputs: list[torch.Tensor], choices: list[torch.Tensor]) -> str | None:
    """Why the router of an arm may not be used: it chooses others than the intended experts, or does not run here."""
    if isinstance(block, DenseMlp):
        return None
    try:
        found = [router_of(block)(hidden_states[0])[2].cpu() for hidden_states in inputs]
    except Exception as raised:
        return describe(raised)
    return None if all(map(torch.equal, found, choices)) else "the router does not choose what was intended"


def measure(
    case: Case, arms: dict[str, nn.Module], directions: torch.Tensor, options: BlockSettings, deadline: float | None
) -> None:
    """Gate, measure and profile all arms, and enter the facts in `case`."""
    torch.manual_seed(1)
    device, dtype = directions.device, directions.dtype
    # On a GPU the inputs of all rounds would not fit.
    draws = 3 if device.type == "cuda" else options.warmup + options.rounds
    choices = [choose_experts(case.tokens, options.experts, case.skewed) for _ in range(draws)]
    inputs = [routed_input(chosen, directions.float()).to(dtype) for chosen in choices]
    upstream = torch.randn_like(inputs[0])
    misrouted = {name: why for name, block in arms.items() if (why := misrouting(block, inputs, choices))}
    arms = {name: block for name, block in arms.items() if name not in misrouted}
    errors, refused = gate(arms, inputs[0], upstream)
    case.refused = misrouted | refused
    memory = {}
    for name in list(errors):
        try:
            memory[name] = measure_memory(arms[name], inputs[0], upstream)
        # Memory runs out, or a compiler does not take the hooks: the others are measured all the same.
        except Exception as raised:
            case.refused[name] = describe(raised)
            del errors[name]
    blocks = {name: arms[name] for name in arms if name in errors}

    def forward_of(block: nn.Module) -> Callable[[int], object]:
        return lambda number: block(inputs[number % draws])

    def step_of(block: nn.Module) -> Callable[[int], object]:
        return lambda number: step(block, inputs[number % draws], upstream)

    forwards = {f"{name}, forward": forward_of(block) for name, block in blocks.items()}
    steps = {name: step_of(block) for name, block in blocks.items()}
    timings = interleave(forwards | steps, options.warmup, options.rounds, device, deadline)
    for name in blocks:
        of_forward = {"forward_seconds": timings[f"{name}, forward"].seconds, "relative_error": errors[name]}
        case.arms[name] = timings[name].facts() | of_forward | memory[name]
    if not case.skewed:
        for name in PROFILED:
            if name in blocks:
                with seen_by_the_profiler(device):
                    case.kernels[name] = profile(steps[name], device, rounds=1 if options.toy else 3)
                median = 1e-3 * timings[name].median_ms if device.type == "cuda" else None
                case.groups[name] = grouped(case.kernels[name], median)


@contextlib.contextmanager
def seen_by_the_profiler(device: torch.device) -> Iterator[None]:
    """On a CPU one thread: the profiler does not see what the experts do in others."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if device.type == "cpu" else threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def table(case: Case, options: BlockSettings, tflops: float) -> str:
    timings = {name: Timing(arm["seconds"]) for name, arm in case.arms.items()}
    forward_flops = block_flops(case.tokens, options.hidden_size or 0, options.intermediate_size or 0, TOP_K)
    on_gpu = any("peak_bytes" in arm for arm in case.arms.values())
    rows = []
    for name, timing in timings.items():
        arm = case.arms[name]
        low, high = timing.quartiles_ms
        reached = STEP_OVER_FORWARD * forward_flops / (1e-3 * timing.median_ms) / 1e12
        # An arm that was refused cannot be compared with.
        ratios = [
            f"{timing.ratio_to(timings[base]):.3f}" if base in timings else "-"
            for base in (DENSE, PHIMOE_GROUPED, PHIMOE_EAGER)
        ]
        rows.append(
            [
                name,
                f"{Timing(arm['forward_seconds']).median_ms:.2f}",
                f"{timing.median_ms:.2f}",
                f"{low:.2f} to {high:.2f}",
                f"{reached:.3g}",
                f"{reached / tflops:.0%}",
                *ratios,
                f"{arm['saved_bytes'] / 2**20:.4g}",
                *(
                    [f"{arm['peak_bytes'] / 2**30:.2f}", f"{1e3 * arm.get('host_seconds', math.nan):.2f}"]
                    if on_gpu
                    else []
                ),
                f"{arm['relative_error']:.1e}",
            ]
        )
    header = ["arm", "forward, ms", "step, ms", "quartiles, ms", "TFLOP/s", "of the floor", "times faster than dense"]
    header += [
        "than phimoe grouped_mm",
        "than phimoe eager",
        "kept, MiB",
        *(["peak, GiB", "host, ms"] if on_gpu else []),
        "error",
    ]
    return markdown_table(header, rows)


def introduction(options: BlockSettings, best: dict[str, float], left_out: dict[str, str], on_gpu: bool) -> str:
    dtype = "bfloat16" if on_gpu else "float32"
    text = (
        f"One sparse block, {dtype}, forward and backward with all weight gradients; H {options.hidden_size}, I "
        f"{options.intermediate_size}, E {options.experts}, K {TOP_K}. Arms interleaved, {options.warmup} warm-up and up to "
        f"{options.rounds} counted rounds; ratios are medians over rounds. `TFLOP/s` counts the products that the step "
        f"needs; the floor is their time at the fastest {dtype} product that was measured (copies: "
        f"{best['tb_per_s']:.3g} TB/s). `kept` is what autograd saves, parameters left out. `error` is the largest relative "
        "error of output and gradients against more precision."
    )
    missing = "\n".join(f"- {name} is not measured. {reason}" for name, reason in left_out.items())
    return f"{text}\n\n{missing}" if missing else text


def run(options: BlockSettings) -> Path:
    """
    Measure every size and load, print tables as they come, and return the path of the report.

    Raises:
        RuntimeError: an arm of ours or of Transformers' failed the gate, or one beat the floor. The report is written all
            the same.
    """
    device = best_device()
    deadline = None if options.minutes is None else time.monotonic() + 60 * options.minutes
    options = options.for_device(device)
    report = Report("block", asdict(options), options.toy)
    best = rates(device)
    torch.manual_seed(0)
    arms, left_out = block_arms(options.size, device, options.toy)
    report.add("left_out", left_out)
    report.add("rates", best, introduction(options, best, left_out, device.type == "cuda"))
    directions, _ = torch.linalg.qr(torch.randn(options.size.hidden_size, options.experts))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    directions = directions.T.contiguous().to(device, dtype)  # (E, H)
    share_weights(arms, directions, options.size)
    cases = [Case(tokens, skewed) for skewed in (False, True) for tokens in options.tokens or ()]  # type: ignore[union-attr]
    floor = Floor(options, best["tflops"], device)
    for number, case in enumerate(cases):
        floor.measure()
        measure(case, arms, directions, options, deadline)
        floor.measure()
        enter(report, cases[: number + 1], options, floor.tflops)
    floor.enter(report)
    report.add("figure", *draw_block(report.path.with_suffix(".png"), report.facts))
    path = report.finish()
    refused = {name: reason for case in cases for name, reason in case.refused.items() if name not in (LIGER, SONIC)}
    if not options.toy:
        refused |= faster_than_the_floor(report.facts)
    if refused:
        nothing = "" if any(case.arms for case in cases) else "; nothing was timed"
        raise RuntimeError("; ".join(f"{name}: {reason}" for name, reason in refused.items()) + nothing)
    return path


class Floor:
    """The best rate of a product, in TFLOP/s. On a CPU of all products at the block's shapes, as often as it is measured."""

    def __init__(self, options: BlockSettings, tflops: float, device: torch.device):
        self.tflops = tflops
        self.size = options.size
        # As many as an expert gets, and all tokens, which is what the dense arm multiplies.
        each = [(tokens * TOP_K // options.experts, tokens) for tokens in options.tokens or ()]  # type: ignore[union-attr]
        self.rows = tuple(dict.fromkeys(number for pair in each for number in pair if number))
        self.on_cpu = device.type == "cpu" and not options.toy
        self.rates: list[list[Rate]] = []

    def measure(self) -> None:
        if self.on_cpu:
            self.rates.append(product_rates(self.size.hidden_size, self.size.intermediate_size, self.rows))
            self.tflops = max(self.tflops, best_of(self.rates[-1]))

    def enter(self, report: Report) -> None:
        if not self.rates:
            return
        # Of each product the best of all times.
        best = [max(same, key=lambda rate: rate.tflops) for same in zip(*self.rates, strict=True)]
        hidden, width = self.size.hidden_size, self.size.intermediate_size
        text = (
            f"## Products\n\nGFLOP/s for a weight of {2 * width} x {hidden}, float32, the best of all rounds. Bold: what "
            f"the default takes. The floor is the fastest, {self.tflops:.3g} TFLOP/s.\n\n"
            f"{rates_table(best, hidden, width)}"
        )
        report.add("products", [rate._asdict() for rate in best], text)


def faster_than_the_floor(facts: dict[str, Any]) -> dict[str, str]:
    """Arms whose median is below the floor, and by how much."""
    found = {}
    for case, arms in facts.get("arms", {}).items():
        floor = facts["cases"][case]["floor_seconds"]
        for name, arm in arms.items():
            for key, seconds in (("step", arm["seconds"]), ("forward", arm["forward_seconds"])):
                if (median := statistics.median(seconds)) < floor[key]:
                    found[name] = (
                        f"{case}, {key} in {1e3 * median:.2f} ms where the floor is {1e3 * floor[key]:.2f} ms: that is no "
                        "floor then, or work was left out"
                    )
    return found


def enter(report: Report, cases: list[Case], options: BlockSettings, tflops: float) -> None:
    """Write what is known of `cases`, and print the last."""
    size, case = options.size, cases[-1]
    element = 2 if report.stamp["gpu"] else 4
    facts = {}
    for one in cases:
        floor = block_floor_seconds(one.tokens, size.hidden_size, size.intermediate_size, TOP_K, tflops)
        least = kept_at_least(one.tokens, size.hidden_size, size.intermediate_size, TOP_K, element)
        facts[one.name] = {
            "tokens": one.tokens,
            "skewed": one.skewed,
            "floor_seconds": floor,
            "kept_at_least_bytes": least,
            "refused": one.refused,
            "profile": one.groups,
            "kernels": one.kernels,
        }
    report.add("cases", facts)
    parts = [f"## {case.name}"]
    if case.arms:
        parts.append(table(case, options, tflops))
    parts += [f"{name} was not timed. {reason}" for name, reason in case.refused.items()]
    parts.append(
        f"Floor: {1e3 * floor['forward']:.2f} ms forward, {1e3 * floor['step']:.2f} ms step. Least to keep: "
        f"{least / 2**20:.4g} MiB; goal G4 allows {1.1 * least / 2**20:.4g} MiB."
    )
    if case.groups:
        how = "" if report.stamp["gpu"] else "Profiled on one thread, where every operation is seen.\n\n"
        parts.append(how + profile_table(case.kernels, case.groups))
    report.add("arms", {one.name: one.arms for one in cases}, "\n\n".join(parts))


__all__ = ["BlockSettings", "choose_experts", "run"]
