"""Every command line ends: with a named error and exit code 2, or with options that the command can use."""

from __future__ import annotations

import contextlib
import importlib
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

import grinmoe_cli
from grinmoe_cli.commands import COMMANDS

pytestmark = pytest.mark.newest_only  # parses

VALUES = ["", " ", "x", "-1", "0", "1", "2", "1e20", "nan", "inf", "-inf", "9" * 25, "9" * 5000, "1.5", "true", "auto"]
VALUES += ["./nowhere", "/dev/null", "a/b", "a/b/c", "..", "\x00", "\udcff", "é", "--", "-", "x" * 3000, "[1,", "{}"]


def flags_of(command) -> list[str]:
    parser = grinmoe_cli.build_parser()
    for word in command.name.split():
        (actions,) = [
            action for action in parser._actions if hasattr(action, "choices") and isinstance(action.choices, dict)
        ]
        parser = actions.choices[word]
    return [flag for action in parser._actions for flag in action.option_strings if flag not in ("-h", "--help")]


FLAGS = {command.name: flags_of(command) for command in COMMANDS}
# They take any setting of TrainingArguments; tests/training tries those.
PLAIN = [command for command in COMMANDS if not command.takes_settings]


@st.composite
def command_lines(draw, command):
    given = draw(st.lists(st.sampled_from(FLAGS[command.name]), unique=True, max_size=6))
    words = command.name.split()
    for flag in {"--model", "--output", "--repo"} & set(FLAGS[command.name]) | set(given):
        words += [flag, *draw(st.lists(st.sampled_from(VALUES), min_size=0 if flag in given else 1, max_size=2))]
    return words


@pytest.mark.parametrize("command", PLAIN, ids=lambda command: command.name)
def test_command_line_of_any_words_ends_with_options_or_a_named_error(command, monkeypatch, bounded, fuzzed, tmp_path):
    room = importlib.import_module(f"grinmoe.{command.room}")
    taken = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(room, command.run, lambda options, **_: taken.append(options))

    @fuzzed
    @given(command_lines(command))
    def check(line):
        taken.clear()
        said = io.StringIO()
        with bounded(), contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            try:
                code = grinmoe_cli.main(line)
            except SystemExit as end:
                code = end.code
        assert code in (0, 2), line
        assert (code == 0) == bool(taken), (line, said.getvalue())
        assert "Traceback" not in said.getvalue() and len(said.getvalue()) < 50_000
        assert code == 0 or f"grinmoe {line[0]}" in said.getvalue() or "grinmoe: error: " in said.getvalue(), line

    check()
    assert not list(tmp_path.iterdir()), "parsing writes nothing"
