"""The loopback Hub, driven by the real client: what it stores, refuses, and does to a connection when told to."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    constants,
    errors,
    get_session,
    hf_hub_download,
    snapshot_download,
    whoami,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from tests.fake_hub.server import OTHER, READER, WRITER, HubServer
from tests.fake_hub.storage import Account

REPO = "writer-user/model"
WEIGHTS = bytes(range(256)) * 1000
CARD = "---\nlicense: mit\ntags: [moe]\n---\n# A model\n"


@pytest.fixture
def api(hub) -> HfApi:
    return HfApi()


@pytest.fixture
def folder(tmp_path) -> Path:
    """A checkpoint as one pushes it: a card, a config, two shards, code in a folder."""
    root = tmp_path / "checkpoint"
    (root / "code").mkdir(parents=True)
    (root / "README.md").write_text(CARD)
    (root / "config.json").write_text('{"model_type": "grinmoe"}')
    (root / "code" / "modeling.py").write_text("# code\n")
    (root / "model-1.safetensors").write_bytes(WEIGHTS)
    (root / "model-2.safetensors").write_bytes(WEIGHTS[::-1])
    return root


@pytest.fixture
def pushed(hub, api, folder) -> HubServer:
    """The hub with that checkpoint on it."""
    api.create_repo(REPO)
    api.upload_folder(repo_id=REPO, folder_path=folder)
    return hub


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def add(path: str, content: bytes) -> CommitOperationAdd:
    return CommitOperationAdd(path_in_repo=path, path_or_fileobj=content)


def sha256_of(hub: HubServer, path: str) -> str:
    return hub.commits(REPO)[0].files[path].sha256


def request(method: str, path: str, headers: dict[str, str] | None = None, body: list[dict] | None = None):
    """A request that the client's functions would not make, by its session; `body` becomes lines of JSON."""
    content = "\n".join(map(json.dumps, body or []))
    headers = {"Authorization": f"Bearer {WRITER}", **(headers or {})}
    return get_session().request(method, constants.ENDPOINT + path, headers=headers, content=content)


def status_of(raised: pytest.ExceptionInfo) -> int:
    return raised.value.response.status_code


# ---- pushing


def test_a_folder_arrives_as_it_is(pushed, folder):
    assert pushed.files(REPO) == {**contents(folder), ".gitattributes": pushed.files(REPO)[".gitattributes"]}
    assert [commit.title for commit in pushed.commits(REPO)] == [
        "Upload folder using huggingface_hub",
        "initial commit",
    ]
    assert pushed.bytes_uploaded() == sum(map(len, contents(folder).values()))
    assert len(pushed.paths("PUT")) == 2


def test_a_second_push_sends_nothing_again(pushed, api, folder):
    sent, commits = pushed.bytes_uploaded(), pushed.commits(REPO)
    api.upload_folder(repo_id=REPO, folder_path=folder)
    assert pushed.bytes_uploaded() == sent and pushed.commits(REPO) == commits

    # Of a changed checkpoint only what changed is sent.
    (folder / "model-2.safetensors").write_bytes(b"new weights")
    api.upload_folder(repo_id=REPO, folder_path=folder)
    assert pushed.bytes_uploaded() == sent + len(b"new weights")
    assert pushed.files(REPO)["model-2.safetensors"] == b"new weights"


def test_one_commit_adds_and_deletes(pushed, api):
    operations = [
        add("generation_config.json", b"{}"),
        CommitOperationDelete("model-2.safetensors"),
        CommitOperationDelete("code/"),
    ]
    made = api.create_commit(REPO, operations, commit_message="Smaller", commit_description="why")
    assert made.oid == pushed.refs(REPO)["refs/heads/main"] and made.repo_url.repo_id == REPO
    expected = {".gitattributes", "README.md", "config.json", "generation_config.json", "model-1.safetensors"}
    assert pushed.files(REPO).keys() == expected
    newest = api.list_repo_commits(REPO)[0]
    assert (newest.commit_id, newest.title, newest.message) == (made.oid, "Smaller", "why")
    with pytest.raises(errors.RemoteEntryNotFoundError, match="A file with this name doesn't exist"):
        api.delete_file("model-2.safetensors", REPO)


