"""Checkpoints of a run: which one a training can go on from exactly, and which ones are deleted.

[`StopAtSignal`] writes a manifest into every checkpoint when all of it is on the disk. What that promises: docs/training.md.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_NAME

from ..checkpoint_grinmoe import CheckpointError, CheckpointFileError, read_tensors, write_through
from ..configuration_grinmoe import read_json_object
from ..distributed import (
    MANIFEST_NAME,
    DamagedCheckpointError,
    added_files,
    check_manifest,
    has_manifest,
    is_sharded,
    is_whole,
    size_in_bytes,
)

T = TypeVar("T")
# Of a checkpoint whose check takes some seconds.
_BYTES_WORTH_A_WORD = 5_000_000_000
# Files of the state that is no weight, and whose.
_STATE = {"optimizer*": "optimizer", "scheduler.pt": "scheduler", "rng_state*.pth": "random numbers"}


@dataclass
class FoundCheckpoints:
    """
    What a run directory has of checkpoints.

    Attributes:
        newest: the newest that matches its manifest; None if there is none.
        damaged: newer ones that do not match theirs, and the reasons.
        partial: those without a manifest.
    """

    newest: Path | None = None
    damaged: list[tuple[Path, str]] = field(default_factory=list)
    partial: list[Path] = field(default_factory=list)


def find_checkpoints(
    output_dir: str | os.PathLike, run: str | None, tell: Callable[[str], Any] | None = None
) -> FoundCheckpoints:
    """
    Look for the checkpoint to go on from. Nothing is changed.

    Args:
        output_dir: the run directory. All of its checkpoints were written with [`StopAtSignal`].
        run: the run's id. A checkpoint of another run counts as damaged.
        tell: gets a sentence before each check that takes long.

    Raises:
        CheckpointError: the newest checkpoint holds weights alone, or a file that its manifest does not have and that
            could be read.
        OSError: a file cannot be read.
    """
    found = FoundCheckpoints()
    for folder in reversed(checkpoints(output_dir)):
        if not has_manifest(folder):
            found.partial.append(folder)
        elif found.newest is None:
            try:
                facts = check_told(folder, tell)
                if facts.get("run") != run:
                    raise DamagedCheckpointError(f"{folder} is a checkpoint of another run")
                _check_state(folder)
                found.newest = folder
            except DamagedCheckpointError as error:
                found.damaged.append((folder, str(error)))
    return found


def check_told(folder: Path, tell: Callable[[str], Any] | None) -> dict[str, Any]:
    """`check_manifest`, with a sentence before if it takes long."""
    size = size_in_bytes(folder)
    if tell is not None and size >= _BYTES_WORTH_A_WORD:
        tell(f"Comparing {folder.name} ({size / 1e9:.1f} GB) with its manifest")
    return check_manifest(folder)


def last_whole_checkpoint(output_dir: str | os.PathLike) -> Path | None:
    """
    The newest `checkpoint-N` of a folder that was written to its end; None if there is none.

    The Trainer writes a checkpoint file by file under its final name, so after a kill the newest may be a part of one. A
    checkpoint with a manifest is compared with it. Of one without, written without [`StopAtSignal`], the last file must be
    there, and all files must have their beginning and end; a change in the middle of a file is not noticed.

    Raises:
        DamagedCheckpointError: the newest checkpoint with a manifest does not match it. Move the folder elsewhere to go on
            from the one before.
        CheckpointError: it is not clear which weights the newest checkpoint holds.
    """
    for folder in reversed(checkpoints(output_dir)):
        if has_manifest(folder):
            check_manifest(folder)
            return folder
        if _is_whole(folder):
            return folder
    return None


def check_checkpoint(folder: Path) -> dict[str, Any]:
    """
    Check the checkpoint that a training shall go on from, and the best one, by their manifests if they have one.

    Returns:
        Facts of the manifest; {} where there is none.

    Raises:
        CheckpointError: something differs from the manifest; or without one, it is not clear which weights it holds.
    """
    best = best_checkpoint(folder)
    if best is not None and best != folder and has_manifest(best):
        check_manifest(best)
    if has_manifest(folder):
        facts = check_manifest(folder)
        _check_state(folder)
        return facts
    _check_weights(folder)
    return {}


def best_checkpoint(folder: Path) -> Path | None:
    """
    The best checkpoint so far, by the state in a checkpoint. Beside it: the run directory may have been moved since.

    Raises:
        CheckpointFileError: the state cannot be read.
    """
    state = read_json_object(folder / TRAINER_STATE_NAME, CheckpointFileError, max_bytes=2**30, allow_nan=True)
    best = state.get("best_model_checkpoint")
    return folder.parent / Path(best).name if isinstance(best, str) else None


def delete_checkpoint(folder: Path) -> None:
    """
    Delete a checkpoint, first its manifest: what is left if that is interrupted counts as partial.

    What somebody has added to it moves to `kept-checkpoint-N`.
    """
    with contextlib.suppress(DamagedCheckpointError):
        if added := added_files(folder):
            kept = _free_name(folder, "kept")
            for name in added:
                (kept / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).rename(kept / name)
    (folder / MANIFEST_NAME).unlink(missing_ok=True)
    write_through(folder)
    shutil.rmtree(folder)


def delete_older_checkpoints(output_dir: str | os.PathLike, limit: int | None, best: str | None) -> None:
    """Keep the newest checkpoint, the best one, and as many others as `limit` leaves room for."""
    found = checkpoints(output_dir)
    protected = {path.name for path in found[-1:]} | ({Path(best).name} if best else set())
    if limit is None or limit <= 0:
        return
    too_many = max(len(found) - max(limit, len(protected)), 0)
    for folder in [path for path in found if path.name not in protected][:too_many]:
        delete_checkpoint(folder)


def set_aside(folder: Path) -> Path:
    """Rename a damaged checkpoint, so that the Trainer does not write into it. Returns the new path."""
    return folder.rename(_free_name(folder, "damaged"))


def _free_name(folder: Path, prefix: str) -> Path:
    for number in range(1, 10_000):
        free = folder.with_name(f"{prefix}-{folder.name}" + (f"-{number}" if number > 1 else ""))
        if not os.path.lexists(free):
            return free
    raise FileExistsError(f"{folder.parent} holds too many {prefix} checkpoints; remove some")


def checkpoints(output_dir: str | os.PathLike) -> list[Path]:
    """
    Folders `checkpoint-N`, by number.

    Raises:
        ValueError: one of that name is not a folder, or a link, which the Trainer would write to or delete.
    """
    pattern = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(0|[1-9][0-9]*)")
    found = [(pattern.fullmatch(path.name), path) for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")]
    folders = [path for _, path in sorted((int(match[1]), path) for match, path in found if match)]
    for path in folders:
        if path.is_symlink() or not path.is_dir():
            raise ValueError(f"{path} is {'a link' if path.is_symlink() else 'not a folder'}; move it elsewhere")
    return folders


def on_first_rank(work: Callable[[], T]) -> T:
    """Do `work` on rank 0; return what it returns, or raise what it raises, on all ranks: a collective."""
    if not (dist.is_available() and dist.is_initialized()):
        return work()
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = work()
        except Exception as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def _is_whole(folder: Path) -> bool:
    """Whether a checkpoint without a manifest is. The Trainer writes the state last."""
    try:
        read_json_object(folder / TRAINER_STATE_NAME, max_bytes=2**30, allow_nan=True)
        _check_weights(folder)
    except CheckpointFileError:
        return False
    except CheckpointError:
        raise  # whole, and ambiguous: going on from an older one would be a guess
    except (OSError, ValueError):
        return False
    weights = list(folder.glob("*.safetensors"))
    if any(folder.glob(".saving-*")) or not (is_whole(folder) if is_sharded(folder) else weights):
        return False
    pickles = [file for pattern in _STATE for file in folder.glob(pattern) if file.is_file()]
    return (
        all(_is_safetensors(file) for file in weights)
        and all(zipfile.is_zipfile(file) for file in pickles)
        and _missing_state(folder) is None
    )


def _missing_state(folder: Path) -> str | None:
    """What a checkpoint lacks of the state besides the weights. The Trainer then begins that anew, without a word."""
    return next((name for pattern, name in _STATE.items() if not any(folder.glob(pattern))), None)


def _check_state(folder: Path) -> None:
    if (missing := _missing_state(folder)) is not None:
        raise CheckpointError(
            f"{folder} holds no state of the {missing} (save_only_model?), so no training goes on from it exactly; give a "
            "new output_dir"
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
