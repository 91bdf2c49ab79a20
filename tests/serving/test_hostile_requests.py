"""Requests of any size and shape are answered or refused by name, in bounded time, and others are answered meanwhile."""

from __future__ import annotations

import json
import typing

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

import grinmoe.serving.requests as requests
from grinmoe.serving.gate import Limits
from tests import ROOT
from tests.serving.hostile import post, watched_health
from tests.serving.served_model import MAX_LENGTH, ask, chat, in_this_process

CHATS, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MESSAGE = {"role": "user", "content": "What?"}
# Generous: on a busy machine the tests' own work delays an answer too. Before there were limits it took minutes.
SECONDS = 20


@pytest.fixture(scope="module", params=[True, False], ids=["batch", "one at a time"])
def server(request, served_folder):
    with in_this_process(served_folder, request.param) as (client, _, _):
        yield client, str(client.base_url).removesuffix("/v1/")


@pytest.fixture
def url(server):
    return server[1]


def deep(levels: int) -> bytes:
    return b"[" * levels + b"]" * levels


# Body of a chat, and what the refusal says: field, size and limit.
TOO_MUCH = {
    "stop of a megabyte": ({"stop": "x" * 10**6}, "stop has 1000000 characters; this server takes up to 1000"),
    "stop, long": ({"stop": ["a", "x" * 1001]}, "stop.1 has 1001 characters; this server takes up to 1000"),
    "stops": ({"stop": ["x"] * 65}, "stop has 65 items; this server takes up to 64"),
    "stops of a megabyte": ({"stop": ["x"] * 200_000}, "stop has 200000 items; this server takes up to 64"),
    "messages": ({"messages": [MESSAGE] * 4097}, "messages has 4097 items; this server takes up to 4096"),
    "parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": ""}] * 1025}]},
        "messages.0.content has 1025 items; this server takes up to 1024",
    ),
    "name": (
        {"messages": [{**MESSAGE, "name": "n" * 1025}]},
        "messages.0.name has 1025 characters; this server takes up to",
    ),
    "id": ({"messages": [{**MESSAGE, "id": "n" * 1025}]}, "messages.0.id has 1025 characters"),
    "model": ({"model": "m" * 10**6}, "model has 1000000 characters; this server takes up to 1024"),
    "user": ({"user": "u" * 1025}, "user has 1025 characters; this server takes up to 1024"),
    "metadata, values": ({"metadata": {str(i): "" for i in range(257)}}, "metadata: has more than 256 values"),
    "metadata, key": ({"metadata": {"k" * 5000: ""}}, "metadata: has a text of more than 4096 characters"),
    "metadata, value": ({"metadata": {"k": ["v" * 5000]}}, "metadata: has a text of more than 4096 characters"),
    "metadata, levels": ({"metadata": json.loads('{"a":' * 9 + "1" + "}" * 9)}, "metadata: has more than 8 levels"),
    "cache_control": (
        {"messages": [{**MESSAGE, "cache_control": {"a": [1] * 300}}]},
        "messages.0.cache_control: has more",
    ),
    "prompt_cache_options": (
        {"prompt_cache_options": {"a": [[]] * 300}},
        "prompt_cache_options: has more than 256 values",
    ),
    "prediction": (
        {"prediction": {"type": "content", "content": "x" * (2**20 + 1)}},
        "this server takes up to 1048576",
    ),
    "logit_bias": ({"logit_bias": {str(i): 1 for i in range(200_000)}}, "logit_bias is not supported"),
    "tools": ({"tools": [{}] * 200_000}, "tools is not supported"),
    "tool_calls": ({"messages": [{"role": "assistant", "tool_calls": [1] * 200_000}]}, "tool_calls is not supported"),
    "unknown field": ({"f" * 10**6: 1}, "fff... is not supported by this server"),
    "role": ({"messages": [{"role": "r" * 10**6, "content": ""}]}, "messages.0.role"),
    "type of a part": ({"messages": [{"role": "user", "content": [{"type": "t" * 10**6}]}]}, "messages.0.content.0"),
    "generation_config": (
        {"generation_config": " " * 16385},
        "generation_config: has 16385 characters; this server",
    ),
    "its eos_token_id": (
        {"generation_config": json.dumps({"eos_token_id": [5] * 65})},
        "generation_config.eos_token_id has 65 items; this server takes up to 64",
    ),
    "its levels": ({"generation_config": "[" * 5000}, "generation_config"),
    "its digits": ({"generation_config": '{"top_k": ' + "9" * 400 + "}"}, "an integer of 400 digits"),
    "temperature": ({"temperature": 1e308}, "temperature: Input should be less than or equal to 2"),
    "seed": ({"seed": 2**63}, "seed: "),
    "max_tokens": ({"max_tokens": 2**63}, "max_tokens: "),
    "n": ({"n": 10**30}, "n: "),
    "modalities": ({"modalities": ["text"] * 100}, "modalities has 100 items"),
    "content": (
        {"messages": [{"role": "user", "content": "What is? " * 300_000}]},
        "tokens or more, and this server",
    ),
}
# Each of them would be an error of its own.
MANY = {f"f{i}": 1 for i in range(300_000)}
TOO_MUCH |= {
    "fields": (MANY, "body: has 300001 fields; this server takes up to 256"),
    "fields of a message": ({"messages": [{**MESSAGE, **MANY}]}, "messages.0: has 300002 fields; this server takes"),
    "fields of a part": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "", **MANY}]}]},
        "has 300002 fields; this server takes up to 256",
    ),
    "fields of a prediction": ({"prediction": MANY}, "prediction: has 300000 fields; this server takes up to 256"),
    "fields of stream_options": ({"stream_options": MANY}, "stream_options: has 300000 fields; this server takes"),
}
# Bodies that no dict spells.
RAW = {
    "digits": (b'{"seed": ' + b"9" * 400 + b"}", "an integer of 400 digits; the limit is 40"),
    "a million digits": (b'{"seed": ' + b"9" * 10**6 + b"}", "an integer of 1000000 digits"),
    "levels": (b'{"metadata": ' + deep(40) + b"}", "more than 32 levels"),
    "many levels": (b'{"metadata": ' + deep(10**6) + b"}", "more than 32 levels"),
    "repeated field": (b'{"model": "a", "model": "b"}', "'model' twice"),
    "repeated field of a message": (b'{"messages": [{"role": "user", "role": "user"}]}', "'role' twice"),
    "long repeated field": (b'{"' + b"k" * 10**6 + b'": 1, "' + b"k" * 10**6 + b'": 1}', "kkk...' twice"),
    "not UTF-8": (b'{"model": "\xff"}', "not UTF-8"),
    "UTF-16": ('{"model": "a"}'.encode("utf-16"), "not UTF-8"),
    "byte order mark": (b"\xef\xbb\xbf{}", "BOM"),
    "NUL": (b"\x00" * 1000, "not a JSON object"),
    "gzip": (b"\x1f\x8b\x08\x00" + bytes(100), "not UTF-8"),
    "empty lists": (b'{"messages": [' + b"[]," * 10**6 + b"[]]}", "messages"),
    "empty objects": (b'{"messages": [' + b"{}," * 10**6 + b"{}]}", "messages"),
    "empty messages": (b'{"messages": [' + b'{"role":"user"},' * 200_000 + b"{}]}", "messages"),
}


