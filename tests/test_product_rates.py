"""The floor of the block's benchmark on a CPU: measured rates, and the error if an arm is faster."""

from __future__ import annotations

import pytest
import torch

from benchmarks.bench_block import BlockSettings, Floor, faster_than_the_floor
from benchmarks.product_rates import ALL, ONE, best_of, product_rates, rates_table
from grinmoe.kernels.cpu_products import KINDS, PRODUCTS


def test_every_product_is_measured_in_every_kind_and_both_ways():
    threads = torch.get_num_threads()
    rates = product_rates(64, 48, (8, 16))
    expected = {(k, rows, name, how) for k in KINDS for rows in (8, 16) for name in PRODUCTS for how in (ALL, ONE)}
    assert {rate[:4] for rate in rates} == expected and len(rates) == len(expected)
    assert all(rate.tflops > 0 for rate in rates)
    assert best_of(rates, rates) == max(rate.tflops for rate in rates)
    assert torch.get_num_threads() == threads


def test_the_table_says_which_product_is_taken():
    lines = rates_table(product_rates(64, 48, (8,)), 64, 48).splitlines()
    assert len(lines) == 2 + len(KINDS)
    assert all(line.count("**") == 4 for line in lines[2:])  # one of each number of threads


def case(step_ms: float, forward_ms: float) -> dict:
    arms = {"dense": {"seconds": [1e-3 * step_ms] * 3, "forward_seconds": [1e-3 * forward_ms] * 3}}
    floors = {"even load": {"floor_seconds": {"step": 30e-3, "forward": 10e-3}}}
    return {"arms": {"even load": arms}, "cases": floors}


def test_an_arm_that_beats_the_floor_is_named():
    assert faster_than_the_floor(case(30.1, 10.1)) == {}
    assert "forward in 9.90 ms where the floor is 10.00 ms" in faster_than_the_floor(case(31.0, 9.9))["dense"]
    assert "step in 29.00 ms" in faster_than_the_floor(case(29.0, 11.0))["dense"]


@pytest.mark.parametrize("device, toy, measures", [("cpu", False, True), ("cpu", True, False), ("cuda", False, False)])
def test_a_cpu_has_the_best_product_as_its_floor(device, toy, measures):
    options = BlockSettings(tokens=(32,), hidden_size=64, intermediate_size=48, experts=4)
    floor = Floor(options, 1e-9, torch.device(device))
    floor.on_cpu = floor.on_cpu and not toy
    floor.measure()
    assert floor.rows == (16, 32)
    assert (floor.tflops > 1e-9) == measures
    slow = Floor(options, 1e9, torch.device(device))
    slow.measure()
    assert slow.tflops == 1e9  # never lower than a rate that was measured elsewhere
