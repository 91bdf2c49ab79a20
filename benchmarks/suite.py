"""All of a device's benchmarks, one process after the other, and the goals in one table.

    python -m benchmarks gpu [--minutes 9]     # make bench-gpu
    python -m benchmarks gpu --toy             # the same on a CPU, tiny, kernels interpreted: tries the code
    python -m benchmarks cpu                   # make bench

Each benchmark has its share of the time and writes what it has as it goes, so a run that is cut off leaves results. Nothing
is needed but torch, Triton and transformers; what is not installed is left out and named.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import benchmarks.protocol as protocol
from benchmarks.goals import Goal, goals_of
from benchmarks.protocol import Report
from grinmoe.provenance import CHECKOUT, markdown_table


class Part(NamedTuple):
    """`minutes`: of the usual total. `takes_time`: whether it has --minutes. `package`: that it needs beyond the three."""

    name: str
    minutes: float
    takes_time: bool = True
    package: str | None = None


# Most important first, in case that time runs out.
PARTS = {
    "gpu": (
        Part("block", 3.2),
        Part("layer", 1.0),
        Part("router", 0.7),
        Part("decode", 2.0),
        Part("train_step", 1.0, package="accelerate"),
        Part("lora", 0.7, package="peft"),
    ),
    "cpu": (
        Part("block", 1.5),
        Part("decode", 1.0),
        Part("load", 1.0, takes_time=False),
        Part("layer", 0.3),
        Part("train_step", 0.6, package="accelerate"),
        Part("lora", 0.6, package="peft"),
    ),
}
# Of importing, compiling, and a benchmark's fewest rounds.
GRACE_MINUTES = 1.0


@dataclass(frozen=True)
class SuiteSettings:
    """`device`: "gpu" or "cpu", whose benchmarks. `minutes`: all together. `toy`: a GPU's on a CPU, tiny."""

    device: str = "gpu"
    minutes: float = 9.0
    toy: bool = False


def run(options: SuiteSettings) -> Path:
    """
    Run all benchmarks, print the goals, and return the path of the report.

    Raises:
        ValueError: a GPU's benchmarks without a GPU.
        RuntimeError: a benchmark failed. The report is written all the same.
    """
    check_device(options)
    report = Report("suite", asdict(options), options.toy)
    began = time.time()
    end = time.monotonic() + 60 * options.minutes
    parts = PARTS[options.device]
    usual = sum(part.minutes for part in parts)
    outcomes: dict[str, str] = {}
    for number, part in enumerate(parts):
        left = (end - time.monotonic()) / 60
        # What earlier parts left over is shared out among the rest.
        share = left * part.minutes / sum(later.minutes for later in parts[number:])
        outcomes[part.name] = measure(part, min(share, left), left, options)
        report.add("outcomes", dict(outcomes))
        report.add("goals", [goal._asdict() for goal in goals_of(reports_since(began, options), options.device)])
    found = goals_of(reports_since(began, options), options.device)
    rows = [[name, outcome] for name, outcome in outcomes.items()]
    report.add("outcomes", outcomes, markdown_table(["benchmark", "outcome"], rows))
    report.add("goals", [goal._asdict() for goal in found], f"## Goals\n\n{table(found, options.toy)}")
    report.add("usual_minutes", usual)
    path = report.finish()
    if failed := [name for name, outcome in outcomes.items() if outcome.startswith("failed")]:
        raise RuntimeError(f"{', '.join(failed)} failed, see above; the others are in {path}")
    return path


def check_device(options: SuiteSettings) -> None:
    import torch

    if options.device == "gpu" and not options.toy and not torch.cuda.is_available():
        raise ValueError("python -m benchmarks gpu: no GPU is visible; --toy tries the code on a CPU, or take cpu")


def measure(part: Part, minutes: float, left: float, options: SuiteSettings) -> str:
    """Run one benchmark in a process, for `minutes` and a grace if `left` minutes allow it. Returns how it ended."""
    if minutes < 0.1:
        return "not begun: no time was left"
    if part.package is not None and importlib.util.find_spec(part.package) is None:
        return f"left out: {part.package} is not installed"
    command = [sys.executable, "-m", "benchmarks", part.name]
    command += [*(["--minutes", f"{minutes:.2f}"] if part.takes_time else []), *(["--toy"] if options.toy else [])]
    # On a machine with several GPUs the Trainer would take all of them.
    environment = {"CUDA_VISIBLE_DEVICES": "0", **os.environ}
    if options.toy or options.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    if options.toy:
        environment["TRITON_INTERPRET"] = "1"
    print(f"\n== {' '.join(command[1:])}", flush=True)
    started = time.monotonic()
    limit = 60 * min(minutes + GRACE_MINUTES, left)
    code = run_limited(command, environment, limit)
    if code is None:
        return f"stopped after {limit:.0f} s; what it had measured is written"
    return f"done in {time.monotonic() - started:.0f} s" if code == 0 else f"failed with exit code {code}"


def run_limited(command: list[str], environment: dict[str, str], seconds: float) -> int | None:
    """Exit code of a command, or None where it took longer and was killed with all processes that it had started."""
    process = subprocess.Popen(command, cwd=CHECKOUT, env=environment, start_new_session=True)
    try:
        return process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def reports_since(began: float, options: SuiteSettings) -> dict[str, dict[str, Any]]:
    """Facts of the newest report of each benchmark that was written after `began`, complete or not."""
    device = "cpu-toy" if options.toy else options.device
    reports = {}
    for part in PARTS[options.device]:
        files = sorted(protocol.RESULTS.glob(f"*-{part.name}-{device}.json"), key=lambda file: file.stat().st_mtime)
        if files and files[-1].stat().st_mtime >= began:
            reports[part.name] = json.loads(files[-1].read_text())
    return reports


def table(goals: list[Goal], toy: bool) -> str:
    words = {True: "yes", False: "no", None: "-"}
    rows = [[goal.name, goal.wanted, goal.measured, "-" if toy else words[goal.met]] for goal in goals]
    return markdown_table(["goal", "wanted", "measured", "met"], rows)


__all__ = ["SuiteSettings", "run"]
