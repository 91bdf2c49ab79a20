"""Memory and time of loading and saving a checkpoint in the official layout (goals G9, G10 and the limits of issue 2).

    python -m benchmarks load

A checkpoint of random bfloat16 weights is made, 1.4 GB with 8 layers. Each measurement is a process of its own, arms in
turn: this project, and Transformers' phimoe on the same shards. While the process loads, a thread reads /proc/self/status:

* own memory (RssAnon): what the process must have;
* mapped file (RssFile): pages of the shards, which safetensors maps instead of reading. They are clean copies of the
  files, so the system takes them back whenever memory is short, and they are not part of the limit of 1.05.

That the second kind is not needed is tried: the load is run once more in a control group that may hold, beyond the
interpreter, 1.05 times the checkpoint in memory of both kinds (where the system lets this user make one).

Linux only.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.protocol import write_result
from grinmoe.provenance import CHECKOUT, markdown_table

ARMS = ("grinmoe", "transformers phimoe")
MAX_SHARD_SIZE = "400MB"
ALLOWED_LOAD = 1.05


@dataclass(frozen=True)
class LoadSettings:
    layers: int = 8
    rounds: int = 3
    folder: str | None = None


def run(options: LoadSettings) -> Path:
    """Make the checkpoint, measure all arms, and return the path of the written report."""
    with tempfile.TemporaryDirectory(prefix="grinmoe-bench-", dir=options.folder) as name:
        folder = Path(name)
        size = make_checkpoint(folder, options.layers)
        print(f"checkpoint of {size / 1e9:.2f} GB", flush=True)
        measured: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
        for _ in range(options.rounds):
            for arm in ARMS:
                measured[arm].append(measure(folder, arm))
                print(f"{arm}: {measured[arm][-1]}", flush=True)
        limited = measure_limited(folder, size, measured["grinmoe"][-1]["interpreter_bytes"])
        print(f"limited: {limited}", flush=True)
    facts = {"settings": asdict(options), "checkpoint_bytes": size, "arms": measured, "limited": limited}
    return write_result("load", facts, report(size, measured, limited))


def make_checkpoint(folder: Path, layers: int) -> int:
    """Write `grinmoe/`, and `phimoe/` with links to the same shards. Returns the bytes of all tensors."""
    _child("make", folder / "grinmoe", str(layers))
    (folder / "phimoe").mkdir()
    for file in (folder / "grinmoe").glob("model*"):
        (folder / "phimoe" / file.name).symlink_to(file)
    config = json.loads((folder / "grinmoe" / "config.json").read_text())
    del config["auto_map"]
    config |= {"model_type": "phimoe", "architectures": ["PhimoeForCausalLM"]}
    (folder / "phimoe" / "config.json").write_text(json.dumps(config))
    index = json.loads((folder / "grinmoe" / "model.safetensors.index.json").read_text())
    return index["metadata"]["total_size"]


def measure(folder: Path, arm: str) -> dict[str, Any]:
    source = folder / ("phimoe" if arm == ARMS[1] else "grinmoe")
    saved = folder / "saved"
    try:
        return _child("measure", arm, source, saved)
    finally:
        shutil.rmtree(saved, ignore_errors=True)


def measure_limited(folder: Path, size: int, interpreter_bytes: int) -> dict[str, Any]:
    """Load in a control group that holds the interpreter and ALLOWED_LOAD times the checkpoint, files included."""
    limit = interpreter_bytes + int(ALLOWED_LOAD * size)
    for shard in (folder / "grinmoe").glob("*.safetensors"):
        _drop_from_page_cache(shard)  # pages that another group has read do not count against this one
    try:
        with _control_group(limit) as prefix:
            return {"limit_bytes": limit, **_child("load", ARMS[0], folder / "grinmoe", prefix=prefix)}
    except (OSError, subprocess.CalledProcessError) as error:
        return {"limit_bytes": limit, "failed": str(error)}


def report(size: int, measured: dict[str, list[dict[str, Any]]], limited: dict[str, Any]) -> str:
    rows = []
    for arm, runs in measured.items():
        median = {key: statistics.median(one[key] for one in runs) for key in runs[0] if key != "largest_shard_bytes"}
        shard = runs[0]["largest_shard_bytes"]
        rows.append(
            [
                arm,
                f"{median['load_s']:.2f} s",
                f"{median['load_own_bytes'] / size:.3f}",
                f"{median['load_file_bytes'] / size:.3f}",
                f"{median['save_s']:.2f} s",
                f"{median['save_own_bytes'] / shard:.3f}",
            ]
        )
    header = [
        "arm",
        "load",
        "own memory / checkpoint",
        "mapped file / checkpoint",
        "save",
        "own memory / largest shard",
    ]
    rounds = len(next(iter(measured.values())))
    ours, theirs = (statistics.median(one["load_s"] for one in measured[arm]) for arm in ARMS)
    lines = [
        f"A checkpoint of {size / 1e9:.2f} GB in bfloat16, official layout, shards of {MAX_SHARD_SIZE}. Medians of {rounds} "
        "processes per arm, arms in turn. Memory is the peak above what the interpreter held before loading, or above the "
        "loaded model while saving. Mapped file pages are clean copies of the shards that the system takes back at need.",
        markdown_table(header, rows),
        f"Time to load, over Transformers' phimoe: {ours / theirs:.2f}.",
    ]
    if "failed" in limited:
        lines.append(
            f"With memory limited to {ALLOWED_LOAD} of the checkpoint: not tried or failed: {limited['failed']}"
        )
    else:
        lines.append(
            f"In a control group that may hold the interpreter and {ALLOWED_LOAD} times the checkpoint, files included: "
            f"loaded in {limited['load_s']:.2f} s, from a cold page cache."
        )
    return "\n\n".join(lines)


# --- control groups ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _control_group(limit_bytes: int) -> Iterator[list[str]]:
    """Beginning of a command line that runs the rest in a control group with this much memory. OSError: not possible."""
    version_1 = Path("/sys/fs/cgroup/memory")
    group = (version_1 if version_1.is_dir() else Path("/sys/fs/cgroup")) / f"grinmoe-bench-{os.getpid()}"
    group.mkdir()
    try:
        (group / ("memory.limit_in_bytes" if version_1.is_dir() else "memory.max")).write_text(str(limit_bytes))
        yield ["sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh"]
    finally:
        group.rmdir()


def _drop_from_page_cache(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


# --- in a process of its own -------------------------------------------------------------------------------------------


def _child(task: str, *arguments: object, prefix: list[str] | None = None) -> dict[str, Any]:
    command = [*(prefix or []), sys.executable, "-m", "benchmarks.bench_load", task, *map(str, arguments)]
    done = subprocess.run(command, cwd=CHECKOUT, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def _memory() -> dict[str, int]:
    """Bytes of own (anonymous) memory and of mapped file pages of this process."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {key: 1024 * int(fields[field].split()[0]) for key, field in (("own", "RssAnon"), ("file", "RssFile"))}


