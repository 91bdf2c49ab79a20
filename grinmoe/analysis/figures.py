"""The pictures of `grinmoe analyze`, one PNG each. Needs matplotlib.

Shapes: D domains, L layers, T tokens, E experts, K experts per token.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import torch

from ..monitoring import draw_load, load_reach
from .statistics import RoutingAnalysis, similarity_of

_STYLE: dict[Any, Any] = {
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlesize": 11,
    "legend.frameon": False,
    "savefig.dpi": 110,
}
# Beyond these, numbers in the cells, panels of all layers and a legend cannot be read.
_MOST_IN_NUMBERS = 10
_MOST_PANELS = 36
_MOST_LINES_IN_LEGEND = 8
_LONGEST_NAME = 24


@dataclass(frozen=True)
class Picture:
    """A PNG in the report's folder, and what is said of it."""

    file: str
    title: str
    caption: str


def draw_pictures(analysis: RoutingAnalysis, folder: Path) -> list[Picture]:
    """Draw all that can be drawn: similarity takes two domains, and pairs of experts take K = 2 or more."""
    import matplotlib

    matplotlib.use("Agg")
    drawers = [_load]
    if len(analysis.domains) > 1:
        drawers += [_similarity, _similarity_by_layer]
    drawers.append(_decisions)
    if analysis.total.top_k > 1:
        drawers.append(_pairs)
    drawers.append(_sentence)
    with warnings.catch_warnings(), matplotlib.rc_context(_STYLE):
        # Letters that the font lacks are drawn as boxes; the page shows them.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        return [draw(analysis, folder) for draw in drawers]


def expert_colours(num_experts: int) -> list[str]:
    """A colour for each expert, pale enough for black letters; told apart by number where there are more than 20."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    if num_experts <= 20:
        # The pale half of the palette first, then the strong half, lightened.
        palette = [colormaps["tab20"](index) for index in (*range(1, 20, 2), *range(0, 20, 2))]
        own = 0.7
    else:
        palette = [colormaps["hsv"](index / num_experts) for index in range(num_experts)]
        own = 0.5
    return [to_hex((*(own * part + 1 - own for part in colour[:3]), 1.0)) for colour in palette[:num_experts]]


def _short(name: str) -> str:
    """A domain's name in a picture, where two dollar signs would make a formula of it."""
    name = name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1] + "…"
    return name.replace("$", r"\$")


def _save(figure, folder: Path, name: str) -> str:
    import matplotlib.pyplot as plt

    figure.savefig(folder / name)
    plt.close(figure)
    return name


def _grid(count: int, most_columns: int, width: float, height: float):
    """A figure of `count` panels, each of that size in inches, and the panels in a list."""
    import matplotlib.pyplot as plt

    rows = math.ceil(count / most_columns)
    columns = math.ceil(count / rows)
    figure, panels = plt.subplots(
        rows, columns, figsize=(columns * width + 1.2, rows * height), layout="constrained", squeeze=False
    )
    for panel in panels.flat[count:]:
        panel.set_axis_off()
    return figure, list(panels.flat[:count])


def _bar_place(figure) -> dict:
    """Options of a colour bar for all panels: at the top, and not as tall as a tall figure."""
    return {"shrink": min(1.0, 5 / figure.get_figheight()), "anchor": (0.0, 1.0), "aspect": 25}


def _without_frame(axes) -> None:
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _load(analysis: RoutingAnalysis, folder: Path) -> Picture:
    shares = [100 * counts.load_share for counts in analysis.counts]
    num_layers, num_experts = shares[0].shape
    reach = load_reach(torch.stack(shares))
    width, height = min(7.0, max(4.2, 0.36 * num_experts)), max(2.6, 1.2 + 0.19 * num_layers)
    figure, panels = _grid(len(shares), 3 if width < 6 else 2, width, height)
    for panel, name, share, counts in zip(panels, analysis.domains, shares, analysis.counts):
        image = draw_load(panel, share, reach)
        panel.set_title(f"{_short(name)} ({counts.tokens:,} tokens)")
    label = f"% of choices (even: {100 / num_experts:.3g})"
    figure.colorbar(image, ax=panels, label=label, **_bar_place(figure))
    return Picture(
        _save(figure, folder, "load.png"),
        "Expert load",
        "Share of a layer's choices that each expert got, all K choices together. White is an even share, red more, "
        "blue less. One scale for all domains.",
    )


