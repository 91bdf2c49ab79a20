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

import difflib
import io
import itertools
import json
import os
import re
import reprlib
import sys
from collections import Counter
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
_SHOWN_BEFORE, _SHOWN_AFTER = 4, 8  # tokens, or lines of a text, around the place where two sequences part
_SHORT = reprlib.Repr()
_SHORT.maxstring = 200
_LARGEST = 10**9 - 1  # id; the library takes 32 bits


@dataclass(frozen=True)
class Vector:
    """One thing that a tokenizer must do."""

    name: str  # the string, or a key with a meaning of its own
    expected: list[int] | str
    key: bool = False  # whether `name` is such a key
    add_special_tokens: bool = True  # whether `expected` has the tokens that the tokenizer puts around a text


@dataclass(frozen=True)
class Difference:
    """What a tokenizer gave where `vector` expects something else."""

    vector: Vector
    got: list[int] | str

    def describe(self, tokenizer: Any) -> str:
        """Name the string and the place where the two part, and show a diff of what stands around that place."""
        name = self.vector.name if self.vector.key else _SHORT.repr(self.vector.name)
        unit = "line" if isinstance(self.vector.expected, str) else "token"
        expected, got = (_lines(tokenizer, value) for value in (self.vector.expected, self.got))
        pairs = enumerate(itertools.zip_longest(expected, got))
        place = next(place for place, (one, other) in pairs if one != other)
        around = slice(max(place - _SHOWN_BEFORE, 0), place + _SHOWN_AFTER)
        diff = [line for line in difflib.ndiff(expected[around], got[around]) if not line.startswith("?")]
        counts = f"expected are {len(expected)}, got {len(got)}"
        return "\n".join([f"{name} parts at {unit} {place + 1} ({counts}; - expected, + got)", *diff])


def _lines(tokenizer: Any, value: list[int] | str) -> list[str]:
    """One line for each token, or for each line of a text."""
    if isinstance(value, str):
        return [repr(line) for line in value.splitlines(keepends=True)]
    return [f"{number} {tokenizer.convert_ids_to_tokens(number)!r}" for number in value]


def read_vectors(path: str | os.PathLike) -> list[Vector]:
    """Read a `*.json`, or a `*.inp` with its `*.out`; raises ValueError where one is missing, malformed or empty."""
    file = Path(path)
    readers = {".json": _of_json, ".inp": _of_llama_cpp}
    if file.suffix.lower() not in readers:
        raise ValueError(f"--vectors {file} is of no known format; give a *.json, or llama.cpp's *.inp (not its *.out)")
    try:
        vectors = readers[file.suffix.lower()](file)
    except ValueError as error:
        raise ValueError(f"--vectors {file}: {error}") from error
    if not vectors:
        raise ValueError(f"--vectors {file} holds no strings, so nothing would be verified; give another file")
    return vectors


def _text(file: Path) -> str:
    if file.exists() and not file.is_file():  # opening a FIFO would wait
        raise ValueError(f"{file.name} is not a file; give the original file")
    try:
        return file.read_bytes().decode("utf-8-sig")  # not read_text: line feeds stay what they are
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file.name} cannot be read as UTF-8 ({error}); give the original file") from error


def _of_json(file: Path) -> list[Vector]:
    try:
        content = json.loads(_text(file), object_pairs_hook=_without_repetition)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"it is not JSON ({error}); take the original file again") from error
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}; give an object from string to list of ids")
    return [_vector(name, value) for name, value in content.items()]


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"it has {twice!r} twice; remove one")
    return content


def _vector(name: str, value: Any) -> Vector:
    is_text = isinstance(value, str) and name in _KEYS and name != "TPL_ids"
    is_ids = isinstance(value, list) and all(type(number) is int and 0 <= number <= _LARGEST for number in value)
    if not is_text and not is_ids:
        raise ValueError(
            f"{name!r} has the value {_SHORT.repr(value)}; give a list of ids, whole numbers from 0 (a text for "
            "TPL_gen, TPL_nogen, dec and dec2 alone)"
        )
    if re.search(r"[\ud800-\udfff]", f"{name}{value}"):
        raise ValueError(f"{name!r} or its value has half a surrogate pair; write the whole character")
    return Vector(name, value, key=is_text or name == "TPL_ids")


def _of_llama_cpp(file: Path) -> list[Vector]:
    *strings, rest = _text(file).split(_SEPARATOR)
    if rest:
        raise ValueError(
            f"it does not end in a line __ggml_vocab_test__ and a line feed, but in {rest[-40:]!r}; take the original "
            "file again (line ends must not be changed)"
        )
    answers = file.with_suffix(".out")
    lines = _text(answers).splitlines()
    if len(lines) != len(strings):
        raise ValueError(
            f"it has {len(strings)} strings, {answers.name} {len(lines)} lines; both must be of one version"
        )
    vectors = []
    for number, (string, line) in enumerate(zip(strings, lines), start=1):
        if not all(re.fullmatch(r"[0-9]{1,9}", part) for part in line.split()):
            raise ValueError(f"line {number} of {answers.name} is {_SHORT.repr(line)}; give ids with spaces between")
        vectors.append(Vector(string, [int(part) for part in line.split()], add_special_tokens=False))
    return vectors


def verify_tokenizer(tokenizer: Any, vectors: Iterable[Vector]) -> list[Difference]:
    """What a tokenizer of Transformers gives otherwise than the vectors (see `read_vectors`) expect, in their order."""
    differences = []
    for vector in vectors:
        got = _KEYS[vector.name](tokenizer) if vector.key else _ids(tokenizer, vector.name, vector.add_special_tokens)
        if got != vector.expected:
            differences.append(Difference(vector, got))
    return differences


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
