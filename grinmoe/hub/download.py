"""`grinmoe pull`: a whole checkpoint from the Hub into a folder, checked, or nothing."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import threading
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import tqdm
from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn
from safetensors import SafetensorError, safe_open
from transformers.utils import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_SAFE_WEIGHTS_NAME,
    CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
)

from ..checkpoint_grinmoe import CheckpointError, check_weights, read_index, read_tensors
from ..configuration_grinmoe import GrinMoeConfig
from ..outputs import check_output, check_replaceable, folder_when_whole
from ..tokenization import TokenizerError, load_tokenizer
from .contents import runs_code
from .errors import WAIT_S, HubError, check_repo, first_line, printable, said_clearly
from .options import PullOptions
from .remote_files import Remote, RemoteFile, read_list

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

# Of a config.json of others: Transformers takes it apart without looking at its types.
_UNREADABLE = (OSError, AttributeError, TypeError, LookupError, ArithmeticError, RecursionError)
_CLIENT_STATE = ".cache"  # what the client keeps in a folder that it downloads to
_AT_ONCE = 8
_SHOWN_NAMES = 8
_SHOWN_BAR_BYTES = 10**9  # hashing less takes a moment


def pull(repo: str, output: str | os.PathLike, revision: str | None = None) -> Path:
    """
    Download a checkpoint or an adapter, whole and checked.

    Every file is compared with the size and the hash that the Hub announces before the folder appears.

    Args:
        repo: id on the Hub.
        output: new or empty folder. It appears when everything is there; what an interrupted pull has downloaded is kept
            beside it, in a private hidden folder, and the next one goes on with it.
        revision: branch, tag or commit. None: main.

    Returns:
        The folder.

    Raises:
        HubError: no such repository or revision, no access, the Hub cannot be reached, its answer makes no sense, or files
            are not those that it announces.
        CheckpointError: the repository's weights are incomplete, or not those of its config.
        ValueError: `output` is not empty, the repository holds no model of this architecture, names that lead elsewhere, or
            files that can run code under other names.
        DiskFullError: the disk is full.
        FileExistsError: something else has appeared at `output` meanwhile.
    """
    check_repo(repo)
    target = check_output(os.path.expanduser(output))
    check_replaceable(target)
    console = Console(highlight=False, soft_wrap=True, markup=False)
    remote = _find(repo, revision)
    # Whatever an interrupted pull of any repository has left is of use: files are told by their hashes.
    with folder_when_whole(target, kept_for="pull") as folder, _alone(folder, target):
        present = _prepare(remote, folder)
        _fetch(remote, folder, remote.files.keys() - present)
        _check_pulled(remote, folder, console)
        _remove(folder / _CLIENT_STATE)
    _tell_left_out(remote, console)
    console.print(f"{repo} at {remote.commit} is in {printable(os.fspath(output))}")
    return target


def run_pull(options: PullOptions) -> None:
    """`grinmoe pull`."""
    pull(options.repo, options.output, options.revision)


def _find(repo: str, revision: str | None) -> Remote:
    """The commit and its files, if they make a checkpoint."""
    with said_clearly(repo, "pull"):
        try:
            info = HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=WAIT_S)
        except HFValidationError:
            raise
        except ValueError as error:
            raise HubError(
                f"what answered is not the Hub ({first_line(error)}); check HF_ENDPOINT, the proxy, the network"
            ) from error
    remote, where = read_list(repo, info), f"{repo} at {revision or 'main'}"
    if not {CONFIG_NAME, ADAPTER_CONFIG_NAME} & remote.files.keys():
        raise ValueError(f"{where} holds neither {CONFIG_NAME} nor {ADAPTER_CONFIG_NAME}; give the id of a model")
    if not {SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, ADAPTER_SAFE_WEIGHTS_NAME} & remote.files.keys():
        remedy = (
            f"its weights are pickles ({remote.pickles[0]}), which can run code when they are loaded and are refused; ask "
            "its owner for safetensors"
            if remote.pickles
            else "give the id of a repository with weights"
        )
        raise ValueError(f"{where} holds no {SAFE_WEIGHTS_NAME} or {SAFE_WEIGHTS_INDEX_NAME}: {remedy}")
    return remote


@contextlib.contextmanager
def _alone(folder: Path, target: Path) -> Iterator[None]:
    """
    Hold a lock on the workspace's folder. It ends with the process, however that ends, and leaves no file.

    Raises:
        HubError: another pull into `target` holds such a lock. Both would download everything.
    """
    own = os.open(folder, os.O_RDONLY)
    try:
        if fcntl is not None:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(own, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for workspace in folder.parents[1].iterdir():
                if workspace.name.startswith(f".{target.name}-") and workspace != folder.parent:
                    _refuse_locked(workspace / folder.name, target)
        yield
    finally:
        os.close(own)


def _refuse_locked(folder: Path, target: Path) -> None:
    try:
        other = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY)
    except OSError:  # another user's, or not a workspace
        return
    try:
        if os.fstat(other).st_uid == os.geteuid():
            fcntl.flock(other, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise HubError(f"another pull into {target} is running; wait for it, or choose another --output") from error
    finally:
        os.close(other)


def _tell_left_out(remote: Remote, console: Console) -> None:
    for names, reason in (
        (remote.pickles, "because a pickle can run code"),
        (remote.others, "because a checkpoint does not need them and other programs could act on them"),
    ):
        if names:
            more = f" and {len(names) - _SHOWN_NAMES} more" if len(names) > _SHOWN_NAMES else ""
            console.print(f"left out, {reason}: {printable(', '.join(names[:_SHOWN_NAMES]))}{more}")


# --- fetching ----------------------------------------------------------------------------------------------------------


def _prepare(remote: Remote, folder: Path) -> set[str]:
    """
    Fetch what tells whether the rest is worth fetching, and see that it fits. Nothing is left behind if not.

    Returns:
        Names of the files that are there, and are the right ones.
    """
    is_new = not any(folder.iterdir())
    first = {CONFIG_NAME, ADAPTER_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME} & remote.files.keys()
    # The client takes a file for complete by what it has noted here.
    _remove(folder / _CLIENT_STATE)
    try:
        _fetch(remote, folder, first - _intact(remote, folder, first))
        _check_plan(remote, folder)
        _check_space(remote, folder)
    except (ValueError, OSError):
        if is_new:
            for path in folder.iterdir():
                _remove(path)
        raise
    _remove_others(remote, folder)
    return first | _intact(remote, folder, remote.files.keys() - first)


def _remove_others(remote: Remote, folder: Path) -> None:
    """Remove what an interrupted pull left of other commits; and links, FIFOs and the like, without following them."""
    for place, folders, files in os.walk(folder, topdown=False):
        for path in (Path(place, name) for name in files):
            status = path.lstat()
            is_file = stat.S_ISREG(status.st_mode) and status.st_nlink == 1
            if not is_file or path.relative_to(folder).as_posix() not in remote.files:
                path.unlink()
        for path in (Path(place, name) for name in folders):
            if path.is_symlink() or not any(path.iterdir()):
                _remove(path)


def _intact(remote: Remote, folder: Path, names: Collection[str]) -> set[str]:
    """Names of the files that have arrived whole. Whatever else is in their places is removed."""
    there = {name for name in names if os.path.lexists(folder / name)}
    files = {name for name in there if (folder / name).is_file() and not (folder / name).is_symlink()}
    files -= {*_differing(remote, folder, files)}
    for name in there - files:
        _remove(folder / name)
    return files


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _differing(remote: Remote, folder: Path, names: Collection[str]) -> list[str]:
    """Names of the files that are not those of the repository, by size and hash. Each is read once."""
    total = sum((folder / name).stat().st_size for name in names)
    columns = ("checking what has arrived", BarColumn(), DownloadColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=total < _SHOWN_BAR_BYTES) as progress:
        task = progress.add_task("", total=total)
        return [
            name
            for name in sorted(names)
            if remote.files[name].differs(folder / name, lambda count: progress.advance(task, count))
        ]


def _check_space(remote: Remote, folder: Path) -> None:
    # Of this model; or of another, which will be removed.
    present = sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    needed, free = remote.size - present, shutil.disk_usage(folder).free
    if needed > free:
        raise HubError(
            f"{decimal(needed)} are to be fetched, {folder.parents[1]} has {decimal(free)} free; choose --output on another "
            "disk, or free space"
        )


def _fetch(remote: Remote, folder: Path, names: Collection[str]) -> None:
    """
    Download files and compare them with what the Hub announces.

    Raises:
        HubError: it was interrupted, or a file is not the one that was announced; what has arrived stays for the next time.
    """
    _download(remote, folder, names)
    differing = _differing(remote, folder, names)
    # The client takes a file from its cache without looking into it. That copy can be damaged, and the next run would take
    # it again.
    cached = [n for n in differing if isinstance(try_to_load_from_cache(remote.repo, n, revision=remote.commit), str)]
    if cached:
        _download(remote, folder, cached, force_download=True)
        differing = sorted({*differing} - {*cached} | {*_differing(remote, folder, cached)})
    for name in differing:
        (folder / name).unlink()
    if differing:
        raise HubError(
            f"{len(differing)} files of {remote.repo} did not arrive as the Hub announces them, and are removed "
            f"({', '.join(differing[:_SHOWN_NAMES])}): their size or hash differs; run the same command again: what has "
            "arrived whole is not fetched again"
        )


def _download(remote: Remote, folder: Path, names: Collection[str], **options: Any) -> None:
    """Download files, several at once. After an error those that have begun are completed."""
    is_stopped = threading.Event()

    class Bar(tqdm):
        """A line for each file while it arrives. It ends the download when the user interrupts the command."""

        file: RemoteFile

        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **{**kwargs, "desc": printable(str(kwargs.get("desc"))), "leave": False})
            self.arrived = 0

        def update(self, n: float | None = 1) -> bool | None:
            if is_stopped.is_set():
                raise InterruptedError("interrupted")
            self.arrived += int(n or 0)
            if self.arrived > self.file.size:
                raise HubError(
                    f"{self.file.name} of {remote.repo} is larger than the {self.file.size} bytes that the Hub announces; "
                    "run the same command again"
                )
            return super().update(n)

    def download(name: str) -> None:
        bar = type("Bar", (Bar,), {"file": remote.files[name]})
        hf_hub_download(remote.repo, name, revision=remote.commit, local_dir=folder, tqdm_class=bar, **options)

    with said_clearly(remote.repo, "pull"), ThreadPoolExecutor(_AT_ONCE) as executor:
        futures = [executor.submit(download, name) for name in sorted(names)]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException as error:
            if not isinstance(error, Exception):
                is_stopped.set()
            for future in futures:
                future.cancel()
            raise
    # When the Hub cannot be reached the client takes a folder as it is, with no more than a warning.
    if absent := [name for name in sorted(names) if not (folder / name).is_file()]:
        raise HubError(
            f"{len(absent)} files of {remote.repo} did not arrive ({absent[0]}); run the same command again: what has "
            "arrived is not fetched again"
        )


# --- checks ------------------------------------------------------------------------------------------------------------


def _check_plan(remote: Remote, folder: Path) -> None:
    """The config and the list of shards, before what is large."""
    if CONFIG_NAME in remote.files and ADAPTER_CONFIG_NAME not in remote.files:
        try:
            GrinMoeConfig.from_pretrained(folder)
        except _UNREADABLE as error:
            raise CheckpointError(
                f"{CONFIG_NAME} of {remote.repo} cannot be read; tell its owner, or give another --revision"
            ) from error
    if SAFE_WEIGHTS_INDEX_NAME not in remote.files:
        return
    try:
        shards = set(read_index(folder / SAFE_WEIGHTS_INDEX_NAME).values())
    except CheckpointError as error:
        raise CheckpointError(
            f"{SAFE_WEIGHTS_INDEX_NAME} of {remote.repo} is not a safetensors index ({error}); tell its owner, or give "
            "another --revision"
        ) from error
    if SAFE_WEIGHTS_NAME in remote.files and shards != {SAFE_WEIGHTS_NAME}:
        raise CheckpointError(
            f"{remote.repo} holds two sets of weights ({SAFE_WEIGHTS_NAME} and {SAFE_WEIGHTS_INDEX_NAME}); tell its owner, "
            "or give another --revision"
        )
    if absent := sorted(shards - remote.files.keys()):
        raise CheckpointError(
            f"{remote.repo} lacks {len(absent)} shards that its index names ({absent[0]}); tell its owner, or give another "
            "--revision"
        )


def _check_pulled(remote: Remote, folder: Path, console: Console) -> None:
    for name in sorted(remote.files):
        if kind := runs_code(folder / name):
            (folder / name).unlink()
            raise ValueError(
                f"{remote.repo} holds {name}, which is {kind} and can run code; do not use this repository, or tell its "
                "owner"
            )
    try:
        if ADAPTER_SAFE_WEIGHTS_NAME in remote.files:
            _check_opens(folder / ADAPTER_SAFE_WEIGHTS_NAME)
        if CONFIG_NAME in remote.files and (tensors := read_tensors(folder)) is not None:
            config = GrinMoeConfig.from_pretrained(folder)
            check_weights(tensors, config, remote.repo, head_keys=("score.",))
    except CheckpointError as error:
        raise _blamed(error, remote, folder) from error
    if (folder / "tokenizer.json").is_file():
        try:
            load_tokenizer(folder)
        except TokenizerError as error:
            console.print(f"note: {printable(str(error))}")


def _check_opens(file: Path) -> None:
    try:
        with safe_open(file, framework="pt"):
            pass
    except SafetensorError as error:
        raise CheckpointError(f"{file} is truncated or not safetensors ({error})") from error


def _blamed(error: CheckpointError, remote: Remote, folder: Path) -> CheckpointError:
    """Say that the repository is at fault: all files are those that the Hub announces."""
    said = str(error).replace(f"{folder}{os.sep}", "").replace(str(folder), remote.repo)
    return CheckpointError(
        f"what {remote.repo} holds at {remote.commit[:12]} is broken, the download is not: {said}. Tell its owner, or give "
        "another --revision; what has been fetched is kept for it"
    )
