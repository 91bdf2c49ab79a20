"""Uploading a saved checkpoint to the Hub: one commit or none, and nothing of a former checkpoint left beside it."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    ModelCardData,
    metadata_load,
    metadata_save,
)
from huggingface_hub.errors import HfHubHTTPError

from .layout_grinmoe import stale_weights

_CARD = "README.md"


def upload_checkpoint(
    folder: Path,
    files: list[str],
    tags: Sequence[str] = (),
    repo_id: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str | None = None,
    commit_description: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> CommitInfo:
    """
    Upload `files` of `folder`; a model card only if the repository has none, or lacks one of the tags.

    In one commit (the client's `upload_folder` may make several of a large model, and a repository is then half of one
    model and half of another), which also removes weights of a former checkpoint with another number of shards.

    Args:
        folder: holds the files. Nothing is written into it.
        files: paths relative to the folder.
        tags: for the model card.
        repo_id: name of the repository, created if it is not there; None takes the folder's name.
        private, token, commit_message, commit_description, revision, create_pr: as in `PreTrainedModel.push_to_hub`.

    Returns:
        The commit; the latest one if nothing has changed.
    """
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id or folder.resolve().name, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/pr/"):
        try:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        except HfHubHTTPError as error:
            # A pull request may be opened without the right to make branches, against one that is there.
            if not (create_pr and error.response.status_code == 403):
                raise
    present = api.list_repo_files(repo_id, revision=revision)
    names = sorted(set(files) - {_CARD})
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        CommitOperationAdd(name, str(folder / name)) for name in names
    ]
    if (card := _card(api, folder, repo_id, revision, tags, _CARD in present)) is not None:
        operations.append(CommitOperationAdd(_CARD, card))
    operations += [CommitOperationDelete(name) for name in stale_weights(present, names)]
    return api.create_commit(
        repo_id,
        operations,
        commit_message=commit_message or "Upload model",
        commit_description=commit_description,
        revision=revision,
        create_pr=create_pr,
    )


def _card(
    api: HfApi, folder: Path, repo_id: str, revision: str | None, tags: Sequence[str], is_there: bool
) -> bytes | None:
    """The card to send: the repository's own with the tags that it lacks (None if it lacks none), or else a first one."""
    if not is_there and not (folder / _CARD).is_file():
        data = ModelCardData(tags=list(dict.fromkeys(tags)), library_name="transformers")
        return str(ModelCard.from_template(data)).encode()
    with tempfile.TemporaryDirectory() as workspace:
        card = Path(workspace) / _CARD
        source = api.hf_hub_download(repo_id, _CARD, revision=revision) if is_there else folder / _CARD
        card.write_bytes(Path(source).read_bytes())
        # As it stands there: read into the client's classes and written again, results on one dataset become one.
        metadata = metadata_load(card) or {}
        have = metadata.get("tags") or []
        have = [have] if isinstance(have, str) else list(have)
        lacking = [tag for tag in dict.fromkeys(tags) if tag not in have]
        if lacking:
            metadata_save(card, {**metadata, "tags": have + lacking})
        return None if is_there and not lacking else card.read_bytes()


__all__ = ["upload_checkpoint"]
