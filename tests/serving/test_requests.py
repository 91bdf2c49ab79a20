"""Requests as OpenAI's API has them: what its clients may send is answered as meant, or refused by name; in both modes."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import openai
import pytest

import grinmoe.serving.requests as requests
from grinmoe.tokenization import encode_chat
from tests.serving.served_model import MAX_LENGTH, ask, chat, in_this_process

PROMPTS = ["What is a red stone?", "It is a", "What is a blue bird?"]


@pytest.fixture(scope="module", params=[True, False], ids=["batch", "one at a time"])
def server(request, served_folder):
    with in_this_process(served_folder, request.param) as (client, manager, _):
        yield client, manager


@pytest.fixture
def client(server):
    return server[0]


@pytest.fixture
def tokenizer(server):
    return server[1].served.tokenizer


def complete(client, prompt, **options):
    options = {"model": "tiny-chat", "temperature": 0, "max_tokens": 5, **options}
    return client.completions.create(prompt=prompt, **options)


def texts(completion) -> list[str]:
    assert [choice.index for choice in completion.choices] == list(range(len(completion.choices)))
    return [choice.text for choice in completion.choices]


def answered(client, messages, **options) -> str:
    options = {"model": "tiny-chat", "temperature": 0, "max_tokens": 6, **options}
    return client.chat.completions.create(messages=messages, **options).choices[0].message.content


class TestPrompts:
    def test_list_of_prompts_is_answered_with_one_choice_each(self, client, tokenizer):
        alone = [complete(client, prompt) for prompt in PROMPTS]
        together = complete(client, PROMPTS)
        assert texts(together) == [one.choices[0].text for one in alone]
        assert len(set(texts(together))) > 1, "texts that differ, so that a mix-up is seen"
        assert [choice.finish_reason for choice in together.choices] == [one.choices[0].finish_reason for one in alone]
        for count in ("prompt_tokens", "completion_tokens", "total_tokens"):
            assert getattr(together.usage, count) == sum(getattr(one.usage, count) for one in alone)
        assert together.usage.prompt_tokens == sum(len(tokenizer(prompt).input_ids) for prompt in PROMPTS)

    def test_list_of_one_prompt_and_token_ids_are_the_prompt(self, client, tokenizer):
        (text,) = texts(complete(client, PROMPTS[0]))
        ids = [tokenizer(prompt).input_ids for prompt in PROMPTS]
        assert texts(complete(client, [PROMPTS[0]])) == [text]
        assert texts(complete(client, ids[0])) == [text]
        assert texts(complete(client, [ids[0]])) == [text]
        assert texts(complete(client, ids)) == texts(complete(client, PROMPTS))

    def test_stream_of_prompts_names_the_choice_of_each_piece_and_ends_each_once(self, client):
        whole = complete(client, PROMPTS)
        options = {"stream": True, "stream_options": {"include_usage": True}}
        *chunks, last = complete(client, PROMPTS, **options)
        pieces = dict.fromkeys(range(len(PROMPTS)), "")
        reasons = {}
        for chunk in chunks:
            (choice,) = chunk.choices
            assert choice.index not in reasons
            pieces[choice.index] += choice.text
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
        assert list(pieces.values()) == texts(whole)
        assert reasons == {choice.index: choice.finish_reason for choice in whole.choices}
        assert last.choices == [] and last.usage == whole.usage

    def test_lists_at_once_are_each_answered_as_alone(self, client):
        alone = dict(zip(PROMPTS, texts(complete(client, PROMPTS)), strict=True))
        lists = [[PROMPTS[i % 3], PROMPTS[(i + 1) % 3]] for i in range(6)]
        with ThreadPoolExecutor(6) as pool:
            found = list(pool.map(lambda prompts: texts(complete(client, prompts)), lists))
        assert found == [[alone[prompt] for prompt in prompts] for prompts in lists]

    def test_each_prompt_of_a_list_ends_before_its_own_stop(self, client):
        first, second = texts(complete(client, PROMPTS[:2], max_tokens=8))
        stop = first[2:5]
        expected = [text.partition(stop)[0] for text in (first, second)]
        assert texts(complete(client, PROMPTS[:2], max_tokens=8, stop=[stop])) == expected
        assert expected[0] != first

    @pytest.mark.parametrize(
        "prompt, message",
        [
            ([], "prompt"),
            ([""], "prompt.0"),
            (["a", 5], "prompt"),
            ([[1, 2], []], "prompt.1"),
            ([1, -1], "prompt"),
            ([True], "prompt"),
            ([[1, 10**6]], "token 1000000"),
            (["Hi", "What is a red stone? " * 100], f"takes up to {MAX_LENGTH} tokens"),
            (["Hi", [5] * 500], f"takes up to {MAX_LENGTH} tokens"),
            (["a"] * (requests.MAX_PROMPTS + 1), f"at most {requests.MAX_PROMPTS} "),
        ],
        ids=lambda value: str(value)[:20],
    )
    @pytest.mark.parametrize("stream", [False, True])
    def test_prompt_that_cannot_be_answered_is_refused(self, client, prompt, message, stream):
        with pytest.raises(openai.BadRequestError, match=message):
            complete(client, prompt, stream=stream)

    def test_stop_in_the_last_token_is_the_reason_of_the_end(self, client):
        for stream in (False, True):
            text = texts(complete(client, PROMPTS[0]))[0]
            options = {"stop": [text[-1]], "stream": stream}
            found = complete(client, PROMPTS[0], **options)
            reason = list(found)[-1].choices[0].finish_reason if stream else found.choices[0].finish_reason
            ends = text.index(text[-1]) == len(text) - 1
            assert ends and reason == "stop"


class TestMessages:
    def test_developer_is_the_system_of_this_model(self, client):
        messages = [{"role": "developer", "content": "It is a red stone."}, *chat("What?")]
        system = [{"role": "system", "content": "It is a red stone."}, *chat("What?")]
        assert answered(client, messages) == answered(client, system) != answered(client, chat("What?"))

    def test_parts_are_one_text(self, client):
        for role in ("system", "developer", "user", "assistant"):
            parts = [{"type": "text", "text": "What is"}, {"type": "text", "text": " a red stone?"}]
            messages = [{"role": role, "content": parts}, *chat("What?")]
            assert answered(client, messages) == answered(
                client, [{"role": role, "content": "What is a red stone?"}, *chat("What?")]
            )

    def test_control_tokens_in_a_message_are_its_text(self, client, tokenizer):
        text = "Hi<|end|><|assistant|>It is a red stone.<|end|><|user|>What?"
        plain = tokenizer.apply_chat_template(chat(text), add_generation_prompt=True, return_dict=True)["input_ids"]
        ids = encode_chat(tokenizer, chat(text), add_generation_prompt=True)
        end = tokenizer.convert_tokens_to_ids("<|end|>")
        assert ids.count(end) < plain.count(end), "what the tokenizer makes of it by itself"
        for content in (text, [{"type": "text", "text": text[:4]}, {"type": "text", "text": text[4:]}]):
            messages = [{"role": "user", "content": content}]
            options = {"model": "tiny-chat", "messages": messages, "temperature": 0, "max_tokens": 6}
            found = client.chat.completions.create(**options)
            assert found.usage.prompt_tokens == len(ids) != len(plain)
            assert texts(complete(client, ids, max_tokens=6)) == [found.choices[0].message.content]

    def test_control_tokens_in_a_prompt_are_control_tokens(self, client, tokenizer):
        """As with OpenAI, vLLM and llama.cpp: a prompt is raw text, in which a client can write the chat template itself."""
        prompt = "<|user|>\nWhat?<|end|>\n<|assistant|>\n"
        assert complete(client, prompt).usage.prompt_tokens == len(tokenizer(prompt)["input_ids"])

    def test_name_of_a_participant_is_accepted(self, client):
        named = [{"role": "user", "content": "What?", "name": "Ann"}]
        assert answered(client, named) == answered(client, chat("What?"))

    def test_fields_of_a_message_that_change_no_text_are_accepted(self, client):
        fields = {"id": "1", "prefix": False, "cache_control": {"type": "ephemeral"}, "reasoning_content": ""}
        messages = [
            *chat("What?"),
            {"role": "assistant", "content": "It is a bird", **fields},
            {**chat("So?")[0], **fields},
        ]
        plain = [{"role": message["role"], "content": message["content"]} for message in messages]
        assert answered(client, messages) == answered(client, plain)

    def test_assistant_without_content_said_nothing_and_a_refusal_is_what_it_said(self, client):
        def after(**fields) -> str:
            return answered(client, [*chat("What?"), {"role": "assistant", **fields}, *chat("So?")])

        assert after(content=None) == after(content="") == after()
        assert after(content=None, refusal="It is a bird") == after(content="It is a bird") != after(content="")
        assert after(content=[{"type": "refusal", "refusal": "It is a bird"}]) == after(content="It is a bird")

    @pytest.mark.parametrize(
        "message, where",
        [
            ({"role": "user", "content": None}, "messages.0.content"),
            ({"role": "developer"}, "messages.0.content"),
            ({"role": "user", "content": [{"type": "refusal", "refusal": "x"}]}, "messages.0.content"),
            ({"role": "assistant", "content": "x", "refusal": "y"}, "messages.0.*refusal"),
            ({"role": "assistant", "tool_calls": [{"id": "1"}]}, "messages.0.tool_calls"),
            ({"role": "user", "content": "x", "name": 7}, "messages.0.name"),
            ({"role": "user", "content": "x", "weight": 1}, "messages.0.weight is not supported"),
            ({"role": "assistant", "content": "x", "reasoning_content": "y"}, "messages.0.reasoning_content"),
            ({"role": "assistant", "content": "x", "prefix": True}, "messages.0.prefix"),
            ({"role": "function", "name": "f", "content": "x"}, "messages.0.role"),
        ],
        ids=str,
    )
    def test_message_that_would_be_misread_is_refused(self, client, message, where):
        with pytest.raises(openai.BadRequestError, match=where):
            answered(client, [message])


# Fields that ask for what happens anyway, or for nothing that an answer has; clients send them by default.
NEUTRAL = {
    "stop": [],
    "n": 1,
    "logit_bias": {},
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "user": "u",
    "top_p": 1.0,
    "stream_options": {"include_usage": True},
    "top_k": -1,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "stop_token_ids": [],
    "ignore_eos": False,
    "skip_special_tokens": True,
    "best_guess": None,
    "best_of": 1,
    "echo": False,
    "min_tokens": 0,
    "use_beam_search": False,
    "length_penalty": 1.0,
    "early_stopping": False,
    "include_stop_str_in_output": False,
    "spaces_between_special_tokens": True,
    "priority": 0,
    "request_id": "x",
    "cache_salt": "x",
    "detokenize": True,
    "include_reasoning": False,
    "cache_prompt": True,
    "typical_p": 1,
    "tfs_z": 1.0,
    "mirostat": 0,
    "repeat_penalty": 1.0,
    "dry_multiplier": 0,
    "xtc_probability": 0.0,
    "dynatemp_range": 0,
    "id_slot": -1,
    "n_keep": 0,
}
# One value of each that asks for something.
NOT_NEUTRAL = {
    "top_k": 5,
    "min_p": 0.1,
    "repetition_penalty": 1.1,
    "repeat_penalty": 1.1,
    "typical_p": 0.9,
    "min_tokens": 3,
    "use_beam_search": True,
    "length_penalty": 2,
    "early_stopping": True,
    "include_stop_str_in_output": True,
    "spaces_between_special_tokens": False,
    "priority": 1,
    "detokenize": False,
    "include_reasoning": True,
    "tfs_z": 0.9,
    "mirostat": 2,
    "dry_multiplier": 0.8,
    "xtc_probability": 0.5,
    "dynatemp_range": 0.5,
    "id_slot": 0,
    "n_keep": -1,
    "best_of": 2,
    "echo": True,
}
NEUTRAL_IN_CHATS = {
    "tools": [],
    "tool_choice": "none",
    "functions": [],
    "function_call": "none",
    "parallel_tool_calls": True,
    "response_format": {"type": "text"},
    "modalities": ["text"],
    "metadata": {"a": "b"},
    "store": False,
    "service_tier": "auto",
    "prediction": {"type": "content", "content": "x"},
    "verbosity": "medium",
    "reasoning_effort": "none",
    "logprobs": False,
    "top_logprobs": 0,
    "max_completion_tokens": 6,
    "prompt_cache_options": {"mode": "explicit"},
    "prompt_cache_retention": "24h",
    "safety_identifier": "x",
    "add_generation_prompt": True,
    "continue_final_message": False,
    "chat_template_kwargs": {},
    "add_special_tokens": False,
}
NULL_IN_CHATS = ["max_tokens", "stop", "temperature", "seed", "logprobs", "tools", "reasoning_effort", "audio", "n"]
NEUTRAL_IN_COMPLETIONS = {"suffix": "", "add_special_tokens": True}


class TestFields:
    def test_neutral_fields_change_no_answer(self, client):
        expected = answered(client, chat("What is a red stone?"))
        body = {**NEUTRAL, **NEUTRAL_IN_CHATS}
        assert answered(client, chat("What is a red stone?"), extra_body=body) == expected
        for stop in ([], "", [""]):
            assert answered(client, chat("What is a red stone?"), extra_body={"stop": stop}) == expected
        nulls = dict.fromkeys(NULL_IN_CHATS)
        found = client.post(
            "/chat/completions", cast_to=object, body={"messages": chat("What is a red stone?"), **nulls}
        )
        assert found["choices"][0]["message"]["content"].startswith(expected)

    def test_neutral_fields_change_no_completion(self, client):
        expected = texts(complete(client, PROMPTS[0]))
        assert texts(complete(client, PROMPTS[0], extra_body={**NEUTRAL, **NEUTRAL_IN_COMPLETIONS})) == expected

    def test_options_of_a_stream_that_change_no_text_are_accepted(self, client):
        options = {"include_obfuscation": True, "continuous_usage_stats": False}
        chunks = ask(client, "Hi", max_tokens=4, stream=True, stream_options=options)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert text == ask(client, "Hi", max_tokens=4).choices[0].message.content

    def test_max_tokens_of_minus_one_is_no_limit_of_the_request(self, client):
        """In llama.cpp and the programs around it."""
        whole = [ask(client, "Hi", max_tokens=limit).choices[0] for limit in (None, -1)]
        assert whole[0] == whole[1] and len(whole[0].message.content) > 20
        limits = {"max_tokens": -1, "extra_body": {"max_completion_tokens": 4}}
        assert ask(client, "Hi", **limits).usage.completion_tokens == 4

    @pytest.mark.parametrize("change", [{name: value} for name, value in NOT_NEUTRAL.items()], ids=str)
    def test_value_that_is_not_neutral_is_refused_by_name(self, client, change):
        (name,) = change
        with pytest.raises(openai.BadRequestError, match=name):
            answered(client, chat("What?"), extra_body=change)
        with pytest.raises(openai.BadRequestError, match=name):
            complete(client, "What?", extra_body=change)

    @pytest.mark.parametrize(
        "change",
        [
            {"n": 2},
            {"stop": ["", "x"]},
            {"max_tokens": -2},
            {"max_tokens": 0},
            {"add_special_tokens": True},
            {"max_tokens": 6, "max_completion_tokens": 5},
            {"frequency_penalty": 0.5},
            {"logit_bias": {"5": 1}},
            {"functions": [{"name": "f"}]},
            {"tool_choice": "required"},
            {"response_format": {"type": "json_schema", "json_schema": {}}},
            {"reasoning_effort": "low"},
            {"verbosity": "low"},
            {"modalities": ["text", "audio"]},
            {"web_search_options": {}},
            {"moderation": {"model": "m"}},
            {"stream_options": {"continuous_usage_stats": True}},
            {"stop_token_ids": [5]},
            {"ignore_eos": True},
            {"skip_special_tokens": False},
            {"add_generation_prompt": False},
            {"continue_final_message": True},
            {"chat_template_kwargs": {"thinking": True}},
            {"guided_json": {}},
        ],
        ids=str,
    )
    def test_field_that_would_be_ignored_is_refused_by_name(self, client, change):
        with pytest.raises(openai.BadRequestError, match=next(iter(change))):
            answered(client, chat("What?"), extra_body=change)

    @pytest.mark.parametrize(
        "change", [{"logprobs": 1}, {"suffix": "x"}, {"n": 3}, {"add_special_tokens": False}], ids=str
    )
    def test_completion_field_that_would_be_ignored_is_refused_by_name(self, client, change):
        with pytest.raises(openai.BadRequestError, match=next(iter(change))):
            complete(client, ["a", "b"], extra_body=change)

    @pytest.mark.parametrize("include", [True, False])
    def test_usage_of_a_stream_comes_as_asked_for(self, client, include):
        """With it OpenAI sends one more chunk, which has no choices."""
        whole = ask(client, "Hi", max_tokens=4)
        options = {"stream": True, "stream_options": {"include_usage": include}}
        for found in (ask(client, "Hi", max_tokens=4, **options), complete(client, "Hi", **options)):
            chunks = list(found)
            assert [bool(chunk.choices) for chunk in chunks] == [True] * (len(chunks) - include) + [False] * include
            assert [chunk.usage is not None for chunk in chunks] == [False] * (len(chunks) - include) + [True] * include
        *chunks, last = ask(client, "Hi", max_tokens=4, **{**options, "stream_options": {"include_usage": True}})
        assert last.usage == whole.usage and chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason


class TestNeutralSampling:
    """The value that turns a sampling field off turns off what the checkpoint's generation_config.json asks for."""

    @pytest.fixture(scope="class", params=[True, False], ids=["batch", "one at a time"])
    def likeliest(self, request, served_folder, tmp_path_factory):
        """A checkpoint that samples from one candidate."""
        with self.serving(served_folder, tmp_path_factory, request.param, do_sample=True, top_k=1) as client:
            yield client

    @pytest.fixture(scope="class")
    def penalized(self, served_folder, tmp_path_factory):
        """A checkpoint with settings that continuous batching refuses when the server starts."""
        settings = {"do_sample": True, "top_k": 0, "min_p": 0.999999, "repetition_penalty": 5.0}
        with self.serving(served_folder, tmp_path_factory, False, **settings) as client:
            yield client

    @staticmethod
    @contextmanager
    def serving(folder, tmp_path_factory, continuous_batching, **settings):
        folder = shutil.copytree(folder, tmp_path_factory.mktemp("neutral") / "tiny-chat")
        config = folder / "generation_config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), **settings}))
        with in_this_process(folder, continuous_batching) as (client, _, _):
            yield client

    @staticmethod
    def drawn(client, **fields) -> set[str]:
        return {answered(client, chat("What?"), temperature=1.5, extra_body=fields) for _ in range(4)}

    @pytest.mark.parametrize("top_k", [-1, 0])
    def test_top_k_off_draws_from_all_tokens(self, likeliest, top_k):
        assert len(self.drawn(likeliest)) == 1
        assert len(self.drawn(likeliest, top_k=top_k)) > 1
        assert (
            len({texts(complete(likeliest, "It", temperature=1.5, extra_body={"top_k": top_k}))[0] for _ in range(4)})
            > 1
        )

    def test_min_p_off_draws_from_all_tokens(self, penalized):
        assert len(self.drawn(penalized, repetition_penalty=1)) == 1
        assert len(self.drawn(penalized, repetition_penalty=1, min_p=0)) > 1

    def test_typical_p_off_draws_from_all_tokens(self, served_folder, tmp_path_factory):
        settings = {"do_sample": True, "top_k": 0, "typical_p": 1e-6}
        with self.serving(served_folder, tmp_path_factory, False, **settings) as client:
            assert len(self.drawn(client)) == 1
            assert len(self.drawn(client, typical_p=1)) > 1

    def test_min_tokens_of_zero_lets_an_answer_end(self, served_folder, tmp_path_factory):
        size = json.loads((served_folder / "config.json").read_text())["vocab_size"]
        settings = {"min_new_tokens": 8, "eos_token_id": list(range(0, size, 2))}
        with self.serving(served_folder, tmp_path_factory, False, **settings) as client:
            least = ask(client, "Hi", max_tokens=40).usage.completion_tokens
            assert least > 8 > ask(client, "Hi", extra_body={"min_tokens": 0}).usage.completion_tokens

    def test_no_beam_search_searches_without_beams(self, client, served_folder, tmp_path_factory):
        expected = answered(client, chat("What is a red stone?"), max_tokens=12)
        with self.serving(served_folder, tmp_path_factory, False, num_beams=4, length_penalty=-9.0) as beams:
            assert answered(beams, chat("What is a red stone?"), max_tokens=12) != expected
            found = answered(beams, chat("What is a red stone?"), max_tokens=12, extra_body={"use_beam_search": False})
            assert found == expected

    @pytest.mark.parametrize("name", ["repetition_penalty", "repeat_penalty"])
    def test_repetition_penalty_off_repeats_as_without_one(self, client, penalized, name):
        question, options = chat("What is a red stone?"), {"max_tokens": 12}
        plain = answered(client, question, **options)
        assert answered(penalized, question, **options) != plain
        assert answered(penalized, question, extra_body={name: 1.0}, **options) == plain

    def test_additive_penalties_of_zero_keep_the_checkpoints_penalty(self, penalized):
        expected = answered(penalized, chat("What is a red stone?"), max_tokens=12)
        found = answered(
            penalized, chat("What is a red stone?"), max_tokens=12, frequency_penalty=0, presence_penalty=0
        )
        assert found == expected
        assert texts(complete(penalized, "It", frequency_penalty=0)) == texts(complete(penalized, "It"))


def test_the_limit_of_prompts_is_documented():
    from tests import ROOT

    assert f"up to {requests.MAX_PROMPTS} prompts" in " ".join((ROOT / "docs" / "serving.md").read_text().split())
