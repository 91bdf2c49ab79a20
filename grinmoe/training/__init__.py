"""`grinmoe sft`, `dpo` and `pretrain`: recipes, run directories, stopping and resuming; and Trainer callbacks."""

from importlib import import_module
from typing import Any

# Each name is imported when it is first asked for: these modules need different optional packages.
_MODULES = {
    "SameDrawsForReference": "paired_forwards",
    "CodeWithEveryPush": "hub_callback",
    "NarrowingMask": "jitter_schedule",
    "TrainingProgress": "progress",
    "peak_gib": "progress",
    "Recipe": "recipe",
    "DpoOptions": "options",
    "PretrainOptions": "options",
    "SftOptions": "options",
    "read_recipe": "recipe",
    "run_recipe": "command",
    "train": "run",
    "METRICS_NAME": "run_directory",
    "StopAtSignal": "stop",
    "last_whole_checkpoint": "checkpoints",
    "TokenMeanTrainer": "trainer",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)


__all__ = [*_MODULES]
