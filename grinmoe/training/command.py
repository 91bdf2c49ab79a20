"""`grinmoe sft`, `dpo` and `pretrain`: read a recipe, then train."""

from __future__ import annotations

import atexit
import shlex
import signal

from .options import RecipeOptions
from .recipe import option_help, read_recipe


def run_recipe(options: RecipeOptions) -> int:
    """
    Train by a recipe, or list the settings that it may have. Raises what `read_recipe` and `train` raise.

    Returns:
        Exit code: 130 where Ctrl-C ended the run, else 0.
    """
    if options.options:
        print(option_help(options.task))
        return 0
    arguments = [*([] if options.config is None else ["--config", options.config]), *options.settings]
    recipe = read_recipe(options.task, arguments)
    # Mistakes in a recipe are told before the libraries that training needs are loaded.
    from .run import train

    command = shlex.join(["grinmoe", options.task, *arguments])
    result = train(recipe, command)
    # All is written. The interpreter takes a second to end, in which a signal would make a failure of it.
    atexit.register(signal.signal, signal.SIGTERM, signal.SIG_IGN)
    return 130 if result.signal == "SIGINT" else 0
