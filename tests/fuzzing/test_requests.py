"""Requests to the server: status 4xx with OpenAI's form of an error, or an answer."""

from __future__ import annotations

import json

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
    import httpx

    with in_this_process(served_folder, continuous_batching, max_new_tokens=4) as (client, _, _):
        with httpx.Client(base_url=str(client.base_url), timeout=60) as http:

            @fuzzed
            @given(st.sampled_from([(ChatRequest, CHAT), (CompletionRequest, COMPLETION)]), st.data())
            def check(which, data):
                kind, valid = which
                body = data.draw(bodies(kind, valid) | json_values)
                content = as_json(body)
                route = "chat/completions" if kind is ChatRequest else "completions"
                answer = http.post(route, content=content, headers={"content-type": "application/json"})
                assert answer.status_code == 200 or 400 <= answer.status_code < 500, (
                    answer.status_code,
                    answer.text[:500],
                )
                if answer.status_code != 200:
                    assert 5 < len(json.loads(answer.text)["error"]["message"]) < 3000
                assert "Traceback" not in answer.text

            check()
            assert http.post("chat/completions", json=CHAT).status_code == 200
