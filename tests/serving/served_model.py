"""A small chat model behind `grinmoe serve`: in a process of its own, as a user starts it."""

from __future__ import annotations

import dataclasses
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests import ROOT
from tests.small_chat import COLOURS, THINGS, save_talking_model, words

if TYPE_CHECKING:
    import openai

    from grinmoe.serving.access import Access
    from grinmoe.serving.gate import Limits

MAX_LENGTH = 128
QUESTIONS = [f"What is a {colour} {thing}?" for colour in COLOURS for thing in THINGS][:32]


@pytest.fixture(scope="session")
def served_folder(tmp_path_factory) -> Path:
    """A model of random weights whose text is nonsense, but the same every time, and differs from question to question."""
    folder = tmp_path_factory.mktemp("served") / "tiny-chat"
    save_talking_model(folder, words(), length=MAX_LENGTH, intermediate_size=32)
    return folder


@dataclass
class ServedProcess:
    """A running `grinmoe serve`."""

    process: subprocess.Popen
    before: str  # what was printed before it was ready
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


def start(folder: Path, *options: str, open_files: int | None = None) -> ServedProcess:
    """Start the command on a free port, and wait for the line that says it is ready. `open_files` is its `ulimit -n`."""
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
            preexec_fn=None if open_files is None else lambda: _limit_open_files(open_files),
        )
    finally:
        signal.signal(signal.SIGINT, previous)
    assert process.stdout is not None
    printed = []
    for line in process.stdout:
        printed.append(line)
        if " is ready at " in line:
            name, rest = line.split(" is ready at ")
            return ServedProcess(process, "".join(printed[:-1]), line.strip(), rest.split()[0], name)
    raise AssertionError(f"the server ended with {process.wait()}:\n{''.join(printed)}")


def _limit_open_files(most: int) -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


@contextmanager
def in_this_process(
    folder: Path,
    continuous_batching: bool,
    http_limits: Limits | None = None,
    access: Access | None = None,
    **limits: int,
) -> Iterator[tuple]:
    """The server in a thread, for requests that look into it: (client, how it generates, server)."""
    import openai

    import grinmoe.serving.serve as serve
    import grinmoe.serving.server as inside
    from grinmoe.serving.http import Server

    options = serve.ServeOptions(str(folder), device="cpu", continuous_batching=continuous_batching)
    served, manager = serve._load(str(folder), options)
    manager.served = dataclasses.replace(served, **limits)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        running = Server(inside.build_app(manager.served, manager, access, http_limits), manager.stop)
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]})
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        yield openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=600), manager, running
        running.should_exit = True
        thread.join(timeout=600)
        assert not thread.is_alive()


def chat(question: str) -> list[dict]:
    """The messages of one question."""
    return [{"role": "user", "content": question}]


def ask(client: openai.OpenAI, question: str, **options):
    """One chat completion, greedy unless `options` say otherwise."""
    options = {"model": "tiny-chat", "temperature": 0, "max_tokens": 16, **options}
    return client.chat.completions.create(messages=chat(question), **options)
