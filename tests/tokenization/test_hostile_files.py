"""Tokenizer files of strangers: a TokenizerError by name, or a tokenizer that works."""

from __future__ import annotations

import json
import os

import pytest

from grinmoe.tokenization import TokenizerError, build_tokenizer, encode_chat, load_tokenizer
from grinmoe.tokenization.sources import read_vocabulary
from grinmoe.tokenization.verify import read_vectors
from tests.small_chat import words

VALUES = [[1], {"a": 1}, {"a": {}}, 5, -1, 1.5, float("nan"), 10**400, "x" * 10**6, True, None, [[[]]], ["x"] * 3]
TOP_LEVELS = ["", "[]", "1", "null", '"x"', "{}", "NaN", '{"a":1', "1" * 400, "[" * 500 + "]" * 500, '{"a":' * 100_000]
SETTINGS = (
    "chat_template eos_token unk_token model_max_length padding_side tokenizer_class added_tokens_decoder "
    "extra_special_tokens clean_up_tokenization_spaces auto_map backend"
).split()


@pytest.fixture
def folder(tmp_path):
    build_tokenizer(words(), 384).save_pretrained(tmp_path)
    return tmp_path


def loads_or_names(folder) -> bool:
    """Whether the tokenizer loads; it must then encode a chat, or refuse it with a ValueError."""
    try:
        tokenizer = load_tokenizer(folder)
    except TokenizerError:
        return False
    if tokenizer.chat_template is not None:
        assert encode_chat(tokenizer, [{"role": "user", "content": "a<|end|>"}])
    return True


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"]
)
def test_file_of_another_kind_is_a_tokenizer_error(folder, name):
    for content in TOP_LEVELS:
        (folder / name).write_text(content)
        assert not loads_or_names(folder) or content == "{}" or name != "tokenizer.json"


@pytest.mark.parametrize("setting", SETTINGS)
def test_setting_of_another_type_is_a_tokenizer_error_or_ignored(folder, setting):
    file = folder / "tokenizer_config.json"
    original = json.loads(file.read_text())
    (folder / "chat_template.jinja").rename(folder / "kept.jinja")
    template = (folder / "kept.jinja").read_text()
    for value in VALUES:
        # Python writes no integer of so many digits.
        text = json.dumps({**original, "chat_template": template, setting: None if value == 10**400 else value})
        file.write_text(text if value != 10**400 else text.replace(f'"{setting}": null', f'"{setting}": {"1" * 400}'))
        loads_or_names(folder)


@pytest.mark.parametrize("value", [[1], "x", {"a": 1}, True])
def test_model_max_length_of_another_type_is_a_tokenizer_error(folder, value):
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "model_max_length": value}))
    with pytest.raises(TokenizerError, match="model_max_length is .*not a number"):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    "value", [{}, {"a": 1}, [1], "x", [{"id": "x", "content": "a"}], [{"id": -1, "content": "<a>"}]]
)
def test_added_tokens_of_another_type_are_a_tokenizer_error(folder, value):
    file = folder / "tokenizer.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "added_tokens": value}))
    with pytest.raises(TokenizerError):
        load_tokenizer(folder)


def test_template_and_added_token_that_are_far_too_long_are_refused(folder):
    template = folder / "chat_template.jinja"
    original = template.read_text()
    template.write_text("x" * (2**20 + 1))
    with pytest.raises(TokenizerError, match="chat_template has 1,048,577 characters"):
        load_tokenizer(folder)
    template.write_text(original)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "unk_token": "x" * 10**6}))
    with pytest.raises(TokenizerError, match="has 1,000,000 characters, and at most 512"):
        load_tokenizer(folder)


def test_fifo_and_deep_json_are_refused_by_the_commands(tmp_path):
    for name in ("v.json", "v.inp"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(ValueError, match="is not a file"):
            read_vectors(tmp_path / name)
    deep = tmp_path / "deep.json"
    deep.write_text('{"a":' * 100_000)
    for read in (read_vectors, read_vocabulary):
        with pytest.raises(ValueError, match="it is not JSON"):
            read(deep)
