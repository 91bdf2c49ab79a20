"""Options of `grinmoe compare`."""

from dataclasses import dataclass
from typing import Annotated

from ..files import KeptFolder


@dataclass(frozen=True)
class CompareOptions:
    """Train small models with every estimator of the router's gradient, and compare them.

    Train small models from the same weights, on the same batches in the same order, with every estimator, two kinds
    of balance and a dense twin; write a table, a figure and all numbers. Complete runs are kept: an interrupted
    comparison goes on. About an hour on 2 cores; on a GPU models and data are larger.

    example: grinmoe compare --output comparison --seeds 1 --steps 60 --arms topk v2 togo
    """

    output: KeptFolder
    seeds: Annotated[int | None, "runs per arm (default: 3)", "N"] = None
    steps: Annotated[int | None, "optimizer steps of a run (default: 400; GPU: 1500)", "N"] = None
    arms: Annotated[tuple[str, ...] | None, "some arms only (default: all; an unknown one lists them)", "NAME"] = None
    text: Annotated[str | None, "UTF-8 text (default: documentation of the installed packages)", "FILE"] = None
    workers: Annotated[int | None, "runs at a time (default: one per core, 4 on a GPU)", "N"] = None
