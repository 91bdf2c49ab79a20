"""Sources of training data: files, folders of files and data sets of the Hub, read row by row.

Every error names the place: the file and its line, or the data set and its row.
"""

from __future__ import annotations

import json
import re
from codecs import BOM_UTF8
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

SUFFIXES = (".json", ".jsonl", ".parquet")

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
    if path.is_file():
        _check_readable(path)
        if path.suffix not in SUFFIXES:
            raise ValueError(f"{path} has the suffix {path.suffix!r}; training data are {', '.join(SUFFIXES)} files")
        return [path]
    shown_files = [
        file for file in sorted(path.rglob("*")) if not _is_hidden(file.relative_to(path)) and file.is_file()
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


def _check_readable(file: Path) -> None:
    """Refuse data in a form that is not read, which a folder would leave out silently."""
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
        if file.stat().st_size == 0:
            raise ValueError(f"{file} is empty")
        for place, row in _read_parquet(file) if file.suffix == ".parquet" else _read_json(file):
            if not isinstance(row, dict):
                raise ValueError(f"{place}: a row is an object with named columns, not {shown(row)}")
            yield place, row


def _read_json(file: Path) -> Iterator[tuple[str, Any]]:
    """JSON Lines, whatever the suffix, or one array of objects."""
    with file.open("rb") as lines:
        begin = len(BOM_UTF8) if lines.read(len(BOM_UTF8)) == BOM_UTF8 else 0
        lines.seek(begin)
        first_line = next((line.lstrip() for line in lines if line.strip()), b"")
        lines.seek(begin)
        if first_line.startswith(b"["):
            array = _parsed(_decoded(lines.read(), str(file)), file, 1)
            yield from ((f"{file}, row {number}", row) for number, row in enumerate(array, start=1))
            return
        for number, line in enumerate(lines, start=1):
            place = f"{file}, line {number}"
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
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise ValueError(
            f"{file}, line {line}: not JSON ({error.msg} at column {error.colno}); one object a line, or one array"
        ) from error


def _read_parquet(file: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        batches = pyarrow.parquet.ParquetFile(file).iter_batches()
        rows = chain.from_iterable(batch.to_pylist() for batch in batches)
        yield from ((f"{file}, row {number}", row) for number, row in enumerate(rows, start=1))
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{file} cannot be read as Parquet: {error}") from error


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
