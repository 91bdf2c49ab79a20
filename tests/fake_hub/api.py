"""The endpoints of the Hub that the client calls for models, over `hub_storage.py`: a Call in, a Reply out or a HubError.

Left out: datasets and spaces, Xet, multipart uploads, pagination, merging of pull requests. An unknown path is a 404
without a code, so that a test which needs more of the Hub fails with the path it asked for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, quote, unquote

import yaml

from tests.fake_hub.storage import Account, Commit, HubError, Repository, Store, StoredFile, upload_mode

# A few of the several hundred that the Hub knows.
LICENSES = {"apache-2.0", "bsd-3-clause", "cc-by-4.0", "gpl-3.0", "mit", "openrail", "other", "unknown", "unlicense"}
REPO_NAME = re.compile(r"[\w.-]+/[\w.-]+")
YAML_BLOCK = re.compile(r"^\s*---[\r\n]+([\S\s]*?)[\r\n]+---(\r\n|\n|$)")


@dataclass
class Call:
    """One request, already received; `path` is as sent (quoted), `parts` are the unquoted groups of its route."""

    method: str
    path: str
    query: dict[str, list[str]]
    headers: Any
    body: bytes
    account: Account | None
    endpoint: str
    parts: dict[str, str] = field(default_factory=dict)

    @property
    def json(self) -> dict:
        return json.loads(self.body or b"{}")

    @property
    def creates_pull_request(self) -> bool:
        return self.query.get("create_pr") == ["1"]


@dataclass
class Reply:
    body: bytes | list | dict = field(default_factory=dict)
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


# ---- who may do what


def authenticate(store: Store, authorization: str | None) -> Account | None:
    """The account of an Authorization header; a token that is not known is refused whatever it asks for."""
    if not authorization:
        return None
    account = store.tokens.get(authorization.removeprefix("Bearer "))
    if account is None:
        raise HubError(401, "Invalid credentials in Authorization header")
    return account


def anonymous_refused(call: Call) -> HubError:
    """401 for a request without a token. For paths of a repository the client makes RepositoryNotFoundError of it,
    which it recognises on the real Hub by the https address; here the code has to say so."""
    about_repository = call.path.startswith("/api/models/") or "/resolve/" in call.path
    return HubError(401, "Invalid username or password.", "RepoNotFound" if about_repository else None)


def readable(store: Store, call: Call) -> Repository:
    """The call's repository. One that the caller may not see is answered like one that is not there."""
    repository = store.repositories.get(call.parts["repo"])
    if repository and (not repository.private or (call.account and call.account.owns(repository.repo_id))):
        return repository
    if call.account is None:
        raise anonymous_refused(call)
    raise HubError(404, "Repository not found", "RepoNotFound")


def require_write(call: Call, repo_id: str, for_anyone: bool = False) -> Account:
    """The caller's account, if its token may write there; `for_anyone` asks for a write token of whichever account."""
    if call.account is None:
        raise anonymous_refused(call)
    if call.account.role != "write":
        raise HubError(403, "Forbidden: you must use a write token to upload to a repository.")
    if not for_anyone and not call.account.owns(repo_id):
        namespace = repo_id.split("/")[0]
        raise HubError(403, f"You don't have the required permissions under the namespace {namespace!r}.")
    return call.account


def writable(store: Store, call: Call, revision: str | None = None) -> tuple[Repository, Account]:
    """The call's repository and who writes to it: its owners, or anyone in a pull request of their own."""
    repository = readable(store, call)
    open_to_all = call.creates_pull_request
    if call.account and revision in repository.pull_request_authors:
        open_to_all = repository.pull_request_authors[revision] == call.account.name
    return repository, require_write(call, repository.repo_id, for_anyone=open_to_all)


# ---- accounts, repositories, cards


def whoami(store: Store, call: Call) -> Reply:
    if call.account is None:
        raise anonymous_refused(call)
    organizations = [{"type": "org", "name": name} for name in call.account.organizations]
    token = {"displayName": "tests", "role": call.account.role}
    auth = {"type": "access_token", "accessToken": token}
    return Reply(
        {"type": "user", "name": call.account.name, "fullname": call.account.name, "orgs": organizations, "auth": auth}
    )


def requested_repo(call: Call) -> str:
    """The repository that a create or delete names; without an organization it is the caller's own."""
    if call.account is None:
        raise anonymous_refused(call)
    repo_id = f"{call.json.get('organization') or call.account.name}/{call.json['name']}"
    if not REPO_NAME.fullmatch(repo_id) or call.json.get("type", "model") != "model":
        raise HubError(400, f"Not a model's name: {repo_id}")
    return repo_id


