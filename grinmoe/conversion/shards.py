"""Checkpoints tensor by tensor: read from the shards where they lie, made when their shard is written, and forgotten then.

    source = WeightSource("model")
    entries = [Entry(name, source.shape(name), torch.float16, lambda: source.read(name).half()) for name in source.names]
    write_shards(entries, "copy", "5GB")

So the memory that a conversion takes is that of one shard of the result, whatever the checkpoint's size.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from safetensors import safe_open
from safetensors.torch import save_file
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from ..checkpoint_grinmoe import CheckpointFileError, read_tensors
from ..files import default_mode

_NAMES = "float64 float32 float16 bfloat16".split()
_DTYPES = {getattr(torch, name) for name in _NAMES}


@dataclass(frozen=True)
class Entry:
    """
    A tensor that will be written.

    Attributes:
        name: its key.
        shape, dtype: what `make` returns.
        make: reads or computes it; called once, when its shard is written.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], torch.Tensor]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class WeightSource:
    """
    The tensors of a checkpoint's folder, read when they are asked for.

    Raises:
        CheckpointFileError: no safetensors weights, or broken weights (`checkpoint_grinmoe.read_tensors`).
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        tensors = read_tensors(self.folder)
        if tensors is None:
            raise CheckpointFileError(f"{self.folder} holds no safetensors weights; give a checkpoint's folder")
        self.tensors = tensors
        self.shapes = {name: tensor.shape for name, tensor in tensors.items()}
        self._open: tuple[Path, Any] | None = None

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def dtype(self, name: str) -> torch.dtype:
        """
        Raises:
            ValueError: one that no conversion takes: integers, bools, 8-bit floats, complex numbers.
        """
        dtype = self.read(name, (slice(0, 0),) if self.shapes[name] else ()).dtype
        if dtype not in _DTYPES:
            raise ValueError(f"{self.folder} holds {name} as {dtype}; convert it to one of {', '.join(_NAMES)} first")
        return dtype

    def read(self, name: str, part: tuple[int | slice, ...] = ()) -> torch.Tensor:
        """A tensor, or the part of it that the indices name; nothing else of it is read."""
        shard = self._shard_of(name)
        return shard.get_slice(name)[part] if part else shard.get_tensor(name)

    def _shard_of(self, name: str) -> Any:
        """Open: one file at a time, whose pages the system may take back."""
        file = self.tensors[name].file
        if self._open is None or self._open[0] != file:
            self._open = file, safe_open(file, framework="pt")
        return self._open[1]


def write_shards(entries: Iterable[Entry], folder: Path, max_shard_size: int | str, label: str = "writing") -> int:
    """
    Write a checkpoint's weights, shard by shard, with a progress bar; and the index if there are several.

    Args:
        entries: in their order.
        folder: exists.
        max_shard_size: bytes, or as in "5GB". A single tensor may be larger.

    Returns:
        Bytes written, headers apart.

    Raises:
        ValueError: a size that is none.
    """
    by_name = {entry.name: entry for entry in entries}
    split = split_state_dict_into_shards_factory(
        by_name,
        get_storage_size=lambda entry: entry.nbytes,
        get_storage_id=lambda entry: None,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    total = sum(entry.nbytes for entry in by_name.values())
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, transient=True) as progress:
        task = progress.add_task(label, total=total)
        for file, names in split.filename_to_tensors.items():
            shard = {}
            for name in names:
                shard[name] = by_name[name].make().contiguous()
                progress.advance(task, by_name[name].nbytes)
            save_file(shard, folder / file, metadata={"format": "pt"})
            (folder / file).chmod(default_mode())  # safetensors writes for the owner alone
            del shard
    if split.is_sharded:
        index = {"metadata": {"total_size": total}, "weight_map": split.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(text, encoding="utf-8")
    return total
