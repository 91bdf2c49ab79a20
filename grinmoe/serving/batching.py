"""The two ways in which Transformers' server generates, for one loaded model: in a batch, or one request after the other.

What differs from the library's, each with its reason:

- with continuous batching, each request has its own temperature, top_p and top_k; there the first request's hold for all;
- what is asked for fits the model, or is refused: a request that does not fit into the cache would stop the batch for all;
- a text ends before a stop sequence, with continuous batching too, and bytes that are no UTF-8 do not end a stream;
- a seed is that of its own request's draws, whatever came in between;
- a request ends with its client, and all end when the server is told to.

`tests/serving/test_serve_inside.py` says what of Transformers has moved when a new version moves it.
"""

from __future__ import annotations

import asyncio
import copy
import itertools
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    ContinuousBatchingConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.cli.serving.utils import CBGenerateManager, CBWorkerDeadError, GenerateManager
from transformers.generation import GenerationMode

from .gate import SHUTTING_DOWN
from .requests import refusal
from .text_stream import TextUntil, text_until

# Tokens of a block of the paged cache: the library's default, under two names (block_size until 5.17, page_size since).
BLOCK_TOKENS = 256
# Where a request's generation config has its seed, which is not Transformers' field, and the texts that its answer ends
# before. In the library's own field they would be compared with every token of the vocabulary, letter by letter.
SEED, STOPS = "seed_of_request", "stops_of_request"


@dataclass(frozen=True)
class ServedModel:
    """A loaded model and the limits that it is served with."""

    model: Any
    tokenizer: Any
    name: str  # what requests call it
    max_length: int  # tokens of a prompt and its answer together
    max_new_tokens: int  # tokens of an answer
    continuous_batching: bool


class _Limited:
    """Mixin for both ways to generate: what is asked for fits the model, or is refused."""

    served: ServedModel

    def limit(self, inputs: Any, gen_config: Any) -> None:
        """
        Bound the answer by what the prompt leaves.

        Args:
            inputs: with "input_ids", a list (continuous batching) or a tensor (1, S).
            gen_config: of this request; its max_new_tokens is set.

        Raises:
            HTTPException: 400, the prompt is empty or leaves no room for an answer.
        """
        ids = inputs["input_ids"]
        length = len(ids) if isinstance(ids, list) else ids.shape[-1]
        longest = self.served.max_length
        if length == 0:
            raise refusal("the prompt has no tokens; give some text")
        if length >= longest:
            raise refusal(
                f"the prompt has {length} tokens, and this server takes up to {longest} tokens for a prompt and its answer; "
                f"shorten it to {longest - 1} or fewer",
                code="context_length_exceeded",
            )
        wanted = gen_config.max_new_tokens or self.served.max_new_tokens
        gen_config.max_new_tokens = min(wanted, self.served.max_new_tokens, longest - length)


class _Unless(StoppingCriteria):
    """Ends `generate` with an error, when something has happened."""

    def __init__(self, *happened: Callable[[], bool]):
        self.happened = happened

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        if any(check() for check in self.happened):
            raise CBWorkerDeadError(SHUTTING_DOWN)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class _When(StoppingCriteria):
    """Ends `generate` when something has happened."""

    def __init__(self, happened: Callable[[], bool]):
        self.happened = happened

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self.happened(), dtype=torch.bool, device=input_ids.device)


class _AtStop(StoppingCriteria):
    """Ends each text of `generate` at a stop. Looks at its end alone, in which the stop is that the last token completes."""

    def __init__(self, tokenizer: Any, stops: list[str], prompt_length: int):
        self.tokenizer, self.stops, self.prompt_length = tokenizer, stops, prompt_length
        # A letter has up to four tokens, which are bytes; some more, since one step may bring several tokens.
        self.tokens = 4 * max(map(len, stops)) + 16

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        ends = input_ids[:, max(self.prompt_length, input_ids.shape[1] - self.tokens) :]
        texts = self.tokenizer.batch_decode(ends, skip_special_tokens=True)
        found = [any(stop in text for stop in self.stops) for text in texts]
        return torch.tensor(found, dtype=torch.bool, device=input_ids.device)