def create_repo(store: Store, call: Call) -> Reply:
    repo_id = requested_repo(call)
    account = require_write(call, repo_id)
    url = f"{call.endpoint}/{repo_id}"
    if repo_id in store.repositories:
        # With exist_ok the client takes the address from the refusal.
        return Reply({"error": "You already created this model repo", "url": url}, status=409)
    private = call.json.get("private") or call.json.get("visibility") == "private"
    store.create(repo_id, account.name, bool(private))
    return Reply({"url": url, "name": repo_id, "id": repo_id})


def delete_repo(store: Store, call: Call) -> Reply:
    repo_id = requested_repo(call)
    store.repository(repo_id)
    require_write(call, repo_id)
    del store.repositories[repo_id]
    return Reply()


def read_card(text: str) -> tuple[dict, list[str], list[str]]:
    """Metadata, errors and warnings of a README.md: a small part of the Hub's own checks."""
    block = YAML_BLOCK.search(text)
    if block is None:
        return {}, [], ["empty or missing yaml metadata in repo card"]
    try:
        metadata = yaml.safe_load(block[1])
    except yaml.YAMLError as error:
        return {}, [f"invalid yaml: {' '.join(str(error).split())}"], []
    if not isinstance(metadata, dict):
        return {}, ["metadata must be a mapping"], []
    errors = []
    licenses = metadata.get("license", [])
    for license_name in licenses if isinstance(licenses, list) else [licenses]:
        if license_name not in LICENSES:
            errors.append(f'"license" must be one of {sorted(LICENSES)}, not {license_name!r}')
    for key in ("tags", "datasets", "language"):
        values = metadata.get(key, [])
        if not all(isinstance(value, str) for value in (values if isinstance(values, list) else [values])):
            errors.append(f'"{key}" must be a string or a list of strings')
    return metadata, errors, []


def validate_yaml(store: Store, call: Call) -> Reply:
    _, errors, warnings = read_card(call.json["content"])
    body = {name: [{"message": text} for text in texts] for name, texts in (("errors", errors), ("warnings", warnings))}
    return Reply(body, status=400 if errors else 200)


# ---- reading


def file_entry(path: str, file: StoredFile) -> dict:
    entry = {"type": "file", "path": path, "size": len(file.content), "oid": file.git_oid}
    if file.lfs:
        entry["lfs"] = {"oid": file.sha256, "size": len(file.content), "pointerSize": len(file.pointer)}
    return entry


def sibling(path: str, file: StoredFile, with_blobs: bool) -> dict:
    if not with_blobs:
        return {"rfilename": path}
    entry = file_entry(path, file)
    described = {"rfilename": path, "size": entry["size"], "blobId": entry["oid"]}
    if file.lfs:
        described["lfs"] = {**entry["lfs"], "sha256": file.sha256}
    return described


def model_info(store: Store, call: Call) -> Reply:
    repository = readable(store, call)
    commit = repository.resolve(call.parts.get("revision", "main"))
    first = repository.history("main")[-1]
    readme = commit.files.get("README.md")
    card, _, _ = read_card(readme.content.decode()) if readme else ({}, [], [])
    tags = card.get("tags") or []
    tags = [*tags, f"license:{card['license']}"] if "license" in card else tags
    with_blobs = "blobs" in call.query
    info = {
        "id": repository.repo_id,
        "modelId": repository.repo_id,
        "author": repository.repo_id.split("/")[0],
        "sha": commit.sha,
        "private": repository.private,
        "gated": False,
        "disabled": False,
        "tags": tags,
        "downloads": 0,
        "likes": 0,
        "createdAt": first.date,
        "lastModified": commit.date,
        "siblings": [sibling(path, file, with_blobs) for path, file in sorted(commit.files.items())],
    }
    info |= {key: card[key] for key in ("pipeline_tag", "library_name") if key in card}
    return Reply({**info, "cardData": card} if card else info)


def folders_of(files: dict[str, StoredFile]) -> set[str]:
    return {"/".join(path.split("/")[:depth]) for path in files for depth in range(1, path.count("/") + 1)}


