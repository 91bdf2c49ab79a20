"""All of a device's benchmarks, one process after the other, and the goals in one table beside what was predicted.

    python -m benchmarks gpu --part 1          # of 3, each within 10 minutes; docs/performance.md has the commands
    python -m benchmarks gpu --only block router --minutes 4
    python -m benchmarks gpu --toy             # the same on a CPU, tiny, kernels interpreted: tries the code
    python -m benchmarks cpu                   # make bench

Each benchmark has its share of the time and writes what it has as it goes, so a run that is cut off leaves results. With
`--archive PATH` all of this run's results are packed into one file whenever one was written. Nothing is needed but torch,
Triton and transformers; what is not installed is left out and named.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import benchmarks.protocol as protocol
from benchmarks.goals import Goal, goals_of
from benchmarks.predictions import PREDICTIONS, verdict
from benchmarks.protocol import Report
from grinmoe.files import atomic_file
from grinmoe.provenance import CHECKOUT, markdown_table


class Part(NamedTuple):
    """
    One benchmark of a suite.

    Attributes:
        name: of the benchmark and of its reports.
        minutes: of measuring, in the usual total.
        takes_time: whether it has --minutes.
        packages: that it needs beyond torch, Triton and transformers.
        module: that `python -m` runs, or None for `benchmarks NAME`.
    """

    name: str
    minutes: float
    takes_time: bool = True
    packages: tuple[str, ...] = ()
    module: str | None = None

    @property
    def command(self) -> list[str]:
        return [sys.executable, "-m", *(["benchmarks", self.name] if self.module is None else [self.module])]


# Most important first, in case that time runs out. A GPU's are in three commands of at most ten minutes each.
GPU_PARTS = (
    (Part("correctness", 1.5), Part("block", 3.5), Part("router", 0.5), Part("experts", 1.5)),
    (Part("layer", 1.2), Part("decode", 4.0), Part("lora", 0.6, packages=("peft",))),
    (
        Part("finetune", 4.0, packages=("accelerate", "peft"), module="scripts.finetune_42b"),
        Part("train_step", 1.5, packages=("accelerate",)),
        Part("fsdp", 1.0),
    ),
)
PARTS = {
    "gpu": tuple(part for group in GPU_PARTS for part in group),
    "cpu": (
        Part("block", 1.5),
        Part("decode", 1.0),
        Part("load", 1.0, takes_time=False),
        Part("layer", 0.3),
        Part("train_step", 0.6, packages=("accelerate",)),
        Part("lora", 0.6, packages=("peft",)),
    ),
}
# Minutes of each process for importing and compiling, which are not shared out; and for its fewest rounds beyond its share.
START_MINUTES, GRACE_MINUTES = 0.4, 0.8
# Seconds between two looks at the results of a benchmark that runs.
POLL_SECONDS = 2.0


@dataclass(frozen=True)
class SuiteSettings:
    """
    Attributes:
        device: "gpu" or "cpu", whose benchmarks.
        minutes: all together, or None for what they usually take.
        part: of a GPU's three, from 1; None for all.
        only: names of benchmarks, or none for all.
        archive: .tar.gz of this run's results, written anew after each of them; or None.
        toy: a GPU's on a CPU, tiny.
    """

    device: str = "gpu"
    minutes: float | None = None
    part: int | None = None
    only: tuple[str, ...] = ()
    archive: str | None = None
    toy: bool = False

    @property
    def parts(self) -> tuple[Part, ...]:
        """Raises ValueError for a part or a benchmark that does not exist."""
        parts = PARTS[self.device]
        if self.part is not None:
            if not 1 <= self.part <= len(GPU_PARTS):
                raise ValueError(f"--part {self.part}: give 1 to {len(GPU_PARTS)}")
            parts = GPU_PARTS[self.part - 1]
        if unknown := set(self.only) - {part.name for part in parts}:
            raise ValueError(f"--only {', '.join(unknown)}: choose from {', '.join(part.name for part in parts)}")
        return tuple(part for part in parts if not self.only or part.name in self.only)

    @property
    def usual_minutes(self) -> float:
        return sum(part.minutes + START_MINUTES for part in self.parts)

    @property
    def report_name(self) -> str:
        """Different for the parts of one day, so that none takes another's place."""
        return "-".join(["suite", *([f"part-{self.part}"] if self.part else []), *self.only])


def run(options: SuiteSettings) -> Path:
    """
    Run the benchmarks, print the goals, and return the path of the report.

    Raises:
        ValueError: a GPU's benchmarks without a GPU, or options that name nothing.
        RuntimeError: a benchmark failed. The report is written all the same.
    """
    parts = options.parts
    check_device(options)
    began = time.time()
    minutes = options.usual_minutes if options.minutes is None else options.minutes
    report = Report(options.report_name, asdict(options) | {"minutes": minutes}, options.toy)
    end = time.monotonic() + 60 * minutes
    archive = Archive(options.archive, began)
    outcomes: dict[str, str] = {}
    for number, part in enumerate(parts):
        left = (end - time.monotonic()) / 60
        outcomes[part.name] = measure(part, share_of(parts[number:], left), left, options, archive.update)
        report.add("outcomes", dict(outcomes))
        report.add("goals", [goal._asdict() for goal in goals_of(reports_since(began, options), options.device)])
        archive.update()
    found = goals_of(reports_since(began, options), options.device)
    rows = [[name, outcome] for name, outcome in outcomes.items()]
    report.add("outcomes", outcomes, markdown_table(["benchmark", "outcome"], rows))
    report.add("goals", [goal._asdict() for goal in found], f"## Goals\n\n{table(found, options.toy)}")
    path = report.finish()
    archive.update()
    if failed := [name for name, outcome in outcomes.items() if outcome.startswith("failed")]:
        raise RuntimeError(f"{', '.join(failed)} failed, see above; the others are in {path}")
    return path


