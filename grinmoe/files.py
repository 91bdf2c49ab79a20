"""Files and machines: atomic writes, permissions, how commands name models, folders, dtypes and devices, and memory.

This file imports the standard library alone: the command line reads it, and importing `grinmoe` takes seconds.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated

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


class DiskFullError(OSError):
    """A disk has no room left for what was to be written."""


@contextlib.contextmanager
def telling_disk_full(folder: str | os.PathLike) -> Iterator[None]:
    """
    Raise an OSError that names the reason where the body fails because nothing can be written.

    Args:
        folder: where the body writes; it need not exist.

    Raises:
        DiskFullError: a disk or a quota is full.
        OSError: it failed for another reason that the system gives: the disk became read-only or is broken, or a file
            would be larger than it may be.
    """
    try:
        yield
    except DiskFullError:
        raise
    except Exception as error:
        place = next(path for path in (Path(folder).absolute(), *Path(folder).absolute().parents) if path.exists())
        number = _reason_of(error, place)
        if number is None:
            raise
        if number in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(place).free / 1e6
            raise DiskFullError(
                f"the disk is full: writing to {folder} failed ({error}), and {free:,.1f} MB are free there; free some "
                "space or choose a folder on another disk, then run the same command again"
            ) from error
        remedy = "choose a folder on another disk"
        if number == errno.EFBIG:
            remedy = "raise the limit of file sizes (ulimit -f), or " + remedy
        raise OSError(
            number, f"{os.strerror(number)}: writing to {folder} failed; {remedy}, then run the same command again"
        ) from error


def _reason_of(error: BaseException | None, place: Path) -> int | None:
    """Number of the system's error for which nothing could be written; None if that is not the reason."""
    known = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        if isinstance(error, OSError) and error.errno in known:
            return error.errno
        # safetensors has the number in its text alone, and torch's writer of pickles has none.
        if (match := re.search(r"os error (\d+)\b", str(error))) and int(match[1]) in known:
            return int(match[1])
        if isinstance(error, RuntimeError) and re.search(
            "PytorchStreamWriter failed writing|unexpected pos", str(error)
        ):
            return _tried(place)
        error = error.__cause__ or error.__context__
    return None


def _tried(place: Path) -> int:
    """Why nothing can be written to a folder where that has just failed. A disk that has room again was full."""
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            if (limit := _largest_file()) is not None:
                file.seek(limit)  # the byte after it is refused
            file.write(b"0")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.errno or errno.EIO
    return errno.ENOSPC


def _largest_file() -> int | None:
    """How large a file of this process may be, in bytes; None for any size."""
    import resource  # not on Windows

    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    return None if limit == resource.RLIM_INFINITY else limit


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """
    Yield a path beside `path` to write to; at the end it is renamed, so that `path` never holds a part of a file.

    The temporary name is random and hidden, with the suffix of `path`. A link at `path` is replaced and not followed. The
    content is on the disk before the rename. If the body raises, nothing is left.

    Raises:
        ValueError: `path` exists and is not a file (a folder, FIFO, socket or device).
        DiskFullError: the disk is full.
    """
    if os.path.lexists(path) and not (path.is_symlink() or path.is_file()):
        raise ValueError(f"{path} is {kind_of(path)} and cannot be replaced by a file; give another name")
    with telling_disk_full(path.parent):
        descriptor, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
        os.close(descriptor)
        partial = Path(name)
        try:
            yield partial
            partial.chmod(default_mode())  # mkstemp makes it private
            with partial.open("rb+") as file:
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def atomic_write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file by `atomic_file`."""
    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def kind_of(path: Path) -> str:
    """What a path leads to, for messages: "a folder", "a FIFO", ..."""
    mode = path.stat().st_mode
    kinds = {
        stat.S_ISREG: "a file",
        stat.S_ISDIR: "a folder",
        stat.S_ISFIFO: "a FIFO",
        stat.S_ISSOCK: "a socket",
    }
    return next((kind for is_kind, kind in kinds.items() if is_kind(mode)), "a device")


def left_by_atomic_file(path: Path, name: str) -> bool:
    """Whether a file is what a killed process of this user has left of `atomic_file` for a file of that name."""
    stem, suffix = os.path.splitext(name)
    if not re.fullmatch(rf"\.{re.escape(stem)}-[a-z0-9_]{{8}}{re.escape(suffix)}", path.name):
        return False
    status = path.lstat()
    return stat.S_ISREG(status.st_mode) and (not hasattr(os, "geteuid") or status.st_uid == os.geteuid())


def copy_files(names: Iterable[str], source: Path, target: Path) -> None:
    """
    Copy from one folder to another, of the files named, those that are there.

    Raises:
        ValueError: one of them is a link that leads out of `source`: in a stranger's checkpoint it could lead to a key.
    """
    for name in names:
        if (source / name).is_file():
            if leads_out(source / name, source):
                raise ValueError(
                    f"{source / name} is a link to {(source / name).resolve()}, which is not in its folder; put the file "
                    "itself there"
                )
            shutil.copyfile(source / name, target / name)


def leads_out(file: Path, folder: Path) -> bool:
    """
    Whether a file of a folder is in truth outside of it, because of a link.

    A snapshot in the Hub's cache consists of links to the cache's `blobs` of the same repository, which count as inside.
    """
    inside = [folder.resolve()]
    # Elsewhere a folder named snapshots says nothing about one named blobs.
    inside += [
        place.parent / "blobs"
        for place in inside[0].parents
        if place.name == "snapshots" and place.parent.name.startswith("models--")
    ]
    return not any(file.resolve().is_relative_to(place) for place in inside)


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
