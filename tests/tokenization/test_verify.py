"""A tokenizer is held against vectors, and every difference is shown where it begins."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import LlamaTokenizer

import grinmoe_cli
from grinmoe import load_tokenizer
from grinmoe.tokenization import build_tokenizer
from grinmoe.tokenization.verify import Difference, Vector, read_vectors, verify_tokenizer
from tests import ROOT

RELEASED = ROOT / "../shared/tokenizer"
needs_released = pytest.mark.skipif(
    not RELEASED.is_dir(), reason="the released tokenizer is not here (../shared/tokenizer)"
)
TEXT = ["Hello there, how are you today?", "two  spaces\nand lines"] * 10
STRINGS = ["", "\n", "Hello", " Hello", "Zoë 😀", "<|user|>\nHello<|end|>\n", "a</s> b"]
CHAT = "<|system|>\nYou are a helpful AI assistant.<|end|>\n<|user|>\n Hi\n<|end|>\n<|assistant|>\nYo<|end|>\n"
SEPARATOR = "\n__ggml_vocab_test__\n"


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(TEXT, vocab_size=320)


@pytest.fixture
def folder(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


@pytest.fixture
def vectors(tokenizer) -> dict:
    """What the tokenizer does, by other means than verify's for the keys with a meaning of their own."""
    return {
        **{text: tokenizer(text).input_ids for text in STRINGS},
        "TPL_gen": CHAT + "<|assistant|>\n",
        "TPL_nogen": CHAT + "<|endoftext|>",
        "TPL_ids": tokenizer(CHAT + "<|assistant|>\n").input_ids,
        "dec": "<|user|> Hello<|end|><|assistant|>",
        "dec2": "Hello  world \n x",
    }


def write_json(path: Path, content) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def write_llama_cpp(path: Path, strings: list[str], lines: list[str]) -> Path:
    path.write_bytes("".join(text + SEPARATOR for text in strings).encode())
    path.with_suffix(".out").write_bytes("".join(line + "\n" for line in lines).encode())
    return path


# --- what is read ---


def test_a_json_file_holds_strings_and_keys_with_a_meaning_of_their_own(vectors, tmp_path):
    read = read_vectors(write_json(tmp_path / "v.json", vectors))
    assert {vector.name: vector.expected for vector in read} == vectors
    assert [vector.name for vector in read if vector.key] == ["TPL_gen", "TPL_nogen", "TPL_ids", "dec", "dec2"]


def test_a_string_may_be_called_like_a_key(tmp_path):
    """ "dec" is a piece of many a vocabulary."""
    assert read_vectors(write_json(tmp_path / "v.json", {"dec": [5]})) == [Vector("dec", [5])]


def test_strings_of_line_feeds_come_out_of_a_llama_cpp_file_whole(tmp_path):
    strings = ["", "\n", "\n\n", "\n\n\n", "\t\n", "a\r\nb", "__ggml_vocab_test__", "\n =", "", "\u2028"]
    read = read_vectors(write_llama_cpp(tmp_path / "v.gguf.inp", strings, [f" {len(text)} 7" for text in strings]))
    assert [(vector.name, vector.expected) for vector in read] == [(text, [len(text), 7]) for text in strings]
    assert not any(vector.key or vector.add_special_tokens for vector in read)


def test_an_empty_line_of_a_llama_cpp_file_is_no_ids(tmp_path):
    read = read_vectors(write_llama_cpp(tmp_path / "v.inp", ["a", "", ""], [" 1", "", ""]))
    assert [vector.expected for vector in read] == [[1], [], []]


