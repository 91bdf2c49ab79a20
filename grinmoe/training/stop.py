"""Stop a training at a signal with a checkpoint, and find the checkpoint to go on from after any other end.

    interruption = StopAtSignal()
    with interruption.listening():
        interruption.train(trainer, resume_from_checkpoint=last_whole_checkpoint(trainer.args.output_dir))

What is promised, and how it is tested: docs/training.md.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import signal
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_NAME

from ..checkpoint_grinmoe import CheckpointError, CheckpointFileError, read_tensors
from ..configuration_grinmoe import read_json_object
from ..distributed import is_sharded, is_whole


class _EvaluationInterrupted(Exception):
    """Leaves an evaluation, for which the Trainer's control flow has no way out."""


class _NothingLeft(Exception):
    """Leaves a training that has all of its steps, of which the Trainer would do one more."""


class StopAtSignal(TrainerCallback):
    """
    At SIGTERM (what schedulers send before they kill) or Ctrl-C: end the training within one micro-batch, with a checkpoint.

    The checkpoint is that of the last complete optimizer step, with the random state of that moment: a run that goes on
    from it does what an uninterrupted one does, also if the signal came between the micro-batches of a step. For that,
    an evaluation leaves the random state of the training as it was. All ranks stop at the same place, at the first signal
    that any of them gets. A second Ctrl-C raises KeyboardInterrupt as usual.

    (Transformers' `enable_jit_checkpoint` waits three seconds, saves in the middle of a step, and each rank by itself.)

    Attributes:
        received: name of the signal that ended the training, or None.
    """

    def __init__(self):
        self.received: str | None = None
        self._signal: int | None = None
        self._random_state: dict[str, Any] | None = None

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Take SIGTERM and SIGINT while the body runs; elsewhere than in the main thread, none."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def train(self, trainer, resume_from_checkpoint: str | os.PathLike | None = None) -> None:
        """`trainer.train` with this callback, behind all others. From a run's last checkpoint it only loads the weights."""
        callbacks = trainer.callback_handler.callbacks
        if self in callbacks:
            callbacks.remove(self)
        trainer.add_callback(self)
        resume = None if resume_from_checkpoint is None else str(resume_from_checkpoint)
        if resume is not None:
            _check_weights(Path(resume))
        try:
            trainer.train(resume_from_checkpoint=resume)
        except _EvaluationInterrupted:
            _restore(self._random_state)
            # Private: the public save_model leaves optimizer and position out.
            trainer._save_checkpoint(trainer.model, trial=None)
        except _NothingLeft:
            if trainer.args.load_best_model_at_end and trainer.state.best_model_checkpoint is not None:
                trainer._load_best_model()  # private: otherwise it happens at the end of `train` only

    def _note(self, number: int, frame: Any) -> None:
        if self._signal == signal.SIGINT and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._signal = number

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
        self._random_state = None

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps:
            raise _NothingLeft

    def on_step_end(self, args, state, control, **kwargs):
        self._random_state = _random_state()
        if self._asked_to_stop(args.device):
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    def on_substep_end(self, args, state, control, **kwargs):
        if self._asked_to_stop(args.device):
            control.should_training_stop = True
            # Before the first step of a start there is nothing that is not saved already.
            control.should_save = self._random_state is not None
            _restore(self._random_state)

    def on_epoch_end(self, args, state, control, **kwargs):
        # The Trainer comes by here on its way out, in the middle of an epoch too.
        if self.received:
            control.should_evaluate = False

    def on_prediction_step(self, args, state, control, **kwargs):
        if self._asked_to_stop(args.device):
            raise _EvaluationInterrupted

    def on_evaluate(self, args, state, control, **kwargs):
        _restore(self._random_state)


def last_whole_checkpoint(output_dir: str | os.PathLike) -> Path | None:
    """
    The newest `checkpoint-N` of a run that was written to its end; None if there is none.

    The Trainer writes a checkpoint file by file under its final name, so after a kill the newest may be a part of one.
    """
    return next((folder for folder in reversed(_checkpoints(output_dir)) if _is_whole(folder)), None)


def remove_partial_checkpoints(output_dir: str | os.PathLike) -> list[str]:
    """Delete what a killed run left of a checkpoint that it was writing or deleting. Returns their names."""
    partial = [folder for folder in _checkpoints(output_dir) if not _is_whole(folder)]
    for folder in partial:
        shutil.rmtree(folder)
    return [folder.name for folder in partial]


def _checkpoints(output_dir: str | os.PathLike) -> list[Path]:
    pattern = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
    found = [(pattern.fullmatch(path.name), path) for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")]
    return [path for _, path in sorted((int(match[1]), path) for match, path in found if match and path.is_dir())]


def _is_whole(folder: Path) -> bool:
    """The Trainer writes the state last. What it wrote before is looked at too: a machine may have lost its cache."""
    try:
        read_json_object(folder / TRAINER_STATE_NAME, max_bytes=2**30, allow_nan=True)
        _check_weights(folder)
    except CheckpointFileError:
        return False
    except CheckpointError:
        raise  # whole, and ambiguous: going on from an older one, or deleting this one, would be a guess
    except (OSError, ValueError):
        return False
    weights = list(folder.glob("*.safetensors"))
    if any(folder.glob(".saving-*")) or not (is_whole(folder) if is_sharded(folder) else weights):
        return False
    pickles = [*folder.glob("optimizer*"), *folder.glob("scheduler.pt"), *folder.glob("rng_state*.pth")]
    return (
        all(_is_safetensors(file) for file in weights)
        and all(zipfile.is_zipfile(file) for file in pickles if file.is_file())
        and any(file.name.startswith("rng_state") for file in pickles)
    )


def _check_weights(folder: Path) -> None:
    """Raise CheckpointError where the Trainer, which checks nothing, would read other weights than a user expects."""
    tensors = read_tensors(folder)  # refuses an index whose shards are not all there
    if tensors and (folder / WEIGHTS_NAME).is_file() and not (folder / SAFE_WEIGHTS_NAME).is_file():
        raise CheckpointError(
            f"{folder} holds {WEIGHTS_NAME} beside {SAFE_WEIGHTS_INDEX_NAME}, and the Trainer reads the pickle; remove it"
        )


def _is_safetensors(file: Path) -> bool:
    try:
        with safe_open(file, framework="pt"):
            return True
    except (SafetensorError, OSError):
        return False


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
