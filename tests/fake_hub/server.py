"""A small Hugging Face Hub on 127.0.0.1, for tests that push and pull models with the real client.

`HubServer` is the server, with what tests look into and the faults they plant; the fixture `hub` starts one and points
this process's client at it. `hub_api.py` holds the endpoints, `hub_storage.py` what is stored.

    def test_push(hub):
        HfApi().create_repo("writer-user/model")
        HfApi().upload_file(path_or_fileobj=b"{}", path_in_repo="config.json", repo_id="writer-user/model")
        assert hub.files("writer-user/model")["config.json"] == b"{}"
"""

from __future__ import annotations

import json
import os
import re
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from huggingface_hub import constants, hf_api, set_client_factory
from huggingface_hub.utils._http import default_client_factory
from transformers.utils import TRANSFORMERS_DYNAMIC_MODULE_NAME

from tests.fake_hub.api import Call, Reply, answer, authenticate
from tests.fake_hub.storage import Account, Commit, HubError, Store

WRITER, READER, OTHER = "hf_writer", "hf_reader", "hf_other"
ACCOUNTS = {WRITER: Account("writer-user"), READER: Account("writer-user", "read"), OTHER: Account("other-user")}
# Threads wait for the next request on an open connection; after this many seconds they end by themselves.
IDLE_S = 30


@dataclass
class Request:
    """One request as it came in. `status` is None where the connection was cut instead of answered."""

    method: str
    path: str
    status: int | None = None
    received: int = 0
    authorization: str | None = None


@dataclass
class Fault:
    kind: str
    pattern: re.Pattern
    method: str | None
    left: int
    value: Any


class _Cut(Exception):
    """The connection ends here, without a word."""


