"""Time of one layer's experts for few tokens and without gradients, as in decoding: 1 to 128 tokens.

    python -m benchmarks experts
    TRITON_INTERPRET=1 python -m benchmarks experts --toy

Arms: `grinmoe_triton`, which takes the kernels that read each needed expert once up to 128 assignments and grouped products
beyond; Transformers' `batched_mm`, which copies the weights of every assignment, and `grouped_mm`; and the default. The
released layer in bfloat16 on a GPU, a small one in float32 on a CPU. Before an arm is timed, its output is held against the
reference loop in float64 (on a GPU float32).

The floor is the time to read the experts that were chosen, once, at the measured copy rate.

At the end the tiles that `small_batch_gemm` lists are measured for 1, 8 and 32 tokens, each in the place of the one in use.

Shapes: T tokens, K = 2 experts per token, N = T * K assignments, E experts, H hidden size, I expert width.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.bench_block import choose_experts
from benchmarks.block_arms import describe
from benchmarks.protocol import Report, Timing, best_device, interleave, rates, relative_error
from grinmoe import GrinMoeConfig
from grinmoe.modeling_grinmoe import GrinMoeExperts
from grinmoe.provenance import markdown_table

TOP_K = 2
KERNELS, COPIES, GROUPED, DEFAULT, REFERENCE = "grinmoe_triton", "batched_mm", "grouped_mm", "grinmoe", "eager"
# Relative error in the maximum norm: float32 against float64, bfloat16 against float32.
GATE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
IN_USE = "tiles in use"
TILE_TOKENS = (1, 8, 32)
# Of a GPU's memory, what copies of weights may take.
COPIES_SHARE = 0.4


@dataclass(frozen=True)
class ExpertsSettings:
    """Sizes that are None are those of the device.

    Attributes:
        tokens: T, each in turn.
        minutes: after which rounds are saved.
        toy: a GPU's arms on a CPU at a size that measures nothing.
    """

    tokens: tuple[int, ...] = (1, 8, 10, 16, 32, 64, 128)
    warmup: int = 5
    rounds: int = 30
    minutes: float | None = None
    toy: bool = False


def experts_config(device: torch.device, toy: bool) -> GrinMoeConfig:
    sizes: dict[str, Any] = {"hidden_size": 512, "intermediate_size": 800, "num_attention_heads": 8}
    if toy:
        sizes = {"hidden_size": 64, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    elif device.type == "cuda":
        sizes = {}
    return GrinMoeConfig(num_hidden_layers=1, **sizes)


def build_arms(names: list[str], device: torch.device, dtype: torch.dtype, toy: bool) -> dict[str, GrinMoeExperts]:
    """Experts in evaluation mode by implementation, all with the same random weights in the same memory."""
    torch.manual_seed(0)
    weights: dict[str, torch.Tensor] = {}
    arms = {}
    for name in names:
        config = experts_config(device, toy)
        config._experts_implementation = name
        with torch.device("meta"):
            experts = GrinMoeExperts(config)
        for key, parameter in list(experts.named_parameters()):
            if key not in weights:
                weights[key] = torch.randn(parameter.shape, device=device, dtype=dtype).mul_(0.02)
            setattr(experts, key, nn.Parameter(weights[key], requires_grad=False))
        arms[name] = experts.eval()
    return arms


def names_for(device: torch.device, toy: bool) -> list[str]:
    return [*([KERNELS] if device.type == "cuda" or toy else []), COPIES, GROUPED, DEFAULT]


def run(options: ExpertsSettings) -> Path:
    """
    Measure every number of tokens, print the tables, and return the path of the report.

    Raises:
        RuntimeError: an arm failed the gate or does not run here. The report is written all the same.
    """
    device = best_device()
    deadline = None if options.minutes is None else time.monotonic() + 60 * options.minutes
    if options.toy:
        options = replace(options, tokens=(1, 10), warmup=1, rounds=2)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    report = Report("experts", asdict(options), options.toy)
    best = rates(device)
    report.add("rates", best)
    arms = build_arms([REFERENCE, *names_for(device, options.toy)], device, dtype, options.toy)
    reference = arms.pop(REFERENCE)
    config = reference.config
    text = (
        f"One layer's experts without gradients; H {config.hidden_size}, I {config.intermediate_size}, E "
        f"{config.num_local_experts}, K {TOP_K}, {str(dtype).removeprefix('torch.')}, even load. Copies: "
        f"{best['tb_per_s']:.3g} TB/s. `host` is the time until Python has launched it all."
    )
    report.add("description", text, text)
    cases: dict[str, Any] = {}
    for tokens in options.tokens:
        cases[f"{tokens} tokens"] = case = measure(arms, reference, tokens, options, deadline)
        case["floor_seconds"] = case["bytes_read"] / (best["tb_per_s"] * 1e12)
        report.update("cases", cases, {f"{tokens} tokens": section(tokens, case)})
    tiles: dict[str, Any] = {}
    for tokens in (options.tokens[:1] if options.toy else TILE_TOKENS) if KERNELS in arms else ():
        if deadline is not None and time.monotonic() > deadline:
            tiles[f"{tokens} tokens"] = {"arms": {}, "refused": {"all tiles": "no time was left"}}
        else:
            tiles[f"{tokens} tokens"] = measure_tiles(reference, tokens, options, deadline)
        report.update("tiles", tiles, {f"tiles, {tokens} tokens": tiles_section(tokens, tiles[f"{tokens} tokens"])})
    path = report.finish()
    if wrong := {f"{name}, {size}": why for size, case in cases.items() for name, why in case["refused"].items()}:
        raise RuntimeError("; ".join(f"{name}: {reason}" for name, reason in wrong.items()))
    return path


@torch.no_grad()
def measure(
    arms: dict[str, GrinMoeExperts],
    reference: GrinMoeExperts,
    tokens: int,
    options: ExpertsSettings,
    deadline: float | None,
) -> dict[str, Any]:
    """Gate and time all arms with `tokens` tokens. Facts: arms, what was refused or left out and why, bytes to read."""
    weight = reference.gate_up_proj
    device, dtype = weight.device, weight.dtype
    torch.manual_seed(tokens)
    chosen = choose_experts(tokens, reference.num_experts, skewed=False).to(device)
    hidden_states = torch.randn(tokens, reference.hidden_dim, device=device).to(dtype)
    routing_weights = torch.rand(chosen.shape, device=device).to(dtype)
    expert_bytes = dtype.itemsize * 3 * reference.hidden_dim * reference.intermediate_dim
    found: dict[str, Any] = {
        "arms": {},
        "refused": {},
        "left_out": {},
        "experts_read": int(chosen.unique().numel()),
        "bytes_read": int(chosen.unique().numel()) * expert_bytes,
    }
    exact = exact_output(reference, hidden_states, chosen, routing_weights)
    errors, runs = {}, {}
    for name, experts in arms.items():
        copies = chosen.numel() * expert_bytes
        if name == COPIES and device.type == "cuda":
            memory = torch.cuda.get_device_properties(device).total_memory
            if copies > COPIES_SHARE * memory:
                found["left_out"][name] = f"it would copy {copies / 2**30:.0f} GiB of weights"
                continue
        run = runner(experts, hidden_states, chosen, routing_weights)
        try:
            errors[name] = relative_error([run(0)], [exact])
        # Of a kernel that this device does not take: the others are measured all the same.
        except Exception as raised:
            found["refused"][name] = describe(raised)
            continue
        if errors[name] <= GATE[dtype]:
            runs[name] = run
        else:
            found["refused"][name] = f"relative error {errors[name]:.2g} against {exact.dtype}"
    timings = interleave(runs, options.warmup, options.rounds, device, deadline)
    found["arms"] = {name: timing.facts() | {"relative_error": errors[name]} for name, timing in timings.items()}
    return found


@torch.no_grad()
def measure_tiles(
    reference: GrinMoeExperts, tokens: int, options: ExpertsSettings, deadline: float | None
) -> dict[str, Any]:
    """Each listed tile of one product with the other's in use. Facts: arms, and what was refused and why."""
    from grinmoe.kernels import down_tiles, gate_up_tiles, launch_few_tokens

    weights = reference.gate_up_proj, reference.down_proj
    device, dtype = weights[0].device, weights[0].dtype
    torch.manual_seed(tokens)
    chosen = choose_experts(tokens, reference.num_experts, skewed=False).to(device)
    hidden_states = torch.randn(tokens, reference.hidden_dim, device=device).to(dtype)
    given = hidden_states, chosen, torch.rand(chosen.shape, device=device).to(dtype), *weights

    def run_of(**tiles) -> Callable[[int], torch.Tensor]:
        return lambda _: launch_few_tokens(*given, **tiles)

    arms = {IN_USE: run_of()}
    for name, argument, tiles in (("gate, up", "first", gate_up_tiles), ("down", "second", down_tiles)):
        for tile in tiles(tokens)[1:]:
            label = f"{name}: {tile.rows} rows, {tile.columns} columns, {tile.warps} warps, {tile.stages} stages"
            arms[label] = run_of(**{argument: tile})
    expected = arms[IN_USE](0)
    runs, refused = {}, {}
    for name, run in arms.items():
        try:
            error = relative_error([run(0)], [expected])
        # Of a tile that this device has no room for: the others are measured all the same.
        except Exception as raised:
            refused[name] = describe(raised)
            continue
        if error <= GATE[dtype]:
            runs[name] = run
        else:
            refused[name] = f"relative error {error:.2g} against the tiles in use"
    timings = interleave(runs, options.warmup, options.rounds, device, deadline)
    return {"arms": {name: timing.facts() for name, timing in timings.items()}, "refused": refused}


