"""`grinmoe push`: publish a checked release on the Hub in one commit.

The client's `upload_large_folder` makes many commits, and huggingface_hub 2 has dropped it; its `upload_folder` may make
several for a large model. Here `preupload_lfs_files` sends the large files first (an interrupted push resumes, because
files that have arrived are not sent again), and one commit publishes all or nothing.
"""

from __future__ import annotations

import json
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    get_token,
)
from huggingface_hub.errors import HTTPError, RepositoryNotFoundError
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from ..checkpoint_grinmoe import stale_weights
from ..files import telling_disk_full
from .checks import ReleaseError
from .errors import COMMIT_WAIT_S, WAIT_S, HubError, check_repo, first_line, printable, said_clearly, status_of
from .options import PushOptions
from .readme import CARD_NAME
from .release import Release, make_release

# Held in memory from the check to the commit, so that they cannot change in between; larger ones are hashed again.
_SMALL_BYTES = 10 * 2**20
_PULL_REQUEST = re.compile(r"refs/pr/\d+")
_WEIGHTS = re.compile(r"(model|pytorch_model)(-\d{5}-of-\d{5})?\.(safetensors|bin)")


def push(options: PushOptions) -> str | None:
    """
    Publish a model or an adapter.

    Args:
        options: what to publish, where and how. Nothing is written into the model's folder.

    Returns:
        Address of the commit (of the pull request), or None for a dry run.

    Raises:
        ReleaseError, CheckpointError, TokenizerError, ValueError: the folder cannot be published (see `make_release`).
        HubError: the Hub refused, or cannot be reached. Nothing is published then, unless the message says that only the tag
            is missing, or that the Hub did not confirm the commit.
        DiskFullError: there is no room for the release in the folder of temporary files.
    """
    check_repo(options.repo)
    # Not markup: what stands in brackets in a file's name is part of it.
    console = Console(highlight=False, soft_wrap=True, markup=False)
    with telling_disk_full(tempfile.gettempdir()), tempfile.TemporaryDirectory(prefix="grinmoe-release-") as name:
        folder = Path(name) / "release"
        folder.mkdir()
        if options.dry_run:
            _show(make_release(options.model, folder, options.repo, options.release), options.repo, console)
            if "/" not in options.repo:
                console.print("note: your name is put before the repository's when it is sent, in the card too")
            console.print("dry run: nothing was sent")
            return None
        token = get_token()
        if token is None:
            raise HubError("there is no token to push with; run `hf auth login`, or set HF_TOKEN to one that may write")
        api = HfApi(token=token)
        # Before the release is made: that may take minutes, and what the Hub will refuse can often be told at once.
        with said_clearly(options.repo, "push"):
            place = _find_place(options, api)
        release = make_release(options.model, folder, place.repo, options.release)
        _show(release, place.repo, console)
        return _publish(release, place, options, api, console)


def _show(release: Release, repo: str, console: Console) -> None:
    kind = "adapter" if release.is_adapter else "model"
    table = Table("file", "size", title=f"{kind} for {repo}", title_justify="left", title_style="bold")
    table.columns[1].justify = "right"
    for file in release.files:
        table.add_row(file.name, decimal(file.size))
    table.add_section()
    table.add_row(f"{len(release.files)} files", decimal(release.size))
    console.print(table)
    for note in release.notes:
        console.print(f"note: {printable(note)}")
    if release.left_out:
        shown = ", ".join(release.left_out[:8]) + (", ..." if len(release.left_out) > 8 else "")
        console.print(f"left out ({len(release.left_out)}): {printable(shown)}")


# --- where it goes -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Place:
    """A repository as it is before anything is sent."""

    repo: str  # with its owner
    exists: bool
    makes_branch: bool  # `revision` is not there yet


def _find_place(options: PushOptions, api: HfApi) -> _Place:
    """
    Look at the repository, without a change to it.

    Raises:
        HubError: what can be refused at once.
    """
    repo = options.repo if "/" in options.repo else f"{api.whoami()['name']}/{options.repo}"
    try:
        info = api.model_info(repo, timeout=WAIT_S)
    except RepositoryNotFoundError as error:
        # The Hub answers 404 for what a valid token may not see, 401 without one.
        if status_of(error) != 404 or options.create_pr or _PULL_REQUEST.fullmatch(options.revision or ""):
            raise
        return _Place(repo, exists=False, makes_branch=options.revision not in (None, "main"))
    if options.private and info.private is False:
        raise HubError(f"{repo} is there and public; make it private in its settings, or leave --private out")
    refs = api.list_repo_refs(repo)
    tags = {tag.name for tag in refs.tags}
    if options.tag in tags:
        raise HubError(f"{repo} has a tag {options.tag} already; choose another name, or delete that tag first")
    if options.revision in tags:
        raise HubError(f"--revision {options.revision} is a tag of {repo}, which cannot be changed; give a branch")
    branches = {"main", None, *(branch.name for branch in refs.branches)}
    is_pull_request = bool(_PULL_REQUEST.fullmatch(options.revision or ""))
    return _Place(repo, exists=True, makes_branch=options.revision not in branches and not is_pull_request)


# --- sending -----------------------------------------------------------------------------------------------------------