class _PeakMemory:
    """Peaks above the start of the block, looked at every two milliseconds."""

    def __enter__(self) -> _PeakMemory:
        self.start = _memory()
        self.above = dict.fromkeys(self.start, 0)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        self._began = time.perf_counter()
        return self

    def __exit__(self, *_) -> None:
        self.seconds = time.perf_counter() - self._began
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.002):
            for kind, now in _memory().items():
                self.above[kind] = max(self.above[kind], now - self.start[kind])


def _make(folder: Path, layers: int) -> dict[str, Any]:
    import torch

    from grinmoe import GrinMoeConfig, GrinMoeForCausalLM

    torch.manual_seed(0)
    # A quarter of the released width: an expert layer of 158 MB beside a vocabulary of the released size.
    config = GrinMoeConfig(
        hidden_size=1024, intermediate_size=1600, num_hidden_layers=layers, num_attention_heads=8, num_key_value_heads=2
    )
    GrinMoeForCausalLM(config).to(torch.bfloat16).save_pretrained(folder, max_shard_size=MAX_SHARD_SIZE)
    return {}


def _load(arm: str, source: Path):
    from transformers import PhimoeForCausalLM
    from transformers.utils import logging

    from grinmoe import GrinMoeForCausalLM

    logging.disable_progress_bar()
    model_class = PhimoeForCausalLM if arm == ARMS[1] else GrinMoeForCausalLM
    with _PeakMemory() as peak:
        model = model_class.from_pretrained(source)
    return model, peak


def _measure(arm: str, source: Path, saved: Path) -> dict[str, Any]:
    model, loading = _load(arm, source)
    with _PeakMemory() as saving:
        model.save_pretrained(saved, max_shard_size=MAX_SHARD_SIZE)
    _assert_equal(source, saved)
    return {
        "interpreter_bytes": loading.start["own"] + loading.start["file"],
        "load_s": loading.seconds,
        "load_own_bytes": loading.above["own"],
        "load_file_bytes": loading.above["file"],
        "save_s": saving.seconds,
        "save_own_bytes": saving.above["own"],
        "largest_shard_bytes": max(shard.stat().st_size for shard in saved.glob("*.safetensors")),
    }


def _assert_equal(source: Path, saved: Path) -> None:
    """What was loaded and saved must be what was there, key for key and bit for bit."""
    import torch
    from safetensors.torch import load_file

    expected, found = (
        {key: tensor for file in sorted(folder.glob("*.safetensors")) for key, tensor in load_file(file).items()}
        for folder in (source, saved)
    )
    if expected.keys() != found.keys() or not all(torch.equal(expected[key], found[key]) for key in expected):
        raise RuntimeError(f"{saved} is not the checkpoint that was loaded")


def _main() -> None:
    parser = argparse.ArgumentParser(description="one measurement, as a process of its own")
    parser.add_argument("task", choices=["make", "load", "measure"])
    parser.add_argument("arguments", nargs="+")
    task, arguments = vars(parser.parse_args()).values()
    if task == "make":
        facts = _make(Path(arguments[0]), int(arguments[1]))
    elif task == "load":
        facts = {"load_s": _load(arguments[0], Path(arguments[1]))[1].seconds}
    else:
        facts = _measure(arguments[0], Path(arguments[1]), Path(arguments[2]))
    print(json.dumps(facts))


if __name__ == "__main__":
    _main()
