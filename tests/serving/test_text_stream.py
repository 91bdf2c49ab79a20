"""Text of tokens that come one by one: what the whole is decoded to, and no error where bytes are no text."""

from __future__ import annotations

import functools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.decoders import DecodeStream

from grinmoe.serving.text_stream import TextStream, TextUntil, text_until
from grinmoe.tokenization import build_tokenizer

TOKENIZER = build_tokenizer(["Hello there, how are you today?", "What is a red stone?"] * 10, 340)
BYTES = range(3, 3 + 256)


def streamed(ids: list[int]) -> list[str | None]:
    stream = TextStream()
    return [stream.step(TOKENIZER._tokenizer, token_id) for token_id in ids]


def text_of(ids: list[int]) -> str:
    return "".join(piece or "" for piece in streamed(ids))


@pytest.mark.parametrize(
    "text",
    [
        "What is red?",
        "  two  spaces ",
        "\nWhat\n\n is\n",
        "\u00e9 What \u6222 is \U0001f642 a stone\nand",
        "\U0001f642\U0001f642",
        "red<|end|> What<|endoftext|>\n<|end|> is",
    ],
    ids=["words", "spaces", "lines", "bytes between words", "bytes alone", "special tokens"],
)
def test_the_pieces_are_the_text(text):
    ids = TOKENIZER(text)["input_ids"]
    assert text_of(ids) == TOKENIZER.decode(ids, skip_special_tokens=True)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, len(TOKENIZER) - 1), max_size=12))
def test_any_tokens_give_some_text(ids):
    whole, found = TOKENIZER.decode(ids, skip_special_tokens=True), text_of(ids)
    if "\ufffd" not in whole + found:  # a special token between two bytes keeps them apart here
        assert found == whole


def test_a_character_is_given_when_it_is_whole():
    smile = [3 + byte for byte in "\U0001f642".encode()]
    assert streamed(smile) == [None, None, None, "\U0001f642"]


def test_what_is_no_character_becomes_one_and_the_rest_stays():
    """The library's decoder gives "q", then takes it back, and ends the stream with that."""
    ids = [3 + ord("q"), 3 + 0xE6, *TOKENIZER("What")["input_ids"]]
    library = DecodeStream([], skip_special_tokens=True)
    with pytest.raises(Exception, match="Invalid prefix"):
        list(map(functools.partial(library.step, TOKENIZER._tokenizer), ids))
    assert text_of(ids) == "q\ufffd What"


def naive(pieces: list[str], stops: list[str]) -> tuple[list[str], bool, str]:
    """What `TextUntil` gives for each piece, whether it has stopped, and the rest: found by looking at everything again."""
    given_out, held = [], ""
    for piece in pieces:
        held += piece
        whole = text_until(held, stops)
        if len(whole) < len(held):
            return [*given_out, whole], True, ""
        kept = max((n for stop in stops for n in range(1, len(stop)) if whole.endswith(stop[:n])), default=0)
        given_out.append(whole[: len(whole) - kept])
        held = whole[len(whole) - kept :]
    return given_out, False, held


class Pieces:
    """A tokenizer whose tokens are these texts."""

    def __init__(self, pieces: list[str]):
        self.pieces = pieces


def until_of(pieces: list[str], stops: list[str], monkeypatch) -> tuple[list[str], bool, str]:
    monkeypatch.setattr(TextStream, "step", lambda self, tokenizer, token_id: tokenizer.pieces[token_id] or None)
    until = TextUntil(stops, lambda: None)
    given_out = []
    for place in range(len(pieces)):
        if until.has_stopped:
            break
        given_out.append(until.step(Pieces(pieces), place) or "")
    return given_out, until.has_stopped, until.rest()


@settings(max_examples=500, deadline=None)
@given(
    st.lists(st.text("ab\u00e9", max_size=6), max_size=12),
    st.lists(st.text("ab\u00e9", min_size=1, max_size=7), max_size=4),
)
def test_stops_in_pieces_of_any_size_are_found_as_by_looking_at_everything(pieces, stops):
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert until_of(pieces, stops, monkeypatch) == naive(pieces, stops)


def test_search_for_a_stop_takes_steps_in_proportion_to_the_text():
    """A stop of a million letters that begins again and again; by looking at everything it would take hours."""
    size = 10**6
    until = TextUntil(["a" * size + "b"], lambda: None)
    (search,) = until._searches
    assert search.step("a" * size) is None and search.begun == size
    assert search.step("a" * size) is None and search.begun == size
    assert search.step("xb") is None and search.begun == 0
    assert search.step("a" * size + "b") == 0


@settings(max_examples=200, deadline=None)
@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_a_stop_that_comes_in_pieces_is_found_when_it_is_whole(text, stops):
    """The one that is complete first counts."""
    found = []
    until = TextUntil(stops, lambda: found.append(True))
    ids = [3 + ord(letter) for letter in text]
    pieces = [until.step(TOKENIZER._tokenizer, token_id) or "" for token_id in ids]
    ends = (end for end in range(len(text) + 1) if text_until(text[:end], stops) != text[:end])
    expected = text_until(text[: next(ends, len(text))], stops)
    assert "".join(pieces) + until.rest() == expected
    assert len(found) == (expected != text)
    assert until.ids == ids
