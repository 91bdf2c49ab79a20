"""`grinmoe pull` from a Hub on this machine, by the real client: the whole folder or none, and going on where it was."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, constants, hf_hub_download
from safetensors.torch import load_file, save

from grinmoe import GrinMoeForCausalLM, load_tokenizer
from grinmoe.checkpoint_grinmoe import CheckpointError
from grinmoe.hub import HubError, pull
from tests.fake_hub.server import OTHER
from tests.hub.pulled import fetched, kept, whole
from tests.hub.release_folders import (
    INDEX,
    REPO,
    SHARDS,
    contents,
    edit_weights,
    push_quick,
    run_cli,
    truncated,
)

# ---- the whole folder


def test_what_was_pushed_comes_back(pushed, model, output, capsys):
    code, printed, error = run_cli(capsys, "pull", "--repo", REPO, "--output", str(output))
    assert code == 0, error
    assert contents(output) == whole(pushed), "and nothing of the client's own"
    assert list(output.parent.iterdir()) == [output]
    assert f"{REPO} at {pushed.refs(REPO)['refs/tags/v1']} is in {output}" in printed
    loaded, original = (GrinMoeForCausalLM.from_pretrained(folder).state_dict() for folder in (output, model))
    assert all(torch.equal(loaded[name], original[name]) for name in original)
    assert load_tokenizer(output)("Hello").input_ids == load_tokenizer(model)("Hello").input_ids
    # It can be pushed again, and is the same.
    commits = pushed.commits(REPO)
    push_quick(output)
    assert pushed.commits(REPO) == commits


def test_revisions(pushed, model, output):
    pushed.add_commit(REPO, {"README.md": b"# Later\n"})
    tagged = pull(REPO, output, revision="v1")
    assert (tagged / "README.md").read_bytes() == (pushed.files(REPO, "v1"))["README.md"] != b"# Later\n"
    assert (pull(REPO, output.with_name("main")) / "README.md").read_bytes() == b"# Later\n"
    commit = pushed.refs(REPO)["refs/tags/v1"]
    assert contents(pull(REPO, output.with_name("commit"), revision=commit)) == contents(tagged)


def test_an_adapter(hub, saved, output):
    push_quick(saved / "adapter", base_model="me/base")
    assert contents(pull(REPO, output)) == whole(hub)


def test_ways_to_name_the_folder(pushed, output, monkeypatch):
    monkeypatch.chdir(output.parent)
    monkeypatch.setenv("HOME", str(output.parent))
    expected = whole(pushed)
    (output.parent / "empty").mkdir()
    (output.parent / "link").symlink_to("behind-link")
    (output.parent / "behind-link").mkdir()
    for name in ("model", "a/b/c/", "~/home", "empty", "./link"):
        pull(REPO, name)
        assert contents(output.parent / name.replace("~/", "")) == expected
    names = {path.name for path in output.parent.iterdir()}
    assert names == {"model", "a", "home", "empty", "link", "behind-link"}
    assert (output.parent / "link").is_symlink()


def test_pickles_are_not_fetched(pushed, output, capsys):
    pickles = ["pytorch_model.bin", "training_args.bin", "old/optimizer.PT", "x.pkl"]
    pushed.add_commit(REPO, dict.fromkeys(pickles, b"\x80\x04"))
    pull(REPO, output)
    assert not contents(output).keys() & set(pickles) and not set(fetched(pushed)) & {"optimizer.PT", *pickles}
    assert f"left out, because a pickle can run code: {', '.join(sorted(pickles))}" in capsys.readouterr().out


def test_names_with_brackets(pushed, output):
    """To the client names are patterns."""
    pushed.add_commit(REPO, {"notes [old]*?.txt": b"1", "sub/[a]/x.txt": b"2"})
    assert contents(pull(REPO, output)) == whole(pushed)


# ---- interruptions


def test_an_interrupted_pull_goes_on(pushed, refused, output):
    pushed.cut(f"/resolve/.*{SHARDS[1]}", after_bytes=20_000, times=1000)
    said = refused(keeps=True)
    assert "run the same command again: what has arrived is not fetched again" in said
    arrived = {name for name in contents(kept(output)) if not name.startswith(".cache")}
    assert arrived >= {"config.json", INDEX} and SHARDS[1] not in arrived
    pushed.heal()
    pushed.requests.clear()
    pull(REPO, output)
    assert contents(output) == whole(pushed)
    assert list(output.parent.iterdir()) == [output]
    assert SHARDS[1] in fetched(pushed) and not set(fetched(pushed)) & arrived, "what is complete is not fetched again"


def test_another_revision_after_an_interruption(pushed, refused, model, output):
    pushed.add_commit(REPO, {"notes.txt": b"1", "sub/notes.txt": b"2"})
    pushed.cut(f"/resolve/.*{SHARDS[1]}", after_bytes=10, times=1000)
    refused(keeps=True)
    pushed.heal()
    edit_weights(model / SHARDS[0], lambda tensors: next(iter(tensors.values())).add_(1))
    push_quick(model, revision="other")
    pushed.add_commit(REPO, {"LICENSE": b"another"}, deleted=["notes.txt", "sub/notes.txt"], revision="other")
    pull(REPO, output, revision="other")
    assert contents(output) == whole(pushed, "other")
    assert not (output / "sub").exists() and list(output.parent.iterdir()) == [output]


def test_pull_from_a_server_that_tells_no_hashes_is_refused(pushed, refused, monkeypatch):
    """Nothing could be checked."""
    model_info = HfApi.model_info
    monkeypatch.setattr(HfApi, "model_info", lambda *a, files_metadata, **options: model_info(*a, **options))
    said = refused()
    assert "the server does not tell the hash of" in said and "unset HF_ENDPOINT" in said
    assert not fetched(pushed)


def test_a_wrong_name_does_not_cost_what_was_fetched(pushed, refused, output):
    pushed.cut(f"/resolve/.*{SHARDS[1]}", after_bytes=10, times=1000)
    refused(keeps=True)
    before = contents(kept(output))
    pushed.heal()
    pushed.add_commit("writer-user/other", {"config.json": b'{"model_type": "llama"}', "model.safetensors": b"x"})
    assert "model_type='llama' is not a GRIN-MoE config" in refused(repo="writer-user/other", keeps=True)
    assert SHARDS[0] in before and contents(kept(output))[SHARDS[0]] == before[SHARDS[0]]
    pull(REPO, output)
    assert contents(output) == whole(pushed)


def test_the_hub_goes_away_in_between(pushed, refused):
    """The client then takes a folder as it is, with a warning; a part of a model must not pass for the whole."""
    for pattern in ("/resolve/", "/api/models"):
        pushed.fail(pattern, 503, times=1000)
        refused()
        pushed.heal()
    pushed.cut(f"/resolve/.*{SHARDS[1]}", after_bytes=10, times=1000)
    refused(keeps=True)
    pushed.fail("/resolve/", 503, times=1000)
    refused(keeps=True)


@pytest.mark.parametrize("licence", [b"a longer licence", b"XXX License\n"], ids=["other size", "same size"])
def test_what_is_there_of_another_commit_does_not_pass_for_this_one(pushed, refused, output, licence):
    """All but a picture had arrived of one commit; of the next the Hub does not send the file that changed."""
    pushed.cut("/resolve/.*training.png", after_bytes=10, times=1000)
    refused(keeps=True)
    pushed.heal()
    pushed.add_commit(REPO, {"LICENSE": licence}, deleted=["training.png"])
    pushed.fail("/resolve/.*LICENSE", 503, times=1000)
    assert "the Hub failed (503)" in refused(keeps=True)
    pushed.heal()
    pushed.requests.clear()
    assert contents(pull(REPO, output)) == whole(pushed)
    assert fetched(pushed) == ["LICENSE"], "what the two commits have in common is not fetched again"


def test_a_commit_during_a_pull_is_not_mixed_in(pushed, output):
    before = whole(pushed)
    pushed.after("/resolve/.*config.json", lambda: pushed.add_commit(REPO, {"README.md": b"# Later\n"}))
    assert contents(pull(REPO, output)) == before
    assert pushed.files(REPO)["README.md"] == b"# Later\n"


# ---- repositories that are no good


def test_a_broken_shard_is_named(pushed, refused):
    pushed.add_commit(REPO, {SHARDS[1]: truncated(pushed.files(REPO)[SHARDS[1]])})
    said = refused(keeps=True)
    assert f"what {REPO} holds at" in said and "is broken, the download is not" in said
    assert (
        f"{SHARDS[1]} (" in said
        and "truncated" in said
        and "tell its owner, or give another --revision" in said.lower()
    )


def test_a_download_that_was_damaged_is_not_blamed_on_the_repository(pushed, refused, output, monkeypatch):
    """As by a disk that writes something else; the size is right."""

    def damage(repo, name, **options):
        file = Path(hf_hub_download(repo, name, **options))
        if name == SHARDS[0]:
            file.write_bytes(bytes(file.stat().st_size))

    monkeypatch.setattr("grinmoe.hub.download.hf_hub_download", damage)
    said = refused(keeps=True)
    assert f"did not arrive as the Hub announces them, and are removed ({SHARDS[0]})" in said
    monkeypatch.setattr("grinmoe.hub.download.hf_hub_download", hf_hub_download)
    pushed.requests.clear()
    assert contents(pull(REPO, output)) == whole(pushed)
    assert [name for name in fetched(pushed) if "safetensors" in name] == [SHARDS[0]]


@pytest.mark.parametrize(
    "added, deleted, message",
    [
        ({}, SHARDS[:1], f"lacks 1 shards that its index names ({SHARDS[0]}); tell its owner"),
        ({INDEX: b"{"}, (), f"{INDEX} of {REPO} is not a safetensors index"),
        ({INDEX: b"[]"}, (), f"{INDEX} of {REPO} is not a safetensors index"),
        ({INDEX: b'{"weight_map": {"x": "x.safetensors"}}'}, (), f"{INDEX} of {REPO} is not a safetensors index"),
        ({"model.safetensors": b"stale"}, (), f"holds two sets of weights (model.safetensors and {INDEX})"),
        (
            {"pytorch_model.bin": b"\x80\x04"},
            [*SHARDS, INDEX],
            "its weights are pickles (pytorch_model.bin), which can run",
        ),
        ({}, [*SHARDS, INDEX], "give the id of a repository with weights"),
        ({}, ["config.json"], "holds neither config.json nor adapter_config.json; give the id of a model"),
        ({"config.json": b'{"model_type": "llama"}'}, (), "model_type='llama' is not a GRIN-MoE config"),
    ],
)
def test_repositories_without_a_model_are_refused_before_the_weights_are_fetched(
    pushed, refused, added, deleted, message
):
    pushed.add_commit(REPO, added, deleted)
    assert message in refused()
    assert not set(fetched(pushed)) & set(SHARDS)


def test_a_config_of_other_sizes(pushed, refused):
    config = {**json.loads(pushed.files(REPO)["config.json"]), "intermediate_size": 48}
    pushed.add_commit(REPO, {"config.json": json.dumps(config).encode()})
    said = refused(keeps=True)
    assert f"what {REPO} holds at" in said and "with shape (24, 32), config.json makes it (48, 32)" in said


@pytest.mark.parametrize("kind", ["no metadata", "a second set", "a stale copy"])
def test_what_a_pull_refuses_from_pretrained_refuses_by_the_same_name(pushed, model, refused, output, kind):
    """Transformers would take model.safetensors before the index, and the last shard that has a tensor."""
    index = json.loads((model / INDEX).read_text())
    if kind == "no metadata":
        del index["metadata"]
        added, message = {INDEX: json.dumps(index).encode()}, 'has no "metadata" object'
    elif kind == "a second set":
        weights = {key: t * 0 for name in SHARDS for key, t in load_file(model / name).items()}
        added, message = {"model.safetensors": save(weights, {"format": "pt"})}, "two sets of weights"
    else:
        key = min(key for key, shard in index["weight_map"].items() if shard == SHARDS[0])
        edit_weights(model / SHARDS[2], lambda tensors: tensors.update({key: load_file(model / SHARDS[0])[key] * 0}))
        added, message = (
            {SHARDS[2]: (model / SHARDS[2]).read_bytes()},
            f"does not name there: it places {key} in {SHARDS[0]}",
        )
    pushed.add_commit(REPO, added)
    with pytest.raises(CheckpointError, match=re.escape(message)):
        GrinMoeForCausalLM.from_pretrained(REPO, cache_dir=output.with_name("cache"))
    if kind == "no metadata":
        assert not set(fetched(pushed)) & set(SHARDS), "said before the weights are fetched"
    shutil.rmtree(output.with_name("cache"))
    assert message in refused(keeps=kind == "a stale copy")


def test_a_broken_adapter(hub, refused):
    hub.add_commit(REPO, {"adapter_config.json": b"{}", "adapter_model.safetensors": b"not much"})
    assert "adapter_model.safetensors is truncated or not safetensors" in refused(keeps=True)


def test_a_tokenizer_that_is_wrong_is_noted(pushed, output, capsys):
    pushed.add_commit(REPO, {"tokenizer.json": b"{}"})
    pull(REPO, output)
    assert "note: no tokenizer can be loaded from" in capsys.readouterr().out


def test_names_that_lead_out_of_the_folder(pushed, refused):
    pushed.add_commit(REPO, {"sub/../../../out.txt": b"1"})
    assert "which leads out of its folder; do not use it" in refused()


# ---- folders that are there, disks that are full


def test_what_is_there_is_not_touched(pushed, output, capsys, monkeypatch):
    output.mkdir()
    (output / "mine.txt").write_text("mine")
    (output.parent / "file").write_text("a file")
    (output.parent / "link").symlink_to("nowhere")
    for name, message in [
        ("model", "is not empty (it holds 'mine.txt'); give a new folder"),
        ("file", "is a file; give a new folder"),
        ("link", "is a link that leads nowhere; give a new folder"),
    ]:
        code, _, error = run_cli(capsys, "pull", "--repo", REPO, "--output", str(output.parent / name))
        assert code == 2 and message in error
    assert contents(output.parent) == {"model/mine.txt": b"mine", "file": b"a file"}
    code, _, error = run_cli(capsys, "pull", "--repo", REPO, "--output", "")
    assert code == 2 and "--output is empty" in error
    (output.parent / "here").mkdir()
    monkeypatch.chdir(output.parent / "here")
    code, _, error = run_cli(capsys, "pull", "--repo", REPO, "--output", ".")
    assert code == 2 and "is the current folder or a mount point" in error
    assert not pushed.requests


def usage(free: int):
    return lambda path: shutil._ntuple_diskusage(10**9, 10**9 - free, free)


def test_disk_space(pushed, refused, output, monkeypatch):
    needed = sum(map(len, pushed.files(REPO).values()))
    monkeypatch.setattr(shutil, "disk_usage", usage(needed // 2))
    said = refused()
    assert re.search(r"\d+\.\d kB are to be fetched, .* has \d+\.\d kB free; choose --output on another disk", said)


def test_the_rest_of_an_interrupted_pull_need_not_fit_twice(pushed, refused, output, monkeypatch):
    pushed.cut(f"/resolve/.*{SHARDS[2]}", after_bytes=10, times=1000)
    refused(keeps=True)
    pushed.heal()
    left = len(pushed.files(REPO)[SHARDS[2]])
    # What a killed pull leaves of a file is begun anew, so it saves no space.
    part = kept(output) / ".cache" / "huggingface" / "download" / "x.1234.incomplete"
    part.write_bytes(bytes(left))
    monkeypatch.setattr(shutil, "disk_usage", usage(left - 1000))
    assert "are to be fetched" in refused(keeps=True)
    assert not part.exists()
    monkeypatch.setattr(shutil, "disk_usage", usage(left + 1000))
    assert contents(pull(REPO, output)) == whole(pushed)


def test_a_disk_that_is_full_after_all(pushed, refused, monkeypatch):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device", "model.safetensors.incomplete")

    monkeypatch.setattr("grinmoe.hub.download.hf_hub_download", full)
    said = refused()
    assert "the disk is full" in said and "MB are free there; free some space" in said


# ---- refusals of the Hub


def test_what_is_not_there(pushed, refused):
    assert "there is no repository writer-user/absent that the token may see; check the name" in refused(
        repo="writer-user/absent"
    )
    assert f"{REPO} has no such revision; give a branch, tag or commit that is there" in refused("--revision", "v9")
    assert "--repo 'a/b/c' is no name of a repository" in refused(repo="a/b/c")


def test_a_private_repository(hub, model, refused, output, monkeypatch):
    push_quick(model, private=True)
    monkeypatch.delenv("HF_TOKEN")
    assert f"there is no repository {REPO}, or it is not public; check the name, or log in (hf auth login)" in refused()
    monkeypatch.setenv("HF_TOKEN", OTHER)
    assert f"there is no repository {REPO} that the token may see" in refused()
    monkeypatch.setenv("HF_TOKEN", "hf_unknown")
    assert "the Hub does not accept the token; log in again" in refused()
    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    assert contents(pull(REPO, output)) == whole(hub)


def test_a_gated_repository(pushed, refused):
    pushed.fail("/resolve/", 403, times=1000, code="GatedRepo", message="Ask for access")
    assert f"the token may not read {REPO}; ask for access on its page (Ask for access)" in refused()


def test_a_file_that_is_not_there_any_more(pushed, refused):
    pushed.fail(f"/resolve/.*{SHARDS[2]}", 404, times=1000, code="EntryNotFound", message="Entry not found")
    said = refused(keeps=True)
    assert f"{REPO} was changed at the same moment; run the same command again (Entry not found)" in said


@pytest.mark.parametrize(
    "pattern, status, message",
    [
        ("/api/models", 500, "the Hub failed (500); run the same command again: what has arrived is not fetched again"),
        ("/api/models", 429, "the Hub asks for fewer requests"),
        (f"/resolve/.*{SHARDS[2]}", 404, "there is no repository"),
    ],
)
def test_failures_of_the_hub(pushed, refused, pattern, status, message):
    pushed.fail(pattern, status, times=1000, message="What the Hub said")
    said = refused(keeps="resolve" in pattern)
    assert message in said and "What the Hub said" in said and "published" not in said


def test_offline(pushed, refused, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "cannot pull: HF_HUB_OFFLINE is set, which forbids every request; unset it" in refused()
    assert not pushed.requests


def test_errors_are_of_their_kind(hub, output):
    with pytest.raises(HubError):
        pull("writer-user/absent", output)
    HfApi().create_repo(REPO)
    hub.add_commit(REPO, {"config.json": b"{}", INDEX: b'{"weight_map": {"a": "b"}}'})
    with pytest.raises(CheckpointError):
        pull(REPO, output)


def test_two_pulls_into_one_folder(pushed, output):
    """They would take each other's files away."""
    said = []

    def pull_too() -> None:
        try:
            pull(REPO, output)
        except HubError as error:
            said.append(str(error))

    pushed.after("/resolve/", pull_too)
    pull(REPO, output)
    assert (output / "config.json").is_file()
    assert len(said) == 1 and f"another pull into {output} is running; wait for it" in said[0]
