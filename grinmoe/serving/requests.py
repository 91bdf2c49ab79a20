"""What `grinmoe serve` accepts in a request, and the bodies of its errors, as OpenAI's API has them.

A field that changes the answer is honoured or refused by name, and never ignored. A field that asks for what happens anyway,
or that concerns OpenAI's records and caches alone, is accepted. Null is as good as absent.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Annotated, Any, Literal, Self

from fastapi import HTTPException
from fastapi.responses import Response
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Json,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

# Prompts of one request to /v1/completions; each of them takes a place in the batch.
MAX_PROMPTS = 128


def _encodable(text: str) -> str:
    """JSON can spell half of a surrogate pair, which is no character; no tokenizer takes it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("has half of a surrogate pair, which is no character") from error
    return text


def _only(neutral: int) -> Callable[[float], float]:
    """A check that a number has the value that changes nothing."""

    def check(value: float) -> float:
        if value != neutral:
            raise PydanticCustomError("not_neutral", "only {neutral} is supported by this server", {"neutral": neutral})
        return value

    return check


Text = Annotated[str, AfterValidator(_encodable)]
SomeText = Annotated[Text, Field(min_length=1)]
TokenId = Annotated[int, Field(ge=-1, lt=2**31)]
# What has no effect when it is so; anything else would be ignored by the server.
Zero = Annotated[float, AfterValidator(_only(0))] | None
One = Annotated[float, AfterValidator(_only(1))] | None
NoFields = Annotated[dict[str, Any], Field(max_length=0)] | None
NoItems = Annotated[list[Any], Field(max_length=0)] | None


# What a field's neutral value, the only one that is accepted, sets in the `GenerationConfig` of its request, since the
# checkpoint's generation_config.json may ask for something else.
NEUTRAL_SETTINGS: dict[str, dict[str, Any]] = {
    "top_k": {"top_k": 0},
    "min_p": {"min_p": 0.0},
    "repetition_penalty": {"repetition_penalty": 1.0},
    "repeat_penalty": {"repetition_penalty": 1.0},
    "typical_p": {"typical_p": 1.0},
    "min_tokens": {"min_new_tokens": 0, "min_length": 0},
    "use_beam_search": {"num_beams": 1},
    "length_penalty": {"length_penalty": 1.0},
    "early_stopping": {"early_stopping": False},
}
# OpenAI's penalties add nothing to the logits at 0. Transformers' handlers would make a repetition_penalty of 1 of them.
ADDS_NOTHING = ("frequency_penalty", "presence_penalty")


