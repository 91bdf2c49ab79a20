"""What the demo counts and asks, and what it must not do to a user's folders; nothing is trained here."""

from __future__ import annotations

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


def test_a_failed_demo_leaves_the_earlier_one_whole_and_nothing_beside_it(tmp_path, monkeypatch):
    target = tmp_path / "output"
    target.mkdir()
    (target / "demo.json").write_text("{}")
    monkeypatch.setattr(demo, "_run_stages", broken_stages)
    with pytest.raises(OSError, match="No space left"):
        demo.run_demo(DemoOptions(str(target)))
    assert [path.name for path in tmp_path.iterdir()] == ["output"]
    assert (target / "demo.json").read_text() == "{}"


def test_an_earlier_demo_is_replaced(tmp_path, monkeypatch):
    target = tmp_path / "output"
    (target / "model").mkdir(parents=True)
    (target / "model" / "stale").write_text("")
    (target / "demo.json").write_text("{}")
    monkeypatch.setattr(demo, "_run_stages", lambda settings, workspace, result, console: None)
    monkeypatch.setattr(demo, "_print_summary", lambda result, output, console: None)
    demo.run_demo(DemoOptions(str(target)))
    assert [path.name for path in target.iterdir()] == ["demo.json"]
    assert [path.name for path in tmp_path.iterdir()] == ["output"]


def test_a_mount_point_is_refused_before_anything_is_trained():
    """It cannot be replaced by a rename, which is the last step."""
    with pytest.raises(ValueError, match="is a mount point"):
        demo.run_demo(DemoOptions("/"))


@pytest.mark.parametrize("names", [["thesis.txt"], ["demo.json", "thesis.txt"], ["model"]], ids=str)
def test_a_folder_with_anything_else_in_it_is_refused(tmp_path, names):
    for name in names:
        (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match="not just what an earlier demo left"):
        demo.run_demo(DemoOptions(str(tmp_path)))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
