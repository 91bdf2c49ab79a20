"""The text of tokens that come one by one, also where their bytes are no UTF-8."""

from __future__ import annotations

import codecs
import re

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


__all__ = ["TextStream"]
