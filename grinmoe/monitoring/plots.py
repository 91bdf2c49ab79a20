"""The picture of a training that a `RoutingMonitor` watched: loss, load, decisiveness, gradients. Needs matplotlib.

Shapes: L layers, E experts, R records.
"""

from __future__ import annotations

import math
import os

import torch

from .callback import RoutingMonitor
from .record import RoutingRecord

_BLUE, _RED, _GREEN, _PURPLE, _ORANGE = "#4c72b0", "#c44e52", "#55a868", "#8172b3", "#dd8452"
# Beyond these, numbers in the cells and a legend of all layers cannot be read.
_MOST_EXPERTS_IN_NUMBERS, _MOST_LAYERS_IN_NUMBERS = 10, 12
_MOST_LAYERS_IN_LEGEND = 6


def plot_training(monitor: RoutingMonitor, path: str | os.PathLike) -> None:
    """Draw what `monitor` recorded into one PNG of six panels.

    Raises:
        ValueError: nothing has been trained.
    """
    if not monitor.records:
        raise ValueError("the monitor has recorded no step; train first, with monitor.attach(trainer)")
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(2, 3, figsize=(17, 9), layout="constrained")
    losses, load, decisiveness, kept, gradients, heat = panels.flat
    measured = [record for record in monitor.records if record.measured]
    _plot_losses(losses, monitor)
    _plot_load(load, monitor.records, measured)
    _plot_decisiveness(decisiveness, measured)
    _plot_kept_experts(kept, measured)
    _plot_gradients(figure, gradients, measured)
    _plot_final_load(figure, heat, monitor)
    for axes in (losses, load, decisiveness, kept, gradients):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlabel("step")
        axes.set_xlim(0, monitor.records[-1].last_step)
    seconds = sum(record.seconds for record in monitor.records)
    figure.suptitle(
        f"{monitor.records[-1].last_step:,} steps, {monitor.tokens:,} tokens, {monitor.tokens / seconds:,.0f} tokens/s",
        x=0.008,
        ha="left",
        color="0.35",
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _title(axes, text: str) -> None:
    axes.set_title(text, loc="left", fontweight="bold")


def _plot_losses(axes, monitor: RoutingMonitor) -> None:
    _title(axes, "Loss")
    axes.set_ylabel("nats per token")
    if monitor.loss:
        axes.plot(*zip(*monitor.loss), label="training (with the balance loss)", color=_BLUE)
    if monitor.eval_loss:
        lowest = min(value for _, value in monitor.eval_loss)
        label = f"held out, lowest {lowest:.2f} (perplexity {math.exp(lowest):.3g})"
        axes.plot(*zip(*monitor.eval_loss), "o-", label=label, color=_RED, markersize=3)
    _legend(axes)


def _plot_load(axes, records: list[RoutingRecord], measured: list[RoutingRecord]) -> None:
    _title(axes, "Balance (band: layers)")
    _plot_band(axes, records, "max_over_mean_load", _GREEN, "busiest expert's load over the mean")
    if measured:
        steps, values = _series(measured, "balance_loss")
        label = f"balance loss (even load: {measured[0].top_k})"
        axes.plot(steps, _smoothed(values.mean(1)), color=_PURPLE, label=label)
    axes.axhline(1.0, color="0.5", linewidth=0.8, linestyle=":")
    axes.set_ylim(0.9, None)
    _legend(axes)


def _plot_decisiveness(axes, measured: list[RoutingRecord]) -> None:
    _title(axes, "Entropy and sampled choices (bands: layers)")
    if not measured:
        return _not_measured(axes)
    most = math.log(measured[0].load.shape[1])
    (entropy,) = _plot_band(axes, measured, "entropy", _BLUE, f"entropy (at most {most:.2f})")
    axes.set(ylabel="nats", ylim=(0, most))
    right = axes.twinx()
    (share,) = _plot_band(right, measured, "sampled_share", _ORANGE, "choices that are not the best expert", 100)
    right.set(ylabel="% of the choices", ylim=(0, max(1.0, right.get_ylim()[1])))
    right.spines[["top"]].set_visible(False)
    _legend(right)
    _legend(axes, [entropy, share])
    right.get_legend().remove()


def _plot_kept_experts(axes, measured: list[RoutingRecord]) -> None:
    _title(axes, "Experts kept by the mask (band: layers)")
    if not measured:
        return _not_measured(axes)
    num_experts = measured[0].load.shape[1]
    _plot_band(
        axes, measured, "kept_experts", _PURPLE, f"experts that the first choice is drawn from, of {num_experts}"
    )
    axes.set_ylim(1.0, None)
    _legend(axes)


def _plot_gradients(figure, axes, measured: list[RoutingRecord]) -> None:
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    _title(axes, "Norm of the router's gradient, after clipping")
    steps, norms = _series(measured, "router_gradient_norm") if measured else ([], torch.full((1, 1), math.nan))
    if not (norms > 0).any():
        return _not_measured(axes, "no router has a gradient")
    num_layers = norms.shape[1]
    shades = colormaps["viridis_r"]
    for layer in range(num_layers):
        color = shades(layer / max(1, num_layers - 1))
        axes.plot(steps, _smoothed(norms[:, layer].log()).exp(), color=color, linewidth=1.2, label=f"layer {layer}")
    axes.set_yscale("log")
    if num_layers <= _MOST_LAYERS_IN_LEGEND:
        _legend(axes, columns=3)
    else:
        figure.colorbar(ScalarMappable(Normalize(0, num_layers - 1), shades), ax=axes, label="layer")


def _plot_final_load(figure, axes, monitor: RoutingMonitor) -> None:
    _title(axes, "Expert load, last quarter of training")
    load = monitor.final_load()
    share = 100 * load / load.sum(dim=1, keepdim=True)  # percent of a layer's assignments
    image = draw_load(axes, share, load_reach(share))
    figure.colorbar(image, ax=axes, label=f"share of the layer's load in % (even: {100 / share.shape[1]:.1f})")


def load_reach(share: torch.Tensor) -> float:
    """How far from even the colours of [`draw_load`] must reach, in percent, for shares (..., E) in percent."""
    even = 100 / share.shape[-1]
    return max(0.5 * even, float((share - even).abs().max()))


def draw_load(axes, share: torch.Tensor, reach: float):
    """Heatmap of each expert's share of its layer's load, (L, E) in percent; even is white. Returns the image."""
    from matplotlib.colors import TwoSlopeNorm
    from matplotlib.ticker import MaxNLocator

    num_layers, num_experts = share.shape
    even = 100 / num_experts
    # Half of the colours for what is less than even, though that ends at 0 and more need not.
    norm = TwoSlopeNorm(even, max(0.0, even - reach), even + reach)
    image = axes.imshow(share, cmap="RdBu_r", norm=norm, aspect="auto")
    if num_experts <= _MOST_EXPERTS_IN_NUMBERS and num_layers <= _MOST_LAYERS_IN_NUMBERS:
        for layer in range(num_layers):
            for expert in range(num_experts):
                value = share[layer, expert].item()
                shade = "white" if abs(norm(value) - 0.5) > 0.3 else "black"
                axes.text(expert, layer, f"{value:.1f}", ha="center", va="center", fontsize=9, color=shade)
    for axis, count in ((axes.xaxis, num_experts), (axes.yaxis, num_layers)):
        axis.set_major_locator(MaxNLocator(nbins=min(count, 16), integer=True))
    axes.set(xlabel="expert", ylabel="layer", xlim=(-0.5, num_experts - 0.5), ylim=(num_layers - 0.5, -0.5))
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return image


def _plot_band(axes, records: list[RoutingRecord], name: str, color: str, label: str, factor: float = 1.0) -> list:
    """Mean over layers as a line, in a band from the lowest to the highest layer. Returns the line in a list."""
    steps, values = _series(records, name)
    values = factor * values
    axes.fill_between(steps, _smoothed(values.amin(1)), _smoothed(values.amax(1)), alpha=0.2, color=color, linewidth=0)
    return axes.plot(steps, _smoothed(values.mean(1)), color=color, label=label)


def _legend(axes, lines: list | None = None, columns: int = 1) -> None:
    """At the top, in room made for it: it never lies over a curve."""
    low, high = axes.get_ylim()
    if axes.get_yscale() == "log":
        axes.set_ylim(low, high * (high / low) ** 0.25)
    else:
        axes.set_ylim(low, high + 0.25 * (high - low))
    handles = axes.get_legend_handles_labels()[0] if lines is None else lines
    axes.legend(handles=handles, frameon=False, loc="upper right", ncols=columns)


def _series(records: list[RoutingRecord], name: str) -> tuple[list[int], torch.Tensor]:
    """Last step of each record, and the values (R, L)."""
    return [record.last_step for record in records], torch.stack([getattr(record, name) for record in records])


def _smoothed(values: torch.Tensor, share: float = 0.015) -> torch.Tensor:
    """Running mean over `share` of the records, of what there is at the ends."""
    reach = round(values.numel() * share)
    windows = [values[max(0, i - reach) : i + reach + 1] for i in range(values.numel())]
    return torch.stack([window.mean() for window in windows])


def _not_measured(axes, why: str = "no step was measured in detail") -> None:
    axes.text(0.5, 0.5, why, transform=axes.transAxes, ha="center", va="center", color="0.4")
