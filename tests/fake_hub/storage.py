"""What the loopback Hub remembers: accounts, repositories, commits, references, large objects. In memory, without HTTP.

`hub_api.py` puts the Hub's endpoints over it, `hub_server.py` serves them. Messages of errors are the real Hub's where
the client shows them to people or decides by them.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from typing import Literal

LFS_SUFFIXES = (".safetensors", ".bin", ".png")
LARGEST_REGULAR_BYTES = 1_000_000  # the real Hub's limit is 10 MB; tests should not need files of that size
FIRST_FILES = {".gitattributes": "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES)}


class HubError(Exception):
    """An answer other than success: the status, the message shown to people, and what goes into X-Error-Code."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: Mapping[str, str] | None = None):
        super().__init__(f"{status} {code}: {message}")
        self.status, self.message, self.code, self.headers = status, message, code, dict(headers or {})


@dataclass(frozen=True)
class Account:
    """Who a token belongs to. A `read` token sees what its owner sees and writes nothing."""

    name: str
    role: Literal["read", "write"] = "write"
    organizations: tuple[str, ...] = ()

    def owns(self, repo_id: str) -> bool:
        return repo_id.split("/")[0] in (self.name, *self.organizations)


@dataclass(frozen=True)
class StoredFile:
    content: bytes
    lfs: bool

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @cached_property
    def pointer(self) -> bytes:
        """What git holds of a large file."""
        oid, size = self.sha256, len(self.content)
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {size}\n".encode()

    @cached_property
    def git_oid(self) -> str:
        blob = self.pointer if self.lfs else self.content
        return hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest()

    @property
    def etag(self) -> str:
        """What the client compares a local file with: the sha256 of a large file, git's oid of a regular one."""
        return self.sha256 if self.lfs else self.git_oid


@dataclass(frozen=True)
class Commit:
    sha: str
    parent: str | None
    title: str
    description: str
    author: str
    date: str
    files: dict[str, StoredFile] = field(repr=False)


def upload_mode(path: str, size: int) -> Literal["lfs", "regular"]:
    return "lfs" if path.endswith(LFS_SUFFIXES) or size > LARGEST_REGULAR_BYTES else "regular"


