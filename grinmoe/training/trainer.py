"""A Trainer whose evaluation loss is the mean over target tokens."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Trainer


class TokenMeanTrainer(Trainer):
    """
    The Trainer, with an evaluation loss that does not depend on how the rows are batched.

    The library's is the mean of the batches' means, weighted by rows: with packed rows, or targets in a part of a row only,
    it moves with the batch size (5.60 for 5.41 on the demo's chats, one row at a time), and over several ranks it counts
    the rows twice that fill the last batch. No callback sees the single batches' losses.
    """

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        rows, state = inputs["labels"].shape[0], self.accelerator.gradient_state
        if state.end_of_dataloader and state.remainder > 0:  # Accelerate repeats rows to fill the last batch
            first_repeated = max(state.remainder - self.args.process_index * rows, 0)
            inputs["labels"][first_repeated:] = -100
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = model(**inputs).loss.detach()
        targets = (inputs["labels"][:, 1:] != -100).sum()
        total = torch.where(targets > 0, loss.double() * targets, 0.0)
        self._held_out.append(self.accelerator.reduce(torch.stack([total, targets.double()]), "sum"))
        return loss, None, None

    def evaluation_loop(self, *args: Any, **kwargs: Any):
        self._held_out: list[torch.Tensor] = []
        output = super().evaluation_loop(*args, **kwargs)
        name = f"{kwargs.get('metric_key_prefix', 'eval')}_loss"
        if self._held_out and output.metrics is not None and name in output.metrics:
            total, targets = torch.stack(self._held_out).sum(0).tolist()
            output.metrics[name] = total / targets
        return output
