"""Long texts are encoded in pieces, or as far as they are wanted, with exactly the ids of the whole text."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from grinmoe.tokenization import build_tokenizer, encode_chat, encode_chat_with_mask, encode_text, long_text
from grinmoe.tokenization import chat as chat_module
from grinmoe.tokenization.long_text import LongTexts
from tests.tokenization.tokenizer_files import TEXT

WORDS = [
    "the",
    "lazy dog",
    "banana",
    "aaaa",
    "a",
    " ",
    "  ",
    "\n",
    "é",
    "中文",
    "▁",
    "x▁ y",
    "1 2",
    "<|end|>",
    " <|user|> ",
    "<|",
]
TEXTS = st.lists(st.sampled_from(WORDS), max_size=60).map("".join) | st.text(max_size=40)
FEW = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def tokenizer():
    # Many merges of few letters, so that tokens depend on what follows far behind.
    return build_tokenizer([*TEXT, "a" * 37, "aab" * 9, "the lazy dog"] * 3, 420)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(long_text, "_PIECE", 8)
    monkeypatch.setattr(chat_module, "_SHORT", 8)


@FEW
@given(text=TEXTS)
def test_pieces_have_ids_offsets_and_tokens_of_the_whole(tokenizer, text):
    whole = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
    texts = LongTexts(tokenizer.backend_tokenizer)
    found = texts.encode(text, None, True)
    assert (found.ids, found.offsets, found.tokens) == (whole.ids, whole.offsets, whole.tokens)
    assert texts.ids(text, None, False) == whole.ids


@FEW
@given(text=TEXTS, limit=st.integers(1, 12), tail=st.sampled_from(["", "a", "aaab", " <|end|>", "é"]))
def test_first_ids_of_a_text_are_those_of_the_whole(tokenizer, text, limit, tail):
    for long in (text * 9 + tail, text.replace(" ", "") * 30 + tail):
        whole = tokenizer.backend_tokenizer.encode(long, add_special_tokens=False).ids
        assert LongTexts(tokenizer.backend_tokenizer).ids(long, limit, False) == whole[:limit]
        assert encode_text(tokenizer, long, with_control_tokens=True, max_tokens=limit) == whole[:limit]


@FEW
@given(text=TEXTS, limit=st.integers(1, 40))
def test_first_ids_of_a_chat_are_those_of_the_whole(tokenizer, text, limit):
    messages = [{"role": "user", "content": text * 3}, {"role": "assistant", "content": text * 5}]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(long_text, "_PIECE", 10**6)
        patch.setattr(chat_module, "_SHORT", 10**6)
        ids, mask = encode_chat_with_mask(tokenizer, messages)
    assert encode_chat(tokenizer, messages) == ids
    assert encode_chat_with_mask(tokenizer, messages) == (ids, mask)
    assert encode_chat(tokenizer, messages, max_tokens=limit) == ids[:limit]
    assert encode_chat_with_mask(tokenizer, messages, max_tokens=limit) == (ids[:limit], mask[:limit])


@pytest.mark.parametrize("text", ["a" * 3000, "aab" * 1000, "中" * 3000, "\n" * 3000, "banana" * 500])
def test_first_ids_of_a_text_without_spaces_come_from_its_beginning(tokenizer, text, monkeypatch):
    whole, encoded = tokenizer.backend_tokenizer.encode(text).ids, []
    texts = LongTexts(tokenizer.backend_tokenizer)
    original = texts._part
    monkeypatch.setattr(texts, "_part", lambda text, *more: encoded.append(len(text)) or original(text, *more))
    assert texts.ids(text, 16, False) == whole[:16]
    assert max(encoded) < 2000


def test_a_long_text_is_encoded_in_pieces_of_bounded_length(tokenizer, monkeypatch):
    text, encoded = "the lazy dog " * 1000, []
    texts = LongTexts(tokenizer.backend_tokenizer)
    original = texts._part
    monkeypatch.setattr(texts, "_part", lambda text, *more: encoded.append(len(text)) or original(text, *more))
    assert texts.ids(text, None, False) == tokenizer.backend_tokenizer.encode(text).ids
    assert max(encoded) < 32
    encoded.clear()
    texts.ids(text, 16, False)
    assert sum(encoded) < 200


def test_text_that_can_only_be_encoded_whole_is_refused_beyond_the_limit(tokenizer, monkeypatch):
    monkeypatch.setattr(long_text, "LONGEST_WHOLE_TEXT", 1000)
    with pytest.raises(ValueError, match="1001 characters follow without a place to cut them at, and at most 1000"):
        encode_text(tokenizer, "a" * 1001)
    other = Tokenizer(models.BPE({"a": 0}, []))
    other.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(ValueError, match="at most 1000 are encoded at once"):
        LongTexts(other).ids("a " * 501, 4, False)
    assert LongTexts(other).ids("a " * 500, 4, False) == [0] * 4
