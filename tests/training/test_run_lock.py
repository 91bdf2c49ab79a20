"""One start at a time in a run directory, and nothing left of a start that was refused."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from transformers.integrations import TensorBoardCallback

from grinmoe.training import run as training
from grinmoe.training.run_directory import COMPLETE
from grinmoe.training.run_lock import LOCK_NAME, locked_run
from tests import ROOT
from tests.training.runs import run, tree

# Locks the run directory that it is given, says so, and waits.
HOLDER = """
import os, sys, time
from pathlib import Path
from run_lock import locked_run  # without the package, which takes seconds
with locked_run(Path(sys.argv[1]), keep_if="run.json"):
    child, (reader, writer) = 1, os.pipe()
    if len(sys.argv) > 2:
        child = os.fork()
        os.read(reader, 1) if child else os.write(writer, b"x")  # fork has returned in both
    if child:
        print(child, flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """Starts another process that holds the lock of a folder."""
    started = []

    def hold(folder: Path, *arguments: str) -> tuple[subprocess.Popen, int]:
        command = [sys.executable, "-c", HOLDER, str(folder), *arguments]
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "grinmoe" / "training")}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        started.append(process)
        assert process.stdout is not None
        return process, int(process.stdout.readline())

    yield hold
    for process in started:
        process.kill()
        process.wait()


def test_a_second_start_is_refused_before_anything_is_read(flags, tmp_path, holder, monkeypatch):
    folder = tmp_path / "run"
    process, _ = holder(folder)
    monkeypatch.setattr(training, "load_config", None)
    (tmp_path / "link").symlink_to(folder)
    for name in ("run", "link", "../" + tmp_path.name + "/run"):
        with pytest.raises(ValueError, match=f"is in use by another run .locked by process {process.pid} on"):
            run(flags(tmp_path / name))
    assert os.listdir(folder) == [LOCK_NAME]


@pytest.mark.integration
def test_a_second_start_while_the_result_is_written_is_refused(flags, tmp_path, monkeypatch, capsys):
    from grinmoe_cli import main

    codes, save = [], training.save_trained

    def start_again(*args):
        monkeypatch.setattr(training, "save_trained", save)
        command = [sys.executable, "-m", "grinmoe_cli", "sft", *flags(tmp_path / "run")]
        codes.append(subprocess.run(command, capture_output=True, text=True))
        return save(*args)

    monkeypatch.setattr(training, "save_trained", start_again)
    assert main(["sft", *flags(tmp_path / "run")]) == 0
    assert codes[0].returncode == 2 and "is in use by another run" in codes[0].stderr, codes[0].stderr


def test_the_lock_goes_with_its_process_and_not_with_workers_that_it_has_forked(tmp_path, holder):
    folder = tmp_path / "run"
    process, child = holder(folder, "fork")
    try:
        process.kill()
        process.wait()
        with locked_run(folder, keep_if="run.json") as note:
            assert note is None
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_run_can_be_started_again_in_the_same_process(flags, tmp_path):
    given = flags(tmp_path / "run", watch_routers=False, eval_strategy="no", eval_share=0, max_steps=1)
    assert [run(given).status for _ in range(2)] == [COMPLETE] * 2


def test_a_start_that_found_the_lock_of_a_refused_one_takes_its_own(tmp_path, monkeypatch):
    """The refused start removes the file between the other's open and its lock."""
    lock, other = fcntl.flock, tmp_path / "run" / LOCK_NAME

    def flock(descriptor, how):
        monkeypatch.setattr(fcntl, "flock", lock)
        other.unlink()
        lock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked_run(tmp_path / "run", keep_if="run.json"):
        assert other.is_file()
        with pytest.raises(ValueError, match="in use by another run"):
            with locked_run(tmp_path / "run", keep_if="run.json"):
                pass


@pytest.mark.parametrize("which", ["run", "copy"])
def test_a_copy_by_hard_links_has_a_lock_of_its_own(tmp_path, which):
    """`cp -al` and backups make such copies, in which both folders share the lock file."""
    text = "locked by process 1 on another machine"
    for name in ("run", "copy"):
        (tmp_path / name).mkdir()
    (tmp_path / "run" / LOCK_NAME).write_text(text)
    os.link(tmp_path / "run" / LOCK_NAME, tmp_path / "copy" / LOCK_NAME)
    other = {"run": "copy", "copy": "run"}[which]
    with locked_run(tmp_path / which, keep_if=LOCK_NAME):
        assert (tmp_path / other / LOCK_NAME).read_text() == text
        with locked_run(tmp_path / other, keep_if=LOCK_NAME):
            pass
        with pytest.raises(ValueError, match="in use by another run"):
            with locked_run(tmp_path / which, keep_if=LOCK_NAME):
                pass


