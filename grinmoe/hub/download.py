"""`grinmoe pull`: a whole checkpoint from the Hub into a folder, or nothing."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.hf_api import ModelInfo, RepoSibling
from huggingface_hub.utils.sha import git_hash
from rich.console import Console
from rich.filesize import decimal
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
from ..tokenization import TokenizerError, load_tokenizer
from .checks import PICKLE_SUFFIXES, sha256_of
from .errors import WAIT_S, HubError, check_repo, said_clearly
from .options import PullOptions

_CLIENT_STATE = ".cache"  # what the client keeps in a folder that it downloads to


@dataclass(frozen=True)
class _Remote:
    """What is to be fetched of a repository at a commit."""

    repo: str
    commit: str
    files: dict[str, RepoSibling]
    pickles: list[str]  # what is not fetched


def pull(repo: str, output: str | os.PathLike, revision: str | None = None) -> Path:
    """
    Download a checkpoint or an adapter, whole and checked.

    Args:
        repo: id on the Hub.
        output: new or empty folder. It appears when everything is there; what an interrupted pull has downloaded is kept
            beside it, hidden, and the next one goes on with it.
        revision: branch, tag or commit. None: main.

    Returns:
        The folder.

    Raises:
        HubError: no such repository or revision, no access, or the Hub cannot be reached.
        CheckpointError: the repository's weights are incomplete, or not those of its config.
        ValueError: `output` is not empty, or the repository holds no model of this architecture.
    """
    check_repo(repo)
    target = _checked_target(output)
    # Two pulls into one folder would take each other's files away. The lock ends with the process, however that ends.
    name = hashlib.sha256(str(target).encode()).hexdigest()[:16]
    try:
        with FileLock(Path(tempfile.gettempdir()) / f"grinmoe-pull-{name}.lock", timeout=0):
            return _pull(repo, target, output, revision)
    except Timeout as error:
        raise HubError(f"another pull into {output} is running; wait for it, or choose another --output") from error


def run_pull(options: PullOptions) -> None:
    """`grinmoe pull`."""
    pull(options.repo, options.output, options.revision)


def _pull(repo: str, target: Path, output: str | os.PathLike, revision: str | None) -> Path:
    console = Console(highlight=False, soft_wrap=True, markup=False)
    staging = target.parent / f".{target.name}.pulling"
    with said_clearly(repo, "pull"):
        info = HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=WAIT_S)
    remote = _what_to_fetch(repo, info, revision)
    _prepare(remote, staging)
    _fetch(remote, staging, list(remote.files))
    _check_pulled(remote, staging, console)
    shutil.rmtree(staging / _CLIENT_STATE, ignore_errors=True)
    if target.is_dir():
        target.rmdir()
    os.replace(staging, target)
    if remote.pickles:
        console.print(f"left out, because a pickle can run code: {', '.join(remote.pickles)}")
    console.print(f"{repo} at {remote.commit} is in {output}")
    return target


def _checked_target(output: str | os.PathLike) -> Path:
    """The folder to be made, an absolute path."""
    if not os.fspath(output):
        raise ValueError("--output is empty; give a new folder")
    target = Path(output).expanduser()
    if target.is_symlink() and not target.exists():
        raise ValueError(f"--output {output} is a link that leads nowhere; give a new folder")
    target = target.resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"--output {output} is not an empty folder; choose another one, or remove it")
    # The folder is replaced as a whole, which would pull these away from under somebody.
    if target.is_mount() or target == Path.cwd():
        raise ValueError(f"--output {output} is the current folder or a mount point; give a new folder inside of it")
    return target


def _what_to_fetch(repo: str, info: ModelInfo, revision: str | None) -> _Remote:
    files = {file.rfilename: file for file in info.siblings or []}
    pickles = sorted(name for name in files if name.lower().endswith(PICKLE_SUFFIXES))
    files = {name: file for name, file in files.items() if name not in pickles}
    where = f"{repo} at {revision or 'main'}"
    if not {CONFIG_NAME, ADAPTER_CONFIG_NAME} & files.keys():
        raise ValueError(f"{where} holds neither {CONFIG_NAME} nor {ADAPTER_CONFIG_NAME}; give the id of a model")
    if escaping := [name for name in files if Path(name).is_absolute() or ".." in Path(name).parts]:
        raise ValueError(f"{where} holds a file named {escaping[0]!r}, which leads out of its folder; do not use it")
    if not {SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, ADAPTER_SAFE_WEIGHTS_NAME} & files.keys():
        remedy = (
            f"its weights are pickles ({pickles[0]}), which can run code when they are loaded and are refused; ask its "
            "owner for safetensors"
            if pickles
            else "give the id of a repository with weights"
        )
        raise ValueError(f"{where} holds no {SAFE_WEIGHTS_NAME} or {SAFE_WEIGHTS_INDEX_NAME}: {remedy}")
    return _Remote(repo, str(info.sha), files, pickles)


# --- fetching ----------------------------------------------------------------------------------------------------------


def _prepare(remote: _Remote, staging: Path) -> None:
    """Fetch what tells whether the rest is worth fetching, and see that it fits. Nothing is left behind if not."""
    is_new = not staging.exists()
    staging.mkdir(parents=True, exist_ok=True)
    # Of a pull that was killed: the client begins a file anew, whatever there was of it.
    for part in (staging / _CLIENT_STATE).rglob("*.incomplete"):
        part.unlink()
    try:
        _fetch(remote, staging, [CONFIG_NAME, ADAPTER_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME])
        _check_plan(remote, staging)
        _check_space(staging, remote)
    except (ValueError, OSError):
        if is_new:
            shutil.rmtree(staging)
        raise
    _remove_others(remote, staging)


def _remove_others(remote: _Remote, staging: Path) -> None:
    """
    Files of another commit, from an earlier pull that was interrupted, and the folders that they leave empty.

    By what is in them, which costs one reading of what has arrived: when the Hub cannot be reached, the client takes what
    lies in a folder for the commit asked for.
    """
    # Deepest first, so that a folder comes after what is in it.
    for path in sorted(_outside_client_state(staging), reverse=True):
        if path.is_dir() and not path.is_symlink():
            if not any(path.iterdir()):
                path.rmdir()
            continue
        file = remote.files.get(path.relative_to(staging).as_posix())
        if file is None or _differs(path, file):
            path.unlink()


def _differs(path: Path, file: RepoSibling) -> bool:
    """Whether a local file is certainly another one. Not every server tells hashes."""
    if file.lfs:
        return sha256_of(path) != file.lfs.sha256
    return file.blob_id is not None and git_hash(path.read_bytes()) != file.blob_id


def _outside_client_state(staging: Path) -> Iterator[Path]:
    return (path for path in staging.rglob("*") if path.relative_to(staging).parts[0] != _CLIENT_STATE)


def _check_space(staging: Path, remote: _Remote) -> None:
    # Of this model; or of another, which will be removed.
    present = [path for path in _outside_client_state(staging) if path.is_file()]
    needed = sum(file.size or 0 for file in remote.files.values()) - sum(path.stat().st_size for path in present)
    free = shutil.disk_usage(staging).free
    if needed > free:
        raise HubError(
            f"{decimal(needed)} are to be fetched, {staging.parent} has {decimal(free)} free; choose --output on another "
            "disk, or free space"
        )


def _fetch(remote: _Remote, staging: Path, names: list[str]) -> None:
    """
    Download files that are not there yet.

    Raises:
        HubError: it was interrupted; what has arrived stays for the next time.
    """
    wanted = [name for name in names if name in remote.files]
    with said_clearly(remote.repo, "pull"):
        # Names are patterns to the client: brackets and asterisks in them are not to be understood as such.
        patterns = [name.translate({ord(c): f"[{c}]" for c in "[*?"}) for name in wanted]
        snapshot_download(remote.repo, revision=remote.commit, local_dir=staging, allow_patterns=patterns)
    # When the Hub cannot be reached the client takes a folder as it is, with no more than a warning.
    if absent := [name for name in wanted if not (staging / name).is_file()]:
        raise HubError(
            f"{len(absent)} files of {remote.repo} did not arrive ({absent[0]}); run the same command again: what has "
            "arrived is not fetched again"
        )


# --- checks ------------------------------------------------------------------------------------------------------------


def _check_plan(remote: _Remote, staging: Path) -> None:
    """The config and the list of shards, before what is large."""
    if CONFIG_NAME in remote.files and ADAPTER_CONFIG_NAME not in remote.files:
        try:
            GrinMoeConfig.from_pretrained(staging)
        except (OSError, AttributeError, TypeError) as error:  # the last two: JSON that is no object
            raise CheckpointError(
                f"{CONFIG_NAME} of {remote.repo} cannot be read; tell its owner, or give another --revision"
            ) from error
    if SAFE_WEIGHTS_INDEX_NAME not in remote.files:
        return
    try:
        shards = set(read_index(staging / SAFE_WEIGHTS_INDEX_NAME).values())
    except CheckpointError as error:
        raise CheckpointError(
            f"{SAFE_WEIGHTS_INDEX_NAME} of {remote.repo} is not a safetensors index ({error.__cause__!r}); tell its "
            "owner, or give another --revision"
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


def _check_pulled(remote: _Remote, folder: Path, console: Console) -> None:
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
            console.print(f"note: {error}")


def _check_opens(file: Path) -> None:
    try:
        with safe_open(file, framework="pt"):
            pass
    except SafetensorError as error:
        raise CheckpointError(f"{file} is truncated or not safetensors ({error})") from error


def _blamed(error: CheckpointError, remote: _Remote, folder: Path) -> CheckpointError:
    """Whether the download is at fault, which another one mends, or the repository."""
    damaged = [name for name, file in remote.files.items() if _differs(folder / name, file)]
    for name in damaged:
        (folder / name).unlink()
    said = str(error).replace(f"{folder}{os.sep}", "").replace(str(folder), remote.repo)
    if damaged:
        return CheckpointError(f"{', '.join(damaged)} did not arrive whole; run the same command again ({said})")
    return CheckpointError(
        f"what {remote.repo} holds at {remote.commit[:12]} is broken, the download is not: {said}. Tell its owner, or give "
        f"another --revision; what has been fetched is in {folder}"
    )