def _similarity(analysis: RoutingAnalysis, folder: Path) -> Picture:
    similarity = similarity_of(analysis.halves)
    names = [_short(name) for name in analysis.domains]
    size = max(4.2, 0.55 * len(names) + 2.2)
    figure, (left, right) = _grid(2, 2, size + 0.6, size)
    _draw_cosines(figure, left, similarity.whole, names, "Cosine of the loads", "viridis")
    deviation = similarity.deviation.clone()
    # Of a domain with itself it is 1 by definition; its two halves say what chance leaves of that.
    deviation.diagonal().copy_(similarity.within)
    _draw_cosines(figure, right, deviation, names, "Cosine of the deviations from even load", "RdBu_r")
    return Picture(
        _save(figure, folder, "similarity.png"),
        "Similarity of domains",
        "Left: cosine between the domains' load shares, all layers in one vector. Balanced loads are all nearly even, so it "
        "is near 1. Right: the same less the even share, which compares what the domains prefer: 1 the same experts, 0 "
        "unrelated, -1 opposite. Its diagonal is what another text of the same kind and length would have, by two halves of "
        "the domain's own: two domains that are as alike as that differ by no more than chance.",
    )


def _draw_cosines(figure, axes, cosines: torch.Tensor, names: list[str], title: str, colours: str) -> None:
    from matplotlib import colormaps

    diverging = colours == "RdBu_r"
    low = -1.0 if diverging else min(0.9, math.floor(10 * float(cosines.nan_to_num(1).min())) / 10)
    image = axes.imshow(cosines, cmap=colormaps[colours].with_extremes(bad="0.75"), vmin=low, vmax=1)
    axes.set_xticks(range(len(names)), names, rotation=40, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(names)), names)
    _without_frame(axes)
    axes.set_title(title)
    if len(names) <= _MOST_IN_NUMBERS:
        for row, values in enumerate(cosines.tolist()):
            for column, value in enumerate(values):
                place = (value - low) / (1 - low)
                dark = abs(place - 0.5) > 0.33 if diverging else place < 0.6
                text = "-" if math.isnan(value) else f"{value:.2f}" if diverging else f"{value:.3f}"
                axes.text(column, row, text, ha="center", va="center", color="white" if dark else "black", fontsize=9)
    figure.colorbar(image, ax=axes, label="cosine", shrink=0.8)


def _similarity_by_layer(analysis: RoutingAnalysis, folder: Path) -> Picture:
    per_layer = similarity_of(analysis.halves).per_layer
    pairs = list(combinations(range(len(analysis.domains)), 2))
    figure, (axes,) = _grid(1, 1, 8, 3.6)
    values = torch.stack([per_layer[:, a, b] for a, b in pairs])  # (pairs, L)
    layers = range(per_layer.shape[0])
    if len(pairs) <= _MOST_LINES_IN_LEGEND:
        for (a, b), line in zip(pairs, values):
            label = f"{_short(analysis.domains[a])} - {_short(analysis.domains[b])}"
            axes.plot(layers, line, "o-", markersize=4, label=label)
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1), title="domains")
    else:
        axes.fill_between(
            layers, values.amin(0), values.amax(0), alpha=0.2, linewidth=0, label="lowest to highest pair"
        )
        axes.plot(layers, values.mean(0), "o-", markersize=4, label=f"mean of {len(pairs)} pairs of domains")
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    _by_layer(axes, len(layers), "cosine of the loads")
    axes.set_title("Similarity by layer")
    return Picture(
        _save(figure, folder, "similarity_by_layer.png"),
        "Similarity by layer",
        "Cosine between two domains' load shares in each layer: where it is low, the layer sends the domains to different "
        "experts.",
    )


