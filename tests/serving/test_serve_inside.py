"""Serving from within: requests whose client leaves, limits, adapters, and what of Transformers it stands on."""

from __future__ import annotations

import asyncio
import gc
import inspect
import json
import shutil
import threading
import time

import openai
import pytest
import torch
from fastapi import HTTPException
from tokenizers.decoders import DecodeStream
from transformers import GenerationConfig
from transformers.cli.serving import utils as serving_utils

import grinmoe.serving.batching as generation
import grinmoe.serving.serve as serve
import grinmoe.serving.server as inside
from grinmoe import GrinMoeForCausalLM
from grinmoe.loading import load_for_use
from grinmoe.serving.serve import ServeOptions
from tests.serving.served_model import ask, chat, in_this_process


def until(condition, seconds: float = 120) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        threading.Event().wait(0.01)
    return True


class TestInThisProcess:
    """To see what becomes of requests whose client is gone, and to make the model say what it should."""

    @pytest.fixture(scope="class", params=[True, False], ids=["batch", "one at a time"])
    def here(self, request, served_folder):
        """Client, how it generates, and server; answers of up to a million tokens."""
        with in_this_process(served_folder, request.param, max_length=10**6, max_new_tokens=10**6) as server:
            yield server

    unending = {"temperature": None, "extra_body": {"generation_config": json.dumps({"eos_token_id": -1})}}
    endless = {**unending, "max_tokens": 10**6}

    def alone(self, client, manager) -> bool:
        """Whether the model computes the tokens of a new request by themselves: what was under way before has ended."""
        tokens = []
        hook = manager.served.model.register_forward_pre_hook(
            lambda model, args, kwargs: tokens.append(kwargs["input_ids"].numel()), with_kwargs=True
        )
        with hook:
            ask(client, "Hi", max_tokens=3, **self.unending)
        return max(tokens[1:]) == 1

    def test_a_stream_that_is_left_frees_its_place(self, here):
        client, manager, _ = here
        with ask(client, "Hi", stream=True, **self.endless) as stream:
            chunks = iter(stream)  # it closes the stream when it is forgotten
            next(
                chunk for chunk in chunks if chunk.choices[0].delta.content
            )  # the first one, of the role, comes at once
            if isinstance(manager, generation.Batches):  # one at a time, the next request would wait for ever
                assert not self.alone(client, manager)
        assert until(lambda: self.alone(client, manager))

    def test_so_does_an_answer_that_is_not_waited_for(self, here):
        client, manager, _ = here
        with pytest.raises(openai.APITimeoutError):
            ask(client.with_options(timeout=0.5), "Hi", **self.endless)
        assert until(lambda: self.alone(client, manager))

    @pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
    def test_several_prompts_that_are_left_free_their_places(self, here, stream):
        client, manager, _ = here
        options = {"model": "tiny-chat", "prompt": ["What is", "It is", "Hi"], "stream": stream, **self.endless}
        if stream:
            with client.completions.create(**options) as chunks:
                next(iter(chunks))
        else:
            with pytest.raises(openai.APITimeoutError):
                client.with_options(timeout=0.5).completions.create(**options)
        assert until(lambda: self.alone(client, manager))

    def test_that_is_no_news(self, here, caplog):
        """asyncio tells of errors that nobody waited for, when it forgets them."""
        client, manager, _ = here
        with pytest.raises(openai.APITimeoutError):
            ask(client.with_options(timeout=0.2), "Hi", **self.endless)
        assert until(lambda: self.alone(client, manager))
        gc.collect()
        assert [record.message for record in caplog.records if "never retrieved" in record.message] == []

    def test_bytes_that_are_no_text_end_no_stream(self, here):
        """A model may begin a character and go on with something else; 3 to 258 are single bytes."""
        client, manager, _ = here
        bias = manager.served.model.lm_head.bias.data
        before = bias.clone()
        bias[3 : 3 + 256] = 3.0
        bias[manager.served.tokenizer.eos_token_id] = -1e4
        try:
            chunks = list(ask(client, "Hi", stream=True, temperature=1.5, max_tokens=200))
        finally:
            bias.copy_(before)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert chunks[-1].choices[0].finish_reason == "length"
        assert "\ufffd" in text and len(text) > 100

    def test_a_stop_ends_the_work_too(self, here):
        """And not only the text."""
        client, manager, _ = here
        text = ask(client, "Hi", max_tokens=12).choices[0].message.content
        options = {
            **self.endless,
            "extra_body": {"generation_config": json.dumps({"eos_token_id": -1, "do_sample": False})},
        }
        for stream in (False, True):
            found = ask(client, "Hi", stop=[text[6:9]], stream=stream, **options)
            if stream:
                found = "".join(chunk.choices[0].delta.content or "" for chunk in found)
            else:
                found = found.choices[0].message.content
            assert found == text[: text.index(text[6:9])]
            assert until(lambda: self.alone(client, manager))

    def test_an_answer_that_ends_by_itself_was_not_cut(self, here):
        """Though its last token is the last one that it may have."""
        client, manager, _ = here
        ids = manager.served.tokenizer(ask(client, "Hi", max_tokens=6).choices[0].message.content)["input_ids"]
        options = {
            **self.endless,
            "extra_body": {"generation_config": json.dumps({"do_sample": False, "eos_token_id": ids[-1]})},
        }
        whole = ask(client, "Hi", **options)
        assert whole.choices[0].finish_reason == "stop"
        options["max_tokens"] = whole.usage.completion_tokens
        assert ask(client, "Hi", **options).choices[0].finish_reason == "stop"
        assert list(ask(client, "Hi", stream=True, **options))[-1].choices[0].finish_reason == "stop"
        options["max_tokens"] -= 1
        assert ask(client, "Hi", **options).choices[0].finish_reason == "length"

    def test_a_server_that_is_told_to_end_ends_what_is_under_way_with_an_error(self, here, monkeypatch):
        client, manager, running = here
        monkeypatch.setattr("grinmoe.serving.http.GRACE_S", 0.2)
        failures, arrived = [], threading.Event()
        generate = manager.generate_non_streaming

        def generate_and_tell(*args, **kwargs):
            arrived.set()
            return generate(*args, **kwargs)

        monkeypatch.setattr(manager, "generate_non_streaming", generate_and_tell)

        def wait_for_answer() -> None:
            with pytest.raises(openai.InternalServerError, match="shutting down") as failure:
                ask(client, "Hi", **self.endless)
            failures.append(failure.value.status_code)

        waiting = threading.Thread(target=wait_for_answer)
        with ask(client, "Hi", stream=True, **self.endless) as stream:
            chunks = iter(stream)
            next(chunks)
            waiting.start()
            assert arrived.wait(timeout=6000)
            running.should_exit = True
            with pytest.raises(openai.APIError):
                list(chunks)
        waiting.join(timeout=600)
        assert failures == [503]

    def test_a_stream_is_submitted_when_it_is_listened_to(self):
        """One that ended before would never be heard of."""
        calls = []

        class Manager:
            def add_request(self, **request):
                calls.append(request)
                return request["request_id"]

            def register_result_handler(self, request_id, callback):
                calls.append(request_id)

            def get_result(self, timeout):
                return None

        submission = generation._Submission(Manager())
        submission.sampling["x"] = {"temperature": 1.0}
        submission.add_request([1], request_id="x", streaming=True)
        assert calls == []
        submission.register_result_handler("x", print)
        assert calls == ["x", {"input_ids": [1], "request_id": "x", "streaming": True, "temperature": 1.0}]

    def test_errors_in_a_stream_are_json(self):
        """Transformers puts a message between quotes as it is."""

        async def chunks():
            yield 'data: {"choices": []}\n\ndata: {"error": "no "room" \n here"}\n\n'

        async def collected() -> list[str]:
            return [event async for event in inside._as_openai_streams(chunks())]

        *events, last = "".join(asyncio.run(collected())).strip().split("\n\n")
        assert last == "data: [DONE]"
        assert json.loads(events[1].removeprefix("data: "))["error"]["message"] == 'no "room" \n here'


