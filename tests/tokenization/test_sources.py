"""A source gives the family's tokenizer whatever its format: the ids are SentencePiece's. What cannot be taken is named."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import LlamaTokenizer

from grinmoe.tokenization.build import assemble_tokenizer
from grinmoe.tokenization.sources import Vocabulary, merges_by_score, read_vocabulary
from tests.tokenization.tokenizer_files import (
    BYTE,
    CONTROL,
    NORMAL,
    PLAIN,
    SPECIAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    WITH_SPECIAL,
    file_content,
    ids,
    train,
    write_gguf,
)

# --- the ids are SentencePiece's ---


@pytest.mark.parametrize("text", PLAIN, ids=repr)
def test_ids_are_those_of_sentencepiece(built, processor, text):
    assert ids(built, text) == processor.encode(text)
    assert built.decode(ids(built, text)) == processor.decode(processor.encode(text))


@settings(max_examples=300, deadline=None)
@given(st.text() | st.text(alphabet="banTheq \n\t▁<>|0x1é中"))
@example("▁" * 40)
def test_ids_of_any_text_are_those_of_sentencepiece(built, processor, text):
    if not any(token in text for token in built.get_added_vocab()):
        assert ids(built, text) == processor.encode(text)


def test_the_vocabulary_is_one_that_can_tell_orders_of_merges_apart(model_file, processor):
    """With the merges turned round the ids are others: the tests above can fail."""
    vocabulary = read_vocabulary(model_file)
    turned = assemble_tokenizer(Vocabulary(vocabulary.pieces, vocabulary.merges[::-1]))
    assert sum(ids(turned, text) != processor.encode(text) for text in PLAIN) > 3


def test_among_equal_scores_left_and_right_part_decide():
    pieces = ["a", "aaa", "aa", "<x>", "aaaa", "b"]
    merges = merges_by_score(
        pieces, [0.0, -1.0, -1.0, 5.0, -1.0, 0.0], [NORMAL, NORMAL, NORMAL, CONTROL, NORMAL, NORMAL]
    )
    assert merges == [("a", "a"), ("a", "aaa"), ("a", "aa"), ("aaa", "a"), ("aa", "a"), ("aa", "aa")]


# --- other sources ---


def assert_same_tokenizer(source: Path, built) -> None:
    assert file_content(assemble_tokenizer(read_vocabulary(source))) == file_content(built)


def test_a_tokenizer_json_that_llama_tokenizer_has_damaged_is_restored(built, saved, tmp_path):
    LlamaTokenizer.from_pretrained(saved).save_pretrained(tmp_path)
    damaged = tmp_path / "tokenizer.json"
    assert json.loads(damaged.read_text())["normalizer"] is None, "else this proves nothing"
    assert_same_tokenizer(damaged, built)


def test_merges_of_an_older_tokenizer_json_are_read(built, saved):
    path = saved / "tokenizer.json"
    content = json.loads(path.read_text())
    assert isinstance(content["model"]["merges"][0], list)
    content["model"]["merges"] = [" ".join(merge) for merge in content["model"]["merges"]]
    path.write_text(json.dumps(content))
    assert_same_tokenizer(path, built)


def test_a_tokenizer_json_may_lack_the_special_tokens(built, saved):
    path = saved / "tokenizer.json"
    content = json.loads(path.read_text())
    content["added_tokens"] = content["added_tokens"][:3]
    path.write_text(json.dumps(content))
    assert_same_tokenizer(path, built)


def test_added_tokens_of_ones_own_keep_id_and_flags(built, saved):
    path = saved / "tokenizer.json"
    content = json.loads(path.read_text())
    own = {**content["added_tokens"][-1], "id": len(built), "content": "<|tool|>", "rstrip": False, "special": False}
    content["added_tokens"].insert(0, own)  # the order of the entries is no matter
    path.write_text(json.dumps(content))
    rebuilt = assemble_tokenizer(read_vocabulary(path))
    assert file_content(rebuilt)["added_tokens"] == [*file_content(built)["added_tokens"], own]


PADDING = [(f"[PAD{number}]", UNUSED) for number in range(431, 448)]
GGUF_SPECIAL = [(token, CONTROL) for token in SPECIAL]


@pytest.mark.parametrize(
    "end",
    [
        [],
        GGUF_SPECIAL,
        [(token, USER_DEFINED) for token in SPECIAL] + PADDING,
        [*GGUF_SPECIAL, ("[PAD431]", NORMAL), ("left over", UNUSED)],
    ],
    ids=["no special tokens", "special tokens", "padding", "padding of other kinds"],
)
def test_a_gguf_gives_the_same_tokenizer(built, processor, tmp_path, end):
    assert_same_tokenizer(write_gguf(tmp_path / "vocab.gguf", processor, end), built)


def test_the_merges_of_a_gguf_go_before_its_scores(model_file, processor, tmp_path):
    vocabulary = read_vocabulary(model_file)
    turned = Vocabulary(vocabulary.pieces, vocabulary.merges[::-1])
    merges = [" ".join(merge) for merge in turned.merges]
    path = write_gguf(tmp_path / "vocab.gguf", processor, merges=merges)
    assert_same_tokenizer(path, assemble_tokenizer(turned))


def test_special_tokens_inside_a_gguf_keep_their_ids(built, processor, tmp_path):
    """Also where another token stands behind them, and one of them among the pieces."""
    size = processor.get_piece_size()
    tokens = [processor.id_to_piece(number) for number in range(size)]
    types = [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * (size - 259)
    tokens[300:300], types[300:300] = ["<|end|>"], [CONTROL]
    scores = [processor.get_score(processor.piece_to_id(token)) for token in tokens]
    end = [("<|tool|>", USER_DEFINED), ("<|user|>", CONTROL), ("<|secret|>", CONTROL)]
    arrays = {
        "tokens": tokens + [token for token, _ in end],
        "scores": scores + [0.0] * 3,
        "token_type": types + [kind for _, kind in end],
    }
    rebuilt = assemble_tokenizer(read_vocabulary(write_gguf(tmp_path / "vocab.gguf", processor, **arrays)))
    assert rebuilt.convert_ids_to_tokens([300, *range(size + 1, size + 4)]) == [
        "<|end|>",
        "<|tool|>",
        "<|user|>",
        "<|secret|>",
    ]
    missing = [token for token in SPECIAL if token not in ("<|end|>", "<|user|>")]
    assert rebuilt.convert_ids_to_tokens(list(range(size + 4, len(rebuilt)))) == missing
    assert ids(rebuilt, "<|tool|><|secret|>") == [size + 1, size + 3]
    assert rebuilt.decode([size + 1, size + 3], skip_special_tokens=True) == "<|tool|>"
    for text in PLAIN + WITH_SPECIAL:
        expected = [built.convert_ids_to_tokens(number) for number in ids(built, text)]
        assert rebuilt.convert_ids_to_tokens(ids(rebuilt, text)) == expected, text


def test_family_tokens_may_be_user_defined_in_a_sentencepiece_model(tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(train(user_defined_symbols=["<|end|>"], control_symbols=["<|user|>"]))
    rebuilt = assemble_tokenizer(read_vocabulary(path))
    assert rebuilt.convert_tokens_to_ids(["<|user|>", "<|end|>"]) == [3, 4]
    assert ids(rebuilt, "<|user|>\n<|end|>") == [3, 4]
    assert len(rebuilt) == 420 + 9


# --- what cannot be taken ---


def json_source(tmp_path: Path, built, change) -> Path:
    content = file_content(built)
    change(content)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content))
    return path


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


BAD_FILES = {
    "missing": (lambda folder: folder / "x.model", "there is no file"),
    "a folder": (lambda folder: folder, "there is no file .* not a folder"),
    "another ending": (lambda folder: written(folder / "x.bin", b"x"), "ends in '.bin'"),
    "empty model": (lambda folder: written(folder / "x.model", b""), "the file is empty"),
    "not a model": (lambda folder: written(folder / "x.model", b"hello world"), "not a SentencePiece model"),
    "truncated model": (lambda folder: written(folder / "x.model", train()[:3000]), "or not a whole one"),
    "unigram": (lambda folder: written(folder / "x.model", train(model_type="unigram", vocab_size=320)), "unigram"),
    "no bytes": (
        lambda folder: written(folder / "x.model", train(byte_fallback=False, vocab_size=150)),
        "253 more",
    ),
    "no <s>": (lambda folder: written(folder / "x.model", train(bos_id=-1)), "lacks <s>;"),
    "another <unk>": (lambda folder: written(folder / "x.model", train(unk_piece="<UNK>")), "lacks <unk>;"),
    "NFKC": (
        lambda folder: written(folder / "x.model", train(normalization_rule_name="nmt_nfkc")),
        "normalises .* to '▁▁▁fi",
    ),
    "no prefix": (lambda folder: written(folder / "x.model", train(add_dummy_prefix=False)), "add_dummy_prefix"),
    "own symbol": (
        lambda folder: written(folder / "x.model", train(user_defined_symbols=["<|tool|>"])),
        r"'<\|tool\|>': that is a user-defined symbol",
    ),
    "not a GGUF": (lambda folder: written(folder / "x.gguf", b"GGML" * 100), "not a GGUF file"),
    "empty GGUF": (lambda folder: written(folder / "x.gguf", b""), "not a GGUF file"),
    "not JSON": (lambda folder: written(folder / "x.json", b"{"), "it is not JSON"),
    "not UTF-8": (lambda folder: written(folder / "x.json", b"\xff{}"), "it is not JSON"),
    "a JSON list": (lambda folder: written(folder / "x.json", b"[]"), "no model of type BPE"),
    "a config.json": (lambda folder: written(folder / "x.json", b"{}"), "no model of type BPE"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_that_cannot_be_taken_is_named_with_the_reason(name, tmp_path):
    make, message = BAD_FILES[name]
    source = make(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        read_vocabulary(source)
    assert str(source) in str(caught.value)


BAD_GGUF = {
    "no vocabulary": ({"leave_out": ("tokens",)}, "holds no vocabulary"),
    "no tokenizer": ({"model": None}, "holds no vocabulary"),
    "byte-level": ({"model": "gpt2"}, "tokenizer.ggml.model is 'gpt2'"),
    "neither merges nor scores": ({"leave_out": ("scores",)}, "neither tokenizer.ggml.merges nor"),
    "no ranks": ({"scores": [-1000.0] * 420}, "scores that differ"),
    "lengths": ({"scores": [0.0, 1.0]}, "tokenizer.ggml.scores is not .* of one for each of its 420 tokens"),
    "types": ({"token_type": [1]}, "tokenizer.ggml.token_type is not .* of one for each of its 420 tokens"),
    "numbers for tokens": ({"tokens": [1, 2]}, "tokens is not a list of str"),
    "a merge of three": ({"merges": ["a b c"]}, "its vocabulary and merges cannot be read"),
    "twice": ({"end": [("the", NORMAL), ("the", NORMAL)]}, "'the' 2 times"),
}


@pytest.mark.parametrize("name", BAD_GGUF)
def test_a_gguf_that_cannot_be_taken_is_named_with_the_reason(name, processor, tmp_path):
    options, message = BAD_GGUF[name]
    with pytest.raises(ValueError, match=message):
        read_vocabulary(write_gguf(tmp_path / "x.gguf", processor, **options))


def test_a_truncated_gguf_is_refused_wherever_it_ends(processor, tmp_path):
    whole = write_gguf(tmp_path / "x.gguf", processor, GGUF_SPECIAL).read_bytes()
    for end in (3, 4, 20, 60, 500, len(whole) // 2, len(whole) - 200):
        with pytest.raises(ValueError, match="download it again"):
            read_vocabulary(written(tmp_path / "cut.gguf", whole[:end]))


BAD_JSON = {
    "unigram": (lambda content: content["model"].update(type="Unigram"), "no model of type BPE"),
    "no merges": (lambda content: content["model"].pop("merges"), "its vocabulary and merges cannot be read"),
    "a gap": (
        lambda content: content["added_tokens"][-1].update(id=500),
        r"'<\|user\|>' has the id 500 where 430 follows",
    ),
    "an id twice": (
        lambda content: content["added_tokens"][-1].update(id=420),
        r"'<\|user\|>' has the id 420 where 421 follows",
    ),
    "an id of text": (lambda content: content["model"]["vocab"].update(x="7"), "cannot be read .*expected u32"),
    "no content": (lambda content: content["added_tokens"][0].pop("content"), "no list of tokens with id and content"),
    "a broken merge": (
        lambda content: content["model"]["merges"].append(["a"]),
        "its vocabulary and merges cannot be read",
    ),
    "a merge to nowhere": (
        lambda content: content["model"]["merges"].append(["x", "x"]),
        "Token `xx` out of vocabulary",
    ),
    "no bytes": (
        lambda content: content["model"].update(
            vocab={piece.replace("<0x", "<0y"): number for piece, number in content["model"]["vocab"].items()}
        ),
        "lacks <0x00>, <0x01>, <0x02> and 253 more",
    ),
}


@pytest.mark.parametrize("name", BAD_JSON)
def test_a_tokenizer_json_that_cannot_be_taken_is_named_with_the_reason(name, built, tmp_path):
    change, message = BAD_JSON[name]
    with pytest.raises(ValueError, match=message):
        read_vocabulary(json_source(tmp_path, built, change))


@pytest.mark.parametrize("package, name", [("sentencepiece", "x.model"), ("gguf", "x.gguf")])
def test_a_missing_package_is_named_with_what_to_install(package, name, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"needs {package}: pip install 'grinmoe\[tokenizer\]'"):
        read_vocabulary(written(tmp_path / name, b"x"))
