"""The command line of grinmoe: parsers, and errors in one line.

This package stands beside `grinmoe`, not in it: importing that registers the model with Transformers and takes seconds,
and `grinmoe --help` should not. Each command imports what it needs when it runs.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import shlex
import sys
import tempfile
import warnings
from typing import Any

from .commands import COMMANDS, GROUPS, SETTINGS, Command
from .flags import add_flags, make_options, read_options


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands. What it parses has the [`Command`] as `entry`, and flags that were given."""
    parser = argparse.ArgumentParser(
        prog="grinmoe",
        description="GRIN-MoE for Hugging Face Transformers: train, load and talk to mixture-of-experts models.",
        epilog="example: grinmoe demo --output demo-output",
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    groups = {}
    for entry in COMMANDS:
        *above, name = entry.name.split()
        for group in above:
            if group not in groups:
                actions = commands.add_parser(group, **GROUPS[group])
                groups[group] = actions.add_subparsers(dest="action", metavar="ACTION", required=True)
        options = read_options(entry.room, entry.options)
        # Separated by empty lines; argparse takes care of white space.
        purpose, description, example = str(options.__doc__).split("\n\n")
        command = (groups[above[0]] if above else commands).add_parser(
            name,
            help=purpose[0].lower() + purpose[1:].rstrip("."),
            description=f"{description} {SETTINGS}" if entry.takes_settings else description,
            epilog=example,
            allow_abbrev=not entry.takes_settings,
        )
        command.set_defaults(entry=entry)
        add_flags(command, options)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0, 2 for what the user can mend, 130 when interrupted."""
    try:
        return _main(argv)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130


def _main(argv: list[str] | None) -> int:
    parser = build_parser()
    arguments, arguments_left = parser.parse_known_args(argv)
    entry: Command | None = getattr(arguments, "entry", None)
    if arguments_left and not (entry and entry.takes_settings):
        parser.error(f"unrecognized arguments: {' '.join(arguments_left)}")
    if arguments.version:
        print(f"grinmoe {_version()}")
        return 0
    if entry is None:
        parser.print_help()
        return 0
    given = vars(arguments)
    if entry.takes_settings:
        given |= {"task": entry.name, "settings": tuple(arguments_left)}
    if "output" in given:
        given["output"] = os.path.expanduser(given["output"])  # a shell leaves it in --output=~/model
    # Of the libraries among themselves; nothing that a user of a command could change.
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_is_for_users)
    try:
        return _run(entry, given)
    except BrokenPipeError:
        # The reader (head, less) is gone; nothing is left to say.
        sys.stderr.close()
        return 0
    except (ValueError, OSError, ImportError) as error:
        print(f"grinmoe {arguments.command}: {_line(str(error))}", file=sys.stderr)
        return 2


def _line(message: str) -> str:
    """A message as one line. Names of files and answers of servers may hold characters that control a terminal."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in " ".join(message.split()))


def _run(entry: Command, given: dict[str, Any]) -> int:
    room = importlib.import_module(f"grinmoe.{entry.room}")
    from grinmoe.files import telling_disk_full

    options = make_options(getattr(room, entry.options), given)
    recorded = {"command": shlex.join(["grinmoe", *sys.argv[1:]])} if entry.is_recorded else {}
    with telling_disk_full(given.get("output") or tempfile.gettempdir()):
        code = getattr(room, entry.run)(options, **recorded)
    return code if isinstance(code, int) else 0


def _is_for_users(record: logging.LogRecord) -> bool:
    """PEFT imports bitsandbytes, which then misses a package of kernels, also in commands that quantise nothing."""
    return "gemm_4bit_forward" not in str(record.msg)


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("grinmoe")
    except PackageNotFoundError:
        return "0+unknown (run from a checkout that is not installed)"
