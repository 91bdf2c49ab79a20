"""Options of `grinmoe push` that make no sense, and dry runs: nothing of these reaches the Hub."""

from __future__ import annotations

import re

import pytest
import torch
from huggingface_hub import constants

from tests.hub.bad_folders import BAD_FOLDERS
from tests.hub.release_folders import REPO, SHARDS, contents, run_cli


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--create-pr", "--tag", "v1"], "--create-pr and --tag exclude each other"),
        (["--create-pr", "--revision", "x"], "--create-pr and --revision exclude each other"),
        (["--create-pr", "--private"], "--create-pr and --private exclude each other"),
        (["--tag", "v 1"], "--tag 'v 1' is no name for a git reference"),
        (["--tag", "a..b"], "--tag 'a..b' is no name"),
        (["--tag", "v1.lock"], "--tag 'v1.lock' is no name"),
        (["--tag", "-v1"], "--tag"),
        (["--tag", ""], "--tag '' is no name"),
        (["--revision", "a//b"], "--revision 'a//b' is no name"),
        (["--revision", "x."], "--revision 'x.' is no name"),
        (["--revision", "0" * 40], "is a commit, which cannot be changed; give a branch"),
        (["--revision", "v1", "--tag", "v1"], "--tag and --revision are both 'v1'"),
        (["--message", " "], "--message is empty"),
        (["--repo", "a/b/c"], "--repo 'a/b/c' is no name of a repository; give NAME or OWNER/NAME"),
        (["--repo", ""], "--repo '' is no name"),
        (["--model", "not/there"], "--model not/there is no folder"),
        (["--evaluations", "not-there.json"], "not-there.json"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_that_make_no_sense(hub, model, capsys, arguments, message):
    base = ["push", "--model", str(model), "--repo", REPO, "--no-load-check"]
    code, _, error = run_cli(capsys, *base, *arguments)
    assert code == 2 and message in error
    assert not hub.paths("POST")


# ---- dry runs


def test_a_dry_run_sends_no_request_and_needs_no_token(hub, model, capsys, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    (model / "optimizer.pt").write_bytes(b"state")
    before = contents(model)
    arguments = ["--no-load-check", "--tag", "v1", "--dry-run"]
    code, printed, error = run_cli(capsys, "push", "--model", str(model), "--repo", "model", *arguments)
    assert code == 0, error
    assert not hub.requests and contents(model) == before
    assert all(name in printed for name in (*SHARDS, "README.md", "modeling_grinmoe.py"))
    assert re.search(r"\d+ files", printed)
    assert "your name is put before the repository's" in printed
    assert "left out (1): optimizer.pt" in printed and "dry run: nothing was sent" in printed
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert run_cli(capsys, "push", "--model", str(model), "--repo", REPO, *arguments)[0] == 0


def test_a_dry_run_finds_what_a_push_would_refuse(hub, model, capsys):
    BAD_FOLDERS["truncated shard"][0](model)
    code, _, error = run_cli(capsys, "push", "--model", str(model), "--repo", REPO, "--dry-run")
    assert code == 2 and "is truncated" in error and not hub.requests


@pytest.mark.integration
def test_a_quantised_model_is_published_and_comes_back(hub, chat_model, tmp_path, capsys):
    """Its packed experts have no official layout; the release is loaded without this package all the same."""
    from grinmoe import GrinMoeForCausalLM, load_tokenizer
    from grinmoe.adapters.presets import quantization_config

    model = GrinMoeForCausalLM.from_pretrained(
        chat_model, quantization_config=quantization_config("int8", torch.float32)
    )
    model.save_pretrained(tmp_path / "int8")
    load_tokenizer(chat_model).save_pretrained(tmp_path / "int8")
    code, _, error = run_cli(capsys, "push", "--model", str(tmp_path / "int8"), "--repo", REPO, "--license", "mit")
    assert code == 0, error
    code, _, error = run_cli(capsys, "pull", "--repo", REPO, "--output", str(tmp_path / "back"))
    assert code == 0, error
    again = GrinMoeForCausalLM.from_pretrained(tmp_path / "back").state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())
