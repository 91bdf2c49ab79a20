"""`grinmoe push` against a Hub on this machine, by the real client: what arrives, what is refused, what is left undone."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, constants, get_session

from grinmoe import GrinMoeForCausalLM
from grinmoe.hub.checks import ReleaseError, sha256_of
from grinmoe.hub.publish import HubError
from tests.fake_hub.server import OTHER, READER, WRITER
from tests.hub.bad_folders import BAD_FOLDERS
from tests.hub.release_folders import (
    INDEX,
    REPO,
    SHARDS,
    contents,
    edit_weights,
    push_quick,
    run_cli,
    run_without_package,
    save_model,
)


def shas(hub, repo: str = REPO, revision: str = "main") -> list[str]:
    return [commit.sha for commit in hub.commits(repo, revision)]


@pytest.fixture
def refused(hub, capsys):
    """Run `grinmoe push`, which must say one thing on standard error and change neither the Hub nor the folder."""

    def run(folder: Path, *arguments: str, repo: str = REPO) -> str:
        before, state = contents(folder), {name: hub.refs(name) for name in hub.store.repositories}
        code, _, error = run_cli(capsys, "push", "--model", str(folder), "--repo", repo, "--no-load-check", *arguments)
        said = [line for line in error.splitlines() if line.startswith("grinmoe push: ")]
        assert code == 2 and len(said) == 1 and error.rstrip().endswith(said[0]), error
        assert contents(folder) == before
        after = {name: hub.refs(name) for name in hub.store.repositories}
        for name, refs in state.items():
            assert after[name] == refs, "nothing is published, not even a branch"
        for name in after.keys() - state.keys():
            assert len(hub.commits(name)) == 1, "at most an empty repository"
        return said[0]

    return run


# ---- what arrives


LOAD_PINNED = """
    import json, torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    repo, revision = sys.argv[1:]
    model = AutoModelForCausalLM.from_pretrained(repo, revision=revision, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(repo, revision=revision, trust_remote_code=True)
    with torch.inference_mode():
        logits = model.eval()(torch.arange(16)[None]).logits
    found = {"module": type(model).__module__, "sum": logits.double().abs().sum().item(), "ids": tokenizer("Hi").input_ids}
    print(json.dumps(found))
"""


@pytest.mark.integration
def test_from_a_folder_to_somebody_who_has_not_the_package(hub, model, tmp_path, capsys):
    """The whole way: checked, pushed, tagged; then main moves on, and the tag loads elsewhere, at last without a Hub."""
    before = contents(model)
    options = ("--private", "--tag", "v1.0", "--license", "mit", "--message", "First release")
    code, printed, error = run_cli(capsys, "push", "--model", str(model), "--repo", "model", *options)
    assert code == 0, error
    assert contents(model) == before
    commits = hub.commits(REPO)
    assert [commit.title for commit in commits] == ["First release", "initial commit"]
    assert hub.refs(REPO) == {"refs/heads/main": commits[0].sha, "refs/tags/v1.0": commits[0].sha}
    assert hub.store.repositories[REPO].private
    files = hub.files(REPO)
    for name in (*SHARDS, INDEX, "LICENSE", "training.png"):
        assert files[name] == before[name]
    assert f'AutoModelForCausalLM.from_pretrained("{REPO}"' not in files["README.md"].decode(), "its own text is kept"
    assert "same logits, same ids" in printed and f"{hub.endpoint}/{REPO}/commit/{commits[0].sha}" in printed
    assert SHARDS[0] in printed and "90.2 kB" in printed, "what is sent is shown"

    hub.add_commit(REPO, {"config.json": b"{}"}, deleted=SHARDS)
    with torch.inference_mode():
        expected = GrinMoeForCausalLM.from_pretrained(model).eval()(torch.arange(16)[None]).logits
    environment = hub.environment(tmp_path / "hf-home")
    online = run_without_package(LOAD_PINNED, environment, tmp_path, REPO, "v1.0")
    seen = len(hub.requests)
    offline = run_without_package(LOAD_PINNED, {**environment, "HF_HUB_OFFLINE": "1"}, tmp_path, REPO, "v1.0")
    assert seen == len(hub.requests) and online == offline
    assert online["module"].startswith("transformers_modules.")
    assert online["sum"] == pytest.approx(expected.double().abs().sum().item(), abs=1e-4)


def test_a_second_push_sends_nothing(hub, model, capsys):
    first = push_quick(model)
    sent, commits, done = hub.bytes_uploaded(), shas(hub), len(hub.requests)
    assert push_quick(model) == first
    assert hub.bytes_uploaded() == sent and shas(hub) == commits
    again = hub.requests[done:]
    assert not [seen for seen in again if seen.method == "PUT" or "/commit/" in seen.path]
    assert "nothing has changed" in capsys.readouterr().out
    # Of a changed one only what changed, in one commit.
    edit_weights(model / SHARDS[1], lambda tensors: next(iter(tensors.values())).add_(1))
    push_quick(model, tag="v2")
    assert hub.bytes_uploaded() == sent + (model / SHARDS[1]).stat().st_size
    assert shas(hub)[1:] == commits and hub.refs(REPO)["refs/tags/v2"] == shas(hub)[0]


def test_a_name_without_an_owner_is_the_users_own(hub, model):
    (model / "README.md").unlink()
    push_quick(model, repo="model")
    assert f'from_pretrained("{REPO}"' in hub.files(REPO)["README.md"].decode()


def test_a_branch_is_made_of_main(hub, model):
    hub.add_commit(REPO, {"theirs.txt": b"1"})
    main = shas(hub)
    # Of main as it was seen: what comes in between has no place in it.
    hub.after("/branch/", lambda: hub.add_commit(REPO, {"late.txt": b"2"}))
    push_quick(model, revision="step/100", tag="t100")
    assert shas(hub)[1:] == main and "late.txt" not in hub.files(REPO, "step/100")
    assert shas(hub, revision="step/100")[1:] == main
    assert {"theirs.txt", *SHARDS} <= hub.files(REPO, "step/100").keys()
    assert hub.refs(REPO)["refs/tags/t100"] == hub.refs(REPO)["refs/heads/step/100"]
    push_quick(model, revision="step/100", message="again")
    assert shas(hub, revision="step/100")[1:] == main


def test_a_pull_request_on_anothers_repository(hub, model, monkeypatch, capsys):
    push_quick(model)
    main = shas(hub)
    monkeypatch.setenv("HF_TOKEN", OTHER)
    edit_weights(model / SHARDS[0], lambda tensors: next(iter(tensors.values())).add_(1))
    assert push_quick(model, create_pr=True) == f"{hub.endpoint}/{REPO}/discussions/1"
    assert shas(hub) == main and shas(hub, revision="refs/pr/1")[1:] == main
    # And another push into the same one, by the owner.
    monkeypatch.setenv("HF_TOKEN", WRITER)
    (model / "LICENSE").write_text("MIT License, second try\n")
    push_quick(model, revision="refs/pr/1")
    assert hub.files(REPO, "refs/pr/1")["LICENSE"] == b"MIT License, second try\n"
    assert len(hub.refs(REPO)) == 2 and shas(hub, revision="refs/pr/1")[2:] == main


def test_the_token_of_a_login_is_used(hub, model, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)  # asked for by name, it is sent all the same
    Path(constants.HF_TOKEN_PATH).write_text(WRITER)
    push_quick(model)
    assert len(shas(hub)) == 2


def test_an_adapter(hub, adapter):
    push_quick(adapter, base_model="me/base")
    assert hub.files(REPO).keys() == {".gitattributes", "README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert json.loads(hub.files(REPO)["adapter_config.json"])["base_model_name_or_path"] == "me/base"
    assert len(shas(hub)) == 2


# ---- what was there before


def test_shards_and_files_of_a_former_model_go_in_the_same_commit(hub, model, tmp_path, capsys):
    stale = ["model.safetensors", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    stale += ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"]
    stale += ["old_grinmoe.py", "special_tokens_map.json", "added_tokens.json", "tokenizer.model"]
    kept = ["notes.txt", "model.fp16.safetensors", "gguf/model.safetensors", "sub/x_grinmoe.py", "adapter_notes.md"]
    hub.add_commit(REPO, {name: name.encode() for name in [*stale, *kept]})
    push_quick(model)
    assert len(shas(hub)) == 3
    names = hub.files(REPO).keys()
    assert not names & set(stale) and names >= {*kept, *SHARDS}
    assert f"removed there, of a former checkpoint: {', '.join(sorted(stale))}" in capsys.readouterr().out
    # And back to one shard: the index goes with the others.
    push_quick(save_model(tmp_path / "one", max_shard_size="1GB"))
    assert {name for name in hub.files(REPO) if "model" in name and "safetensors" in name and "/" not in name} == {
        "model.safetensors",
        "model.fp16.safetensors",
    }
    assert len(shas(hub)) == 4


def test_a_model_over_an_adapter(hub, adapter, model):
    """An adapter that stayed would be loaded on top of the model."""
    push_quick(adapter, base_model="me/base")
    hub.add_commit(REPO, {"adapter_model.bin": b"old"})
    push_quick(model)
    assert not [name for name in hub.files(REPO) if "adapter" in name]
    assert set(SHARDS) < hub.files(REPO).keys()


def test_an_adapter_over_a_model_is_refused(hub, refused, adapter, model):
    """The other way round nobody could load the model any more."""
    push_quick(model)
    said = refused(adapter, "--base-model", "me/base", "--revision", "new-branch")
    assert "holds a model (model-00001-of-00003.safetensors)" in said and "a repository of its own" in said


# ---- interruptions


def test_an_upload_that_was_cut_off_goes_on(hub, model, refused):
    push_quick(save_model(model.parent / "other", num_hidden_layers=1), repo="writer-user/other")
    missing = shas_of_shards(model)[SHARDS[1]]
    hub.cut(f"/lfs/.*{missing}", after_bytes=20_000, times=1000)
    said = refused(model)
    assert "nothing was published: the Hub cannot be reached or did not answer" in said and "is not sent again" in said
    arrived = set(hub.store.repositories[REPO].lfs_objects)
    assert arrived and missing not in arrived
    hub.heal()
    hub.requests.clear()
    push_quick(model)
    sent = {path.rsplit("/")[-1] for path in hub.paths("PUT")}
    assert missing in sent and not sent & arrived
    assert len(shas(hub)) == 2 and hub.files(REPO)[SHARDS[1]] == (model / SHARDS[1]).read_bytes()


def shas_of_shards(folder: Path) -> dict[str, str]:
    return {name: sha256_of(folder / name) for name in SHARDS}


def test_a_commit_whose_answer_is_lost(hub, model, refused, capsys):
    """Whether it was made cannot be told, so it is not said that nothing was published."""
    hub.lose_reply("/commit/main")
    with pytest.raises(HubError, match="did not confirm the commit .* run the same command again") as raised:
        push_quick(model, tag="v1")
    assert "nothing was published" not in str(raised.value)
    commits = shas(hub)
    assert len(commits) == 2, "it was"
    push_quick(model, tag="v1")
    assert shas(hub) == commits and hub.refs(REPO)["refs/tags/v1"] == commits[0]
    assert "nothing has changed" in capsys.readouterr().out

    hub.fail("/commit/main", 503, message="Down")
    (model / "LICENSE").write_text("another")
    assert "did not confirm the commit" in refused(model) and shas(hub) == commits
    hub.fail("/commit/main", 503, message="Down")
    with pytest.raises(HubError, match="see whether it is among the pull requests there"):
        push_quick(model, create_pr=True)


def test_somebody_commits_in_between(hub, model):
    """What is stale was told from another commit: theirs stays, ours is not made."""
    push_quick(model)
    (model / "LICENSE").write_text("another")
    hub.after("/commit/main", lambda: hub.add_commit(REPO, {"theirs.txt": b"1"}))
    with pytest.raises(HubError, match="nothing was published: .* was changed at the same moment; run the same"):
        push_quick(model)
    assert hub.commits(REPO)[0].title == "Somebody else's commit" and len(shas(hub)) == 3
    push_quick(model)
    assert hub.files(REPO)["LICENSE"] == b"another" and hub.files(REPO)["theirs.txt"] == b"1"


def save_weights(folder: Path, mebibytes: int) -> Path:
    """A model whose weights are one file, a little larger than that; its path."""
    save_model(folder, max_shard_size="1GB", intermediate_size=24 + 342 * mebibytes)
    assert (folder / "model.safetensors").stat().st_size > mebibytes * 2**20
    return folder / "model.safetensors"


def change(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 0xFF]))


# Push holds files of up to 10 MiB in memory, and reads larger ones again.
@pytest.mark.parametrize("mebibytes", [0, 10])
def test_push_when_a_file_changes_after_the_check_publishes_nothing(hub, tmp_path, mebibytes):
    """As when a training run writes its next checkpoint into the folder that is being pushed."""
    weights = save_weights(tmp_path / "model", mebibytes)
    hub.after("validate-yaml", lambda: change(weights))
    with pytest.raises(ReleaseError, match="model.safetensors changed after the check, and nothing was published"):
        push_quick(weights.parent)
    assert len(shas(hub)) == 1


def test_push_when_a_large_file_changes_during_the_upload_publishes_nothing(hub, tmp_path):
    weights = save_weights(tmp_path / "model", mebibytes=10)
    hub.after("objects/batch", lambda: change(weights))
    with pytest.raises(HubError, match=r"nothing was published: the Hub refused \(400\)"):
        push_quick(weights.parent)
    assert len(shas(hub)) == 1


def test_push_when_a_small_file_changes_during_the_upload_sends_what_was_checked(hub, model):
    original = (model / SHARDS[0]).read_bytes()
    hub.after("objects/batch", lambda: change(model / SHARDS[0]))
    push_quick(model)
    assert hub.files(REPO)[SHARDS[0]] == original


def test_a_tag_that_cannot_be_made_is_all_that_is_missing(hub, model):
    hub.fail("/tag/", 503, message="Down for maintenance")
    with pytest.raises(HubError, match=r"holds the release \(commit \w{40}\), but the tag v1 .*Down") as raised:
        push_quick(model, tag="v1")
    assert f"hf repos tag create {REPO} v1 --revision {shas(hub)[0]}" in str(raised.value)
    assert hub.files(REPO)[SHARDS[0]] == (model / SHARDS[0]).read_bytes()
    commits = shas(hub)
    push_quick(model, tag="v1")
    assert shas(hub) == commits and hub.refs(REPO)["refs/tags/v1"] == commits[0]


# ---- refusals of the Hub


def test_without_a_token(refused, model, hub, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    assert "there is no token to push with; run `hf auth login`, or set HF_TOKEN" in refused(model)
    assert not hub.requests


@pytest.mark.parametrize("repo", [REPO, "writer-user/new", "model"])
def test_a_token_that_is_not_valid(refused, model, hub, monkeypatch, repo):
    hub.add_commit(REPO, {})
    monkeypatch.setenv("HF_TOKEN", "hf_unknown")
    assert "nothing was published: the Hub does not accept the token; log in again" in refused(model, repo=repo)


def test_a_token_that_is_not_valid_looks_like_no_repository_to_the_client(refused, model, hub):
    """By the real Hub's address the client makes that of a 401."""
    hub.fail("/api/models/", 401, code="RepoNotFound", message="Invalid username or password.")
    assert "the Hub does not accept the token" in refused(model)
    assert not hub.paths("POST")


@pytest.mark.parametrize("token", [READER, OTHER])
@pytest.mark.parametrize("repo", [REPO, "writer-user/new"])
def test_a_token_that_may_not_write_there(refused, model, hub, monkeypatch, token, repo):
    hub.add_commit(REPO, {})
    monkeypatch.setenv("HF_TOKEN", token)
    said = refused(model, "--revision", "new-branch", repo=repo)
    assert f"nothing was published: the token may not write to {repo}; use one with write access" in said
    assert "--create-pr proposes" in said
    assert not hub.bytes_uploaded()


def test_a_private_repository_of_somebody_else_looks_like_none(refused, model, hub, monkeypatch):
    HfApi().create_repo(REPO, private=True)
    monkeypatch.setenv("HF_TOKEN", OTHER)
    assert f"there is no repository {REPO} that the token may see" in refused(model, "--create-pr")


def test_private_on_a_public_repository_is_refused_before_anything_is_sent(refused, model, hub):
    push_quick(model)
    (model / "LICENSE").write_text("another")
    hub.requests.clear()
    assert f"{REPO} is there and public; make it private in its settings" in refused(model, "--private")
    assert {seen.method for seen in hub.requests} == {"GET"}


def test_a_pull_request_needs_a_repository(refused, model, hub):
    assert f"there is no repository {REPO}" in refused(model, "--create-pr")
    assert f"there is no repository {REPO}" in refused(model, "--revision", "refs/pr/1")
    assert not hub.store.repositories
    hub.add_commit(REPO, {})
    assert "has no such revision" in refused(model, "--revision", "refs/pr/1")


def test_tags_are_not_moved(refused, model, hub):
    push_quick(model, tag="v1")
    (model / "LICENSE").write_text("another")
    hub.requests.clear()
    assert f"{REPO} has a tag v1 already; choose another name" in refused(model, "--tag", "v1")
    assert f"--revision v1 is a tag of {REPO}" in refused(model, "--revision", "v1")
    assert {seen.method for seen in hub.requests} == {"GET"}


def test_a_card_that_the_hub_does_not_take_is_refused_before_the_weights_are_sent(refused, model, hub):
    said = refused(model, "--license", "my-own")
    assert "nothing was published: the Hub does not take the metadata of README.md" in said and "my-own" in said
    assert not hub.bytes_uploaded() and not hub.store.repositories


@pytest.mark.parametrize(
    "pattern, status, message",
    [
        ("/refs", 500, "the Hub failed (500); run the same command again"),
        ("/refs", 429, "the Hub asks for fewer requests; wait some minutes"),
        ("validate-yaml", 502, "the Hub failed (502)"),
        ("preupload", 404, f"there is no repository {REPO}"),
        ("objects/batch", 403, f"the token may not write to {REPO}"),
        ("/lfs/", 413, "a file is larger than the Hub takes; save the model with smaller shards"),
        ("/lfs/", 500, "the Hub failed (500); run the same command again: what has arrived is not sent again"),
        ("/branch/", 409, f"{REPO} was changed at the same moment; run the same command again"),
        ("/commit/", 403, f"the token may not write to {REPO}"),
        ("/commit/", 412, f"{REPO} was changed at the same moment"),
        ("/commit/", 418, "the Hub refused (418)"),
    ],
)
def test_failures_of_the_hub(refused, model, hub, pattern, status, message):
    hub.add_commit(REPO, {"theirs.txt": b"1"})
    arguments = ("--revision", "new-branch") if pattern == "/branch/" else ()
    hub.fail(pattern, status, times=100, message="What the Hub said")
    said = refused(model, *arguments)
    assert f"nothing was published: {message}" in said and "(What the Hub said)" in said


def test_the_hub_cannot_be_reached(refused, model, hub, monkeypatch):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{unused.getsockname()[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    said = refused(model)
    assert "nothing was published: the Hub cannot be reached or did not answer; check the network" in said
    assert "ConnectError" in said


@pytest.mark.parametrize("endpoint", ["/refs", "/preupload/"])
def test_the_hub_does_not_answer(refused, model, hub, monkeypatch, endpoint):
    """The client by itself would wait forever."""
    monkeypatch.setattr("grinmoe.hub.errors.WAIT_S", 0.3)
    hub.delay(endpoint, seconds=2, times=10)
    hub.add_commit(REPO, {})
    said = refused(model)
    assert "nothing was published: the Hub cannot be reached or did not answer" in said and "ReadTimeout" in said
    assert get_session().timeout.read is None, "as it was"


@pytest.mark.parametrize("endpoint", ["/whoami-v2", "/api/models/writer-user/model$"])
def test_what_answers_is_not_the_hub(refused, model, hub, endpoint):
    """Something else with status 200."""
    hub.fail(endpoint, 200, times=9)
    repo = "model" if "whoami" in endpoint else REPO
    assert "nothing was published: what answered is not the Hub" in refused(model, repo=repo)


def test_what_answers_is_the_page_of_a_proxy(refused, model, hub, monkeypatch):
    monkeypatch.setattr(HfApi, "model_info", lambda *arguments, **options: json.loads("<html>"))
    assert "nothing was published: what answered is not the Hub (Expecting value" in refused(model)


def test_an_answer_without_the_address_of_a_pull_request(model, hub, capsys, monkeypatch):
    """The commit may have been made all the same."""
    hub.add_commit(REPO, {})
    monkeypatch.setattr(HfApi, "create_commit", lambda *arguments, **options: {}["pullRequestUrl"])
    code, _, error = run_cli(capsys, "push", "--model", str(model), "--repo", REPO, "--no-load-check", "--create-pr")
    assert code == 2 and "the Hub did not confirm the commit" in error and "among the pull requests there" in error


def test_a_short_token_may_stand_in_any_text(model, hub, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "model")
    code, _, error = run_cli(capsys, "push", "--model", str(model), "--repo", REPO, "--no-load-check", "--dry-run")
    assert code == 0, error


def test_a_transfer_that_fails_without_a_request(refused, model, hub, monkeypatch):
    """Xet has errors of its own."""

    def fail(*arguments, **options):
        raise RuntimeError("Data processing error: CAS service error")

    monkeypatch.setattr(HfApi, "preupload_lfs_files", fail)
    said = refused(model)
    assert "nothing was published: the transfer failed (Data processing error: CAS service error)" in said


def test_offline(refused, model, hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "cannot push: HF_HUB_OFFLINE is set, which forbids every request; unset it" in refused(model)
    assert not hub.requests


# ---- bad input: nothing is published


@pytest.mark.parametrize("name", BAD_FOLDERS)
def test_bad_folders(refused, model, hub, name):
    """What `make_release` refuses (test_release.py) leaves a repository that is there as it was."""
    hub.add_commit(REPO, {"model.safetensors": b"theirs"})
    BAD_FOLDERS[name][0](model)
    refused(model)
    assert not hub.paths("POST") and not hub.paths("PUT")


def test_secrets_stay_here(refused, model, hub):
    (model / "README.md").write_text("---\nlicense: mit\n---\n# A model\n\nhf_writer pushes it from /home/alice/x\n")
    said = refused(model)
    assert "README.md, line 6: the token in use" in said and "hf_writer" not in said and "/home/alice/x" in said
    assert not hub.store.repositories
