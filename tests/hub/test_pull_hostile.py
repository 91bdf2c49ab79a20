"""`grinmoe pull` where the repository, the server, the network or another user of this machine means harm."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import re
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.utils import tqdm

from grinmoe.checkpoint_grinmoe import code_files
from grinmoe.hub import HubError, pull
from grinmoe.hub.contents import runs_code
from grinmoe.hub.remote_files import RemoteFile, belongs_to_a_checkpoint
from tests.fake_hub.api import Reply
from tests.fake_hub.server import WRITER, HubServer
from tests.hub.pulled import fetched, kept, whole
from tests.hub.release_folders import INDEX, REPO, SHARDS, contents, run_cli


class Call:
    """Runs a command when it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch /tmp/grinmoe-was-here",)


def last_byte_changed(reply: Reply) -> Reply:
    """As a cache in between could do it, or somebody who listens: the size stays."""
    return replace(reply, body=reply.body[:-1] + bytes([reply.body[-1] ^ 1]))


# ---- bytes that are not those of the repository


ALTERED = [
    SHARDS[1],
    "modeling_grinmoe.py",
    "tokenizer.json",
    "README.md",
    "LICENSE",
    "config.json",
    INDEX,
    "training.png",
]


@pytest.mark.parametrize("name", ALTERED)
def test_pull_of_a_file_altered_at_equal_size_removes_and_names_it(pushed, refused, output, name):
    pushed.change(f"/resolve/.*/{name}", last_byte_changed, method="GET")
    said = refused(keeps=name not in ("config.json", INDEX))
    assert f"1 files of {REPO} did not arrive as the Hub announces them, and are removed ({name})" in said
    if name not in ("config.json", INDEX):
        assert not (kept(output) / name).exists()
    pushed.requests.clear()
    pull(REPO, output)
    assert contents(output) == whole(pushed) and name in fetched(pushed)
    if name not in ("config.json", INDEX):
        assert fetched(pushed) == [name], "the rest is not fetched again"


@pytest.mark.parametrize("body", [b"", b"short", b"x" * 10**6], ids=["empty", "shorter", "longer"])
def test_pull_of_a_file_of_another_size_is_refused(pushed, refused, output, body):
    pushed.change("/resolve/.*/LICENSE", lambda reply: replace(reply, body=body), times=100, method="GET")
    refused(keeps=True)
    pushed.heal()
    assert contents(pull(REPO, output)) == whole(pushed)


def test_pull_ends_a_download_that_is_larger_than_announced(pushed, refused, monkeypatch):
    """Without an end to it, it would fill the disk."""
    endless = gzip.compress(bytes(300_000_000))
    headers = {"Content-Encoding": "gzip", "Content-Type": "text/plain"}
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)
    written = []
    write = tqdm.update
    monkeypatch.setattr(tqdm, "update", lambda self, n=1: written.append(n) or write(self, n))
    pushed.change(
        "/resolve/.*/LICENSE", lambda reply: replace(reply, body=endless, headers=headers), times=100, method="GET"
    )
    assert "LICENSE of writer-user/model is larger than the 12 bytes that the Hub announces" in refused(keeps=True)
    assert sum(written) < 10_000_000


@pytest.mark.parametrize("etag", ['"../../../../tmp/x"', '"/tmp/x"', '"x/y"', "", '"' + "e" * 5000 + '"', '"\x01"'])
def test_pull_from_a_server_with_a_strange_etag_is_right_or_refused(pushed, output, capsys, etag):
    """The client makes names of files of it."""

    def relabel(reply: Reply) -> Reply:
        return replace(reply, headers={**reply.headers, "ETag": etag, "X-Linked-Etag": etag})

    pushed.change(f"/resolve/.*{SHARDS[0]}", relabel, times=100)
    code, _, error = run_cli(capsys, "pull", "--repo", REPO, "--output", str(output))
    assert code == 0 or (code == 2 and error.splitlines()[-1].startswith("grinmoe pull: ") and not output.exists())
    assert {path.name for path in output.parent.parent.iterdir()} <= {"model", "pulled"}
    pushed.heal()
    assert contents(output if code == 0 else pull(REPO, output)) == whole(pushed)


