"""The server of Transformers (`transformers serve`) for one loaded model.

All that `grinmoe serve` takes from inside Transformers is in this file, and `tests/test_serve_inside.py` says what has
moved when a new version moves it. `transformers serve` itself cannot load a GRIN-MoE: it looks the class of a checkpoint
up among the attributes of the transformers module, where remote code never is. Here its handlers, its routes and its
batching are given a model that is loaded already. What differs from `transformers serve`, each with its reason:

- one model, which no request unloads, exchanges or downloads another beside;
- with continuous batching, each request has its own temperature, top_p and top_k; there the first request's hold for all;
- requests are checked before they reach the model, which a single bad one could stop for all;
- bytes that are no UTF-8 do not end a stream, as they do in the library's decoder;
- errors have the form that OpenAI's clients read.
"""

from __future__ import annotations

import asyncio
import copy
import inspect
import itertools
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jinja2
import torch
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException as StarletteHTTPException
from transformers import (
    ContinuousBatchingConfig,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager, TimedModel
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import CBGenerateManager, CBWorkerDeadError, GenerateManager, GenerationState

from .http_server import EndWithClient
from .serve_requests import (
    ChatRequest,
    CompletionRequest,
    LoadRequest,
    check_body,
    error_response,
    refusal,
)
from .text_stream import TextStream

# The routes of Transformers that are served. The others are for other kinds of models, or change which model is loaded.
SERVED_ROUTES = {"/v1/chat/completions", "/v1/completions", "/health"}
# Tokens of a block of the paged cache: the library's default, under two names (block_size until 5.17, page_size since).
BLOCK_TOKENS = 256
# Below it the logits divided by the temperature could overflow; the likeliest token is all but certain long before.
LOWEST_TEMPERATURE = 0.01
SHUTTING_DOWN = "the server is shutting down"


@dataclass(frozen=True)
class ServedModel:
    """A loaded model and the limits that it is served with."""

    model: Any
    tokenizer: Any
    name: str  # what requests call it
    max_length: int  # tokens of a prompt and its answer together
    max_new_tokens: int  # tokens of an answer
    continuous_batching: bool


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
                f"the model {model_id!r} is not served here; this server has {self.force_model!r}",
                404,
                "model",
                "model_not_found",
            )
        return model_id


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


class OneAtATime(_Limited, GenerateManager):
    """Without continuous batching: `generate`, one request after the other."""

    def __init__(self, served: ServedModel):
        super().__init__()
        self.served = served
        self._stopping = threading.Event()
        self._held: list[tuple[Any, ...]] | None = None

    def generate_streaming(self, model, processor, inputs, gen_config, *args, **kwargs):
        self.limit(inputs, gen_config)
        # Transformers hands on whatever is among the inputs.
        inputs = {**inputs, "stopping_criteria": StoppingCriteriaList([_Unless(self._stopping.is_set)])}
        # The other thread must not begin before the streamer is as it should be.
        held: list[tuple[Any, ...]] = []
        self._held = held
        try:
            queue, streamer = super().generate_streaming(model, processor, inputs, gen_config, *args, **kwargs)
        finally:
            self._held = None
        streamer._decode_stream = TextStream()  # type: ignore[assignment]
        for work in held:
            self.submit(*work)
        return queue, streamer

    def submit(self, fn, *args, **kwargs):
        if self._held is None:
            return super().submit(fn, *args, **kwargs)
        self._held.append((fn, *args))
        return None

    async def generate_non_streaming(self, model, processor, inputs, gen_config, *args, **kwargs):
        self.limit(inputs, gen_config)
        left = threading.Event()
        inputs = {**inputs, "stopping_criteria": StoppingCriteriaList([_Unless(self._stopping.is_set, left.is_set)])}
        answer = asyncio.ensure_future(
            super().generate_non_streaming(model, processor, inputs, gen_config, *args, **kwargs)
        )
        try:
            # The thread that generates must find a future that is not cancelled.
            return await asyncio.shield(answer)
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
    others = [type(step).__name__ for step in model._get_logits_processor(options) if not isinstance(step, own)]
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
        streamer._decode_stream = TextStream()  # type: ignore[assignment]
        return queue, streamer

    async def generate_non_streaming(self, model, processor, inputs, gen_config, request_id):
        self.limit(inputs, gen_config)
        request_id = self._own_id(request_id, gen_config)
        try:
            return await super().generate_non_streaming(model, processor, inputs, gen_config, request_id)
        except asyncio.CancelledError:
            self._cb.cancel_request(request_id)
            raise
        except RuntimeError as error:
            if self._stopping:
                raise CBWorkerDeadError(SHUTTING_DOWN) from error
            raise

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


