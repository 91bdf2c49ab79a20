"""The HTTP side of `grinmoe serve`: connections, their limits, and how the server ends. Knows nothing of models.

Uvicorn bounds the time of idle keep-alive connections and the size of a request's head. This module bounds what uvicorn
does not: the number of connections, the time in which a request arrives, and the time for which an answer stays unread.
"""

from __future__ import annotations

import asyncio
import functools
import socket
from collections.abc import Callable
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from .gate import Gate, Limits
from .requests import error_response

# Seconds that answers under way get when the server is told to end.
GRACE_S = 10
# Connections that the kernel keeps until they are accepted.
BACKLOG = 2048
# Bytes of a request line with its headers.
MAX_HEAD = 16 * 2**10
# Bytes that are read of one connection at a time. Chunks of one byte cost 4 us for each byte, and others wait meanwhile.
_READ_BYTES = 16 * 2**10
# Bytes of an answer that the kernel keeps for a client.
_SEND_BUFFER = 128 * 2**10


class Connection(H11Protocol, asyncio.BufferedProtocol):
    """
    Uvicorn's connection, with an end.

    Beyond asyncio's protocol this uses `connections`, `cycle` and `on_response_complete` of uvicorn's class.
    `tests/serving/test_load.py` fails where they move.
    """

    def __init__(self, limits: Limits, **options: Any):
        super().__init__(**options)
        self.limits = limits
        self._buffer = bytearray(_READ_BYTES)
        # Times of the loop's clock: begin of the wait for a request, and of the waits for the client to read.
        self._waits_since = self.loop.time()
        self._blocked_since: float | None = None
        self._closing_since: float | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        if len(self.connections) >= self.limits.max_connections and not self._take_a_place():
            self.transport = transport
            transport.write(_no_place())
            transport.close()
            return
        # By itself the kernel keeps megabytes for each client that does not read.
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
        super().connection_made(transport)

    def _take_a_place(self) -> bool:
        """Close the connection that has waited longest for its request. False where all requests are there."""
        waiting = [one for one in self.connections if isinstance(one, Connection) and one.is_waiting]
        if waiting:
            min(waiting, key=lambda one: one._waits_since).transport.abort()
        return bool(waiting)

    @property
    def is_waiting(self) -> bool:
        """Whether no request is there, or not all of one."""
        arrives = self.cycle is not None and self.cycle.more_body and not self.cycle.response_started
        return not self.transport.is_closing() and (self._has_no_request or arrives)

    @property
    def _has_no_request(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._waits_since = self.loop.time()

    def get_buffer(self, sizehint: int) -> bytearray:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        self.data_received(bytes(memoryview(self._buffer)[:nbytes]))

    def pause_writing(self) -> None:
        self._blocked_since = self.loop.time()
        super().pause_writing()

    def resume_writing(self) -> None:
        self._blocked_since = None
        super().resume_writing()

    def end_if_late(self) -> None:
        """Close where the head of a request or the reading of an answer takes too long. The gate sees to bodies."""
        now = self.loop.time()
        if self.transport.is_closing() and self._closing_since is None:
            self._closing_since = now
        for since in (self._blocked_since, self._closing_since):
            if since is not None and now - since > self.limits.write_timeout:
                self.transport.abort()
        if self._has_no_request and now - self._waits_since > self.limits.request_timeout:
            self.transport.abort()


def _no_place() -> bytes:
    response = error_response(503, "the server has as many connections as it takes; try again later", retry_after=2)
    headers = b"".join(b"%s: %s\r\n" % header for header in [*response.raw_headers, (b"connection", b"close")])
    return b"HTTP/1.1 503 Service Unavailable\r\n" + headers + b"\r\n" + bytes(response.body)


class Server(uvicorn.Server):
    """Uvicorn, which lets answers under way finish for GRACE_S seconds and then ends the model, which ends them."""

    def __init__(self, app: Gate, stop: Callable[[], None]):
        """
        Args:
            app: what to serve; its limits are those of the connections too.
            stop: ends all that is under way and returns; is called more than once.
        """
        super().__init__(
            uvicorn.Config(
                app,
                http=functools.partial(Connection, app.limits),  # type: ignore[arg-type]
                loop="asyncio",
                ws="none",
                # asyncio accepts so many connections in a row, also when the process has no file descriptors left: with
                # more than one, each failure would log a line and repeat itself for ever.
                backlog=1,
                h11_max_incomplete_event_size=MAX_HEAD,
                proxy_headers=False,
                # A warning for each request that is not HTTP would fill a disk.
                log_level="error",
                access_log=False,
                # Beyond GRACE_S uvicorn cancels what is left, with a traceback for each.
                timeout_graceful_shutdown=GRACE_S + 5,
            )
        )
        self._gate, self._stop = app, stop

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listener in sockets or ():
            listener.listen(BACKLOG)
        self._sweeping = asyncio.ensure_future(self._sweep())

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(min(1.0, self._gate.limits.request_timeout / 4))
            for connection in list(self.server_state.connections):
                if isinstance(connection, Connection):
                    connection.end_if_late()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._gate.close()
        ending = asyncio.ensure_future(self._stop_after_grace())
        await super().shutdown(sockets)
        ending.cancel()
        self._sweeping.cancel()
        # While the event loop still runs, which hears of what ends.
        self._stop()
        await asyncio.sleep(0.1)

    async def _stop_after_grace(self) -> None:
        await asyncio.sleep(GRACE_S)
        await asyncio.to_thread(self._stop)
        await asyncio.sleep(1)
        # Who does not read the end of an answer.
        for connection in list(self.server_state.connections):
            connection.transport.abort()
