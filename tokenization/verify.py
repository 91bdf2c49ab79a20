"""Hold a tokenizer against vectors: strings and the ids that they must become.

Two kinds of file are read.

`*.json`: an object from string to list of ids, as the tokenizer gives them when it is called. Five keys have a meaning of
their own and need not be there. A text as value is for them alone, so "dec" with a list of ids is a string like any other.

    {"Hello": [15043], "<|user|>\\nHello": [32010, 15043],
     "TPL_gen": "...",     the rendered chat template, with generation prompt, of this conversation: system
                           "You are a helpful AI assistant.", user " Hi\\n", assistant "Yo"
     "TPL_nogen": "...",   the same without generation prompt
     "TPL_ids": [...],     the ids of TPL_gen
     "dec": "...",         what decoding gives for the ids of "<|user|>\\nHello<|end|>\\n<|assistant|>\\n"
     "dec2": "..."}        ... and of "Hello  world \\n x"

`*.inp`: as llama.cpp has them. Each string is followed by a line feed, `__ggml_vocab_test__` and a line feed; all else, line
feeds too, is part of a string. The file `*.out` beside it has one line of ids for each. They are without the tokens that a
tokenizer puts around a text (beginning of sequence).
"""

from __future__ import annotations

import io
import json
import os
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from transformers import AutoTokenizer

from .loading import TokenizerError, check_tokenizer, load_tokenizer, vocab_size_beside
from .options import VerifyOptions

_CONVERSATION = [
    {"role": "system", "content": "You are a helpful AI assistant."},
    {"role": "user", "content": " Hi\n"},
    {"role": "assistant", "content": "Yo"},
]
_SEPARATOR = "\n__ggml_vocab_test__\n"
_SHOWN_BEFORE, _SHOWN_AFTER = 4, 8  # tokens around the place where two sequences part
_SHOWN_CHARACTERS = 200
_LARGEST = 10**9 - 1  # id; the library takes 32 bits


@dataclass(frozen=True)
class Vector:
    """
    One thing that a tokenizer must do.

    Args:
        name: the string, or a key with a meaning of its own.
        expected: ids, or a text.
        key: whether `name` is such a key.
        add_special_tokens: whether `expected` has the tokens that the tokenizer puts around a text.
    """

    name: str
    expected: list[int] | str
    key: bool = False
    add_special_tokens: bool = True


@dataclass(frozen=True)
class Difference:
    """What a tokenizer gave where `vector` expects something else."""

    vector: Vector
    got: list[int] | str

    @property
    def position(self) -> int:
        """Where the two part: number of the first token, or character, that differs."""
        both = zip(self.vector.expected, self.got)
        shorter = min(len(self.vector.expected), len(self.got))
        return next((number for number, (one, other) in enumerate(both) if one != other), shorter)

    def describe(self, tokenizer: Any) -> str:
        """Several lines: the string, what was expected and what came, and a mark where they part."""
        expected, got = self.vector.expected, self.got
        name = self.vector.name if self.vector.key else _shortened(repr(self.vector.name))
        if isinstance(expected, list) and isinstance(got, list):
            what = f"token {self.position + 1} (expected are {len(expected)}, got {len(got)})"
            lines = [_token_line(tokenizer, ids, self.position) for ids in (expected, got)]
        elif isinstance(expected, str) and isinstance(got, str):
            what = f"character {self.position + 1}"
            lines = [_text_line(text, self.position) for text in (expected, got)]
        else:
            what, lines = "the start", [(str(expected), 0), (str(got), 0)]
        (first, mark), (second, _) = lines
        return f"{name} parts at {what}\n  expected  {first}\n  got       {second}\n            {' ' * mark}^"


