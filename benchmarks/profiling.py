"""Where the time of a step goes: kernels (on a CPU, operators) in percent, and grouped, by torch's profiler."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
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
    if device.type == "cuda":
        for event in on_device(profiler.key_averages()):
            spent[event.key] = 1e-6 * event.self_device_time_total / rounds
    else:
        spent = {event.key: 1e-6 * event.self_cpu_time_total / rounds for event in profiler.key_averages()}
    return dict(sorted(spent.items(), key=lambda pair: -pair[1]))


def on_device(events: Iterable[Any]) -> Iterator[Any]:
    """Of a profiler's events those that a GPU ran: no operators of the host and no named regions, which contain others."""
    for event in events:
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation:
            yield event


def count_launches(run: Callable[[int], object]) -> tuple[int, float]:
    """Number of the kernels, copies and fills that one `run` has a GPU do, and the seconds that the longest takes there."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        run(0)
        torch.cuda.synchronize()
    seconds = [1e-6 * event.self_device_time_total for event in on_device(profiler.events())]
    return len(seconds), max(seconds, default=0.0)


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


__all__ = [
    "GLUE",
    "IDLE",
    "OTHER",
    "PRODUCTS",
    "ROUTER",
    "count_launches",
    "grouped",
    "on_device",
    "profile",
    "profile_table",
]