class TestLimits:
    @pytest.mark.parametrize("name", TOO_MUCH)
    def test_field_beyond_its_limit_is_refused_with_name_size_and_limit(self, url, name):
        change, message = TOO_MUCH[name]
        with watched_health(url) as health:
            status, answer = post(url, CHATS, {"messages": [MESSAGE], **change})
        assert (status, answer["error"]["type"]) == (400, "invalid_request_error")
        assert message in answer["error"]["message"]
        assert len(json.dumps(answer)) < 1200, "a message does not quote megabytes"
        assert max(health) < SECONDS

    @pytest.mark.parametrize("name", RAW)
    def test_json_beyond_its_limits_is_refused_with_the_reason(self, url, name):
        body, message = RAW[name]
        with watched_health(url) as health:
            status, answer = post(url, CHATS, body)
        assert status == 400
        assert message in answer["error"]["message"]
        assert len(json.dumps(answer)) < 1200
        assert max(health) < SECONDS

    @pytest.mark.parametrize(
        "change, message",
        [
            ({"prompt": ["a"] * 129}, "prompt: has 129 prompts; a request has at most 128 prompts"),
            ({"prompt": [[]] * 10**5}, "prompt: has 100000 prompts"),
            ({"prompt": [5] * 10**6}, f"takes up to {MAX_LENGTH} tokens"),
            ({"prompt": [10**30]}, "the model has no token"),
            ({"prompt": ["x" * 10**6]}, f"takes up to {MAX_LENGTH} tokens"),
            ({"stop": ["x" * 1001]}, "stop.0 has 1001 characters"),
            ({"suffix": "s" * 10**6}, "suffix"),
        ],
        ids=lambda value: str(value)[:24],
    )
    def test_completion_beyond_a_limit_is_refused_with_the_reason(self, url, change, message):
        status, answer = post(url, COMPLETIONS, {"prompt": "What", **change})
        assert status == 400
        assert message in answer["error"]["message"]
        assert len(json.dumps(answer)) < 1200

    def test_body_beyond_its_limit_is_refused_with_413(self, url):
        most = Limits.max_body
        status, answer = post(url, CHATS, b'{"messages": "' + b"x" * most + b'"}')
        assert (status, answer["error"]["code"]) == (413, "context_length_exceeded")
        assert f"{most:,} bytes" in answer["error"]["message"]

    def test_request_at_its_limits_is_answered(self, server):
        client, url = server
        longest = [f"{i}" + "x" * (requests.MAX_STOP_LETTERS - len(str(i))) for i in range(requests.MAX_STOPS)]
        plain = ask(client, "What?", max_tokens=8).choices[0].message.content
        body = {
            "messages": chat("What?"),
            "temperature": 0,
            "max_tokens": 8,
            "stop": longest,
            "user": "u" * requests.MAX_LABEL_LETTERS,
            "metadata": {"k": "v" * requests.MAX_EXTRA_LETTERS},
            "prediction": {"type": "content", "content": [{"type": "text", "text": "x" * 1000}]},
        }
        for stream in (False, True):
            status, answer = post(url, CHATS, {**body, "stream": False})
            assert (status, answer["choices"][0]["message"]["content"]) == (200, plain), stream


