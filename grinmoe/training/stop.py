"""Stop a training at a signal with a checkpoint, and go on from it, or from the last one after any other end.

    interruption = StopAtSignal()
    with interruption.listening():
        interruption.train(trainer, resume_from_checkpoint=last_whole_checkpoint(trainer.args.output_dir))

What is promised, and how it is tested: docs/training.md.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.distributed as dist
from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, IntervalStrategy, SaveStrategy

from ..distributed import has_manifest, read_manifest, write_manifest
from ..files import telling_disk_full
from .checkpoints import best_checkpoint, check_checkpoint, delete_older_checkpoints, on_first_rank


class StoppedBySignal(BaseException):
    """A signal came where there is nothing to save. Like KeyboardInterrupt, `except Exception` does not catch it."""


class _EvaluationInterrupted(Exception):
    """Leaves an evaluation, for which the Trainer's control flow has no way out."""


class _NothingLeft(Exception):
    """Leaves a training that has all of its steps, of which the Trainer would do one more."""


class StopAtSignal(TrainerCallback):
    """
    At SIGTERM (what schedulers send before they kill) or Ctrl-C: end the training within one micro-batch, with a checkpoint.

    The checkpoint is that of the last complete optimizer step, with the random state of that moment: a run that goes on
    from it does what an uninterrupted one does, also if the signal came between the micro-batches of a step. For that,
    an evaluation leaves the random state of the training as it was, an evaluation that a signal has left out is made up
    for, and callbacks that export their state (early stopping) get it back. All ranks stop at the same place, at the first
    signal that any of them gets. A second Ctrl-C raises KeyboardInterrupt as usual.

    Every checkpoint gets a manifest when its files are on the disk, and only then older ones are deleted
    (`save_total_limit`).

    (Transformers' `enable_jit_checkpoint` waits three seconds, saves in the middle of a step, and each rank by itself.)

    Args:
        run: id of the run, for the manifests.

    Attributes:
        received: name of the signal that ended the training, or None.
        evaluation_is_due: whether the signal left out an evaluation of the last step.
    """

    def __init__(self, run: str | None = None):
        self.run = run
        self.received: str | None = None
        self.evaluation_is_due = False
        self._signal: int | None = None
        self._raises = False
        self._random_state: dict[str, Any] | None = None
        self._trainer: Any = None
        self._resumed: Path | None = None
        self._resumed_facts: dict[str, Any] = {}
        self._limit: int | None = None
        self._stepped = False
        self._sealed_step: int | None = None
        self._is_scheduled = False

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Take SIGTERM and SIGINT while the body runs; elsewhere than in the main thread, none."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        process = os.getpid()

        def note(number: int, frame: Any) -> None:
            if os.getpid() != process:  # a worker that this process has forked
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
                return
            if self._signal == signal.SIGINT and number == signal.SIGINT:
                raise KeyboardInterrupt
            self._signal = number
            if self._raises:
                self._raise()

        previous = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def raising(self) -> Iterator[None]:
        """Raise StoppedBySignal at a signal while the body runs, or if one has come before."""
        if self._signal is not None:
            self._raise()
        self._raises = True
        try:
            yield
        finally:
            self._raises = False

    def _raise(self) -> None:
        self._raises = False
        self.received = signal.Signals(self._signal or 0).name
        raise StoppedBySignal(self.received)

    def train(self, trainer, resume_from_checkpoint: str | os.PathLike | None = None, is_checked: bool = False) -> None:
        """
        `trainer.train` with this callback, behind all others. From a run's last checkpoint it only loads the weights.

        Args:
            trainer: a Trainer, also one of TRL's.
            resume_from_checkpoint: folder to go on from.
            is_checked: whether `find_checkpoints` has compared that folder and the best one with their manifests.

        Raises:
            CheckpointError: the checkpoint, or the best one, does not match its manifest, or holds two sets of weights.
            DiskFullError: the disk is full.
        """
        callbacks = trainer.callback_handler.callbacks
        if self in callbacks:
            callbacks.remove(self)
        trainer.add_callback(self)
        self._trainer = trainer
        self._resumed = None if resume_from_checkpoint is None else Path(resume_from_checkpoint)
        self._resumed_facts = {}
        if self._resumed is not None:
            self._resumed_facts = on_first_rank(lambda: self._facts(is_checked))
        # The Trainer deletes older checkpoints before anybody can know that the new one is on the disk.
        self._limit, trainer.args.save_total_limit = trainer.args.save_total_limit, None
        try:
            with telling_disk_full(trainer.args.output_dir):
                self._train(trainer)
        except _NothingLeft:
            if trainer.args.load_best_model_at_end and trainer.state.best_model_checkpoint is not None:
                trainer._load_best_model()  # private: otherwise it happens at the end of `train` only
        finally:
            trainer.args.save_total_limit = self._limit

    def _train(self, trainer) -> None:
        try:
            trainer.train(resume_from_checkpoint=None if self._resumed is None else str(self._resumed))
        except _EvaluationInterrupted:
            self.evaluation_is_due = True
            if self._stepped:
                _restore(self._random_state)
                # Private: the public save_model leaves optimizer and position out.
                trainer._save_checkpoint(trainer.model, trial=None)
                trainer.callback_handler.on_save(trainer.args, trainer.state, trainer.control)

    def _facts(self, is_checked: bool) -> dict[str, Any]:
        assert self._resumed is not None
        if not is_checked:
            return check_checkpoint(self._resumed)
        return read_manifest(self._resumed) if has_manifest(self._resumed) else {}

    def _asked_to_stop(self, device: torch.device) -> bool:
        """Whether any rank has been: a collective."""
        number = self._signal or 0
        if dist.is_available() and dist.is_initialized():
            highest = torch.tensor(number, device=device)
            dist.all_reduce(highest, op=dist.ReduceOp.MAX)
            number = int(highest)
        if number:
            self.received = signal.Signals(number).name
        return bool(number)

    # --- what the Trainer calls -----------------------------------------------------------------------------------------

    def on_train_begin(self, args, state, control, **kwargs):
        self._random_state, self._stepped, self._sealed_step = _random_state(), False, None
        self.evaluation_is_due = bool(self._resumed_facts.get("evaluation_is_due"))
        if self._resumed is None:
            return
        self._restore_callbacks(state)
        best = best_checkpoint(self._resumed)
        if best is not None and best.is_dir():
            # The Trainer writes it down as output_dir was typed; the folder may be named otherwise by now.
            state.best_model_checkpoint = str(best)
        if self.evaluation_is_due and args.eval_strategy != IntervalStrategy.NO:
            self._make_up_evaluation(args, state, control)
        self.evaluation_is_due = False

    def _restore_callbacks(self, state) -> None:
        """As the Trainer does it on request, but the arguments of this start stay, and so does the order."""
        by_name: dict[str, list[Any]] = {}
        for callback in [*self._trainer.callback_handler.callbacks, self._trainer.control]:
            if isinstance(callback, ExportableState):
                by_name.setdefault(type(callback).__name__, []).append(callback)
        for name, callbacks in by_name.items():
            stored = state.stateful_callbacks.get(name, [])
            # Of callbacks of one class the Trainer appends the states to those of the save before.
            stored = stored[-len(callbacks) :] if isinstance(stored, list) else [stored]
            for callback, entry in zip(callbacks, stored, strict=False):
                for attribute, value in entry["attributes"].items():
                    setattr(callback, attribute, value)
            # The Trainer takes it for granted that each class has an entry.
            states = [callback.state() for callback in callbacks]
            state.stateful_callbacks[name] = states if len(states) > 1 else states[0]

    def _make_up_evaluation(self, args, state, control) -> None:
        """The evaluation of the last step, which a signal had left out."""
        before = state.best_global_step
        # Private: evaluate() alone would leave the best model and a scheduler that follows the loss out.
        metrics = self._trainer._evaluate(None, None)
        if self._trainer._determine_best_metric(metrics=metrics, trial=None):
            if self._resumed_facts.get("is_scheduled") or args.save_strategy == SaveStrategy.BEST:
                state.best_model_checkpoint = str(self._resumed)
            else:
                # Without the signal there would be no checkpoint of this step to be the best one.
                state.best_global_step = before

    def on_step_begin(self, args, state, control, **kwargs):
        stopped_early = control.should_training_stop or any(
            isinstance(callback, EarlyStoppingCallback)
            and callback.early_stopping_patience_counter >= callback.early_stopping_patience
            for callback in self._trainer.callback_handler.callbacks
        )
        if state.global_step >= state.max_steps or stopped_early:
            raise _NothingLeft

    def on_step_end(self, args, state, control, **kwargs):
        self._random_state, self._stepped = _random_state(), True
        self._is_scheduled = control.should_save or _ends_epoch(state, args.save_strategy, SaveStrategy.EPOCH)
        if self._asked_to_stop(args.device):
            ends_epoch = _ends_epoch(state, args.eval_strategy, IntervalStrategy.EPOCH)
            self.evaluation_is_due = control.should_evaluate or (ends_epoch and args.eval_delay <= state.epoch)
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    def on_substep_end(self, args, state, control, **kwargs):
        if self._asked_to_stop(args.device):
            control.should_training_stop = True
            control.should_save = self._has_unsaved_steps(state)
            if self._stepped:
                _restore(self._random_state)

    def on_epoch_end(self, args, state, control, **kwargs):
        # The Trainer comes by here on its way out, in the middle of an epoch too.
        if self.received:
            control.should_evaluate = False
            control.should_save = self._has_unsaved_steps(state)

    def _has_unsaved_steps(self, state) -> bool:
        """Whether a checkpoint is to be written: one that is there already must not be written anew."""
        return self._stepped and self._sealed_step != state.global_step

    def on_prediction_step(self, args, state, control, **kwargs):
        if self._asked_to_stop(args.device):
            raise _EvaluationInterrupted

    def on_evaluate(self, args, state, control, **kwargs):
        _restore(self._random_state)

    def on_save(self, args, state, control, **kwargs):
        distributed = dist.is_available() and dist.is_initialized()
        if distributed:
            dist.barrier()  # all ranks have written their files
        if args.should_save:
            folder = Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
            write_manifest(
                folder, run=self.run, evaluation_is_due=self.evaluation_is_due, is_scheduled=self._is_scheduled
            )
            delete_older_checkpoints(args.output_dir, self._limit, state.best_model_checkpoint)
        if distributed:
            dist.barrier()  # no rank goes on, and ends, as if it were done
        self._sealed_step = state.global_step


def _ends_epoch(state, strategy, epoch) -> bool:
    return strategy == epoch and state.epoch == int(state.epoch)


def _random_state() -> dict[str, Any]:
    """Of everything that the Trainer keeps in a checkpoint."""
    state = {"python": random.getstate(), "numpy": numpy.random.get_state(), "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def _restore(state: dict[str, Any] | None) -> None:
    if state is None:
        return
    random.setstate(state["python"])
    numpy.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state:
        torch.cuda.set_rng_state_all(state["cuda"])
