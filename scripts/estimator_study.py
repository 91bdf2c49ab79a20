"""How far each estimator of the router's gradient is from the gradient that it estimates: all outcomes enumerated.

    python scripts/estimator_study.py
    python scripts/estimator_study.py --seed 1 --logits 1000 --output study

Random decisions of one token among 6 experts, in float64: standard normal logits and experts' outputs, and a random loss
of the block's output (linear, quadratic, cubic, a small tanh network). Nothing is sampled but the decisions: an
estimator's mean and variance are sums over all of its outcomes (grinmoe/research/enumeration.py). Written, under --output:
DATE-estimator-study.json (all numbers), .md (tables) and .png (figure).
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

# Name in reports -> estimator, and the equation it is held against. The gate of GShard is against both.
ARMS: dict[str, tuple[str, int]] = {
    "v2": ("sparsemixer_v2", 7),
    "v2 as printed": ("sparsemixer_v2_printed", 7),
    "v2*": ("sparsemixer_v2_star", 4),
    "togo": ("sparsemixer_togo", 7),
    "joint": ("sparsemixer_joint", 7),
    "unscaled": ("sparsemixer_unscaled", 7),
    "topk (Eq. 7)": ("topk", 7),
    "topk (Eq. 4)": ("topk", 4),
}
# K, and how many experts the first draw's mask keeps, in turn (None: all).
PANELS: dict[str, tuple[int, tuple[int | None, ...]]] = {
    "top-1, full": (1, (None,)),
    "top-1, masked": (1, (2, 3, 4)),
    "top-2, full": (2, (None,)),
    "top-2, masked": (2, (2, 3, 4)),
}
SPLIT: dict[str, tuple[int, tuple[int | None, ...]]] = {f"top-2, {kept} candidates": (2, (kept,)) for kept in (2, 3, 4)}
SETTINGS = {**PANELS, **SPLIT}
LOSS_NAMES = {"linear": "linear", "quadratic": "quadratic", "cubic": "cubic", "mlp": "MLP"}

NOTES = """\
One token, 6 experts, float64; {decisions} random decisions per cell, the same ones for every estimator. *Full*: no mask.
*Masked*: the first draw has 2, 3 or 4 candidates, in turn. Every outcome (experts drawn, Heun factors) is run through
`route` and autograd, and weighted with its probability; the exact gradient is differentiated on its own.

