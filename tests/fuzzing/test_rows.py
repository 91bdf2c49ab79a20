"""Rows of others: a ValueError that names the file and the line, or rows to train on."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grinmoe.data.dataset import DataOptions, load_data
from grinmoe.demo.chat_corpus import load_corpus, texts
from grinmoe.tokenization import build_tokenizer
from tests.fuzzing.strategies import as_json, json_values, tried, with_other_fields

pytestmark = pytest.mark.newest_only  # reads files

VOCABULARY = 512
CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}
ROWS = {
    "sft": [CHAT, {"prompt": "hi", "completion": "hello"}, {"text": "hi there"}],
    "pretrain": [{"text": "hi there"}],
    "dpo": [{"prompt": "hi", "chosen": "hello", "rejected": "go"}],
}
FIELDS = (
    "messages",
    "prompt",
    "completion",
    "text",
    "chosen",
    "rejected",
    "role",
    "content",
    "weight",
    "tools",
    "loss",
)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(texts(load_corpus().train), vocab_size=VOCABULARY)


def messages(row):
    """The row with one message of any form among its own."""
    message = with_other_fields(CHAT["messages"][0], ("weight", "name", "tool_calls", "thinking"))
    return st.lists(message, min_size=1, max_size=3).map(lambda several: {**row, "messages": several})


@pytest.mark.parametrize("task", ROWS)
def test_rows_of_any_form_are_read_or_refused_with_their_place(task, tokenizer, bounded, fuzzed, tmp_path):
    file = tmp_path / "rows.jsonl"
    changed = st.sampled_from(ROWS[task]).flatmap(lambda row: with_other_fields(row, FIELDS))
    rows = changed | messages(CHAT) if task == "sft" else changed

    @fuzzed
    @given(st.lists(rows | json_values, min_size=1, max_size=3), st.sampled_from([0, 1, 2]))
    def check(several, whole):
        lines = [as_json(row) for row in [*several, *ROWS[task][:whole]]]
        file.write_bytes(b"\n".join(lines))
        with bounded():
            options = DataOptions(train_data=str(file), max_length=32)
            _, refusal = tried(lambda: load_data(task, options, tokenizer, VOCABULARY), ValueError)
        assert refusal is None or "rows.jsonl" in refusal, refusal

    check()


def test_files_of_any_bytes_are_read_or_refused_with_their_name(tokenizer, bounded, fuzzed, tmp_path):
    file = tmp_path / "rows.jsonl"
    line = as_json(CHAT)

    @fuzzed
    @given(
        st.lists(st.binary(max_size=30) | st.just(line), max_size=4), st.sampled_from([b"\n", b"\r\n", b"", b"\x00"])
    )
    def check(pieces, between):
        file.write_bytes(between.join(pieces))
        with bounded():
            options = DataOptions(train_data=str(file), max_length=32)
            _, refusal = tried(lambda: load_data("sft", options, tokenizer, VOCABULARY), ValueError)
        assert refusal is None or "rows.jsonl" in refusal, refusal

    check()