def test_pull_when_the_clients_cache_is_damaged_fetches_the_file_itself(pushed, output):
    """The client copies from its cache without a look; the next run would take the same bytes again."""
    cached = Path(hf_hub_download(REPO, SHARDS[0])).resolve()
    cached.write_bytes(bytes(cached.stat().st_size))
    assert contents(pull(REPO, output)) == whole(pushed)


def test_pull_reads_each_file_once_to_check_it(pushed, output, monkeypatch):
    read: Counter[str] = Counter()
    differs = RemoteFile.differs

    def count(self, *arguments):
        read[self.name] += 1
        return differs(self, *arguments)

    monkeypatch.setattr(RemoteFile, "differs", count)
    pull(REPO, output)
    assert read == dict.fromkeys(whole(pushed), 1)


# ---- folders and files beside the target


def test_pull_touches_neither_links_nor_folders_of_others_beside_the_target(pushed, output, tmp_path, monkeypatch):
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "thesis.txt").write_text("mine")
    (output.parent / ".model.pulling").symlink_to(victim)
    (output.parent / ".model.partial").mkdir()
    (output.parent / ".model.partial" / "notes.txt").write_text("mine")
    (output.parent / ".model-12345678").mkdir()
    (output.parent / ".model-12345678" / "notes.txt").write_text("mine")
    (output.parent / ".model-abcdefgh").symlink_to(victim)
    before = contents(output.parent)
    shared = tmp_path / "shared"
    shared.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(shared))
    pull(REPO, output)
    assert contents(output) == whole(pushed)
    after = {name: text for name, text in contents(output.parent).items() if not name.startswith("model/")}
    assert after == before and contents(victim) == {"thesis.txt": b"mine"}
    assert list(shared.iterdir()) == [], "nothing in a folder that users share"


def plant_links(folder: Path, victim: Path) -> None:
    (folder / SHARDS[0]).unlink()
    (folder / SHARDS[0]).symlink_to(victim / "thesis.txt")
    shutil.rmtree(folder / "sub", ignore_errors=True)
    (folder / "sub").symlink_to(victim)
    (folder / "README.md").unlink(missing_ok=True)
    os.link(victim / "thesis.txt", folder / "README.md")


def plant_special_files(folder: Path, victim: Path) -> None:
    for name in (SHARDS[0], "config.json"):
        (folder / name).unlink()
        os.mkfifo(folder / name)
    with socket.socket(socket.AF_UNIX) as listener:
        here = os.getcwd()
        os.chdir(folder)
        listener.bind("s")
        os.chdir(here)
    (folder / "tokenizer.json").unlink(missing_ok=True)
    (folder / "tokenizer.json").mkdir()
    (folder / "tokenizer.json" / "x").write_text("in the way")


def plant_client_state(folder: Path, victim: Path) -> None:
    """The client takes a file for complete by what it has noted."""
    shutil.rmtree(folder / ".cache", ignore_errors=True)
    (folder / ".cache").symlink_to(victim)


def plant_folder(folder: Path, victim: Path) -> None:
    shutil.rmtree(folder)
    folder.symlink_to(victim)


@pytest.mark.parametrize("plant", [plant_links, plant_special_files, plant_client_state, plant_folder])
def test_pull_that_goes_on_follows_nothing_that_was_planted_meanwhile(pushed, refused, output, tmp_path, plant):
    pushed.add_commit(REPO, {"sub/thesis.txt": b"theirs", "sub/more.txt": b"2"})
    pushed.cut(f"/resolve/.*{SHARDS[1]}", after_bytes=10, times=1000)
    refused(keeps=True)
    pushed.heal()
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "thesis.txt").write_text("mine")
    plant(kept(output), victim)
    pull(REPO, output)
    assert contents(output) == whole(pushed) and contents(victim) == {"thesis.txt": b"mine"}
    assert all(path.is_dir() or path.stat().st_nlink == 1 for path in output.rglob("*"))
    assert not any(path.is_symlink() for path in output.rglob("*")) and list(output.parent.iterdir()) == [output]


