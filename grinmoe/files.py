"""Files and machines: atomic writes, permissions, dtypes by name, how a model is named, and the memory there is."""

from __future__ import annotations

import os
from pathlib import Path

# What `--dtype` may be: "auto" is the checkpoint's own.
DTYPES = ("auto", "bfloat16", "float16", "float32")


def atomic_write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file so that an interruption leaves the old content or the new one, never a part of it."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def default_mode(is_folder: bool = False) -> int:
    """Permissions of a new file or folder under this process's umask. `tempfile` and safetensors create private ones."""
    mask = os.umask(0)
    os.umask(mask)
    return (0o777 if is_folder else 0o666) & ~mask


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