class Repository:
    """One model repository: commits by sha, references to them, and the large objects that commits may point to."""

    def __init__(self, repo_id: str, author: str, private: bool = False):
        self.repo_id = repo_id
        self.private = private
        self.commits: dict[str, Commit] = {}
        self.refs: dict[str, str] = {}
        self.lfs_objects: dict[str, bytes] = {}
        self.pull_request_authors: dict[str, str] = {}
        files = {path: StoredFile(text.encode(), lfs=False) for path, text in FIRST_FILES.items()}
        self.refs["refs/heads/main"] = self.record(None, files, "initial commit", "", author).sha

    def record(
        self, parent: str | None, files: dict[str, StoredFile], title: str, description: str, author: str
    ) -> Commit:
        """Store a commit under its sha. References are the caller's to move."""
        date = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"
        etags = {path: file.etag for path, file in sorted(files.items())}
        # The count tells apart commits that are equal within a millisecond.
        identity = [parent, title, description, author, date, etags, len(self.commits)]
        sha = hashlib.sha1(json.dumps(identity).encode()).hexdigest()
        self.commits[sha] = Commit(sha, parent, title, description, author, date, dict(files))
        return self.commits[sha]

    def find_ref(self, revision: str) -> str | None:
        """The full name of the reference that a revision names: as given, then as branch, then as tag."""
        names = (revision, f"refs/heads/{revision}", f"refs/tags/{revision}")
        return next((name for name in names if name in self.refs), None)

    def resolve(self, revision: str) -> Commit:
        """The commit of a sha, branch, tag or refs/pr/N."""
        name = self.find_ref(revision)
        sha = self.refs[name] if name else revision
        if sha not in self.commits:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[sha]

    def history(self, revision: str) -> list[Commit]:
        """Commits from the revision's back to the first."""
        commits = [self.resolve(revision)]
        while commits[-1].parent is not None:
            commits.append(self.commits[commits[-1].parent])
        return commits

    def add_ref(self, name: str, revision: str) -> None:
        if name in self.refs:
            raise HubError(409, f"Reference already exists: {name}")
        self.refs[name] = self.resolve(revision).sha

    def delete_ref(self, name: str) -> None:
        if name not in self.refs:
            raise HubError(404, f"Reference does not exist: {name}", "RevisionNotFound")
        if name == "refs/heads/main":
            raise HubError(403, "Cannot delete the default branch")
        del self.refs[name]

    def base_of(self, revision: str, parent: str | None, create_pr: bool) -> Commit:
        """What a commit to a revision builds on; `parent` is the commit that its author takes for the newest."""
        if create_pr:
            return self.resolve(parent or revision)
        name = self.find_ref(revision)
        if name is None or name.startswith("refs/tags/"):
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        if parent and not self.refs[name].startswith(parent):
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        return self.resolve(revision)

    def commit(
        self, base: Commit, revision: str, header: dict, files: dict[str, StoredFile], author: str, create_pr: bool
    ) -> str:
        """Move a branch, or with `create_pr` open a pull request; returns the full name of the reference.

        `header` is the first line of the request, with summary and description.
        """
        if create_pr:
            name = f"refs/pr/{len(self.pull_request_authors) + 1}"
            self.pull_request_authors[name] = author
        else:
            name = self.find_ref(revision)
        self.refs[name] = self.record(base.sha, files, header["summary"], header.get("description", ""), author).sha
        return name

    def apply(self, base: Commit, operations: Iterable[dict]) -> tuple[dict[str, StoredFile], int]:
        """The files after the operations of a commit, and how many bytes of content were in the request itself."""
        files, received = dict(base.files), 0
        for operation in operations:
            kind, value = operation["key"], operation["value"]
            path = value["path"]
            if kind == "file":
                content = base64.b64decode(value["content"])
                received += len(content)
                files[path] = StoredFile(content, lfs=False)
            elif kind == "lfsFile":
                if value["oid"] not in self.lfs_objects:
                    raise HubError(400, f"LFS pointer pointed to a file that does not exist: {path}")
                files[path] = StoredFile(self.lfs_objects[value["oid"]], lfs=True)
            elif kind in ("deletedFile", "deletedFolder"):
                folder = path.rstrip("/") + "/"
                gone = [name for name in files if (name == path if kind == "deletedFile" else name.startswith(folder))]
                if not gone:
                    raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
                for name in gone:
                    del files[name]
            else:
                raise HubError(400, f"Unknown operation: {kind}")
        return files, received


class Store:
    """Everything on the Hub. Requests come in threads: `lock` is held while one is answered."""

    def __init__(self, tokens: Mapping[str, Account]):
        self.tokens = dict(tokens)
        self.repositories: dict[str, Repository] = {}
        self.upload_grants: set[tuple[str, str]] = set()
        self.bytes_uploaded = 0
        self.lock = threading.RLock()

    def repository(self, repo_id: str) -> Repository:
        if repo_id not in self.repositories:
            raise HubError(404, "Repository not found", "RepoNotFound")
        return self.repositories[repo_id]

    def create(self, repo_id: str, author: str, private: bool = False) -> Repository:
        self.repositories[repo_id] = Repository(repo_id, author, private)
        return self.repositories[repo_id]

    def add_commit(
        self, repo_id: str, files: Mapping[str, bytes], deleted: Iterable[str], message: str, revision: str
    ) -> str:
        """A commit that arrives by another way than this server: somebody else's push. Returns its sha."""
        author = repo_id.split("/")[0]
        repository = self.repositories.get(repo_id) or self.create(repo_id, author)
        base = repository.base_of(revision, None, create_pr=False)
        merged = dict(base.files)
        for path, content in files.items():
            stored = StoredFile(content, lfs=upload_mode(path, len(content)) == "lfs")
            merged[path] = stored
            if stored.lfs:
                repository.lfs_objects[stored.sha256] = content
        for path in deleted:
            del merged[path]
        return repository.refs[repository.commit(base, revision, {"summary": message}, merged, author, create_pr=False)]
