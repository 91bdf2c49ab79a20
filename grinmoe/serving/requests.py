"""What `grinmoe serve` accepts in a request, and the bodies of its errors, as OpenAI's API has them.

What the server behind it would ignore, and so answer something else than was asked, is refused here.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from fastapi import HTTPException
from fastapi.responses import Response
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, Json, ValidationError


def _encodable(text: str) -> str:
    """JSON can spell half of a surrogate pair, which is no character; no tokenizer takes it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("has half of a surrogate pair, which is no character") from error
    return text


Text = Annotated[str, AfterValidator(_encodable)]
SomeText = Annotated[Text, Field(min_length=1)]
TokenId = Annotated[int, Field(ge=-1, lt=2**31)]
# What has no effect when it is so; anything else would be ignored by the server.
NoPenalty = Literal[0] | None
NoItems = Annotated[list[Any], Field(max_length=0)] | None


class _Strict(BaseModel):
    """Wrong types are errors and not converted, and so are fields that are not listed."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class TextPart(_Strict):
    type: Literal["text"]
    text: Text


class Message(_Strict):
    role: Literal["system", "user", "assistant"]
    content: Text | list[TextPart]
    name: str | None = None
    # An answer that a client sends back as it got it has these, empty.
    refusal: None = None
    annotations: NoItems = None
    audio: None = None
    function_call: None = None
    tool_calls: NoItems = None


class PlainText(_Strict):
    type: Literal["text"]


class GenerationSettings(_Strict):
    """The part of a `GenerationConfig` that `transformers chat` sends, as JSON in a string."""

    do_sample: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    max_new_tokens: Annotated[int, Field(ge=1)] | None = None
    eos_token_id: TokenId | list[TokenId] | None = None
    pad_token_id: TokenId | None = None
    bos_token_id: TokenId | None = None
    transformers_version: str | None = None
    from_model_config: Annotated[bool | None, Field(alias="_from_model_config")] = None


class _Common(_Strict):
    model: str | None = None
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: SomeText | Annotated[list[SomeText], Field(min_length=1)] | None = None
    generation_config: Json[GenerationSettings] | None = None
    n: Literal[1] | None = None
    frequency_penalty: NoPenalty = None
    presence_penalty: NoPenalty = None
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = None
    # For OpenAI's records and caches; they change no answer.
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


class ChatRequest(_Common):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: Literal[False] | None = None
    top_logprobs: Literal[0] | None = None
    response_format: PlainText | None = None
    tools: NoItems = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None


class CompletionRequest(_Common):
    prompt: SomeText
    best_of: Literal[1] | None = None
    echo: Literal[False] | None = None
    logprobs: None = None
    suffix: None = None


class LoadRequest(_Strict):
    """What `transformers chat` sends before it starts."""

    model: str


def refusal(message: str, status: int = 400, param: str | None = None, code: str | None = None) -> HTTPException:
    """The exception that becomes an answer with this message."""
    return HTTPException(status, {"message": message, "param": param, "code": code})


def check_body(kind: type[_Strict], body: dict[str, Any]) -> None:
    """
    Check a request's body.

    Args:
        kind: ChatRequest, CompletionRequest or LoadRequest.
        body: the JSON object.

    Raises:
        HTTPException: 400, with what is wrong and where.
    """
    try:
        kind.model_validate(body)
    except ValidationError as error:
        raise _refused(error) from error


def _refused(error: ValidationError) -> HTTPException:
    """What is wrong, and where: one thing of all."""
    # Of the ways in which a union fails, the one that got furthest is the one that was meant.
    first = max(
        error.errors(include_url=False, include_context=False, include_input=False), key=lambda e: len(e["loc"])
    )
    # The members of a union (str, list[...], constrained-str) are no part of a path that a user would write.
    path = [step for step in map(str, first["loc"]) if step != "str" and not set(step) & set("[-")]
    where = ".".join(path)
    if first["type"] in ("extra_forbidden", "too_long", "none_required"):
        message = f"{where} is not supported by this server; leave it out"
    elif first["type"] == "missing":
        message = f"{where} is missing"
    else:
        message = f"{where or 'body'}: {first['msg']}"
    return refusal(message, param=where or None)


def error_response(status: int, message: str, param: str | None = None, code: str | None = None) -> Response:
    """An error as OpenAI's API and clients have it."""
    return Response(error_body(status, message, param, code), status, media_type="application/json")


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> str:
    """Its JSON."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    # A message may quote what is no text (half of a surrogate pair), which no answer can hold.
    text = message.encode("utf-8", "replace").decode()
    return json.dumps({"error": {"message": text, "type": kind, "param": param, "code": code}})