def _by_layer(axes, num_layers: int, label: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=16, integer=True, min_n_ticks=1))
    margin = 0.5 if num_layers == 1 else 0.04 * num_layers
    axes.set(xlabel="layer", ylabel=label, xlim=(-margin, num_layers - 1 + margin))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _decisions(analysis: RoutingAnalysis, folder: Path) -> Picture:
    total = analysis.total
    num_layers, top_k = total.kept_experts.shape
    figure, (ties, histogram, kept, weights) = _grid(4, 2, 5.4, 3.3)
    marks = {"markersize": 4, "linewidth": 1.4}
    for name, counts in zip(analysis.domains, analysis.counts):
        ties.plot(range(num_layers), 100 * counts.near_tie_share, "o-", label=_short(name), **marks)
    for choice in range(top_k):
        kept.plot(range(num_layers), total.kept_experts[:, choice], "o-", label=f"choice {choice + 1}", **marks)
        weights.plot(range(num_layers), total.mean_weights[:, choice], "o-", label=f"choice {choice + 1}", **marks)
    _draw_kept_histogram(histogram, 100 * total.kept_share.mean(0))
    ties.set_title("Tokens at a near tie")
    _by_layer(ties, num_layers, "% of the tokens")
    ties.set_ylim(0, max(ties.get_ylim()[1], 0.1))
    kept.set_title("Experts kept, by layer")
    _by_layer(kept, num_layers, "experts, mean over tokens")
    weights.set_title("Routing weight")
    _by_layer(weights, num_layers, "weight, mean over tokens")
    for axes in (kept, weights):
        axes.ticklabel_format(useOffset=False)
    # Bars reach the top: their legend stands beside the title.
    beside = {"loc": "lower right", "bbox_to_anchor": (1, 1), "borderaxespad": 0}
    histogram.legend(fontsize=9, ncols=4, **beside)
    for axes in (ties, kept, weights):
        lines = len(axes.get_legend_handles_labels()[0])
        if lines <= _MOST_LINES_IN_LEGEND:
            low, high = axes.get_ylim()
            axes.set_ylim(low, high + (high - low) * (0.05 + 0.08 * math.ceil(lines / 2)))  # room for it
            axes.legend(fontsize=9, ncols=2, loc="upper right")
    return Picture(
        _save(figure, folder, "decisions.png"),
        "How close the decisions are",
        "Tokens at a near tie: those whose last choice has a rival within the mask (relative gap of at most 2 eps = "
        f"{2 * analysis.jitter_eps:g}), so that sampling in training could give them another set of experts; one line per "
        "domain. Experts kept by the mask: between how many each choice would be sampled (1: no rival). Routing weight: the "
        "masked probability that multiplies the expert's output. All but the first over all domains together.",
    )


def _draw_kept_histogram(axes, percent: torch.Tensor) -> None:
    """Of (K, E) percent of the tokens, for whose choice the mask kept 1, 2, ... E experts."""
    from matplotlib.ticker import MaxNLocator

    top_k = percent.shape[0]
    most = int(percent.sum(0).nonzero().max()) + 1
    width = 0.8 / top_k
    for choice, shares in enumerate(percent[:, :most].tolist()):
        places = [kept + 1 + (choice - (top_k - 1) / 2) * width for kept in range(most)]
        axes.bar(places, shares, width, label=f"choice {choice + 1}")
    axes.set(xlabel="experts kept", ylabel="% of the tokens (log scale)", yscale="log")
    axes.set_ylim(top=100)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=16, integer=True))
    axes.set_xlim(0.4, max(2, most) + 0.6)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.25, axis="y")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title("Experts kept, all layers")


