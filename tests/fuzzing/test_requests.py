"""Requests to the server: status 4xx with OpenAI's form of an error, or an answer."""

from __future__ import annotations

import json
import urllib.error
import urllib.request

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("fastapi")

from fastapi import HTTPException

from grinmoe.serving.requests import ChatRequest, CompletionRequest, check_body, drop_absent
from tests.fuzzing.strategies import as_json, json_values, tried, with_other_fields
from tests.serving.served_model import in_this_process

CHAT = {"model": "tiny-chat", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
COMPLETION = {"model": "tiny-chat", "prompt": "hi", "max_tokens": 2}


def bodies(kind, valid):
    return with_other_fields(valid, tuple(kind.model_fields))


@pytest.mark.newest_only
@pytest.mark.parametrize("kind, valid", [(ChatRequest, CHAT), (CompletionRequest, COMPLETION)], ids=["chat", "text"])
def test_body_of_any_fields_is_a_request_or_a_named_refusal(kind, valid, bounded, fuzzed):
    @fuzzed
    @given(bodies(kind, valid).filter(lambda body: isinstance(body, dict)))
    def check(body):
        with bounded():
            drop_absent(body)
            request, refusal = tried(lambda: check_body(kind, body), HTTPException)
        assert refusal is not None or isinstance(request, kind)

    check()


@pytest.mark.integration
@pytest.mark.parametrize("continuous_batching", [True, False], ids=["batch", "one at a time"])
def test_server_answers_every_body_with_an_answer_or_4xx(served_folder, continuous_batching, fuzzed):
    with in_this_process(served_folder, continuous_batching, max_new_tokens=4) as (client, _, _):

        def status_of(route: str, content: bytes) -> int:
            request = urllib.request.Request(f"{client.base_url}{route}", content, {"Content-Type": "application/json"})
            try:
                with urllib.request.urlopen(request, timeout=60) as answer:
                    return answer.status
            except urllib.error.HTTPError as error:
                said = json.loads(error.read())["error"]["message"]
                assert 5 < len(said) < 3000 and "Traceback" not in said
                return error.code

        @fuzzed
        @given(st.sampled_from([(ChatRequest, CHAT), (CompletionRequest, COMPLETION)]), st.data())
        def check(which, data):
            kind, valid = which
            content = as_json(data.draw(bodies(kind, valid) | json_values))
            status = status_of("chat/completions" if kind is ChatRequest else "completions", content)
            assert status == 200 or 400 <= status < 500, (status, content[:500])

        check()
        assert status_of("chat/completions", as_json(CHAT)) == 200