class _Seeded(LogitsProcessor):
    """Seeds the draws of one request when it begins to draw, which is when its turn has come."""

    def __init__(self, seed: int):
        self._seed: int | None = seed

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self._seed is not None:
            torch.manual_seed(self._seed)
            self._seed = None
        return scores


class OneAtATime(_Limited, GenerateManager):
    """Without continuous batching: `generate`, one request after the other."""

    def __init__(self, served: ServedModel):
        super().__init__()
        self.served = served
        self._stopping = threading.Event()
        self._held: list[tuple[Any, ...]] | None = None

    def generate_streaming(self, model, processor, inputs, gen_config, *args, **kwargs):
        self.limit(inputs, gen_config)
        # It ends by itself at a stop.
        decoder = TextUntil(_stops(gen_config), lambda: None)
        ends = _Unless(self._stopping.is_set), _When(lambda: decoder.has_stopped)
        inputs = self._with_own(inputs, gen_config, *ends)
        # The other thread must not begin before the streamer is as it should be.
        held: list[tuple[Any, ...]] = []
        self._held = held
        try:
            queue, streamer = super().generate_streaming(model, processor, inputs, gen_config, *args, **kwargs)
        finally:
            self._held = None
        loop = asyncio.get_running_loop()
        _decode_with(streamer, decoder, gen_config, lambda text: loop.call_soon_threadsafe(queue.put_nowait, text))
        for work in held:
            self.submit(*work)
        return queue, streamer

    @staticmethod
    def _with_own(inputs: Any, gen_config: Any, *ends: StoppingCriteria) -> dict[str, Any]:
        """Transformers hands on to `generate` whatever is among the inputs."""
        own: dict[str, Any] = {"stopping_criteria": StoppingCriteriaList(ends)}
        if (seed := getattr(gen_config, SEED, None)) is not None:
            own["logits_processor"] = LogitsProcessorList([_Seeded(seed)])
        return {**inputs, **own}

    def submit(self, fn, *args, **kwargs):
        if self._held is None:
            return super().submit(fn, *args, **kwargs)
        self._held.append((fn, *args))
        return None

    async def generate_non_streaming(self, model, processor, inputs, gen_config, *args, **kwargs):
        self.limit(inputs, gen_config)
        left = threading.Event()
        ends: list[StoppingCriteria] = [_Unless(self._stopping.is_set, left.is_set)]
        if stops := _stops(gen_config):
            ends.append(_AtStop(processor, stops, inputs["input_ids"].shape[-1]))
        inputs = self._with_own(inputs, gen_config, *ends)
        answer = asyncio.ensure_future(
            super().generate_non_streaming(model, processor, inputs, gen_config, *args, **kwargs)
        )
        try:
            # The thread that generates must find a future that is not cancelled.
            text, input_length, ids = await asyncio.shield(answer)
            whole = text_until(text, stops)
            _note_end(gen_config, ids.tolist(), has_stopped=len(whole) < len(text))
            return whole, input_length, ids
        except asyncio.CancelledError:
            left.set()
            # Whom nobody waits for any more: asyncio would print how that ended.
            answer.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
            raise

    def stop(self) -> None:
        """End now; what is under way or waits ends with an error. May be called again."""
        self._stopping.set()
        # The last in the queue. A thread that computes when Python ends would abort the process.
        self.submit(int).result()


