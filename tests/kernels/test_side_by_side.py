"""Groups on several threads at once: who gets what, with how many of torch's threads, and what is left as it was."""

from __future__ import annotations

import multiprocessing
import threading

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
