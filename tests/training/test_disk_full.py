"""A full disk is called that, and the same command goes on when there is room again."""

from __future__ import annotations

import errno
import os
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
