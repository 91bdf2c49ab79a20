"""Options of `grinmoe sft`, `dpo` and `pretrain` besides a recipe's settings (see `grinmoe/options.py`)."""

from dataclasses import dataclass
from typing import Annotated


@dataclass(frozen=True)
class RecipeOptions:
    """A recipe file, and the settings that differ from it."""

    task: str
    settings: tuple[str, ...] = ()  # flags and values as typed
    config: Annotated[str | None, "YAML; recipes/ has some to start from", "FILE"] = None
    options: Annotated[bool, "list all keys and flags, and exit"] = False
