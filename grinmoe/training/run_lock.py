"""A lock on a run directory, so that one start at a time writes into it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
import weakref
from collections.abc import Iterator
from pathlib import Path

LOCK_NAME = "run.lock"
_SAYS = "locked by process "
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


class _Held:
    """An open lock file. Processes that are forked from this one close it, or the lock would outlive this process."""

    def __init__(self, descriptor: int):
        self.descriptor: int | None = descriptor

    def close(self) -> None:
        if self.descriptor is not None:
            os.close(self.descriptor)
        self.descriptor = None


_held: weakref.WeakSet[_Held] = weakref.WeakSet()


def _close_in_child() -> None:
    for held in list(_held):
        held.close()


os.register_at_fork(after_in_child=_close_in_child)


@contextlib.contextmanager
def locked_run(folder: Path, keep_if: str) -> Iterator[str | None]:
    """
    Make a run directory if it is not there, and lock it while the body runs.

    The system frees the lock when the process ends, however it does. If the body leaves no file `keep_if` behind, what was
    made here goes again: the lock file, the folder and those above it.

    Args:
        folder: the run directory, an absolute path.
        keep_if: name of a file.

    Yields:
        None, or why the folder could not be locked: its file system has no locks.

    Raises:
        ValueError: the folder is locked by another process, cannot be written, or something else has the lock's name.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    file = folder / LOCK_NAME
    held = None
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            held, note = _lock(file)
        except OSError as error:
            raise ValueError(
                f"output_dir={folder} cannot be written ({error.strerror}); give another folder"
            ) from error
        try:
            yield note
        finally:
            if not os.path.lexists(folder / keep_if):
                # While the lock is held: who waits for it notices that the file is another one by now.
                file.unlink(missing_ok=True)
    finally:
        if held is not None:
            held.close()
        if not os.path.lexists(folder / keep_if):
            for path in made:
                with contextlib.suppress(OSError):  # something is in it
                    path.rmdir()


def _lock(file: Path) -> tuple[_Held, str | None]:
    while True:
        try:
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
        except OSError as error:
            if error.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
                raise
            raise ValueError(f"{file} is a link, or not a file; remove it, or give another output_dir") from None
        held = _Held(descriptor)
        _held.add(held)
        try:
            status = os.fstat(descriptor)
            is_file = stat.S_ISREG(status.st_mode)
            text = os.pread(descriptor, 200, 0).decode(errors="replace").strip() if is_file else ""
            if not is_file or (text and not text.startswith(_SAYS)):
                raise ValueError(f"{file} is not a lock file of this command; remove it, or give another output_dir")
            note = None
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(
                    f"output_dir={file.parent} is in use by another run ({text or 'just started'}); wait until it has "
                    "ended, or give another output_dir"
                ) from None
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                note = f"{file.parent} cannot be locked ({error.strerror}): do not start a second run in it"
            if status.st_nlink > 1:
                file.unlink()  # a copy of the folder by hard links shares it
            elif _is_still(file, descriptor):
                with contextlib.suppress(OSError):  # a full disk, which whatever comes next tells; the lock is held
                    os.truncate(descriptor, 0)
                    os.pwrite(descriptor, f"{_SAYS}{os.getpid()} on {socket.gethostname()}\n".encode(), 0)
                return held, note
            held.close()  # or the start that held it was refused and has removed it
        except BaseException:
            held.close()
            raise


def _is_still(file: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.lstat(file), os.fstat(descriptor))
    except FileNotFoundError:
        return False
