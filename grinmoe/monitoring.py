"""What routing does while a model trains: a Trainer callback that records it, and the picture of it."""

from __future__ import annotations

import functools
import math
from pathlib import Path

import torch
from transformers import ProgressCallback, TrainerCallback

from .modeling_grinmoe import GrinMoeRouter


class RoutingHistory(TrainerCallback):
    """
    Records losses and, per optimizer step, the balance loss and the load of every expert, padding left out.

    Attributes:
        loss, eval_loss: (step, value) pairs as the Trainer logs them.
        balance_loss: unscaled balance loss, one value per step (mean over the step's micro-batches).
        load: one (L, E) int64 tensor per step: how many tokens each expert got.
        tokens: all tokens trained on.
    """

    def __init__(self):
        self.loss: list[tuple[int, float]] = []
        self.eval_loss: list[tuple[int, float]] = []
        self.balance_loss: list[float] = []
        self.load: list[torch.Tensor] = []
        self.tokens = 0
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        # Of the forward pass that runs, one (T, K) tensor per layer; and of the step's passes so far.
        self._selected_experts: dict[int, torch.Tensor] = {}
        self._step_load: list[torch.Tensor] = []
        self._step_balance_loss: list[torch.Tensor] = []

    def final_load(self, share: float = 0.25) -> torch.Tensor:
        """(L, E) load summed over the last `share` of the steps, as float."""
        recent = self.load[-max(1, round(len(self.load) * share)) :]
        return torch.stack(recent).sum(0).float()

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        # Hooks, because the Trainer hands a model's outputs to no callback.
        for layer, router in enumerate(module for module in model.modules() if isinstance(module, GrinMoeRouter)):
            self._hooks.append(router.register_forward_hook(functools.partial(self._note_selection, layer)))
        self._hooks.append(model.register_forward_hook(self._note_forward, with_kwargs=True))

    def on_train_end(self, args, state, control, **kwargs):
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def on_step_end(self, args, state, control, **kwargs):
        self.load.append(torch.stack(self._step_load).sum(0).cpu())
        self.tokens += int(self.load[-1][0].sum()) // self._selected_experts[0].shape[1]
        if self._step_balance_loss:
            self.balance_loss.append(torch.stack(self._step_balance_loss).mean().item())
        self._step_load, self._step_balance_loss = [], []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.loss.append((state.global_step, float(logs["loss"])))

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        self.eval_loss.append((state.global_step, float(metrics["eval_loss"])))

    def _note_selection(self, layer: int, router: GrinMoeRouter, _, output) -> None:
        self._selected_experts[layer] = output[2]

    def _note_forward(self, model, _, kwargs, output) -> None:
        if not model.training:
            return
        experts = torch.stack([self._selected_experts[layer] for layer in sorted(self._selected_experts)])  # (L, T, K)
        if kwargs.get("attention_mask") is not None:
            experts = experts[:, kwargs["attention_mask"].reshape(-1).bool()]
        one_hot = torch.nn.functional.one_hot(experts.flatten(1), model.config.num_local_experts)
        self._step_load.append(one_hot.sum(1))  # (L, E)
        if output.aux_loss is not None:
            self._step_balance_loss.append(output.aux_loss.detach().float())


class LossOnProgressBar(ProgressCallback):
    """The Trainer's progress bar with the losses on it, in place of a printed dictionary at every log."""

    def __init__(self):
        super().__init__()
        self._shown: dict[str, str] = {}

    def on_log(self, args, state, control, logs=None, **kwargs):
        names = {"loss": "loss", "eval_loss": "held out"}
        self._shown |= {shown: f"{float(logs[name]):.3f}" for name, shown in names.items() if name in logs}
        if state.is_world_process_zero and self.training_bar is not None:
            self.training_bar.set_postfix(self._shown)

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        """No second bar: an evaluation takes a fraction of a second."""


def plot_training(history: RoutingHistory, path: Path) -> None:
    """Draw loss, balance loss and the load of every expert into one PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (losses, balance, load) = plt.subplots(1, 3, figsize=(16, 4.6), layout="constrained")
    _plot_losses(losses, history)
    _plot_balance(balance, history)
    _plot_load(figure, load, history)
    for axes in (losses, balance):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlabel("step")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _plot_losses(axes, history: RoutingHistory) -> None:
    axes.set_title("Loss", loc="left", fontweight="bold")
    axes.set_ylabel("nats per token")
    if history.loss:
        axes.plot(*zip(*history.loss), label="training (with the balance loss)", color="#4c72b0")
    if history.eval_loss:
        axes.plot(*zip(*history.eval_loss), "o-", label="held out", color="#c44e52", markersize=4)
        step, lowest = min(history.eval_loss, key=lambda point: point[1])
        axes.annotate(
            f"lowest: {lowest:.2f}, perplexity {math.exp(lowest):.0f}",
            (step, lowest),
            xytext=(0, 48),
            textcoords="offset points",
            color="#c44e52",
            arrowprops={"arrowstyle": "-", "color": "#c44e52", "linewidth": 0.8},
        )
    axes.legend(frameon=False)


def _plot_balance(axes, history: RoutingHistory) -> None:
    axes.set_title("Balance", loc="left", fontweight="bold")
    load = torch.stack(history.load).float()  # (steps, L, E)
    ratio = load.max(dim=2).values / load.mean(dim=2)
    steps = range(1, len(history.load) + 1)
    lowest, highest = (_smoothed(values) for values in (ratio.min(1).values, ratio.max(1).values))
    axes.fill_between(steps, lowest, highest, alpha=0.25, color="#55a868", linewidth=0)
    label = "busiest expert's load over the mean (band: layers)"
    axes.plot(steps, _smoothed(ratio.mean(1)), color="#55a868", label=label)
    axes.axhline(1.0, color="0.5", linewidth=0.8, linestyle=":")
    if history.balance_loss:
        axes.plot(steps, _smoothed(torch.tensor(history.balance_loss)), color="#8172b3", label="balance loss")
    axes.set_ylim(0.9, None)
    axes.legend(frameon=False)


def _smoothed(values: torch.Tensor, share: float = 0.015) -> torch.Tensor:
    """Running mean over `share` of the steps, of what there is at the ends."""
    reach = round(values.numel() * share)
    windows = [values[max(0, i - reach) : i + reach + 1] for i in range(values.numel())]
    return torch.stack([window.mean() for window in windows])


def _plot_load(figure, axes, history: RoutingHistory) -> None:
    axes.set_title("Expert load, last quarter of training", loc="left", fontweight="bold")
    load = history.final_load()
    share = 100 * load / load.sum(dim=1, keepdim=True)  # percent of a layer's assignments
    even = 100 / load.shape[1]
    reach = max(0.5 * even, float((share - even).abs().max()))
    image = axes.imshow(share, cmap="RdBu_r", vmin=even - reach, vmax=even + reach, aspect="auto")
    for layer in range(share.shape[0]):
        for expert in range(share.shape[1]):
            value = share[layer, expert].item()
            shade = "white" if abs(value - even) > 0.6 * reach else "black"
            axes.text(expert, layer, f"{value:.1f}", ha="center", va="center", fontsize=9, color=shade)
    axes.set(xlabel="expert", ylabel="layer", xticks=range(share.shape[1]), yticks=range(share.shape[0]))
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes, label=f"share of the layer's load in % (even: {even:.1f})")
