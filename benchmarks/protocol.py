"""How every benchmark here measures and reports.

Arms run in one process, interleaved round by round, so that a machine that slows down slows all of them; the ratio of two
arms is taken round by round, and its median reported. A result is written with what it was measured on: hardware,
versions, commit and command. A number that has no such file under `benchmarks/results/` is not claimed anywhere.
"""

from __future__ import annotations

import functools
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

from grinmoe.files import atomic_write_text
from grinmoe.provenance import CHECKOUT, environment

RESULTS = CHECKOUT / "benchmarks" / "results"


# Rounds that a median and quartiles are taken of at least, when time runs out.
FEWEST_ROUNDS = 5


@dataclass
class Timing:
    """Seconds of one arm, one value per round."""

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


def interleave(
    arms: dict[str, Callable[[int], Any]],
    warmup: int = 5,
    rounds: int = 20,
    device: torch.device | None = None,
    deadline: float | None = None,
) -> dict[str, Timing]:
    """
    Time `arms` in turn, `warmup` uncounted rounds first.

    Args:
        arms: what to run, by name, given the number of the round. Each must do all of its work before it returns, or
            leave it on the current stream of `device`.
        warmup, rounds: how often each arm runs.
        device: on a GPU, time is taken by its events, and its cache emptied before each run. None: the CPU's clock.
        deadline: of `time.monotonic`; past it, one round warms up, and none is begun that `FEWEST_ROUNDS` does not ask for.

    Returns:
        A `Timing` of equally many values per arm.
    """
    timings = {name: Timing() for name in arms}
    measure = _on_gpu(device) if device is not None and device.type == "cuda" else _by_clock
    counted = 0
    for number in range(warmup + rounds):
        late = deadline is not None and time.monotonic() > deadline
        if counted == rounds or (late and counted >= FEWEST_ROUNDS):
            break
        counts = number >= warmup or (late and number > 0)
        counted += counts
        for name, run in arms.items():
            seconds = measure(functools.partial(run, number))
            if counts:
                timings[name].seconds.append(seconds)
    return timings


def _by_clock(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _on_gpu(device: torch.device) -> Callable[[Callable[[], Any]], float]:
    import torch

    cache = torch.empty(2 * torch.cuda.get_device_properties(device).L2_cache_size, dtype=torch.int8, device=device)

    def measure(run: Callable[[], Any]) -> float:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        cache.zero_()
        start.record()
        run()
        stop.record()
        stop.synchronize()
        return 1e-3 * start.elapsed_time(stop)

    return measure


def best_device() -> torch.device:
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def rates(device: torch.device) -> dict[str, float]:
    """
    What the device does at best, measured on random data: `tflops` of a matrix product, bfloat16 on a GPU and float32 on a
    CPU, and `tb_per_s` of a copy, read and written bytes counted.
    """
    import torch

    on_gpu = device.type == "cuda"
    size = 8192 if on_gpu else 1024
    left, right = (torch.randn(size, size, device=device) for _ in range(2))
    if on_gpu:
        left, right = left.bfloat16(), right.bfloat16()
    source = torch.randn(2**28 if on_gpu else 2**24, device=device)
    target = torch.empty_like(source)
    arms = {"product": lambda _: torch.mm(left, right), "copy": lambda _: target.copy_(source)}
    timings = interleave(arms, 3, 10, device)
    product, copy = (1e-3 * timings[name].median_ms for name in arms)
    return {"tflops": 2 * size**3 / product / 1e12, "tb_per_s": 2 * source.nbytes / copy / 1e12}


@contextmanager
def saved_bytes(parameters: list[torch.Tensor]) -> Iterator[Callable[[], int]]:
    """While it is open: bytes of the unique storages that autograd saves, without those of `parameters`."""
    import torch

    left_out = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    kept: dict[int, int] = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in left_out:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield lambda: sum(kept.values())


def relative_error(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Largest error in the maximum norm over pairs, relative to the expected tensor; zero tensors are left out."""
    pairs = [(e, f) for e, f in zip(expected, found, strict=True) if e.abs().max() > 0]
    return max(((f.to(e.dtype) - e).abs().max() / e.abs().max()).item() for e, f in pairs)


class Report:
    """
    A result that is written while it arises: cut off, it holds what was measured until then.

    Args:
        name: of the benchmark; results/DATE-NAME-DEVICE.json and .md are written.
        settings: what the benchmark was asked to do.
        toy: sizes that measure nothing, to try the code: said in the name and in the title.
    """

    def __init__(self, name: str, settings: dict[str, Any], toy: bool = False):
        self.name, self.toy = name, toy
        self.stamp = environment(" ".join(["python", "-m", "benchmarks", *map(shlex.quote, sys.argv[1:])]))
        device = "gpu" if self.stamp["gpu"] else "cpu"
        self.path = RESULTS / f"{self.stamp['date'][:10]}-{name}-{device}{'-toy' if toy else ''}"
        self.facts: dict[str, Any] = {"settings": settings, "complete": False}
        self.sections: list[str] = []

    def add(self, key: str, facts: Any, section: str = "") -> None:
        """Enter measured `facts`, print their Markdown `section`, and write both."""
        self.facts[key] = facts
        if section:
            self.sections.append(section.strip())
            print(f"\n{self.sections[-1]}", flush=True)
        self._write()

    def finish(self) -> Path:
        """Mark the result as complete. Returns the path of the Markdown file."""
        self.facts["complete"] = True
        self._write()
        return self.path.with_suffix(".md")

    def _write(self) -> None:
        RESULTS.mkdir(exist_ok=True)
        text = json.dumps({"environment": self.stamp, **self.facts}, indent=2)
        atomic_write_text(self.path.with_suffix(".json"), text + "\n")
        title = f"# {self.name}" + (": a trial of the code at toy size. Its times mean nothing" if self.toy else "")
        if not self.facts["complete"]:
            title += "\n\n**Cut off: what follows was measured until then.**"
        rows = "\n".join(f"| {key} | {value} |" for key, value in self.stamp.items() if value is not None)
        body = "\n\n".join([title, *self.sections, f"## Measured on\n\n| | |\n|---|---|\n{rows}"])
        atomic_write_text(self.path.with_suffix(".md"), body + "\n")


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
    atomic_write_text(path.with_suffix(".json"), json.dumps({"environment": stamp, **facts}, indent=2) + "\n")
    rows = "\n".join(f"| {key} | {value} |" for key, value in stamp.items() if value is not None)
    atomic_write_text(
        path.with_suffix(".md"), f"# {name}\n\n{report.strip()}\n\n## Measured on\n\n| | |\n|---|---|\n{rows}\n"
    )
    return path.with_suffix(".md")