def start_batching(model: Any, config: ContinuousBatchingConfig) -> tuple[Any, int]:
    """
    Start the thread that generates.

    Args:
        model: the loaded model.
        config: of the batch and its cache.

    Returns:
        Transformers' manager of the batch, and how many tokens its cache holds, of all requests together.

    Raises:
        MemoryError: what `config` asks for does not fit.
        ValueError: the model's generation config asks for what a batch of several texts does not do.
    """
    # It warns of whatever is not the fastest, and of every request that was cancelled when it had just ended.
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)
    options = copy.deepcopy(model.generation_config)
    # A processor exists only for what is set, and not to its neutral value; each request then brings its own.
    options.update(do_sample=True, temperature=0.5, top_k=1, top_p=0.5, num_return_sequences=1, use_cache=False)
    own = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper)
    probe = copy.deepcopy(options)
    # `generate` sets it before it makes the processors; some of them are made only where it is set.
    probe._eos_token_tensor = torch.zeros(1, dtype=torch.long)
    steps = model._get_logits_processor(probe, input_ids_seq_length=1)
    others = [type(step).__name__ for step in steps if not isinstance(step, own)]
    # The assisted ones give the same texts.
    known = GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE, GenerationMode.ASSISTED_GENERATION
    if (mode := model.generation_config.get_generation_mode()) not in known:
        others.append(mode.value)
    if others:
        raise ValueError(
            f"the checkpoint's generation_config.json asks for {', '.join(others)}, which continuous batching leaves out; "
            "remove that setting, or choose --no-continuous-batching"
        )
    manager = model.init_continuous_batching(generation_config=options, continuous_batching_config=config)
    # Makes the cache here, where its errors can be caught, and not in the thread.
    manager.warmup()
    capacity = manager.batch_processor.cache.num_blocks * BLOCK_TOKENS
    manager.start()
    return manager, capacity


class Batches(_Limited, CBGenerateManager):
    """With continuous batching: requests join and leave a running batch."""

    def __init__(self, served: ServedModel, manager: Any):
        super().__init__()
        self.served = served
        self._numbers = itertools.count()
        self._stopping = False
        self._cb: Any = _Submission(manager)

    def init_cb(self, model: Any, gen_config: Any) -> None:
        """Nothing: it runs since the start, with nothing of the first request's."""

    def generate_streaming(self, model, processor, inputs, gen_config, request_id, response_parser=None):
        self.limit(inputs, gen_config)
        request_id = self._own_id(request_id, gen_config)
        queue, streamer = super().generate_streaming(model, processor, inputs, gen_config, request_id, response_parser)
        # Nothing has come yet: results reach the streamer by the event loop, which is here.
        end, loop = streamer.end, asyncio.get_running_loop()

        def stop() -> None:
            self._cb.cancel_request(request_id)
            end()

        # After the text before the stop, which is still to be put into the queue.
        decoder = TextUntil(_stops(gen_config), lambda: loop.call_soon(stop))
        _decode_with(streamer, decoder, gen_config, queue.put_nowait)
        return queue, streamer

    async def generate_non_streaming(self, model, processor, inputs, gen_config, request_id):
        if _stops(gen_config):
            return await self._generate_until(model, processor, inputs, gen_config, request_id)
        self.limit(inputs, gen_config)
        request_id = self._own_id(request_id, gen_config)
        try:
            answer = await super().generate_non_streaming(model, processor, inputs, gen_config, request_id)
            _note_end(gen_config, answer[2])
            return answer
        except asyncio.CancelledError:
            self._cb.cancel_request(request_id)
            raise
        except RuntimeError as error:
            if self._stopping:
                raise CBWorkerDeadError(SHUTTING_DOWN) from error
            raise

    async def _generate_until(self, model, processor, inputs, gen_config, request_id):
        """Whole, and ended at a stop: a stream that is collected, since results that are no stream come at their end."""
        queue, streamer = self.generate_streaming(model, processor, inputs, gen_config, request_id)
        pieces = []
        try:
            while (piece := await queue.get()) is not None:
                if not isinstance(piece, str):
                    raise CBWorkerDeadError(SHUTTING_DOWN) if self._stopping else RuntimeError(piece.msg)
                pieces.append(piece)
        except asyncio.CancelledError:
            streamer.cancel()
            raise
        return "".join(pieces), len(inputs["input_ids"]), streamer._decode_stream.ids

    def _own_id(self, request_id: str, gen_config: Any) -> str:
        """Clients may send an id, and two of them the same: the batch would take both for one request."""
        own_id = f"{request_id}/{next(self._numbers)}"
        self._cb.sampling[own_id] = _sampling(gen_config, self.served.model.config.vocab_size)
        return own_id

    def stop(self) -> None:
        """End now; what is under way ends with an error. May be called again."""
        self._stopping = True
        if self._cb.is_running():
            self._cb.stop(block=True, hard_stop=True)


