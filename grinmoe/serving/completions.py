"""Completions of several prompts in one request: one answer with a choice for each, whole or in pieces."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from .batching import Batches, OneAtATime, ServedModel
from .requests import error_body


@dataclass(frozen=True)
class Prompt:
    """A prompt, as both ways to generate take it."""

    inputs: dict[str, Any]  # input_ids: a list with continuous batching, else a tensor (1, S) beside its attention_mask
    config: Any  # a GenerationConfig of its own
    length: int  # in tokens


class Answers:
    """The answers to the prompts of one request. Give them `whole`, or `begin` and then give them `in_pieces`."""

    def __init__(self, served: ServedModel, manager: OneAtATime | Batches, prompts: list[Prompt], request_id: str):
        """
        Args:
            served: the model.
            manager: how it generates.
            prompts: at least one; each fits the model (`manager.limit`).
            request_id: the client's, or a new one.
        """
        self.manager, self.prompts = manager, prompts
        self._works = [(served.model, served.tokenizer, one.inputs, one.config, request_id) for one in prompts]
        self._queues: list[asyncio.Queue] = []
        self._streamers: list[Any] = []
        created = int(time.time())
        self._head = {"id": request_id, "object": "text_completion", "created": created, "model": served.name}

    async def whole(self) -> dict[str, Any]:
        """The completion, when all prompts are answered."""
        works = [asyncio.ensure_future(self.manager.generate_non_streaming(*work)) for work in self._works]
        try:
            found = [(text, len(ids)) for text, _, ids in await asyncio.gather(*works)]
        finally:
            for work in works:  # where one has failed, the others end too
                work.cancel()
        choices = [_choice(i, text, self._finish_reason(i, tokens)) for i, (text, tokens) in enumerate(found)]
        return {**self._head, "choices": choices, "usage": self._usage([tokens for _, tokens in found])}

    def begin(self) -> None:
        """Submit all prompts, so that errors come before the answer begins."""
        try:
            for work in self._works:
                queue, streamer = self.manager.generate_streaming(*work)
                self._queues.append(queue)
                self._streamers.append(streamer)
        except BaseException:
            for streamer in self._streamers:
                streamer.cancel()
            raise

    async def in_pieces(self) -> AsyncIterator[str]:
        """Events of all prompts as their text comes. Each names its choice, and the last one has the usage."""
        pieces: asyncio.Queue = asyncio.Queue()

        async def forward(index: int) -> None:
            while isinstance(piece := await self._queues[index].get(), str):
                pieces.put_nowait((index, piece))
            pieces.put_nowait((index, piece))

        running = set(range(len(self.prompts)))
        forwards = [asyncio.ensure_future(forward(index)) for index in running]
        try:
            while running:
                index, piece = await pieces.get()
                if isinstance(piece, str):
                    yield event_of({**self._head, "choices": [_choice(index, piece)]})
                    continue
                if piece is not None:  # an error
                    yield f"data: {error_body(503, piece.msg)}\n\n"
                    return
                running.discard(index)
                reason = self._finish_reason(index, self._streamers[index].total_tokens)
                tokens = [streamer.total_tokens for streamer in self._streamers]
                usage = {} if running else {"usage": self._usage(tokens)}
                yield event_of({**self._head, "choices": [_choice(index, "", reason)], **usage})
        finally:
            for index in running:  # the client has left, or one has failed
                self._streamers[index].cancel()
            for one in forwards:
                one.cancel()

    def _finish_reason(self, index: int, tokens: int) -> str:
        longest = self.prompts[index].config.max_new_tokens
        return "length" if longest is not None and tokens >= longest else "stop"

    def _usage(self, tokens: list[int]) -> dict[str, int]:
        prompts, answers = sum(prompt.length for prompt in self.prompts), sum(tokens)
        return {"prompt_tokens": prompts, "completion_tokens": answers, "total_tokens": prompts + answers}


def event_of(chunk: dict[str, Any]) -> str:
    """The event of a stream that carries a chunk."""
    return f"data: {json.dumps(chunk)}\n\n"


def _choice(index: int, text: str, finish_reason: str | None = None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": finish_reason}