def test_a_commit_upon_another_than_the_newest_is_refused(pushed, api):
    seen = api.model_info(REPO).sha
    newest = pushed.add_commit(REPO, {"config.json": b"{}"})
    with pytest.raises(errors.HfHubHTTPError, match="A commit has happened since") as raised:
        api.create_commit(REPO, [add("a.txt", b"a")], commit_message="late", parent_commit=seen)
    assert status_of(raised) == 412
    api.create_commit(REPO, [add("a.txt", b"a")], commit_message="in time", parent_commit=newest)


def test_a_commit_without_its_large_objects_is_refused(pushed, api):
    absent = {"path": "absent.safetensors", "algo": "sha256", "oid": "0" * 64, "size": 1}
    lines = [{"key": "header", "value": {"summary": "dangling"}}, {"key": "lfsFile", "value": absent}]
    response = request("POST", f"/api/models/{REPO}/commit/main", body=lines)
    assert response.status_code == 400 and "does not exist" in response.json()["error"]
    # Nor is anything taken that was not asked about, or that is not what was said.
    assert request("PUT", f"/lfs/{REPO}/{'0' * 64}").status_code == 403
    assert len(pushed.commits(REPO)) == 2


# ---- references


def test_a_tag_keeps_what_it_named_after_main_moved_on(pushed, api):
    tagged = pushed.refs(REPO)["refs/heads/main"]
    api.create_tag(REPO, tag="v1.0", tag_message="first")
    api.upload_file(repo_id=REPO, path_or_fileobj=b'{"moved": "on"}', path_in_repo="config.json")
    for revision in ("v1.0", tagged):
        assert Path(hf_hub_download(REPO, "config.json", revision=revision)).read_bytes() != b'{"moved": "on"}'
        assert api.model_info(REPO, revision=revision).sha == tagged
    assert Path(hf_hub_download(REPO, "config.json")).read_bytes() == b'{"moved": "on"}'
    with pytest.raises(errors.HfHubHTTPError) as raised:
        api.create_tag(REPO, tag="v1.0")
    assert status_of(raised) == 409
    api.create_tag(REPO, tag="v1.0", exist_ok=True)
    api.delete_tag(REPO, tag="v1.0")
    with pytest.raises(errors.RevisionNotFoundError):
        api.delete_tag(REPO, tag="v1.0")


def test_branches_move_apart(pushed, api):
    api.create_branch(REPO, branch="step/100")
    api.upload_file(repo_id=REPO, path_or_fileobj=b"x", path_in_repo="x.txt", revision="step/100")
    assert "x.txt" in pushed.files(REPO, "step/100") and "x.txt" not in pushed.files(REPO)
    assert Path(hf_hub_download(REPO, "x.txt", revision="step/100")).read_bytes() == b"x"
    assert {branch.name for branch in api.list_repo_refs(REPO).branches} == {"main", "step/100"}
    with pytest.raises(errors.HfHubHTTPError) as raised:
        api.create_branch(REPO, branch="step/100")
    assert status_of(raised) == 409
    api.delete_branch(REPO, branch="step/100")
    assert pushed.refs(REPO).keys() == {"refs/heads/main"}


def test_anyone_with_a_write_token_may_open_a_pull_request(pushed, api):
    main = pushed.refs(REPO)["refs/heads/main"]
    operations = [add("fix.txt", b"fix"), add("fix.safetensors", b"weights")]
    made = api.create_commit(REPO, operations, commit_message="Fix", create_pr=True, token=OTHER)
    assert (made.pr_num, made.pr_revision) == (1, "refs/pr/1")
    assert pushed.refs(REPO) == {"refs/heads/main": main, "refs/pr/1": made.oid}
    assert Path(hf_hub_download(REPO, "fix.safetensors", revision="refs/pr/1")).read_bytes() == b"weights"
    api.upload_file(repo_id=REPO, path_or_fileobj=b"2", path_in_repo="2.txt", revision="refs/pr/1", token=OTHER)
    assert [commit.author for commit in pushed.commits(REPO, "refs/pr/1")[:2]] == ["other-user"] * 2
    assert [pr.ref for pr in api.list_repo_refs(REPO, include_pull_requests=True).pull_requests] == ["refs/pr/1"]


# ---- accounts and refusals


