"""The progress bar of a training: loss, held-out loss, tokens per second and memory on one line."""

from __future__ import annotations

import resource
import sys

import torch
from transformers import ProgressCallback
from transformers.trainer_utils import has_length

# Evaluations that are over sooner get no bar of their own.
_SECONDS_BEFORE_SECOND_BAR = 5


class TrainingProgress(ProgressCallback):
    """The Trainer's progress bar with figures on it, in place of a printed dictionary at every log."""

    def __init__(self):
        super().__init__()
        self._shown: dict[str, str] = {}

    def on_log(self, args, state, control, logs=None, **kwargs):
        names = {"loss": "loss", "eval_loss": "held out", "eval_rewards/accuracies": "accuracy"}
        self._shown |= {shown: f"{float(logs[name]):.3f}" for name, shown in names.items() if name in logs}
        if "routing/tokens_per_s" in logs:
            self._shown["tokens/s"] = f"{logs['routing/tokens_per_s']:,.0f}"
        self._shown["peak"] = f"{peak_gib():.2f} GiB"
        if state.is_world_process_zero and self.training_bar is not None:
            self.training_bar.set_postfix(self._shown)

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        if state.is_world_process_zero and self.prediction_bar is None and has_length(eval_dataloader):
            from tqdm.auto import tqdm

            self.prediction_bar = tqdm(
                total=len(eval_dataloader), desc="evaluation", leave=False, delay=_SECONDS_BEFORE_SECOND_BAR
            )
        super().on_prediction_step(args, state, control, eval_dataloader=eval_dataloader, **kwargs)


def peak_gib(who: int = resource.RUSAGE_SELF) -> float:
    """Most memory so far, in GiB: of the GPU where there is one, else of this process (or its children) in main memory."""
    if who == resource.RUSAGE_SELF and torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(who).ru_maxrss * unit / 2**30
