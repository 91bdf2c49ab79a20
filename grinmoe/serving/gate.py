"""What every request passes before the application: checks of its head, its body within bounds, a place among the others."""

from __future__ import annotations

import asyncio
import contextlib
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from fastapi.responses import Response
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .access import Access, too_large
from .requests import error_response, refusal

# Where the scope of a request has its `Admitted`.
ADMITTED = "grinmoe.admitted"
REQUEST_ID = "x-request-id"
SHUTTING_DOWN = "the server is shutting down"
# Seconds after which clients may try again where the server has too much to do. OpenAI's client does so by itself.
RETRY_AFTER = 2
# Seconds for which the body of a refused request is taken and dropped.
_DROP_S = 5.0
_SOUND_ID = re.compile(r"[!-~]{1,128}")


@dataclass(frozen=True)
class Limits:
    """
    What clients may ask of the server.

    Attributes:
        max_body: bytes of a request's body.
        max_connections: open at a time.
        max_requests: prompts that are answered or wait, at a time.
        request_timeout: seconds in which a request has to arrive whole.
        write_timeout: seconds for which a client may leave its answer unread.
    """

    max_body: int = 4 * 2**20
    max_connections: int = 512
    max_requests: int = 256
    request_timeout: float = 30.0
    write_timeout: float = 60.0

    @property
    def max_bodies(self) -> int:
        """Bytes of all bodies that arrive or wait to be parsed."""
        return 8 * self.max_body


class Admitted:
    """A request that has passed the gate: its id, its body until that is parsed, and its places among the requests."""

    def __init__(self, gate: Gate, request_id: str, body: bytes):
        self.request_id = request_id
        self._gate, self._body, self._places, self._bytes = gate, body, 0, len(body)

    @contextmanager
    def body(self) -> Iterator[bytes]:
        """The body, which is forgotten afterwards."""
        try:
            yield self._body
        finally:
            self._forget_body()

    def _forget_body(self) -> None:
        self._gate.held -= self._bytes
        self._body, self._bytes = b"", 0

    def take_places(self, count: int) -> None:
        """
        Take places for prompts, until the request ends.

        Raises:
            HTTPException: 429, so many are not free; 400, there are not so many.
        """
        most = self._gate.limits.max_requests
        if count > most:
            raise refusal(f"a request has at most {most} prompts on this server; send several requests", param="prompt")
        if self._gate.places + count > most:
            raise refusal(
                f"{most} prompts are answered or wait already; try again later",
                429,
                code="rate_limit_exceeded",
                retry_after=RETRY_AFTER,
            )
        self._gate.places += count
        self._places += count

    def leave(self) -> None:
        """The request has ended."""
        self._forget_body()
        self._gate.places -= self._places
        self._places = 0


class _Refused(Exception):
    def __init__(self, response: Response, is_last: bool = False):
        self.response, self.is_last = response, is_last
        if is_last:
            response.headers["connection"] = "close"


def _too_many_bodies() -> Response:
    return error_response(503, "too many large requests arrive at a time; try again later", retry_after=RETRY_AFTER)