BAD_JSON = {
    "not JSON": ("{", "it is not JSON"),
    "a list": ([["Hello", [1]]], "holds a list"),
    "nothing": ({}, "holds no strings"),
    "no ids": ({"Hello": 5}, "'Hello' has the value 5"),
    "ids of text": ({"Hello": ["5"]}, r"'Hello' has the value \['5'\]"),
    "true as id": ({"Hello": [True]}, "whole numbers"),
    "a negative id": ({"Hello": [-1]}, "whole numbers"),
    "too large an id": ({"Hello": [2**32]}, "whole numbers"),
    "a text for a string": ({"Hello": "World"}, "'Hello' has the value 'World'"),
    "a text for ids": ({"TPL_ids": "World"}, "'TPL_ids' has the value 'World'"),
    "a string twice": ('{"a": [1], "b": [1], "a": [2]}', "has 'a' twice"),
    "half a character": ('{"\\ud83d": [1]}', "half a surrogate pair"),
    "half a character in a value": ('{"dec": "\\ud83d"}', "half a surrogate pair"),
}


@pytest.mark.parametrize("name", BAD_JSON)
def test_a_malformed_json_file_is_named_with_the_reason(name, tmp_path):
    content, message = BAD_JSON[name]
    with pytest.raises(ValueError, match=message) as caught:
        read_vectors(write_json(tmp_path / "v.json", content))
    assert str(caught.value).startswith(f"--vectors {tmp_path / 'v.json'}")


BAD_LLAMA_CPP = {
    "another separator": ("a\n--\nb\n--\n", "1\n2\n", "does not end in a line __ggml_vocab_test__"),
    "cut off": (f"a{SEPARATOR}b", "1\n2\n", "but in 'b'"),
    "line ends of Windows": (f"a{SEPARATOR}".replace("\n", "\r\n"), "1\n", "line ends must not be changed"),
    "a line too few": (f"a{SEPARATOR}b{SEPARATOR}", "1\n", "has 2 strings, v.out 1 lines"),
    "words": (f"a{SEPARATOR}b{SEPARATOR}", "1\n2 x\n", "line 2 of v.out is '2 x'"),
    "no ids": (None, "1\n", "v.inp cannot be read .*No such file"),
    "no strings": (f"a{SEPARATOR}", None, "v.out cannot be read .*No such file"),
    "not UTF-8": ("\udcff", "1\n", "v.inp cannot be read as UTF-8"),
}


@pytest.mark.parametrize("name", BAD_LLAMA_CPP)
def test_a_malformed_llama_cpp_file_is_named_with_the_reason(name, tmp_path):
    strings, ids, message = BAD_LLAMA_CPP[name]
    for suffix, text in ((".inp", strings), (".out", ids)):
        if text is not None:
            (tmp_path / f"v{suffix}").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=message):
        read_vectors(tmp_path / "v.inp")


def test_another_ending_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is of no known format"):
        read_vectors(tmp_path / "v.out")


# --- what is found ---


def test_a_tokenizer_agrees_with_itself(tokenizer, vectors, tmp_path):
    assert verify_tokenizer(tokenizer, read_vectors(write_json(tmp_path / "v.json", vectors))) == []


@pytest.mark.parametrize("name", [*STRINGS, "TPL_gen", "TPL_nogen", "TPL_ids", "dec", "dec2"], ids=repr)
def test_each_vector_alone_can_differ(name, tokenizer, vectors, tmp_path):
    expected = vectors[name]
    vectors[name] = expected + "x" if isinstance(expected, str) else [*expected, 7]
    differences = verify_tokenizer(tokenizer, read_vectors(write_json(tmp_path / "v.json", vectors)))
    assert [(difference.vector.name, difference.got) for difference in differences] == [(name, expected)]


def test_tokens_put_around_a_text_count_where_the_vectors_have_them(tmp_path):
    """llama.cpp's vectors are without them, whatever the tokenizer adds."""
    adding = build_tokenizer(TEXT, vocab_size=320)
    plain = adding("Hello").input_ids
    adding.add_bos_token = True
    assert adding("Hello").input_ids == [1, *plain]
    line = " ".join(map(str, plain))
    assert not verify_tokenizer(adding, read_vectors(write_llama_cpp(tmp_path / "v.inp", ["Hello"], [line])))
    difference = verify_tokenizer(adding, read_vectors(write_json(tmp_path / "v.json", {"Hello": plain})))[0]
    assert difference.got == [1, *plain]


