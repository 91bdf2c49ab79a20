"""The guide: every block of docs/guide.md is run as it is written, in its order."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT

BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks() -> list[tuple[str, str]]:
    """Language and text, in the order of the guide."""
    return BLOCK.findall((ROOT / "docs" / "guide.md").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    """With `grinmoe` and `python` on the path, and remote code in a folder of its own."""
    folder = tmp_path_factory.mktemp("bin")
    command = folder / "grinmoe"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m grinmoe_cli "$@"\n')
    command.chmod(0o755)
    return {
        **os.environ,
        "PATH": f"{folder}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "HF_MODULES_CACHE": str(tmp_path_factory.mktemp("modules")),
        "HF_HUB_OFFLINE": "1",
    }


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run(command: list[str], folder: Path, environment: dict[str, str]) -> str:
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{command[-1]}\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.mark.integration
def test_every_command_runs_as_written(chat_model, tmp_path, environment):
    (tmp_path / "demo-output").mkdir()
    (tmp_path / "demo-output" / "model").symlink_to(chat_model)
    said, server = [], None
    try:
        for language, text in blocks():
            if language == "bash" and text.startswith("grinmoe serve"):
                port = free_port()  # the one thing that is not as written
                words = text.replace("8000", str(port)).split()
                server = subprocess.Popen(words, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)
                assert "ready at" in server.stdout.readline()
            elif language == "bash":
                said.append(run(["bash", "-e", "-c", text], tmp_path, environment))
            else:
                text = text.replace("8000", str(port)) if server else text
                said.append(run([sys.executable, "-c", text], tmp_path, environment))
    finally:
        if server is not None:
            server.send_signal(signal.SIGTERM)
            assert server.wait(timeout=600) == 0
    assert any("PhimoeForCausalLM" in text for text in said)
    assert any("| questions | 0 | acc | 2 |" in text for text in said)
    for path in ("merged-phimoe/config.json", "merged-bf16/model.safetensors", "routing/report.html"):
        assert (tmp_path / path).is_file()


def test_its_links_lead_somewhere():
    text = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
    links = set(re.findall(r"\]\(([\w.-]+\.md)\)", text))
    assert links and all((ROOT / "docs" / link).is_file() for link in links)
