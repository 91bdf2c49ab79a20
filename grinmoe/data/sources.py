"""Sources of training data: files, folders of files and data sets of the Hub, read row by row.

Every error names the place: the file and its line, or the data set and its row.
"""

from __future__ import annotations

import json
import os
import re
import stat
from codecs import BOM_UTF8
from collections import Counter
from collections.abc import Iterator
from itertools import count, product
from pathlib import Path
from typing import Any, BinaryIO

from ..files import kind_of

SUFFIXES = (".json", ".jsonl", ".parquet")
# In bytes. A row takes some ten times as much memory while it is read, and an array is read at once.
LARGEST_ROW = 2**28
LARGEST_ARRAY = 2**31
_DEEPEST = 64
_TOO_DEEP = f"it has more than {_DEEPEST} levels of lists and objects; a row has no more than a handful"
_ROWS_AT_ONCE = 256

# Files that describe a data set: `datasets` and the Hub write them beside its rows.
_METADATA_FILES = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
_COMPRESSIONS = (".gz", ".zst", ".xz", ".bz2", ".zip")
# Words in a file's path that name its split, as `datasets` reads them.
_SPLITS = {
    "train": "train training",
    "validation": "validation valid val dev",
    "test": "test testing eval evaluation heldout holdout held-out held_out hold-out hold_out",
}
_SPLIT_OF = {word: split for split, words in _SPLITS.items() for word in words.split()}
_SPLIT_WORD = re.compile(rf"(?<![a-z])({'|'.join(_SPLIT_OF)})(?![a-z])", re.IGNORECASE)

PlacedRow = tuple[str, dict[str, Any]]


def is_local(source: str) -> bool:
    """Whether `source` means files: it exists here, or it is written like a path and not like `name` or `owner/name`."""
    path = Path(source).expanduser()
    looks_like_a_path = path.suffix in SUFFIXES or source.startswith((".", "~", "/")) or source.count("/") > 1
    return path.exists() or looks_like_a_path


def read_rows(source: str, split: str, config: str | None = None, revision: str | None = None) -> Iterator[PlacedRow]:
    """
    Rows of a file, of all files of a folder in the order of their paths, or of one split of a Hub data set.

    Yields:
        The row's place, for messages, and the row.

    Raises:
        ValueError: no such file, an unknown suffix, nothing in it, or a file that cannot be read.
    """
    if not is_local(source):
        return _read_hub(source, split, config, revision)
    if config is not None or revision is not None:
        raise ValueError(f"data_config and data_revision are for data sets of the Hub; {source!r} is on this machine")
    return _read_files(_files(Path(source).expanduser()))


def _files(path: Path) -> list[Path]:
    """A file, or those of a folder whose rows are data."""
    if not path.exists():
        raise ValueError(
            f"{path} does not exist; give a {', '.join(SUFFIXES)} file, a folder of them, or a Hub data set"
        )
    if not path.is_dir():
        _check_readable(path, is_given=True)
        if path.suffix not in SUFFIXES:
            raise ValueError(f"{path} has the suffix {path.suffix!r}; training data are {', '.join(SUFFIXES)} files")
        return [path]
    shown_files = [
        file for file in sorted(path.rglob("*")) if not _is_hidden(file.relative_to(path)) and not file.is_dir()
    ]
    for file in shown_files:
        _check_readable(file)
    files = [file for file in shown_files if file.suffix in SUFFIXES and not _is_metadata(file)]
    if not files:
        raise ValueError(f"the folder {path} holds no {', '.join(SUFFIXES)} file")
    _check_one_split(path, files)
    return files


def _is_hidden(relative: Path) -> bool:
    return any(part.startswith(".") for part in relative.parts)


def _is_metadata(file: Path) -> bool:
    return file.name in _METADATA_FILES or file.stem.upper() == "README"


