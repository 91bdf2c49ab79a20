"""Every command's options are one dataclass: its fields are the flags, and reading it imports nothing heavy."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import importlib
import subprocess
import sys
from typing import Annotated, Required, get_args, get_origin, get_type_hints

import pytest

import grinmoe_cli
from grinmoe_cli.commands import COMMANDS, Command
from grinmoe_cli.flags import make_options, read_options
from tests import ROOT

OPTIONS_FILES = sorted([ROOT / "grinmoe" / "files.py", *ROOT.glob("grinmoe/*/options.py")])
every_command = pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
# A value that each flag takes; others take "7".
_VALUES = {"to": "gguf", "quantized_base": "nf4", "lora_targets": "all"}


def flags_of(command: Command) -> dict[str, argparse.Action]:
    """Actions of a command's parser by the field that each fills; fails where two fill one."""
    parser = grinmoe_cli.build_parser()
    for name in command.name.split():
        parser = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction)).choices[name]
    actions = [action for action in parser._actions if action.dest != "help"]
    assert len({action.dest for action in actions}) == len(actions)
    return {action.dest: action for action in actions}


def fields_of(options: type) -> dict[str, tuple[dataclasses.Field, tuple]]:
    """Fields that are to have a flag, of nested dataclasses too, with their `Annotated` arguments."""
    found: dict[str, tuple[dataclasses.Field, tuple]] = {}
    hints = get_type_hints(options, include_extras=True)
    for field in dataclasses.fields(options):
        hint = hints[field.name]
        kind = get_args(hint)[0] if get_origin(hint) is Annotated else hint
        if dataclasses.is_dataclass(kind):
            found |= fields_of(kind)
        elif kind is not hint:
            assert field.name not in found
            found[field.name] = (field, get_args(hint))
    return found


def required_words(command: Command) -> list[str]:
    words = []
    for name, action in flags_of(command).items():
        if action.required:
            words += [action.option_strings[0], _VALUES.get(name, "7")]
    return words


def flat(options) -> dict:
    values = {}
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        values |= flat(value) if dataclasses.is_dataclass(value) else {field.name: value}
    return values


def parsed(command: Command, words: list[str]) -> dict:
    """Values of the options that a command line gives."""
    arguments = grinmoe_cli.build_parser().parse_args([*command.name.split(), *words])
    given = vars(arguments) | {"task": command.name}
    if command.name == "plan":
        given |= {"method": "full"}
    return flat(make_options(read_options(command.room, command.options), given))


@pytest.mark.parametrize("path", OPTIONS_FILES, ids=lambda path: path.parent.name)
def test_options_files_import_the_standard_library_and_each_other_alone(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert all(alias.name.split(".")[0] in sys.stdlib_module_names for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level:
            assert (node.level, node.module) == (2, "files")
        elif isinstance(node, ast.ImportFrom):
            assert node.module.split(".")[0] in sys.stdlib_module_names


@every_command
def test_command_every_annotated_field_is_exactly_one_flag(command):
    flags = flags_of(command)
    fields = fields_of(read_options(command.room, command.options))
    assert flags.keys() == fields.keys()
    for name, (field, said) in fields.items():
        dashed = name.replace("_", "-")
        negative = said[0] is bool and field.default is True
        assert flags[name].option_strings == [f"--no-{dashed}" if negative else f"--{dashed}"]
        assert flags[name].help.startswith(said[1])


@every_command
def test_command_without_optional_flags_has_the_defaults_of_the_fields(command):
    options = read_options(command.room, command.options)
    values = parsed(command, required_words(command))
    for name, (field, said) in fields_of(options).items():
        if not flags_of(command)[name].required:
            assert values[name] == field.default
        else:
            assert Required in said or field.default is dataclasses.MISSING


@every_command
def test_command_switches_turn_the_default_around(command):
    flags = flags_of(command)
    for name, (field, said) in fields_of(read_options(command.room, command.options)).items():
        if said[0] is bool and (command.name, name) != ("plan", "cpu_offload"):
            words = [*required_words(command), *flags[name].option_strings]
            assert parsed(command, words)[name] is not field.default


def test_flags_several_values_are_a_tuple_and_numbers_are_numbers():
    commands = {command.name: command for command in COMMANDS}
    line = "--model m --tasks a b --output=o --limit 3"
    values = parsed(commands["evaluate"], line.split())
    assert (values["tasks"], values["output"], values["limit"]) == (("a", "b"), "o", 3)
    line = "--model m --repo r --datasets x y --no-load-check"
    values = parsed(commands["push"], line.split())
    assert (values["datasets"], values["load_check"], values["language"]) == (("x", "y"), False, None)


@pytest.mark.parametrize(
    "words, message",
    [
        ("export --model m --to onnx --output o", "--to: invalid choice"),
        ("merge --adapter a --output o --quantized-base nf5", "--quantized-base: invalid choice"),
        ("plan --model m --lora-targets none", "--lora-targets: invalid choice"),
        ("serve --model m --port many", "--port: 'many' is not a whole number"),
        ("serve --model m --port 1e20", "--port: '1e20' is not a whole number"),
        (
            f"analyze --model m --text t --output o --max-tokens {10**30}",
            "'1000000000000000000000000000000' is not a whole",
        ),
        (f"generate --model m --seed {'9' * 5000}", "is not a whole number of at most 64 bits"),
        ("generate --model m --temperature nan", "--temperature: 'nan' is not a finite number"),
        ("generate --model m --temperature 1e400", "--temperature: '1e400' is not a finite number"),
        ("serve", "--model"),
        ("tokenizer", "ACTION"),
        ("serve --model m --speed 3", "unrecognized arguments: --speed 3"),
    ],
)
def test_a_wrong_flag_is_exit_code_2(words, message, capsys):
    with pytest.raises(SystemExit) as end:
        grinmoe_cli.main(words.split())
    assert end.value.code == 2
    assert message in capsys.readouterr().err


@every_command
def test_command_the_face_of_its_room_has_options_and_run_function(command):
    room = importlib.import_module(f"grinmoe.{command.room}")
    options = getattr(room, command.options)
    assert fields_of(options).keys() == fields_of(read_options(command.room, command.options)).keys()
    assert callable(getattr(room, command.run))


@pytest.mark.parametrize("words", ["", *(command.name for command in COMMANDS), "tokenizer"])
def test_help_shows_an_example_and_imports_nothing_heavy(words):
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); import grinmoe_cli\n"
        "try: grinmoe_cli.main([*sys.argv[2:], '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'grinmoe', 'rich', 'yaml', 'huggingface_hub'} & sys.modules.keys()\n"
        "assert not heavy, heavy"
    )
    # -S: the start-up files of site-packages may import what they like.
    done = subprocess.run(
        [sys.executable, "-S", "-c", script, str(ROOT), *words.split()], capture_output=True, text=True, check=True
    )
    assert f"example: grinmoe {words}" in done.stdout
