"""Rates of the matrix products that there are on a CPU, at an expert's shapes: the floor of the block's benchmark.

Each product of `grinmoe.kernels.cpu_products` in each of its kinds, for so many rows as an expert gets and for all tokens
at once, by all threads together, and by one thread times their number. The best of them is the floor: nothing that
multiplies by these libraries can be faster.
"""

from __future__ import annotations

import time
from typing import NamedTuple

import torch

from grinmoe.kernels.cpu_products import KINDS, PRODUCTS, operands, products_for, with_threads
from grinmoe.provenance import markdown_table

WARM_UPS, ROUNDS = 2, 6
ALL, ONE = "all threads", "one, times their number"


class Rate(NamedTuple):
    """`tflops`: the best round's."""

    kind: str
    rows: int
    product: str
    threads: str
    tflops: float


@torch.no_grad()
def product_rates(hidden: int, width: int, rows: tuple[int, ...]) -> list[Rate]:
    """
    Measure all of them, for the first weight of an expert, (2 * width, hidden).

    Args:
        rows: how many are multiplied at once.
    """
    threads = torch.get_num_threads()
    found = []
    for number in rows:
        for kind in KINDS:
            left, right, result = operands(kind, number, 2 * width, hidden)
            flops = 2.0 * number * 2 * width * hidden
            for name, multiply in PRODUCTS.items():
                for how, count in ((ALL, threads), (ONE, 1)):
                    with with_threads(count):
                        seconds = best_seconds(multiply, left, right, result)
                    found.append(Rate(kind, number, name, how, flops * (threads / count) / seconds / 1e12))
    return found


def best_seconds(multiply, left: torch.Tensor, right: torch.Tensor, result: torch.Tensor) -> float:
    seconds = []
    for _ in range(WARM_UPS + ROUNDS):
        started = time.perf_counter()
        multiply(left, right, result)
        seconds.append(time.perf_counter() - started)
    return min(seconds[WARM_UPS:])


def best_of(*measured: list[Rate]) -> float:
    return max(rate.tflops for rates in measured for rate in rates)


def rates_table(rates: list[Rate], hidden: int, width: int) -> str:
    """A Markdown table in GFLOP/s: a line for each kind and number of rows; what the default takes is in bold."""
    columns = [(name, how) for how in (ALL, ONE) for name in PRODUCTS]
    weight, threads = torch.empty(2 * width, hidden), {ALL: torch.get_num_threads(), ONE: 1}
    lines = []
    for kind, rows in dict.fromkeys((rate.kind, rate.rows) for rate in rates):
        line = [kind, str(rows)]
        for name, how in columns:
            rate = next(r for r in rates if r[:4] == (kind, rows, name, how))
            taken = getattr(products_for(rows, weight, weight.dtype, threads[how]), kind) is PRODUCTS[name]
            line.append(f"**{1e3 * rate.tflops:.0f}**" if taken else f"{1e3 * rate.tflops:.0f}")
        lines.append(line)
    header = ["product", "rows", *(f"{name}, {how}" for name, how in columns)]
    return markdown_table(header, lines)


__all__ = ["Rate", "best_of", "product_rates", "rates_table"]