TOKEN_IDS = typing.get_args(requests.TokenIds)[1]


def bounded(annotation: object, limits: list) -> set[str]:
    """Kinds of texts and lists in a type, with whether they have a limit."""
    found: set[str] = set()
    arguments = typing.get_args(annotation)
    limits = [*limits, *(one for one in arguments[1:] if typing.get_origin(annotation) is typing.Annotated)]
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return bounded(arguments[0], limits)
    is_bounded = any(
        getattr(one, "max_length", None) is not None
        or any(getattr(inner, "max_length", None) is not None for inner in getattr(one, "metadata", []))
        or getattr(one, "func", None) in (requests._small, requests._encodable)
        or one is TOKEN_IDS
        for one in limits
    )
    if annotation is str or origin in (list, dict):
        found |= set() if is_bounded else {str(annotation)}
    if origin is list:
        found |= bounded(arguments[0], [])
    elif origin not in (dict, typing.Literal):
        for one in arguments:
            found |= bounded(one, [])
    return found


def models(of: type[BaseModel]) -> set[type[BaseModel]]:
    found = {of}

    def visit(annotation: object) -> None:
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            found.update(models(annotation))
        for one in typing.get_args(annotation):
            visit(one)

    for field in of.model_fields.values():
        visit(field.annotation)
    return found


KINDS = sorted(
    models(requests.ChatRequest) | models(requests.CompletionRequest) | {requests.LoadRequest},
    key=lambda one: one.__name__,
)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_text_and_list_of_the_schema_has_a_limit(kind):
    """What the model reads (`Text`, `TokenIds`) is bounded by the body and by the tokens that the model takes."""
    unbounded = {
        name: found
        for name, field in kind.model_fields.items()
        if (found := bounded(typing.Annotated[field.annotation, *field.metadata, field], []))
    }
    assert unbounded == {}


def test_the_limits_are_documented():
    text = (ROOT / "docs" / "serving.md").read_text()
    table = text[text.index("### Of a request") :]
    for name in [name for name in dir(requests) if name.startswith("MAX_")]:
        assert f"{getattr(requests, name):,}" in table, name
    for name in ("max_connections", "max_requests", "request_timeout", "write_timeout"):
        assert f"{getattr(Limits, name):g}" in text, name


any_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.just("x" * 5000),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=8), inner, max_size=5),
    max_leaves=12,
)
FIELDS = sorted({*requests.ChatRequest.model_fields, *requests.CompletionRequest.model_fields})


class TestAnyRequest:
    @settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=8), any_json, max_size=4), st.booleans())
    def test_any_body_is_understood_or_refused_by_name(self, change, is_chat):
        kind = requests.ChatRequest if is_chat else requests.CompletionRequest
        body = {"messages": [MESSAGE]} if is_chat else {"prompt": "What"}
        data = json.dumps({**body, **change}).encode()
        try:
            parsed = requests.read_body(data)
            requests.drop_absent(parsed)
            requests.check_body(kind, parsed)
        except requests.HTTPException as error:
            self.check_refusal(error)

    @settings(max_examples=150, deadline=None)
    @given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
    def test_any_bytes_are_an_object_or_refused(self, data):
        try:
            assert isinstance(requests.read_body(data), dict)
        except requests.HTTPException as error:
            self.check_refusal(error)

    @staticmethod
    def check_refusal(error) -> None:
        answer = json.loads(bytes(requests.error_response(error.status_code, **error.detail).body))["error"]
        assert error.status_code == 400 and answer["message"] and len(str(answer)) < 1200