def _check_readable(file: Path, is_given: bool = False) -> None:
    """Refuse data in a form that is not read, which a folder would leave out silently, or which would block."""
    if not file.is_file() and (file.suffix in SUFFIXES or is_given):
        kind = "a link that leads nowhere" if file.is_symlink() and not file.exists() else kind_of(file)
        raise ValueError(f"{file} is {kind}, not a file; write the data to a file")
    if file.suffix == ".arrow":
        raise ValueError(
            f"{file} is an Arrow file, as save_to_disk of datasets writes it, which is not read; write the data as Parquet: "
            "datasets.load_from_disk(folder).to_parquet('rows.parquet'), for each split of a DatasetDict by itself"
        )
    if file.suffix in _COMPRESSIONS and Path(file.stem).suffix in SUFFIXES:
        raise ValueError(f"{file} is compressed, and compressed files are not read; unpack it")


def _check_one_split(path: Path, files: list[Path]) -> None:
    """Refuse a folder whose files belong to several splits by their names: a test split would be trained on."""
    first: dict[str, str] = {}
    for file in files:
        relative = file.relative_to(path).as_posix()
        words = _SPLIT_WORD.findall(relative)
        # A file whose name says nothing is taken for one to train on.
        first.setdefault(_SPLIT_OF[words[-1].lower()] if words else "train", relative)
    if len(first) > 1:
        named = ", ".join(f"{relative} ({split})" for split, relative in first.items())
        raise ValueError(
            f"the folder {path} holds several splits by the names of its files ({named}), and all files of a folder are "
            "read as one. Give the file of one split, or a folder with its files alone, as train_data, and that of another "
            "as eval_data"
        )


def _read_files(files: list[Path]) -> Iterator[PlacedRow]:
    for file in files:
        try:
            yield from _read_file(file)
        except OSError as error:
            raise ValueError(
                f"{file} cannot be read: {error.strerror or error}; check the file and its disk"
            ) from error


def _read_file(file: Path) -> Iterator[PlacedRow]:
    # Without O_NONBLOCK, opening a FIFO that has taken the file's place waits for a writer.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    with open(os.open(file, flags), "rb") as opened:
        before = os.fstat(opened.fileno())
        if not stat.S_ISREG(before.st_mode):
            raise ValueError(f"{file} is not a file; write the data to a file")
        if before.st_size == 0:
            raise ValueError(f"{file} is empty")
        for place, row in _read_parquet(file, opened) if file.suffix == ".parquet" else _read_json(file, opened):
            if not isinstance(row, dict):
                raise ValueError(f"{place}: a row is an object with named columns, not {shown(row)}")
            yield place, row
        after = os.fstat(opened.fileno())
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise ValueError(f"{file} was changed while it was read; wait until it is whole, and start again")


def _read_json(file: Path, opened: BinaryIO) -> Iterator[tuple[str, Any]]:
    """JSON Lines, whatever the suffix, or one array of objects."""
    begin = len(BOM_UTF8) if opened.read(len(BOM_UTF8)) == BOM_UTF8 else 0
    opened.seek(begin)
    first = b" "
    while first.isspace():
        first = opened.read(2**16)
    opened.seek(begin)
    if first.lstrip().startswith(b"["):
        data = opened.read(LARGEST_ARRAY + 1)
        if len(data) > LARGEST_ARRAY:
            raise ValueError(
                f"{file} is one array of more than {LARGEST_ARRAY:,} bytes, which is read at once; write one object a line"
            )
        array = _parsed(_decoded(data, str(file)), file, 1)
        yield from ((f"{file}, row {number}", row) for number, row in enumerate(array, start=1))
        return
    for number in count(1):
        line = opened.readline(LARGEST_ROW + 1)
        if not line:
            return
        place = f"{file}, line {number}"
        if len(line) > LARGEST_ROW:
            raise ValueError(
                f"{place}: it is longer than {LARGEST_ROW:,} bytes; write the text in several rows, one object a line"
            )
        if text := _decoded(line, place).rstrip():  # a syntax error at its end is on this line
            yield place, _parsed(text, file, number)


