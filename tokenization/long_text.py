"""Encode long texts in bounded memory, with exactly the ids that the tokenizer gives the whole text.

A tokenizer of this family has no pre-tokenizer: a document is one piece for it, and encoding one of 60 MB takes more than
a minute and 7 GB. Here it is encoded in pieces, and only as far as its ids are wanted. Two facts make that exact.

- No merge reaches across a place where no token of the vocabulary has the two characters side by side. A text is cut at
  spaces behind a character that no token has in front of a space. The normaliser puts that space back in front of the rest.
- Whatever follows, the ids of a text begin with those of one of its beginnings of W to W + m - 1 characters, where m is the
  length of the longest token: the byte-pair encoding of a text is that of its two parts, wherever a token ends between them.
  Where all these beginnings agree on the first ids, those are the ids.

Other tokenizers encode a text whole, up to `LONGEST_WHOLE_TEXT` characters.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from tokenizers import Tokenizer

LONGEST_WHOLE_TEXT = 2**24
_PIECE = 2**17
_SPACE = "▁"
# Unicode keeps these characters for the inside of programs; chat.py marks texts with them.
MARKS = "[\ufdd0-\ufdef]"
_FAMILY_NORMALIZERS = (
    {"type": "Prepend", "prepend": _SPACE},
    {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE},
)


# Ids, the characters of each, and its name.
_Part = tuple[list[int], list[tuple[int, int]], list[str]]


@dataclass
class Encoded:
    """Ids with the characters that each stands for, (begin, end), and its name."""

    ids: list[int]
    offsets: list[tuple[int, int]]
    tokens: list[str]


class LongTexts:
    """Encodes texts of any length with one tokenizer."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._is_exact: bool | None = None

    def encode(self, text: str, max_tokens: int | None, add_special_tokens: bool) -> Encoded:
        """
        Encode a text, as far as `max_tokens` ids.

        Raises:
            ValueError: the text is long, and there is no place to cut it at.
        """
        found = Encoded([], [], [])
        for ids, offsets, tokens in self._parts(text, max_tokens, add_special_tokens):
            found.ids += ids
            found.offsets += offsets
            found.tokens += tokens
        return found

    def ids(self, text: str, max_tokens: int | None, add_special_tokens: bool) -> list[int]:
        """The ids alone, for which a long text takes a tenth of the memory; arguments and errors as of `encode`."""
        return [token for part in self._parts(text, max_tokens, add_special_tokens) for token in part[0]]

    def _parts(self, text: str, max_tokens: int | None, add_special_tokens: bool) -> Iterator[_Part]:
        limit = sys.maxsize if max_tokens is None else max_tokens
        if len(text) <= _PIECE or not self._can_be_cut(add_special_tokens):
            self._check_length(text, 0)
            yield self._part(text, 0, limit, add_special_tokens)
            return
        begin = 0
        for end, following in self._cuts(text):
            part = None
            if begin == 0 and end > 2 * _PIECE and max_tokens is not None:
                part = self._beginning(text, limit)
            if part is None:
                self._check_length(text[begin:end], begin)
                part = self._part(text[begin:end], begin, limit, False)
            yield part
            limit -= len(part[0])
            begin = following
            if limit <= 0:
                return

    def _part(self, text: str, begin: int, limit: int, add_special_tokens: bool) -> _Part:
        encoding = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        if len(encoding) > limit:
            encoding.truncate(limit)
        offsets = encoding.offsets
        if begin:
            offsets = [(begin + one, begin + other) for one, other in offsets]
            # The space where the text was cut.
            offsets[0] = (begin - 1, begin if encoding.tokens[0] == _SPACE else offsets[0][1])
        return encoding.ids, offsets, encoding.tokens

    def _can_be_cut(self, add_special_tokens: bool) -> bool:
        if self._is_exact is None:
            self._learn()
        return bool(self._is_exact) and not (add_special_tokens and self._tokenizer.num_special_tokens_to_add(False))

    @staticmethod
    def _check_length(text: str, begin: int) -> None:
        if len(text) > LONGEST_WHOLE_TEXT:
            raise ValueError(
                f"from character {begin} on, {len(text)} characters follow without a place to cut them at, and at most "
                f"{LONGEST_WHOLE_TEXT} are encoded at once; write the text in several rows, or with spaces"
            )

    def _learn(self) -> None:
        """Whether the tokenizer is of the kind that the two facts hold for, and what they need."""
        content: Any = json.loads(self._tokenizer.to_str())
        model, normalizer = content["model"], content["normalizer"] or {}
        steps = [normalizer] if normalizer else []
        while any(step["type"] == "Sequence" for step in steps):
            steps = [one for step in steps for one in (step["normalizers"] if step["type"] == "Sequence" else [step])]
        steps = [step for step in steps if not _deletes_marks(step)]
        added = content["added_tokens"]
        self._is_exact = (
            model["type"] == "BPE"
            and content["pre_tokenizer"] is None
            and tuple(steps) == _FAMILY_NORMALIZERS
            and not any(token["normalized"] for token in added)
            and not model.get("dropout")
            and not model.get("ignore_merges")
            and not model.get("continuing_subword_prefix")
            and not model.get("end_of_word_suffix")
        )
        if not self._is_exact:
            return
        vocabulary = set(model["vocab"])
        self._longest_token = max(map(len, vocabulary))
        contents = sorted((token["content"] for token in added if token["content"]), key=len, reverse=True)
        self._added = re.compile("|".join(map(re.escape, contents)) or "(?!)")
        self._has_lstrip = any(token["lstrip"] for token in added)
        self._margin = max(map(len, contents), default=0) + 1
        before_space = {one for token in vocabulary for one, other in pairwise(token) if other == _SPACE}
        self._before_space = before_space | {_SPACE}
        # Two unknown characters may become one token. Where there are bytes for all, none is unknown.
        has_bytes = model.get("byte_fallback") and all(f"<0x{byte:02X}>" in vocabulary for byte in range(256))
        self._known = None if has_bytes and ">" not in before_space else {one for one in vocabulary if len(one) == 1}

    def _cuts(self, text: str) -> Iterator[tuple[int, int]]:
        """Where pieces end and the next ones begin."""
        at = _PIECE
        while at < len(text):
            space = text.find(" ", at)
            if space < 0 or space + 1 >= len(text):
                break
            before, after = text[space - 1], text[space + 1]
            if (
                before not in self._before_space
                and not before.isspace()
                and not after.isspace()
                and (self._known is None or {before, after} <= self._known)
                and self._is_free(text, space, space + 1)
            ):
                yield space, space + 1
                at = space + _PIECE
            else:
                at = space + 1
        yield len(text), len(text)

    def _is_free(self, text: str, begin: int, end: int) -> bool:
        """Whether no added token is near."""
        return self._added.search(text, max(begin - self._margin, 0), end + self._margin) is None

    def _beginning(self, text: str, limit: int) -> _Part | None:
        """The first ids of a text that has no place to cut it at; None where its beginnings do not agree on them."""
        width = 8 * limit
        # Every character may have a mark beside it, which is deleted.
        window = 2 * self._longest_token + 2
        while width + window < min(len(text), LONGEST_WHOLE_TEXT // 64):
            is_swallowed = self._has_lstrip and text[width - 1].isspace()
            if not is_swallowed and self._is_free(text, width, width + window):
                first = self._part(text[:width], 0, limit, False)
                if len(first[0]) == limit and all(
                    self._tokenizer.encode(text[: width + more], add_special_tokens=False).ids[:limit] == first[0]
                    for more in range(1, window)
                ):
                    return first
            width *= 2
        return None


def _deletes_marks(step: dict[str, Any]) -> bool:
    """Whether a normaliser is the one of chat.py that deletes its marks."""
    pattern = step.get("pattern", {}).get("Regex", "")
    return step["type"] == "Replace" and not step["content"] and re.fullmatch(rf"\[{MARKS}{{3}}\]", pattern) is not None
