"""A Trainer whose evaluation loss is the mean over target tokens, and whose order of rows a resumed run finds again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import Trainer
from transformers.trainer_pt_utils import LengthGroupedSampler


class EpochSeededSampler(LengthGroupedSampler):
    """
    Rows grouped by length, in an order that follows from the seed and the epoch alone.

    The library's draws the order from the state that the random numbers have when an epoch begins. A run that goes on in
    the second epoch or later does not know it, and would see some rows twice and others never.

    Args:
        lengths: of the rows.
        step_rows: rows of an optimizer step, over all ranks and micro-batches.
        seed: of the data.
        epoch: returns the number of the epoch that begins.
    """

    def __init__(self, lengths: list[int], step_rows: int, seed: int, epoch: Callable[[], int]):
        super().__init__(step_rows, lengths=lengths)
        self._seed, self._epoch = seed, epoch

    def __iter__(self) -> Iterator[int]:
        self.generator = torch.Generator().manual_seed(self._seed + self._epoch())
        return super().__iter__()


class TokenMeanTrainer(Trainer):
    """
    The Trainer, with an evaluation loss that does not depend on how the rows are batched.

    The library's is the mean of the batches' means, weighted by rows: with packed rows, or targets in a part of a row only,
    it moves with the batch size (5.60 for 5.41 on the demo's chats, one row at a time), and over several ranks it counts
    the rows twice that fill the last batch. No callback sees the single batches' losses.
    """

    def _get_train_sampler(self, *args: Any):
        # Private: the public get_train_dataloader would have to be written anew for this.
        sampler = super()._get_train_sampler(*args)
        if not isinstance(sampler, LengthGroupedSampler):
            return sampler
        arguments = self.args
        seed = arguments.seed if arguments.data_seed is None else arguments.data_seed
        step_rows = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
        return EpochSeededSampler(sampler.lengths, step_rows, seed, lambda: int(self.state.epoch or 0))

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
