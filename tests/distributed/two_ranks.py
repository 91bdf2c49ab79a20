"""Two gloo processes on one machine, and the tiny model that they share."""

from __future__ import annotations

import os
import time
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

WORLD = 2

# Forks of a process that has imported, and done nothing else, are as clean as spawned ones, and need no import.
PROCESSES = mp.get_context("forkserver")
PROCESSES.set_forkserver_preload(["pytest", "grinmoe.training.run", "tests.distributed.sharded_jobs"])


def run_on_two(function, folder: Path, *arguments) -> None:
    """Run `function(rank, *arguments)` on two processes; a failure there is a failure here, with its traceback."""
    store = folder / "store"
    failures = PROCESSES.SimpleQueue()
    try:
        arguments = (function, str(store), failures, arguments)
        mp.start_processes(_worker, arguments, nprocs=WORLD, start_method="forkserver")
    finally:
        # The other rank may have been torn down in the middle of a collective: the first failure is the one to read.
        if not failures.empty():
            pytest.fail(failures.get())


def _worker(rank: int, function, store: str, failures, arguments) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    try:
        function(rank, *arguments)
    except BaseException:
        failures.put(f"rank {rank}:\n{traceback.format_exc()}")
        os._exit(1)
    # gloo aborts a rank at times while it tears its threads down, or while the other one does. So both wait for each
    # other without it, and leave without the teardown.
    Path(f"{store}-{rank}").touch()
    deadline = time.monotonic() + 600
    while not all(Path(f"{store}-{other}").exists() for other in range(WORLD)):
        if time.monotonic() > deadline:
            failures.put(f"rank {rank}: the other rank did not finish")
            os._exit(1)
        time.sleep(0.01)
    os._exit(0)