def _sampling(gen_config: Any, vocab_size: int) -> dict[str, Any]:
    """The per-request arguments of the batch's processors. Greedy is one candidate, also where several are equal."""
    if not gen_config.do_sample:
        return {"temperature": 1.0, "top_k": 1, "top_p": 1e-9}
    return {
        "temperature": float(gen_config.temperature if gen_config.temperature is not None else 1.0),
        "top_k": min(gen_config.top_k or vocab_size, vocab_size),
        "top_p": float(gen_config.top_p if gen_config.top_p is not None else 1.0),
    }


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


class _Checked:
    """Mixin for Transformers' handlers: the body is checked, and sampling is as the request says."""

    served: ServedModel
    body: type[ChatRequest] | type[CompletionRequest]

    def _validate_request(self, body: dict[str, Any]) -> None:
        check_body(self.body, body)
        if self.body is ChatRequest:
            # Fields that are there and empty are looked into by Transformers 5.17.
            body["messages"] = [
                {k: v for k, v in message.items() if v} | {"content": message["content"]}
                for message in body["messages"]
            ]
        if body.get("model") not in (None, self.served.name):
            self.model_manager.process_model_name(body["model"])  # type: ignore[attr-defined]
        if self.body is ChatRequest and not self.served.tokenizer.chat_template:
            raise refusal("this model's tokenizer has no chat template; use /v1/completions with a prompt")
        if self.served.continuous_batching and body.get("stop") is not None:
            raise refusal(
                "stop is not supported with continuous batching; leave it out, or start the server with "
                "--no-continuous-batching",
                param="stop",
            )

    def _build_generation_config(self, body: dict[str, Any], model_generation_config: Any, use_cb: bool = False) -> Any:
        config = super()._build_generation_config(body, model_generation_config, use_cb=use_cb)  # type: ignore[misc]
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

    def __init__(self, served: ServedModel, manager: OneModel, state: OneModelState):
        super().__init__(model_manager=manager, generation_state=state)
        self.served = served


class CompletionRequests(_Checked, CompletionHandler):
    body = CompletionRequest

    def __init__(self, served: ServedModel, manager: OneModel, state: OneModelState):
        super().__init__(model_manager=manager, generation_state=state)
        self.served = served


def build_app(served: ServedModel, manager: OneAtATime | Batches) -> FastAPI:
    """
    The web application.

    Args:
        served: the model.
        manager: how it generates.
    """
    models = OneModel(served)
    state = OneModelState(served, manager)
    handlers: dict[str, Any] = {
        "chat_handler": ChatRequests(served, models, state),
        "completion_handler": CompletionRequests(served, models, state),
    }
    # Each version has handlers for other kinds of models, whose routes are not served.
    others = [name for name in inspect.signature(build_server).parameters if name.endswith("_handler")]
    app = build_server(models, generation_state=state, **{**dict.fromkeys(others), **handlers})
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", None) in SERVED_ROUTES]
    _add_routes(app, models)
    _add_errors(app)
    app.add_middleware(EndWithClient)
    return app


def _add_routes(app: FastAPI, models: OneModel) -> None:
    entry = {"id": models.force_model, "object": "model", "created": 0, "owned_by": "grinmoe"}

    @app.get("/v1/models")
    def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [entry]}

    @app.get("/v1/models/{model_id:path}")
    def retrieve_model(model_id: str) -> dict[str, Any]:
        models.process_model_name(model_id)
        return entry

    @app.post("/load_model")
    async def load_model(body: dict) -> StreamingResponse:
        """`transformers chat` asks for its model before it starts."""
        check_body(LoadRequest, body)
        name = models.process_model_name(body["model"])
        return StreamingResponse(models.load_model_streaming(name), media_type="text/event-stream")


def _add_errors(app: FastAPI) -> None:
    """Every error in OpenAI's form, also those that Transformers and FastAPI raise."""

    @app.exception_handler(StarletteHTTPException)
    async def refused(_request: Request, error: StarletteHTTPException) -> JSONResponse:
        detail = error.detail
        if isinstance(detail, dict):
            return error_response(error.status_code, **detail)
        return error_response(error.status_code, str(detail))

    @app.exception_handler(RequestValidationError)
    async def no_object(_request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        reason = first.get("ctx", {}).get("error", first["msg"])
        return error_response(400, f"the body is no JSON object ({reason}); send one, as Content-Type application/json")

    @app.exception_handler(jinja2.TemplateError)
    async def no_chat(_request: Request, error: jinja2.TemplateError) -> JSONResponse:
        return error_response(400, f"the chat template refuses these messages: {error}", "messages")

    @app.exception_handler(CBWorkerDeadError)
    async def dead(_request: Request, error: CBWorkerDeadError) -> JSONResponse:
        return error_response(503, f"no model to answer: {error}")

    @app.exception_handler(Exception)
    async def defect(_request: Request, error: Exception) -> JSONResponse:
        # The server logs it with its traceback.
        return error_response(500, f"the server failed on this request ({type(error).__name__})")


__all__ = ["BLOCK_TOKENS", "Batches", "OneAtATime", "ServedModel", "build_app", "start_batching"]
