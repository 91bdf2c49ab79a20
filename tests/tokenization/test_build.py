"""A built tokenizer has its family's rules, and is written beside what is there; the released one comes out equal."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor
from transformers import AutoTokenizer, LlamaTokenizer

import grinmoe_cli
from grinmoe import GrinMoeConfig, load_tokenizer
from grinmoe.tokenization import BuildOptions, build_tokenizer, run_build
from grinmoe.tokenization.build import assemble_tokenizer, write_tokenizer
from grinmoe.tokenization.sources import read_vocabulary
from tests import ROOT
from tests.tokenization.tokenizer_files import (
    CONTROL,
    FILES,
    PLAIN,
    SPECIAL,
    TEXT,
    UNUSED,
    WITH_SPECIAL,
    file_content,
    ids,
    write_gguf,
)

RELEASED = ROOT / "../shared/tokenizer"
needs_released = pytest.mark.skipif(
    not RELEASED.is_dir(), reason="the released tokenizer is not here (../shared/tokenizer)"
)


# --- the rules are the family's ---


def test_a_built_and_a_trained_tokenizer_differ_in_what_they_have_learned_alone(built):
    one, other = file_content(built), file_content(build_tokenizer(TEXT, vocab_size=400))
    for content in (one, other):
        del content["model"]["vocab"], content["model"]["merges"]
        for token in content["added_tokens"][3:]:  # behind <unk>, <s>, </s>
            del token["id"]
    assert one == other
    assert one["normalizer"]["normalizers"][0] == {"type": "Prepend", "prepend": "▁"} and not one["pre_tokenizer"]


def test_special_tokens_follow_the_vocabulary_with_the_familys_flags(built, processor):
    size = processor.get_piece_size()
    assert built.convert_tokens_to_ids(SPECIAL) == list(range(size, size + len(SPECIAL))) and len(built) == size + 11
    assert ids(built, "<|user|>\nthe") == [size + 10, *processor.encode("the")]
    assert ids(built, "<|endoftext|>\nthe") == [size, *processor.encode("\nthe")]
    assert ids(built, "</s> the") == [2, *processor.encode("the")]
    assert built.decode(ids(built, "<|end|></s>"), skip_special_tokens=True) == "</s>"
    assert (built.bos_token, built.eos_token, built.pad_token, built.padding_side) == (
        "<s>",
        "<|endoftext|>",
        "<|endoftext|>",
        "left",
    )


def test_the_written_folder_gives_the_same_ids_through_every_loader(built, model_file, tmp_path):
    folder = tmp_path / "new" / "folder"
    run_build(BuildOptions(model_file, folder, model_max_length=77))
    assert {path.name for path in folder.iterdir()} == FILES
    assert json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"] == "TokenizersBackend"
    GrinMoeConfig(vocab_size=500).save_pretrained(folder)
    for loaded in (load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)):
        assert loaded.model_max_length == 77
        for text in PLAIN + WITH_SPECIAL:
            assert ids(loaded, text) == ids(built, text), text


# --- the output folder ---


def test_only_the_tokenizer_of_a_models_folder_is_replaced(built, model_file, tmp_path, capsys):
    others = {"config.json": "{}", "model.safetensors": "weights", "README.md": "mine", "tokenizer.model": "kept"}
    for name, text in others.items():
        (tmp_path / name).write_text(text)
    # Transformers would put these above the new files: another end of sequence, a token more.
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "</s>"}')
    (tmp_path / "added_tokens.json").write_text('{"<|zzz|>": 431}')
    (tmp_path / "tokenizer.json").write_text("old")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("old")
    run_build(BuildOptions(model_file, tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == FILES | others.keys()
    assert {name: (tmp_path / name).read_text() for name in others} == others
    assert (
        "removed the outdated special_tokens_map.json and added_tokens.json and additional_chat_templates"
        in capsys.readouterr().out
    )
    (tmp_path / "config.json").unlink()
    loaded = load_tokenizer(tmp_path)
    assert (loaded.eos_token, len(loaded)) == ("<|endoftext|>", len(built))


def test_a_tokenizer_with_more_tokens_than_the_model_is_not_put_into_its_folder(model_file, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "grinmoe", "vocab_size": 430}')
    (tmp_path / "tokenizer.json").write_text("the model's own")
    with pytest.raises(ValueError, match="has 431 tokens, the model in .* has a vocab_size of 430; take "):
        run_build(BuildOptions(model_file, tmp_path))
    assert (tmp_path / "tokenizer.json").read_text() == "the model's own"


def test_a_vocabulary_in_which_a_piece_would_lose_its_id_is_refused(processor, tmp_path):
    file = write_gguf(tmp_path / "empty.gguf", processor, end=[("<|endoftext|>", CONTROL), ("", CONTROL)])
    with pytest.raises(ValueError, match=r"'' has id 421 in the source and would get None"):
        run_build(BuildOptions(file, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_damaged_tokenizer_is_restored_in_its_place(built, saved):
    LlamaTokenizer.from_pretrained(saved).save_pretrained(saved)
    run_build(BuildOptions(saved / "tokenizer.json", saved))
    assert json.loads((saved / "tokenizer.json").read_text()) == file_content(built)
    assert json.loads((saved / "tokenizer_config.json").read_text())["tokenizer_class"] == "TokenizersBackend"


def test_an_empty_folder_is_filled_and_a_new_one_is_as_readable_as_any(built, tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("empty", "new"):
        write_tokenizer(built, tmp_path / name)
        assert {path.name for path in (tmp_path / name).iterdir()} == FILES
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == stat.S_IMODE((tmp_path / "empty").stat().st_mode)
    assert {path.name for path in tmp_path.iterdir()} == {"empty", "new"}


def test_what_is_no_place_for_a_tokenizer_is_refused_untouched(built, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "odd" / "tokenizer.json").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    for name, message in {
        "photos": "is not empty and holds neither",
        "photos/a.png": "not a folder but a file",
        "link": "leads nowhere",
        "odd": "has a folder named tokenizer.json",
    }.items():
        with pytest.raises(ValueError, match=message):
            write_tokenizer(built, tmp_path / name)
    with pytest.raises(ValueError, match="--output is empty"):
        write_tokenizer(built, "")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["new", "saved"])
def test_nothing_is_left_of_a_failed_save(name, built, saved, monkeypatch):
    before = {path: path.read_bytes() for path in saved.iterdir()}

    def full_disk(folder, **options):
        Path(folder).mkdir(exist_ok=True)
        (Path(folder) / "tokenizer.json").write_text("half")
        raise OSError("no space left")

    monkeypatch.setattr(built, "save_pretrained", full_disk)
    with pytest.raises(OSError, match="no space left"):
        write_tokenizer(built, saved.parent / name)
    assert {path: path.read_bytes() for path in saved.iterdir()} == before
    assert [path.name for path in saved.parent.iterdir()] == ["saved"]


@pytest.mark.newest_only
@pytest.mark.parametrize("place", ["new", "empty", "saved"])
def test_build_killed_at_any_change_of_a_name_leaves_no_mixture_and_is_made_good_by_the_next(
    built, saved, tmp_path, place
):
    """Each change of a name is the last one once."""
    for survived in range(100):
        folder = tmp_path / f"{survived}" / "tokenizer"
        folder.parent.mkdir()
        if place == "empty":
            folder.mkdir()
        elif place == "saved":
            shutil.copytree(saved, folder)
            (folder / "special_tokens_map.json").write_text('{"eos_token": "</s>"}')
            (folder / "additional_chat_templates").symlink_to("/nowhere")
        old = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
        process = multiprocessing.get_context("fork").Process(target=_write_and_die, args=(built, folder, survived))
        process.start()
        process.join()
        names = {path.name for path in folder.iterdir() if path.name[0] != "."} if folder.is_dir() else set()
        assert "tokenizer.json" not in names or names in (old, FILES), "no mixture loads"
        write_tokenizer(built, folder)
        assert {path.name for path in folder.iterdir()} == FILES
        assert [path.name for path in folder.parent.iterdir()] == ["tokenizer"]
        if process.exitcode == 0:
            break
    assert survived >= {"new": 1, "empty": 3, "saved": 8}[place]


def _write_and_die(tokenizer, folder: Path, survived: int) -> None:
    rename, done = Path.rename, []

    def rename_or_die(path, target):
        done.append(path)
        if len(done) > survived:
            os.kill(os.getpid(), signal.SIGKILL)
        return rename(path, target)

    Path.rename = rename_or_die
    write_tokenizer(tokenizer, folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "special_tokens_map.json", "additional_chat_templates"])
def test_fifo_where_a_tokenizers_file_goes_is_refused_and_stays(built, saved, name):
    (saved / name).unlink(missing_ok=True)
    os.mkfifo(saved / name)
    with pytest.raises(ValueError, match=f"has something that is not a file named {name}; move it away"):
        write_tokenizer(built, saved)
    assert (saved / name).is_fifo()


# --- the command ---


def test_the_command_says_what_it_built(model_file, tmp_path, capsys):
    output = tmp_path / "out"
    command = ["tokenizer", "build", "--source", str(model_file), "--output", str(output), "--model-max-length", "9"]
    assert grinmoe_cli.main(command) == 0
    merges = len(read_vocabulary(model_file).merges)
    expected = f"{output}: 431 tokens, {merges} merges; added 11 special tokens, ids 420 to 430\n"
    assert capsys.readouterr().out == expected
    assert load_tokenizer(output).model_max_length == 9
    command[3] = str(output / "tokenizer.json")
    assert grinmoe_cli.main(command) == 0
    assert "all special tokens as in the source" in capsys.readouterr().out


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"--source": "nope.model"}, "there is no file nope.model"),
        ({"--model-max-length": "0"}, "--model-max-length 0"),
    ],
    ids=str,
)
def test_what_the_user_can_mend_is_one_line_and_exit_code_2(changed, message, model_file, tmp_path, capsys):
    options = {"--source": str(model_file), "--output": str(tmp_path / "out"), **changed}
    assert grinmoe_cli.main(["tokenizer", "build", *[word for pair in options.items() for word in pair]]) == 2
    error = capsys.readouterr().err
    assert error.startswith("grinmoe tokenizer: ") and message in error and len(error.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_is_built_from_a_source_where_torch_is_not_installed(model_file):
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); sys.modules['torch'] = None\n"
        "from tokenization.build import assemble_tokenizer, read_vocabulary\n"
        "assert len(assemble_tokenizer(read_vocabulary(sys.argv[2]))) == 431"
    )
    subprocess.run([sys.executable, "-c", script, str(ROOT), str(model_file)], check=True)


# --- the released tokenizer ---


def released_content() -> dict:
    return json.loads((RELEASED / "grinmoe" / "tokenizer.json").read_text(encoding="utf-8"))


def assert_released(folder: Path) -> None:
    """All of tokenizer.json is equal, but for what two versions of the tokenizers library write differently."""
    content, released = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8")), released_content()
    model, expected = content.pop("model"), released.pop("model")
    assert list(model.pop("vocab").items()) == list(expected.pop("vocab").items())
    # Older versions write a merge as "a b", newer ones as ["a", "b"] ...
    assert model.pop("merges") == [merge.split(" ") for merge in expected.pop("merges")]
    # ... and name the option `ignore_merges`, which had no other value before.
    assert model.pop("ignore_merges") is False
    assert model == expected
    assert content == released
    config = json.loads((folder / "tokenizer_config.json").read_text())
    released_config = json.loads((RELEASED / "grinmoe" / "tokenizer_config.json").read_text())
    # Not written: options of LlamaTokenizer, and the added tokens, which tokenizer.json has.
    left_out = {"add_bos_token", "add_eos_token", "added_tokens_decoder", "legacy", "sp_model_kwargs"}
    left_out.add("use_default_system_prompt")
    assert config.pop("backend") == "tokenizers"
    assert config == {name: value for name, value in released_config.items() if name not in left_out}


@needs_released
def test_the_released_tokenizer_is_built_from_its_sentencepiece_model(tmp_path):
    run_build(BuildOptions(RELEASED / "tokenizer.model", tmp_path))
    assert_released(tmp_path)


@needs_released
def test_the_released_tokenizer_is_restored_after_damage(tmp_path):
    LlamaTokenizer.from_pretrained(RELEASED / "grinmoe").save_pretrained(tmp_path)
    assert json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))["pre_tokenizer"]["type"] == "Metaspace"
    run_build(BuildOptions(tmp_path / "tokenizer.json", tmp_path))
    assert_released(tmp_path)


@needs_released
def test_the_released_tokenizer_is_built_from_a_gguf(tmp_path):
    processor = SentencePieceProcessor(model_file=str(RELEASED / "tokenizer.model"))
    padding = [(f"[PAD{number}]", UNUSED) for number in range(32011, 32064)]
    run_build(
        BuildOptions(
            write_gguf(tmp_path / "vocab.gguf", processor, [*((token, CONTROL) for token in SPECIAL), *padding]),
            tmp_path / "out",
        )
    )
    assert_released(tmp_path / "out")


@needs_released
@settings(max_examples=200, deadline=None)
@given(st.text() | st.text(alphabet="banTheq \n\t▁<>|0x1é中"))
def test_the_released_ids_of_any_text_are_those_of_sentencepiece(released_pair, text):
    tokenizer, processor = released_pair
    if not any(token in text for token in tokenizer.get_added_vocab()):
        assert ids(tokenizer, text) == processor.encode(text)


@pytest.fixture(scope="module")
def released_pair():
    source = RELEASED / "tokenizer.model"
    return assemble_tokenizer(read_vocabulary(source)), SentencePieceProcessor(model_file=str(source))


@needs_released
def test_the_released_model_beside_its_tokenizer_is_built_in_place(tmp_path):
    shutil.copytree(RELEASED / "grinmoe", tmp_path, dirs_exist_ok=True, copy_function=shutil.copyfile)
    shutil.copyfile(RELEASED / "tokenizer.model", tmp_path / "tokenizer.model")
    run_build(BuildOptions(tmp_path / "tokenizer.model", tmp_path))
    assert_released(tmp_path)
    assert (tmp_path / "tokenizer.model").exists()