def tiles_section(tokens: int, found: dict[str, Any]) -> str:
    timings = {name: Timing(arm["seconds"]) for name, arm in found["arms"].items()}
    rows = [
        [name, f"{1e3 * timing.median_ms:.1f}", f"{timing.ratio_to(timings[IN_USE]):.3f}"]
        for name, timing in timings.items()
    ]
    parts = [f"## tiles, {tokens} tokens", *(f"{name}: {why}" for name, why in found["refused"].items())]
    if rows:
        parts.insert(1, markdown_table(["tile", "median, us, both products", "times faster than those in use"], rows))
    return "\n\n".join(parts)


def runner(experts: GrinMoeExperts, hidden_states, chosen, routing_weights) -> Callable[[int], torch.Tensor]:
    @torch.no_grad()
    def run(_: int) -> torch.Tensor:
        return experts(hidden_states, chosen, routing_weights)

    return run


def exact_output(reference: GrinMoeExperts, hidden_states, chosen, routing_weights) -> torch.Tensor:
    """The reference loop's output in float64, on a GPU float32."""
    exact = torch.float32 if hidden_states.is_cuda else torch.float64
    return copy.deepcopy(reference).to(exact)(hidden_states.to(exact), chosen, routing_weights.to(exact))


def section(tokens: int, case: dict[str, Any]) -> str:
    """One number of tokens for people."""
    floor, rows = case["floor_seconds"], []
    timings = {name: Timing(arm["seconds"]) for name, arm in case["arms"].items()}
    for name, timing in timings.items():
        arm = case["arms"][name]
        low, high = timing.quartiles_ms
        seconds = 1e-3 * timing.median_ms
        rows.append(
            [
                name,
                f"{1e6 * seconds:.1f}",
                f"{1e3 * low:.1f} to {1e3 * high:.1f}",
                f"{1e6 * arm['host_seconds']:.1f}" if "host_seconds" in arm else "-",
                f"{case['bytes_read'] / seconds / 1e12:.3g}",
                f"{floor / seconds:.0%}",
                f"{timing.ratio_to(timings[GROUPED]):.2f}" if GROUPED in timings else "-",
                f"{arm['relative_error']:.1e}",
            ]
        )
    header = ["arm", "median, us", "quartiles, us", "host, us", "TB/s of what must be read", "of the floor"]
    parts = [
        f"## {tokens} tokens",
        f"{case['experts_read']} experts, {case['bytes_read'] / 1e9:.3g} GB to read: at least {1e6 * floor:.0f} us.",
        markdown_table([*header, f"times faster than {GROUPED}", "error"], rows),
    ]
    parts += [f"{name} was not timed. {why}" for name, why in (case["refused"] | case["left_out"]).items()]
    return "\n\n".join(parts)


__all__ = ["ExpertsSettings", "run"]