Each cell: mean cosine / median relative error / median variance over squared norm, of the router's gradient. v2, as
printed, togo, joint and unscaled are held against Eq. 7 of arXiv:2409.12136 (the loss differentiated through the
probability of the draws), v2* against Eq. 4 (in full, logits halved as it samples them). `topk` is the gate of GShard and
Switch; it knows no mask and has no variance, and its objective is neither of the two. `centred` is not here: its mean is
that of togo, and its variance depends on the other tokens."""

SPLIT_NOTES = """\
The table above, taken apart. The fewer candidates there are, the more the first draw decides about the second. That part
is missing in v2, whose mean cosine is about zero or below with two candidates; togo and joint have it."""

EXPERT_NOTES = """\
The same for the experts' outputs, against the derivative of the expected loss: mean cosine / median relative error.
Unscaled is exact for any loss, since it evaluates the loss where it is. v2's factor m shrinks what is learnt from draws
other than the argmax; joint's halves all of it for a linear loss; v2* doubles it (y = 2h + ... in Algorithm 2). What is
doubled or halved as a whole shows in the error and not in the cosine."""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Hold every router-gradient estimator against the exact gradient, by enumeration.",
        epilog="example: python scripts/estimator_study.py --logits 300",
    )
    parser.add_argument(
        "--output", default="docs/results", metavar="DIR", help="folder of the report (default: docs/results)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random decisions (default: 0)")
    parser.add_argument(
        "--logits", type=int, default=300, metavar="N", help="decisions per cell (default: 300, about 80 s on one core)"
    )
    return parser


def main(arguments: list[str] | None = None) -> Path:
    options = build_parser().parse_args(arguments)
    # Heavy imports come after parsing: --help should not wait for torch.
    import torch

    torch.set_num_threads(1)  # the tensors are tiny
    from grinmoe.provenance import environment

    cells = measure(options.seed, options.logits)
    command = f"python scripts/estimator_study.py --seed {options.seed} --logits {options.logits}"
    path = write(Path(options.output), cells, {**environment(command), "decisions_per_cell": options.logits})
    print(f"written to {path}, with .json and .png beside it")
    return path


# --- measurement ------------------------------------------------------------------------------------------------------


def measure(seed: int, logits: int) -> list[dict[str, Any]]:
    """One entry per setting, loss and arm: quartiles over the decisions, and their mean cosine."""
    import torch

    from grinmoe.research import LOSSES, random_decision

    cells = []
    for setting, (top_k, kept) in SETTINGS.items():
        for loss in LOSSES:
            generator = torch.Generator().manual_seed(seed)
            decisions = [random_decision(loss, top_k, generator, kept[row % len(kept)]) for row in range(logits)]
            for arm in ARMS:
                values = [measure_one(decision, *ARMS[arm]) for decision in decisions]
                columns = {name: [value[name] for value in values] for name in values[0]}
                cells.append({"setting": setting, "loss": loss, "arm": arm, **summary(columns)})
        print(f"{setting}: done", flush=True)
    return cells


def measure_one(decision, estimator: str, equation: int) -> dict[str, float]:
    from grinmoe.research import cosine_and_error, exact_gradients, moments, outcome_gradients, own_objective

    outcomes, gradients = outcome_gradients(decision, estimator)
    exact = exact_gradients(decision, equation, halved=own_objective(estimator)[1])
    mean, variance = moments(outcomes.probability, gradients.router_logits)
    expert_mean, _ = moments(outcomes.probability, gradients.expert_outputs)
    cosine, error = cosine_and_error(mean, exact.router_logits)
    expert_cosine, expert_error = cosine_and_error(expert_mean, exact.expert_outputs)
    return {
        "cosine": cosine,
        "relative_error": error,
        "variance": variance / float(exact.router_logits.square().sum()),
        "expert_cosine": expert_cosine,
        "expert_relative_error": expert_error,
    }


def summary(columns: dict[str, list[float]]) -> dict[str, Any]:
    """Mean of cosines, median of the rest; and the quartiles of all."""
    result: dict[str, Any] = {}
    for name, values in columns.items():
        result[name] = statistics.fmean(values) if "cosine" in name else statistics.median(values)
        result[f"{name}_quartiles"] = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return result


# --- report -----------------------------------------------------------------------------------------------------------


def write(folder: Path, cells: list[dict[str, Any]], stamp: dict[str, Any]) -> Path:
    """Write the three files, each beside its place and then renamed. Returns the path of the Markdown one."""
    from grinmoe.files import atomic_file, atomic_write_text

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{stamp['date'][:10]}-estimator-study.md"
    figure = path.with_suffix(".png")
    with atomic_file(figure) as partial:
        draw(cells, partial, stamp)
    atomic_write_text(path.with_suffix(".json"), json.dumps({"environment": stamp, "cells": cells}, indent=1) + "\n")
    atomic_write_text(path, report(cells, stamp, figure.name))
    return path


def report(cells: list[dict[str, Any]], stamp: dict[str, Any], figure: str) -> str:
    from grinmoe.provenance import markdown_table

    def router(cell: dict[str, Any]) -> str:
        return f"{cosine(cell['cosine'])} / {cell['relative_error']:.2g} / {cell['variance']:.2g}"

    def experts(cell: dict[str, Any]) -> str:
        return f"{cosine(cell['expert_cosine'])} / {cell['expert_relative_error']:.2g}"

    lines = ["# Estimators of the router's gradient against the exact one", f"![cosine and relative error]({figure})"]
    lines.append(NOTES.format(decisions=stamp["decisions_per_cell"]))
    lines += [f"## {setting}\n\n{table(cells, setting, router)}" for setting in PANELS]
    lines.append(f"## Top-2, by the number of candidates of the first draw\n\n{SPLIT_NOTES}")
    lines += [f"### {setting}\n\n{table(cells, setting, router)}" for setting in SPLIT]
    lines.append(f"## The experts' own gradient\n\n{EXPERT_NOTES}")
    arms = [arm for arm in ARMS if arm != "topk (Eq. 4)"]  # the equations differ for the router only
    lines += [f"### {setting}\n\n{table(cells, setting, experts, arms)}" for setting in PANELS]
    facts = [[key, value] for key, value in stamp.items() if value is not None]
    lines.append("## Measured on\n\n" + markdown_table(["", ""], facts))
    return "\n\n".join(lines) + "\n"


def table(cells: list[dict[str, Any]], setting: str, show, arms=tuple(ARMS)) -> str:
    from grinmoe.provenance import markdown_table

    found = {(cell["arm"], cell["loss"]): cell for cell in cells if cell["setting"] == setting}
    rows = [[arm.replace("*", "\\*"), *(show(found[arm, loss]) for loss in LOSS_NAMES)] for arm in arms]
    return markdown_table(["estimator", *LOSS_NAMES.values()], rows)


def cosine(value: float) -> str:
    """1 only where it is."""
    return "1" if value > 1 - 1e-9 else f"{min(value, 0.999):.3f}"


# --- figure -----------------------------------------------------------------------------------------------------------

# Arm -> label, colour, marker. v2 as printed has v2's router gradient.
STYLES = {
    "v2": ("v2 (released; as printed)", "#c44e52", "o"),
    "v2*": ("v2*, against Eq. 4", "#dd8452", "D"),
    "togo": ("togo", "#4c72b0", "s"),
    "joint": ("joint", "#55a868", "^"),
    "unscaled": ("unscaled", "#8172b3", "P"),
    "topk (Eq. 7)": ("GShard, against Eq. 7", "#6f5b4b", "v"),
    "topk (Eq. 4)": ("GShard, against Eq. 4", "#b9a78f", "v"),
}
# The error's axis is broken where nothing lies: estimators are exact up to rounding, or they are off by percents.
FLOOR, EXACT = 1e-16, 1e-14


def draw(cells: list[dict[str, Any]], path: Path, stamp: dict[str, Any]) -> None:
    """Cosine above, relative error below; one column per setting, one group of markers per loss."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        3, len(PANELS), figsize=(15, 8.2), sharex=True, sharey="row", gridspec_kw={"height_ratios": [3.2, 3, 0.8]}
    )
    figure.subplots_adjust(left=0.055, right=0.99, top=0.83, bottom=0.12, wspace=0.06, hspace=0.09)
    for column, setting in enumerate(PANELS):
        found = {(cell["arm"], cell["loss"]): cell for cell in cells if cell["setting"] == setting}
        axes[0, column].set_title(setting, fontsize=13, fontweight="bold", loc="left", pad=10)
        for row, name in zip(axes[:, column], ["cosine", "relative_error", "relative_error"]):
            _markers(row, found, name)
    _cosine_axes(axes[0])
    smallest = min(cell["relative_error"] for cell in cells if cell["relative_error"] > EXACT)
    _error_axes(axes[1], axes[2], min(smallest / 2, 4e-3))
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(STYLES), frameon=False, fontsize=11.5)
    title = "The router's gradient on average over all outcomes, against the gradient it estimates"
    figure.text(0.055, 0.95, title, fontsize=17)
    subtitle = (
        f"One token, 6 experts, {stamp['decisions_per_cell']} random decisions enumerated in float64: mean cosine, median "
        "relative error. Against Eq. 7 where nothing else is said."
    )
    figure.text(0.055, 0.915, subtitle, fontsize=11.5, color="0.35")
    figure.savefig(path, dpi=130, facecolor="white")
    plt.close(figure)


