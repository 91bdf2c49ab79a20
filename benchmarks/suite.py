"""All of a device's benchmarks, one process after the other, and the goals in one table.

    python -m benchmarks gpu [--minutes 9]     # make bench-gpu
    python -m benchmarks gpu --toy             # the same on a CPU, tiny, kernels interpreted: tries the code

Each benchmark has its share of the time and writes what it has as it goes, so a run that is cut off leaves results. Nothing
is needed but torch, Triton and transformers.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.protocol import RESULTS, Report
from grinmoe.provenance import CHECKOUT, markdown_table

# Most important first: name, and share of the time.
ORDER = (("block", 0.5), ("router", 0.1), ("layer", 0.2))


@dataclass(frozen=True)
class SuiteSettings:
    minutes: float = 9.0
    toy: bool = False


def run(options: SuiteSettings) -> Path:
    report = Report("suite", asdict(options), options.toy)
    end = time.monotonic() + 60 * options.minutes
    outcomes = {}
    for name, share in ORDER:
        minutes = min(share * options.minutes, (end - time.monotonic()) / 60)
        outcomes[name] = measure(name, minutes, options.toy) if minutes > 0.2 else "not begun: no time was left"
        rows = [[benchmark, outcome] for benchmark, outcome in outcomes.items()]
        report.add("outcomes", dict(outcomes))
    report.add("outcomes", outcomes, markdown_table(["benchmark", "outcome"], rows))
    facts = {name: json.loads(newest(name, report).read_text()) for name in outcomes if newest(name, report).exists()}
    table = markdown_table(["goal", "wanted", "measured"], goals(facts))
    report.add("goals", goals(facts), f"## Goals\n\n{table}")
    return report.finish()


def newest(name: str, suite: Report) -> Path:
    return RESULTS / suite.path.with_suffix(".json").name.replace("-suite-", f"-{name}-")


def measure(name: str, minutes: float, toy: bool) -> str:
    """Run one benchmark in a process, at most twice its time, and say how it ended."""
    command = [sys.executable, "-m", "benchmarks", name, "--minutes", f"{minutes:.2f}", *(["--toy"] if toy else [])]
    environment = {**os.environ, **({"TRITON_INTERPRET": "1"} if toy else {})}
    print(f"\n== {' '.join(command[1:])}", flush=True)
    started = time.monotonic()
    try:
        done = subprocess.run(command, cwd=CHECKOUT, env=environment, timeout=120 * minutes)
    except subprocess.TimeoutExpired:
        return f"stopped after {2 * minutes:.1f} minutes; what it had is written"
    seconds = time.monotonic() - started
    return f"done in {seconds:.0f} s" if done.returncode == 0 else f"failed with exit code {done.returncode}"


def goals(facts: dict[str, Any]) -> list[list[str]]:
    """A row for each goal that something was measured for: its name, what is wanted, what was found."""
    rows = []
    for case, arms in facts.get("block", {}).get("arms", {}).items():
        ours = arms.get("grinmoe, grinmoe_triton")
        if ours is None:
            continue
        for goal, other, wanted in (
            ("G1 block over dense", "dense", "0.90 / 0.95 / 0.97 at 8k / 16k / 32k"),
            ("G3 over Transformers' grouped_mm", "transformers phimoe, grouped_mm", "1.3 up to 2k, 1.15 at 16k"),
            ("G3 over Transformers' eager", "transformers phimoe, eager", "3 at 8k"),
        ):
            rows.append([f"{goal}, {case}", wanted, f"{ratio(arms[other]['seconds'], ours['seconds']):.3f}"])
        rows.append([f"G4 kept, {case}", "1.1 times the least", f"{ours['saved_bytes'] / 2**20:.1f} MiB"])
    layer = facts.get("layer", {}).get("arms", {})
    if "grinmoe_triton" in layer:
        found = ratio(layer["dense"]["seconds"], layer["grinmoe_triton"]["seconds"])
        rows.append(["G2 layer over dense layer", "0.95 at 16k", f"{found:.3f}"])
    router = facts.get("router", {}).get("arms", {})
    if "fused kernel" in router:
        fused, operators = router["fused kernel"], router["torch operators"]
        microseconds = 1e6 * statistics.median(fused["seconds"])
        wanted = "2 launches, 15 us each, 10 times the operators"
        times = ratio(operators["seconds"], fused["seconds"])
        found = f"{fused['launches']} launches, {microseconds:.0f} us, {times:.1f} times"
        rows.append(["G5 router", wanted, found])
    return rows


def ratio(others: list[float], ours: list[float]) -> float:
    return statistics.median(other / own for other, own in zip(others, ours, strict=True))


__all__ = ["SuiteSettings", "goals", "run"]
