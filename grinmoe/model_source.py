"""What a user names as a model: a folder on this machine, or a repository of the Hub."""

from __future__ import annotations

from pathlib import Path


def folder_or_repository(source: str, name: str) -> str:
    """
    `source` as it is to be loaded. What can only be meant as a folder is not looked for on the Hub, with its waits.

    Args:
        source: as the user wrote it.
        name: of the option, for messages.

    Raises:
        ValueError: it is empty.
        FileNotFoundError: it is meant as a folder, and there is none.
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


__all__ = ["folder_or_repository"]
