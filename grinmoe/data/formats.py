"""Rows of training data: read from files or the Hub, told apart by their columns, and checked one by one.

Every error names the place: the file and its line, or the data set and its row.
"""

from __future__ import annotations

import json
from codecs import BOM_UTF8
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, takewhile
from pathlib import Path
from typing import Any

SUFFIXES = (".json", ".jsonl", ".parquet")
FORMATS = ("messages", "prompt-completion", "text", "preference")
_TOOL_KEYS = ("tool_calls", "tool_call_id", "tools")

Message = dict[str, str]
PlacedRow = tuple[str, dict[str, Any]]


@dataclass(frozen=True)
class Columns:
    """Names of the columns that a row may have."""

    messages: str = "messages"
    prompt: str = "prompt"
    completion: str = "completion"
    text: str = "text"
    chosen: str = "chosen"
    rejected: str = "rejected"

    def of_format(self, data_format: str) -> tuple[str, ...]:
        """What a row of this format cannot do without."""
        return {
            "messages": (self.messages,),
            "prompt-completion": (self.prompt, self.completion),
            "text": (self.text,),
            "preference": (self.chosen, self.rejected),
        }[data_format]


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
    if not path.exists():
        raise ValueError(
            f"{path} does not exist; give a {', '.join(SUFFIXES)} file, a folder of them, or a Hub data set"
        )
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise ValueError(f"{path} has the suffix {path.suffix!r}; training data are {', '.join(SUFFIXES)} files")
        return [path]
    files = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file())
    if not files:
        raise ValueError(f"the folder {path} holds no {', '.join(SUFFIXES)} file")
    return files


def _read_files(files: list[Path]) -> Iterator[PlacedRow]:
    for file in files:
        if file.stat().st_size == 0:
            raise ValueError(f"{file} is empty")
        for place, row in _read_parquet(file) if file.suffix == ".parquet" else _read_json(file):
            if not isinstance(row, dict):
                raise ValueError(f"{place}: a row is an object with named columns, not {_shown(row)}")
            yield place, row


def _read_json(file: Path) -> Iterator[tuple[str, Any]]:
    """JSON Lines, whatever the suffix, or one array of objects."""
    with file.open("rb") as lines:
        first_line = lines.readline()
        begin = len(BOM_UTF8) if first_line.startswith(BOM_UTF8) else 0
        lines.seek(begin)
        if first_line[begin:].lstrip().startswith(b"["):
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


def format_of(place: str, row: dict[str, Any], columns: Columns, data_format: str, allowed: Iterable[str]) -> str:
    """
    The format of a row: `data_format`, or for `"auto"` the first of `allowed` whose columns the row has.

    Raises:
        ValueError: the row has not the columns; the message names those that it has.
    """
    choices = list(allowed) if data_format == "auto" else [data_format]
    for choice in choices:
        if all(column in row for column in columns.of_format(choice)):
            return choice
    wanted = "; or ".join(f"{' and '.join(columns.of_format(choice))} ({choice})" for choice in choices)
    raise ValueError(
        f"{place}: its columns are {', '.join(map(str, row)) or 'none'}; needed: {wanted}. Name the columns with "
        "messages_column, prompt_column, completion_column, text_column, chosen_column or rejected_column"
    )


def checked_text(value: Any, column: str, place: str) -> str | None:
    """A text that is not blank; None for a blank one or null.

    Raises:
        ValueError: it is not a string.
    """
    if value is None:
        return None
    if not isinstance(value, str):
        raise ValueError(f"{place}: {column!r} is a string, not {_shown(value)}")
    return value if value.strip() else None


def checked_messages(value: Any, column: str, place: str) -> list[Message] | None:
    """
    Messages of role and content, nothing else; None for null. Other keys are left out.

    Raises:
        ValueError: no list, an empty one, or a message without a role or a content that is a string, or with tool calls.
    """
    if value is None:
        return None
    if not isinstance(value, list):
        raise ValueError(f'{place}: {column!r} is a list of {{"role": ..., "content": ...}}, not {_shown(value)}')
    if not value:
        raise ValueError(f"{place}: {column!r} is an empty list; a conversation has at least one message")
    messages = []
    for number, message in enumerate(value, start=1):
        where = f"{place}: message {number} of {column!r}"
        if not isinstance(message, dict):
            raise ValueError(f'{where} is {_shown(message)}; it must be {{"role": ..., "content": ...}}')
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                had = f"has the {key} {_shown(message[key])}" if message.get(key) is not None else f"has no {key}"
                raise ValueError(f"{where} {had}; it needs a string (its keys are {', '.join(map(str, message))})")
        if tool_keys := [key for key in _TOOL_KEYS if message.get(key)]:
            raise ValueError(f"{where} has {tool_keys[0]}; only text is trained on: remove it, or write it as content")
        messages.append({"role": message["role"], "content": message["content"]})
    return messages


def checked_turns(value: Any, column: str, place: str) -> str | list[Message] | None:
    """A text or messages, whichever it is; None for a blank text or null."""
    if isinstance(value, list):
        return checked_messages(value, column, place)
    return checked_text(value, column, place)


@dataclass(frozen=True)
class Preference:
    """A pair: all three texts, or all three lists of messages."""

    prompt: str | list[Message]
    chosen: str | list[Message]
    rejected: str | list[Message]


def checked_preference(row: dict[str, Any], columns: Columns, place: str) -> Preference | None:
    """
    The pair of a row, None where a part of it is empty.

    Where the answers are messages and the prompt is none or a text, the answers are taken as whole conversations: the
    prompt is what both begin with.

    Raises:
        ValueError: texts and messages are mixed, the prompt is missing, or whole conversations have no common beginning.
    """
    chosen = checked_turns(row[columns.chosen], columns.chosen, place)
    rejected = checked_turns(row[columns.rejected], columns.rejected, place)
    prompt = checked_turns(row.get(columns.prompt), columns.prompt, place)
    if chosen is None or rejected is None:
        return None
    if isinstance(chosen, str) != isinstance(rejected, str) or (isinstance(chosen, str) and isinstance(prompt, list)):
        raise ValueError(
            f"{place}: {columns.prompt!r}, {columns.chosen!r} and {columns.rejected!r} must be all texts or all messages"
        )
    if isinstance(chosen, str) or isinstance(prompt, list):
        if columns.prompt not in row:
            raise ValueError(f"{place}: texts need a {columns.prompt!r}; name its column with prompt_column")
        return None if prompt is None else Preference(prompt, chosen, rejected)
    assert isinstance(rejected, list)
    common = common_length(chosen[:-1], rejected[:-1])
    if common == 0:
        raise ValueError(
            f"{place}: {columns.chosen!r} and {columns.rejected!r} do not begin with the same message, so they are no whole "
            f"conversations; give the prompt as messages in the column {columns.prompt!r}"
        )
    return Preference(chosen[:common], chosen[common:], rejected[common:])


def common_length(first: Sequence[Any], second: Sequence[Any]) -> int:
    """How many elements two sequences begin with alike."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{text[:60]}..." if len(text) > 60 else text
