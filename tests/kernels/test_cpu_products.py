"""Which product is taken on a CPU, and that the answer is kept."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from huggingface_hub import cached_assets_path
from torch.utils.flop_counter import FlopCounterMode

from grinmoe.kernels import cpu_products
from grinmoe.kernels.cpu_products import (
    BY_TORCH,
    KINDS,
    PRODUCTS,
    Products,
    by_onednn,
    by_torch,
    class_of,
    products_for,
    time_products,
)

BIG = torch.empty(400, 300)  # 8 rows are LEAST_FLOPS


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """The folder of the answers, which is empty; this process has forgotten its own."""
    monkeypatch.setattr(cpu_products, "_folder", lambda threads: tmp_path)
    cpu_products._products_for.cache_clear()
    yield tmp_path
    cpu_products._products_for.cache_clear()


def pretend(monkeypatch, torch_s: float, onednn_s: float) -> list[str]:
    """Products that take so long, by a clock of the test's. Returns which of them were called."""
    clock, calls = [0.0], []

    def product(name, seconds):
        def multiply(left, right, result):
            calls.append(name)
            clock[0] += seconds

        return multiply

    monkeypatch.setattr(cpu_products.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(
        cpu_products, "PRODUCTS", {"torch": product("torch", torch_s), "onednn": product("onednn", onednn_s)}
    )
    return calls


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("kind", KINDS)
def test_both_products_multiply(name, kind):
    left, right, result = cpu_products.operands(kind, 7, 12, 5)
    PRODUCTS[name](left, right, result)
    torch.testing.assert_close(result, left @ right)


@pytest.mark.parametrize("name", PRODUCTS)
def test_rows_that_fill_up_are_left_out(name):
    left, right, result = torch.randn(16, 12), torch.randn(12, 5), torch.full((9, 5), torch.nan)
    PRODUCTS[name](left, right, result)
    torch.testing.assert_close(result, left[:9] @ right)


def test_the_private_onednn_operator_is_still_there():
    """If this fails, torch has moved it: the experts then multiply by MKL, at half the speed on some AMD processors."""
    assert cpu_products.has_onednn()


@pytest.mark.parametrize("onednn_s, taken", [(0.5, "onednn"), (0.95, "torch"), (1.0, "torch"), (2.0, "torch")])
def test_the_faster_one_is_taken_and_torchs_own_near_a_tie(monkeypatch, onednn_s, taken):
    pretend(monkeypatch, 1.0, onednn_s)
    found = time_products("forward", 8, 4, 4, 1)
    assert found == {"torch_us": 1e6, "onednn_us": round(1e6 * onednn_s, 1), "taken": taken}


def test_the_answer_is_kept_for_later_processes(monkeypatch, kept):
    """Two products round differently: a run that is resumed should go on with the same."""
    calls = pretend(monkeypatch, 1.0, 0.5)
    first = products_for(8, BIG, torch.float32, 1)
    assert calls and all(product is cpu_products.PRODUCTS["onednn"] for product in first)
    assert {file.name for file in kept.iterdir()} == {f"{kind}-8x400x300.json" for kind in KINDS}
    cpu_products._products_for.cache_clear()  # another process, to which the machine looks different
    calls.clear()
    slower = pretend(monkeypatch, 1.0, 3.0)
    assert all(product is cpu_products.PRODUCTS["onednn"] for product in products_for(8, BIG, torch.float32, 1))
    assert not calls and not slower


@pytest.mark.parametrize("text", ["", "{", "[]", '{"taken": "blis"}', '{"taken": ["torch"]}', "null"])
def test_a_file_that_says_nothing_is_written_anew(monkeypatch, kept, text):
    pretend(monkeypatch, 1.0, 0.5)
    file = kept / "forward-8x400x300.json"
    file.write_text(text)
    products_for(8, BIG, torch.float32, 1)
    assert json.loads(file.read_text())["taken"] == "onednn"
    assert not [path for path in kept.iterdir() if path.name.startswith(".")]


def test_where_nothing_can_be_written_the_process_times_for_itself(monkeypatch, tmp_path):
    def refuse(threads):
        raise PermissionError("read-only file system")

    pretend(monkeypatch, 1.0, 0.5)
    monkeypatch.setattr(cpu_products, "_folder", refuse)
    cpu_products._products_for.cache_clear()
    assert products_for(8, BIG, torch.float32, 1).forward is cpu_products.PRODUCTS["onednn"]
    cpu_products._products_for.cache_clear()


def test_on_a_full_disk_nothing_is_left_behind(monkeypatch, kept):
    """Thousands of empty files are no help there."""
    resource = pytest.importorskip("resource")
    pretend(monkeypatch, 1.0, 0.5)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        found = products_for(8, BIG, torch.float32, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert found.forward is cpu_products.PRODUCTS["onednn"]
    assert not list(kept.iterdir())


def test_a_file_system_without_hard_links(monkeypatch, kept):
    """Some network and user-space file systems have none: there the answer is kept as well."""

    def refuse(*_, **__):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(cpu_products.os, "link", refuse)
    cpu_products._write_once(kept / "forward.json", '{"taken": "onednn"}')
    assert cpu_products._read(kept / "forward.json") == "onednn"
    assert [path.name for path in kept.iterdir()] == ["forward.json"]


def test_the_answer_may_be_read_by_all_who_may_read_the_folder(kept):
    """A cache is shared by the users of a cluster."""
    (kept / "as it comes").touch()
    cpu_products._write_once(kept / "forward.json", '{"taken": "onednn"}')
    assert (kept / "forward.json").stat().st_mode == (kept / "as it comes").stat().st_mode


def test_a_folder_in_place_of_the_file(monkeypatch, kept):
    pretend(monkeypatch, 1.0, 0.5)
    (kept / "forward-8x400x300.json").mkdir()
    assert products_for(8, BIG, torch.float32, 1).forward is cpu_products.PRODUCTS["onednn"]


@pytest.mark.parametrize("place", ["~no-such-user/cache", "a file"])
def test_no_folder_can_be_made(monkeypatch, tmp_path, place):
    """The user has no home, or it is a file: huggingface_hub has errors of its own for these."""
    pretend(monkeypatch, 1.0, 0.5)
    (tmp_path / "a file").touch()
    where = place if place.startswith("~") else tmp_path / place
    monkeypatch.setattr(cpu_products, "cached_assets_path", partial(cached_assets_path, assets_dir=where))
    cpu_products._products_for.cache_clear()
    assert products_for(8, BIG, torch.float32, 1).forward is cpu_products.PRODUCTS["onednn"]
    cpu_products._products_for.cache_clear()


def test_the_first_to_write_is_right_for_all(monkeypatch, kept):
    """Processes that begin together, on a machine near a tie."""
    file, everyone = kept / "forward.json", threading.Barrier(8)

    def write(number):
        everyone.wait()
        cpu_products._write_once(file, json.dumps({"taken": "torch", "by": number}))
        seen.append(json.loads(file.read_text())["by"])

    seen: list[int] = []
    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 8 and len(set(seen)) == 1
    assert [path.name for path in kept.iterdir()] == ["forward.json"]


def test_small_products_and_other_dtypes_are_torchs_own(monkeypatch, kept):
    calls = pretend(monkeypatch, 1.0, 0.1)
    assert products_for(1, BIG, torch.float32, 1) is BY_TORCH
    assert products_for(8, BIG, torch.bfloat16, 1) is BY_TORCH
    assert not calls and not list(kept.iterdir())


def test_nothing_is_timed_where_results_must_repeat(monkeypatch, kept):
    calls = pretend(monkeypatch, 1.0, 0.1)
    torch.use_deterministic_algorithms(True)
    try:
        assert products_for(8, BIG, torch.float32, 1) is BY_TORCH
    finally:
        torch.use_deterministic_algorithms(False)
    assert not calls


def test_timing_draws_nothing_from_torchs_generator(kept):
    before = torch.get_rng_state()
    with torch.device("meta"):  # nor does it follow the caller's default device
        products_for(8, BIG, torch.float32, 1)
    assert torch.equal(before, torch.get_rng_state())


def test_timing_follows_no_mode_of_the_caller(kept):
    """It is float32 that is timed, and nobody else counts, batches or casts these products."""
    torch.set_default_dtype(torch.float64)
    try:
        with FlopCounterMode(display=False) as counter, torch.autocast("cpu", torch.bfloat16):
            products_for(8, BIG, torch.float32, 1)
    finally:
        torch.set_default_dtype(torch.float32)
    assert counter.get_total_flops() == 0
    assert len(list(kept.iterdir())) == len(KINDS)


def test_timing_leaves_the_number_of_threads_as_it_was():
    """The caller's own, and the one for threads to come, which another thread has set."""
    before = torch.get_num_threads()
    torch.set_num_threads(5)
    try:
        with ThreadPoolExecutor(1) as other:
            other.submit(torch.set_num_threads, 4).result()
        time_products("forward", 8, 40, 30, 2)
        with ThreadPoolExecutor(1) as other:
            assert (torch.get_num_threads(), other.submit(torch.get_num_threads).result()) == (5, 4)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("rows, expected", [(0, 1), (1, 1), (2, 2), (3, 4), (128, 128), (129, 256), (5000, 256)])
def test_classes_of_rows(rows, expected):
    assert class_of(rows) == expected


def test_lengths_are_rounded_up_for_onednn_alone():
    of_onednn = Products(by_torch, by_onednn, by_torch)
    assert [BY_TORCH.length(size) for size in (1, 9, 130)] == [1, 9, 130]
    lengths = [of_onednn.length(size) for size in range(1, 2049)]
    assert all(0 <= length - size < max(8, size / 8) for size, length in enumerate(lengths, 1))
    assert len(set(lengths)) < 110
