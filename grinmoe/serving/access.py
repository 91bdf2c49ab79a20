"""Who may send requests to the server, and in which form: checks of a request's head."""

from __future__ import annotations

import hmac
import ipaddress
import re
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from fastapi.responses import Response
from starlette.datastructures import Headers
from starlette.types import Scope

from .requests import error_response, shortened

# Bytes of a file with an API key.
_MAX_KEY_FILE = 4096
_HOST = re.compile(r"(\[[0-9a-fA-F:.]+\]|[^\s\[\]:/@]+)(?::\d{0,5})?")


@dataclass(frozen=True)
class Access:
    """
    Who may send requests.

    Attributes:
        names: hosts that a request may name, in lower case, beside those of the loopback interface; "*" stands for any.
        any_address: whether a request may name any IP address. A page in a browser can make a name of its own point to this
            machine (DNS rebinding), but not an address.
        api_key: what a request has to present, or None.
    """

    names: frozenset[str] = frozenset()
    any_address: bool = False
    api_key: bytes | None = None

    @classmethod
    def at(cls, host: str, address: str, allowed: Iterable[str], api_key: bytes | None) -> Access:
        """
        The access to a server.

        Args:
            host: that the server is told to listen at.
            address: that it listens at.
            allowed: further names, or "*".
            api_key: what a request has to present, or None.
        """
        listens_at = ipaddress.ip_address(address.partition("%")[0])
        names = {name.lower().rstrip(".").strip("[]") for name in (host, address, *allowed)}
        if not listens_at.is_loopback:
            hostname = socket.gethostname().lower()
            names |= {hostname, f"{hostname}.local"}
        return cls(frozenset(names), listens_at.is_unspecified, api_key)

    def refused(self, scope: Scope, max_body: int) -> Response | None:
        """The answer to a request that may not pass, or None."""
        headers = Headers(scope=scope)
        return (
            self._host_refused(scope, headers)
            or self._key_refused(scope, headers)
            or _form_refused(scope, headers, max_body)
        )

    def _host_refused(self, scope: Scope, headers: Headers) -> Response | None:
        host = headers.get("host")
        # Browsers always name it. Health checks of load balancers, in HTTP/1.0, do not.
        if not (host is None and scope.get("http_version") == "1.0") and not self._knows(host or ""):
            return error_response(
                421,
                f"the request names the host {shortened(host or '')!r}, and this server does not know that name; start it "
                "with --allowed-host NAME",
                code="unknown_host",
            )
        origin = headers.get("origin")
        if origin is not None and origin.lower().partition("://")[2] != (host or "").lower():
            return error_response(
                403,
                f"the request comes from a web page of {shortened(origin)!r}, and this server answers no pages of others",
                code="foreign_origin",
            )
        return None

    def _knows(self, host: str) -> bool:
        found = _HOST.fullmatch(host)
        if found is None:
            return False
        name = found[1].lower().rstrip(".").strip("[]")
        if name == "localhost" or name in self.names or "*" in self.names:
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        return address.is_loopback or self.any_address

    def _key_refused(self, scope: Scope, headers: Headers) -> Response | None:
        if self.api_key is None or scope["path"] == "/health":
            return None
        scheme, _, key = headers.get("authorization", "").partition(" ")
        # As long for every wrong key.
        if hmac.compare_digest(key.strip().encode(), self.api_key) and scheme.lower() == "bearer":
            return None
        response = error_response(
            401, "the API key is missing or wrong; send it as 'Authorization: Bearer KEY'", code="invalid_api_key"
        )
        response.headers["www-authenticate"] = "Bearer"
        return response


def _form_refused(scope: Scope, headers: Headers, max_body: int) -> Response | None:
    """Refuse bodies that are too large or not JSON, before they are read."""
    if scope["method"] != "POST":
        return None
    length = headers.get("content-length")
    if length is not None and "transfer-encoding" in headers:
        return error_response(400, "the request has Content-Length and Transfer-Encoding; send one of them")
    if length is not None and int(length) > max_body:
        return too_large(max_body)
    if headers.get("content-encoding", "identity").lower() != "identity":
        return error_response(415, "the body is compressed (Content-Encoding); send it as it is")
    # Pages of other sites may send other types without being asked by the browser's rules (CORS).
    if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        return error_response(415, "the body has to be a JSON object, with Content-Type: application/json")
    return None


def too_large(max_body: int) -> Response:
    """The answer to a body that is too large."""
    return error_response(
        413, f"the body is larger than {max_body:,} bytes, the limit of this server", code="context_length_exceeded"
    )


def read_api_key(file: str) -> bytes:
    """
    Read an API key.

    Args:
        file: with the key as its only line.

    Raises:
        ValueError: the file cannot be read, or holds something other than one line of visible ASCII characters.
    """
    try:
        with Path(file).open("rb") as opened:
            data = opened.read(_MAX_KEY_FILE + 1)
    except OSError as error:
        raise ValueError(f"--api-key-file {file} cannot be read ({error.strerror})") from error
    key = data.strip()
    if not re.fullmatch(rb"[!-~]+", key) or len(data) > _MAX_KEY_FILE:
        raise ValueError(
            f"--api-key-file {file} must hold the key alone, in one line of at most {_MAX_KEY_FILE} visible ASCII characters"
        )
    return key