def test_pull_when_the_target_appears_meanwhile_leaves_it(pushed, output, capsys):
    def appear() -> None:
        output.mkdir()
        (output / "mine.txt").write_text("mine")

    pushed.after(f"/resolve/.*{SHARDS[2]}", appear)
    code, _, error = run_cli(capsys, "pull", "--repo", REPO, "--output", str(output))
    assert code == 2 and "has changed while its new content was made; that is in" in error
    assert contents(output) == {"mine.txt": b"mine"}
    aside = Path(re.search(r"that is in (\S+) now", error)[1])
    assert contents(aside) == whole(pushed)


def test_pull_gives_files_the_usual_permissions(pushed, output):
    mask = os.umask(0o027)
    try:
        pull(REPO, output)
    finally:
        os.umask(mask)
    assert stat.S_IMODE(output.stat().st_mode) == 0o750
    assert {stat.S_IMODE(path.stat().st_mode) for path in output.iterdir()} == {0o640}, "nothing can be executed"


@pytest.mark.parametrize(
    "name, message",
    [
        (".", "is the current folder or a mount point"),
        ("..", "is not empty"),
        ("/", "is not empty"),
        ("~", "is not empty"),
        ("file", "is a file"),
        ("file/model", "lies in"),
        ("fifo", "is a FIFO"),
        ("fifo/model", "is a FIFO"),
        ("/dev/null", "is a device"),
        ("dangling", "is a link that leads nowhere"),
        ("dangling/model", "is a link that leads nowhere"),
        ("", "is empty"),
        ("full", "is not empty"),
        ("link-to-full", "is not empty"),
        ("x" * 300, "too long"),
    ],
)
def test_pull_refuses_outputs_that_are_not_new_folders(pushed, tmp_path, capsys, monkeypatch, name, message):
    here = tmp_path / "here"
    (here / "now").mkdir(parents=True)
    (here / "file").write_text("mine")
    os.mkfifo(here / "fifo")
    (here / "dangling").symlink_to("nowhere")
    (here / "full").mkdir()
    (here / "full" / "mine.txt").write_text("mine")
    (here / "link-to-full").symlink_to("full")
    monkeypatch.setenv("HOME", str(here))
    monkeypatch.chdir(here / "now" if name in (".", "..") else here)
    before = contents(here), sorted(here.rglob("*"))
    code, _, error = run_cli(capsys, "pull", "--repo", REPO, "--output", name)
    assert code == 2 and message in error and len(error.splitlines()) == 1, error
    assert (contents(here), sorted(here.rglob("*"))) == before and stat.S_ISFIFO((here / "fifo").stat().st_mode)
    assert not fetched(pushed)


# ---- names


ACTING = [
    *(".git/config", ".git/hooks/post-checkout", ".gitattributes", ".gitmodules", ".github/workflows/x.yml", ".env"),
    *(
        ".envrc",
        ".vscode/tasks.json",
        ".idea/x.json",
        ".netrc",
        ".ssh/config",
        ".cache/huggingface/x.json",
        "a/.git/config",
    ),
    *(
        "sitecustomize.py",
        "usercustomize.py",
        "conftest.py",
        "setup.py",
        "torch.py",
        "json.py",
        "sub/modeling_grinmoe.py",
    ),
    *(
        "x.pth",
        "pyproject.toml",
        "setup.cfg",
        "tox.ini",
        "Makefile",
        "CMakeLists.txt",
        "package.json",
        "Dockerfile",
        "x.so",
    ),
    *(
        "AGENTS.md",
        "sub/CLAUDE.md",
        "run.sh",
        "x.ipynb",
        "x.exe",
        "pickles.data",
        "noxfile.py",
        "x.desktop",
        ".DS_Store",
    ),
]