def read_vectors(path: str | os.PathLike) -> list[Vector]:
    """
    Read vectors; the formats are described at the top of this module.

    Args:
        path: a `*.json`, or a `*.inp` with a `*.out` beside it.

    Raises:
        ValueError: there is no such file, it is malformed, or it holds nothing; says what to do.
    """
    file = Path(path)
    if file.suffix.lower() not in (".json", ".inp"):
        raise ValueError(f"--vectors {file} is of no known format; give a *.json, or llama.cpp's *.inp (not its *.out)")
    try:
        vectors = _of_json(_text(file)) if file.suffix.lower() == ".json" else _of_llama_cpp(_text(file), file)
    except ValueError as error:
        raise ValueError(f"--vectors {file}: {error}") from error
    if not vectors:
        raise ValueError(f"--vectors {file} holds no strings, so nothing would be verified; give another file")
    return vectors


def _text(file: Path) -> str:
    if not file.is_file():
        raise ValueError(f"there is no file {file.name}; give the path of one")
    try:
        return file.read_bytes().decode("utf-8-sig")  # not read_text: line feeds stay what they are
    except UnicodeDecodeError as error:
        raise ValueError(f"{file.name} is not UTF-8 ({error}); take the original file again") from error


def _of_json(text: str) -> list[Vector]:
    try:
        content = json.loads(text, object_pairs_hook=_without_repetition)
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON ({error}); take the original file again") from error
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}; give an object from string to list of ids")
    return [_vector(name, value) for name, value in content.items()]


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it has {next(name for name in names if names.count(name) > 1)!r} twice; remove one")
    return content


def _vector(name: str, value: Any) -> Vector:
    if any("\ud800" <= character <= "\udfff" for character in name + (value if isinstance(value, str) else "")):
        raise ValueError(
            f"{name!r} or its value has half a surrogate pair, which is no text; write the whole character"
        )
    if isinstance(value, str):
        if name not in _KEYS or name == "TPL_ids":
            raise ValueError(
                f"{name!r} has a text as value; give its ids (texts are for TPL_gen, TPL_nogen, dec, dec2)"
            )
        return Vector(name, value, key=True)
    if not isinstance(value, list) or not all(type(number) is int and 0 <= number <= _LARGEST for number in value):
        raise ValueError(f"{name!r} has the value {_shortened(repr(value))}; give a list of ids, whole numbers from 0")
    return Vector(name, value, key=name == "TPL_ids")


def _of_llama_cpp(text: str, file: Path) -> list[Vector]:
    *strings, rest = text.split(_SEPARATOR)
    if rest:
        raise ValueError(
            f"it does not end in a line __ggml_vocab_test__ and a line feed, but in {rest[-40:]!r}; take the original "
            "file again (line ends must not be changed)"
        )
    answers = file.with_suffix(".out")
    lines = _text(answers).splitlines()
    if len(lines) != len(strings):
        raise ValueError(
            f"it has {len(strings)} strings, {answers.name} {len(lines)} lines; take both from one version"
        )
    vectors = []
    for number, (string, line) in enumerate(zip(strings, lines), start=1):
        if not all(re.fullmatch(r"[0-9]{1,9}", part) for part in line.split()):
            raise ValueError(
                f"line {number} of {answers.name} is {_shortened(repr(line))}; give ids with spaces between"
            )
        vectors.append(Vector(string, [int(part) for part in line.split()], add_special_tokens=False))
    return vectors


def verify_tokenizer(tokenizer: Any, vectors: Iterable[Vector]) -> list[Difference]:
    """
    Hold a tokenizer against vectors.

    Args:
        tokenizer: any tokenizer of Transformers.
        vectors: as from `read_vectors`.

    Returns:
        One difference for every vector that the tokenizer does not agree with, in their order; empty if it agrees with all.
    """
    results = [(vector, _result(tokenizer, vector)) for vector in vectors]
    return [Difference(vector, got) for vector, got in results if got != vector.expected]


def _result(tokenizer: Any, vector: Vector) -> list[int] | str:
    if vector.key:
        return _KEYS[vector.name](tokenizer)
    return _ids(tokenizer, vector.name, vector.add_special_tokens)


def _ids(tokenizer: Any, text: str, add_special_tokens: bool = True) -> list[int]:
    return tokenizer(text, add_special_tokens=add_special_tokens, verbose=False).input_ids