def test_who_one_is(hub, monkeypatch):
    assert whoami()["name"] == "writer-user"
    assert whoami(token=READER)["auth"]["accessToken"]["role"] == "read"
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(errors.LocalTokenNotFoundError):
        whoami()


@pytest.mark.parametrize("token, status", [(READER, 403), (OTHER, 403), ("hf_nobody", 401), (False, 401)])
def test_writing_takes_a_write_token_of_the_owner(pushed, api, token, status):
    before, sent = pushed.refs(REPO), pushed.bytes_uploaded()
    attempts = [
        lambda: api.upload_file(repo_id=REPO, path_or_fileobj=b"x", path_in_repo="x.safetensors", token=token),
        lambda: api.create_branch(REPO, branch="mine", token=token),
        lambda: api.create_tag(REPO, tag="mine", token=token),
        lambda: api.create_repo("writer-user/another", token=token),
        lambda: api.delete_repo(REPO, token=token),
    ]
    for attempt in attempts:
        with pytest.raises(errors.HfHubHTTPError) as raised:
            attempt()
        assert status_of(raised) == status
    assert pushed.refs(REPO) == before and pushed.bytes_uploaded() == sent


def test_what_is_not_there_has_the_clients_own_exceptions(pushed, api):
    with pytest.raises(errors.RepositoryNotFoundError):
        api.model_info("writer-user/absent")
    with pytest.raises(errors.RepositoryNotFoundError):
        api.upload_file(repo_id="writer-user/absent", path_or_fileobj=b"", path_in_repo="x")
    with pytest.raises(errors.RevisionNotFoundError):
        api.model_info(REPO, revision="absent")
    with pytest.raises(errors.RevisionNotFoundError):
        api.upload_file(repo_id=REPO, path_or_fileobj=b"", path_in_repo="x", revision="absent")
    with pytest.raises(errors.RemoteEntryNotFoundError) as raised:
        hf_hub_download(REPO, "absent.json")
    assert raised.value.response.headers["X-Repo-Commit"] == pushed.refs(REPO)["refs/heads/main"]
    assert not api.repo_exists("writer-user/absent") and not api.file_exists(REPO, "absent.json")
    with pytest.raises(errors.HfHubHTTPError, match="Not an endpoint") as raised:
        api.get_repo_discussions(REPO).__next__()
    assert status_of(raised) == 404


def test_repositories_are_created_once_and_deleted(hub, api):
    assert api.create_repo(REPO).repo_id == REPO
    with pytest.raises(errors.HfHubHTTPError, match="already created") as raised:
        api.create_repo("model")
    assert status_of(raised) == 409
    assert api.create_repo(REPO, exist_ok=True).repo_id == REPO
    api.delete_repo(REPO)
    with pytest.raises(errors.RepositoryNotFoundError):
        api.delete_repo(REPO)
    api.delete_repo(REPO, missing_ok=True)


def test_a_private_repository_is_there_for_its_owner_alone(hub, api):
    api.create_repo(REPO, private=True)
    assert api.model_info(REPO).private and api.model_info(REPO, token=READER).private
    for token, status in ((OTHER, 404), (False, 401)):
        with pytest.raises(errors.RepositoryNotFoundError) as raised:
            api.model_info(REPO, token=token)
        assert status_of(raised) == status
        with pytest.raises(errors.RepositoryNotFoundError):
            hf_hub_download(REPO, ".gitattributes", token=token)


def test_an_organization_is_written_to_by_its_members(hub):
    with HubServer({"hf_a": Account("a", organizations=("lab",)), "hf_b": "b"}) as server:
        api = HfApi(endpoint=server.endpoint)
        api.create_repo("lab/model", token="hf_a")
        with pytest.raises(errors.HfHubHTTPError, match="'lab'"):
            api.create_repo("lab/other", token="hf_b")
        assert server.refs("lab/model").keys() == {"refs/heads/main"}


# ---- cards


@pytest.mark.parametrize("metadata", ["license: my-own", "tags: [1]", "- a\n- list", "license: ["])
def test_cards_are_validated(hub, api, metadata):
    api.create_repo(REPO)
    card = f"---\n{metadata}\n---\n# A model\n"
    with pytest.raises(ValueError, match="Invalid metadata in README.md"):
        api.upload_file(repo_id=REPO, path_or_fileobj=card.encode(), path_in_repo="README.md")
    # The commit itself is checked too, for a client that does not ask first.
    content = base64.b64encode(card.encode()).decode()
    lines = [{"key": "header", "value": {"summary": "bad"}}]
    lines += [{"key": "file", "value": {"path": "README.md", "content": content}}]
    response = request("POST", f"/api/models/{REPO}/commit/main", body=lines)
    assert response.status_code == 400 and "Invalid metadata" in response.json()["error"]