def _markers(axes, found: dict[tuple[str, str], dict[str, Any]], name: str) -> None:
    for number, (arm, (label, color, marker)) in enumerate(STYLES.items()):
        offset = (number - (len(STYLES) - 1) / 2) * 0.12
        places = [place + offset for place in range(len(LOSS_NAMES))]
        # A cosine may be negative, an error too small for the axis.
        values = [max(found[arm, loss][name], 0.0 if name == "cosine" else FLOOR) for loss in LOSS_NAMES]
        if name == "cosine":
            axes.vlines(places, 0, values, color=color, linewidth=2.5, alpha=0.3)
        axes.plot(
            places,
            values,
            marker,
            color=color,
            markersize=8.5,
            label=label,
            markeredgecolor="white",
            clip_on=name != "cosine",
        )
    for place in range(len(LOSS_NAMES) - 1):
        axes.axvline(place + 0.5, color="0.88", linewidth=0.8, zorder=0)
    axes.set_xlim(-0.5, len(LOSS_NAMES) - 0.5)
    axes.set_xticks(range(len(LOSS_NAMES)), list(LOSS_NAMES.values()), fontsize=12)
    axes.tick_params(axis="x", length=0)
    axes.grid(axis="y", color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _cosine_axes(row) -> None:
    row[0].set_ylim(0, 1.03)
    row[0].set_ylabel("cosine", fontsize=12.5)


def _error_axes(biased, exact, lowest: float) -> None:
    biased[0].set_yscale("log")
    biased[0].set_ylim(lowest, 20)
    biased[0].set_ylabel("relative error", fontsize=12.5)
    exact[0].set_yscale("log")
    exact[0].set_ylim(FLOOR / 2, EXACT)
    exact[0].set_yticks([1e-16, 1e-15])
    exact[0].minorticks_off()
    for upper, lower in zip(biased, exact):
        upper.spines["bottom"].set_visible(False)
        lower.set_facecolor("#eef6f0")
        for axes, end in ((upper, 0), (lower, 1)):  # the two strokes of a broken axis
            axes.plot(
                [0],
                [end],
                transform=axes.transAxes,
                marker=[(-1, -0.6), (1, 0.6)],
                markersize=9,
                color="0.2",
                clip_on=False,
            )
    exact[0].text(3.45, 2e-15, "exact up to rounding", fontsize=10.5, color="#3d7a4d", ha="right", va="center")


if __name__ == "__main__":
    main()
