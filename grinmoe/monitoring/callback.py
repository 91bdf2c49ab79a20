"""Health of the routers while a model trains: a Trainer callback that measures, logs, remembers and raises alarm.

    monitor = RoutingMonitor().attach(trainer)
    trainer.train()
    plot_training(monitor, "training.png")  # of plots.py

What is logged and how to read it: docs/monitoring.md.

Shapes: L layers, B batch, S sequence, T = B * S tokens, E experts, K experts per token.
"""

from __future__ import annotations

import functools
import sys
import time
import warnings
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import nn
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from transformers.trainer_utils import IntervalStrategy
from transformers.training_args import ParallelMode

from ..modeling_grinmoe import GrinMoeModel, GrinMoeRouter, GrinMoeSparseMoeBlock
from ..routing_grinmoe import NonFiniteRouterLogitsError, number_of_ranks
from .record import RankCounts, RoutingRecord

# A history that is full is halved: neighbours become one record. At 32 layers of 16 experts a record takes 15 KB.
MAX_RECORDS = 1024
_LAYER = "routing/layer_"


class ExpertCollapseWarning(UserWarning):
    """Experts of a layer have got no token, over all ranks, for `collapse_steps` steps."""


class ExpertCollapseError(RuntimeError):
    """As [`ExpertCollapseWarning`], where that is to end the training.

    Attributes:
        layer: index of the layer.
        experts: indices of its experts without tokens.
        step: optimizer step at which it was noticed.
    """

    def __init__(self, problem: str, layer: int, experts: list[int], step: int):
        super().__init__(problem)
        self.layer, self.experts, self.step = layer, experts, step