def _publish(release: Release, place: _Place, options: PushOptions, api: HfApi, console: Console) -> str:
    with said_clearly(place.repo, "push"):
        _validate_card(release)
        if not place.exists:
            api.create_repo(place.repo, private=options.private or None)
        base = None if place.makes_branch else options.revision
        head = api.model_info(place.repo, revision=base, timeout=WAIT_S)
    present = [file.rfilename for file in head.siblings or []]
    stale = _stale(present, release, place.repo)
    additions = _additions(release)
    console.print(f"sending to {place.repo}; what the Hub has already is not sent again")
    with said_clearly(place.repo, "push"):
        if place.makes_branch:
            api.create_branch(place.repo, branch=str(options.revision), revision=head.sha)
        api.preupload_lfs_files(
            place.repo, additions, revision=options.revision, create_pr=options.create_pr, free_memory=False
        )
    _refuse_changes(release, additions)
    with said_clearly(place.repo, "push", wait_s=COMMIT_WAIT_S):
        operations = [*additions, *(CommitOperationDelete(name) for name in stale)]
        commit = _commit(operations, place, options, str(head.sha), api)
        if stale:
            console.print(f"removed there, of a former checkpoint: {printable(', '.join(stale))}")
        if commit.oid == head.sha:
            console.print("nothing has changed: the repository holds this release already")
        if options.tag:
            _tag(place.repo, options.tag, commit.oid, api)
            console.print(f"tagged {options.tag}")
    address = str((commit.pr_url if options.create_pr else None) or commit.commit_url)
    console.print(f"published {printable(address)}")
    return address


def _validate_card(release: Release) -> None:
    """Let the Hub check the metadata before the upload; the client itself asks when everything has been uploaded."""
    try:
        release.card.validate()
    except ValueError as error:
        said = " ".join(str(error).split())
        raise HubError(
            f"nothing was published: the Hub does not take the metadata of {CARD_NAME} ({said}); correct it"
        ) from error


def _stale(present: list[str], release: Release, repo: str) -> list[str]:
    """
    What a former release left in the repository and would be loaded together with this one.

    Raises:
        HubError: an adapter would lie beside a model.
    """
    names = {file.name for file in release.files}
    if release.is_adapter:
        if weights := [name for name in present if _WEIGHTS.fullmatch(name)]:
            raise HubError(
                f"nothing was published: {repo} holds a model ({weights[0]}), which nobody could load any more with an "
                "adapter beside it; push the adapter to a repository of its own"
            )
        former = re.compile(r"adapter_model\.bin")
    else:
        former = re.compile(
            r"[^/]+_grinmoe\.py|pytorch_model(-\d{5}-of-\d{5})?\.bin|pytorch_model\.bin\.index\.json"
            # An adapter beside a model is loaded on top of it.
            r"|adapter_config\.json|adapter_model\.(safetensors|bin)"
            # Former tokenizers' files, which are read together with tokenizer.json.
            r"|special_tokens_map\.json|added_tokens\.json|chat_template\.(jinja|json)|tokenizer\.model"
            r"|generation_config\.json"
        )
    stale = {name for name in present if former.fullmatch(name) and name not in names}
    return sorted(stale | set(stale_weights(present, names)))


def _additions(release: Release) -> list[CommitOperationAdd]:
    """Small files as the bytes that were checked; large ones by path, their hash is compared once more later."""
    additions = []
    for file in release.files:
        small = file.size <= _SMALL_BYTES
        additions.append(CommitOperationAdd(file.name, file.path.read_bytes() if small else str(file.path)))
    return additions


def _refuse_changes(release: Release, additions: list[CommitOperationAdd]) -> None:
    # The client has hashed the large files to send them, so this costs no further reading of those.
    sent = {addition.path_in_repo: addition.upload_info.sha256.hex() for addition in additions}
    changed = [file.name for file in release.files if sent[file.name] != file.sha256]
    if changed:
        raise ReleaseError(
            f"{', '.join(changed)} changed after the check, and nothing was published; push again when nothing writes there"
        )


def _commit(operations: list, place: _Place, options: PushOptions, parent: str, api: HfApi) -> CommitInfo:
    try:
        return api.create_commit(
            place.repo,
            operations,
            commit_message=options.message,
            revision=options.revision,
            create_pr=options.create_pr,
            # What is stale was told from this one: a commit in between is an error.
            parent_commit=parent,
        )
    # The last two: an answer that is not the Hub's, or lacks what the client looks for in it.
    except (HTTPError, json.JSONDecodeError, KeyError) as error:
        status = status_of(error)
        if status is not None and status < 500:
            raise
        look = "see whether it is among the pull requests there" if options.create_pr else "run the same command again"
        raise HubError(
            f"the Hub did not confirm the commit to {place.repo} ({first_line(error)}), so that it was made whole or not at "
            f"all; {look}{'' if options.create_pr else ', which sends nothing twice'}"
        ) from error


def _tag(repo: str, tag: str, commit: str, api: HfApi) -> None:
    try:
        api.create_tag(repo, tag=tag, revision=commit)
    except HTTPError as error:
        raise HubError(
            f"{repo} holds the release (commit {commit}), but the tag {tag} could not be made: {first_line(error)}. Only "
            f"the tag is missing: hf repos tag create {repo} {tag} --revision {commit}"
        ) from error
