"""Time of one sparse block, forward and backward with weight gradients, against Transformers' own (goal G8 on a CPU).

    python -m benchmarks block
    python -m benchmarks block --hidden-size 1024 --intermediate-size 1600 --rounds 8

Every arm has the same weights and, in each round, the same input, whose routing is drawn beforehand: evenly over the
experts, or skewed (a quarter of the experts get four times as many tokens as the others). Every round has a draw of its
own, so that group sizes vary as they do in training. The blocks are in training mode; with a
mask width of nearly zero each draw has one candidate, so sampling takes the intended expert in every arm. Input jitter is
off, since Transformers' block applies it twice. Before anything is timed, the output and all gradients of each arm are
held against the same block in float64.

Shapes: T tokens, H hidden size, I expert width, E experts, K = 2.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PhimoeConfig
from transformers.models.phimoe.modeling_phimoe import PhimoeSparseMoeBlock

from benchmarks.protocol import Timing, interleave, write_result
from grinmoe import GrinMoeConfig
from grinmoe.modeling_grinmoe import GrinMoeSparseMoeBlock
from grinmoe.provenance import markdown_table

TOP_K = 2
BASELINE = "transformers phimoe, eager"
ARMS: dict[str, tuple[type, type, str]] = {
    BASELINE: (PhimoeConfig, PhimoeSparseMoeBlock, "eager"),
    "transformers phimoe, grouped_mm": (PhimoeConfig, PhimoeSparseMoeBlock, "grouped_mm"),
    "grinmoe, eager (reference loop)": (GrinMoeConfig, GrinMoeSparseMoeBlock, "eager"),
    "grinmoe, grouped_mm (default)": (GrinMoeConfig, GrinMoeSparseMoeBlock, "grouped_mm"),
    "grinmoe, grinmoe_cpu": (GrinMoeConfig, GrinMoeSparseMoeBlock, "grinmoe_cpu"),
}
# Relative error in the maximum norm against float64, for float32 arms.
GATE = 1e-4


@dataclass(frozen=True)
class BlockSettings:
    tokens: int = 1024
    hidden_size: int = 512
    intermediate_size: int = 800
    experts: int = 16
    warmup: int = 5
    rounds: int = 20


def build_block(arm: str, options: BlockSettings) -> nn.Module:
    config_class, block_class, implementation = ARMS[arm]
    config = config_class(
        hidden_size=options.hidden_size,
        intermediate_size=options.intermediate_size,
        num_local_experts=options.experts,
        num_experts_per_tok=TOP_K,
        num_attention_heads=8,
        num_key_value_heads=8,
        router_jitter_noise=1e-6,
        input_jitter_noise=0.0,
    )
    config._experts_implementation = implementation
    return block_class(config).train()


def choose_experts(tokens: int, experts: int, skewed: bool) -> torch.Tensor:
    """(T, K) distinct experts per token, drawn with equal chances, or the first quarter with four times the others'."""
    chances = torch.ones(experts)
    if skewed:
        chances[: experts // 4] = 4.0
    return torch.multinomial(chances.expand(tokens, -1), TOP_K)


def routed_input(chosen: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
    """Input (1, T, H) for which a router with the orthonormal rows `directions` (E, H) chooses `chosen`, in that order."""
    noise = torch.randn(chosen.shape[0], directions.shape[1])
    noise -= noise @ directions.T @ directions
    return (noise + 4.0 * directions[chosen[:, 0]] + 2.0 * directions[chosen[:, 1]]).unsqueeze(0)


def step(block: nn.Module, hidden_states: torch.Tensor, upstream: torch.Tensor) -> list[torch.Tensor]:
    """One forward and backward. Returns the output and the gradients of the input and of every parameter."""
    leaf = hidden_states.detach().requires_grad_()
    output = block(leaf * 1.0)  # phimoe's block changes its input in place, which a leaf does not allow
    output.backward(upstream)
    results = [output.detach(), leaf.grad, *(parameter.grad for parameter in block.parameters())]
    for parameter in block.parameters():
        parameter.grad = None
    return results


def gate(blocks: dict[str, nn.Module], hidden_states: torch.Tensor, upstream: torch.Tensor) -> dict[str, float]:
    """Largest relative error of each arm's output and gradients against float64; raises if one is too large."""
    reference = copy.deepcopy(blocks["grinmoe, eager (reference loop)"]).double()
    expected = step(reference, hidden_states.double(), upstream.double())
    errors = {}
    for name, block in blocks.items():
        found = step(block, hidden_states, upstream)
        # The router's gradient is zero here (one candidate per draw) and has no relative error.
        pairs = [(e, f) for e, f in zip(expected, found, strict=True) if e.abs().max() > 0]
        errors[name] = max(((f.double() - e).abs().max() / e.abs().max()).item() for e, f in pairs)
        if errors[name] > GATE:
            raise RuntimeError(f"{name}: relative error {errors[name]:.2g} against float64; nothing was timed")
    return errors


def run_load(options: BlockSettings, skewed: bool) -> tuple[dict[str, Timing], dict[str, float]]:
    torch.manual_seed(0)
    directions, _ = torch.linalg.qr(torch.randn(options.hidden_size, options.experts))
    directions = directions.T.contiguous()  # (E, H)
    choices = [choose_experts(options.tokens, options.experts, skewed) for _ in range(options.warmup + options.rounds)]
    inputs = [routed_input(chosen, directions) for chosen in choices]
    upstream = torch.randn_like(inputs[0])
    blocks = {name: build_block(name, options) for name in ARMS}
    first = next(iter(blocks.values()))
    for parameter in first.parameters():
        nn.init.normal_(parameter, std=0.02)
    for block in blocks.values():  # the same memory, not just the same values
        router, experts = (getattr(block, "gate", None) or block.router), block.experts
        router.weight = nn.Parameter(directions)
        experts.gate_up_proj, experts.down_proj = first.experts.gate_up_proj, first.experts.down_proj
        for chosen, hidden_states in zip(choices, inputs, strict=True):
            assert torch.equal(router(hidden_states[0])[2], chosen), "the router does not choose what was intended"
    errors = gate(blocks, inputs[0], upstream)

    def runner(block: nn.Module) -> Callable[[int], object]:
        return lambda number: step(block, inputs[number], upstream)

    timings = interleave({name: runner(block) for name, block in blocks.items()}, options.warmup, options.rounds)
    return timings, errors


def table(timings: dict[str, Timing], errors: dict[str, float]) -> str:
    rows = []
    for name, timing in timings.items():
        low, high = timing.quartiles_ms
        ratio = timing.ratio_to(timings[BASELINE])
        rows.append(
            [name, f"{timing.median_ms:.1f}", f"{low:.1f} to {high:.1f}", f"{ratio:.2f}", f"{errors[name]:.1e}"]
        )
    return markdown_table(["arm", "median, ms", "quartiles, ms", "times faster than eager phimoe", "error"], rows)


def run(options: BlockSettings) -> Path:
    """Run both loads, print their tables as they come, and return the path of the written report."""
    sections, facts = [], {"settings": asdict(options), "arms": {}}
    for label, skewed in (("even load", False), ("4:1 skewed load", True)):
        timings, errors = run_load(options, skewed)
        sections.append(f"## {label}\n\n{table(timings, errors)}")
        facts["arms"][label] = {
            name: {
                "seconds": timing.seconds,
                "ratio_to_eager_phimoe": timing.ratio_to(timings[BASELINE]),
                "relative_error": errors[name],
            }
            for name, timing in timings.items()
        }
        print(f"\n{sections[-1]}", flush=True)
    intro = (
        f"One sparse block, float32, forward and backward with all weight gradients; T {options.tokens}, "
        f"H {options.hidden_size}, I {options.intermediate_size}, E {options.experts}, K {TOP_K}. Arms interleaved, "
        f"{options.warmup} warm-up and {options.rounds} counted rounds, every round with a routing draw of its own; the "
        "ratio is the median over rounds. `error` is the largest relative error of output and gradients against float64."
    )
    return write_result("block", facts, "\n\n".join([intro, *sections]))