def _decoded(data: bytes, place: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{place}: not UTF-8 text (byte {data[error.start]:#04x} at {error.start}); convert the file to UTF-8"
        ) from error


def _parsed(text: str, file: Path, first_line: int) -> Any:
    try:
        value = json.loads(text, object_pairs_hook=_object)
        if text.count("[") + text.count("{") > _DEEPEST:
            _check_depth(value)
        return value
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise ValueError(
            f"{file}, line {line}: not JSON ({error.msg} at column {error.colno}); one object a line, or one array"
        ) from error
    except RecursionError as error:
        raise ValueError(f"{file}, line {first_line}: {_TOO_DEEP}") from error
    except ValueError as error:  # a key twice, too deep, an integer of more digits than Python reads
        raise ValueError(f"{file}, line {first_line}: {error}") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"an object has the key {shown(twice)} twice; write each key once")
    return found


def _check_depth(value: Any) -> None:
    # Without recursion: the value may be deeper than Python's stack.
    level = [value]
    for _ in range(_DEEPEST):
        level = [
            one
            for outer in level
            if isinstance(outer, dict | list)
            for one in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return
    raise ValueError(_TOO_DEEP)


def _read_parquet(file: Path, opened: BinaryIO) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    number, too_large = 0, ""
    try:
        at_once, kept_short = _parquet_limits(pyarrow.parquet.ParquetFile(opened).metadata)
        for batch in pyarrow.parquet.ParquetFile(opened, read_dictionary=kept_short).iter_batches(batch_size=at_once):
            # One by one where they are large: the rows of a small file can be larger than the memory.
            step = batch.num_rows if sum(map(_unpacked_size, batch.columns)) <= LARGEST_ROW else 1
            for begin in range(0, batch.num_rows, max(step, 1)):
                part = batch.slice(begin, step)
                if step == 1 and sum(map(_unpacked_size, part.columns)) > LARGEST_ROW:
                    too_large = f"{file}, row {number + 1}: it is longer than {LARGEST_ROW:,} bytes"
                    break
                for row in part.to_pylist():
                    number += 1
                    yield f"{file}, row {number}", row
            if too_large:
                break
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise ValueError(f"{file} cannot be read as Parquet behind row {number}: {error}") from error
    if too_large:
        raise ValueError(f"{too_large}; write the text in several rows")


def _parquet_limits(metadata: Any) -> tuple[int, list[str]]:
    """
    How many rows are read at once, and the columns that are read as dictionaries.

    A dictionary writes a text once, and any number of cells refer to it. A cell is no larger than its column's chunk, and so
    few rows bound what is read. In lists, a single row can have any number of cells: there the dictionary is kept.
    """
    at_once, kept_short = _ROWS_AT_ONCE, set()
    for group, place in product(range(metadata.num_row_groups), range(metadata.num_columns)):
        chunk, column = metadata.row_group(group).column(place), metadata.schema.column(place)
        size = max(chunk.total_uncompressed_size, 1)
        is_text = column.physical_type == "BYTE_ARRAY"
        if is_text and column.max_repetition_level and chunk.num_values * size > LARGEST_ARRAY:
            kept_short.add(column.path)
            at_once = at_once if size <= LARGEST_ARRAY else 1
        elif is_text:
            at_once = max(min(at_once, LARGEST_ROW // size), 1)
    return at_once, sorted(kept_short)


def _unpacked_size(array: Any) -> int:
    """Bytes of the values of an array, each reference to a dictionary counted as what it refers to."""
    import pyarrow
    import pyarrow.compute

    kind = array.type
    if pyarrow.types.is_dictionary(kind):
        lengths = pyarrow.compute.take(pyarrow.compute.binary_length(array.dictionary), array.indices)
        return pyarrow.compute.sum(pyarrow.compute.cast(lengths, "int64")).as_py() or 0
    if pyarrow.types.is_struct(kind):
        return sum(map(_unpacked_size, array.flatten()))
    if pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind):
        return _unpacked_size(array.flatten())
    return array.nbytes


def _read_hub(name: str, split: str, config: str | None, revision: str | None) -> Iterator[PlacedRow]:
    import datasets

    try:
        rows = datasets.load_dataset(name, config, split=split, revision=revision)
    except Exception as error:  # load_dataset raises what its loaders, the Hub's client and the network raise
        raise ValueError(
            f"the data set {name!r} (data_config {config!r}, split {split!r}, revision {revision!r}) cannot be loaded from "
            f"the Hub; check these names, the network and the token, or give a local path. datasets says: {error}"
        ) from error
    return ((f"{name} [{split}], row {number}", row) for number, row in enumerate(rows, start=1))


def shown(value: Any) -> str:
    """A value for an error message, cut where it is long."""
    text = repr(value)
    return f"{text[:60]}..." if len(text) > 60 else text