class Gate:
    """
    ASGI application around another one. It bounds what requests take before they are understood, and ends those whose client
    has left before the answer begins. Once an answer is streamed, Starlette sees to that.

    Attributes:
        held: bytes of bodies that arrive or wait to be parsed.
        places: prompts that are answered or wait.
    """

    def __init__(self, app: ASGIApp, access: Access | None = None, limits: Limits | None = None):
        """
        Args:
            app: what answers. It finds an [`Admitted`] in the scope of a POST.
            access: who may send requests; by default, clients of the loopback interface.
            limits: of requests.
        """
        self.app, self.access, self.limits = app, access or Access(), limits or Limits()
        self.held = self.places = 0
        self._arriving: dict[asyncio.Task, bytearray] = {}  # the oldest first
        self._is_closing = False

    def close(self) -> None:
        """End the requests that are still arriving, and refuse others."""
        self._is_closing = True
        for reading in self._arriving:
            reading.cancel()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = Headers(scope=scope).get(REQUEST_ID, "")
        if not _SOUND_ID.fullmatch(request_id):
            request_id = str(uuid.uuid4())

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (REQUEST_ID.encode(), request_id.encode())]
            await send(message)

        try:
            if refused := self.access.refused(scope, self.limits.max_body):
                raise _Refused(refused)
            body = await self._read(receive) if scope["method"] == "POST" else b""
        except _Refused as error:
            await self._refuse(error, scope, receive, send_with_id)
            return
        if body is None:  # the client has left
            return
        admitted = scope[ADMITTED] = Admitted(self, request_id, body)
        del body
        try:
            await self._answer(scope, receive, send_with_id)
        finally:
            admitted.leave()

    async def _refuse(self, refused: _Refused, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, and take the rest of the body for a while: clients that still send might not read the answer otherwise."""

        async def send_and_take_rest(message: Message) -> None:
            if message["type"] == "http.response.body" and not refused.is_last:
                await send({**message, "more_body": True})
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._drop(receive), min(_DROP_S, self.limits.request_timeout))
                message = {"type": "http.response.body", "body": b"", "more_body": False}
            await send(message)

        await refused.response(scope, receive, send_and_take_rest)

    async def _drop(self, receive: Receive) -> None:
        size = 0
        while size < self.limits.max_bodies:
            message = await receive()
            size += len(message.get("body", b""))
            if not message.get("more_body", False):
                return

    async def _read(self, receive: Receive) -> bytes | None:
        """The body, or None where the client has left. Its bytes are counted as held."""
        body = bytearray()
        reading = asyncio.ensure_future(self._collect(receive, body))
        self._arriving[reading] = body
        try:
            if self._is_closing:
                raise _Refused(error_response(503, SHUTTING_DOWN), is_last=True)
            await asyncio.wait({reading}, timeout=self.limits.request_timeout)
            if not reading.done():
                message = f"the request did not arrive within {self.limits.request_timeout:g} seconds"
                raise _Refused(error_response(408, message), is_last=True)
            if reading.cancelled():
                raise _Refused(
                    error_response(503, SHUTTING_DOWN) if self._is_closing else _too_many_bodies(), is_last=True
                )
            is_whole = reading.result()
            whole = bytes(body) if is_whole else b""
        except BaseException:
            self.held -= len(body)
            raise
        finally:
            reading.cancel()
            self._arriving.pop(reading, None)
        if not is_whole:
            self.held -= len(body)
            return None
        return whole

    async def _collect(self, receive: Receive, body: bytearray) -> bool:
        """Append what arrives. Returns whether the body is whole."""
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return False
            data = message.get("body", b"")
            if len(body) + len(data) > self.limits.max_body:
                raise _Refused(too_large(self.limits.max_body))
            body += data
            self.held += len(data)
            while self.held > self.limits.max_bodies:
                # The one that has been arriving longest makes room, at once.
                oldest, its_body = next(iter(self._arriving.items()))
                if oldest is asyncio.current_task():
                    raise _Refused(_too_many_bodies(), is_last=True)
                oldest.cancel()
                del self._arriving[oldest]
                self.held -= len(its_body)
                its_body.clear()
            if not message.get("more_body", False):
                # It is whole, and makes room for no other.
                self._arriving.pop(asyncio.current_task(), None)  # type: ignore[arg-type]
                return True

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False
        left = asyncio.Event()
        is_read = False

        async def send_and_note(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        async def receive_rest() -> Message:
            nonlocal is_read
            if not is_read:
                is_read = True
                return {"type": "http.request", "body": b"", "more_body": False}
            await left.wait()
            return {"type": "http.disconnect"}

        answering = asyncio.ensure_future(self.app(scope, receive_rest, send_and_note))

        async def listen() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            left.set()
            if not begun:
                answering.cancel()

        listening = asyncio.ensure_future(listen())
        try:
            await answering
        except asyncio.CancelledError:
            if not left.is_set():
                raise
        finally:
            listening.cancel()
            answering.cancel()