def test_a_tokenizer_without_a_chat_template_is_for_completions(served_folder, tmp_path):
    plain = shutil.copytree(served_folder, tmp_path / "plain")
    (plain / "chat_template.jinja").unlink()
    served, _ = serve._load(str(plain), ServeOptions(str(plain), device="cpu", continuous_batching=False))
    with pytest.raises(HTTPException) as refused:
        inside.ChatRequests(served, None, None).checked({"messages": chat("Hello")})
    assert refused.value.status_code == 400
    assert "use /v1/completions" in refused.value.detail["message"]
    inside.CompletionRequests(served, None, None).checked({"prompt": "Hello"})


@pytest.mark.parametrize(
    "settings, named",
    [
        ({"min_p": 0.1}, "MinPLogitsWarper"),
        ({"min_new_tokens": 5}, "MinNewTokensLengthLogitsProcessor"),
        ({"min_length": 5}, "MinLengthLogitsProcessor"),
        ({"exponential_decay_length_penalty": (5, 1.1)}, "ExponentialDecayLengthPenalty"),
        ({"num_beams": 2}, "beam_search"),
        ({"penalty_alpha": 0.5, "top_k": 4}, "contrastive_search"),
    ],
    ids=str,
)
def test_a_checkpoint_s_setting_that_a_batch_would_leave_out_is_named(served_folder, settings, named):
    model = GrinMoeForCausalLM.from_pretrained(served_folder)
    model.generation_config.update(**settings)
    with pytest.raises(ValueError, match=f"asks for {named}.*choose --no-continuous-batching"):
        generation.start_batching(model, generation.ContinuousBatchingConfig(num_blocks=1, max_batch_tokens=64))


