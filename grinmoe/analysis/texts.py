"""Texts and task sets as domains: files read piece by piece, and cut into rows of tokens. Memory does not grow with them."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..data import (
    SUFFIXES,
    Columns,
    Message,
    check_columns,
    checked_messages,
    checked_text,
    checked_turns,
    continued,
    read_rows,
)
from ..tokenization import encode_chat, encode_text

# Characters read at once; a piece ends at the last line's end among them.
_PIECE = 16384
_TASK_FORMATS = ("text", "messages", "prompt-completion")
_COLUMNS = Columns()

Content = str | list[Message]


def read_pieces(path: Path) -> Iterator[tuple[bool, Content]]:
    """
    What a domain's file holds, blank pieces and empty rows left out.

    Files that end in .json, .jsonl or .parquet are task sets: each row is a `text`, `messages`, or a `prompt` with a
    `completion`. Any other file is one plain text.

    Yields:
        Whether a document begins here, and a text or messages.

    Raises:
        ValueError: no such file, not UTF-8, or a row of another form; the message names the place.
    """
    if not path.exists():
        raise ValueError(f"--text {path} does not exist; give a text file, or a task set ({', '.join(SUFFIXES)})")
    if not path.is_file():
        raise ValueError(f"--text {path} is no file; give a text file, or a task set ({', '.join(SUFFIXES)})")
    if path.suffix in SUFFIXES:
        for place, row in read_rows(str(path), "train"):
            content = _content_of(place, row)
            if content is not None:
                yield True, content
        return
    begins = True
    for piece in _read_plain(path):
        if piece.strip():
            yield begins, piece
            begins = False


def first_piece(path: Path) -> Content:
    """
    The first piece with text in it.

    Raises:
        ValueError: there is none, or see [`read_pieces`].
    """
    for _, content in read_pieces(path):
        return content
    raise ValueError(f"--text {path} has no text in it; give a file with some")


def token_rows(path: Path, tokenizer: Any, max_length: int, max_tokens: int) -> Iterator[list[int]]:
    """Token ids of a domain: rows of `max_length`, the last one of a document shorter; `max_tokens` in all."""
    left, row = max_tokens, list[int]()
    longest = max(map(len, tokenizer.get_vocab()))
    for begins, content in read_pieces(path):
        if begins and row:
            yield row[:left]
            left -= len(row[:left])
            row = []
            if left <= 0:
                return
        # What a tokenizer adds at the beginning belongs at a document's; a chat template has written it already.
        special = begins and isinstance(content, str)
        content = checked_content(content, tokenizer, path)
        if isinstance(content, str):
            # No more of a long document than could be asked for: a token more, for the word that is cut.
            text = content[: (left + 1) * longest]
            row = row + encode_text(tokenizer, text, add_special_tokens=special)
        else:
            row = row + encode_chat(tokenizer, content, max_tokens=left + 1)
        whole = len(row) // max_length * max_length
        for start in range(0, whole, max_length):
            yield row[start : start + min(max_length, left)]
            left -= min(max_length, left)
            if left <= 0:
                return
        row = row[whole:]
    if row:
        yield row[:left]


def checked_content(content: Content, tokenizer: Any, path: Path) -> Content:
    """
    A piece that the tokenizer can encode.

    Raises:
        ValueError: messages, and a tokenizer without a chat template.
    """
    if not isinstance(content, str) and not tokenizer.chat_template:
        raise ValueError(
            f"--text {path} holds messages, and the checkpoint's tokenizer has no chat template; give texts"
        )
    return content


def first_sentence(text: str) -> str:
    """Up to the first full stop, question or exclamation mark before a space, or the first empty line."""
    text = text.strip()
    end = re.search(r"(?<=[.!?])\s|\n\s*\n", text)
    return text if end is None else text[: end.start()].strip()


def _read_plain(path: Path) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    rest, position = "", 0
    with path.open("rb") as file:
        while data := file.read(_PIECE):
            text = _decoded(decoder, data, path, position)
            rest += text if position else text.removeprefix("\ufeff")
            position += len(data)
            end = max(rest.rfind("\n"), rest.rfind(" ") if len(rest) > _PIECE else -1) + 1
            if end:
                yield rest[:end]
                rest = rest[end:]
            elif len(rest) > 4 * _PIECE:  # a text without spaces
                yield rest
                rest = ""
        rest += _decoded(decoder, b"", path, position, final=True)
    yield rest


def _decoded(decoder: codecs.IncrementalDecoder, data: bytes, path: Path, position: int, final: bool = False) -> str:
    pending = len(decoder.getstate()[0])
    try:
        return decoder.decode(data, final)
    except UnicodeDecodeError as error:
        where = position - pending + error.start
        raise ValueError(
            f"--text {path} is not UTF-8 ({error.reason}: {error.object[error.start]:#04x} at {where}); convert it"
        ) from error


def _content_of(place: str, row: dict[str, Any]) -> Content | None:
    """None for an empty row."""
    for form in _TASK_FORMATS:
        if all(column in row for column in _COLUMNS.of_format(form)):
            break
    else:
        raise ValueError(
            f"{place}: its columns are {', '.join(map(str, row)) or 'none'}; a task set's rows have a text, messages, or a "
            "prompt and a completion"
        )
    check_columns(place, row, _COLUMNS, form)
    if form == "text":
        return checked_text(row["text"], "text", place)
    if form == "messages":
        return checked_messages(row["messages"], "messages", place)
    prompt = checked_turns(row["prompt"], "prompt", place)
    completion = checked_turns(row["completion"], "completion", place)
    if prompt is None or completion is None:
        return None
    if isinstance(prompt, str) and isinstance(completion, str):
        return prompt + completion
    if isinstance(prompt, list) and isinstance(completion, list):
        return continued(prompt, completion, f"{place}: 'completion'")
    raise ValueError(f"{place}: 'prompt' and 'completion' must be both texts or both messages")
