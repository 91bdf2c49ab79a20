"""The goals, and whether what was measured meets them: read from the reports' facts, nothing is measured here.

T tokens.
"""

from __future__ import annotations

import statistics
from typing import Any, NamedTuple

from benchmarks.block_arms import DEFAULT, DENSE, DENSE_FUSED, KERNELS, PHIMOE_EAGER, PHIMOE_GROUPED, QUACK
from benchmarks.figure import GOAL_OVER_EAGER, GOALS_OVER_DENSE

# Speed over Transformers' grouped_mm and eager (G3) and of a layer over the dense one (G2), at so many tokens.
GOALS_OVER_GROUPED, GOALS_OVER_EAGER, GOALS_OF_LAYER = {2048: 1.3, 16384: 1.15}, {8192: 3.0}, {16384: 0.95}
KEPT_AT_MOST = 1.1
GOAL_OVER_GROUPED_ON_CPU = 1.15
ROUTER_LAUNCHES, ROUTER_SECONDS, ROUTER_OVER_OPERATORS, ROUTER_TOKENS = 2, 15e-6, 10.0, 32768
# Tokens per second by batch (G6), with all of the released model's layers; with fewer, the same share of the floor.
DECODE_TOKENS_PER_S, DECODE_SHARE, DECODE_LAYERS = {1: 200.0, 8: 370.0, 32: 1000.0}, 0.6, 32
FINETUNE_GB = 40.0
LOAD_OVER_CHECKPOINT, LOAD_OVER_PHIMOE, SAVE_OVER_SHARD = 1.05, 0.8, 1.1


class Goal(NamedTuple):
    """
    Attributes:
        name: also of its prediction, in `benchmarks.predictions`.
        met: None where nothing is asked for at this size.
        value: what was measured, or None where it was not.
    """

    name: str
    wanted: str
    measured: str
    met: bool | None
    value: float | None = None


def at_least(name: str, measured: float, wanted: float | None, by: str = "") -> Goal:
    """`by`: the arm that was measured, where the name does not say it."""
    text = f"{measured:.3g}{f' ({by})' if by else ''}"
    if wanted is None:
        return Goal(name, "-", text, None, measured)
    return Goal(name, f"at least {wanted:g}", text, measured >= wanted, measured)


def at_most(name: str, measured: float, wanted: float | None) -> Goal:
    if wanted is None:
        return Goal(name, "-", f"{measured:.3g}", None, measured)
    return Goal(name, f"at most {wanted:g}", f"{measured:.3g}", measured <= wanted, measured)


def not_measured(name: str, reason: str) -> Goal:
    return Goal(name, "-", reason, False)


def speed_over(others: dict[str, Any], own: dict[str, Any]) -> float:
    """How many times faster: median over rounds."""
    return statistics.median(b / a for a, b in zip(own["seconds"], others["seconds"], strict=True))


def goals_of(reports: dict[str, dict[str, Any]], device: str) -> list[Goal]:
    """
    Args:
        reports: facts by benchmark, as far as they are there and however much was measured.
        device: "gpu" or "cpu": whose goals. A toy run is a trial of "gpu".
    """
    of = {
        "correctness": correctness,
        "block": gpu_block,
        "router": router,
        "experts": experts,
        "layer": layer,
        "decode": gpu_decode,
        "lora": lora,
        "finetune": finetune,
        "train_step": train_step,
        "fsdp": fsdp,
    }
    if device == "cpu":
        of = {"block": cpu_block, "decode": cpu_decode, "load": load}
    return [goal for name, read in of.items() if name in reports for goal in read(reports[name])]


def correctness(facts: dict[str, Any]) -> list[Goal]:
    """Every kernel is right where it was measured."""
    found = facts.get("checks", {}).values()
    reached = [one for one in found if "left_out" not in one]
    goals = [at_most("kernels that are not right", sum("refused" in one for one in reached), 0)] if reached else []
    if len(reached) < len(found):
        goals.append(not_measured("checks of kernels", f"{len(found) - len(reached)} not reached"))
    return goals


def gpu_block(facts: dict[str, Any]) -> list[Goal]:
    """G1, G3, G4: of the fused block, and with QuACK's products where measured. Nothing is asked of skewed load."""
    goals = []
    for name, case in sorted(facts.get("cases", {}).items(), key=lambda pair: (pair[1]["skewed"], pair[1]["tokens"])):
        arms = facts.get("arms", {}).get(name, {})
        tokens = 0 if case["skewed"] else case["tokens"]
        if KERNELS in arms:
            goals += block_goals(arms, arms[KERNELS], case, name, tokens)
        else:
            goals.append(not_measured(f"G1, G3, G4, {name}", case["refused"].get(KERNELS, "not measured")))
        if QUACK in arms:
            goals += block_goals(arms, arms[QUACK], case, f"{name}, {QUACK.split(', ')[1]}", tokens)
    return goals