class HubServer:
    """The loopback Hub, a context manager. Patterns of faults are regexes searched in the path as sent (quoted, with
    its query), e.g. "/commit/main" or "/resolve/.*config.json"; a fault applies to the next `times` matching requests.
    """

    def __init__(self, tokens: Mapping[str, Account | str] = ACCOUNTS):
        accounts = {token: Account(who) if isinstance(who, str) else who for token, who in tokens.items()}
        self.store = Store(accounts)
        self.requests: list[Request] = []
        self.closing = threading.Event()
        self._faults: list[Fault] = []
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._http.hub = self
        self.endpoint = f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self) -> HubServer:
        serve = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        serve.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self._http.shutdown()
        self._http.server_close()

    # ---- looking inside

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """Contents by path, .gitattributes of the first commit included."""
        with self.store.lock:
            commit = self.store.repository(repo).resolve(revision)
            return {path: file.content for path, file in commit.files.items()}

    def commits(self, repo: str, revision: str = "main") -> list[Commit]:
        """The newest first, down to "initial commit"; each has `sha`, `title`, `description`, `author`, `files`."""
        with self.store.lock:
            return self.store.repository(repo).history(revision)

    def refs(self, repo: str) -> dict[str, str]:
        """Shas by full name: refs/heads/main, refs/tags/v1, refs/pr/1."""
        with self.store.lock:
            return dict(self.store.repository(repo).refs)

    def bytes_uploaded(self) -> int:
        """Bytes of contents that were accepted: large objects, and regular files inside commits."""
        return self.store.bytes_uploaded

    def paths(self, method: str, pattern: str = "") -> list[str]:
        """Paths of the requests so far with this method and matching this pattern."""
        return [seen.path for seen in self.requests if seen.method == method and re.search(pattern, seen.path)]

    def add_commit(
        self,
        repo: str,
        files: Mapping[str, bytes],
        deleted: Iterable[str] = (),
        message: str = "Somebody else's commit",
        revision: str = "main",
    ) -> str:
        """Commit as if from elsewhere, creating the repository if need be. Returns the sha; counts as no upload."""
        with self.store.lock:
            return self.store.add_commit(repo, files, deleted, message, revision)

    # ---- faults

    def fail(
        self,
        pattern: str,
        status: int,
        times: int = 1,
        method: str | None = None,
        code: str | None = None,
        message: str | None = None,
    ) -> None:
        """Receive matching requests in full and answer them with an error."""
        error = HubError(status, message or f"Planted failure {status}", code)
        self._plant("fail", pattern, method, times, error)

    def cut(self, pattern: str, after_bytes: int, times: int = 1, method: str | None = None) -> None:
        """Close the connection after so many bytes of the body: of a request's that has one, else of the reply's.
        A body that is no longer than that is cut at its end, before the reply."""
        self._plant("cut", pattern, method, times, after_bytes)

    def lose_reply(self, pattern: str, times: int = 1, method: str | None = None) -> None:
        """Do what a matching request asks and close the connection without telling: a commit is made all the same."""
        self._plant("lose", pattern, method, times, True)

    def delay(self, pattern: str, seconds: float, times: int = 1, method: str | None = None) -> None:
        """Wait before reading the body of a matching request."""
        self._plant("delay", pattern, method, times, seconds)

    def after(self, pattern: str, callback: Callable[[], object], times: int = 1, method: str | None = None) -> None:
        """Call `callback` in the server's thread when a matching request has arrived, before its body is read."""
        self._plant("after", pattern, method, times, callback)

    def change(self, pattern: str, change: Callable[[Reply], Reply], times: int = 1, method: str | None = None) -> None:
        """Send what `change` makes of the reply to a matching request: other bytes, other JSON, a redirect."""
        self._plant("change", pattern, method, times, change)

    def heal(self) -> None:
        """Forget the faults that have not happened yet."""
        with self.store.lock:
            self._faults.clear()

    def _plant(self, kind: str, pattern: str, method: str | None, times: int, value: Any) -> None:
        with self.store.lock:
            self._faults.append(Fault(kind, re.compile(pattern), method, times, value))

    def take_faults(self, request: Request) -> dict[str, Any]:
        """What is to happen to a request: for each kind of fault the first that is left."""
        taken: dict[str, Any] = {}
        with self.store.lock:
            for fault in self._faults:
                wanted = fault.method in (None, request.method) and fault.pattern.search(request.path)
                # A HEAD has no body to cut; it comes before every download and would use up the fault.
                meaningless = fault.kind == "cut" and request.method == "HEAD"
                if fault.left > 0 and wanted and not meaningless and fault.kind not in taken:
                    fault.left -= 1
                    taken[fault.kind] = fault.value
        return taken

    # ---- clients

    def environment(self, home: Path, token: str | None = WRITER) -> dict[str, str]:
        """The environment of a subprocess whose client talks to this server and keeps its cache in `home`."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        inherited.pop("TRANSFORMERS_OFFLINE", None)
        added = {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        added |= {"HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
        return inherited | added | ({"HF_TOKEN": token} if token else {})


class _Handler(BaseHTTPRequestHandler):
    """Receives a request, lets the planted faults happen to it, answers it by `hub_api.answer`."""

    protocol_version = "HTTP/1.1"
    timeout = IDLE_S
    # Headers and body are two writes; together with delayed acknowledgements Nagle's algorithm would cost 40 ms each time.
    disable_nagle_algorithm = True

    def _serve(self) -> None:
        hub: HubServer = self.server.hub
        request = Request(self.command, self.path, authorization=self.headers.get("Authorization"))
        hub.requests.append(request)
        faults = hub.take_faults(request)
        try:
            if "after" in faults:
                self._call_back(faults)
            hub.closing.wait(faults.get("delay", 0))
            has_body = "Transfer-Encoding" in self.headers or self.headers.get("Content-Length", "0") != "0"
            body = self._receive(request, faults.get("cut") if has_body else None)
            reply = self._answer(hub, body, faults.get("fail"))
            if "change" in faults:
                reply = faults["change"](reply)
            if "lose" in faults:
                raise _Cut
            self._reply(request, reply, None if has_body else faults.get("cut"))
        except _Cut:
            self.close_connection = True
        except (ConnectionError, TimeoutError):
            # The client went away, which is its right.
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    @staticmethod
    def _call_back(faults: dict[str, Any]) -> None:
        """An error in a test's callback becomes the answer, or it would look like a lost connection."""
        try:
            faults["after"]()
        except Exception as error:
            faults["fail"] = HubError(500, f"the callback of after() raised {error!r}")

    def _receive(self, request: Request, cut_after: int | None) -> bytes:
        """The body, of a stated length or in chunks; with `cut_after` no more of it than that, and then the end."""
        body = bytearray()
        for piece in self._pieces(cut_after):
            body += piece
            request.received = len(body)
            if cut_after is not None and len(body) >= cut_after:
                break
        if cut_after is not None:
            raise _Cut
        return bytes(body)

    def _pieces(self, cut_after: int | None) -> Iterator[bytes]:
        step = 65536 if cut_after is None else max(1, min(65536, cut_after))
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            left = int(self.headers.get("Content-Length", 0))
            while left and (piece := self.rfile.read(min(step, left))):
                left -= len(piece)
                yield piece
            return
        while size := int(self.rfile.readline().strip() or b"0", 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def _answer(self, hub: HubServer, body: bytes, planted: HubError | None) -> Reply:
        url = urlsplit(self.path)
        try:
            if planted is not None:
                raise planted
            with hub.store.lock:
                account = authenticate(hub.store, self.headers.get("Authorization"))
                query = parse_qs(url.query)
                call = Call(self.command, url.path, query, self.headers, body, account, hub.endpoint)
                return answer(hub.store, call)
        except Exception as raised:
            # A defect of this server must not look like a network that failed.
            error = raised if isinstance(raised, HubError) else HubError(500, f"hub_server.py: {raised!r}")
            headers = {**error.headers, "X-Error-Message": error.message.encode("ascii", "replace").decode()}
            if error.code:
                headers["X-Error-Code"] = error.code
            return Reply({"error": error.message}, error.status, headers)

    def _reply(self, request: Request, reply: Reply, cut_after: int | None) -> None:
        body = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
        headers = {"Content-Type": "application/json", "X-Request-Id": str(uuid.uuid4()), **reply.headers}
        # Set before anything is sent: a test may look as soon as its client has returned.
        request.status = reply.status if cut_after is None else None
        self.send_response(reply.status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:cut_after])
        if cut_after is not None:
            raise _Cut

    def log_message(self, *_: object) -> None:
        """`HubServer.requests` is the log."""