class _Strict(BaseModel):
    """Wrong types are errors and not converted, and so are fields that are not listed."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class TextPart(_Strict):
    type: Literal["text"]
    text: Text
    # For caches; they change no answer.
    prompt_cache_breakpoint: dict[str, Any] | None = None
    cache_control: dict[str, Any] | None = None


class RefusalPart(_Strict):
    type: Literal["refusal"]
    refusal: Text


class Message(_Strict):
    role: Literal["developer", "system", "user", "assistant"]
    content: Text | list[Annotated[TextPart | RefusalPart, Field(discriminator="type")]] | None = Field(
        None, validate_default=True
    )
    refusal: Text | None = None
    # Tells participants of one role apart. Many clients send it with every message; the chat template has no place for it.
    name: Text | None = None
    # An answer that a client sends back as it got it has these, empty.
    annotations: NoItems = None
    audio: None = None
    function_call: None = None
    tool_calls: NoItems = None
    reasoning_content: Literal[""] | None = None
    # For a client's records and for caches, and a continuation that is not asked for.
    id: str | None = None
    cache_control: dict[str, Any] | None = None
    prefix: Literal[False] | None = None

    @field_validator("content")
    @classmethod
    def _only_the_assistant_says_nothing_or_refuses(cls, content: Any, info: ValidationInfo) -> Any:
        if info.data.get("role") != "assistant":
            if content is None:
                raise PydanticCustomError("missing", "content is missing")
            if isinstance(content, list) and any(isinstance(part, RefusalPart) for part in content):
                raise PydanticCustomError("refusal", "only messages of the assistant have parts of type 'refusal'")
        return content

    @field_validator("refusal")
    @classmethod
    def _content_or_refusal(cls, refusal: str | None, info: ValidationInfo) -> str | None:
        if refusal and (info.data.get("content") or info.data.get("role") != "assistant"):
            raise PydanticCustomError("refusal", "the assistant has either a content or a refusal; give one of them")
        return refusal

    def for_template(self) -> dict[str, str]:
        """Role and text. Parts are joined with nothing between them; `developer` is `system` for models without it."""
        content: Any = self.content or self.refusal or ""
        if not isinstance(content, str):
            content = "".join(part.text if isinstance(part, TextPart) else part.refusal for part in content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


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


class StreamOptions(_Strict):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # of the packets' lengths; it adds no text
    continuous_usage_stats: Literal[False] | None = None


class _Common(_Strict):
    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: SomeText | list[SomeText] | None = None
    generation_config: Json[GenerationSettings] | None = None
    n: Literal[1] | None = None
    frequency_penalty: Zero = None
    presence_penalty: Zero = None
    logit_bias: NoFields = None
    best_of: Literal[1] | None = None
    echo: Literal[False] | None = None
    # What clients of vLLM and SGLang send beside OpenAI's fields.
    top_k: Literal[-1, 0] | None = None
    min_p: Zero = None
    min_tokens: Zero = None
    priority: Zero = None
    repetition_penalty: One = None
    length_penalty: One = None
    stop_token_ids: NoItems = None
    use_beam_search: Literal[False] | None = None
    early_stopping: Literal[False] | None = None
    ignore_eos: Literal[False] | None = None
    include_reasoning: Literal[False] | None = None
    include_stop_str_in_output: Literal[False] | None = None
    skip_special_tokens: Literal[True] | None = None
    spaces_between_special_tokens: Literal[True] | None = None
    detokenize: Literal[True] | None = None
    # What clients of llama.cpp send.
    mirostat: Zero = None
    dry_multiplier: Zero = None
    xtc_probability: Zero = None
    dynatemp_range: Zero = None
    n_keep: Zero = None
    repeat_penalty: One = None
    typical_p: One = None
    tfs_z: One = None
    id_slot: Literal[-1] | None = None
    # For records and caches; they change no answer.
    request_id: str | None = None
    cache_salt: str | None = None
    cache_prompt: bool | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    prompt_cache_retention: str | None = None


class ChatRequest(_Common):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: Literal[False] | None = None
    top_logprobs: Literal[0] | None = None
    response_format: PlainText | None = None
    tools: NoItems = None
    tool_choice: Literal["none", "auto"] | None = None
    functions: NoItems = None
    function_call: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    modalities: list[Literal["text"]] | None = None
    verbosity: Literal["medium"] | None = None
    reasoning_effort: Literal["none"] | None = None
    add_generation_prompt: Literal[True] | None = None
    add_special_tokens: Literal[False] | None = None  # the chat template has them
    continue_final_message: Literal[False] | None = None
    chat_template_kwargs: NoFields = None
    # They change no answer: OpenAI's records, price and speed.
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    prediction: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _one_limit(self) -> Self:
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise PydanticCustomError(
                "two_limits", "max_tokens and max_completion_tokens are the same limit, and differ; give one of them"
            )
        return self


def _as_prompts(value: Any) -> Any:
    """One prompt, a text or token ids, or a list of prompts, as a list of prompts."""
    if isinstance(value, str) or (isinstance(value, list) and value and isinstance(value[0], int)):
        return [value]
    if isinstance(value, list) and len(value) > MAX_PROMPTS:
        raise PydanticCustomError(
            "many_prompts", "a request has at most {most} prompts; send several requests", {"most": MAX_PROMPTS}
        )
    return value


TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, fail_fast=True)]


class CompletionRequest(_Common):
    prompt: Annotated[list[SomeText | TokenIds], Field(min_length=1), BeforeValidator(_as_prompts)]
    logprobs: None = None
    add_special_tokens: Literal[True] | None = None
    suffix: Literal[""] | None = None


class LoadRequest(_Strict):
    """What `transformers chat` sends before it starts."""

    model: str


def refusal(message: str, status: int = 400, param: str | None = None, code: str | None = None) -> HTTPException:
    """The exception that becomes an answer with this message."""
    return HTTPException(status, {"message": message, "param": param, "code": code})


def drop_absent(body: dict[str, Any]) -> None:
    """Remove the fields of a body and of its messages whose value is one for an absent field. `generate` fails on some."""
    messages = body.get("messages")
    for fields in [body, *(messages if isinstance(messages, list) else ())]:
        for name in [name for name, value in fields.items() if value is None] if isinstance(fields, dict) else ():
            del fields[name]
    # -1 is "no limit" in llama.cpp and LM Studio.
    for name, values in (("stop", ([], "", [""])), ("logit_bias", ({},)), ("max_tokens", (-1,))):
        if name in body and body[name] in values:
            del body[name]


def check_body(kind: type[_Strict], body: dict[str, Any]) -> Any:
    """
    Check a request's body.

    Args:
        kind: ChatRequest, CompletionRequest or LoadRequest.
        body: the JSON object.

    Returns:
        The request, a `kind`.

    Raises:
        HTTPException: 400, with what is wrong and where.
    """
    try:
        return kind.model_validate(body)
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
