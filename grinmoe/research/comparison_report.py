"""Table and figure of `grinmoe compare`."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from itertools import chain, cycle
from pathlib import Path
from typing import Any

from ..files import atomic_file, atomic_write_text
from ..provenance import markdown_table

Runs = list[dict[str, Any]]


def write_report(folder: Path, facts: dict[str, Any], runs: Runs, labels: dict[str, str]) -> Path:
    """
    Write `comparison.json`, `.md` and `.png` into `folder`.

    Args:
        folder: where to.
        facts: settings, corpus and environment.
        runs: the results of all runs, as `comparison.run_arm` writes them.
        labels: arm to label, in the order of the table.

    Returns:
        Path of the Markdown file.
    """
    arms = {name: [run for run in runs if run["arm"] == name] for name in labels}
    summary = {name: summarise(of_arm, arms.get("topk")) for name, of_arm in arms.items()}
    content = {**facts, "labels": labels, "summary": summary, "runs": runs}
    atomic_write_text(folder / "comparison.json", json.dumps(content, indent=1) + "\n")
    _plot(folder / "comparison.png", arms, labels, summary)
    path = folder / "comparison.md"
    atomic_write_text(path, _markdown(facts, runs, labels, summary))
    return path


def summarise(runs: Runs, reference: Runs | None) -> dict[str, Any]:
    """
    Mean and spread over seeds of one arm.

    Returns:
        `held_out`: final loss of each seed; `mean`, `spread` (standard deviation, 0 for one seed); `difference` and
        `difference_spread`: to `reference` seed by seed, which takes out what the seeds share; load and specialisation,
        mean over layers and seeds.
    """
    final = [run["held_out"][-1][1] for run in runs]
    result: dict[str, Any] = {
        "held_out": final,
        "mean": statistics.mean(final),
        "spread": statistics.stdev(final) if len(final) > 1 else 0.0,
        "tokens_per_s": statistics.mean(run["tokens_per_s"] for run in runs),
        "parameters": runs[0]["parameters"],
    }
    if reference is not None:
        of_seed = {run["seed"]: run["held_out"][-1][1] for run in reference}
        differences = [run["held_out"][-1][1] - of_seed[run["seed"]] for run in runs]
        result["difference"] = statistics.mean(differences)
        result["difference_spread"] = statistics.stdev(differences) if len(differences) > 1 else 0.0
    if "routing" in runs[0]:
        layers = [layer for run in runs for layer in run["routing"]["load"]]
        result["max_over_mean_load"] = statistics.mean(max(layer) * len(layer) for layer in layers)
        for name in ("token_information", "domain_information"):
            result[name] = statistics.mean(value for run in runs for value in run["routing"][name])
    return result


def _markdown(facts: dict[str, Any], runs: Runs, labels: dict[str, str], summary: dict[str, Any]) -> str:
    settings, corpus, environment = facts["settings"], facts["corpus"], facts["environment"]
    rows = []
    for name, label in labels.items():
        arm = summary[name]
        is_routed = "token_information" in arm
        rows.append(
            {
                "arm": label,
                "held-out loss": f"{arm['mean']:.4f} ± {arm['spread']:.4f}",
                "against top-k, seed by seed": (
                    f"{arm['difference']:+.4f} ± {arm['difference_spread']:.4f}" if "difference" in arm else ""
                ),
                "each seed": " ".join(f"{loss:.3f}" for loss in arm["held_out"]),
                "busiest expert / mean": f"{arm['max_over_mean_load']:.2f}" if is_routed else "",
                "choice explained by the token": f"{100 * arm['token_information']:.0f} %" if is_routed else "",
                "by the domain": f"{100 * arm['domain_information']:.1f} %" if is_routed else "",
            }
        )
    commits = sorted({run["environment"]["commit"] for run in runs})
    tokens = settings["micro_batch_size"] * settings["accumulation"] * settings["row_length"]
    model = (
        f"{settings['num_hidden_layers']} layers, hidden {settings['hidden_size']}, {settings['num_local_experts']} "
        f"experts of {settings['intermediate_size']}, top-{settings['num_experts_per_tok']}"
    )
    return f"""# Estimators compared

