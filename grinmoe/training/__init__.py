"""`grinmoe sft`, `dpo` and `pretrain`: recipes, run directories, stopping and resuming; and Trainer callbacks."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .command import run_recipe
    from .dpo import SameDrawsForReference
    from .hub_callback import CodeWithEveryPush
    from .jitter_schedule import NarrowingMask
    from .options import DpoOptions, PretrainOptions, SftOptions
    from .progress import TrainingProgress, peak_gib
    from .recipe import Recipe, read_recipe
    from .run import train
    from .run_directory import METRICS_NAME
    from .stop import StopAtSignal
    from .trainer import TokenMeanTrainer

# Each name is imported when it is first asked for: these modules need different optional packages.
_MODULES = {
    "SameDrawsForReference": "dpo",
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
    "TokenMeanTrainer": "trainer",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)


__all__ = [
    "METRICS_NAME",
    "CodeWithEveryPush",
    "DpoOptions",
    "NarrowingMask",
    "PretrainOptions",
    "Recipe",
    "SameDrawsForReference",
    "SftOptions",
    "StopAtSignal",
    "TokenMeanTrainer",
    "TrainingProgress",
    "peak_gib",
    "read_recipe",
    "run_recipe",
    "train",
]
