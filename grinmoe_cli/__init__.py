"""The command line of grinmoe: parsers, and errors in one line.

This package stands beside `grinmoe`, not in it: importing that registers the model with Transformers and takes seconds,
and `grinmoe --help` should not. Each command imports what it needs when it runs.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings

from . import publishing, training, using


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="grinmoe",
        description="GRIN-MoE for Hugging Face Transformers: train, load and talk to mixture-of-experts models.",
        epilog="example: grinmoe demo --output demo-output",
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for group in (training, using, publishing):
        group.add_commands(commands)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0, 2 for what the user can mend, 130 when interrupted."""
    parser = build_parser()
    arguments, arguments_left = parser.parse_known_args(argv)
    if getattr(arguments, "takes_settings", False):
        arguments.settings = arguments_left
    elif arguments_left:
        parser.error(f"unrecognized arguments: {' '.join(arguments_left)}")
    if arguments.version:
        print(f"grinmoe {_version()}")
        return 0
    if arguments.command is None:
        parser.print_help()
        return 0
    if getattr(arguments, "output", None) is not None:
        arguments.output = os.path.expanduser(arguments.output)  # a shell leaves it in --output=~/model
    # Of the libraries among themselves; nothing that a user of a command could change.
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        return arguments.run(arguments) or 0
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader (head, less) is gone; nothing is left to say.
        sys.stderr.close()
        return 0
    except (ValueError, OSError, ImportError) as error:
        print(f"grinmoe {arguments.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("grinmoe")
    except PackageNotFoundError:
        return "0+unknown (run from a checkout that is not installed)"
