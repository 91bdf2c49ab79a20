"""Serving a checkpoint: the real command and the real client of OpenAI, over loopback."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
import torch

import grinmoe.serving.serve as serve
from grinmoe import GrinMoeForCausalLM, load_tokenizer
from grinmoe.serving.serve import ServeOptions, run_serve
from grinmoe.serving.text_stream import text_until
from tests.cli.test_cli import run_main
from tests.serving.served_model import MAX_LENGTH, QUESTIONS, ask, chat, start


@pytest.fixture(scope="module")
def server(served_folder):
    """One server for the module; ended by Ctrl-C."""
    served = start(served_folder)
    yield served
    code, output = served.end(signal.SIGINT)
    assert (code, output.strip()) == (130, ""), "it ends as Ctrl-C ends a command, and had nothing to complain about"


@pytest.fixture(scope="module")
def client(server):
    return server.client()


@pytest.fixture(scope="module")
def by_generate(served_folder):
    """Answers of plain, greedy `generate`: {question: (text, number of tokens)}."""
    model, tokenizer = GrinMoeForCausalLM.from_pretrained(served_folder).eval(), load_tokenizer(str(served_folder))
    answers = {}
    for question in QUESTIONS:
        prompt = tokenizer.apply_chat_template(
            chat(question), add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with torch.no_grad():
            ids = model.generate(**prompt, max_new_tokens=16, do_sample=False)[0, prompt["input_ids"].shape[1] :]
        answers[question] = tokenizer.decode(ids, skip_special_tokens=True), len(ids)
    return answers


JSON = {"Content-Type": "application/json"}


def answer(client: openai.OpenAI, question: str, **options) -> str:
    return ask(client, question, **options).choices[0].message.content


def streamed(client: openai.OpenAI, question: str, **options) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in ask(client, question, stream=True, **options))


def post(url: str, body: bytes, content_type: str = "application/json") -> tuple[int, dict]:
    """Status and JSON of a request that no client would send."""
    request = urllib.request.Request(url, body, {"Content-Type": content_type})
    try:
        with urllib.request.urlopen(request, timeout=600) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


@pytest.mark.integration
class TestAnswers:
    def test_the_line_that_says_it_is_ready_names_model_address_and_limit(self, server):
        assert server.name == "tiny-chat"
        assert f"{MAX_LENGTH} tokens for prompt and answer, continuous batching" in server.ready
        with urllib.request.urlopen(f"{server.root}/health", timeout=600) as response:
            assert json.load(response) == {"status": "ok"}

    def test_one_model_is_listed(self, client):
        assert [model.id for model in client.models.list()] == ["tiny-chat"]
        assert client.models.retrieve("tiny-chat").id == "tiny-chat"

    def test_a_chat_is_answered_as_generate_answers(self, client, by_generate):
        for question in QUESTIONS[:4]:
            found = ask(client, question)
            text, tokens = by_generate[question]
            assert found.choices[0].message.content == text
            assert found.usage.completion_tokens == tokens
            assert found.model == "tiny-chat"
            assert found.choices[0].finish_reason == ("length" if tokens == 16 else "stop")

    def test_streamed_or_not_it_is_the_same(self, client, by_generate):
        chunks = list(ask(client, QUESTIONS[0], stream=True))
        assert len([chunk for chunk in chunks if chunk.choices[0].delta.content]) > 4, "piece by piece"
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == by_generate[QUESTIONS[0]][0]
        assert chunks[-1].usage.completion_tokens == by_generate[QUESTIONS[0]][1]
        assert chunks[-1].choices[0].finish_reason in ("length", "stop")

    def test_a_stream_ends_as_openai_s_do(self, server):
        body = {"messages": chat(QUESTIONS[0]), "max_tokens": 3, "stream": True}
        request = urllib.request.Request(f"{server.url}/chat/completions", json.dumps(body).encode(), JSON)
        with urllib.request.urlopen(request, timeout=600) as response:
            events = response.read().decode().strip().split("\n\n")
        assert events[-1] == "data: [DONE]" and len(events) > 3

    def test_a_text_is_continued(self, client, served_folder):
        model, tokenizer = GrinMoeForCausalLM.from_pretrained(served_folder).eval(), load_tokenizer(str(served_folder))
        ids = tokenizer("It is a stone", return_tensors="pt").input_ids
        new = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
        expected = tokenizer.decode(new, skip_special_tokens=True)
        options = {"model": "tiny-chat", "prompt": "It is a stone", "max_tokens": 8, "temperature": 0}
        assert client.completions.create(**options).choices[0].text == expected
        stream = client.completions.create(**options, stream=True)
        assert "".join(chunk.choices[0].text for chunk in stream) == expected

    def test_thirty_two_streams_at_once_are_each_answered_as_alone(self, client, by_generate):
        with ThreadPoolExecutor(32) as pool:
            found = list(pool.map(lambda question: streamed(client, question), QUESTIONS))
        assert found == [by_generate[question][0] for question in QUESTIONS]
        assert len(set(found)) > 16, "answers that differ, so that a mix-up would be seen"

    def test_each_request_has_its_own_temperature(self, client, by_generate):
        """In one batch: what samples does not make others sample, nor the other way round."""
        temperatures = [0, 1.5] * 8
        with ThreadPoolExecutor(16) as pool:
            found = list(pool.map(lambda t: answer(client, QUESTIONS[0], temperature=t), temperatures))
        assert set(found[::2]) == {by_generate[QUESTIONS[0]][0]}
        assert len(set(found[1::2])) > 4

    def test_top_p_and_a_tiny_temperature_leave_the_likeliest(self, client, by_generate):
        for options in ({"temperature": 1.5, "top_p": 1e-6}, {"temperature": 1e-30}):
            assert answer(client, QUESTIONS[0], **options) == by_generate[QUESTIONS[0]][0]

    def test_without_a_temperature_the_checkpoint_decides(self, client, by_generate):
        assert answer(client, QUESTIONS[0], temperature=None) == by_generate[QUESTIONS[0]][0]

    def test_parts_of_text_and_an_id_that_two_requests_share(self, client, by_generate):
        def asked(question: str) -> str:
            messages = [{"role": "user", "content": [{"type": "text", "text": question}]}]
            return (
                client.chat.completions.create(
                    model="tiny-chat",
                    messages=messages,
                    temperature=0,
                    max_tokens=16,
                    extra_headers={"x-request-id": "same"},
                )
                .choices[0]
                .message.content
            )

        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(asked, QUESTIONS[:8]))
        assert found == [by_generate[question][0] for question in QUESTIONS[:8]]

    def test_a_text_ends_before_a_stop(self, client, by_generate):
        """Also one over several tokens, and the first of several; what only begins like one is given."""
        text = by_generate[QUESTIONS[0]][0]
        for stop in (text[5:9], [text[8:11], text[4:6]], [text[-3:] + "never"], ["never", text[-2:] + "\u00e9"]):
            before = text_until(text, [stop] if isinstance(stop, str) else stop)
            assert answer(client, QUESTIONS[0], stop=stop) == before
            assert streamed(client, QUESTIONS[0], stop=stop) == before
            found = client.completions.create(model="tiny-chat", prompt="What", stop=stop, max_tokens=4, temperature=0)
            assert found.choices[0].finish_reason == "length"

    def test_an_answer_can_be_sent_back_as_it_came(self, client):
        """As an object of the client, or as its dict with all that is empty."""
        first = ask(client, QUESTIONS[0]).choices[0].message
        for answered in (first, first.model_dump()):
            messages = [*chat(QUESTIONS[0]), answered, *chat(QUESTIONS[1])]
            found = client.chat.completions.create(model="tiny-chat", messages=messages, max_tokens=2, temperature=0)
            assert found.usage.completion_tokens == 2

    def test_an_answer_ends_where_the_model_s_length_ends(self, client):
        # -1: an end that never comes.
        endless = {"generation_config": json.dumps({"eos_token_id": -1})}
        for asked in (None, 10**9):
            found = ask(client, QUESTIONS[0], max_tokens=asked, temperature=None, extra_body=endless)
            assert found.usage.total_tokens == MAX_LENGTH
            assert found.choices[0].finish_reason == "length"

    def test_both_names_of_the_longest_answer_are_known(self, client, by_generate):
        found = ask(client, QUESTIONS[0], max_tokens=None, max_completion_tokens=3)
        assert found.usage.completion_tokens == 3
        assert by_generate[QUESTIONS[0]][0].startswith(found.choices[0].message.content)

    def test_a_stream_that_is_left_does_not_hurt_the_next(self, client, by_generate):
        for _ in range(3):
            with ask(client, QUESTIONS[0], stream=True, max_tokens=100) as stream:
                next(iter(stream))
            assert streamed(client, QUESTIONS[1]) == by_generate[QUESTIONS[1]][0]

    def test_transformers_chat_talks_to_it(self, server, by_generate):
        question = QUESTIONS[0]
        command = Path(sys.executable).parent / "transformers"
        arguments = ["chat", "tiny-chat", server.url, "do_sample=False", "max_new_tokens=16"]
        done = subprocess.run(
            [str(command), *arguments], input=f"{question}\nn\n!exit\n", capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stderr
        shown = " ".join(done.stdout.split())
        assert "tiny-chat was already loaded" in shown
        assert " ".join(by_generate[question][0].split()) in shown


MESSAGE = {"role": "user", "content": "Hello"}


@pytest.mark.integration
class TestWhatIsRefused:
    def test_a_prompt_that_is_too_long_is_told_the_limit(self, client):
        for stream in (False, True):
            with pytest.raises(openai.BadRequestError, match=f"takes up to {MAX_LENGTH} tokens") as refused:
                ask(client, "What is a red stone? " * 100, stream=stream)
            assert refused.value.code == "context_length_exceeded"
        with pytest.raises(openai.BadRequestError, match=f"shorten it to {MAX_LENGTH - 1} or fewer"):
            client.completions.create(model="tiny-chat", prompt="red " * 500)

    def test_a_prompt_of_megabytes_is_refused_before_it_is_tokenised(self, client):
        """Tokenising takes seconds, in which all others wait; its length in letters gives a least number of tokens."""
        with pytest.raises(openai.BadRequestError, match="tokens or more, and this server takes up to"):
            ask(client, "What is a red stone? " * 150_000)

    def test_another_model_is_not_found_and_not_looked_for(self, client, server):
        for asked in ("gpt-4", "microsoft/GRIN-MoE", "tiny-chat@main", ""):
            with pytest.raises(openai.NotFoundError, match="this server has 'tiny-chat'") as refused:
                ask(client, "Hello", model=asked)
            assert refused.value.code == "model_not_found"
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("gpt-4")
        status, body = post(f"{server.root}/load_model", b'{"model": "microsoft/GRIN-MoE"}')
        assert (status, body["error"]["code"]) == (404, "model_not_found")

    @pytest.mark.parametrize(
        "body",
        [b"", b"{", b'{"messages": [', b"[1]", b'"text"', b"\xff\xfe\x00", b"[" * 100_000, b"null"],
        ids=["empty", "open", "cut off", "list", "text", "bytes", "deep", "null"],
    )
    @pytest.mark.parametrize("route", ["/v1/chat/completions", "/v1/completions", "/load_model"])
    def test_what_is_no_json_object(self, server, body, route):
        status, answer = post(server.root + route, body)
        assert status == 400
        assert answer["error"]["type"] == "invalid_request_error"
        assert answer["error"]["message"]

    @pytest.mark.parametrize(
        "change, where",
        [
            ({"messages": None}, "messages"),
            ({"messages": []}, "messages"),
            ({"messages": "Hello"}, "messages"),
            ({"messages": [{"content": "x"}]}, "messages.0.role is missing"),
            ({"messages": [{"role": "user"}]}, "messages.0.content"),
            ({"messages": [{"role": "tool", "content": "x"}]}, "'system', 'user' or 'assistant'"),
            ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
            ({"messages": [{"role": "user", "content": "half \ud800"}]}, "half of a surrogate pair"),
            ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content.0"),
            ({"model": 5}, "model"),
            ({"temperature": "hot"}, "temperature"),
            ({"temperature": -1}, "temperature"),
            ({"temperature": float("nan")}, "temperature"),
            ({"top_p": 0}, "top_p"),
            ({"max_tokens": 0}, "max_tokens"),
            ({"max_tokens": 2.5}, "max_tokens"),
            ({"stream": "yes"}, "stream"),
            ({"n": 2}, "n: Input should be 1"),
            ({"tools": [{"type": "function"}]}, "tools is not supported"),
            ({"response_format": {"type": "json_object"}}, "response_format.type"),
            ({"frequency_penalty": 0.5}, "frequency_penalty"),
            ({"logprobs": True}, "logprobs"),
            ({"seed": 2**80}, "seed"),
            ({"generation_config": json.dumps({"eos_token_id": 2**70})}, "generation_config.eos_token_id"),
            ({"seed": 1, "temperature": 1}, "seed is not supported with continuous batching"),
            ({"stop": 5}, "stop: Input should be a valid string"),
            ({"stop": ["", "x"]}, "stop.0"),
            ({"best_guess": 1}, "best_guess is not supported by this server"),
            ({"half \ud800": 1}, ""),
            ({"generation_config": "{"}, "generation_config: Invalid JSON"),
            ({"generation_config": "[]"}, "generation_config"),
            ({"generation_config": json.dumps({"num_beams": 4})}, "generation_config.num_beams is not supported"),
            ({"generation_config": json.dumps({"temperature": "hot"})}, "generation_config.temperature"),
        ],
        ids=lambda value: "".join(value)[:20] if isinstance(value, dict) else "",
    )
    def test_what_no_chat_request_has(self, server, change, where):
        status, answer = post(server.url + "/chat/completions", json.dumps({"messages": [MESSAGE], **change}).encode())
        assert status == 400, answer
        assert where in answer["error"]["message"]

    @pytest.mark.parametrize(
        "change", [{"prompt": ""}, {"prompt": ["a", 5]}, {"prompt": None}, {"echo": True}, {"suffix": "x"}]
    )
    def test_what_no_completion_request_has(self, server, change):
        status, answer = post(server.url + "/completions", json.dumps({"prompt": "Hello", **change}).encode())
        assert status == 400
        assert next(iter(change)) in answer["error"]["message"]

    @pytest.mark.parametrize(
        "route", ["/reset", "/v1/responses", "/v1/audio/transcriptions", "/v1/systemone", "/nowhere"]
    )
    def test_routes_of_other_models_and_those_that_unload_this_one(self, server, route):
        status, answer = post(server.root + route, b"{}")
        assert (status, answer["error"]["message"]) == (404, "Not Found")

    def test_after_all_that_it_answers_as_before(self, client, server, by_generate):
        assert post(server.url + "/chat/completions", b"{")[0] == 400
        assert answer(client, QUESTIONS[0]) == by_generate[QUESTIONS[0]][0]


@pytest.mark.integration
class TestOneAtATime:
    @pytest.fixture(scope="class")
    def one(self, served_folder):
        served = start(served_folder, "--no-continuous-batching", "--name", "my/model", "--max-new-tokens", "24")
        yield served
        served.process.kill()
        served.process.communicate()

    def test_it_answers_the_same_and_knows_stop_and_seed(self, one, by_generate):
        client = one.client()
        text = by_generate[QUESTIONS[0]][0]
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda _: streamed(client, QUESTIONS[0], model="my/model"), range(4)))
        assert found == [text] * 4
        assert client.models.retrieve("my/model").id == "my/model"
        stop = text[4:6]
        assert answer(client, QUESTIONS[0], model="my/model", stop=[stop]) == text[: text.index(stop)]
        assert streamed(client, QUESTIONS[0], model="my/model", stop=[stop]) == text[: text.index(stop)]
        sampled = [answer(client, QUESTIONS[0], model="my/model", temperature=1.5, seed=3) for _ in range(2)]
        assert sampled[0] == sampled[1] != text
        with ThreadPoolExecutor(6) as pool:
            seeds = [3, 4, 3, 5, 3, 4]
            together = list(
                pool.map(lambda seed: answer(client, QUESTIONS[0], model="my/model", temperature=1.5, seed=seed), seeds)
            )
        assert [found for found, seed in zip(together, seeds) if seed == 3] == [sampled[0]] * 3

    def test_limits(self, one):
        client = one.client()
        endless = {"generation_config": json.dumps({"eos_token_id": -1})}
        found = ask(client, "Hi", model="my/model", temperature=None, max_tokens=None, extra_body=endless)
        assert found.usage.completion_tokens == 24
        with pytest.raises(openai.BadRequestError, match=f"takes up to {MAX_LENGTH} tokens"):
            ask(client, "What is a red stone? " * 100, model="my/model")

    def test_sigterm_ends_it_with_exit_code_0_in_silence(self, one):
        assert one.end(signal.SIGTERM) == (0, "")


class TestWhatTheUserCanMend:
    def refused(self, capsys, *arguments: str) -> str:
        """The one line of a command that ends with exit code 2."""
        assert run_main("serve", *arguments) == 2
        error = capsys.readouterr().err.strip()
        assert error.startswith("grinmoe serve: ") and len(error.splitlines()) == 1
        return error

    def test_a_port_that_is_in_use(self, served_folder, capsys):
        with socket.create_server(("127.0.0.1", 0)) as other:
            port = other.getsockname()[1]
            error = self.refused(capsys, "--model", str(served_folder), "--port", str(port))
        assert f"port {port} of 127.0.0.1 is in use" in error

    def test_a_host_that_is_not_here(self, served_folder, capsys):
        # 203.0.113.0/24 is for documentation (RFC 5737).
        assert "not an address of this machine" in self.refused(
            capsys, "--model", str(served_folder), "--host", "203.0.113.1"
        )

    def test_a_host_that_is_no_name(self, served_folder, capsys):
        assert "--host ä..b is no address" in self.refused(capsys, "--model", str(served_folder), "--host", "ä..b")

    def test_a_checkpoint_that_is_half_downloaded(self, goldens, tiny_tokenizer_folder, tmp_path, capsys):
        shutil.copytree(tiny_tokenizer_folder, tmp_path, dirs_exist_ok=True)
        for name in ("config.json", "model.safetensors.index.json"):
            shutil.copy(goldens["golden-a"].folder / name, tmp_path)
        error = self.refused(capsys, "--model", str(tmp_path), "--port", "0")
        assert "which is not there; download that shard again" in error

    def test_a_folder_that_is_no_model(self, tmp_path, capsys):
        assert "is no model's folder: it has no config.json" in self.refused(
            capsys, "--model", str(tmp_path), "--port", "0"
        )
        assert "there is no folder" in self.refused(capsys, "--model", str(tmp_path / "nope"), "--port", "0")

    @pytest.mark.parametrize(
        "options, message",
        [
            (("--port", "70000"), "--port 70000 is no port"),
            (("--max-length", "1"), "--max-length 1 leaves no room"),
            (("--max-new-tokens", "0"), "--max-new-tokens 0 leaves no room"),
            (("--cache-tokens", "9", "--no-continuous-batching"), "--cache-tokens is for continuous batching"),
            (("--name", " "), "--name is empty"),
            (("--dtype", "int3"), "--dtype 'int3'"),
            (("--model", ""), "--model is empty"),
        ],
        ids=lambda value: value[0] if isinstance(value, tuple) else "",
    )
    def test_options(self, capsys, options, message):
        assert message in self.refused(capsys, "--model", "m", *options)

    def test_a_length_that_the_model_has_not(self, served_folder, capsys):
        error = self.refused(
            capsys, "--model", str(served_folder), "--port", "0", "--device", "cpu", "--max-length", "4096"
        )
        assert f"more than this model serves; give {MAX_LENGTH} or less" in error

    def test_packages_that_are_missing(self, monkeypatch):
        monkeypatch.setattr(serve, "is_serve_available", lambda: False)
        with pytest.raises(ImportError, match="pip install 'grinmoe\\[serve\\]'"):
            run_serve(ServeOptions("m"))
