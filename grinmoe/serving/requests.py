"""What `grinmoe serve` accepts in a request, and the bodies of its errors, as OpenAI's API has them.

A field that changes the answer is honoured or refused by name, and never ignored. A field that asks for what happens anyway,
or that concerns OpenAI's records and caches alone, is accepted. Null is as good as absent. Every list and every text has a
limit, here or in that of the body; docs/serving.md lists them.
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
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

# Prompts of one request to /v1/completions; each of them takes a place in the batch.
MAX_PROMPTS = 128
# Of a request; each message takes four tokens of a chat template at least.
MAX_MESSAGES, MAX_PARTS = 4096, 1024
# OpenAI takes four. Each costs a comparison for every letter of the answer.
MAX_STOPS, MAX_STOP_LETTERS = 64, 1000
MAX_END_TOKENS = 64
# Of any object with fields of its own; those that are not known are reported one by one.
MAX_FIELDS = 256
# Letters of names and labels, of a generation_config, and of a predicted answer, which is not used.
MAX_LABEL_LETTERS, MAX_SETTINGS_LETTERS, MAX_PREDICTION_LETTERS = 1024, 16384, 2**20
# Of fields with any content (metadata, cache_control, ...), which are not used: values at all levels, levels, letters.
MAX_EXTRA_VALUES, MAX_EXTRA_LEVELS, MAX_EXTRA_LETTERS = 256, 8, 4096
# Levels of objects and lists, and digits of an integer, in any JSON of a request.
MAX_LEVELS, MAX_DIGITS = 32, 40
# Letters of what a client has sent that a message quotes, and of a message.
_MAX_QUOTED, _MAX_MESSAGE = 100, 600


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


def _empty(value: Any) -> Any:
    """Refuse what has items before each of them is looked at."""
    if isinstance(value, (dict, list)) and value:
        raise PydanticCustomError("unsupported", "is not supported by this server; leave it out")
    return value


def _small(value: dict[str, Any]) -> dict[str, Any]:
    """Bound a field that may have any content."""
    level: list[Any] = [value]
    count = 0
    for _ in range(MAX_EXTRA_LEVELS):
        below: list[Any] = []
        for one in level:
            inside = [*one, *one.values()] if isinstance(one, dict) else one
            count += len(one)
            if count > MAX_EXTRA_VALUES:
                raise PydanticCustomError(
                    "too_many_values",
                    "has more than {most} values, the limit of this server",
                    {"most": MAX_EXTRA_VALUES},
                )
            if any(isinstance(text, str) and len(text) > MAX_EXTRA_LETTERS for text in inside):
                raise PydanticCustomError(
                    "long_text",
                    "has a text of more than {most} characters, the limit of this server",
                    {"most": MAX_EXTRA_LETTERS},
                )
            below += [one for one in inside if isinstance(one, (dict, list))]
        if not below:
            return value
        level = below
    raise PydanticCustomError(
        "too_deep", "has more than {most} levels, the limit of this server", {"most": MAX_EXTRA_LEVELS}
    )


# Bounded by the body's limit alone, and by the tokens that the model takes.
Text = Annotated[str, AfterValidator(_encodable)]
SomeText = Annotated[Text, Field(min_length=1)]
Stop = Annotated[SomeText, Field(max_length=MAX_STOP_LETTERS)]
Label = Annotated[str, Field(max_length=MAX_LABEL_LETTERS)]
TokenId = Annotated[int, Field(ge=-1, lt=2**31)]
Count = Annotated[int, Field(ge=1, lt=2**63)]
# What has no effect when it is so; anything else would be ignored by the server.
Zero = Annotated[float, AfterValidator(_only(0))] | None
One = Annotated[float, AfterValidator(_only(1))] | None
NoFields = Annotated[dict[str, Any], BeforeValidator(_empty), Field(max_length=0)] | None
NoItems = Annotated[list[Any], BeforeValidator(_empty), Field(max_length=0)] | None
# What has no effect whatever it is.
Extra = Annotated[dict[str, Any], AfterValidator(_small)] | None


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

    @model_validator(mode="before")
    @classmethod
    def _few_fields(cls, value: Any) -> Any:
        if isinstance(value, dict) and len(value) > MAX_FIELDS:
            raise PydanticCustomError(
                "many_fields",
                "has {size} fields; this server takes up to {most}",
                {"size": len(value), "most": MAX_FIELDS},
            )
        return value


class TextPart(_Strict):
    type: Literal["text"]
    text: Text
    # For caches; they change no answer.
    prompt_cache_breakpoint: Extra = None
    cache_control: Extra = None


class RefusalPart(_Strict):
    type: Literal["refusal"]
    refusal: Text


Parts = Annotated[
    list[Annotated[TextPart | RefusalPart, Field(discriminator="type")]], Field(max_length=MAX_PARTS, fail_fast=True)
]


class Message(_Strict):
    role: Literal["developer", "system", "user", "assistant"]
    content: Text | Parts | None = Field(None, validate_default=True)
    refusal: Text | None = None
    # Tells participants of one role apart. Many clients send it with every message; the chat template has no place for it.
    name: Annotated[Text, Field(max_length=MAX_LABEL_LETTERS)] | None = None
    # An answer that a client sends back as it got it has these, empty.
    annotations: NoItems = None
    audio: None = None
    function_call: None = None
    tool_calls: NoItems = None
    reasoning_content: Literal[""] | None = None
    # For a client's records and for caches, and a continuation that is not asked for.
    id: Label | None = None
    cache_control: Extra = None
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


PredictedText = Annotated[str, Field(max_length=MAX_PREDICTION_LETTERS)]


class PredictedPart(_Strict):
    type: Literal["text"]
    text: PredictedText


class GenerationSettings(_Strict):
    """The part of a `GenerationConfig` that `transformers chat` sends, as JSON in a string."""

    do_sample: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    max_new_tokens: Count | None = None
    eos_token_id: TokenId | Annotated[list[TokenId], Field(max_length=MAX_END_TOKENS, fail_fast=True)] | None = None
    pad_token_id: TokenId | None = None
    bos_token_id: TokenId | None = None
    transformers_version: Label | None = None
    from_model_config: Annotated[bool | None, Field(alias="_from_model_config")] = None


def _settings_of_json(value: Any) -> Any:
    if value is None:
        return None
    if not isinstance(value, str):
        raise PydanticCustomError("string_type", "Input should be a string with JSON in it")
    if len(value) > MAX_SETTINGS_LETTERS:
        raise PydanticCustomError(
            "long_settings",
            "has {size} characters; this server takes up to {most}",
            {"size": len(value), "most": MAX_SETTINGS_LETTERS},
        )
    try:
        return parse_json(value)
    except ValueError as error:
        raise PydanticCustomError("json", "Invalid JSON: {reason}", {"reason": str(error)}) from error


class Prediction(_Strict):
    """What OpenAI compares the answer with, to be faster."""

    type: Literal["content"]
    content: PredictedText | Annotated[list[PredictedPart], Field(max_length=MAX_PARTS, fail_fast=True)]


class StreamOptions(_Strict):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # of the packets' lengths; it adds no text
    continuous_usage_stats: Literal[False] | None = None


class _Common(_Strict):
    model: Label | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    max_tokens: Count | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS, fail_fast=True)] | None = None
    generation_config: Annotated[GenerationSettings | None, BeforeValidator(_settings_of_json)] = None
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
    request_id: Label | None = None
    cache_salt: Label | None = None
    cache_prompt: bool | None = None
    user: Label | None = None
    safety_identifier: Label | None = None
    prompt_cache_key: Label | None = None
    prompt_cache_options: Extra = None
    prompt_cache_retention: Label | None = None


class ChatRequest(_Common):
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    max_completion_tokens: Count | None = None
    logprobs: Literal[False] | None = None
    top_logprobs: Literal[0] | None = None
    response_format: PlainText | None = None
    tools: NoItems = None
    tool_choice: Literal["none", "auto"] | None = None
    functions: NoItems = None
    function_call: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=8, fail_fast=True)] | None = None
    verbosity: Literal["medium"] | None = None
    reasoning_effort: Literal["none"] | None = None
    add_generation_prompt: Literal[True] | None = None
    add_special_tokens: Literal[False] | None = None  # the chat template has them
    continue_final_message: Literal[False] | None = None
    chat_template_kwargs: NoFields = None
    # They change no answer: OpenAI's records, price and speed.
    metadata: Extra = None
    store: bool | None = None
    service_tier: Label | None = None
    prediction: Prediction | None = None

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
            "many_prompts",
            "has {size} prompts; a request has at most {most} prompts, send several requests",
            {"size": len(value), "most": MAX_PROMPTS},
        )
    return value


TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, fail_fast=True)]


class CompletionRequest(_Common):
    prompt: Annotated[
        list[SomeText | TokenIds],
        Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True),
        BeforeValidator(_as_prompts),
    ]
    logprobs: None = None
    add_special_tokens: Literal[True] | None = None
    suffix: Literal[""] | None = None


class LoadRequest(_Strict):
    """What `transformers chat` sends before it starts."""

    model: Label


def parse_json(text: bytes | str) -> Any:
    """
    Parse the JSON of a client, in time that is linear in its size.

    Raises:
        ValueError: it is not JSON in UTF-8, names a field of an object twice, or exceeds `MAX_LEVELS` or `MAX_DIGITS`.
    """
    try:
        content = json.loads(
            text.decode() if isinstance(text, bytes) else text,
            object_pairs_hook=_without_repetition,
            parse_int=_integer,
        )
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8: {error.reason} at byte {error.start}") from error
    except RecursionError as error:
        raise ValueError(f"it has more than {MAX_LEVELS} levels") from error
    level = [content]
    for _ in range(MAX_LEVELS + 1):
        level = [
            below
            for one in level
            if isinstance(one, (dict, list))
            for below in (one.values() if isinstance(one, dict) else one)
            if isinstance(below, (dict, list))
        ]
        if not level:
            return content
    raise ValueError(f"it has more than {MAX_LEVELS} levels")


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"it has the field {shortened(twice)!r} twice")
    return fields


def _integer(digits: str) -> int:
    # Python takes quadratic time for long ones.
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"it has an integer of {len(digits)} digits; the limit is {MAX_DIGITS}")
    return int(digits)


def shortened(text: str) -> str:
    """What a message quotes of a client's text."""
    return text if len(text) <= _MAX_QUOTED else text[:_MAX_QUOTED] + "..."