def share_of(parts: tuple[Part, ...], left: float) -> float:
    """Minutes of measuring for the first of `parts`, of `left` for all: what earlier ones left over is shared out."""
    measuring = left - START_MINUTES * len(parts)
    return measuring * parts[0].minutes / sum(part.minutes for part in parts)


class Archive:
    """
    A .tar.gz of all results that were written since `began`.

    Args:
        path: of the archive, or None for none. It is replaced as a whole: whenever the run is cut off, it can be read.
        began: seconds since the epoch.
    """

    def __init__(self, path: str | None, began: float):
        self.path, self.began = path and Path(path), began
        self.packed: dict[str, float] = {}

    def update(self) -> None:
        """Pack anew if a result is new or has changed."""
        if not self.path:
            return
        times = {
            file.name: file.stat().st_mtime
            for file in sorted(protocol.RESULTS.glob("*-*"))
            if ".partial" not in file.suffixes
        }
        found = {name: changed for name, changed in times.items() if changed >= self.began}
        if not found or found == self.packed:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(self.path) as partial, tarfile.open(partial, "w:gz") as archive:
            for name in found:
                archive.add(protocol.RESULTS / name, arcname=f"results/{name}")
        self.packed = found


def check_device(options: SuiteSettings) -> None:
    import torch

    if options.device == "gpu" and not options.toy and not torch.cuda.is_available():
        raise ValueError("python -m benchmarks gpu: no GPU is visible; --toy tries the code on a CPU, or take cpu")


def measure(part: Part, minutes: float, left: float, options: SuiteSettings, look: Callable[[], None]) -> str:
    """
    Run one benchmark in a process, and return how it ended.

    Args:
        minutes: of measuring.
        left: minutes of the whole run, which bound the process with its start and a grace.
        look: called every few seconds meanwhile.
    """
    if minutes < 0.1:
        return "not begun: no time was left"
    if missing := [package for package in part.packages if importlib.util.find_spec(package) is None]:
        return f"left out: {', '.join(missing)} is not installed"
    command = [*part.command, *(["--minutes", f"{minutes:.2f}"] if part.takes_time else [])]
    command += [*(["--toy"] if options.toy else [])]
    environment = dict(os.environ)
    if part.name != "correctness":
        # On a machine with several GPUs the Trainer would take all of them.
        environment.setdefault("CUDA_VISIBLE_DEVICES", "0")
    if options.toy or options.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    if options.toy:
        # At these sizes a second thread only waits, and no download is needed.
        environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    print(f"\n== {' '.join(command[1:])}", flush=True)
    started = time.monotonic()
    limit = 60 * min(minutes + START_MINUTES + GRACE_MINUTES, left)
    code = run_limited(command, environment, limit, look)
    if code is None:
        return f"stopped after {limit:.0f} s; what it had measured is written"
    return f"done in {time.monotonic() - started:.0f} s" if code == 0 else f"failed with exit code {code}"


def run_limited(
    command: list[str], environment: dict[str, str], seconds: float, look: Callable[[], None] = lambda: None
) -> int | None:
    """
    Run a command, and call `look` meanwhile.

    Returns:
        The exit code, or None where it took longer than `seconds` and was killed with all processes that it had started.
    """
    process = subprocess.Popen(command, cwd=CHECKOUT, env=environment, start_new_session=True)
    end = time.monotonic() + seconds
    try:
        while (left := end - time.monotonic()) > 0:
            try:
                return process.wait(timeout=min(left, POLL_SECONDS))
            except subprocess.TimeoutExpired:
                look()
        return None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def reports_since(began: float, options: SuiteSettings) -> dict[str, dict[str, Any]]:
    """Facts of the newest report of each benchmark that was written after `began`, complete or not."""
    device = "cpu-toy" if options.toy else options.device
    reports = {}
    for part in options.parts:
        # A script's reports have the method after the benchmark's name.
        name = part.name if part.module is None else f"{part.name}-*"
        files = sorted(protocol.RESULTS.glob(f"????-??-??-{name}-{device}.json"), key=lambda file: file.stat().st_mtime)
        if files and files[-1].stat().st_mtime >= began:
            reports[part.name] = json.loads(files[-1].read_text())
    return reports


def table(goals: list[Goal], toy: bool) -> str:
    words = {True: "yes", False: "no", None: "-"}
    rows = []
    for goal in goals:
        prediction = PREDICTIONS.get(goal.name)
        beside = ["-", "-"] if prediction is None or toy else [prediction.text, verdict(prediction, goal.value)]
        rows.append([goal.name, goal.wanted, beside[0], goal.measured, "-" if toy else words[goal.met], beside[1]])
    return markdown_table(["goal", "wanted", "predicted", "measured", "met", "as predicted"], rows)


__all__ = ["SuiteSettings", "run"]