class _Submission:
    """Transformers' manager of a batch, and how requests reach it."""

    def __init__(self, manager: Any):
        self._manager = manager
        self.sampling: dict[str, dict[str, Any]] = {}  # by request, until it is submitted
        self._waiting: dict[str, dict[str, Any]] = {}  # streams that nobody listens to yet

    def __getattr__(self, name: str) -> Any:
        return getattr(self._manager, name)

    def add_request(self, input_ids: list[int], request_id: str, **options: Any) -> str:
        """As in Transformers, with the request's own sampling.

        A stream is submitted when its listener is known: one that ended before would never be heard of.
        """
        # The step that was under way when a request was cancelled keeps its result, with the whole prompt, for a reader.
        while self._manager.get_result(timeout=0) is not None:
            pass
        request = {"input_ids": input_ids, "request_id": request_id, **options, **self.sampling.pop(request_id)}
        if options.get("streaming"):
            self._waiting[request_id] = request
        else:
            self._submit(request)
        return request_id

    def register_result_handler(self, request_id: str, callback: Callable) -> None:
        self._manager.register_result_handler(request_id, callback)
        if request_id in self._waiting:
            self._submit(self._waiting.pop(request_id))

    def cancel_request(self, request_id: str) -> None:
        self._manager.cancel_request(request_id)
        # Results end with a finished one, which a cancelled request has not.
        self._manager.output_router.result_handlers.pop(request_id, None)

    def _submit(self, request: dict[str, Any]) -> None:
        if self._manager.add_request(**request) is None:
            raise CBWorkerDeadError(SHUTTING_DOWN)


def set_stops(gen_config: Any) -> None:
    """Move the stops of a request, or of the checkpoint's generation config, from the library's field into [`STOPS`]."""
    stops = gen_config.stop_strings or []
    setattr(gen_config, STOPS, [stop for stop in ([stops] if isinstance(stops, str) else stops) if stop])
    gen_config.stop_strings = None


def _stops(gen_config: Any) -> list[str]:
    return getattr(gen_config, STOPS, [])


def _note_end(gen_config: Any, ids: list[int], has_stopped: bool = False) -> None:
    """An answer that ends by itself or at a stop was not cut, also where its last token is the last that it may have."""
    ends = gen_config.eos_token_id
    if has_stopped or (ids and ids[-1] in (ends if isinstance(ends, list) else [ends])):
        gen_config.max_new_tokens = None


def _decode_with(streamer: Any, decoder: TextUntil, gen_config: Any, put: Callable[[str], object]) -> None:
    """Exchange a streamer's decoder, and give what that has held back when the stream ends."""
    end = streamer.end

    def give_rest_and_end() -> None:
        _note_end(gen_config, decoder.ids, decoder.has_stopped)
        if rest := decoder.rest():
            put(rest)
        end()

    streamer._decode_stream, streamer.end = decoder, give_rest_and_end


def _sampling(gen_config: Any, vocab_size: int) -> dict[str, Any]:
    """The per-request arguments of the batch's processors. Greedy is one candidate, also where several are equal."""
    if not gen_config.do_sample:
        return {"temperature": 1.0, "top_k": 1, "top_p": 1e-9}
    return {
        "temperature": float(gen_config.temperature if gen_config.temperature is not None else 1.0),
        "top_k": min(gen_config.top_k or vocab_size, vocab_size),
        "top_p": float(gen_config.top_p if gen_config.top_p is not None else 1.0),
    }