def path_entries(commit: Commit, paths: list[str]) -> list[dict]:
    """Entries of files and folders by name; what is not there is left out."""
    folders = folders_of(commit.files)
    entries = [file_entry(path, commit.files[path]) for path in paths if path in commit.files]
    # The client wants an oid of a folder and does nothing with it.
    return entries + [
        {"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in paths if path in folders
    ]


def tree(store: Store, call: Call) -> Reply:
    commit = readable(store, call).resolve(call.parts["revision"])
    folder = call.parts.get("path", "").strip("/")
    prefix = f"{folder}/" if folder else ""
    paths = sorted(path for path in {*commit.files, *folders_of(commit.files)} if path.startswith(prefix))
    if folder and not paths:
        raise HubError(404, f"{folder} does not exist on {call.parts['revision']!r}", "EntryNotFound")
    if call.query.get("recursive", ["false"])[0].lower() != "true":
        paths = [path for path in paths if "/" not in path.removeprefix(prefix)]
    return Reply(path_entries(commit, paths))


def paths_info(store: Store, call: Call) -> Reply:
    commit = readable(store, call).resolve(call.parts["revision"])
    return Reply(path_entries(commit, parse_qs(call.body.decode()).get("paths", [])))


def refs(store: Store, call: Call) -> Reply:
    kinds = {"branches": "refs/heads/", "tags": "refs/tags/", "pullRequests": "refs/pr/"}
    if "include_prs" not in call.query:
        del kinds["pullRequests"]
    repository = readable(store, call)
    found: dict[str, list] = {"converts": []}
    for kind, prefix in kinds.items():
        named = {ref: sha for ref, sha in repository.refs.items() if ref.startswith(prefix)}
        # Pull requests go by their number.
        found[kind] = [
            {"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": sha} for ref, sha in named.items()
        ]
    return Reply(found)


def commits(store: Store, call: Call) -> Reply:
    history = readable(store, call).history(call.parts["revision"])
    return Reply(
        [
            {
                "id": commit.sha,
                "title": commit.title,
                "message": commit.description,
                "authors": [{"user": commit.author}],
                "date": commit.date,
            }
            for commit in history
        ]
    )


def resolve(store: Store, call: Call) -> Reply:
    """A file's bytes, or the part that Range asks for. HEAD is answered alike, without them."""
    commit = readable(store, call).resolve(call.parts["revision"])
    headers = {"X-Repo-Commit": commit.sha}
    if call.parts["path"] not in commit.files:
        raise HubError(404, "Entry not found", "EntryNotFound", headers)
    file = commit.files[call.parts["path"]]
    size = len(file.content)
    headers |= {"ETag": f'"{file.etag}"', "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
    if file.lfs:
        headers |= {"X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": str(size)}
    wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", call.headers.get("Range") or "")
    if wanted is None or wanted.groups() == ("", ""):
        return Reply(file.content, headers=headers)
    first, last = wanted.groups()
    start = int(first) if first else max(size - int(last), 0)
    stop = min(int(last) + 1, size) if first and last else size
    if start >= stop:
        raise HubError(416, "Range not satisfiable", headers={**headers, "Content-Range": f"bytes */{size}"})
    headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
    return Reply(file.content[start:stop], status=206, headers=headers)


# ---- writing


def preupload(store: Store, call: Call) -> Reply:
    """How each file is to be sent, and the etag of what stands in its place: equal ones are not committed again."""
    repository, _ = writable(store, call, call.parts["revision"])
    present = repository.resolve(call.parts["revision"]).files
    answers = []
    for wanted in call.json["files"]:
        path = wanted["path"]
        answer = {"path": path, "uploadMode": upload_mode(path, wanted["size"]), "shouldIgnore": False}
        answers.append({**answer, "oid": present[path].etag} if path in present else answer)
    return Reply({"files": answers})


def lfs_batch(store: Store, call: Call) -> Reply:
    """Where to send large objects: no address for one that the repository has."""
    repository = readable(store, call)
    # Without a ref the objects are for a pull request, which anyone may open.
    require_write(call, repository.repo_id, for_anyone="ref" not in call.json)
    answers = []
    for wanted in call.json["objects"]:
        oid, answer = wanted["oid"], {"oid": wanted["oid"], "size": wanted["size"], "authenticated": True}
        if oid not in repository.lfs_objects:
            store.upload_grants.add((repository.repo_id, oid))
            address = f"{quote(repository.repo_id)}/{oid}"
            answer["actions"] = {
                "upload": {"href": f"{call.endpoint}/lfs/{address}", "header": {}},
                "verify": {"href": f"{call.endpoint}/lfs-verify/{address}", "header": {}},
            }
        answers.append(answer)
    return Reply({"transfer": "basic", "objects": answers}, headers={"Content-Type": "application/vnd.git-lfs+json"})


def lfs_put(store: Store, call: Call) -> Reply:
    """An upload to an address that `lfs_batch` gave: like a signed address of object storage it needs no token."""
    if (call.parts["repo"], call.parts["oid"]) not in store.upload_grants:
        raise HubError(403, "Access denied: this address was not given out")
    uploaded = StoredFile(call.body, lfs=True)
    if uploaded.sha256 != call.parts["oid"]:
        raise HubError(400, "The provided content does not match its sha256")
    store.repository(call.parts["repo"]).lfs_objects[uploaded.sha256] = call.body
    store.bytes_uploaded += len(call.body)
    return Reply()


def lfs_verify(store: Store, call: Call) -> Reply:
    content = store.repository(call.parts["repo"]).lfs_objects.get(call.parts["oid"])
    if content is None or len(content) != call.json["size"]:
        raise HubError(404, "Object not found, or not of this size")
    return Reply()


def commit(store: Store, call: Call) -> Reply:
    revision = call.parts["revision"]
    repository, account = writable(store, call, revision)
    header, *operations = [json.loads(line) for line in call.body.splitlines() if line.strip()]
    base = repository.base_of(revision, header["value"].get("parentCommit"), call.creates_pull_request)
    files, received = repository.apply(base, operations)
    if (readme := files.get("README.md")) and readme != base.files.get("README.md"):
        _, errors, _ = read_card(readme.content.decode())
        if errors:
            raise HubError(400, "Invalid metadata in README.md. " + " ".join(errors))
    name = repository.commit(base, revision, header["value"], files, account.name, call.creates_pull_request)
    store.bytes_uploaded += received
    sha = repository.refs[name]
    url = f"{call.endpoint}/{repository.repo_id}"
    answer = {"success": True, "commitOid": sha, "commitUrl": f"{url}/commit/{sha}", "hookOutput": ""}
    if call.creates_pull_request:
        answer["pullRequestUrl"] = f"{url}/discussions/{name.removeprefix('refs/pr/')}"
    return Reply(answer)


def create_branch(store: Store, call: Call) -> Reply:
    repository, _ = writable(store, call)
    repository.add_ref(f"refs/heads/{call.parts['name']}", call.json.get("startingPoint", "main"))
    return Reply()


def create_tag(store: Store, call: Call) -> Reply:
    repository, _ = writable(store, call)
    repository.add_ref(f"refs/tags/{call.json['tag']}", call.parts["name"])
    return Reply()


def delete_ref(store: Store, call: Call) -> Reply:
    repository, _ = writable(store, call)
    kind = "heads" if "/branch/" in call.path else "tags"
    repository.delete_ref(f"refs/{kind}/{call.parts['name']}")
    return Reply()


# ---- routes: matched in this order on the quoted path, so that a slash inside a revision (%2F) is not one of the path's

_REPO = r"(?P<repo>[^/]+(?:/[^/]+)?)"
_REVISION = r"(?P<revision>refs/pr/\d+|[^/]+)"
_MODEL = rf"/api/models/{_REPO}"
ROUTES: list[tuple[str, str, Callable[[Store, Call], Reply]]] = [
    ("GET", "/api/whoami-v2", whoami),
    ("POST", "/api/repos/create", create_repo),
    ("DELETE", "/api/repos/delete", delete_repo),
    ("POST", "/api/validate-yaml", validate_yaml),
    ("GET", rf"{_MODEL}/tree/{_REVISION}(?P<path>/.*)?", tree),
    ("GET", rf"{_MODEL}/refs", refs),
    ("GET", rf"{_MODEL}/commits/{_REVISION}", commits),
    ("GET", rf"{_MODEL}/revision/{_REVISION}", model_info),
    ("GET", _MODEL, model_info),
    ("POST", rf"{_MODEL}/paths-info/{_REVISION}", paths_info),
    ("POST", rf"{_MODEL}/preupload/{_REVISION}", preupload),
    ("POST", rf"{_MODEL}/commit/{_REVISION}", commit),
    ("POST", rf"{_MODEL}/branch/(?P<name>[^/]+)", create_branch),
    ("POST", rf"{_MODEL}/tag/(?P<name>[^/]+)", create_tag),
    ("DELETE", rf"{_MODEL}/(?:branch|tag)/(?P<name>[^/]+)", delete_ref),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", lfs_batch),
    ("PUT", rf"/lfs/{_REPO}/(?P<oid>[0-9a-f]{{64}})", lfs_put),
    ("POST", rf"/lfs-verify/{_REPO}/(?P<oid>[0-9a-f]{{64}})", lfs_verify),
    ("GET", rf"/{_REPO}/resolve/{_REVISION}/(?P<path>.+)", resolve),
]


def answer(store: Store, call: Call) -> Reply:
    """The reply to a call, whose `parts` this fills in."""
    method = "GET" if call.method == "HEAD" else call.method
    for route_method, pattern, endpoint in ROUTES:
        if route_method == method and (match := re.fullmatch(pattern, call.path)):
            call.parts = {name: unquote(value) for name, value in match.groupdict().items() if value is not None}
            return endpoint(store, call)
    raise HubError(404, f"Not an endpoint of this server: {call.method} {call.path}")
