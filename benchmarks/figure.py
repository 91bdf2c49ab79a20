"""The picture of the block's benchmark: each arm's speed beside the goals, and where a step goes. Needs matplotlib.

T tokens.
"""

from __future__ import annotations

import importlib.util
import statistics
from pathlib import Path
from typing import Any

from benchmarks.block_arms import DENSE, PHIMOE_EAGER
from benchmarks.profiling import GLUE, IDLE, OTHER, PRODUCTS, ROUTER

_COLORS = ("#c44e52", "#dd8452", "#8c8c8c", "#937860", "#ccb974", "#4c72b0", "#55a868", "#8172b3", "#64b5cd", "#da8bc3")
_GROUP_COLORS = {PRODUCTS: "#4c72b0", ROUTER: "#55a868", GLUE: "#dd8452", OTHER: "#c7c7c7", IDLE: "#ececec"}
# Goal G1: speed over the dense MLP's at so many tokens. Goal G8: over Transformers' eager loop, on a CPU.
GOALS_OVER_DENSE = {8192: 0.90, 16384: 0.95, 32768: 0.97}
GOAL_OVER_EAGER = 4.0


def draw_block(path: Path, facts: dict[str, Any]) -> tuple[str | None, str]:
    """
    Draw a block's report, even load, as a PNG.

    Args:
        path: of the picture.
        facts: of the report: `arms`, `cases`, `environment` as far as they are there.

    Returns:
        The file's name, and the Markdown that shows it; None and a sentence where there is no picture.
    """
    cases = {one["tokens"]: name for name, one in facts.get("cases", {}).items() if not one["skewed"]}
    cases = {tokens: name for tokens, name in sorted(cases.items()) if facts.get("arms", {}).get(name)}
    if not cases:
        return None, "No figure: nothing was timed."
    if importlib.util.find_spec("matplotlib") is None:
        return None, "No figure: matplotlib is not installed."
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    on_gpu = any("peak_bytes" in arm for name in cases.values() for arm in facts["arms"][name].values())
    figure, (speed, parts) = plt.subplots(1, 2, figsize=(18, 7), layout="constrained", width_ratios=(5, 3))
    base = DENSE if on_gpu else PHIMOE_EAGER
    _draw_speed(speed, {tokens: facts["arms"][name] for tokens, name in cases.items()}, base)
    # The size of goal G2 where it is there.
    tokens = 16384 if 16384 in cases else max(cases)
    # On a CPU the rate of torch's own product bounds nothing: oneDNN can be faster.
    floor = facts["cases"][cases[tokens]]["floor_seconds"]["step"] if on_gpu else None
    _draw_parts(parts, facts["cases"][cases[tokens]]["profile"], tokens, floor)
    for axes in (speed, parts):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path.name, f"![Speed of each arm, and where a step goes]({path.name})"


def _draw_speed(axes, arms: dict[int, dict[str, Any]], base: str) -> None:
    """Groups of bars, one group for each number of tokens; goals as lines over the groups."""
    names = list(dict.fromkeys(name for one in arms.values() for name in one if name != base))
    width = 0.8 / max(1, len(names))
    for group, (tokens, one) in enumerate(arms.items()):
        for number, name in enumerate(names):
            if name not in one or base not in one:
                continue
            ratios = [b / a for a, b in zip(one[name]["seconds"], one[base]["seconds"], strict=True)]
            middle, (low, _, high) = statistics.median(ratios), statistics.quantiles(ratios, n=4)
            where = group - 0.4 + (number + 0.5) * width
            label = name if group == 0 else None
            axes.bar(where, middle, 0.92 * width, color=_COLORS[number % len(_COLORS)], label=label)
            axes.plot([where, where], [low, high], color="0.2", linewidth=1)
            upright = {"textcoords": "offset points", "ha": "center", "fontsize": 8, "rotation": 90, "zorder": 3}
            paper = {"facecolor": "white", "edgecolor": "none", "pad": 1}
            axes.annotate(f"{middle:.2f}", (where, high), (0, 3), bbox=paper, **upright)
        goal = GOALS_OVER_DENSE.get(tokens) if base == DENSE else GOAL_OVER_EAGER
        if goal is not None:
            label = None if axes.get_legend_handles_labels()[1].count("goal") else "goal"
            axes.plot([group - 0.42, group + 0.42], [goal, goal], "--", color="black", linewidth=1.5, label=label)
    what = "the dense MLP's" if base == DENSE else "Transformers' eager loop's"
    axes.set_title(f"Speed of a step over {what}, even load", loc="left", fontweight="bold")
    axes.set_xticks(range(len(arms)), [f"{tokens:,} tokens" for tokens in arms])
    axes.axhline(1.0, color="0.5", linewidth=0.8, linestyle=":")
    axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.06), ncols=4, fontsize=9)


def _draw_parts(axes, profiles: dict[str, dict[str, float]], tokens: int, floor: float | None) -> None:
    """A bar for each profiled arm, stacked from what its step consists of, and the floor in seconds."""
    groups = list(dict.fromkeys(group for one in profiles.values() for group in one))
    arms = list(profiles)[::-1]
    starts = [0.0] * len(arms)
    longest = 1e3 * max((sum(one.values()) for one in profiles.values()), default=0.0)
    for group in groups:
        lengths = [1e3 * profiles[arm].get(group, 0.0) for arm in arms]
        axes.barh(arms, lengths, left=starts, height=0.6, color=_GROUP_COLORS[group], label=group)
        for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
            share = length / (1e3 * sum(profiles[arms[row]].values()))
            if length >= 0.05 * longest:
                axes.text(start + length / 2, row, f"{share:.0%}", ha="center", va="center", fontsize=9)
        starts = [start + length for start, length in zip(starts, lengths, strict=True)]
    if floor is not None:
        axes.axvline(1e3 * floor, color="black", linestyle="--", linewidth=1.5, label="floor")
    axes.set_title(f"Where a step goes, {tokens:,} tokens", loc="left", fontweight="bold")
    axes.set_xlabel("ms")
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=3, fontsize=9)


__all__ = ["GOALS_OVER_DENSE", "GOAL_OVER_EAGER", "draw_block"]
