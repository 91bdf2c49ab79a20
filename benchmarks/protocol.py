"""How every benchmark here measures and reports.

Arms run in one process, interleaved round by round, so that a machine that slows down slows all of them; the ratio of two
arms is taken round by round, and its median reported. A result is written with what it was measured on: hardware,
versions, commit and command. A number that has no such file under `benchmarks/results/` is not claimed anywhere.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


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


def environment() -> dict[str, Any]:
    """What a result was measured on. Imports torch and transformers."""
    import torch
    import transformers

    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": _commit(),
        "command": " ".join(["python", "-m", "benchmarks", *map(shlex.quote, sys.argv[1:])]),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.release()}",
    }


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
    stamp = environment()
    device = "gpu" if stamp["gpu"] else "cpu"
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{stamp['date'][:10]}-{name}-{device}"
    _write(path.with_suffix(".json"), json.dumps({"environment": stamp, **facts}, indent=2) + "\n")
    rows = "\n".join(f"| {key} | {value} |" for key, value in stamp.items() if value is not None)
    _write(path.with_suffix(".md"), f"# {name}\n\n{report.strip()}\n\n## Measured on\n\n| | |\n|---|---|\n{rows}\n")
    return path.with_suffix(".md")


def markdown_table(header: list[str], rows: list[list[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def _write(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def _commit() -> str:
    """Short hash of the checkout, with -dirty where files other than results differ from it; "unknown" outside of git."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()

    commit = git("rev-parse", "--short", "HEAD")
    dirty = git("status", "--porcelain", "--", ".", ":!benchmarks/results")
    return f"{commit}-dirty" if commit and dirty else commit or "unknown"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
