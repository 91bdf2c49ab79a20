"""What a run must find unchanged when it goes on: the rows of its data, and the model that it began with."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.compute

from ..data import PreparedData

# Of each file of weights: enough to tell two models apart, and nothing to wait for.
_BYTES_OF_AN_END = 1 << 20


def data_digest(data: PreparedData, tokenizer: Any) -> str:
    """SHA-256 of all rows as they are trained and evaluated on, in their order, and of the tokenizer."""
    digest = hashlib.sha256()
    backend = getattr(tokenizer, "backend_tokenizer", None)
    digest.update(
        (backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)).encode()
    )
    for rows in (data.train, data.evaluation):
        if rows is None:
            continue
        for table in rows.with_format("arrow").iter(batch_size=1000):
            for name in sorted(table.column_names):
                digest.update(name.encode())
                _add(digest, table[name])
    return digest.hexdigest()


def _add(digest: Any, column: pyarrow.ChunkedArray) -> None:
    # By values: how a table is cut into chunks and buffers may differ from start to start.
    if pyarrow.types.is_list(column.type) and pyarrow.types.is_integer(column.type.value_type):
        for values in (pyarrow.compute.list_value_length(column), pyarrow.compute.list_flatten(column)):
            digest.update(values.to_numpy().tobytes())
    else:
        digest.update(json.dumps(column.to_pylist(), sort_keys=True, default=str).encode())


def model_digest(source: str | None) -> str | None:
    """
    SHA-256 of a folder's configuration and of the beginnings, ends and sizes of its weights; None for what is not there.

    Args:
        source: the folder, or a configuration file.
    """
    if source is None or not Path(source).exists():
        return None
    digest, given = hashlib.sha256(), Path(source)
    for path in sorted(given.iterdir()) if given.is_dir() else [given]:
        if path == given or (path.is_file() and path.name.endswith((".safetensors", "config.json"))):
            digest.update(path.name.encode())
            with path.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                digest.update(str(size).encode())
                for place in (0, max(size - _BYTES_OF_AN_END, 0)):
                    file.seek(place)
                    digest.update(file.read(_BYTES_OF_AN_END))
    return digest.hexdigest()
