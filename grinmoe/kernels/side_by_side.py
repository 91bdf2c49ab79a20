"""The experts' groups on several threads of a CPU at once, each group from end to end on its own.

A product of 100 rows is too small to be shared out well: threads wait for each other after every operation, and what one of
them wrote the next reads from another core's cache. Whole experts side by side need neither.
"""

from __future__ import annotations

import contextlib
import functools
import heapq
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

# Below it a forward pass is over before other threads have begun (measured on 2 cores: docs/performance.md).
LEAST_FLOPS = 2e8
# How much longer than a fair share the busiest worker may be at it.
MOST_IMBALANCE = 1.25


def workers_for(costs: list[int], flops: float) -> int:
    """
    How many workers to share out items among; torch's threads are shared out among the workers.

    Args:
        costs: of the items, in any unit.
        flops: of all together.

    Returns:
        1 if there is too little to do, or if the items cannot be shared out evenly.
    """
    if flops < LEAST_FLOPS or "OpenMP" not in _parallel_backend():
        return 1  # without OpenMP the number of threads is one for the whole process
    workers, total = min(torch.get_num_threads(), len(costs)), sum(costs)
    while workers > 1 and _longest(costs, workers) * workers > MOST_IMBALANCE * total:
        workers //= 2
    return max(1, workers)


def side_by_side(
    work: Callable[[Iterator[Item]], object], items: Iterable[Item], costs: list[int], workers: int
) -> None:
    """
    Call `work` with an iterator over its share of `items`: once here, or in `workers` threads at once.

    Which thread has which item follows from who is free, so results may not depend on it. There is no gradient in `work`.

    Args:
        work: does everything for every item it is given.
        items: with a cost each.
        costs: of `items`, in any unit.
        workers: from `workers_for`.
    """
    if workers == 1:
        work(iter(items))
        return
    # The dearest first, so that what is left at the end is small.
    waiting = [item for _, item in sorted(zip(costs, items, strict=True), key=lambda pair: pair[0])]
    inference = torch.is_inference_mode_enabled()

    def share() -> Iterator[Item]:
        while True:
            try:
                yield waiting.pop()
            except IndexError:
                return

    def run() -> None:
        # A thread has modes of its own.
        with torch.inference_mode(inference), torch.no_grad():
            work(share())

    begun: list[Future[None]] = []
    try:
        with contextlib.suppress(RuntimeError):  # no thread can begin any more, as while the interpreter ends
            executor = _executor(os.getpid(), workers, torch.get_num_threads())
            for _ in range(workers):
                begun.append(executor.submit(run))
        if not begun:
            run()
        for future in begun:
            future.result()
    finally:
        # After an error or an interrupt nobody goes on with what is the caller's again.
        waiting.clear()
        wait(begun)


def in_a_new_thread(function: Callable[[], Result]) -> Result:
    """What `function` returns, where none of the caller's modes hold and torch's number of threads is the default."""
    with ThreadPoolExecutor(1) as one:
        try:
            future = one.submit(function)
        except RuntimeError:  # no thread can begin any more, as while the interpreter ends
            return function()
        return future.result()


def _longest(costs: list[int], workers: int) -> int:
    """The busiest worker's cost, when whoever is free takes the dearest item that is left."""
    busy = [0] * workers
    for cost in sorted(costs, reverse=True):
        heapq.heapreplace(busy, busy[0] + cost)
    return max(busy)


@functools.cache
def _parallel_backend() -> str:
    return torch.__config__.parallel_info().partition("ATen parallel backend:")[2].strip().splitlines()[0]


@functools.cache
def _executor(process: int, workers: int, threads: int) -> ThreadPoolExecutor:
    """
    Threads that have `threads // workers` of torch's threads each.

    Args:
        process: its number; a forked process has none of its parent's threads.
    """

    def begin() -> None:
        # torch sets a thread's number to its default when it first meets the thread: let that be over.
        torch.get_num_threads()
        torch.set_num_threads(threads // workers)

    def with_all_begun() -> ThreadPoolExecutor:
        # Threads that torch meets for the first time get the number that was set last: all workers start and set theirs
        # before that is what it was.
        default = torch.get_num_threads()
        executor, everyone = ThreadPoolExecutor(workers, "grinmoe-experts", begin), threading.Barrier(workers)
        try:
            list(executor.map(lambda _: everyone.wait(), range(workers)))
        except BaseException:
            everyone.abort()  # those that have begun would wait for ever
            raise
        finally:
            torch.set_num_threads(default)
        return executor

    return in_a_new_thread(with_all_begun)