def test_a_running_start_keeps_its_lock_when_its_folder_is_copied_by_hard_links(tmp_path):
    with locked_run(tmp_path / "run", keep_if=LOCK_NAME):
        (tmp_path / "copy").mkdir()
        os.link(tmp_path / "run" / LOCK_NAME, tmp_path / "copy" / LOCK_NAME)
        for name in ("run", "copy"):
            with pytest.raises(ValueError, match="in use by another run"):
                with locked_run(tmp_path / name, keep_if=LOCK_NAME):
                    pass


def plant(kind: str, file: Path, victim: Path) -> None:
    if kind == "link":
        file.symlink_to(victim)
    elif kind == "hard link":
        os.link(victim, file)
    elif kind == "dangling link":
        file.symlink_to(victim.with_name("nothing"))
    elif kind == "fifo":
        os.mkfifo(file)
    elif kind == "socket":
        socket.socket(socket.AF_UNIX).bind(str(file))
    elif kind == "folder":
        file.mkdir()
    else:
        file.write_text("somebody's notes")


@pytest.mark.parametrize("kind", ["link", "hard link", "dangling link", "fifo", "socket", "folder", "notes"])
def test_something_else_under_the_lock_s_name_is_refused_and_not_written_to(tmp_path, monkeypatch, kind):
    (victim := tmp_path / "victim").write_text("precious")
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path / "run")  # the path of a socket must be short
    plant(kind, Path(LOCK_NAME), victim)
    with pytest.raises(ValueError, match="run.lock is (a link, or not a file|not a lock file of this command)"):
        with locked_run(tmp_path / "run", keep_if="run.json"):
            pass
    assert victim.read_text() == "precious" and os.path.lexists(LOCK_NAME) and not (tmp_path / "nothing").exists()