def test_a_missing_or_broken_template_is_a_difference(tmp_path):
    tokenizer = build_tokenizer(TEXT, vocab_size=320)
    wanted = read_vectors(write_json(tmp_path / "v.json", {"TPL_gen": CHAT, "TPL_ids": [1]}))
    for template, message in (
        (None, "(the tokenizer has no chat template)"),
        ("{{ raise_exception('no') }}", "(the chat template fails: no)"),
    ):
        tokenizer.chat_template = template
        differences = verify_tokenizer(tokenizer, wanted)
        assert [difference.got for difference in differences] == [message] * 2
        assert all(message in difference.describe(tokenizer) for difference in differences)


# --- how it is shown ---


def shown(difference: Difference, tokenizer) -> list[str]:
    return difference.describe(tokenizer).splitlines()


def test_describe_tokens_that_differ_shows_the_place_and_a_diff(tokenizer):
    name, *lines = shown(Difference(Vector("A\n", [1, 68, 2, 9999]), [1, 68, 3]), tokenizer)
    assert name == r"'A\n' parts at token 3 (expected are 4, got 3; - expected, + got)"
    assert lines[:2] == ["  1 '<s>'", "  68 '<0x41>'"]
    assert set(lines[2:]) == {"- 2 '</s>'", "- 9999 None", "+ 3 '<0x00>'"}


@pytest.mark.parametrize("expected, got, line", [([], [1], "+ 1 '<s>'"), ([1], [], "- 1 '<s>'")])
def test_describe_tokens_too_many_or_too_few_shows_the_end(tokenizer, expected, got, line):
    name, *lines = shown(Difference(Vector("", expected), got), tokenizer)
    assert name.startswith("'' parts at token 1 ") and lines == [line]


def test_describe_many_tokens_shows_those_around_the_place(tokenizer):
    name, *lines = shown(Difference(Vector("x" * 999, [1] * 99), [1] * 50 + [2] * 49), tokenizer)
    assert "parts at token 51 (expected are 99, got 99; " in name and len(name) < 300
    counts = {line: lines.count(line) for line in lines}
    assert counts == {"  1 '<s>'": 4, "- 1 '<s>'": 8, "+ 2 '</s>'": 8}


def test_describe_texts_that_differ_shows_the_line_escaped(tokenizer):
    one, other = 'one "line"\nand', 'one "line"\n and'
    name, *lines = shown(Difference(Vector("dec", one, key=True), other), tokenizer)
    assert name.startswith("dec parts at line 2 ")
    assert lines == [r"""  'one "line"\n'""", "- 'and'", "+ ' and'"]


# --- the command ---


def run_verify(*arguments) -> int:
    try:
        return grinmoe_cli.main(["tokenizer", "verify", *map(str, arguments)])
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else -1


def test_exit_code_0_if_all_agree(folder, vectors, tmp_path, capsys):
    path = write_json(tmp_path / "v.json", vectors)
    assert run_verify("--tokenizer", folder, "--vectors", path) == 0
    assert capsys.readouterr().out == f"TokenizersBackend: {len(vectors)} of {len(vectors)} agree\n"


def test_exit_code_1_and_the_strings_that_differ_if_not_all_agree(folder, vectors, tmp_path, capsys):
    path = write_json(tmp_path / "v.json", {**vectors, "Hello": [1], " Hello": [2]})
    assert run_verify("--tokenizer", folder, "--vectors", path) == 1
    out = capsys.readouterr().out
    assert "'Hello' parts at token 1" in out and "' Hello' parts at token 1" in out and out.count(" parts at ") == 2
    assert out.endswith(f"\n\nTokenizersBackend: {len(vectors) - 2} of {len(vectors)} agree\n")