def _pairs(analysis: RoutingAnalysis, folder: Path) -> Picture:
    from matplotlib import colormaps

    lift = analysis.total.pair_lift
    num_layers, num_experts = lift.shape[:2]
    shown = torch.linspace(0, num_layers - 1, min(num_layers, _MOST_PANELS), dtype=torch.float64).round().int().tolist()
    colours = colormaps["PuOr_r"].with_extremes(bad="0.75")
    figure, panels = _grid(len(shown), 4 if len(shown) <= 12 else 6, 3.3, 3.1)
    for panel, layer in zip(panels, shown):
        # No pair at all has the logarithm -inf, and is drawn as the lowest colour.
        image = panel.imshow(lift[layer].log2().clamp(-2, 2), cmap=colours, vmin=-2, vmax=2)
        panel.set_title(f"layer {layer}")
        _without_frame(panel)
        ticks = range(0, num_experts, math.ceil(num_experts / 8))
        panel.set(xlabel="expert", ylabel="expert", xticks=ticks, yticks=ticks)
    bar = figure.colorbar(
        image, ax=panels, label="pairs / expected of the loads", ticks=[-2, -1, 0, 1, 2], **_bar_place(figure)
    )
    bar.set_ticklabels(["≤ ¼", "½", "1", "2", "≥ 4"])
    some = "" if len(shown) == num_layers else f" {len(shown)} of the {num_layers} layers; the data have all."
    return Picture(
        _save(figure, folder, "coactivation.png"),
        "Experts chosen together",
        "How often two experts serve the same token, over how often their loads alone would bring them together: 1 "
        "(white) where the choices know nothing of each other, orange more often, purple less, grey where nothing is "
        f"to be expected. All domains together.{some}",
    )


def _sentence(analysis: RoutingAnalysis, folder: Path) -> Picture:
    from matplotlib.colors import BoundaryNorm, ListedColormap
    from matplotlib.ticker import MaxNLocator

    sentence = analysis.sentence
    num_layers, num_tokens, top_k = sentence.experts.shape
    num_experts = sentence.probs.shape[-1]
    colours = ListedColormap(expert_colours(num_experts))
    cell = max(0.34, 0.24 * top_k)
    per_strip = min(num_tokens, int(12 / cell))
    strips = math.ceil(num_tokens / per_strip)
    height = num_layers * (0.3 if num_layers <= 8 else 0.2) + 1.2
    figure, panels = _grid(strips, 1, per_strip * cell, height)
    norm = BoundaryNorm([expert - 0.5 for expert in range(num_experts + 1)], num_experts)
    labels = [_drawable(token) for token in sentence.tokens]
    for strip, axes in enumerate(panels):
        part = slice(strip * per_strip, (strip + 1) * per_strip)
        experts = sentence.experts[:, part]
        axes.imshow(experts[..., 0], cmap=colours, norm=norm, aspect="auto")
        for layer, chosen in enumerate(experts.tolist()):
            for token, of_token in enumerate(chosen):
                axes.text(token, layer, "/".join(map(str, of_token)), ha="center", va="center", fontsize=7)
        axes.set_xticks(
            range(experts.shape[1]), labels[part], rotation=90, fontsize=8, family="monospace", parse_math=False
        )
        axes.yaxis.set_major_locator(MaxNLocator(nbins=16, integer=True))
        axes.set(ylabel="layer", xlim=(-0.5, per_strip - 0.5))
        _without_frame(axes)
    order = "expert" if top_k == 1 else f"{top_k} experts, first choice first"
    return Picture(
        _save(figure, folder, "sentence.png"),
        "A sentence, token by token",
        f"Each cell has the token's {order}; the colour is that of the first choice.",
    )


def _drawable(token: str) -> str:
    """A token as a label: spaces and line ends visible, letters that the font lacks as a box."""
    shown = token.replace(" ", "␣").replace("\n", "↵").replace("\t", "→")
    return "".join(letter if letter.isprintable() else "□" for letter in shown)
