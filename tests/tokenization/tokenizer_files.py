"""What the tests of building tokenizers share: small SentencePiece models, GGUFs of them, and strings to try."""

from __future__ import annotations

import io
import json
from pathlib import Path

import gguf
from sentencepiece import SentencePieceTrainer

from grinmoe.tokenization import SPECIAL_TOKENS

FILES = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
SPECIAL = [token for token, _ in SPECIAL_TOKENS]
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

TEXT = [
    "The quick brown fox jumps over the lazy dog.",
    "two  spaces    and\ttabs",
    "banana bandana anna aaaa aaa aa abab baba",
    "1234 5678 90",
    "Zoë ß 中文",
    "def f(x):\n    return x",
] * 20
PLAIN = [
    "",
    " ",
    "   ",
    "\n",
    "\n\n\n",
    "\t\n ",
    "Hello",
    " Hello",
    "  two  spaces ",
    "banana\nbandana",
    "aaaaaaaaaaa",
    "Zoë 😀 中文 κ",
    "▁ is a space ▁▁",
    "<0x41><unk",
    "\x00\u200b\ufeff",
    "e\u0301 ﬁ Å",
    "1234567890",
    "The quick brown fox jumps",
    "banana bandana abab baba",
    "spaces return the lazy dog",
]
WITH_SPECIAL = [
    "<|user|>\nbanana<|end|>\n<|assistant|>\n",
    "<|user|>\n\nthe",
    "a<|end|> b",
    "<|endoftext|>\nA",
    "<s>the</s> x</s>y",
    "<|placeholder6|> <unk> fox",
]


def train(**options) -> bytes:
    """A SentencePiece model of Llama's settings, but for `options`."""
    model = io.BytesIO()
    llama = {
        "model_type": "bpe",
        "vocab_size": 420,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "add_dummy_prefix": True,
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "split_digits": True,
        "character_coverage": 1.0,
    }
    quiet = {"minloglevel": 3, "num_threads": 1}
    SentencePieceTrainer.train(sentence_iterator=iter(TEXT), model_writer=model, **{**llama, **quiet, **options})
    return model.getvalue()


def ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text).input_ids


def file_content(tokenizer) -> dict:
    return json.loads(tokenizer.backend_tokenizer.to_str())


def write_gguf(path: Path, processor, end=(), model="llama", leave_out=(), **arrays) -> Path:
    """
    The vocabulary of a SentencePiece model as llama.cpp's converter writes it.

    Args:
        end: (text, type) of tokens behind it.
        leave_out: names of arrays that are not written.
        arrays: in place of those of the processor, by name.
    """
    numbers = range(processor.get_piece_size())
    kinds = [(processor.is_unknown, UNKNOWN), (processor.is_control, CONTROL), (processor.is_byte, BYTE)]
    written = {
        "tokens": [processor.id_to_piece(number) for number in numbers] + [text for text, _ in end],
        "scores": [processor.get_score(number) for number in numbers] + [-1000.0] * len(end),
        "token_type": [next((kind for test, kind in kinds if test(number)), NORMAL) for number in numbers]
        + [kind for _, kind in end],
        **arrays,
    }
    writer = gguf.GGUFWriter(path, "phi3")
    if model:
        writer.add_tokenizer_model(model)
    for name, values in written.items():
        if name not in leave_out:
            writer.add_array(f"tokenizer.ggml.{name}", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
