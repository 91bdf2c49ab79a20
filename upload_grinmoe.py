"""Uploading a saved checkpoint to the Hub: one commit or none, and nothing of a former checkpoint left beside it."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from transformers.utils.hub import create_and_tag_model_card

from .layout_grinmoe import stale_weights


def upload_checkpoint(
    folder: Path,
    files: list[str],
    tags: list[str] | None = None,
    repo_id: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str | None = None,
    commit_description: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> CommitInfo:
    """
    Upload `files` of `folder`, and a model card if neither the repository nor the folder has one.

    In one commit (the client's `upload_folder` may make several of a large model, and a repository is then half of one
    model and half of another), which also removes weights of a former checkpoint with another number of shards.

    Args:
        folder: holds the files.
        files: paths relative to the folder.
        tags: for the model card.
        repo_id: name of the repository, created if it is not there; None takes the folder's name.
        private, token, commit_message, commit_description, revision, create_pr: as in `PreTrainedModel.push_to_hub`.

    Returns:
        The commit; the latest one if nothing has changed.
    """
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id or folder.resolve().name, private=private, exist_ok=True).repo_id
    # A pull request is opened against a branch that is there.
    if revision is not None and not create_pr and not revision.startswith("refs/pr/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    card = folder / "README.md"
    if not card.exists():
        # It hands the token to the client, which takes True and False as well.
        create_and_tag_model_card(repo_id, tags, token=cast(str | None, token)).save(card)
    names = sorted({*files, card.name})
    stale = stale_weights(api.list_repo_files(repo_id, revision=revision), names)
    return api.create_commit(
        repo_id,
        [
            *(CommitOperationAdd(name, str(folder / name)) for name in names),
            *(CommitOperationDelete(name) for name in stale),
        ],
        commit_message=commit_message or "Upload model",
        commit_description=commit_description,
        revision=revision,
        create_pr=create_pr,
    )


__all__ = ["upload_checkpoint"]
