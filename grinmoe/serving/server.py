"""The application behind `grinmoe serve`: OpenAI's routes for one loaded model, answered by Transformers' own server.

All that `grinmoe serve` takes from inside Transformers is in this file and in `batching.py`, and
`tests/serving/test_serve_inside.py` says what has moved when a new version moves it. `transformers serve` itself cannot
load a GRIN-MoE: it looks for the class of a checkpoint among the attributes of the transformers module, where remote code
never is. Here its handlers and its batching get a loaded model. What differs, each with its reason:

- one model, which no request unloads, exchanges or downloads another beside;
- requests are checked before they reach the model, which a single bad one could stop for all;
- parsing, checks, the chat template and tokenising, whose time grows with a request, run in a thread of their own, so that
  the event loop goes on answering;
- errors have the form that OpenAI's clients read.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException as StarletteHTTPException
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager, TimedModel
from transformers.cli.serving.utils import CBWorkerDeadError, GenerationState

from ..tokenization import encode_chat
from .access import Access
from .batching import SEED, Batches, OneAtATime, ServedModel, set_stops
from .completions import Answers, Prompt, event_of
from .gate import ADMITTED, Admitted, Gate, Limits
from .requests import (
    ADDS_NOTHING,
    NEUTRAL_SETTINGS,
    ChatRequest,
    CompletionRequest,
    LoadRequest,
    check_body,
    drop_absent,
    error_body,
    error_response,
    read_body,
    refusal,
    shortened,
)

# As Transformers writes an error into a stream, with whatever its message has in it.
_STREAM_ERROR, _STREAM_ERROR_END = 'data: {"error": "', '"}\n\n'
# Below it the logits divided by the temperature could overflow; the likeliest token is all but certain long before.
LOWEST_TEMPERATURE = 0.01
# Health checks of load balancers and monitors send HEAD too.
_READING = ["GET", "HEAD"]
# Bytes of a body for each token that the model takes: a letter in JSON's longest form has 12.
BODY_BYTES_PER_TOKEN = 32


class OneModel(ModelManager):
    """Transformers' keeper of models, with one that is loaded already and stays."""

    def __init__(self, served: ServedModel):
        super().__init__()
        self.force_model = served.name
        # -1: it is never unloaded.
        self.loaded_models[served.name] = TimedModel(served.model, timeout_seconds=-1, processor=served.tokenizer)

    # Static in Transformers, and called on the object.
    def process_model_name(self, model_id: str) -> str:  # type: ignore[override]
        """Its name without the revision that Transformers would add."""
        if model_id != self.force_model:
            raise refusal(
                f"the model {shortened(model_id)!r} is not served here; this server has {self.force_model!r}",
                404,
                "model",
                "model_not_found",
            )
        return model_id


class OneModelState(GenerationState):
    """Transformers' choice between the two ways to generate, made once."""

    def __init__(self, served: ServedModel, manager: OneAtATime | Batches):
        super().__init__(continuous_batching=served.continuous_batching)
        self.manager = manager
        if isinstance(manager, Batches):
            # For /health, which asks whether the batch's thread is alive.
            self._cb_manager = manager

    def get_manager(self, model_id: str, use_cb: bool = False) -> OneAtATime | Batches:
        return self.manager


async def _as_openai_streams(chunks: Any, include_usage: bool | None = None) -> AsyncIterator[str]:
    """
    Transformers' events, with errors in OpenAI's form and the event that ends a stream.

    Args:
        chunks: asynchronous iterator of events; the last chunk has the usage.
        include_usage: OpenAI's option: true sends the usage in a chunk of its own, which has no choices, false sends none.
    """
    async with contextlib.aclosing(chunks) as events:
        async for text in events:
            before, is_error, message = text.partition(_STREAM_ERROR)
            if is_error:
                yield before + f"data: {error_body(503, message.removesuffix(_STREAM_ERROR_END))}\n\n"
            else:
                for event in [text] if include_usage is None else _usage_apart(text, include_usage):
                    yield event
    yield "data: [DONE]\n\n"


def _usage_apart(text: str, include_usage: bool) -> Iterator[str]:
    for event in text.removesuffix("\n\n").split("\n\n"):
        chunk = json.loads(event.removeprefix("data: "))
        usage = chunk.pop("usage", None)
        yield event_of(chunk)
        if usage is not None and include_usage:
            yield event_of({**chunk, "choices": [], "usage": usage})