def test_pull_leaves_out_what_acts_on_programs_of_the_user(pushed, output, capsys):
    pushed.add_commit(REPO, dict.fromkeys(ACTING, b"[core]\n\tfsmonitor = touch /tmp/x\n"))
    before = whole(pushed)
    pull(REPO, output)
    assert contents(output) == {name: content for name, content in before.items() if name not in ACTING}
    assert not [path for path in pushed.paths("GET", "/resolve/") if any(path.endswith(f"/{name}") for name in ACTING)]
    printed = capsys.readouterr().out
    assert (
        "left out, because a checkpoint does not need them and other programs could act on them: .DS_Store, .c"
        in printed
    )
    assert (
        re.search(r"\.cache.* and \d\d more\n", printed) and "left out, because a pickle can run code: x.pth" in printed
    )


KEPT = [
    *(
        "config.json",
        "model-00001-of-00017.safetensors",
        "tokenizer.model",
        "chat_template.jinja",
        "vocab.txt",
        "merges.txt",
    ),
    *(
        "additional_chat_templates/tool.jinja",
        "LICENSE",
        "LICENCE-CODE",
        "NOTICE",
        "README.md",
        "assets/Über 1.PNG",
        "x.gguf",
    ),
    *(
        "configuration_grinmoe.py",
        "modeling_grinmoe.py",
        "tokenization_phimoe_fast.py",
        "images/a b (1).svg",
        "CITATION",
    ),
]


@pytest.mark.parametrize("name", [*KEPT, *(file.name for file in code_files())])
def test_files_that_checkpoints_have_belong_to_one(name):
    assert belongs_to_a_checkpoint(name)


@pytest.mark.parametrize(
    "name, message",
    [
        ("../out.txt", "leads out of its folder"),
        ("/etc/x.txt", "leads out of its folder"),
        ("sub/../../x.txt", "leads out of its folder"),
        ("sub//x.txt", "leads out of its folder"),
        ("sub/./x.txt", "leads out of its folder"),
        ("C:x.txt", "leads out of its folder"),
        ("..\\x.txt", "leads out of its folder"),
        ("x\x1b]0;owned\x07.txt", "characters that control a terminal"),
        ("x\ny.txt", "characters that control a terminal"),
        ("x\r.txt", "characters that control a terminal"),
        ("x\x9b31m.txt", "characters that control a terminal"),
        ("x\u202etxt.json", "characters that control a terminal"),
        ("x\u200b.txt", "characters that control a terminal"),
        ("x\ud800.txt", "characters that control a terminal"),
        ("x" * 300 + ".txt", "too long for a file system"),
        ("a/" * 600 + "x.txt", "too long for a file system"),
        ("CONFIG.json", "one file on many disks"),
        ("config.json/x.txt", "one file on many disks"),
        ("Ko\u0308rper.txt", "one file on many disks"),
        ("", "not the Hub"),
        (7, "not the Hub"),
        (None, "not the Hub"),
    ],
)
def test_pull_refuses_names_that_do_harm(pushed, refused, name, message):
    def list_it(reply: Reply) -> Reply:
        entry = {"size": 1, "blobId": "0" * 40}
        added = [{"rfilename": name, **entry}, {"rfilename": "K\u00f6rper.txt", **entry}]
        return replace(reply, body={**reply.body, "siblings": [*reply.body["siblings"], *added]})

    pushed.change("/api/models/", list_it)
    said = refused()
    assert message in said and said.isprintable() and len(said) < 1000
    assert not fetched(pushed)


def test_messages_hold_no_control_characters_of_the_server(pushed, refused):
    pushed.fail("/api/models", 403, message="x\x7f\x85")
    pushed.change(
        "/api/models", lambda reply: replace(reply, headers={**reply.headers, "X-Error-Message": "a\x85\xadb"})
    )
    assert refused().isprintable()


