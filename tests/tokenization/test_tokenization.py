"""The small tokenizer behaves like the family's: special tokens, whitespace, and the class that loads it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

import grinmoe.tokenization as tokenization
from grinmoe import GrinMoeConfig
from grinmoe.tokenization import SPECIAL_TOKENS, build_tokenizer

TEXT = [
    "The quick brown fox jumps over the lazy dog.",
    "Hello there, how are you today?",
    "two  spaces\nand lines",
] * 20


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(TEXT, vocab_size=400)


@pytest.fixture(scope="module")
def saved(tokenizer, tmp_path_factory):
    """Beside a config.json of this model type, where Transformers would choose another class by itself."""
    folder = tmp_path_factory.mktemp("saved")
    tokenizer.save_pretrained(folder)
    GrinMoeConfig().save_pretrained(folder)
    return folder


STRINGS = [
    "Hello",
    " Hello",
    "two  spaces",
    "a\nb\tc",
    "Zoë 😀",
    "<|user|>\nHello<|end|>\n<|assistant|>\n",
    "x</s> y",
    "",
]


def test_special_tokens_close_the_vocabulary_in_the_familys_order(tokenizer):
    ids = tokenizer.convert_tokens_to_ids([token for token, _ in SPECIAL_TOKENS])
    assert ids == list(range(len(tokenizer) - len(SPECIAL_TOKENS), len(tokenizer)))
    assert len(tokenizer) <= 400
    assert tokenizer.convert_tokens_to_ids(["<unk>", "<s>", "</s>", "<0x00>"]) == [0, 1, 2, 3]
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.padding_side) == ("<|endoftext|>",) * 2 + ("left",)


@pytest.mark.parametrize("text", STRINGS)
def test_text_survives(tokenizer, text):
    ids = tokenizer(text).input_ids
    assert tokenizer.bos_token_id not in ids
    if "<" not in text:
        assert tokenizer.decode(ids) == text


def test_whitespace_right_of_a_role_belongs_to_it(tokenizer):
    assert tokenizer("<|user|>\n\nHi").input_ids == tokenizer("<|user|>Hi").input_ids
    assert tokenizer("<|endoftext|>\nHi").input_ids != tokenizer("<|endoftext|>Hi").input_ids


def test_the_normaliser_runs_behind_a_special_token(tokenizer):
    """The silent trap: without it the word after a role loses its leading space and gets other ids."""
    assert tokenizer("<|user|>\nHello").input_ids[1:] == tokenizer("Hello").input_ids


def test_auto_tokenizer_gives_the_same_ids(tokenizer, saved):
    loaded = AutoTokenizer.from_pretrained(saved)
    assert type(loaded).__name__ == "TokenizersBackend"
    assert json.loads((saved / "tokenizer_config.json").read_text())["tokenizer_class"] == "TokenizersBackend"
    for text in STRINGS:
        assert loaded(text).input_ids == tokenizer(text).input_ids, text


def test_saving_again_changes_nothing(saved, tmp_path):
    AutoTokenizer.from_pretrained(saved).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "tokenizer.json").read_text()) == json.loads((saved / "tokenizer.json").read_text())


def test_too_small_a_vocabulary_is_refused():
    with pytest.raises(ValueError, match="vocab_size=270 has no room"):
        build_tokenizer(TEXT, vocab_size=270)
    with pytest.raises(ValueError, match="no text"):
        build_tokenizer([])


def test_a_tokenizer_is_built_where_torch_is_not_installed():
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); sys.modules['torch'] = None\n"
        "from tokenization import build_tokenizer\n"
        "assert build_tokenizer(['Hello there'], vocab_size=300)('Hello').input_ids"
    )
    root = Path(tokenization.__file__).resolve().parent.parent
    subprocess.run([sys.executable, "-c", script, str(root)], check=True)