def test_a_card_validates_itself(hub, api):
    ModelCard(CARD).validate()
    with pytest.raises(ValueError, match="license"):
        ModelCard(CARD.replace("mit", "my-own")).validate()
    api.create_repo(REPO)
    with pytest.warns(UserWarning, match="empty or missing yaml"):
        api.upload_file(repo_id=REPO, path_or_fileobj=b"# None", path_in_repo="README.md")


def test_the_card_shows_in_the_model_info(pushed, api):
    info = api.model_info(REPO, files_metadata=True)
    assert info.tags == ["moe", "license:mit"] and info.card_data.license == "mit"
    sizes = {sibling.rfilename: (sibling.size, sibling.lfs is not None) for sibling in info.siblings}
    assert sizes["model-1.safetensors"] == (len(WEIGHTS), True) and not sizes["config.json"][1]


# ---- pulling


def test_trees_and_paths(pushed, api):
    assert {entry.path for entry in api.list_repo_tree(REPO)} >= {"code", "config.json"}
    everything = {entry.path: entry for entry in api.list_repo_tree(REPO, recursive=True)}
    assert everything["model-1.safetensors"].lfs.sha256 == sha256_of(pushed, "model-1.safetensors")
    assert [entry.path for entry in api.list_repo_tree(REPO, "code")] == ["code/modeling.py"]
    with pytest.raises(errors.RemoteEntryNotFoundError):
        list(api.list_repo_tree(REPO, "absent"))
    assert [entry.path for entry in api.get_paths_info(REPO, ["config.json", "absent", "code"])] == [
        "config.json",
        "code",
    ]


def test_a_snapshot_is_read_again_from_the_cache_offline(pushed, folder, monkeypatch):
    with pytest.raises(errors.LocalEntryNotFoundError):
        snapshot_download(REPO, local_files_only=True)
    path = snapshot_download(REPO)
    assert contents(Path(path)) == pushed.files(REPO)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    seen = len(pushed.requests)
    assert snapshot_download(REPO) == path
    with pytest.raises(errors.OfflineModeIsEnabled):
        HfApi().model_info(REPO)
    assert len(pushed.requests) == seen


def test_ranges(pushed):
    for wanted, expected in (("2-4", WEIGHTS[2:5]), ("100-", WEIGHTS[100:]), ("-3", WEIGHTS[-3:])):
        response = request("GET", f"/{REPO}/resolve/main/model-1.safetensors", headers={"Range": f"bytes={wanted}"})
        assert response.status_code == 206 and response.content == expected
    beyond = request("GET", f"/{REPO}/resolve/main/config.json", headers={"Range": "bytes=1000-"})
    assert beyond.status_code == 416


# ---- faults


def test_a_cut_upload_is_taken_up_with_the_missing_object_alone(hub, api, folder):
    api.create_repo(REPO)
    missing = folder / "model-2.safetensors"
    sha256 = add("x", missing.read_bytes()).upload_info.sha256.hex()
    hub.cut(f"/lfs/.*{sha256}", after_bytes=70_000, times=100)
    with pytest.raises(RuntimeError, match=r"Error while uploading 'model-2.safetensors'"):
        api.upload_folder(repo_id=REPO, folder_path=folder)
    cut = [seen for seen in hub.requests if sha256 in seen.path]
    assert len(cut) == 6 and all(seen.status is None and 70_000 <= seen.received < len(WEIGHTS) for seen in cut)
    assert len(hub.commits(REPO)) == 1 and hub.bytes_uploaded() == len(WEIGHTS)

    hub.heal()
    hub.requests.clear()
    api.upload_folder(repo_id=REPO, folder_path=folder)
    assert [path.split("/")[-1] for path in hub.paths("PUT")] == [sha256]
    assert hub.files(REPO)["model-2.safetensors"] == missing.read_bytes()