# ---- this process's client


class _QuickClock:
    """Stands for the `time` module where the client waits before it retries: waits a hundredth of that."""

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)

    @staticmethod
    def sleep(seconds: float) -> None:
        time.sleep(seconds / 100)


def client_kept_on(endpoint: str) -> Any:
    """The client's own HTTP session, which cannot leave this machine: the real Hub's addresses become `endpoint`'s.

    huggingface_hub 1.33 has the real address written into `RepoCard.validate`, so that no endpoint changes it.
    """

    def redirect(request: Any) -> None:
        if request.url.host == "huggingface.co":
            request.url = type(request.url)(endpoint + request.url.raw_path.decode())
        if request.url.host != "127.0.0.1":
            raise AssertionError(f"a test must not reach {request.url}")

    client = default_client_factory()
    client.event_hooks["request"].append(redirect)
    return client


def point_client_at(server: HubServer, monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    """Make huggingface_hub and transformers, as imported, use this server, an empty cache in `home`, and WRITER's token.

    Both read the environment once, when they are imported, so the constants themselves are replaced.
    """
    cache, modules = str(home / "hub"), str(home / "modules")
    replaced = {
        "ENDPOINT": server.endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HOME": str(home),
        "HF_HUB_CACHE": cache,
        "HUGGINGFACE_HUB_CACHE": cache,
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_HUB_DISABLE_XET": True,
        # The client would ask the server for things that no test is about.
        "HF_HUB_DISABLE_TELEMETRY": True,
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": False,
        "HF_HUB_OFFLINE": False,
    }
    for name, value in replaced.items():
        monkeypatch.setattr(constants, name, value)
    # Taken from the constants when these were made or imported.
    monkeypatch.setattr(hf_api.api, "endpoint", server.endpoint)
    monkeypatch.setattr("huggingface_hub.utils._cache_manager.HF_HUB_CACHE", cache)
    monkeypatch.setattr("transformers.utils.hub._hf_api", None)
    for module in ("transformers.utils", "transformers.utils.hub", "transformers.dynamic_module_utils"):
        monkeypatch.setattr(f"{module}.HF_MODULES_CACHE", modules)
    # Retries wait 1, 2, 4, 8 and 8 seconds, and no setting shortens that.
    for module in ("huggingface_hub.utils._http", "huggingface_hub.file_download"):
        monkeypatch.setattr(f"{module}.time", _QuickClock())
    for name in ("HF_OIDC_RESOURCE", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_TOKEN", WRITER)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")


@pytest.fixture
def hub(monkeypatch, tmp_path_factory) -> Iterator[HubServer]:
    """A fresh, empty Hub that this process's client talks to, as "writer-user" unless a test says otherwise."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in remote_code_modules():
        monkeypatch.delitem(sys.modules, name)
    with HubServer() as server:
        point_client_at(server, monkeypatch, tmp_path_factory.mktemp("hf-home"))
        # This also closes the session at hand, with its connections to another server and its environment's proxies.
        set_client_factory(lambda: client_kept_on(server.endpoint))
        yield server
        set_client_factory(default_client_factory)
    for name in remote_code_modules():
        del sys.modules[name]


def remote_code_modules() -> list[str]:
    """Remote code imported by now. It would hide the code of the same repository in another test's folder."""
    return [name for name in sys.modules if name.split(".")[0] == TRANSFORMERS_DYNAMIC_MODULE_NAME]
