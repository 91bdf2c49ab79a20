"""The demo's text: read whole, split by question, the same on every machine, rendered as chat."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from grinmoe.demo.chat_corpus import encode, load_corpus, preference_pairs, texts, write_examples
from grinmoe.tokenization import build_tokenizer

pytestmark = pytest.mark.newest_only  # reads files


@pytest.fixture(scope="module")
def corpus():
    return load_corpus()


@pytest.fixture(scope="module")
def tokenizer(corpus):
    return build_tokenizer(texts(corpus.train), vocab_size=512)


def test_no_question_is_in_both_parts(corpus):
    asked = [{conversation[0]["content"].lower() for conversation in part} for part in (corpus.train, corpus.held_out)]
    assert not asked[0] & asked[1]
    assert 0.05 < len(corpus.held_out) / (len(corpus.train) + len(corpus.held_out)) < 0.15


def test_no_conversation_comes_twice(corpus):
    rendered = [str(conversation) for conversation in corpus.train + corpus.held_out]
    assert len(rendered) == len(set(rendered))


def test_every_question_and_answer_of_the_source_is_there(corpus):
    """Counted independently of the reader: the distinct (question, answer) pairs of one plain file."""
    folder = Path(find_spec("chatterbot_corpus").origin).parent / "data" / "english"
    entries = yaml.safe_load((folder / "ai.yml").read_text(encoding="utf-8"))["conversations"]
    expected = {(entry[0].strip(), answer.strip()) for entry in entries for answer in entry[1:]}
    found = {tuple(m["content"] for m in conversation) for conversation in corpus.train + corpus.held_out}
    assert expected <= found


def test_turns_alternate_from_user_to_assistant(corpus):
    for conversation in corpus.train + corpus.held_out:
        assert [message["role"] for message in conversation] == ["user", "assistant"] * (len(conversation) // 2)
        assert all(message["content"].strip() for message in conversation)


def test_the_split_is_the_same_every_time(corpus):
    again = load_corpus()
    assert (again.train, again.held_out) == (corpus.train, corpus.held_out)


def test_a_larger_held_out_share_keeps_what_was_held_out(corpus):
    """A question's part hangs on its own text alone, so nothing wanders from training to evaluation and back."""
    larger = load_corpus(held_out_share=0.3)
    assert all(conversation in larger.held_out for conversation in corpus.held_out)
    assert len(larger.held_out) > 2 * len(corpus.held_out)


def test_rows_are_the_rendered_chat_and_every_token_is_a_target(corpus, tokenizer):
    conversation = corpus.train[0]
    (row,) = encode([conversation], tokenizer, length=1000)
    text = tokenizer.decode(row["input_ids"])
    assert text.startswith("<|user|>") and text.endswith("<|end|><|endoftext|>")
    assert all(message["content"] in text for message in conversation)
    assert row["labels"] == row["input_ids"]
    assert row["length"] == len(row["input_ids"])


def test_long_rows_are_cut(corpus, tokenizer):
    rows = encode(corpus.train, tokenizer, length=20)
    assert max(row["length"] for row in rows) == 20


def test_without_the_corpus_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "chatterbot_corpus", None)
    with pytest.raises(ImportError, match=r"pip install 'grinmoe\[train\]'"):
        load_corpus()


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    """The rows of every file that `write_examples` writes."""
    files = write_examples(tmp_path_factory.mktemp("examples") / "new")
    return {
        name: [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        for name, file in files.items()
    }


def test_the_examples_are_the_corpus_as_chats_and_as_pairs(examples, corpus):
    assert examples.keys() == {"chat", "chat-held-out", "preference", "preference-held-out"}
    for suffix, part in (("", corpus.train), ("-held-out", corpus.held_out)):
        assert [row["messages"] for row in examples["chat" + suffix]] == part
        assert [row["prompt"] + row["chosen"] for row in examples["preference" + suffix]] == part


def test_a_rejected_answer_is_the_answer_to_another_question(examples):
    for name in ("preference", "preference-held-out"):
        true_answers: dict[str, set[str]] = {}
        for row in examples[name]:
            true_answers.setdefault(str(row["prompt"]), set()).add(row["chosen"][0]["content"])
        all_answers = set().union(*true_answers.values())
        for row in examples[name]:
            (rejected,) = row["rejected"]
            assert rejected["role"] == "assistant"
            assert rejected["content"] in all_answers - true_answers[str(row["prompt"])]
    assert len({row["rejected"][0]["content"] for row in examples["preference"]}) > 300


def test_no_question_or_answer_of_a_pair_crosses_over_to_the_other_part(examples):
    asked = [{row["prompt"][0]["content"].lower() for row in examples[name]} for name in sorted(examples)[2:]]
    assert all(asked) and not asked[0] & asked[1]


def test_examples_are_the_same_bytes_every_time(tmp_path):
    first, second = write_examples(tmp_path / "a"), write_examples(tmp_path / "b")
    assert all(first[name].read_bytes() == second[name].read_bytes() for name in first)


def test_pairs_of_one_question_alone_are_refused():
    with pytest.raises(ValueError, match="the same question"):
        preference_pairs([[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]] * 2)
