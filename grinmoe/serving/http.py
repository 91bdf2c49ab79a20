"""The HTTP side of `grinmoe serve`: how requests and the server end. Knows nothing of models."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# What answers under way get when the server is told to end.
GRACE_S = 10
# Bytes of a request's body, which is kept in memory; far more text than a model takes.
MAX_BODY = 64 * 2**20


class Server(uvicorn.Server):
    """Uvicorn, which lets answers under way finish for GRACE_S seconds and then ends the model, which ends them."""

    def __init__(self, app: ASGIApp, stop: Callable[[], None]):
        """
        Args:
            app: what to serve.
            stop: ends all that is under way and returns; is called more than once.
        """
        # Beyond GRACE_S uvicorn cancels what is left, with a traceback for each.
        super().__init__(
            uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=GRACE_S + 5)
        )
        self._stop = stop

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        ending = asyncio.ensure_future(self._stop_after_grace())
        await super().shutdown(sockets)
        ending.cancel()
        # While the event loop still runs, which hears of what ends.
        self._stop()
        await asyncio.sleep(0.1)

    async def _stop_after_grace(self) -> None:
        await asyncio.sleep(GRACE_S)
        await asyncio.to_thread(self._stop)


class EndWithClient:
    """ASGI middleware: a request whose client leaves before the answer begins is ended, which frees its place in the batch;
    and one whose body is too large.

    Once an answer is streamed, Starlette sees to it.
    """

    def __init__(self, app: ASGIApp, too_large: ASGIApp):
        """
        Args:
            app: what answers.
            too_large: what answers where a body has more than `MAX_BODY` bytes.
        """
        self.app, self.too_large = app, too_large

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        messages: asyncio.Queue[Message] = asyncio.Queue()
        begun = left = False
        size = 0

        async def send_and_note(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        answering = asyncio.ensure_future(self.app(scope, messages.get, send_and_note))

        async def listen() -> None:
            nonlocal left, size
            while not left and size <= MAX_BODY:
                message = await receive()
                left = message["type"] == "http.disconnect"
                size += len(message.get("body", b""))
                messages.put_nowait(message)
            if not begun:
                answering.cancel()

        listening = asyncio.ensure_future(listen())
        try:
            await answering
        except asyncio.CancelledError:
            if size > MAX_BODY:
                await self.too_large(scope, receive, send)
            elif not left:
                raise
        finally:
            listening.cancel()