def block_goals(arms: dict[str, Any], ours: dict[str, Any], case: dict[str, Any], name: str, tokens: int) -> list[Goal]:
    """Of one arm of ours; `tokens` 0 asks for nothing but memory."""
    goals = []
    for goal, other, wanted in (
        ("G1 block over dense", DENSE, GOALS_OVER_DENSE.get(tokens)),
        ("G1 block over dense with fused SwiGLU", DENSE_FUSED, GOALS_OVER_DENSE.get(tokens)),
        ("G3 over Transformers' grouped_mm", PHIMOE_GROUPED, GOALS_OVER_GROUPED.get(tokens)),
        ("G3 over Transformers' eager", PHIMOE_EAGER, GOALS_OVER_EAGER.get(tokens)),
    ):
        if other in arms:
            goals.append(at_least(f"{goal}, {name}", speed_over(arms[other], ours), wanted))
    kept = ours["saved_bytes"] / case["kept_at_least_bytes"]
    goals.append(at_most(f"G4 kept over the least, {name}", kept, KEPT_AT_MOST))
    if PHIMOE_GROUPED in arms:
        share = ours["saved_bytes"] / arms[PHIMOE_GROUPED]["saved_bytes"]
        goals.append(at_most(f"G4 kept over Transformers' grouped_mm, {name}", share, 0.5))
    return goals


def layer(facts: dict[str, Any]) -> list[Goal]:
    """G2, with each attention."""
    arms, tokens = facts.get("arms", {}), facts["settings"]["tokens"]
    goals = []
    for name, own in arms.items():
        kind, _, attention = name.partition(", ")
        base = arms.get(f"{DENSE}, {attention}" if attention else DENSE)
        if kind == "grinmoe_triton" and base is not None:
            label = f"G2 layer over dense, {attention or 'sdpa'}, {tokens} tokens"
            goals.append(at_least(label, speed_over(base, own), GOALS_OF_LAYER.get(tokens)))
    return goals


def router(facts: dict[str, Any]) -> list[Goal]:
    """G5. Without a GPU launches and their times are None."""
    arms, tokens = facts.get("arms", {}), facts["settings"]["tokens"]
    if reason := facts.get("refused", {}).get("fused kernel"):
        return [not_measured("G5 router", reason)]
    if "fused kernel" not in arms:
        return []
    fused = arms["fused kernel"]
    asked = tokens == ROUTER_TOKENS
    goals = []
    if "torch operators" in arms:
        goals.append(
            at_least(
                f"G5 router over its operators, {tokens} tokens",
                speed_over(arms["torch operators"], fused),
                ROUTER_OVER_OPERATORS if asked else None,
            )
        )
    if fused.get("launches") is not None:
        goals.append(at_most("G5 router's launches, forward and backward", fused["launches"], ROUTER_LAUNCHES))
    if fused.get("longest_launch_seconds") is not None and asked:
        goals.append(
            at_most("G5 router's longest launch, us", 1e6 * fused["longest_launch_seconds"], 1e6 * ROUTER_SECONDS)
        )
    return goals


def experts(facts: dict[str, Any]) -> list[Goal]:
    """Few tokens: the kernels over Transformers' functions, and of the floor. Nothing is asked for but being right."""
    goals = []
    for name, case in facts.get("cases", {}).items():
        arms, ours = case["arms"], case["arms"].get("grinmoe_triton")
        if ours is None:
            goals.append(not_measured(f"experts, {name}", case["refused"].get("grinmoe_triton", "not measured")))
            continue
        share = case["floor_seconds"] / statistics.median(ours["seconds"])
        goals.append(at_least(f"experts of the floor, {name}", share, None))
        for other in ("batched_mm", "grouped_mm"):
            if other in arms:
                goals.append(at_least(f"experts over {other}, {name}", speed_over(arms[other], ours), None))
    return goals


def gpu_decode(facts: dict[str, Any]) -> list[Goal]:
    """G6: the fastest of our arms; and over the fastest of Transformers'."""
    settings, goals = facts["settings"], []
    for name, one in facts.get("batches", {}).items():
        batch = int(name.rpartition(" ")[2])
        best, theirs = fastest(one["arms"], "grinmoe"), fastest(one["arms"], "transformers phimoe")
        if best is None:
            goals.append(not_measured(f"G6 decode, {name}", "no arm of ours was timed"))
            continue
        arm, seconds = best
        rate = batch * settings["new_tokens"] / seconds
        if settings["layers"] == DECODE_LAYERS:
            goals.append(at_least(f"G6 decode, {name}, tokens/s", rate, DECODE_TOKENS_PER_S.get(batch), arm))
        else:
            share = rate / (batch / (1e-3 * one["floor_ms"]))
            label = f"G6 decode, {name}, {settings['layers']} layers, share of the floor"
            goals.append(at_least(label, share, DECODE_SHARE, arm))
        if theirs is not None:
            goals.append(at_least(f"decode over Transformers' phimoe, {name}", theirs[1] / seconds, None, theirs[0]))
    return goals


