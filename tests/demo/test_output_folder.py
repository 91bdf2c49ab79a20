"""What the demo counts and asks, and what it must not do to a user's folders; nothing is trained here."""

from __future__ import annotations

import json
import os
import socket

import pytest

import grinmoe.demo.demo as demo
from grinmoe.demo import DemoOptions
from grinmoe.demo.chat_corpus import load_corpus

pytestmark = pytest.mark.newest_only  # reads and writes files


def test_active_parameters_leave_out_the_experts_that_a_token_does_not_see(tiny_model):
    model = tiny_model(num_local_experts=4, num_experts_per_tok=1)
    total, active = demo.count_parameters(model)
    assert total == model.num_parameters()
    assert total - active == 2 * 3 * (3 * 32 * 24)  # layers, idle experts, three matrices of an expert


def test_the_prompts_are_two_of_the_training_text_and_one_held_out():
    corpus = load_corpus()
    trained, held_out = ({c[0]["content"] for c in part} for part in (corpus.train, corpus.held_out))
    assert set(demo.PROMPTS[:2]) <= trained and demo.PROMPTS[2] in held_out


def broken_stages(settings, workspace, result, console):
    (workspace / "model").mkdir()
    raise OSError("No space left on device")


@pytest.fixture
def earlier(tmp_path):
    """What a demo has written: a shard and the facts."""
    target = tmp_path / "output"
    (target / "model").mkdir(parents=True)
    (target / "model" / "stale").write_text("")
    (target / "demo.json").write_text(json.dumps({"files": ["demo.json", "model/stale"]}))
    return target


def test_a_failed_demo_leaves_the_earlier_one_whole_and_nothing_beside_it(tmp_path, earlier, monkeypatch):
    monkeypatch.setattr(demo, "_run_stages", broken_stages)
    with pytest.raises(OSError, match="No space left"):
        demo.run_demo(DemoOptions(str(earlier)))
    assert [path.name for path in tmp_path.iterdir()] == ["output"]
    assert (earlier / "model" / "stale").exists()


def test_an_earlier_demo_is_replaced(tmp_path, earlier, monkeypatch):
    monkeypatch.setattr(demo, "_run_stages", lambda settings, workspace, result, console: (workspace / "new").touch())
    monkeypatch.setattr(demo, "_print_summary", lambda result, output, console: None)
    for _ in range(2):
        demo.run_demo(DemoOptions(str(earlier)))
        assert sorted(path.name for path in earlier.iterdir()) == ["demo.json", "new"]
    assert [path.name for path in tmp_path.iterdir()] == ["output"]


@pytest.mark.parametrize("name", ["model/notes.txt", "model/sub/notes.txt", "thesis.txt", "model/link"])
def test_demo_over_an_earlier_one_with_a_file_of_somebody_else_is_refused(earlier, name):
    (earlier / name).parent.mkdir(exist_ok=True)
    (earlier / name).symlink_to("/nowhere") if name == "model/link" else (earlier / name).write_text("mine")
    with pytest.raises(ValueError, match=f"is not empty, and {name} in it is not what an earlier demo wrote"):
        demo.run_demo(DemoOptions(str(earlier)))
    assert os.path.lexists(earlier / name) and (earlier / "model" / "stale").exists()


@pytest.mark.parametrize("kind", ["FIFO", "socket"])
def test_demo_over_a_special_file_is_refused_and_it_stays(tmp_path, kind):
    path = tmp_path / "out"
    if kind == "FIFO":
        os.mkfifo(path)
    else:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
    before = path.stat()
    with pytest.raises(ValueError, match=f"--output .*out is a {kind}; give a new folder"):
        demo.run_demo(DemoOptions(str(path)))
    assert (path.stat().st_ino, path.stat().st_mode) == (before.st_ino, before.st_mode)
    assert [found.name for found in tmp_path.iterdir()] == ["out"]


def test_demo_over_a_device_is_refused_and_it_stays():
    with pytest.raises(ValueError, match="--output /dev/null is a device; give a new folder"):
        demo.run_demo(DemoOptions("/dev/null"))
    assert not os.path.isdir("/dev/null")


def test_a_mount_point_is_refused_before_anything_is_trained():
    """It cannot be replaced by a rename, which is the last step."""
    with pytest.raises(ValueError, match="or a mount point, which stays"):
        demo.run_demo(DemoOptions("/"))


@pytest.mark.parametrize("names", [["thesis.txt"], ["demo.json", "thesis.txt"], ["model"]], ids=str)
def test_a_folder_with_anything_else_in_it_is_refused(tmp_path, names):
    for name in names:
        (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match="is not what an earlier demo wrote"):
        demo.run_demo(DemoOptions(str(tmp_path)))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