class _Checked:
    """Mixin for Transformers' handlers: the body is checked, and sampling is as the request says."""

    body: type[ChatRequest] | type[CompletionRequest]

    def __init__(self, served: ServedModel, models: OneModel, state: OneModelState):
        super().__init__(model_manager=models, generation_state=state)  # type: ignore[call-arg]
        self.served = served
        self.longest_token = max(map(len, served.tokenizer.get_vocab()))
        # One thread: a fast tokenizer is not for several at once.
        self._thread = ThreadPoolExecutor(1, "requests")

    async def answer(self, request: Request) -> Response:
        """
        Answer a request that has passed the gate.

        Raises:
            HTTPException: 400, 404 or 429, with what is wrong.
        """
        admitted: Admitted = request.scope[ADMITTED]
        admitted.take_places(1)
        with admitted.body() as body:
            asked, prompts = await asyncio.get_running_loop().run_in_executor(self._thread, self.prepare, body)
        admitted.take_places(len(prompts) - 1)
        response = await self._respond(asked, prompts, admitted.request_id)
        if isinstance(response, StreamingResponse):
            include_usage = asked.stream_options.include_usage if asked.stream_options else None
            response.body_iterator = _as_openai_streams(response.body_iterator, include_usage)
        return response

    def prepare(self, data: bytes) -> tuple[ChatRequest | CompletionRequest, list[Prompt]]:
        """
        Understand a body. Takes time that is linear in its size, and runs in a thread of its own.

        Returns:
            The request, and its prompts with a generation config each.

        Raises:
            HTTPException: 400 or 404, with what is wrong.
        """
        body = read_body(data)
        asked = self.checked(body)
        model = self.served.model
        use_cb = self.served.continuous_batching
        manager: Any = self.generation_state.get_manager(self.served.name, use_cb=use_cb)  # type: ignore[attr-defined]
        prompts = []
        for ids in self._encoded(asked, body):
            inputs: dict[str, Any] = {"input_ids": ids}
            if not use_cb:
                whole = torch.tensor([ids], dtype=torch.long, device=model.device)
                inputs = {"input_ids": whole, "attention_mask": torch.ones_like(whole)}
            config = self._build_generation_config(body, model.generation_config, use_cb=use_cb)
            # Before the first prompt is begun.
            manager.limit(inputs, config)
            prompts.append(Prompt(inputs, config, len(ids)))
        return asked, prompts

    def _encoded(self, asked: Any, body: dict[str, Any]) -> Iterator[list[int]]:
        """The token ids of each prompt."""
        raise NotImplementedError

    async def _respond(self, asked: Any, prompts: list[Prompt], request_id: str) -> Response:
        raise NotImplementedError

    def checked(self, body: dict[str, Any]) -> ChatRequest | CompletionRequest:
        """The request. Its body is brought into the form that Transformers reads."""
        drop_absent(body)
        request: ChatRequest | CompletionRequest = check_body(self.body, body)
        if isinstance(request, ChatRequest):
            body["messages"] = [message.for_template() for message in request.messages]
            self._check_size(*(message["content"] for message in body["messages"]))
        else:
            for prompt in request.prompt:
                self._check_size(prompt)
        if body.get("model") not in (None, self.served.name):
            self.model_manager.process_model_name(body["model"])  # type: ignore[attr-defined]
        if self.body is ChatRequest and not self.served.tokenizer.chat_template:
            raise refusal("this model's tokenizer has no chat template; use /v1/completions with a prompt")
        return request

    def _check_size(self, *texts: str | list[int]) -> None:
        """Refuse what is too long for sure before it is tokenised, which takes seconds and holds up all others."""
        least = sum(len(text) // self.longest_token if isinstance(text, str) else len(text) for text in texts)
        if least >= self.served.max_length:
            raise refusal(
                f"the prompt has {least} tokens or more, and this server takes up to {self.served.max_length} tokens for a "
                "prompt and its answer",
                code="context_length_exceeded",
            )

    def _build_generation_config(self, body: dict[str, Any], model_generation_config: Any, use_cb: bool = False) -> Any:
        # The library would seed at once, in the middle of what others draw.
        known = {name: value for name, value in body.items() if name not in ("seed", *ADDS_NOTHING)}
        config = super()._build_generation_config(known, model_generation_config, use_cb=use_cb)  # type: ignore[misc]
        set_stops(config)
        for name in NEUTRAL_SETTINGS.keys() & body.keys():
            config.update(**NEUTRAL_SETTINGS[name])
        setattr(config, SEED, body.get("seed"))
        # Before 5.24 Transformers does not know the first name. Its default is for models of any length.
        named = body.get("max_completion_tokens") or body.get("max_tokens")
        if named or body.get("generation_config") is None:
            config.max_new_tokens = named or self.served.max_new_tokens
        asked = body.get("temperature") is not None or body.get("top_p") is not None
        if asked:
            # Of itself a temperature changes nothing where the checkpoint's own setting is not to sample.
            config.do_sample = True
        if config.do_sample and config.temperature is not None and config.temperature < LOWEST_TEMPERATURE:
            config.do_sample = False
        if not config.do_sample:
            # Values that would have no effect, and a warning each.
            config.temperature = config.top_p = config.top_k = None
        elif config.top_k is None:
            # `generate` would take the likeliest 50.
            config.top_k = 0
        if config.do_sample and use_cb and body.get("seed") is not None:
            raise refusal(
                "seed is not supported with continuous batching, whose draws depend on what else is in the batch; leave it "
                "out, use temperature 0, or start the server with --no-continuous-batching",
                param="seed",
            )
        return config


class ChatRequests(_Checked, ChatCompletionHandler):
    body = ChatRequest

    def _encoded(self, asked: ChatRequest, body: dict[str, Any]) -> Iterator[list[int]]:
        try:
            yield encode_chat(self.served.tokenizer, body["messages"], add_generation_prompt=True)
        except ValueError as error:
            raise refusal(str(error), param="messages") from error

    async def _respond(self, asked: ChatRequest, prompts: list[Prompt], request_id: str) -> Response:
        served, (prompt,) = self.served, prompts
        manager = self.generation_state.get_manager(served.name, use_cb=served.continuous_batching)
        work = request_id, served.model, served.tokenizer, served.name, prompt.inputs, prompt.config, manager
        return self._streaming(*work) if asked.stream else await self._non_streaming(*work)


class CompletionRequests(_Checked, CompletionHandler):
    """Completions of one prompt or several. Transformers' handler knows one, which is a text."""

    body = CompletionRequest

    def _encoded(self, asked: CompletionRequest, body: dict[str, Any]) -> Iterator[list[int]]:
        for place, prompt in enumerate(asked.prompt):
            yield self._ids(prompt, place)

    def _ids(self, prompt: str | list[int], place: int) -> list[int]:
        if isinstance(prompt, str):
            return self.served.tokenizer(prompt, verbose=False)["input_ids"]
        size = self.served.model.config.vocab_size
        if (largest := max(prompt)) >= size:
            raise refusal(f"prompt.{place}: the model has no token {largest}; give 0 to {size - 1}", param="prompt")
        return prompt

    async def _respond(self, asked: CompletionRequest, prompts: list[Prompt], request_id: str) -> Response:
        manager: Any = self.generation_state.get_manager(self.served.name, use_cb=self.served.continuous_batching)
        answers = Answers(self.served, manager, prompts, request_id)
        if not asked.stream:
            return JSONResponse(await answers.whole())
        answers.begin()
        return StreamingResponse(answers.in_pieces(), media_type="text/event-stream")


def default_limits(served: ServedModel) -> Limits:
    """Limits whose bodies have room for the longest prompt."""
    return Limits(max_body=max(Limits.max_body, BODY_BYTES_PER_TOKEN * served.max_length))


def build_app(
    served: ServedModel, manager: OneAtATime | Batches, access: Access | None = None, limits: Limits | None = None
) -> Gate:
    """
    The web application.

    Args:
        served: the model.
        manager: how it generates.
        access: who may send requests; by default, clients of the loopback interface.
        limits: of requests; by default, those that fit the model.
    """
    models = OneModel(served)
    state = OneModelState(served, manager)
    app = FastAPI(openapi_url=None)
    _add_routes(app, models, state)
    _add_answers(app, ChatRequests(served, models, state), CompletionRequests(served, models, state))
    _add_errors(app)
    return Gate(app, access, limits or default_limits(served))


def _add_answers(app: FastAPI, chats: ChatRequests, completions: CompletionRequests) -> None:
    @app.post("/v1/chat/completions")
    async def complete_chat(request: Request) -> Response:
        return await chats.answer(request)

    @app.post("/v1/completions")
    async def complete(request: Request) -> Response:
        return await completions.answer(request)


def _add_routes(app: FastAPI, models: OneModel, state: OneModelState) -> None:
    entry = {"id": models.force_model, "object": "model", "created": 0, "owned_by": "grinmoe"}

    @app.api_route("/health", methods=_READING)
    async def health() -> Response:
        if not state.is_cb_alive():
            return JSONResponse({"status": "unhealthy", "reason": "cb_worker_dead"}, status_code=503)
        return JSONResponse({"status": "ok"})

    @app.api_route("/v1/models", methods=_READING)
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [entry]}

    @app.api_route("/v1/models/{model_id:path}", methods=_READING)
    async def retrieve_model(model_id: str) -> dict[str, Any]:
        models.process_model_name(model_id)
        return entry

    @app.post("/load_model")
    async def load_model(request: Request) -> Response:
        """`transformers chat` asks for its model before it starts."""
        with request.scope[ADMITTED].body() as data:
            body = await asyncio.to_thread(read_body, data)
        asked: LoadRequest = check_body(LoadRequest, body)
        name = models.process_model_name(asked.model)
        return StreamingResponse(models.load_model_streaming(name), media_type="text/event-stream")


def _add_errors(app: FastAPI) -> None:
    """Every error in OpenAI's form, also those that Transformers and FastAPI raise."""

    @app.exception_handler(StarletteHTTPException)
    async def refused(_request: Request, error: StarletteHTTPException) -> Response:
        detail: Any = error.detail
        fields = detail if isinstance(detail, dict) else {"message": str(detail)}
        response = error_response(error.status_code, **fields)
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(CBWorkerDeadError)
    async def dead(_request: Request, error: CBWorkerDeadError) -> Response:
        return error_response(503, f"no model to answer: {error}")

    @app.exception_handler(Exception)
    async def defect(_request: Request, error: Exception) -> Response:
        # The server logs it with its traceback.
        return error_response(500, f"the server failed on this request ({type(error).__name__})")