def lora(facts: dict[str, Any]) -> list[Goal]:
    """Time of adapters on one layer's experts, over PEFT's own."""
    ours = facts.get("arms", {}).get("ExpertLora, grouped_mm", {})
    if "ratio_to_peft" not in ours:
        return []
    return [at_least("LoRA on experts over PEFT's target_parameters", ours["ratio_to_peft"], None)]


def finetune(facts: dict[str, Any]) -> list[Goal]:
    """G11 for QLoRA; of LoRA in 16 bits nothing is asked."""
    method, layers = facts["method"], facts["layers"]
    label = f"{method} of {layers} layers"
    if reason := facts.get("failure"):
        return [not_measured(f"G11 {label}", reason)]
    goals = []
    if "peak_gib" in facts:
        wanted = FINETUNE_GB if (method, layers) == ("qlora", DECODE_LAYERS) else None
        goals.append(at_most(f"G11 {label}, peak in GB", facts["peak_gib"] * 2**30 / 1e9, wanted))
    if "tokens_per_s" in facts:
        goals.append(at_least(f"{label}, tokens/s", facts["tokens_per_s"], None))
    return goals


def train_step(facts: dict[str, Any]) -> list[Goal]:
    """A whole step through the Trainer over the dense twin's, optimizer included."""
    arms, goals = facts.get("arms", {}), []
    for name in ("grinmoe", "grinmoe_triton"):
        if name in arms and arms[name]["failure"]:
            goals.append(not_measured(f"whole step over dense, {name}", arms[name]["failure"]))
        elif name in arms and arms[name]["seconds"] and arms.get(DENSE, {}).get("seconds"):
            ratio = statistics.median(arms[DENSE]["seconds"]) / statistics.median(arms[name]["seconds"])
            goals.append(at_least(f"whole step over dense, {name}", ratio, None))
    return goals


def fsdp(facts: dict[str, Any]) -> list[Goal]:
    """A step under FSDP2 on one rank over the same without it."""
    arms = facts.get("arms", {})
    if reason := next((arm["failure"] for arm in arms.values() if "failure" in arm), None):
        return [not_measured("FSDP2 on one rank over none", reason)]
    plain, sharded = (arms.get(name, {}).get("seconds") for name in ("autocast, no FSDP", "FSDP2 on one rank"))
    if not plain or not sharded:
        return []
    ratio = statistics.median(plain) / statistics.median(sharded)
    return [at_least("FSDP2 on one rank over none", ratio, None)]


def cpu_block(facts: dict[str, Any]) -> list[Goal]:
    """G8."""
    goals = []
    for name, arms in facts.get("arms", {}).items():
        if DEFAULT not in arms:
            continue
        for other, wanted in ((PHIMOE_EAGER, GOAL_OVER_EAGER), (PHIMOE_GROUPED, GOAL_OVER_GROUPED_ON_CPU)):
            if other in arms:
                label = f"G8 block over {other.replace('transformers', 'Transformers')}, {name}"
                goals.append(at_least(label, speed_over(arms[other], arms[DEFAULT]), wanted))
    return goals


def cpu_decode(facts: dict[str, Any]) -> list[Goal]:
    """Generation is not slower than Transformers' own best."""
    goals = []
    for name, one in facts.get("batches", {}).items():
        ours, theirs = one["arms"].get("grinmoe, grinmoe", {}), fastest(one["arms"], "transformers phimoe")
        if ours.get("seconds") and theirs is not None:
            rate = theirs[1] / statistics.median(ours["seconds"])
            goals.append(
                at_least(f"generation over {theirs[0].replace('transformers', 'Transformers')}, {name}", rate, 1.0)
            )
    return goals


def load(facts: dict[str, Any]) -> list[Goal]:
    """G9, G10."""
    arms = facts.get("arms", {})
    ours, theirs = arms.get("grinmoe"), arms.get("transformers phimoe")
    if not ours or not theirs:
        return []

    def median(runs: list[dict[str, Any]], key: str) -> float:
        return statistics.median(one[key] for one in runs)

    memory = median(ours, "load_own_bytes") / facts["checkpoint_bytes"]
    saving = median(ours, "save_own_bytes") / ours[0]["largest_shard_bytes"]
    time = median(ours, "load_s") / median(theirs, "load_s")
    return [
        at_most("G9 loading, own memory over the checkpoint", memory, LOAD_OVER_CHECKPOINT),
        at_most("G9 loading, time over Transformers' phimoe", time, LOAD_OVER_PHIMOE),
        at_most("G10 saving, own memory over the largest shard", saving, SAVE_OVER_SHARD),
    ]


def fastest(arms: dict[str, dict[str, Any]], library: str) -> tuple[str, float] | None:
    """Name and median seconds of the fastest arm of `library` that was timed."""
    timed = {
        name: statistics.median(one["seconds"])
        for name, one in arms.items()
        if name.split(", ")[0] == library and one.get("seconds")
    }
    return min(timed.items(), key=lambda pair: pair[1]) if timed else None


__all__ = ["Goal", "goals_of"]