def _chat(tokenizer: Any, add_generation_prompt: bool, tokenize: bool) -> list[int] | str:
    if not tokenizer.chat_template:
        return "(the tokenizer has no chat template)"
    options = {"add_generation_prompt": add_generation_prompt, "tokenize": tokenize, "return_dict": False}
    try:
        return tokenizer.apply_chat_template(_CONVERSATION, **options)
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        return f"(the chat template fails: {error})"


# What is asked of the tokenizer for a key with a meaning of its own.
_KEYS: dict[str, Callable[[Any], list[int] | str]] = {
    "TPL_gen": lambda tokenizer: _chat(tokenizer, add_generation_prompt=True, tokenize=False),
    "TPL_nogen": lambda tokenizer: _chat(tokenizer, add_generation_prompt=False, tokenize=False),
    "TPL_ids": lambda tokenizer: _chat(tokenizer, add_generation_prompt=True, tokenize=True),
    "dec": lambda tokenizer: tokenizer.decode(_ids(tokenizer, "<|user|>\nHello<|end|>\n<|assistant|>\n")),
    "dec2": lambda tokenizer: tokenizer.decode(_ids(tokenizer, "Hello  world \n x")),
}


def _token_line(tokenizer: Any, ids: list[int], position: int) -> tuple[str, int]:
    """The tokens around `position`, and the column where that one begins."""
    first, last = max(position - _SHOWN_BEFORE, 0), position + _SHOWN_AFTER
    cells = [f"{number} {tokenizer.convert_ids_to_tokens(number)!r}" for number in ids[first:last]]
    before = ["..."] * (first > 0) + cells[: position - first]
    after = (cells[position - first :] or ["(end)"]) + ["..."] * (last < len(ids))
    mark = len(" | ".join([*before, ""]))
    return " | ".join([*before, *after]), mark


def _text_line(text: str, position: int) -> tuple[str, int]:
    """The characters around `position`, escaped as in JSON, and the column of that one."""
    first, last = max(position - 5 * _SHOWN_BEFORE, 0), position + 5 * _SHOWN_AFTER
    before, after = (json.dumps(part, ensure_ascii=False)[1:-1] for part in (text[first:position], text[position:last]))
    before = ("..." if first > 0 else "") + '"' + before
    return before + after + '"' + ("..." if last < len(text) else ""), len(before)


def _shortened(text: str) -> str:
    if len(text) <= _SHOWN_CHARACTERS:
        return text
    return f"{text[:_SHOWN_CHARACTERS]}... ({len(text)} characters)"


def run_verify(options: VerifyOptions) -> int:
    """
    The command `grinmoe tokenizer verify`: print what differs, string by string, and a summary.

    Returns:
        Exit code: 0 if the tokenizer agrees with all vectors, else 1.

    Raises:
        ValueError: the vectors cannot be read, or the tokenizer cannot be loaded.
    """
    folder = options.tokenizer
    wanted = read_vectors(options.vectors)
    if not Path(folder).is_dir():
        raise ValueError(f"there is no folder {folder}; give the folder of a tokenizer, or of a model with one")
    tokenizer = _load_auto(folder) if options.auto else load_tokenizer(folder, check=False)
    differences = verify_tokenizer(tokenizer, wanted)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Tokens are of any script, and some terminals of one only.
        sys.stdout.reconfigure(errors="backslashreplace")
    for difference in differences:
        print(difference.describe(tokenizer), end="\n\n")
    print(f"{type(tokenizer).__name__}: {len(wanted) - len(differences)} of {len(wanted)} agree")
    try:
        check_tokenizer(tokenizer, vocab_size_beside(folder))
    except TokenizerError as error:  # what may be behind the differences, and how to mend it
        print(f"note: {error}")
    return 1 if differences else 0


def _load_auto(folder: str | os.PathLike) -> Any:
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"AutoTokenizer cannot load {folder}: {error}; see that it holds a whole tokenizer") from error