def test_a_cut_download_is_tried_again(pushed):
    pushed.cut("/resolve/.*model-1", after_bytes=100_000)
    assert Path(hf_hub_download(REPO, "model-1.safetensors")).read_bytes() == WEIGHTS
    tries = [seen.status for seen in pushed.requests if seen.method == "GET" and "model-1" in seen.path]
    assert tries[0] is None and tries[1:] in ([206], [200])


def test_failures_of_the_server_are_tried_again_or_raised(pushed, api):
    pushed.fail("/lfs/", 500, times=2, method="PUT")
    api.upload_file(repo_id=REPO, path_or_fileobj=b"a", path_in_repo="a.safetensors")
    assert [seen.status for seen in pushed.requests if seen.method == "PUT"][-3:] == [500, 500, 200]
    # A commit is not tried again: it may have been made.
    pushed.fail("/commit/main", 503, message="Down for maintenance")
    with pytest.raises(errors.HfHubHTTPError, match="Down for maintenance") as raised:
        api.upload_file(repo_id=REPO, path_or_fileobj=b"b", path_in_repo="b.txt")
    assert status_of(raised) == 503 and "b.txt" not in pushed.files(REPO)
    pushed.fail("/api/models", 404, code="RevisionNotFound")
    with pytest.raises(errors.RevisionNotFoundError):
        api.model_info(REPO)


def test_a_commit_whose_reply_is_lost_is_not_made_twice(pushed, api):
    pushed.lose_reply("/commit/main")
    upload = {"repo_id": REPO, "path_or_fileobj": b"a", "path_in_repo": "a.txt"}
    with pytest.raises(Exception, match="disconnected|closed|reset"):
        api.upload_file(**upload)
    assert "a.txt" in pushed.files(REPO)
    api.upload_file(**upload)
    assert len(pushed.commits(REPO)) == 3


def test_a_file_that_changes_during_its_upload_is_refused(hub, api, folder):
    api.create_repo(REPO)
    hub.after("objects/batch", lambda: (folder / "model-1.safetensors").write_bytes(WEIGHTS[1:] + b"!"))
    with pytest.raises(RuntimeError, match="model-1") as raised:
        api.upload_folder(repo_id=REPO, folder_path=folder)
    assert isinstance(raised.value.__cause__, errors.BadRequestError)


def test_somebody_may_commit_in_between(pushed, api):
    pushed.after("/commit/main", lambda: pushed.add_commit(REPO, {"theirs.txt": b"1"}, deleted=["config.json"]))
    api.upload_file(repo_id=REPO, path_or_fileobj=b"2", path_in_repo="ours.txt")
    assert {"theirs.txt", "ours.txt"} <= pushed.files(REPO).keys() and "config.json" not in pushed.files(REPO)


def test_an_error_in_a_callback_is_the_answer(pushed, api):
    pushed.after("/refs", lambda: 1 / 0)
    with pytest.raises(errors.HfHubHTTPError, match="ZeroDivisionError"):
        api.list_repo_refs(REPO)


def test_a_slow_server_runs_into_the_clients_patience(pushed, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.1)
    pushed.delay("/resolve/", seconds=30, method="HEAD")
    assert Path(hf_hub_download(REPO, "config.json")).exists()
    assert len(pushed.paths("HEAD")) == 2


# ---- remote code, and other processes


@pytest.mark.parametrize("value", [1, 2])
def test_remote_code_is_this_tests_own(hub, value):
    code = {"thing.py": b"from .other import VALUE\nclass Thing:\n    value = VALUE\n"}
    hub.add_commit(REPO, {**code, "other.py": b"VALUE = %d\n" % value})
    assert get_class_from_dynamic_module("thing.Thing", REPO).value == value


def test_no_request_leaves_this_machine(hub):
    assert get_session().get("https://huggingface.co/api/whoami-v2").status_code == 401
    assert hub.paths("GET") == ["/api/whoami-v2"]
    with pytest.raises(AssertionError, match="must not reach"):
        get_session().get("https://example.com")


def test_a_subprocess_talks_to_it(pushed, tmp_path):
    script = f"from huggingface_hub import *; print(whoami()['name'], hf_hub_download({REPO!r}, 'config.json'))"
    environment = pushed.environment(tmp_path / "home")
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    name, path = done.stdout.split()
    assert name == "writer-user" and path.startswith(str(tmp_path / "home"))
