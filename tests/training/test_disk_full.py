"""A full disk is called that, and the same command goes on when there is room again."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from grinmoe.files import DiskFullError
from grinmoe.training import run as training
from grinmoe.training.run_directory import COMPLETE
from tests.training.runs import assert_same_end, run

pytestmark = pytest.mark.integration

NO_SPACE = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def fail_at(monkeypatch, owner, name: str, when, error: BaseException) -> None:
    """Let `owner.name` fail once, where `when(arguments)` first holds."""
    original, failed = getattr(owner, name), []

    def failing(*args, **kwargs):
        if not failed and when(*args, **kwargs):
            failed.append(True)
            raise error
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, failing)


def weights_of(step: int):
    return lambda self, folder, *args, **kwargs: f"checkpoint-{step}" in str(folder)


def file_of(name: str):
    return lambda content, file, *args, **kwargs: str(file).endswith(name)


def write_of(name: str):
    return lambda self, *args, **kwargs: self.name.startswith(f".{name}-")


TORCH = RuntimeError("[enforce fail at inline_container.cc:858] . PytorchStreamWriter failed writing file data/0")
MOMENTS = {
    "weights": (training.Trainer, "save_model", weights_of(4), SafetensorError("I/O error: No space (os error 28)")),
    "optimizer": (torch, "save", file_of("checkpoint-4/optimizer.pt"), TORCH),
    "scheduler": (torch, "save", file_of("checkpoint-4/scheduler.pt"), RuntimeError("unexpected pos 64 vs 0")),
    "first checkpoint": (torch, "save", file_of("checkpoint-2/optimizer.pt"), TORCH),
    "manifest": (Path, "write_text", write_of("manifest"), NO_SPACE),
    "start": (Path, "write_text", write_of("run"), NO_SPACE),
    "log": (Path, "write_text", write_of("metrics"), NO_SPACE),
    "result": (training, "save_trained", lambda *args: True, NO_SPACE),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_full_disk_is_told_and_the_same_command_goes_on(flags, undisturbed, tmp_path, moment):
    given = flags(tmp_path / "run")
    with pytest.MonkeyPatch.context() as monkeypatch:
        fail_at(monkeypatch, *MOMENTS[moment])
        with pytest.raises(DiskFullError, match="the disk is full: writing to .*run.* failed .* are free there"):
            run(given)
    assert not list(tmp_path.rglob("*partial*")) and not list((tmp_path / "run").glob(".*"))
    assert run(given).status == COMPLETE
    assert_same_end(tmp_path / "run", undisturbed("full"))


ENDS = {
    "read-only": (errno.EROFS, "Read-only file system"),
    "broken": (errno.EIO, "Input/output error"),
    "size limit": (errno.EFBIG, "File too large"),
}


@pytest.mark.parametrize("writer", ["weights", "optimizer", "manifest"])
@pytest.mark.parametrize("end", ENDS)
def test_a_disk_that_cannot_be_written_for_another_reason_is_not_called_full(flags, tmp_path, monkeypatch, end, writer):
    number, text = ENDS[end]
    owner, name, when, _ = MOMENTS[writer]
    error = {"weights": SafetensorError(f"I/O error: {text} (os error {number})"), "optimizer": TORCH}.get(writer)

    def refused(*args, **kwargs):  # torch's error has no number
        raise OSError(number, text)

    if error is TORCH:
        monkeypatch.setattr(tempfile, "TemporaryFile", refused)
    fail_at(monkeypatch, owner, name, when, error or OSError(number, text))
    with pytest.raises(OSError, match=f"{text}.*run") as caught:
        run(flags(tmp_path / "run"))
    assert not isinstance(caught.value, DiskFullError) and caught.value.errno == number


@pytest.mark.integration
@pytest.mark.parametrize("size", [3_000, 50_000, 900_000])
def test_a_limit_of_file_sizes_is_told(flags, tmp_path, capsys, size):
    from grinmoe_cli import main

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        code = main(["sft", *flags(tmp_path / "run")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    said = capsys.readouterr().err
    assert code == 2 and "File too large" in said and "ulimit -f" in said and "disk is full" not in said, said
    assert main(["sft", *flags(tmp_path / "run")]) == 0


@pytest.fixture
def small_disk():
    """A file system of its own of 4 MB."""
    folder = Path(tempfile.mkdtemp())
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        folder.rmdir()
        pytest.skip("needs the right to mount")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)
    folder.rmdir()


@pytest.mark.integration
@pytest.mark.parametrize("mebibytes", [0.01, 0.5, 1, 1.5, 2, 3, 4, 5])
def test_on_a_disk_that_is_really_full_the_command_says_so_and_later_goes_on(
    flags, undisturbed, small_disk, capsys, mebibytes
):
    from grinmoe_cli import main

    def resize(size: float) -> None:
        subprocess.run(["mount", "-o", f"remount,size={int(size * 1024)}k", str(small_disk)], check=True)

    resize(mebibytes)
    given = ["sft", *flags(small_disk / "run")]
    code = main(given)
    assert code == 2 and "disk is full" in (said := capsys.readouterr().err) and "MB are free" in said, (code, said)
    resize(64)
    assert main(given) == 0, capsys.readouterr().err
    assert_same_end(small_disk / "run", undisturbed("full"))
