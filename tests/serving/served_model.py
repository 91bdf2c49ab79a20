"""A small chat model behind `grinmoe serve`: in a process of its own, as a user starts it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from grinmoe import GrinMoeConfig, GrinMoeForCausalLM
from grinmoe.tokenization import build_tokenizer
from tests import ROOT
from tests.small_chat import COLOURS, THINGS, chats

if TYPE_CHECKING:
    import openai

MAX_LENGTH = 128
QUESTIONS = [f"What is a {colour} {thing}?" for colour in COLOURS for thing in THINGS][:32]


@pytest.fixture(scope="session")
def served_folder(tmp_path_factory) -> Path:
    """A model of random weights whose text is nonsense, but the same every time, and differs from question to question."""
    folder = tmp_path_factory.mktemp("served") / "tiny-chat"
    words = [message["content"] for row in chats() for message in row["messages"]]
    tokenizer = build_tokenizer(words, 384, model_max_length=MAX_LENGTH)
    torch.manual_seed(0)
    config = GrinMoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        max_position_embeddings=MAX_LENGTH,
        sliding_window=31,
        initializer_range=0.2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = GrinMoeForCausalLM(config)
    with torch.no_grad():
        # No single bytes: a run of them that is no text is shown differently while it grows.
        model.lm_head.bias[3 : 3 + 256] = -1e4
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@dataclass
class ServedProcess:
    """A running `grinmoe serve`."""

    process: subprocess.Popen
    ready: str  # the line that says so
    url: str  # with /v1
    name: str

    @property
    def root(self) -> str:
        return self.url.removesuffix("/v1")

    def client(self) -> openai.OpenAI:
        import openai

        return openai.OpenAI(base_url=self.url, api_key="none", max_retries=0, timeout=600)

    def end(self, number: signal.Signals) -> tuple[int, str]:
        """Exit code after a signal, and what else was printed."""
        self.process.send_signal(number)
        output, _ = self.process.communicate(timeout=600)
        return self.process.returncode, output


def start(folder: Path, *options: str) -> ServedProcess:
    """Start the command on a free port, and wait for the line that says it is ready."""
    command = [sys.executable, "-m", "grinmoe_cli", "serve", "--model", str(folder), "--port", "0", "--device", "cpu"]
    # A shell starts its background jobs with SIGINT ignored, which processes inherit; the server is ended by one.
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = subprocess.Popen(
            [*command, *options],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    finally:
        signal.signal(signal.SIGINT, previous)
    assert process.stdout is not None
    printed = []
    for line in process.stdout:
        printed.append(line)
        if " is ready at " in line:
            name, rest = line.split(" is ready at ")
            return ServedProcess(process, line.strip(), rest.split()[0], name)
    raise AssertionError(f"the server ended with {process.wait()}:\n{''.join(printed)}")


def chat(question: str) -> list[dict]:
    """The messages of one question."""
    return [{"role": "user", "content": question}]


def ask(client: openai.OpenAI, question: str, **options):
    """One chat completion, greedy unless `options` say otherwise."""
    options = {"model": "tiny-chat", "temperature": 0, "max_tokens": 16, **options}
    return client.chat.completions.create(messages=chat(question), **options)