def refusal(
    message: str, status: int = 400, param: str | None = None, code: str | None = None, retry_after: int | None = None
) -> HTTPException:
    """The exception that becomes an answer with this message."""
    return HTTPException(status, {"message": message, "param": param, "code": code, "retry_after": retry_after})


def read_body(body: bytes) -> dict[str, Any]:
    """
    The JSON object of a request's body.

    Raises:
        HTTPException: 400, the body is something else.
    """
    try:
        content = parse_json(body)
    except ValueError as error:
        raise refusal(f"the body is not a JSON object: {error}") from error
    if not isinstance(content, dict):
        raise refusal(f"the body is not a JSON object but {_JSON_NAMES[type(content)]}; send an object")
    return content


_JSON_NAMES = {
    list: "a list",
    str: "a string",
    int: "a number",
    float: "a number",
    bool: "a boolean",
    type(None): "null",
}


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
    # Of the ways in which a union fails, the one that was meant is only too long, or else got furthest.
    too_long = ("string_too_long", "too_long")
    first = max(error.errors(include_url=False), key=lambda e: (e["type"] in too_long, len(e["loc"])))
    *above, last = first["loc"] or ("",)
    # The members of a union (str, list[...], constrained-str) are no part of a path that a user would write.
    path = [step for step in map(str, above) if step != "str" and not set(step) & set("[-")]
    if first["type"] == "extra_forbidden" or (str(last) != "str" and not set(str(last)) & set("[-")):
        path.append(str(last))
    where = shortened(".".join(map(shortened, path)))
    limits = first.get("ctx", {})
    if first["type"] in ("extra_forbidden", "none_required", "unsupported"):
        message = f"{where} is not supported by this server; leave it out"
    elif first["type"] == "missing":
        message = f"{where} is missing"
    elif first["type"] in too_long:
        units = "characters" if isinstance(first["input"], str) else "items"
        message = f"{where} has {len(first['input'])} {units}; this server takes up to {limits['max_length']}"
    else:
        message = f"{where or 'body'}: {first['msg']}"
    return refusal(message, param=where or None)


def error_response(
    status: int, message: str, param: str | None = None, code: str | None = None, retry_after: int | None = None
) -> Response:
    """An error as OpenAI's API and clients have it. `retry_after` is in seconds."""
    headers = None if retry_after is None else {"retry-after": str(retry_after)}
    return Response(error_body(status, message, param, code), status, headers, media_type="application/json")


_KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> str:
    """Its JSON."""
    kind = "server_error" if status >= 500 else _KINDS.get(status, "invalid_request_error")
    if len(message) > _MAX_MESSAGE:
        message = message[:_MAX_MESSAGE] + "..."
    # A message may quote what is no text (half of a surrogate pair), which no answer can hold.
    text, name = (one and one.encode("utf-8", "replace").decode() for one in (message, param))
    return json.dumps({"error": {"message": text, "type": kind, "param": name, "code": code}})