# ---- pickles and programs under other names


def archive(kind: str) -> bytes:
    file = io.BytesIO()
    if kind == "tar":
        with tarfile.open(fileobj=file, mode="w") as opened:
            opened.addfile(tarfile.TarInfo("data.pkl"))
    else:
        with zipfile.ZipFile(file, "w") as opened:
            opened.writestr("data.pkl", "x")
    return file.getvalue()


def saved_by_torch(module: bool) -> bytes:
    file = io.BytesIO()
    if module:
        torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), file)
    else:
        torch.save({"a": 1}, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


def saved_by_numpy() -> bytes:
    file = io.BytesIO()
    np.save(file, np.array([Call()], dtype=object), allow_pickle=True)
    return file.getvalue()


DISGUISED = {
    **{f"protocol {number}": pickle.dumps(Call(), protocol=number) for number in range(pickle.HIGHEST_PROTOCOL + 1)},
    "protocol 0, with more around": b"N0"
    + pickle.dumps([1, "x" * 100, Call()], protocol=0)[:-1]
    + b"\nnot a pickle any more",
    "INST": b"(S'x'\nios\nsystem\n.",
    "torch.save, old": saved_by_torch(module=False),
    "torchscript": saved_by_torch(module=True),
    "zip": archive("zip"),
    "zip behind a picture": b"\x89PNG\r\n\x1a\n" + bytes(100) + archive("zip"),
    "tar": archive("tar"),
    "numpy": saved_by_numpy(),
    "hdf5": b"\x89HDF\r\n\x1a\n" + bytes(100),
    "hdf5 behind a block": bytes(512) + b"\x89HDF\r\n\x1a\n",
    "gzip": b"\x1f\x8b\x08" + bytes(20),
    "elf": b"\x7fELF" + bytes(60),
}


@pytest.mark.parametrize("kind", DISGUISED)
def test_runs_code_tells_pickles_and_programs_by_their_bytes(tmp_path, kind):
    for name in ("notes.json", "LICENSE", "picture.png", "extra.safetensors", "x.model"):
        (tmp_path / name).write_bytes(DISGUISED[kind])
        assert runs_code(tmp_path / name), name


@pytest.mark.parametrize(
    "text",
    [
        *(
            "MIT License",
            "Copyright (c) 2024",
            "cats\ndogs\n(R",
            "cos\nsystem\n.",
            "I am",
            "Git v2.28 Release Notes\n\n(R.",
            "",
        ),
        *(
            "(a) b",
            "{}",
            "[1]",
            '{"R": "cos\\nsystem"}',
            "# x",
            "Version 2\n",
            "N0)R.",
            "\x80",
            "PK",
            "MZ is a prefix\nof x",
        ),
    ],
)
def test_runs_code_takes_text_for_text(tmp_path, text):
    (tmp_path / "x.txt").write_text(text)
    assert runs_code(tmp_path / "x.txt") is None


def test_runs_code_opens_no_fifo(tmp_path):
    os.mkfifo(tmp_path / "x.json")
    assert runs_code(tmp_path / "x.json") is None


@pytest.mark.parametrize("name", ["notes.json", "sub/data.txt", "extra.safetensors"])
@pytest.mark.parametrize("kind", ["protocol 0", "protocol 4", "zip behind a picture"])
def test_pull_refuses_pickles_and_programs_under_other_names(pushed, refused, output, kind, name):
    pushed.add_commit(REPO, {name: DISGUISED[kind]})
    said = refused(keeps=True)
    assert f"{REPO} holds {name}, which is " in said and "can run code; do not use this repository" in said
    assert not (kept(output) / name).exists()


@pytest.mark.parametrize("length", [0x0280, 0x0380, 0x0480, 0x0580])
def test_weights_whose_header_begins_like_a_pickle_are_taken(pushed, output, length):
    """The first bytes of safetensors are the length of the header."""
    header = json.dumps({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).ljust(length).encode()
    weights = struct.pack("<Q", length) + header + bytes(4)
    assert weights[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
    pushed.add_commit(REPO, {"extra/x.safetensors": weights})
    assert contents(pull(REPO, output)) == whole(pushed)


# ---- answers that are not the Hub's


def with_file(**entries):
    """A change of the first file of the list."""

    def change(reply: Reply) -> Reply:
        first, *others = reply.body["siblings"]
        return replace(reply, body={**reply.body, "siblings": [*others, {**first, "rfilename": "x.txt", **entries}]})

    return change


def with_entry(**entries):
    return lambda reply: replace(reply, body={**reply.body, **entries})


LFS = {"size": 1, "sha256": "0" * 64, "pointerSize": 3}
ANSWERS = {
    "a list": lambda reply: replace(reply, body=[]),
    "null": lambda reply: replace(reply, body=b"null"),
    "a number": lambda reply: replace(reply, body=b"1"),
    "not JSON": lambda reply: replace(reply, body=b"<html>"),
    "nothing": lambda reply: replace(reply, body=b""),
    "not UTF-8": lambda reply: replace(reply, body=b"\xff\xfe{}"),
    "deep": lambda reply: replace(reply, body=b"[" * 200_000),
    "no id": lambda reply: replace(reply, body={"sha": "0" * 40}),
    "sha null": with_entry(sha=None),
    "sha a path": with_entry(sha="../../x"),
    "sha a number": with_entry(sha=7),
    "siblings null": with_entry(siblings=None),
    "siblings a text": with_entry(siblings="config.json"),
    "siblings an object": with_entry(siblings={"config.json": 1}),
    "siblings of numbers": with_entry(siblings=[1, 2]),
    "siblings of null": with_entry(siblings=[None]),
    "siblings without names": with_entry(siblings=[{}]),
    "a date": with_entry(createdAt="yesterday"),
    "safetensors": with_entry(safetensors=7),
    "size negative": with_file(size=-1),
    "size huge": with_file(size=2**63),
    "size a float": with_file(size=1e300),
    "size a text": with_file(size="12"),
    "size true": with_file(size=True),
    "size null": with_file(size=None),
    "blob null": with_file(blobId=None),
    "blob a number": with_file(blobId=5),
    "blob short": with_file(blobId="abc"),
    "lfs a text": with_file(lfs="x"),
    "lfs without hash": with_file(lfs={"size": 1}),
    "lfs null hash": with_file(size=1, lfs={**LFS, "sha256": None}),
    "lfs short hash": with_file(size=1, lfs={**LFS, "sha256": "0" * 40}),
    "lfs of another size": with_file(size=2, lfs=LFS),
}


@pytest.mark.parametrize("kind", ANSWERS)
def test_pull_names_an_answer_that_is_not_the_hubs(pushed, refused, output, kind):
    pushed.change("/api/models/", ANSWERS[kind], times=9)
    said = refused()
    assert "what answered is not the Hub" in said or "the server does not tell the" in said
    with pytest.raises(HubError):
        pull(REPO, output)
    assert not fetched(pushed)


def test_pull_of_a_list_of_very_many_files_ends_soon(pushed, refused):
    added = [{"rfilename": f"data/{number}.txt", "size": 1, "blobId": "0" * 40} for number in range(100_000)]
    pushed.change("/api/models/", lambda r: replace(r, body={**r.body, "siblings": [*r.body["siblings"], *added]}))
    start = time.monotonic()
    assert "files; a checkpoint has at most 10,000" in refused()
    assert time.monotonic() - start < 30 and not fetched(pushed)


def test_pull_leaves_out_very_many_files_that_are_not_a_checkpoints(pushed, output):
    """What is fetched is not compared with what is not."""
    added = [{"rfilename": f".git/objects/{number}", "size": 1, "blobId": "0" * 40} for number in range(100_000)]
    pushed.change("/api/models/", lambda r: replace(r, body={**r.body, "siblings": [*r.body["siblings"], *added]}))
    start = time.monotonic()
    assert contents(pull(REPO, output)) == whole(pushed)
    assert time.monotonic() - start < 30


# ---- real processes


# A shell starts its background jobs with SIGINT ignored, which processes inherit.
PULL = (
    "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); from grinmoe_cli import main; "
    "sys.exit(main(['pull', '--repo', sys.argv[1], '--output', sys.argv[2]]))"
)


def start_pull(hub, output, tmp_path) -> subprocess.Popen:
    environment = {**hub.environment(tmp_path / "home"), "HF_HUB_DOWNLOAD_TIMEOUT": "60"}
    return subprocess.Popen(
        [sys.executable, "-c", PULL, REPO, str(output)], env=environment, stderr=subprocess.PIPE, text=True
    )


def wait_for(condition) -> None:
    end = time.monotonic() + 90
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.integration
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_pull_that_is_ended_by_a_signal_goes_on_and_fetches_nothing_twice(pushed, output, tmp_path, sent):
    pushed.delay(f"/resolve/.*{SHARDS[1]}", seconds=120, times=1000, method="GET")
    process = start_pull(pushed, output, tmp_path)
    wait_for(lambda: len(fetched(pushed)) == len(whole(pushed)) or process.poll() is not None)
    wait_for(lambda: len(contents(kept(output)).keys() & whole(pushed).keys()) == len(whole(pushed)) - 1)
    process.send_signal(sent)
    pushed.closing.set()  # ends the delay
    assert process.wait(60) == {signal.SIGKILL: -9, signal.SIGINT: 130, signal.SIGTERM: -15}[sent], (
        process.stderr.read()
    )
    assert not output.exists()
    pushed.heal()
    pushed.requests.clear()
    assert contents(pull(REPO, output)) == whole(pushed)
    assert fetched(pushed) == [SHARDS[1]] and list(output.parent.iterdir()) == [output]


@pytest.mark.integration
def test_pull_sends_the_token_to_no_other_host(pushed, output, tmp_path):
    """Weights come from hosts of their own; a server could redirect anything anywhere."""
    with HubServer() as other:
        elsewhere = other.endpoint.replace("127.0.0.1", "localhost")
        for name, content in pushed.files(REPO).items():
            other.add_commit(REPO, {name: content})

        def away(reply: Reply) -> Reply:
            path = f"/{REPO}/resolve/main/{SHARDS[0]}"
            return Reply(b"", 302, {**reply.headers, "Location": f"{elsewhere}{path}"})

        pushed.change(f"/resolve/.*{SHARDS[0]}", away, times=100)
        process = start_pull(pushed, output, tmp_path)
        assert process.wait(120) == 0, process.stderr.read()
        assert contents(output) == whole(pushed)
        assert other.requests and {seen.authorization for seen in other.requests} == {None}
        assert f"Bearer {WRITER}" in {seen.authorization for seen in pushed.requests}


@pytest.fixture
def interruptible():
    """SIGINT is a KeyboardInterrupt, also in a shell's background job, which has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_interrupted_downloads_end_at_once(pushed, output, monkeypatch):
    """Threads are waited for; those that download look at each piece whether they are still wanted."""
    pushed.add_commit(REPO, {"large.txt": b"x" * 3_000_000})
    pieces = []
    update = tqdm.update

    def interrupt(self, n=1):
        pieces.append(n)
        if len(pieces) == 1:
            signal.raise_signal(signal.SIGINT)
            time.sleep(0.2)
        return update(self, n)

    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    monkeypatch.setattr(tqdm, "update", interrupt)
    with pytest.raises(KeyboardInterrupt):
        pull(REPO, output)
    assert len(pieces) < 2000, "not all of 3,000 pieces"
    monkeypatch.setattr(tqdm, "update", update)
    assert contents(pull(REPO, output)) == whole(pushed)