{model}; {settings["steps"]} steps of {tokens:,} tokens ({settings["accumulation"]} micro-batches); text: {corpus["source"]}
({corpus["train_tokens"]:,} tokens, {corpus["held_out_tokens"]:,} held out for this table). Same initial weights, batches and
order for all arms of a seed. Loss in nats per token; ± is the standard deviation over {settings["seeds"]} seeds. Load and
explained choices (mutual information over entropy of the first choice) are of the trained model on held-out text.

{markdown_table(list(rows[0]), [list(row.values()) for row in rows])}

![curves and final losses](comparison.png)

## Measured on

{markdown_table(["", ""], [[key, value] for key, value in environment.items() if value is not None])}

Repeat it: `{environment["command"]}`. The runs were made at {", ".join(commits)}; the environment, time and speed of
each is in [comparison.json](comparison.json). Runs share the machine, so their speed is no measure of an estimator's cost.
"""


def _plot(path: Path, arms: dict[str, Runs], labels: dict[str, str], summary: dict[str, Any]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    height = max(4.6, 0.36 * len(labels) + 1.2)
    figure, (curves, final, load) = plt.subplots(
        1, 3, figsize=(17, height), layout="constrained", gridspec_kw={"width_ratios": [1.15, 1, 0.75]}
    )
    # The strong half of the palette first: neighbours of the table differ, and few arms use no pale colour.
    palette = matplotlib.color_sequences["tab20"]
    colours = dict(zip(labels, cycle([*palette[::2], *palette[1::2]])))
    _plot_curves(curves, arms, labels, colours)
    _plot_final(final, labels, summary, colours)
    _plot_load(load, labels, summary, colours)
    for axes in (curves, final, load):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    with atomic_file(path) as partial:
        figure.savefig(partial, dpi=130)
    plt.close(figure)


def _plot_curves(axes, arms: dict[str, Runs], labels: dict[str, str], colours: dict[str, Any]) -> None:
    """Held-out loss by step as a difference to top-k: the arms lie too close for their own curves to tell."""
    reference = _mean_curve(arms["topk"]) if "topk" in arms else None
    for name, runs in arms.items():
        curve = _mean_curve(runs)
        shown = curve if reference is None else {step: loss - reference[step] for step, loss in curve.items()}
        axes.plot(list(shown), list(shown.values()), label=labels[name], color=colours[name], linewidth=1.6)
    title = "Held-out loss" if reference is None else f"Held-out loss less that of {labels['topk']}"
    axes.set_title(title, loc="left", fontweight="bold")
    axes.set(xlabel="step", ylabel="nats per token, mean of the seeds")


def _mean_curve(runs: Runs) -> dict[int, float]:
    by_step = defaultdict(list)
    for step, loss in chain.from_iterable(run["held_out"] for run in runs):
        by_step[step].append(loss)
    return {step: statistics.mean(losses) for step, losses in by_step.items()}


def _plot_final(axes, labels: dict[str, str], summary: dict[str, Any], colours: dict[str, Any]) -> None:
    axes.set_title("Final held-out loss, every seed", loc="left", fontweight="bold")
    names = sorted(labels, key=lambda name: -summary[name]["mean"])  # the best on top
    for row, name in enumerate(names):
        arm = summary[name]
        axes.plot(arm["held_out"], [row] * len(arm["held_out"]), "o", color=colours[name], markersize=5, alpha=0.75)
        axes.plot([arm["mean"]] * 2, [row - 0.32, row + 0.32], color=colours[name], linewidth=2.5)
    axes.set_yticks(range(len(names)), [labels[name] for name in names], fontweight="bold")
    for text, name in zip(axes.get_yticklabels(), names):  # the legend of all panels
        text.set_color(colours[name])
    axes.set_xlabel("nats per token (bar: mean)")


def _plot_load(axes, labels: dict[str, str], summary: dict[str, Any], colours: dict[str, Any]) -> None:
    axes.set_title("Load and specialisation", loc="left", fontweight="bold")
    for name in labels:
        arm = summary[name]
        if "max_over_mean_load" in arm:
            point = arm["max_over_mean_load"], 100 * arm["token_information"]
            axes.plot(*point, "o", color=colours[name], markersize=7)
            axes.annotate(name, point, xytext=(5, 4), textcoords="offset points", fontsize=8)
    axes.set(xlabel="busiest expert's load over the mean", ylabel="% of the choice that the token explains")