def test_an_adapter_answers_as_its_base_with_it(served_folder, tmp_path):
    from peft import get_peft_model

    from grinmoe.adapters.lora import lora_config
    from grinmoe.adapters.merge import merge_adapter

    base = GrinMoeForCausalLM.from_pretrained(served_folder)
    torch.manual_seed(2)
    get_peft_model(base, lora_config(base, r=4, init_lora_weights=False)).save_pretrained(tmp_path / "adapter")
    merged = GrinMoeForCausalLM.from_pretrained(
        merge_adapter(tmp_path / "adapter", tmp_path / "merged", base=served_folder)
    )
    served, manager = serve._load(str(tmp_path / "adapter"), ServeOptions("adapter", device="cpu"))
    assert served.name == "adapter"
    ids = served.tokenizer("It is a stone").input_ids
    expected = merged.eval().generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)[0, len(ids) :].tolist()
    options = GenerationConfig(max_new_tokens=8, do_sample=False)

    async def answered():
        return await manager.generate_non_streaming(served.model, served.tokenizer, {"input_ids": ids}, options, "x")

    try:
        assert asyncio.run(answered())[2] == expected
    finally:
        manager.stop()


def test_longrope_is_served_up_to_its_switch_with_continuous_batching(golden_models):
    model = golden_models["golden-c"]
    assert serve._max_length(model, ServeOptions("m")) == 32
    assert (
        serve._max_length(model, ServeOptions("m", continuous_batching=False)) == model.config.max_position_embeddings
    )


def test_a_model_on_several_devices_is_no_batch(served_folder, monkeypatch):
    """The batch's cache is on one."""
    model, tokenizer = load_for_use(str(served_folder), device="cpu")
    model.hf_device_map = {"model": 0, "lm_head": 1}
    monkeypatch.setattr(serve, "load_for_use", lambda *_: (model, tokenizer))
    with pytest.raises(ValueError, match="--device auto has spread .* add --no-continuous-batching"):
        serve._load(str(served_folder), ServeOptions("m", device="auto"))
    served, _ = serve._load(str(served_folder), ServeOptions("m", device="auto", continuous_batching=False))
    assert served.model is model


def test_a_request_is_bounded_by_the_cache(served_folder, monkeypatch):
    """One that could never fit in it would stop the batch for all."""
    asked = []

    def start_batching(model, config):
        asked.append(config)
        return None, 64

    monkeypatch.setattr(generation, "start_batching", start_batching)
    served, _ = serve._load(str(served_folder), ServeOptions("m", device="cpu", cache_tokens=300, max_new_tokens=100))
    assert (served.max_length, served.max_new_tokens) == (64, 63)
    assert asked[0].num_blocks == 2, "whole blocks, of 256 tokens"


class TestInsideTransformers:
    """What `transformers_server.py` and `transformers_generation.py` build on. Where one of these fails, that has moved."""

    @pytest.mark.parametrize(
        "owner, names",
        [
            (inside.ModelManager, "process_model_name load_model_and_processor load_model_streaming"),
            (inside.ChatCompletionHandler, "_streaming _non_streaming _build_generation_config"),
            (inside.CompletionHandler, "_build_generation_config"),
            (generation.CBGenerateManager, "init_cb generate_streaming generate_non_streaming is_alive stop"),
            (generation.GenerateManager, "generate_streaming generate_non_streaming stop"),
            (inside.GenerationState, "get_manager is_cb_alive use_continuous_batching"),
        ],
        ids=lambda value: value.__name__ if isinstance(value, type) else "",
    )
    def test_methods_that_are_overridden_or_called(self, owner, names):
        assert [name for name in names.split() if not callable(getattr(owner, name, None))] == []

    def test_the_decoder_of_a_stream(self):
        """It is exchanged after a streamer was made, and has one method."""
        streamers = [
            serving_utils.DirectStreamer(None, None, None),
            serving_utils.CBStreamer(None, "", None, None, None),
        ]
        assert all(isinstance(one._decode_stream, DecodeStream) for one in streamers)
        assert all(
            "self._decode_stream.step(self._tokenizer, token_id)" in inspect.getsource(type(one)) for one in streamers
        )

    def test_the_tokens_of_a_block(self):
        config = generation.ContinuousBatchingConfig()
        assert (config.page_size if hasattr(config, "page_size") else config.block_size) == generation.BLOCK_TOKENS
