"""Folders that commands write: checked before any work, made in a private place, put in place when they are whole."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from .checkpoint_grinmoe import WORKSPACE, Workspace, write_through
from .files import default_mode, kind_of, telling_disk_full


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
    if target == Path.cwd() or target.is_mount():
        raise ValueError(
            f"{option} {target} is the current folder or a mount point, which stays; give a new folder inside of it"
        )


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
        is_kept = kept_for is not None
        try:
            yield workspace.new
            is_kept = False
            workspace.new.chmod(default_mode(is_folder=True))
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
            if is_kept and any(workspace.new.iterdir()):
                workspace.close()
            else:
                workspace.remove()


def _entries(folder: Path) -> list[tuple[str, int, int]] | None:
    """What a folder holds, so that a change shows; None where nothing is there."""
    if not os.path.lexists(folder):
        return None
    with os.scandir(folder) as found:
        each = [(entry.name, entry.inode(), entry.stat(follow_symlinks=False).st_mtime_ns) for entry in found]
    return sorted(each)
