"""Memory on a CPU for the gradients of all experts, which every step needs anew.

glibc's allocator gives so much memory back to the system, and the next step gets it page by page, filled with zeros: much
of the time of the product that is written there. So some of it is kept for the next step, and what is new comes in large
pages, as numpy's large arrays do.
"""

from __future__ import annotations

import collections
import contextlib
import mmap
import os
import weakref

import torch

LARGE_PAGE = 2**21
# From here on glibc, whatever was freed before, takes memory from the system and gives it back.
FROM_BYTES = 2**25
# So much may be kept that no tensor uses. The longest unused goes first.
IDLE_BYTES = 2**29

_idle: collections.deque[mmap.mmap] = collections.deque()


def empty_like_on_cpu(weight: torch.Tensor) -> torch.Tensor:
    """Uninitialised memory of the weight's shape and dtype, contiguous. It is given back when its last tensor goes."""
    if weight.nbytes < FROM_BYTES:
        return torch.empty_like(weight, memory_format=torch.contiguous_format)
    memory = _take(-(-weight.nbytes // LARGE_PAGE) * LARGE_PAGE + LARGE_PAGE)
    start = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % LARGE_PAGE
    view = memoryview(memory)[start : start + weight.nbytes]
    weakref.finalize(view, _give_back, memory).atexit = False
    # It keeps the view, as long as there is a tensor of this memory.
    return torch.frombuffer(view, dtype=weight.dtype).view(weight.shape)


def _take(num_bytes: int) -> mmap.mmap:
    for memory in list(_idle):
        if len(memory) == num_bytes:
            with contextlib.suppress(ValueError):  # another thread was faster
                _idle.remove(memory)
                return memory
    # Private: what a forked process writes must not be seen here, and shared memory seldom gets large pages.
    memory = mmap.mmap(
        -1, num_bytes, **({"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if os.name == "posix" else {})
    )
    # A system without large pages has none, or says so.
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def _give_back(memory: mmap.mmap) -> None:
    _idle.append(memory)
    while sum(map(len, list(_idle))) > IDLE_BYTES:
        with contextlib.suppress(IndexError):  # another thread was faster
            _idle.popleft()