def test_a_file_system_without_locks_is_told_by_name(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked_run(tmp_path / "run", keep_if="run.json") as note:
        assert note is not None and "cannot be locked (No locks available): do not start a second run" in note


def test_a_folder_that_cannot_be_written_is_told_by_name(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(ValueError, match="run cannot be written .Read-only file system"):
        with locked_run(tmp_path / "a" / "run", keep_if="run.json"):
            pass
    assert os.listdir(tmp_path) == []


def output(kind: str, folder: Path) -> tuple[Path, str]:
    """An output_dir that cannot be one, and what is said."""
    target = folder / "run"
    if kind == "fifo":
        os.mkfifo(target)
        return target, "is a FIFO"
    if kind == "socket":
        socket.socket(socket.AF_UNIX).bind(str(target))
        return target, "is a socket"
    if kind == "device":
        return Path("/dev/null"), "is a device"
    if kind == "file":
        target.write_text("")
        return target, "is a file"
    if kind == "inside a file":
        target.write_text("")
        return target / "run", "lies in .*, which is a file"
    if kind == "dangling link":
        target.symlink_to(folder / "nothing")
        return target, "is a link that leads nowhere"
    if kind == "no UTF-8":
        return folder / os.fsdecode(b"\xff"), "holds bytes that are not UTF-8"
    target.mkdir()
    (target / "notes.txt").write_text("")
    return target, "holds notes.txt and no run.json"


@pytest.mark.parametrize(
    "kind", ["fifo", "socket", "device", "file", "inside a file", "dangling link", "no UTF-8", "notes"]
)
def test_an_output_dir_that_is_not_one_is_refused_and_nothing_is_left(flags, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(training, "load_config", None)
    monkeypatch.chdir(tmp_path)
    target, said = output(kind, Path(os.path.relpath(tmp_path)))
    before = tree(tmp_path)
    with pytest.raises(ValueError, match=said):
        run(flags(target))
    assert tree(tmp_path) == before and not list(tmp_path.rglob(LOCK_NAME))


def test_a_link_to_a_folder_is_an_output_dir(flags, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "here").symlink_to(tmp_path / "there")
    given = flags(tmp_path / "here", watch_routers=False, eval_strategy="no", eval_share=0, max_steps=1)
    assert run(given).model == tmp_path / "there" / "model"


def test_a_run_inside_of_another_run_is_refused(flags, undisturbed, tmp_path, monkeypatch):
    folder = undisturbed("full")
    monkeypatch.setattr(training, "load_config", None)
    before = tree(folder)
    for inside in ("new", "checkpoint-4/new", "model"):
        with pytest.raises(ValueError, match="lies in .*, the folder of another run"):
            run(flags(folder / inside))
    with pytest.raises(ValueError, match=f"holds {folder.name} and no run.json"):
        run(flags(folder.parent))
    assert tree(folder) == before
    (tmp_path / "run.json").write_text("{}")  # of some other program
    with pytest.raises(TypeError, match="NoneType"):
        run(flags(tmp_path / "run"))


def broken(kind: str, tmp_path: Path) -> dict:
    if kind == "data":
        (tmp_path / "bad.jsonl").write_text("{")
        return {"train_data": tmp_path / "bad.jsonl"}
    if kind == "model":
        (tmp_path / "bad").mkdir()
        return {"model": tmp_path / "bad"}
    return {
        "length": {"max_length": 10**6},
        "setting": {"learning_rate": "nan"},
        "tokenizer": {"tokenizer": "/tmp"},
        "optimizer": {"optim": "adamw_torch", "optim_args": "nonsense"},
        "implementation": {"attn_implementation": "nonsense"},
        "package": {"attn_implementation": "flash_attention_3"},
    }[kind]


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize(
    "kind", ["data", "model", "length", "setting", "tokenizer", "optimizer", "implementation", "package"]
)
def test_a_refused_start_leaves_no_folder(flags, tmp_path, kind, existing):
    target = tmp_path / "a" / "b" / "run"
    settings = broken(kind, tmp_path)
    if existing:
        target.mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises((ValueError, OSError, ImportError, KeyError)):
        run(flags(target, **settings))
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("place", ["load_config", "load_data", "build_trainer"])
def test_a_signal_while_things_are_loaded_ends_at_once_and_leaves_nothing(
    flags, tmp_path, monkeypatch, capsys, place, number
):
    def interrupted(*args):
        try:
            os.kill(os.getpid(), number)
            time.sleep(20)
        except Exception:  # as libraries have them
            pass
        raise AssertionError("the signal was not noticed")

    monkeypatch.setattr(training, place, interrupted)
    from grinmoe.training import SftOptions, run_recipe

    code = run_recipe(SftOptions(task="sft", settings=tuple(flags(tmp_path / "a" / "run"))))
    assert code == (0 if number == signal.SIGTERM else 130)
    assert f"Stopped by {signal.Signals(number).name} before the first step" in capsys.readouterr().out
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_the_result_is_written_lets_it_end(flags, tmp_path, monkeypatch, number):
    save = training.save_trained

    def interrupted(*args):
        os.kill(os.getpid(), number)
        return save(*args)

    monkeypatch.setattr(training, "save_trained", interrupted)
    result = run(flags(tmp_path / "run", watch_routers=False, eval_strategy="no", eval_share=0, max_steps=1))
    assert (result.status, result.signal) == (COMPLETE, None) and (tmp_path / "run" / "model" / "config.json").is_file()


def test_a_start_that_is_killed_while_logs_begin_leaves_a_run_that_goes_on(flags, tmp_path, monkeypatch):
    """Trackers make their folders in the run directory when the training begins."""
    begun = TensorBoardCallback.on_train_begin

    def killed(self, *args, **kwargs):
        begun(self, *args, **kwargs)
        raise KeyboardInterrupt

    settings = {"watch_routers": False, "eval_strategy": "no", "eval_share": 0, "max_steps": 1}
    given = flags(tmp_path / "run", report_to="tensorboard", **settings)
    monkeypatch.setattr(TensorBoardCallback, "on_train_begin", killed)
    with pytest.raises(KeyboardInterrupt):
        run(given)
    monkeypatch.undo()
    assert run(given).status == COMPLETE


def test_a_lock_file_that_cannot_say_whose_it_is_for_a_full_disk_locks(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with locked_run(tmp_path / "a" / "run", keep_if="run.json"):
        with pytest.raises(ValueError, match="in use by another run .just started"):
            with locked_run(tmp_path / "a" / "run", keep_if="run.json"):
                pass
    assert os.listdir(tmp_path) == []


def test_temporary_files_of_a_killed_start_go_and_others_stay(flags, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / ".run-abcd1234.json").write_text("{")
    (folder / ".metrics-abcd1234.json").write_text("[")
    given = flags(folder, watch_routers=False, eval_strategy="no", eval_share=0, max_steps=1)
    assert run(given).status == COMPLETE
    assert not list(folder.glob(".*"))
    (other := tmp_path / "other").mkdir()
    (other / ".run-backup.json").write_text("{")
    with pytest.raises(ValueError, match="holds .run-backup.json and no run.json"):
        run(flags(other))
    assert (other / ".run-backup.json").exists()
