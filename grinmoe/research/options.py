"""Options of `grinmoe compare` (see `grinmoe/options.py`)."""

from dataclasses import dataclass
from typing import Annotated

from ..options import KeptFolder


@dataclass(frozen=True)
class CompareOptions:
    """What to compare, and on what."""

    output: KeptFolder
    seeds: Annotated[int | None, "runs per arm (default: 3)", "N"] = None
    steps: Annotated[int | None, "optimizer steps of a run (default: 400; GPU: 1500)", "N"] = None
    arms: Annotated[tuple[str, ...] | None, "some arms only (default: all; an unknown one lists them)", "NAME"] = None
    text: Annotated[str | None, "UTF-8 text (default: documentation of the installed packages)", "FILE"] = None
    workers: Annotated[int | None, "runs at a time (default: one per core, 4 on a GPU)", "N"] = None
