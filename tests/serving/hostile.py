"""Clients that do not behave: raw connections to a server, and a watch on its health meanwhile."""

from __future__ import annotations

import json
import socket
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

JSON_TYPE = {"Content-Type": "application/json"}


def connect(url: str, seconds: float = 60) -> socket.socket:
    """A connection to the server at this address."""
    parts = urlsplit(url)
    assert parts.hostname and parts.port
    return socket.create_connection((parts.hostname, parts.port), timeout=seconds)


def head(method: str, path: str, url: str, **fields: str | int) -> bytes:
    """The first lines of a request."""
    fields = {"Host": urlsplit(url).netloc, **fields}
    lines = [f"{method} {path} HTTP/1.1", *(f"{name.replace('_', '-')}: {value}" for name, value in fields.items())]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def post_head(path: str, url: str, length: int, **fields: str | int) -> bytes:
    return head("POST", path, url, Content_Type="application/json", Content_Length=length, **fields)


def read_answer(connection: socket.socket) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of one answer; what is there until the connection ends where it has no length."""
    with connection.makefile("rb") as lines:
        first = lines.readline()
        if not first:
            raise ConnectionResetError("the server has closed the connection without an answer")
        headers = {}
        while (line := lines.readline().strip()) != b"":
            name, _, value = line.decode("latin-1").partition(":")
            headers[name.lower()] = value.strip()
        length = headers.get("content-length")
        try:
            body = lines.read() if length is None else lines.read(int(length))
        except ConnectionResetError:  # the server has closed it and not read all that was sent
            body = b""
        return int(first.split()[1]), headers, body


def send(url: str, request: bytes, seconds: float = 60) -> tuple[int, dict[str, str], bytes]:
    """The answer to some bytes on a connection of their own."""
    with connect(url, seconds) as connection:
        connection.sendall(request)
        return read_answer(connection)


def post(url: str, path: str, body: bytes | dict | list, seconds: float = 60, **fields: str) -> tuple[int, dict]:
    """Status and JSON of the answer to a POST, whatever its body."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    status, _, answer = send(url, post_head(path, url, len(data), **fields) + data, seconds)
    return status, json.loads(answer)


def is_closed(connection: socket.socket, seconds: float) -> bool:
    """Whether the server closes the connection within this time; what it still sends is dropped."""
    connection.settimeout(seconds)
    try:
        while connection.recv(65536):
            pass
    except TimeoutError:
        return False
    except ConnectionError:
        pass
    return True


@contextmanager
def watched_health(url: str) -> Iterator[list[float]]:
    """While it is open, asks for the server's health again and again: seconds of each answer, inf where none came."""
    seconds: list[float] = []
    ended = threading.Event()

    def watch() -> None:
        while not ended.is_set():
            began = time.monotonic()
            try:
                with urllib.request.urlopen(f"{url}/health", timeout=120) as answer:
                    assert answer.status == 200
                seconds.append(time.monotonic() - began)
            except OSError:
                seconds.append(float("inf"))
            ended.wait(0.05)

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        yield seconds
    finally:
        ended.set()
        watching.join()
