"""Files and machines: atomic writes, JSON, permissions, how commands name models, folders, dtypes and devices, and memory.

This file imports the standard library alone: the command line reads it, and importing `grinmoe` takes seconds.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

# What `--dtype` may be: "auto" is the checkpoint's own.
DTYPES = ("auto", "bfloat16", "float16", "float32")

# Options that several commands share: type, help and metavar (see grinmoe_cli/flags.py).
Model = Annotated[str, "folder of a model or adapter, or a repository of the Hub", "DIR_OR_HUB_ID"]
Checkpoint = Annotated[str, "folder, or a repository of the Hub", "DIR_OR_HUB_ID"]
NewFolder = Annotated[str, "new or empty folder", "DIR"]
KeptFolder = Annotated[str, "new folder, or one to go on in", "DIR"]
Dtype = Annotated[str, "auto (the checkpoint's), bfloat16, float16, float32"]
Device = Annotated[
    str | None,
    "cpu, cuda, cuda:1, ...; auto spreads the layers over all accelerators (default: an accelerator if there is one)",
]
ShardSize = Annotated[int | str, "such as 500MB", "SIZE"]


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a path beside `path` to write to; at the end it is renamed, so that `path` never holds a part of a file."""
    partial = path.with_name(f"{path.stem}.partial{path.suffix}")
    yield partial
    partial.replace(path)


def atomic_write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file by `atomic_file`."""
    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def folder_when_whole(target: Path) -> Iterator[Path]:
    """
    Make a folder that appears when it is complete.

    Yields an empty folder with a hidden name on the file system of `target`. When the body ends without an error, it
    takes the place of `target`, and a folder that was there is deleted. Otherwise `target` stays what it was.
    """
    nearest = next(path for path in target.parents if path.exists())
    workspace = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=nearest))
    previous = workspace.with_name(f"{workspace.name}-previous")
    try:
        yield workspace
        workspace.chmod(default_mode(is_folder=True))  # mkdtemp makes it private
        target.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as undo:
            if target.exists():
                target.rename(previous)
                undo.callback(previous.rename, target)
            workspace.rename(target)
            undo.pop_all()
        shutil.rmtree(previous, ignore_errors=True)
    finally:
        shutil.rmtree(workspace, ignore_errors=True)


def read_json_object(
    file: Path, error_class: type[ValueError] = ValueError, remedy: str = "take the original file again"
) -> dict[str, Any]:
    """
    Read a JSON file that holds an object.

    Raises:
        error_class: the file is not UTF-8 or not JSON, or holds something else. The message ends with `remedy`.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise error_class(f"{file} cannot be read: it is not JSON ({error}); {remedy}") from error
    if not isinstance(content, dict):
        raise error_class(f"{file} cannot be read: it holds a {type(content).__name__}, not a JSON object; {remedy}")
    return content


def copy_files(names: Iterable[str], source: Path, target: Path) -> None:
    """Copy from one folder to another, of the files named, those that are there."""
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def default_mode(is_folder: bool = False) -> int:
    """Permissions of a new file or folder under this process's umask. `tempfile` and safetensors create private ones."""
    mask = os.umask(0)
    os.umask(mask)
    return (0o777 if is_folder else 0o666) & ~mask


def require_packages(extra: str, *modules: str) -> None:
    """Raise ImportError unless all `modules` are installed; the message names the extra of this package that has them."""
    if missing := [name for name in modules if importlib.util.find_spec(name) is None]:
        raise ImportError(f"not installed: {', '.join(missing)}; pip install 'grinmoe[{extra}]'")


def physical_memory_bytes() -> int:
    """Size of this machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check_dtype(dtype: str, choices: tuple[str, ...] = DTYPES) -> None:
    """Raise ValueError unless `dtype` is one of `choices`."""
    if dtype not in choices:
        raise ValueError(f"--dtype {dtype!r} is unknown; choose one of {', '.join(choices)}")


def folder_or_repository(source: str, name: str) -> str:
    """
    Resolve what a user names as a model: a folder on this machine or the id of a Hub repository.

    A source that can only be a folder is not looked up on the Hub, where a lookup has to wait for a time-out.

    Args:
        source: as the user wrote it.
        name: of the option, for messages.

    Raises:
        ValueError: `source` is empty.
        FileNotFoundError: `source` is a path, and no folder is there.
    """
    if not source:
        raise ValueError(f"{name} is empty; give a checkpoint's folder or the id of a Hub repository")
    folder = Path(source).expanduser()
    if folder.is_dir():
        return str(folder)
    meant_as_folder = source.startswith((".", "/", "~")) or source.count("/") > 1 or folder.is_file()
    if meant_as_folder or (len(folder.parts) > 1 and folder.parent.is_dir()):
        raise FileNotFoundError(
            f"{name}: there is no folder {source}; give a checkpoint's folder or the id of a Hub repository"
        )
    return source