class RoutingMonitor(TrainerCallback):
    """
    Watches the routers of a GRIN-MoE while a Trainer trains it, and changes nothing about the training.

    Every step counts each expert's tokens. A step that will be logged is also measured in detail (or every step, with
    `every_step`), and its figures go to the Trainer's log under the names of docs/monitoring.md. All are over all ranks
    and without padding; forwards in evaluation mode or without gradients do not count, and recomputed ones count once.
    A new `train()` starts from nothing, also when it resumes a checkpoint.

    Args:
        collapse_steps: an expert without a token for that many steps is reported, just before the next log; None: never.
        on_collapse: "warn" ([`ExpertCollapseWarning`], once until the expert has got tokens again) or "raise"
            ([`ExpertCollapseError`]).
        every_step: measure all steps in detail, not only those that are logged.
        per_layer: log the figures of every layer beside their means.
        per_expert: log every expert's share of its layer's load too: L * E values.

    Attributes:
        records: one [`RoutingRecord`] per log; of a long training, `MAX_RECORDS` that cover several logs each.
        latest: the record of the last log, or of the steps that were left at the end; None before that.
        loss, eval_loss: (step, value) pairs as the Trainer logs them.
        tokens: all tokens trained on, over all ranks.

    Raises:
        ValueError: a wrong argument.
    """

    def __init__(
        self,
        collapse_steps: int | None = 100,
        on_collapse: str = "warn",
        every_step: bool = False,
        per_layer: bool = True,
        per_expert: bool = False,
    ):
        if collapse_steps is not None and collapse_steps < 1:
            raise ValueError(f"collapse_steps={collapse_steps} is not positive; give 1 or more, or None for no check")
        if on_collapse not in ("warn", "raise"):
            raise ValueError(f"on_collapse={on_collapse!r} is unknown; choose 'warn' or 'raise'")
        self.collapse_steps, self.on_collapse = collapse_steps, on_collapse
        self.every_step, self.per_layer, self.per_expert = every_step, per_layer, per_expert
        self.eval_loss: list[tuple[int, float]] = []
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._unlogged: RoutingRecord | None = None
        self._start_anew()

    def attach(self, trainer) -> RoutingMonitor:
        """Become the trainer's first callback, so that TensorBoard, trackio, W&B and others get the figures too.

        In `callbacks=[...]` a monitor comes after them, and its figures reach `trainer.state.log_history` only. The
        console gets the means alone.
        """
        callbacks = trainer.callback_handler.callbacks
        if self in callbacks:
            callbacks.remove(self)
        callbacks.insert(0, self)
        console = [index for index, one in enumerate(callbacks) if isinstance(one, PrinterCallback | ProgressCallback)]
        if console and not any(isinstance(one, _MeansOnConsole) for one in callbacks):
            callbacks.insert(console[0], _MeansOnConsole())
        return self

    def final_load(self, share: float = 0.25) -> torch.Tensor:
        """(L, E) load summed over the last `share` of the steps, as float."""
        last_step = self.records[-1].last_step
        start = last_step - share * (last_step - self.records[0].first_step + 1)
        return torch.stack([one.load for one in self.records if one.last_step > start]).sum(0).float()

    def remove_hooks(self) -> None:
        """Leave the model as it was. Needed only after a training that an error or an interrupt has ended."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    # --- what the Trainer calls -----------------------------------------------------------------------------------------

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if args.parallel_mode == ParallelMode.NOT_DISTRIBUTED:
            raise ValueError(
                "RoutingMonitor cannot watch torch.nn.DataParallel, which copies the model for every forward; start one "
                "process per GPU with torchrun or accelerate launch, or show one GPU only"
            )
        self.remove_hooks()
        if self.records or self.loss:
            self.eval_loss = []
        self._start_anew()
        decoder = next((module for module in model.modules() if isinstance(module, GrinMoeModel)), None)
        if decoder is None:
            raise ValueError(f"RoutingMonitor watches GRIN-MoE models; {type(model).__name__} does not hold one")
        if state.global_step > 0:
            # What the run logged before it was resumed.
            for name, values in (("loss", self.loss), ("eval_loss", self.eval_loss)):
                values[:] = [(entry["step"], float(entry[name])) for entry in state.log_history if name in entry]
        config = decoder.config
        self._config = config
        self._ranks_per_batch = decoder._ranks_per_batch()
        self._counts = RankCounts(config.num_hidden_layers, config.num_local_experts, args.device, state.global_step)
        self._watch(decoder)
        self._closed_step = state.global_step
        self._opened_at = self._now = time.perf_counter()

    def on_step_begin(self, args, state, control, **kwargs):
        self._step = state.global_step + 1
        self._counts.step.fill_(self._step)
        strategy = args.logging_strategy
        self._logs = (strategy == IntervalStrategy.STEPS and self._step % state.logging_steps == 0) or (
            self._step == 1 and args.logging_first_step
        )
        # Which step ends an epoch is not known before it does. The last one is not logged, but closes the history.
        last = self._step == state.max_steps
        self._measures = self.every_step or self._logs or last or strategy == IntervalStrategy.EPOCH

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        # The one point of a step where the host waits for the device: before a NaN gradient reaches the weights.
        impossible = self._counts.impossible.tolist()
        if any(impossible):
            layer = next(index for index, count in enumerate(impossible) if count)
            rank = f" on rank {dist.get_rank()}" if number_of_ranks() > 1 else ""
            self._fail(
                NonFiniteRouterLogitsError(
                    f"{impossible[layer]} tokens{rank} have router logits that are NaN or infinite, so no expert can be "
                    "chosen; the weights are still those of the step before. Look for the first step with a large loss "
                    "or gradient, and lower the learning rate or clip gradients there",
                    layer,
                    self._step,
                )
            )
        if self._measures:
            self._counts.add_gradients(self._gates)

    def on_step_end(self, args, state, control, **kwargs):
        self._now = time.perf_counter()
        # Here rather than in on_log: this is a collective, and a script may log something on its main process only.
        if self._logs:
            self._close(state)
            self._check_collapse(state)

    def on_epoch_end(self, args, state, control, **kwargs):
        if args.logging_strategy == IntervalStrategy.EPOCH:
            self._close(state)
            self._check_collapse(state)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs is None or "loss" not in logs:  # an evaluation, or the summary at the end
            return
        self.loss.append((state.global_step, float(logs["loss"])))
        record = self._unlogged
        if record is None or record.last_step != state.global_step:
            return
        self._unlogged = None
        figures = self._figures(record)
        logs |= figures
        # The Trainer has entered a copy of its logs there already. All layers would swell every checkpoint's state.
        entry = state.log_history[-1] if state.log_history else {}
        if entry.get("step") == state.global_step and "loss" in entry:
            entry |= _means_only(figures)

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        if metrics and "eval_loss" in metrics:
            self.eval_loss.append((state.global_step, float(metrics["eval_loss"])))
        self._leave_out_time()

    def on_save(self, args, state, control, **kwargs):
        self._leave_out_time()

    def on_train_end(self, args, state, control, **kwargs):
        self._close(state)
        self.remove_hooks()

    # --- counting -------------------------------------------------------------------------------------------------------

    def _start_anew(self) -> None:
        self.records: list[RoutingRecord] = []
        self.latest: RoutingRecord | None = None
        self.loss: list[tuple[int, float]] = []
        self.tokens = 0
        self._logs_per_record = 1
        self._step, self._closed_step = 0, 0
        self._logs, self._measures = False, False  # the step that runs
        self._unlogged = None
        self._collapsed: set[tuple[int, int]] = set()
        # Of the forward pass that runs: layer -> router_logits, routing_weights, selected_experts; None outside of one.
        self._noted: dict[int, tuple[torch.Tensor, ...]] | None = None
        self._opened_at = self._now = 0.0

    def _watch(self, decoder: GrinMoeModel) -> None:
        # Hooks, because the Trainer hands a model's outputs to no callback.
        blocks = [module for module in decoder.modules() if isinstance(module, GrinMoeSparseMoeBlock)]
        # Under adapters a gate is a wrapper, which may hold a second router that does not run.
        self._gates: list[nn.Module] = [block.gate for block in blocks[: decoder.config.num_hidden_layers]]
        for layer, gate in enumerate(self._gates):
            for router in (module for module in gate.modules() if isinstance(module, GrinMoeRouter)):
                hook = functools.partial(self._after_router, layer)
                self._hooks.append(router.register_forward_hook(hook))
        self._hooks.append(decoder.register_forward_pre_hook(self._before_forward))
        self._hooks.append(decoder.register_forward_hook(self._after_forward, with_kwargs=True, always_call=True))

    def _before_forward(self, decoder: GrinMoeModel, _) -> None:
        # Without gradients it is no training: the reference of a preference loss, text for a reward.
        self._noted = {} if decoder.training and torch.is_grad_enabled() else None

    def _after_router(self, layer: int, router: GrinMoeRouter, _, output) -> None:
        # Recomputation for the backward comes outside of the decoder's forward.
        if self._noted is not None:
            logits, weights, *_, experts = output
            self._noted[layer] = logits.detach(), weights.detach(), experts

    def _after_forward(self, decoder: GrinMoeModel, args, kwargs, output) -> None:
        noted, self._noted = self._noted, None
        if output is None:  # the forward raised
            error = sys.exception()
            if isinstance(error, NonFiniteRouterLogitsError):
                error.step = self._step
            return
        if not noted:
            return
        mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        routing = [noted[layer] for layer in sorted(noted)]
        valid = torch.ones_like(routing[0][0][:, 0], dtype=torch.float32)
        if mask is not None and mask.dim() == 2:  # a prepared 4-D mask does not tell padding
            valid = mask[:, -output.last_hidden_state.shape[1] :].reshape(-1).to(valid)
        self._counts.add(routing, valid, self._config.router_jitter_noise if self._measures else None)

    # --- before a log ---------------------------------------------------------------------------------------------------

    def _close(self, state) -> None:
        """Make a record of the steps since the last one: a collective."""
        counts, shared = self._counts, self._ranks_per_batch
        counts.over_all_ranks()
        # Ranks that share a batch have counted the same tokens.
        load = counts.load.cpu() // shared
        record = RoutingRecord(
            first_step=self._closed_step + 1,
            last_step=state.global_step,
            logs=1,
            seconds=max(self._now - self._opened_at, 1e-9),
            tokens=int(load[0].sum()) // self._config.num_experts_per_tok,
            load=load,
            sums=counts.sums.cpu().double() / shared,
            gradient_norm=counts.gradient_norm.cpu().double(),
            gradient_steps=counts.gradient_steps.clone(),
            top_k=self._config.num_experts_per_tok,
        )
        counts.reset()
        self._closed_step = state.global_step
        self._opened_at = self._now = time.perf_counter()
        if record.tokens:
            self._remember(record)

    def _remember(self, record: RoutingRecord) -> None:
        self.latest = self._unlogged = record
        self.tokens += record.tokens
        records = self.records
        if records and records[-1].logs < self._logs_per_record:
            records[-1] += record
        else:
            records.append(record)
        if len(records) == MAX_RECORDS and records[-1].logs == self._logs_per_record:
            self.records = [first + second for first, second in zip(records[::2], records[1::2], strict=True)]
            self._logs_per_record *= 2

    def _leave_out_time(self) -> None:
        """Since the last step or the last call of this."""
        now = time.perf_counter()
        self._opened_at += now - self._now
        self._now = now

    def _figures(self, record: RoutingRecord) -> dict[str, float]:
        """What goes to the log, by name; without what was not measured."""
        layers = {"max_over_mean_load": record.max_over_mean_load, "grad_norm": record.router_gradient_norm}
        if record.measured:
            for name in ("entropy", "sampled_share", "kept_experts", "balance_loss"):
                layers[name] = getattr(record, name)
            if self._config.router_capacity_factor is not None:
                layers["dropped_share"] = record.dropped_share
        figures = {"routing/tokens_per_s": record.tokens_per_s}
        for name, values in layers.items():
            known = record.gradient_steps > 0 if name == "grad_norm" else torch.ones_like(values, dtype=torch.bool)
            if not known.any():
                continue
            overall = values[known].max() if name == "max_over_mean_load" else values[known].mean()
            figures[f"routing/{name}"] = float(overall)
            if self.per_layer:
                figures |= {f"{_LAYER}{index:02d}/{name}": float(values[index]) for index in known.nonzero().flatten()}
        if self.per_expert:
            share = record.load.double() / record.load.sum(1, keepdim=True)
            for layer, shares in enumerate(share.tolist()):
                figures |= {f"{_LAYER}{layer:02d}/expert_{index:02d}": value for index, value in enumerate(shares)}
        return figures

    def _check_collapse(self, state) -> None:
        if self.collapse_steps is None:
            return
        idle_steps = state.global_step - self._counts.last_used.cpu()  # (L, E)
        collapsed = {(layer, expert) for layer, expert in (idle_steps >= self.collapse_steps).nonzero().tolist()}
        fresh, self._collapsed = sorted(collapsed - self._collapsed), collapsed
        for layer in sorted({layer for layer, _ in fresh}):
            experts = [expert for of_layer, expert in fresh if of_layer == layer]
            idle = ", ".join(f"expert {expert} for {int(idle_steps[layer, expert])} steps" for expert in experts)
            problem = (
                f"layer {layer}, step {state.global_step}: no token has gone to {idle}; raise router_aux_loss_coef or "
                "router_jitter_noise, or lower the learning rate (RoutingMonitor(collapse_steps=None) does not check)"
            )
            if self.on_collapse == "raise":
                self._fail(ExpertCollapseError(problem, layer, experts, state.global_step))
            if state.is_world_process_zero:
                warnings.warn(problem, ExpertCollapseWarning, stacklevel=2)

    def _fail(self, error: Exception) -> NoReturn:
        self.remove_hooks()  # the Trainer will not call on_train_end
        raise error


def _means_only(figures: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in figures.items() if not name.startswith(_LAYER)}


class _MeansOnConsole(TrainerCallback):
    """Stands before what prints a log, and takes the figures of single layers out of it: hundreds in a deep model."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        for name in [name for name in logs or {} if name.startswith(_LAYER)]:
            del logs[name]
