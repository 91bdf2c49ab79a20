"""The text of tokens that come one by one, also where their bytes are no UTF-8."""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

_BYTE = re.compile("<0x([0-9A-F]{2})>")


class TextStream:
    """
    Takes the place of `tokenizers.decoders.DecodeStream`, which raises where a tokenizer falls back to bytes and a run of
    them turns out to be no UTF-8: the library's decoding then takes back what it had given before.

    Here a character is given when it is complete, and what is none becomes U+FFFD. Special tokens are left out.
    """

    def __init__(self):
        self._words = DecodeStream([], skip_special_tokens=True)
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace")
        self._after_bytes = self._begun = False

    def step(self, tokenizer: Tokenizer, token_id: int) -> str | None:
        """
        Args:
            tokenizer: of the tokens; the same in every call.
            token_id: the next one.

        Returns:
            The text that is complete now and was not before, or None.
        """
        if byte := _BYTE.fullmatch(tokenizer.id_to_token(token_id) or ""):
            text = self._bytes.decode(bytes.fromhex(byte[1]))
            if text == " " and not self._begun:
                text = tokenizer.decode([token_id])  # which leaves a space in front of the whole text out
            self._after_bytes = self._begun = True
            return text or None
        text = ""
        if self._after_bytes:
            text = self._bytes.decode(b"", final=True)
            self._bytes.reset()
            # A token has its leading space where a text is before it: its own, if need be. A special one has none.
            self._words = DecodeStream([token_id], skip_special_tokens=True)
            self._after_bytes = not tokenizer.decode([token_id] * 2)
        text += self._words.step(tokenizer, token_id) or ""
        self._begun |= bool(text)
        return text or None


class _Search:
    """
    Search for one text in another that comes in pieces, by Knuth, Morris and Pratt: in time that is linear in both.

    Attributes:
        begun: how many of its first letters end the text so far; no text that is found counts.
    """

    def __init__(self, wanted: str):
        self._wanted = wanted
        # Of each beginning of `wanted`: the longest shorter one that ends it.
        self._shorter = [0] * (len(wanted) + 1)
        length = 0
        for place in range(1, len(wanted)):
            while length and wanted[length] != wanted[place]:
                length = self._shorter[length]
            length += wanted[length] == wanted[place]
            self._shorter[place + 1] = length
        self.begun = 0

    def step(self, piece: str) -> int | None:
        """Where in this piece the text begins that is complete for the first time; below zero, in an earlier one."""
        begun, wanted = self.begun, self._wanted
        if not begun and wanted[0] not in piece:
            return None
        for place, letter in enumerate(piece):
            while begun and wanted[begun] != letter:
                begun = self._shorter[begun]
            begun += wanted[begun] == letter
            if begun == len(wanted):
                return place + 1 - begun
        self.begun = begun
        return None


class TextUntil(TextStream):
    """
    The text before the first of some others. What may be the beginning of one is held back until it is known.

    Attributes:
        ids: of all tokens so far.
        has_stopped: whether the text has ended before a stop.
    """

    def __init__(self, stops: Sequence[str], when_found: Callable[[], object]):
        """
        Args:
            stops: where to stop; none of them empty. Without any, nothing is held back.
            when_found: called once.
        """
        super().__init__()
        self.ids: list[int] = []
        self._searches = [_Search(stop) for stop in stops]
        self._when_found = when_found
        self._held, self.has_stopped = "", False

    def step(self, tokenizer: Tokenizer, token_id: int) -> str | None:
        self.ids.append(token_id)
        text = None if self.has_stopped else super().step(tokenizer, token_id)
        if text is None:
            return None
        held = self._held + text
        places = [place for search in self._searches if (place := search.step(text)) is not None]
        if places:
            # Counted from the end of what was held.
            whole = held[: len(self._held) + min(places)]
            self._held, self.has_stopped = "", True
            self._when_found()
            return whole or None
        known = len(held) - max((search.begun for search in self._searches), default=0)
        self._held = held[known:]
        return held[:known] or None

    def rest(self) -> str:
        """What was held back and has not become a stop, at the end."""
        held, self._held = self._held, ""
        return held


def text_until(text: str, stops: Sequence[str]) -> str:
    """What is before the first of `stops`; all of it where there is none."""
    return text[: min((place for stop in stops if (place := text.find(stop)) >= 0), default=len(text))]
