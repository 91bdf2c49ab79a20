"""What a training step allocates, followed on tensors without data: `Allocations`, entered inside of torch's FakeTensorMode.

Torch's own `MemTracker` (torch.distributed._tools) works alike, but torch 2.13's puts a gradient hook on every parameter and
fails for frozen ones, so for LoRA.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch.distributed._tools.common_utils import get_untyped_storages
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten


class Allocations(TorchDispatchMode):
    """
    Count the storages that operators make, from their making until nothing refers to them.

    Attributes:
        phase: where in the step it is; its user sets it.
        alive: bytes by part.
        peaks: for each phase, `alive` when its sum was largest.
    """

    def __init__(self, sharded: bool = False):
        super().__init__()
        self.sharded = sharded
        self.phase = "forward"
        self.alive: Counter[str] = Counter()
        self.peaks: dict[str, Counter[str]] = {}
        self._storages: dict[int, tuple[weakref.ref, str, int]] = {}  # by the address of the C++ object
        self._share = 0

    def ignore(self, tensors: Iterable[torch.Tensor]) -> None:
        """Leave out what is there already."""
        for tensor in tensors:
            for storage in get_untyped_storages(tensor):
                self._book(storage, "", 0)

    def move(self, tensor: torch.Tensor, part: str | None) -> None:
        """Count a tensor as another part; None: not at all."""
        for storage in get_untyped_storages(tensor):
            _, earlier, size = self._storages[storage._cdata]
            self.alive[earlier] -= size
            self._book(storage, part or "", size if part else 0)

    def __enter__(self) -> Allocations:
        # FSDP2 frees what it gathered by resizing storages, which no operator does.
        self._resize = torch.UntypedStorage.resize_
        tracker, resize = self, self._resize

        def resized(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            if storage._cdata in tracker._storages:
                _, part, earlier = tracker._storages[storage._cdata]
                tracker.alive[part] -= earlier
                tracker._book(storage, part, size)
            return result

        torch.UntypedStorage.resize_ = resized  # type: ignore
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*exception)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is aten._local_scalar_dense.default:
            # The host reads a value that does not exist: how many tokens an expert gets, or whether logits are finite.
            return self._share if not args[0].is_floating_point() else 0.0
        if func is aten.bincount.default:
            experts = kwargs["minlength"] if "minlength" in (kwargs or {}) else args[2]
            self._share = args[0].numel() // experts  # even routing
            return args[0].new_empty(experts)
        # Without values nothing is drawn, and torch's shape functions refuse generators.
        result = func(*args, **{key: value for key, value in (kwargs or {}).items() if key != "generator"})
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                for storage in get_untyped_storages(tensor):
                    if storage._cdata not in self._storages:
                        self._book(storage, self._part(func, tensor), storage.nbytes())
        return result

    def _part(self, func: Any, tensor: torch.Tensor) -> str:
        if func.namespace == "bitsandbytes":
            return "temporary"
        flat_buffer = func is aten.empty.memory_format and tensor.dim() == 1  # as FSDP2's are
        if self.sharded and (flat_buffer or func.namespace in ("fsdp", "c10d")):
            return "communication"
        return "logits" if self.phase == "loss" else "activations"

    def _book(self, storage: torch.UntypedStorage, part: str, size: int) -> None:
        key = storage._cdata

        def freed(reference: weakref.ref) -> None:
            if key in self._storages and self._storages[key][0] is reference:
                _, part, size = self._storages.pop(key)
                self.alive[part] -= size

        self._storages[key] = weakref.ref(storage, freed), part, size
        self.alive[part] += size
        if self.alive.total() > self.peaks.get(self.phase, Counter()).total():
            self.peaks[self.phase] = self.alive.copy()
