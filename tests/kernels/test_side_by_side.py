"""Groups on several threads at once: who gets what, with how many of torch's threads, and what is left as it was."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
import threading
import time

import pytest
import torch

from grinmoe.kernels import side_by_side as module
from grinmoe.kernels.side_by_side import side_by_side, workers_for

MUCH = 1e12


@pytest.fixture
def threads():
    """Sets torch's number of threads until the test is over."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    "costs, threads, expected",
    [
        ([5, 5, 5, 5], 2, 2),
        ([5, 5, 5, 5], 4, 4),
        ([5, 5, 5, 5], 16, 4),  # no more workers than items
        ([20, 1, 1, 1], 2, 1),  # one item is nearly all
        ([4, 4, 4, 4, 4, 4], 4, 4),  # 8 of 24 for the busiest of four, a third more than its share
        ([], 2, 1),
        ([7], 1, 1),
    ],
)
def test_as_many_workers_as_are_evenly_busy(costs, threads, expected, monkeypatch):
    monkeypatch.setattr(module, "MOST_IMBALANCE", 1.34)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert workers_for(costs, MUCH) == expected


def test_an_uneven_load_has_fewer_workers(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert workers_for([4, 4, 4, 4, 4, 4], MUCH) == 2


def test_little_work_has_one_worker_and_so_has_a_torch_without_openmp(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert workers_for([1, 1, 1, 1], 1.0) == 1
    monkeypatch.setattr(module, "_parallel_backend", lambda: "native thread pool")
    assert workers_for([1, 1, 1, 1], MUCH) == 1


def test_every_item_is_served_once_the_dearest_first(threads):
    threads(3)
    served: list[int] = []
    busy = set()

    def work(mine):
        for item in mine:
            served.append(item)
            busy.add(threading.current_thread().name)

    side_by_side(work, range(30), [30 - item for item in range(30)], 3)
    assert sorted(served) == list(range(30))
    assert served[0] in (0, 1, 2)
    assert all(name.startswith("grinmoe-experts") for name in busy)


def test_one_worker_is_the_callers_thread(threads):
    threads(2)
    seen = []
    side_by_side(lambda mine: seen.append((list(mine), threading.current_thread())), range(4), [1] * 4, 1)
    assert seen == [([0, 1, 2, 3], threading.current_thread())]


def test_the_number_of_torchs_threads_is_shared_out_and_left_as_it_was(threads):
    threads(5)
    found = []
    side_by_side(lambda mine: found.append((list(mine), torch.get_num_threads())), range(2), [1, 1], 2)
    assert {number for _, number in found} == {2}
    assert torch.get_num_threads() == 5
    # What torch meets first after that is not one of the workers.
    seen = []
    other = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    other.start()
    other.join()
    assert seen == [5]


def test_an_error_reaches_the_caller(threads):
    threads(2)

    def work(mine):
        for item in mine:
            if item == 3:
                raise ArithmeticError("at three")

    with pytest.raises(ArithmeticError, match="at three"):
        side_by_side(work, range(8), [1] * 8, 2)
    side_by_side(list, range(8), [1] * 8, 2)  # and the workers are still there


@pytest.mark.parametrize("error", [ArithmeticError, KeyboardInterrupt])
def test_after_an_error_nobody_goes_on(threads, error):
    """The caller's tensors are the caller's again."""
    threads(2)
    served = []

    def work(mine):
        for item in mine:
            if item == 0:
                raise error
            time.sleep(0.05)
            served.append(item)

    with pytest.raises(error):
        side_by_side(work, range(8), [8 - item for item in range(8)], 2)
    before = list(served)
    time.sleep(0.2)
    assert served == before and len(served) <= 1


def test_the_number_for_threads_to_come_is_left_as_it_was(threads):
    """It is one for the process, and not the caller's own where another thread has set it since."""
    threads(5)
    in_a_thread(lambda: torch.set_num_threads(4))
    side_by_side(list, range(3), [1] * 3, 3)
    assert torch.get_num_threads() == 5
    assert in_a_thread(torch.get_num_threads) == 4


def in_a_thread(function):
    found = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    return found[0]


LATE = """
import threading, torch
from grinmoe.kernels.side_by_side import side_by_side
torch.set_num_threads(2)
if {before}:
    side_by_side(list, range(8), [1] * 8, 2)
def late():
    threading.main_thread().join()
    for _ in range(2):
        served = []
        side_by_side(served.extend, range(8), [1] * 8, 2)
        print(sum(served))
threading.Thread(target=late).start()
"""


@pytest.mark.parametrize("before", [True, False], ids=["used before", "never used"])
def test_a_thread_that_outlives_the_main_thread(before):
    """While the interpreter ends, it starts no more work in other threads: then the caller does it."""
    found = subprocess.run(
        [sys.executable, "-c", LATE.format(before=before)], capture_output=True, text=True, timeout=120, check=True
    )
    assert found.stdout.split() == ["28", "28"], found.stderr


def test_where_no_thread_can_begin(threads, monkeypatch):
    threads(7)  # of which there are no workers yet
    begin, begun = threading.Thread.start, []

    def start(thread):
        if len(begun) == 1:
            raise RuntimeError("can't start new thread")
        begun.append(thread)
        begin(thread)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        served = []
        side_by_side(served.extend, range(8), [1] * 8, 7)
    assert sorted(served) == list(range(8))
    for thread in begun:
        thread.join(10)
        assert not thread.is_alive()


def _in_a_fork(queue):
    total = []
    side_by_side(lambda mine: total.extend(mine), range(8), [1] * 8, 2)
    queue.put(sum(total))


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system does not fork")
def test_a_forked_process_has_workers_of_its_own(threads):
    """Threads do not live on in a fork: waiting for the parent's would never end."""
    threads(2)
    side_by_side(list, range(8), [1] * 8, 2)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=_in_a_fork, args=(queue,))
    process.start()
    assert queue.get(timeout=60) == sum(range(8))
    process.join(60)
    assert process.exitcode == 0
