"""Where the time of a step goes: kernels (on a CPU, operators) in percent, and grouped, by torch's profiler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from grinmoe.provenance import markdown_table

PRODUCTS, ROUTER, GLUE, OTHER, IDLE = "matrix products", "router", "glue", "other", "device idle"
# Parts of names, looked for in this order: of cuBLAS, CUTLASS and torch's operators; of the router's kernels and the draws
# of its operators; and of what moves, weighs and sums rows. Elementwise operators of the router are counted as glue.
_GROUPS = {
    PRODUCTS: (
        "gemm",
        "cutlass",
        "nvjet",
        "cublas",
        "aten::mm",
        "aten::bmm",
        "addmm",
        "grouped_mm",
        "mkldnn",
        "linear",
    ),
    ROUTER: ("router", "softmax", "exponential", "distribution", "argmax"),
    GLUE: (
        *(
            "swiglu",
            "silu",
            "combine",
            "place_rows",
            "count_rows",
            "index",
            "gather",
            "scatter",
            "sort",
            "cumsum",
            "histc",
        ),
        *(
            "bincount",
            "elementwise",
            "reduce",
            "aten::mul",
            "aten::add",
            "aten::sum",
            "aten::cat",
            "aten::copy_",
            "experts",
        ),
    ),
}
ROWS = 8


def profile(run: Callable[[int], Any], device: torch.device, rounds: int = 3) -> dict[str, float]:
    """Seconds of each kernel in one step, the longest first: a mean over `rounds` of `run`."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        for number in range(rounds):
            run(number)
        if device.type == "cuda":
            torch.cuda.synchronize()
    spent: dict[str, float] = {}
    for event in profiler.key_averages():
        # On a GPU only what ran there: operators on the host would count it again.
        on_gpu = event.device_type == torch.autograd.DeviceType.CUDA
        if on_gpu or device.type != "cuda":
            microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            spent[event.key] = 1e-6 * microseconds / rounds
    return dict(sorted(spent.items(), key=lambda pair: -pair[1]))


def grouped(kernels: dict[str, float], step_seconds: float | None = None) -> dict[str, float]:
    """
    Seconds by group: matrix products, router, glue, other.

    Args:
        kernels: from [`profile`].
        step_seconds: what a step was measured to take without the profiler. What exceeds the kernels' time the device was
            idle, waiting for the host. None: not told.
    """
    seconds = dict.fromkeys((PRODUCTS, ROUTER, GLUE, OTHER), 0.0)
    for name, spent in kernels.items():
        group = next((g for g, parts in _GROUPS.items() if any(part in name.lower() for part in parts)), OTHER)
        seconds[group] += spent
    if step_seconds is not None:
        seconds[IDLE] = max(0.0, step_seconds - sum(kernels.values()))
    return seconds


def profile_table(profiles: dict[str, dict[str, float]], groups: dict[str, dict[str, float]]) -> str:
    """A Markdown section. `profiles`: kernels by arm, from [`profile`]; `groups`: the same from [`grouped`]."""
    names = list(dict.fromkeys(group for one in groups.values() for group in one))
    rows = []
    for arm, one in groups.items():
        total = sum(one.values()) or 1.0
        rows.append([arm, f"{1e3 * total:.2f}", *(f"{one.get(name, 0.0) / total:.1%}" for name in names)])
    sections = [f"Where a step goes:\n\n{markdown_table(['arm', 'ms', *names], rows)}"]
    for arm, kernels in profiles.items():
        total = sum(kernels.values()) or 1.0
        rows = [[f"`{kernel[:90]}`", f"{spent / total:.1%}"] for kernel, spent in list(kernels.items())[:ROWS]]
        sections.append(f"`{arm}`, the longest:\n\n{markdown_table(['kernel', 'share'], rows)}")
    return "\n\n".join(sections)


__all__ = ["GLUE", "IDLE", "OTHER", "PRODUCTS", "ROUTER", "grouped", "profile", "profile_table"]
