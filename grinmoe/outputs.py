"""Folders that commands write: checked before any work, made in a private place, put in place when they are whole."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from .checkpoint_grinmoe import WORKSPACE, Workspace, replaced_when_whole, write_through
from .files import kind_of, telling_disk_full


def check_folder(output: str | os.PathLike, option: str = "--output") -> Path:
    """
    Check that a folder is at a path, or can be made there.

    Args:
        output: as the user wrote it.
        option: its name, for messages.

    Returns:
        The absolute path, without links.

    Raises:
        ValueError: the path is empty, is or lies in something that is not a folder, or is a link that leads nowhere.
    """
    if not os.fspath(output):
        raise ValueError(f"{option} is empty; give a folder")
    given = Path(output)
    for path in (given, *given.parents):
        if path.is_symlink() and not path.exists():
            raise ValueError(f"{option} {output}: {path} is a link that leads nowhere; give a new folder")
        if path.exists() and not path.is_dir():
            inside = "" if path == given else f"lies in {path}, which "
            raise ValueError(f"{option} {output} {inside}is {kind_of(path)}; give a new folder")
    return given.resolve()


def check_output(output: str | os.PathLike, option: str = "--output") -> Path:
    """
    Check that a folder is new or empty. Workspaces that killed commands have left in it do not count.

    Args, Returns, Raises: as `check_folder`; and ValueError where the folder holds something.
    """
    target = check_folder(output, option)
    if target.is_dir():
        left = []
        for workspace in Workspace.left_in(target, WORKSPACE):
            workspace.close()
            left.append(workspace.path)
        present = sorted(path.name for path in target.iterdir() if path not in left)
        if present:
            raise ValueError(f"{option} {output} is not empty (it holds {present[0]!r}); give a new folder")
    return target


def check_replaceable(target: Path, option: str = "--output") -> None:
    """Raise ValueError where `folder_when_whole` could not put another folder in the place of this one."""
    if reason := _reason_to_stay(target):
        raise ValueError(f"{option} {target} is {reason}, which stays; give a new folder inside of it")


def _reason_to_stay(target: Path) -> str | None:
    """Why a folder cannot be moved away, for messages; None for one that can, or is not there."""
    if target == Path.cwd() or target.is_mount():
        return "the current folder or a mount point"
    if not target.is_dir():
        return None
    folder = target.parent.stat()
    if not os.access(target.parent, os.W_OK | os.X_OK):
        return f"in {target.parent}, where you may not write,"
    user = os.geteuid() if os.name == "posix" else None
    if folder.st_mode & stat.S_ISVTX and user not in (None, 0, folder.st_uid, target.stat().st_uid):
        return "another user's in a folder with a sticky bit"
    return None


@contextlib.contextmanager
def checkpoint_when_whole(target: Path) -> Iterator[Path]:
    """
    `folder_when_whole`; and where that cannot be done (a volume that is mounted there, say), `replaced_when_whole`, which
    moves the files into the folder that is there.

    Args:
        target: a new or empty folder, an absolute path.
    """
    with (replaced_when_whole if _reason_to_stay(target) else folder_when_whole)(target) as staging:
        yield staging


@contextlib.contextmanager
def folder_when_whole(target: Path, kept_for: str | None = None) -> Iterator[Path]:
    """
    Make a folder that appears when it is complete.

    Yields an empty folder on the file system of `target`. When the body ends without an error, it takes the place of
    `target`, and a folder that was there is deleted. Otherwise `target` stays what it was.

    The yielded folder lies in a private workspace with a random hidden name beside `target`. A later call with the same
    target deletes the workspaces of processes that were killed; where one was killed between the two renames, it first
    puts the folder that was there back. No other files are deleted.

    Args:
        target: the folder, an absolute path.
        kept_for: what is written. If it is given, an interrupted or killed body leaves the workspace, unless it is empty,
            and the next call with the same target and the same words goes on in it.

    Raises:
        DiskFullError: the disk is full.
        FileExistsError: somebody else has put something at `target` since the call. It stays, and the error names the
            folder beside it that has the result.
        OSError: `target` cannot be replaced; it stays.
    """
    nearest = next(path for path in target.parents if path.exists())
    prefix, purpose = f".{target.name}-", kept_for or ""
    workspace = None
    for left in Workspace.left_in(nearest, prefix):
        if left.holds_replaced_files() and not target.exists():
            (left.previous / target.name).rename(target)
        is_whole = left.new.is_dir() and not left.new.is_symlink()
        if kept_for is not None and workspace is None and left.purpose == purpose and is_whole:
            workspace = left
        else:
            left.remove()
    before = _entries(target)
    with telling_disk_full(target.parent):
        workspace = workspace or Workspace.make(nearest, prefix, purpose)
        try:
            yield workspace.new
            written = [path for path in workspace.new.rglob("*") if not path.is_symlink()]
            write_through(*(path for path in written if path.is_file() or path.is_dir()), workspace.new)
            target.parent.mkdir(parents=True, exist_ok=True)
            if _entries(target) != before:
                aside = target.with_name(f"{target.name}{workspace.path.name.removeprefix(f'.{target.name}')}")
                workspace.new.rename(aside)
                raise FileExistsError(f"{target} has changed while its new content was made; that is in {aside} now")
            with contextlib.ExitStack() as undo:
                if target.exists():
                    previous = workspace.previous / target.name
                    target.rename(previous)
                    undo.callback(previous.rename, target)
                workspace.new.rename(target)
                undo.pop_all()
            write_through(target.parent)
        finally:
            # Also what is whole and could not be put in place.
            if kept_for is not None and workspace.new.is_dir() and any(workspace.new.iterdir()):
                workspace.close()
            else:
                workspace.remove()


def _entries(folder: Path) -> list[tuple[str, int, int]] | None:
    """What a folder holds, so that a change shows; what else is there by itself; None where nothing is."""
    if not os.path.lexists(folder):
        return None
    if not folder.is_dir():
        status = folder.lstat()
        return [("", status.st_ino, status.st_mtime_ns)]
    with os.scandir(folder) as found:
        each = [(entry.name, entry.inode(), entry.stat(follow_symlinks=False).st_mtime_ns) for entry in found]
    return sorted(each)
