"""How every benchmark here measures and reports.

Arms run in one process, interleaved round by round, so that a machine that slows down slows all of them; the ratio of two
arms is taken round by round, and its median reported. A result is written with what it was measured on: hardware,
versions, commit and command. A number that has no such file under `benchmarks/results/` is not claimed anywhere.

On a GPU the seconds of an arm are the device's. Before each run the device gets enough other work to be busy until the host
has queued the run; otherwise the time of short kernels would be the time that Python takes to launch them. The host's time
is reported beside it.
"""

from __future__ import annotations

import functools
import json
import math
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
# The device is kept busy for this many times the host's time before each run, and for no longer than this many seconds: an
# arm that waits for the device itself cannot be hidden behind other work.
BUSY_OVER_HOST, MOST_BUSY_SECONDS = 2.0, 0.03
# Bytes of the buffer whose filling keeps a GPU busy: 0.25 ms each at 4 TB/s.
BUSY_BYTES = 2**30


@dataclass
class Timing:
    """
    Times of one arm.

    Attributes:
        seconds: one value per counted round; on a GPU the device's.
        host_seconds: on a GPU, until the call returned while the device was idle: one value per uncounted round. The first
            contains what is compiled.
        queued: on a GPU, for each counted round, whether the host had queued the whole run before the device began it. If
            not, `seconds` contains time of the host.
    """

    seconds: list[float] = field(default_factory=list)
    host_seconds: list[float] = field(default_factory=list)
    queued: list[bool] = field(default_factory=list)

    @property
    def median_ms(self) -> float:
        return 1e3 * statistics.median(self.seconds)

    @property
    def quartiles_ms(self) -> tuple[float, float]:
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return 1e3 * low, 1e3 * high

    @property
    def host_ms(self) -> float | None:
        """The least of the host's times; None on a CPU."""
        return 1e3 * min(self.host_seconds) if self.host_seconds else None

    def ratio_to(self, other: Timing) -> float:
        """How many times longer `other` takes: median over rounds."""
        return statistics.median(b / a for a, b in zip(self.seconds, other.seconds, strict=True))

    def facts(self) -> dict[str, Any]:
        """For a report: `seconds`, and on a GPU `host_seconds` (the least) and `queued` (the share of rounds)."""
        facts: dict[str, Any] = {"seconds": self.seconds}
        if self.host_seconds:
            facts["host_seconds"] = min(self.host_seconds)
        if self.queued:
            facts["queued"] = sum(self.queued) / len(self.queued)
        return facts


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
    clock = DeviceClock.of(device) if device is not None and device.type == "cuda" else None
    counted = 0
    for number in range(warmup + rounds):
        late = deadline is not None and time.monotonic() > deadline
        if counted == rounds or (late and counted >= FEWEST_ROUNDS):
            break
        counts = number >= warmup or (late and number > 0)
        counted += counts
        for name, run in arms.items():
            timing, once = timings[name], functools.partial(run, number)
            if clock is None:
                seconds = _by_clock(once)
            elif counts:
                # Without an uncounted round, the first one's time stands for the host's.
                seconds, queued = clock.measure(once, min(timing.host_seconds, default=MOST_BUSY_SECONDS))
                timing.queued.append(queued)
            else:
                timing.host_seconds.append(clock.host_seconds(once))
            if counts:
                timing.seconds.append(seconds)
    return timings


def _by_clock(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


class DeviceClock:
    """
    Times runs by a GPU's events, behind other work that keeps it busy until the host has queued the run.

    Args:
        fill: queues work of a fixed length, which also empties the device's cache.
        event: makes an event with the methods of `torch.cuda.Event`.
        synchronize: waits for the device.
    """

    def __init__(self, fill: Callable[[], Any], event: Callable[[], Any], synchronize: Callable[[], Any]):
        self.fill, self.event, self.synchronize = fill, event, synchronize
        self.fill_seconds = statistics.median(self._time_fill() for _ in range(5))

    @classmethod
    def of(cls, device: torch.device) -> DeviceClock:
        import torch

        cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        buffer = torch.empty(max(2 * cache_bytes, BUSY_BYTES), dtype=torch.int8, device=device)
        return cls(buffer.zero_, lambda: torch.cuda.Event(enable_timing=True), lambda: torch.cuda.synchronize(device))

    def _time_fill(self) -> float:
        start, stop = self.event(), self.event()
        self.fill()  # so that the host is ahead
        start.record()
        self.fill()
        stop.record()
        stop.synchronize()
        return 1e-3 * start.elapsed_time(stop)

    def host_seconds(self, run: Callable[[], Any]) -> float:
        """Seconds until `run` returns on an idle device."""
        self.synchronize()
        start = time.perf_counter()
        run()
        seconds = time.perf_counter() - start
        self.synchronize()
        return seconds

    def measure(self, run: Callable[[], Any], host_seconds: float) -> tuple[float, bool]:
        """The device's seconds of `run`, and whether all of it was queued before the device came to it."""
        start, stop = self.event(), self.event()
        busy = min(BUSY_OVER_HOST * host_seconds, MOST_BUSY_SECONDS)
        for _ in range(max(1, math.ceil(busy / self.fill_seconds))):
            self.fill()
        start.record()
        run()
        queued = not start.query()
        stop.record()
        stop.synchronize()
        return 1e-3 * start.elapsed_time(stop), queued


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
        self.growing: dict[str, str] = {}

    def add(self, key: str, facts: Any, section: str = "") -> None:
        """Enter measured `facts`, print their Markdown `section`, and write both."""
        self.facts[key] = facts
        if section:
            self.sections.append(section.strip())
            print(f"\n{self.sections[-1]}", flush=True)
        self._write()

    def update(self, key: str, facts: Any, sections: dict[str, str]) -> None:
        """As `add`, for `sections` that grow: each takes the place of the former one of its name, and is printed last."""
        self.facts[key] = facts
        self.growing |= {name: section.strip() for name, section in sections.items()}
        self._write()

    def finish(self) -> Path:
        """Mark the result as complete. Returns the path of the Markdown file."""
        self.facts["complete"] = True
        self._write()
        for section in self.growing.values():
            print(f"\n{section}", flush=True)
        return self.path.with_suffix(".md")

    def _write(self) -> None:
        RESULTS.mkdir(exist_ok=True)
        text = json.dumps({"environment": self.stamp, **self.facts}, indent=2)
        atomic_write_text(self.path.with_suffix(".json"), text + "\n")
        title = f"# {self.name}" + (": a trial of the code at toy size. Its times mean nothing" if self.toy else "")
        if not self.facts["complete"]:
            title += "\n\n**Cut off: what follows was measured until then.**"
        rows = "\n".join(f"| {key} | {value} |" for key, value in self.stamp.items() if value is not None)
        body = "\n\n".join(
            [title, *self.sections, *self.growing.values(), f"## Measured on\n\n| | |\n|---|---|\n{rows}"]
        )
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
