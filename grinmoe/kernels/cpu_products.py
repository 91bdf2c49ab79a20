"""The experts' matrix products on a CPU: torch's own, or oneDNN's where that is faster.

In float32 `torch.mm` calls the BLAS that torch is built with, on x86 MKL. MKL is ahead of oneDNN on an Intel Xeon, and on
AMD processors it was level with oneDNN or took twice its time (docs/performance.md names the reports). So both are timed,
once for each kind of product and class of sizes. The two round differently, and a run that is resumed should go on as it
began: the answer is kept in a file, for all later processes on such a machine.

Shapes: n rows, k summed up, m columns.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import cached_assets_path

from ..provenance import cpu_name
from .side_by_side import in_a_new_thread

# left (n, k), right (k, m), result (n, m): result = left @ right. Any strides. `left` may have more rows, which add nothing.
Product = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]


def by_torch(left: torch.Tensor, right: torch.Tensor, result: torch.Tensor) -> None:
    torch.mm(left[: len(result)], right, out=result)


def by_onednn(left: torch.Tensor, right: torch.Tensor, result: torch.Tensor) -> None:
    # The one use of a private torch operator in this project: no public function leads to oneDNN in float32. It is what
    # torch's own compiler calls, and it writes to memory of its own.
    product = torch.ops.mkldnn._linear_pointwise(left, right.t(), None, "none", [], "")
    result.copy_(product[: len(result)])


def has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


PRODUCTS: dict[str, Product] = {"torch": by_torch, "onednn": by_onednn}
# So many times faster must oneDNN be. Near a tie torch's own is taken, which writes where it is told to.
ADVANTAGE = 1.1
# Smaller products are over before oneDNN has begun: 20 us a call on an Intel Xeon, where torch's own takes 2.
LEAST_FLOPS = 5e5
# Larger sizes are timed as if they had these: rates change little beyond.
MOST_ROWS, MOST_FEATURES = 256, 2048
WARM_UPS, ROUNDS = 2, 5


class Products(NamedTuple):
    """`forward`: of inputs and a transposed weight. `grad_input`: of upstream gradients and a weight. `grad_weight`:
    of transposed upstream gradients and inputs."""

    forward: Product
    grad_input: Product
    grad_weight: Product

    def length(self, size: int) -> int:
        """
        Rows that the operands for `size` rows should have, with zeros in those that are added.

        oneDNN compiles a product for every shape that it meets, and keeps some hundreds. So for its products lengths are
        rounded up to sixteenths of a power of two, of which few occur in training; 3 % of the rows are added on average.
        """
        if by_onednn not in self:
            return size
        step = max(8, 2 ** (size.bit_length() - 5))
        return -(-size // step) * step


KINDS = Products._fields
BY_TORCH = Products(by_torch, by_torch, by_torch)


def products_for(rows: int, weight: torch.Tensor, dtype: torch.dtype, threads: int) -> Products:
    """
    The products to take for groups of about `rows` rows.

    Under `torch.use_deterministic_algorithms` torch's own, so that nothing depends on what was timed before.

    Args:
        weight: (out features, in features) of one expert.
        dtype: that is multiplied in.
        threads: that a product has.
    """
    if dtype != torch.float32 or torch.are_deterministic_algorithms_enabled():
        return BY_TORCH
    return _products_for(class_of(rows), *weight.shape, threads)


def class_of(rows: int) -> int:
    """The power of two that is not below `rows`, at most MOST_ROWS."""
    return min(MOST_ROWS, 1 << max(0, rows - 1).bit_length())


@functools.cache
def _products_for(rows: int, out_features: int, in_features: int, threads: int) -> Products:
    if 2 * rows * out_features * in_features < LEAST_FLOPS or not has_onednn():
        return BY_TORCH
    out_features, in_features = min(MOST_FEATURES, out_features), min(MOST_FEATURES, in_features)
    return Products(*(PRODUCTS[_taken(kind, rows, out_features, in_features, threads)] for kind in KINDS))


def _taken(kind: str, rows: int, out_features: int, in_features: int, threads: int) -> str:
    """Name of the product that is taken: as the file says, or as timed now."""
    with contextlib.suppress(OSError):  # nothing can be written there: then every process times anew
        file = _folder(threads) / f"{kind}-{rows}x{out_features}x{in_features}.json"
        if (taken := _read(file)) is None:
            _write_once(file, json.dumps(time_products(kind, rows, out_features, in_features, threads)))
            taken = _read(file)
        if taken is not None:
            return taken
    return time_products(kind, rows, out_features, in_features, threads)["taken"]


def _folder(threads: int) -> Path:
    name = f"{cpu_name()}-{threads}-threads-torch-{torch.__version__}"
    try:
        return cached_assets_path("grinmoe", namespace="cpu-products", subfolder=name)
    except (RuntimeError, ValueError) as error:  # the user has no home, or a file is where a folder should be
        raise OSError(*error.args) from error


def _read(file: Path) -> str | None:
    try:
        taken = json.loads(file.read_text())["taken"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    return taken if taken in tuple(PRODUCTS) else None


def _write_once(file: Path, text: str) -> None:
    """Write `file` whole, unless another process has done so meanwhile."""
    own = file.with_name(f".{file.name}-{uuid.uuid4()}")
    try:
        own.write_text(text)
        try:
            os.link(own, file)
        except FileExistsError:
            if _read(file) is None:  # it says nothing
                own.replace(file)
        except OSError:  # a file system without hard links: of processes that begin together, the last one is right
            own.replace(file)
    finally:
        own.unlink(missing_ok=True)


def operands(
    kind: str, rows: int, out_features: int, in_features: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Left, right and result of one product of `kind`, with the strides that it has in training."""
    generator = torch.Generator().manual_seed(0)  # the caller's draws stay what they are

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32)

    inputs, upstream, weight = drawn(rows, in_features), drawn(rows, out_features), drawn(out_features, in_features)
    return {
        "forward": (inputs, weight.t(), torch.zeros_like(upstream)),
        "grad_input": (upstream, weight, torch.zeros_like(inputs)),
        "grad_weight": (upstream.t(), inputs, torch.zeros_like(weight)),
    }[kind]


def time_products(kind: str, rows: int, out_features: int, in_features: int, threads: int) -> dict:
    """The least microseconds of each product, in turn; and under "taken" the name of the one to take."""
    seconds = dict.fromkeys(PRODUCTS, float("inf"))

    def measure() -> None:
        arguments = operands(kind, rows, out_features, in_features)
        with torch.no_grad(), with_threads(threads):
            for number in range(WARM_UPS + ROUNDS):
                for name, multiply in PRODUCTS.items():
                    started = time.perf_counter()
                    multiply(*arguments)
                    if number >= WARM_UPS:
                        seconds[name] = min(seconds[name], time.perf_counter() - started)

    in_a_new_thread(measure)  # a mode of the caller's would count, record or refuse these products
    taken = "onednn" if seconds["onednn"] * ADVANTAGE < seconds["torch"] else "torch"
    return {**{f"{name}_us": round(1e6 * value, 1) for name, value in seconds.items()}, "taken": taken}


@contextlib.contextmanager
def with_threads(threads: int) -> Iterator[None]:
    """Within it torch computes with so many threads, and threads that begin meanwhile have as many."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
