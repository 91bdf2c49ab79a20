"""How every benchmark here measures and reports.

Arms run in one process, interleaved round by round, so that a machine that slows down slows all of them; the ratio of two
arms is taken round by round, and its median reported. A result is written with what it was measured on: hardware,
versions, commit and command. A number that has no such file under `benchmarks/results/` is not claimed anywhere.
"""

from __future__ import annotations

import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grinmoe.provenance import CHECKOUT, environment, write_beside

RESULTS = CHECKOUT / "benchmarks" / "results"


@dataclass
class Timing:
    """Wall-clock seconds of one arm, one value per round."""

    seconds: list[float] = field(default_factory=list)

    @property
    def median_ms(self) -> float:
        return 1e3 * statistics.median(self.seconds)

    @property
    def quartiles_ms(self) -> tuple[float, float]:
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return 1e3 * low, 1e3 * high

    def ratio_to(self, other: Timing) -> float:
        """How many times longer `other` takes: median over rounds."""
        return statistics.median(b / a for a, b in zip(self.seconds, other.seconds, strict=True))


def interleave(arms: dict[str, Callable[[int], Any]], warmup: int = 5, rounds: int = 20) -> dict[str, Timing]:
    """
    Time `arms` in turn, `warmup` uncounted rounds first.

    Args:
        arms: what to run, by name, given the number of the round. Each must do all of its work before it returns.
        warmup, rounds: how often each arm runs.

    Returns:
        A `Timing` of `rounds` values per arm.
    """
    timings = {name: Timing() for name in arms}
    for number in range(warmup + rounds):
        for name, run in arms.items():
            start = time.perf_counter()
            run(number)
            if number >= warmup:
                timings[name].seconds.append(time.perf_counter() - start)
    return timings


def write_result(name: str, facts: dict[str, Any], report: str) -> Path:
    """
    Write `results/DATE-NAME-DEVICE.json` and `.md`.

    Args:
        name: of the benchmark.
        facts: everything that was measured, and the settings.
        report: the same for people, in Markdown, without a title.

    Returns:
        Path of the Markdown file.
    """
    stamp = environment(" ".join(["python", "-m", "benchmarks", *map(shlex.quote, sys.argv[1:])]))
    device = "gpu" if stamp["gpu"] else "cpu"
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{stamp['date'][:10]}-{name}-{device}"
    write_beside(path.with_suffix(".json"), json.dumps({"environment": stamp, **facts}, indent=2) + "\n")
    rows = "\n".join(f"| {key} | {value} |" for key, value in stamp.items() if value is not None)
    write_beside(
        path.with_suffix(".md"), f"# {name}\n\n{report.strip()}\n\n## Measured on\n\n| | |\n|---|---|\n{rows}\n"
    )
    return path.with_suffix(".md")
