"""Folders that hold links, FIFOs and the like: a push never sends what is not the model's, and never waits for it."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from huggingface_hub import snapshot_download

from grinmoe.hub.checks import check_files
from grinmoe.hub.contents import is_sentencepiece
from grinmoe.hub.options import CardOverrides, ReleaseOptions
from grinmoe.hub.release import make_release
from tests.hub.release_folders import (
    PICTURE,
    REPO,
    SHARDS,
    contents,
    edit_weights,
    push_quick,
    run_cli,
    small_tokenizer,
)

KEY = "-----BEGIN OPENSSH PRIVATE " + "KEY-----\nb3Blbg==\n"
TAKEN = [
    *(
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer.model",
        "card.json",
    ),
    *("chat_template.jinja", "special_tokens_map.json", "added_tokens.json", "README.md", "LICENSE", "NOTICE.md"),
    *("model.safetensors.index.json", "training.png", "vocab.json", "merges.txt"),
]


@pytest.fixture
def made(tmp_path):
    """Assemble a release; a message of one line, if it is refused."""

    def make(source: Path, **options) -> dict[str, bytes] | str:
        folder = tmp_path / "release"
        folder.mkdir()
        try:
            make_release(source, folder, "me/model", ReleaseOptions(load_check=False, **options))
            return contents(folder)
        except ValueError as error:
            return str(error)
        finally:
            shutil.rmtree(folder)

    return make


@pytest.mark.parametrize("name", TAKEN)
@pytest.mark.parametrize("how", ["absolute", "relative", "over two links", "by a linked folder"])
def test_push_of_a_link_out_of_the_folder_is_refused(model, made, tmp_path, name, how):
    secrets = tmp_path / "secrets"
    secrets.mkdir()
    if (model / name).is_file():
        shutil.move(model / name, secrets / "x")
    else:
        (secrets / "x").write_text(KEY)
    if how == "absolute":
        (model / name).symlink_to(secrets / "x")
    elif how == "relative":
        (model / name).symlink_to("../secrets/x")
    elif how == "over two links":
        (model / "other").symlink_to(secrets / "x")
        (model / name).symlink_to("other")
    else:
        (model / "folder").symlink_to(secrets)
        (model / name).symlink_to("folder/x")
    said = made(model)
    assert isinstance(said, str) and name in said and "is a link to" in said and "secrets/x" in said


def test_push_of_a_linked_folder_of_templates_is_refused(model, made, tmp_path):
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "tool.jinja").write_text("mine")
    (model / "additional_chat_templates").symlink_to(tmp_path / "private")
    assert "additional_chat_templates is a link to" in made(model)
    (model / "additional_chat_templates").unlink()
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tool.jinja").symlink_to(tmp_path / "private" / "tool.jinja")
    assert "tool.jinja is a link to" in made(model)


def test_push_takes_links_inside_the_folder_and_leaves_out_others(model, made, tmp_path):
    expected = made(model)
    (model / "LICENSE").rename(model / "licence-text")
    (model / "LICENSE").symlink_to("licence-text")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "private.png").write_bytes(PICTURE)
    (model / "data").symlink_to(tmp_path / "data")
    (model / "latest").symlink_to("nowhere")
    (model / "private.png").symlink_to(tmp_path / "data" / "private.png")
    assert made(model) == expected


def test_push_of_a_snapshot_in_the_clients_cache_sends_its_files(hub, model, made):
    push_quick(model)
    snapshot = Path(snapshot_download(REPO))
    assert (snapshot / "config.json").is_symlink()
    expected = {name: content for name, content in hub.files(REPO).items() if name != ".gitattributes"}
    assert made(snapshot) == expected


def test_push_of_another_tokenizer_looks_at_its_folder_too(model, made, tmp_path):
    tokenizer = tmp_path / "tokenizer"
    small_tokenizer().save_pretrained(tokenizer)
    (tmp_path / "id_rsa").write_text(KEY)
    (tokenizer / "tokenizer.model").symlink_to(tmp_path / "id_rsa")
    assert "tokenizer.model is a link to" in made(model, tokenizer=str(tokenizer))


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path.name)
    os.chdir(here)


def link_to_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("name", [*(name for name in TAKEN if name != "training.png"), SHARDS[0]])
@pytest.mark.parametrize("make", [make_fifo, make_socket, link_to_device, Path.mkdir])
def test_push_opens_nothing_that_is_not_a_file(model, made, name, make):
    """It would wait for ever, or read for ever."""
    (model / name).unlink(missing_ok=True)
    make(model / name)
    said = made(model)
    assert isinstance(said, str) and name in said and "put the file itself there" in said


def test_push_does_not_wait_for_a_fifo(model, tmp_path):
    """In a process of its own: a test that waits would not end."""
    for name in ("tokenizer.model", "training.png", "notes.txt", "optimizer.pt"):
        (model / name).unlink(missing_ok=True)
        os.mkfifo(model / name)
    code = "import sys; from grinmoe_cli import main; sys.exit(main(sys.argv[1:]))"
    arguments = ["push", "--model", str(model), "--repo", "me/x", "--dry-run", "--no-load-check"]
    ended = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2 and "tokenizer.model is a FIFO and not a file" in ended.stderr


def test_push_of_a_file_that_is_too_large_is_refused_before_it_is_read(model, made):
    with (model / "README.md").open("ab") as file:
        file.truncate(2**40)
    assert "README.md has 1048576 MiB; a release takes files up to 100 MiB" in made(model)


def test_push_shows_no_control_characters(model, capsys):
    (model / "x\x1b]0;owned\x07.txt").write_text("x")
    arguments = ("push", "--model", str(model), "--repo", "me/x", "--dry-run", "--no-load-check")
    code, printed, error = run_cli(capsys, *arguments)
    assert code == 0, error
    assert "\x1b]0" not in printed and "\\x1b]0;owned\\x07.txt" in printed
    (model / "a\x1b[31m.png").write_bytes(PICTURE)
    (model / "README.md").write_text("---\nlicense: mit\n---\n# A model\n\n![x](a\x1b[31m.png)\n")
    code, printed, error = run_cli(capsys, *arguments)
    assert code == 2 and "\x1b" not in printed + error and "characters in its name that cannot be shown" in error


# ---- what stands inside of files


TOKEN = "hf_" + "a1B2" * 9


def chunk(kind: bytes, content: bytes) -> bytes:
    return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")


PICTURES = {
    "tEXt": chunk(b"tEXt", b"Comment\x00" + TOKEN.encode()),
    "zTXt": chunk(b"zTXt", b"Comment\x00\x00" + zlib.compress(TOKEN.encode())),
    "iTXt": chunk(b"iTXt", b"Comment\x00\x00\x00\x00\x00" + TOKEN.encode()),
    "iTXt, compressed": chunk(b"iTXt", b"Comment\x00\x01\x00en\x00x\x00" + zlib.compress(TOKEN.encode())),
    "eXIf": chunk(b"eXIf", b"MM\x00*" + TOKEN.encode("utf-16-le")),
    "behind the end": chunk(b"IEND", b"") + TOKEN.encode(),
    "a path": chunk(b"tEXt", b"Source\x00/home/alice/run-3/loss.csv"),
}


@pytest.mark.parametrize("kind", PICTURES)
def test_push_of_a_picture_with_private_text_is_refused(model, made, kind):
    (model / "training.png").write_bytes(PICTURE[:8] + PICTURES[kind])
    said = made(model)
    assert isinstance(said, str) and "the metadata of training.png: a " in said and TOKEN not in said


def test_push_of_a_picture_of_matplotlib_is_not_refused(model, made):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    figure, axis = pyplot.subplots()
    axis.plot(range(9))
    figure.savefig(model / "training.png")
    assert isinstance(made(model), dict)


def test_push_of_a_key_under_the_name_of_a_tokenizer_is_refused(model, made):
    for text in (KEY, f"\n{KEY}", "machine x.org login me password hunter2\n"):
        (model / "tokenizer.model").write_text(text)
        assert "tokenizer.model is not a SentencePiece model" in made(model)


def test_is_sentencepiece_takes_models_alone():
    assert is_sentencepiece(b"\n\x07 pieces" + b"\x12\x02ab" + b"\x82\xf0\x04\x01x")
    for content in (b"", b"\n\x0b pieces", b"\x12\x02ab", b"\n\x07 pieces\x08\x01", b"\n" + b"\xff" * 30, KEY.encode()):
        assert not is_sentencepiece(content)


def test_push_of_a_secret_in_a_tensors_name_is_refused(adapter, made):
    weights = adapter / "adapter_model.safetensors"
    edit_weights(weights, lambda tensors: tensors.update({TOKEN: next(iter(tensors.values())).clone()}))
    said = made(adapter, card=CardOverrides(base_model="me/base"))
    assert isinstance(said, str) and "the metadata of adapter_model.safetensors: a secret" in said


def test_push_of_text_in_utf_16_is_refused(model, made):
    for encoding in ("utf-16", "utf-16-le"):
        (model / "LICENSE").write_text(f"the token is {TOKEN}", encoding=encoding)
        assert "LICENSE is not UTF-8 text; convert it" in made(model)


def test_push_of_a_secret_in_a_template_is_refused(model, made):
    template = (model / "chat_template.jinja").read_text()
    (model / "chat_template.jinja").write_text(f"{{# {TOKEN} #}}{template}")
    assert "chat_template.jinja, line 1: a secret" in made(model, own_template=True)


@pytest.mark.parametrize("name", ["README.md", "config.json", "LICENSE", SHARDS[1]])
@pytest.mark.parametrize("is_put_back", [True, False])
def test_push_of_a_file_that_is_exchanged_during_the_checks_is_refused(
    model, made, tmp_path, monkeypatch, name, is_put_back
):
    """Somebody else could put a link there when the links have been looked at, and put the file back later."""
    (tmp_path / "private").write_bytes((model / name).read_bytes())

    def exchange(*arguments, **options):
        (model / name).rename(tmp_path / "aside")
        (model / name).symlink_to(tmp_path / "private")
        if is_put_back:
            (model / name).unlink()
            (tmp_path / "aside").rename(model / name)
        return check_files(*arguments, **options)

    monkeypatch.setattr("grinmoe.hub.release.check_files", exchange)
    assert f"files in {model} changed while they were checked" in made(model)
