"""Fixtures of the tests of runs."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from grinmoe.training.run_directory import COMPLETE
from tests.small_chat import small_run
from tests.training.runs import RANDOM, run


@pytest.fixture(scope="session")
def flags(chat_model, chat_data):
    def make(output: Path, **settings) -> list[str]:
        return small_run(chat_model, chat_data["sft"], output, **{**RANDOM, **settings})

    return make


@pytest.fixture(scope="session")
def undisturbed(flags, tmp_path_factory):
    """Run directory of a training that nothing happened to, by method; each is made once."""

    @functools.cache
    def make(method: str) -> Path:
        folder = tmp_path_factory.mktemp("undisturbed") / "run"
        assert run(flags(folder, method=method)).status == COMPLETE
        return folder

    return make