def test_auto_shows_what_another_class_makes_of_it(folder, vectors, tmp_path, capsys):
    """The same tokenizer.json under the name that the released tokenizer_config.json has."""
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "tokenizer_class": "LlamaTokenizer"}))
    path = write_json(tmp_path / "v.json", vectors)
    assert run_verify("--tokenizer", folder, "--vectors", path) == 0
    assert run_verify("--tokenizer", folder, "--vectors", path, "--auto") == 1
    out = capsys.readouterr().out
    assert "LlamaTokenizer: " in out and r"'<|user|>\nHello<|end|>\n' parts at token 2" in out


def test_a_damaged_tokenizer_differs_and_the_way_to_restore_it_is_told(folder, vectors, tmp_path, capsys):
    LlamaTokenizer.from_pretrained(folder).save_pretrained(folder)
    path = write_json(tmp_path / "v.json", vectors)
    assert run_verify("--tokenizer", folder, "--vectors", path) == 1
    out = capsys.readouterr().out
    assert r"'<|user|>\nHello<|end|>\n' parts at token 2" in out
    assert "note: its tokenizer.json is not the family's any more" in out and "grinmoe tokenizer build --source" in out


@pytest.mark.parametrize("changed", ["--tokenizer", "--vectors"])
def test_what_the_user_can_mend_is_one_line_and_exit_code_2(changed, folder, vectors, tmp_path, capsys):
    options = {"--tokenizer": folder, "--vectors": write_json(tmp_path / "v.json", vectors), changed: "nope.json"}
    assert run_verify(*[word for pair in options.items() for word in pair]) == 2
    error = capsys.readouterr().err
    assert error.startswith("grinmoe tokenizer: ") and "nope.json" in error and len(error.splitlines()) == 1


def test_a_folder_that_autotokenizer_cannot_load_is_exit_code_2(folder, vectors, tmp_path, capsys):
    path = write_json(tmp_path / "v.json", vectors)
    (folder / "tokenizer.json").write_text("{}")
    assert run_verify("--tokenizer", folder, "--vectors", path, "--auto") == 2
    assert "AutoTokenizer cannot load" in capsys.readouterr().err


# --- the released tokenizer ---


@needs_released
@pytest.mark.parametrize("name, count", [("expected_transformers_4.44.2.json", 19), ("ggml-vocab-phi-3.gguf.inp", 46)])
def test_the_released_tokenizer_agrees_with_its_vectors(name, count):
    vectors = read_vectors(RELEASED / "vectors" / name)
    assert len(vectors) == count
    assert verify_tokenizer(load_tokenizer(RELEASED / "grinmoe"), vectors) == []


@needs_released
def test_the_released_vectors_tell_llama_tokenizer_apart(capsys):
    differences = verify_tokenizer(
        LlamaTokenizer.from_pretrained(RELEASED / "grinmoe"),
        read_vectors(RELEASED / "vectors" / "expected_transformers_4.44.2.json"),
    )
    found = {difference.vector.name: difference for difference in differences}
    assert found["<|user|>Hello"].got == [32010, 10994]
    assert {"TPL_ids", "dec"} <= found.keys() and not {"TPL_gen", "dec2", "Hello"} & found.keys()


def test_vectors_of_other_programs_may_begin_with_a_byte_order_mark(folder, vectors, tmp_path):
    path = tmp_path / "V.JSON"
    path.write_text(json.dumps(vectors), encoding="utf-8-sig")
    assert run_verify("--tokenizer", folder, "--vectors", path) == 0


def test_a_vocabulary_larger_than_the_models_is_noted(folder, vectors, tmp_path, capsys):
    path = write_json(tmp_path / "v.json", vectors)
    (folder / "config.json").write_text('{"model_type": "grinmoe", "vocab_size": 9}')
    assert run_verify("--tokenizer", folder, "--vectors", path) == 0
    assert "note: the tokenizer gives ids up to" in capsys.readouterr().out
