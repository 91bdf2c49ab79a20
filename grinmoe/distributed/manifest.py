"""The manifest of a Trainer's checkpoint: the size and SHA-256 of every file, written last.

The Trainer writes a checkpoint file by file under its final name, and checks nothing when it resumes. A checkpoint that has
a manifest was written to its end, and its files were on the disk before the manifest was.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ..checkpoint_grinmoe import CheckpointError, write_through
from ..configuration_grinmoe import read_json_object
from ..files import atomic_write_text

MANIFEST_NAME = "manifest.json"
_FORMAT = 1
# Reading and hashing one file takes one core; sharded checkpoints have a file for each rank.
_THREADS = 8
# Ends of names that the Trainer, PEFT or torch would look for in a checkpoint.
_MAY_BE_READ = (".safetensors", ".bin", ".pt", ".pth", ".distcp", ".index.json", "config.json")


class DamagedCheckpointError(CheckpointError):
    """A checkpoint does not match its manifest."""


def write_manifest(checkpoint: str | os.PathLike, **facts: Any) -> None:
    """
    Write the manifest of a checkpoint, when all ranks have written their files. The files go to the disk first.

    Args:
        checkpoint: the Trainer's folder (`checkpoint-200`).
        facts: what `check_manifest` shall return besides the step; JSON types.

    Raises:
        DiskFullError: the disk is full.
    """
    folder = Path(checkpoint)
    files = {name: path for name, path in _entries(folder).items() if path.is_file() and not path.is_symlink()}
    with ThreadPoolExecutor(_THREADS) as pool:
        found = dict(zip(files, pool.map(_written, files.values()), strict=True))
    write_through(*(path for path in folder.rglob("*") if path.is_dir() and not path.is_symlink()), folder)
    content = {"format": _FORMAT, "step": _step(folder), **facts, "files": found}
    atomic_write_text(folder / MANIFEST_NAME, json.dumps(content, indent=1) + "\n")
    write_through(folder, folder.parent)


def has_manifest(checkpoint: str | os.PathLike) -> bool:
    """Whether a checkpoint was written to its end."""
    return os.path.lexists(Path(checkpoint, MANIFEST_NAME))


def read_manifest(checkpoint: str | os.PathLike) -> dict[str, Any]:
    """
    What the manifest says, without a look at the files.

    Raises:
        DamagedCheckpointError: it cannot be read, or is of another step than the folder's name says.
    """
    folder = Path(checkpoint)
    content = read_json_object(
        folder / MANIFEST_NAME, DamagedCheckpointError, f"take another checkpoint than {folder.name}", 2**28
    )
    files = content.get("files")
    if content.get("format") != _FORMAT or not isinstance(files, dict) or not files:
        raise DamagedCheckpointError(f"{folder / MANIFEST_NAME} is not a manifest; take another checkpoint")
    if content.get("step") != _step(folder):
        raise DamagedCheckpointError(
            f"{folder} is a checkpoint of step {content.get('step')!r} by its manifest; name it so, or take another"
        )
    return content


def check_manifest(checkpoint: str | os.PathLike) -> dict[str, Any]:
    """
    Compare every file of a checkpoint with its manifest. Reads all of them.

    Returns:
        The facts that `write_manifest` was given, `step`, `files` and `format`.

    Raises:
        DamagedCheckpointError: a file is missing, or has another size or content.
        CheckpointError: there is a file that the manifest does not have, and that could be read in place of one that it
            has: in a subfolder, or with the end of such a name. Notes and pictures do not count, nor hidden files.
        OSError: a file cannot be read.
    """
    folder = Path(checkpoint)
    content = read_manifest(folder)
    expected, found = content["files"], _entries(folder)
    for name, facts in expected.items():
        if name not in found:
            raise DamagedCheckpointError(f"{folder} lacks {name}, which its manifest has; take another checkpoint")
        status = found[name].lstat()
        if not stat.S_ISREG(status.st_mode):
            raise DamagedCheckpointError(f"{found[name]} is not the file that was written; take another checkpoint")
        if not isinstance(facts, dict) or status.st_size != facts.get("bytes"):
            raise DamagedCheckpointError(
                f"{found[name]} has {status.st_size} bytes, and not the number in the checkpoint's manifest; take another "
                "checkpoint"
            )
    # The Trainer takes files by their names: another set of weights, or the random state of a rank.
    unknown = [name for name in _added(found, expected) if "/" in name or name.endswith(_MAY_BE_READ)]
    if unknown:
        raise CheckpointError(f"{folder} holds {unknown[0]}, which its manifest does not have; move it elsewhere")
    with ThreadPoolExecutor(_THREADS) as pool:
        digests = pool.map(_sha256, (found[name] for name in expected))
        for (name, facts), digest in zip(expected.items(), digests, strict=True):
            if digest != facts.get("sha256"):
                raise DamagedCheckpointError(
                    f"{found[name]} has another SHA-256 than in the checkpoint's manifest: it was altered or is damaged; "
                    "take another checkpoint"
                )
    return content


def added_files(checkpoint: str | os.PathLike) -> list[str]:
    """
    Files that the manifest does not have, by their paths in the checkpoint; hidden ones beside it do not count.

    Raises:
        DamagedCheckpointError: as `read_manifest`.
    """
    return _added(_entries(Path(checkpoint)), read_manifest(checkpoint)["files"])


def _added(found: dict[str, Path], expected: dict[str, Any]) -> list[str]:
    return [name for name in found if name not in expected and not name.startswith(".")]


def size_in_bytes(checkpoint: str | os.PathLike) -> int:
    """Of all files of a checkpoint."""
    return sum(path.lstat().st_size for path in _entries(Path(checkpoint)).values())


def _entries(folder: Path) -> dict[str, Path]:
    """All that is in a folder but folders and the manifest, by path relative to it; links are not followed."""
    found = {}
    for root, folders, files in os.walk(folder):
        for name in [*files, *(name for name in folders if Path(root, name).is_symlink())]:
            path = Path(root, name)
            found[path.relative_to(folder).as_posix()] = path
    found.pop(MANIFEST_NAME, None)
    return dict(sorted(found.items()))


def _step(folder: Path) -> int | None:
    number = folder.name.rpartition("-")[2]
    return int(number) if number.isdecimal() else None


def _written(file: Path) -> dict[str, Any]:
    write_through(file)
    return {"bytes": file.stat().st_size, "sha256": _sha256(file)}


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
