"""A training goes on exactly, from an older whole checkpoint with a word, or not at all: never from what is not whole."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from grinmoe.checkpoint_grinmoe import CheckpointError
from grinmoe.distributed import MANIFEST_NAME, DamagedCheckpointError, check_manifest, write_manifest
from grinmoe.training import checkpoints, last_whole_checkpoint
from grinmoe.training import run as training
from grinmoe.training.checkpoints import delete_older_checkpoints
from grinmoe.training.recipe import read_recipe
from grinmoe.training.run_directory import COMPLETE
from tests.training.runs import assert_same_end, cut_off, run, tree


def zero_page(file: Path, share: float = 0.5) -> None:
    """As a power loss leaves a page that never reached the disk."""
    content = bytearray(file.read_bytes())
    start = int(len(content) * share) // 4096 * 4096
    page = content[start : start + 4096]
    if not any(page):
        start, page = 0, content[:4096]
    content[start : start + len(page)] = bytes(len(page))
    file.write_bytes(content)


def drop_tensors(file: Path) -> None:
    tensors = load_file(file)
    save_file(dict(list(tensors.items())[1:]), file, metadata={"format": "pt"})


def one(folder: Path, pattern: str) -> Path:
    return next(iter(sorted(folder.glob(pattern))))


def swap(folder: Path, pattern: str) -> None:
    """A file of the other checkpoint, which may have the same size."""
    shutil.copyfile(one(folder.with_name("checkpoint-2"), pattern), one(folder, pattern))


WEIGHTS = "*model.safetensors"
DAMAGES = {
    "optimizer missing": lambda folder: (folder / "optimizer.pt").unlink(),
    "scheduler missing": lambda folder: (folder / "scheduler.pt").unlink(),
    "random state missing": lambda folder: (folder / "rng_state.pth").unlink(),
    "state missing": lambda folder: (folder / "trainer_state.json").unlink(),
    "weights missing": lambda folder: one(folder, WEIGHTS).unlink(),
    "config missing": lambda folder: one(folder, "*config.json").unlink(),
    "tensors missing": lambda folder: drop_tensors(one(folder, WEIGHTS)),
    "page of weights": lambda folder: zero_page(one(folder, WEIGHTS)),
    "page of optimizer": lambda folder: zero_page(folder / "optimizer.pt"),
    "page of random state": lambda folder: zero_page(folder / "rng_state.pth"),
    "page of state": lambda folder: zero_page(folder / "trainer_state.json"),
    "page of manifest": lambda folder: zero_page(folder / MANIFEST_NAME),
    "empty manifest": lambda folder: (folder / MANIFEST_NAME).write_text(""),
    "other manifest": lambda folder: (folder / MANIFEST_NAME).write_text('{"files": []}'),
    "weights cut": lambda folder: os.truncate(one(folder, WEIGHTS), one(folder, WEIGHTS).stat().st_size - 1),
    "weights longer": lambda folder: one(folder, WEIGHTS).open("ab").write(b"\0"),
    "weights of another step": lambda folder: swap(folder, WEIGHTS),
    "optimizer of another step": lambda folder: swap(folder, "optimizer.pt"),
    "scheduler of another step": lambda folder: swap(folder, "scheduler.pt"),
    "random state of another step": lambda folder: swap(folder, "rng_state.pth"),
    "all of another step": lambda folder: shutil.copytree(folder.with_name("checkpoint-2"), folder, dirs_exist_ok=True),
    "a file is a link": lambda folder: (
        shutil.move(folder / "optimizer.pt", folder.parent.parent / "optimizer.pt"),
        (folder / "optimizer.pt").symlink_to(folder.parent.parent / "optimizer.pt"),
    ),
}


@pytest.mark.parametrize("method", ["full", pytest.param("lora", marks=pytest.mark.integration)])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_kept_aside_and_the_one_before_is_taken(
    flags,
    undisturbed,
    tmp_path,
    capsys,
    damage,
    method,
    monkeypatch,
):
    folder = cut_off(undisturbed(method), tmp_path / "run")
    DAMAGES[damage](folder / "checkpoint-4")
    opened = training.RunFolder.open(folder, read_recipe("sft", flags(folder, method=method)), 4)
    assert opened.checkpoint.name == "checkpoint-2"
    assert [path.name for path, _ in opened.found.damaged] == ["checkpoint-4"] and not opened.found.partial
    said = opened.start("a test", {}, "")
    assert len(said) == 1 and "checkpoint-4" in said[0] and "kept as damaged-checkpoint-4" in said[0]
    assert (folder / "damaged-checkpoint-4").is_dir() and not (folder / "checkpoint-4").exists()


@pytest.mark.integration
@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_run_with_a_damaged_checkpoint_ends_as_if_it_were_whole(
    flags,
    undisturbed,
    tmp_path,
    capsys,
    method,
):
    folder = cut_off(undisturbed(method), tmp_path / "run")
    zero_page(one(folder / "checkpoint-4", WEIGHTS))
    assert run(flags(folder, method=method)).status == COMPLETE
    said = capsys.readouterr().out
    assert "has another SHA-256" in said and "Going on from" in said and "checkpoint-2" in said
    assert_same_end(folder, undisturbed(method))
    assert run(flags(folder, method=method)).status == COMPLETE, "said to be complete already"


def test_without_another_checkpoint_a_damaged_one_is_refused_and_stays(
    flags,
    undisturbed,
    tmp_path,
):
    folder = cut_off(undisturbed("full"), tmp_path / "run")
    shutil.rmtree(folder / "checkpoint-2")
    (folder / "checkpoint-4" / "optimizer.pt").unlink()
    before = tree(folder)
    with pytest.raises(ValueError, match="checkpoint-4 lacks optimizer.pt.* No whole checkpoint is left"):
        run(flags(folder))
    assert tree(folder) == before


def test_what_a_kill_leaves_without_a_manifest_is_removed(flags, undisturbed, tmp_path):
    folder = cut_off(undisturbed("full"), tmp_path / "run")
    (folder / "checkpoint-4" / MANIFEST_NAME).unlink()
    opened = training.RunFolder.open(folder, read_recipe("sft", flags(folder)), 4)
    assert opened.checkpoint.name == "checkpoint-2" and not opened.found.damaged
    assert opened.start("a test", {}, "") == ["checkpoint-4 was cut off while it was written or deleted; removed"]
    assert not (folder / "checkpoint-4").exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model-00001-of-00002.safetensors", "rng_state_1.pth", "a/b"])
def test_a_file_that_the_manifest_does_not_have_is_refused_by_name(
    flags,
    undisturbed,
    tmp_path,
    name,
):
    folder = cut_off(undisturbed("full"), tmp_path / "run")
    file = folder / "checkpoint-4" / name
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(b"x")
    with pytest.raises(CheckpointError, match=f"holds {name}, which its manifest does not have"):
        run(flags(folder))
    assert file.exists()


@pytest.mark.parametrize("name", ["notes.txt", "eval_results.json", "events.out.tfevents.1.host.2.0", "loss curve.png"])
def test_a_file_that_somebody_has_added_is_no_reason_to_refuse(undisturbed, tmp_path, name):
    folder = cut_off(undisturbed("full"), tmp_path / "run")
    (folder / "checkpoint-4" / name).write_text("mine")
    assert last_whole_checkpoint(folder).name == "checkpoint-4"


def test_a_deleted_checkpoint_leaves_what_somebody_has_added(flags, undisturbed, tmp_path):
    folder = cut_off(undisturbed("full"), tmp_path / "run")
    for _ in range(2):
        (folder / "checkpoint-2" / "eval" / "de").mkdir(parents=True, exist_ok=True)
        for name in ("notes.txt", "eval/de/results.json"):
            (folder / "checkpoint-2" / name).write_text("mine")
        shutil.copytree(folder / "checkpoint-2", tmp_path / "checkpoint-2", dirs_exist_ok=True)
        delete_older_checkpoints(folder, 1, None)
        assert not (folder / "checkpoint-2").exists()
        shutil.move(tmp_path / "checkpoint-2", folder)
    for kept in ("kept-checkpoint-2", "kept-checkpoint-2-2"):
        assert tree(folder / kept) == ["eval", "eval/de", "eval/de/results.json", "notes.txt"]


@pytest.mark.parametrize("name", ["checkpoint-04", "checkpoint-\u0664", "checkpoint-4-backup", "checkpoint-4 (copy)"])
def test_a_folder_with_another_name_than_the_trainer_s_is_left_alone(flags, undisturbed, tmp_path, name):
    folder = cut_off(undisturbed("full"), tmp_path / "run")
    (folder / name).mkdir()
    opened = training.RunFolder.open(folder, read_recipe("sft", flags(folder)), 4)
    opened.start("a test", {}, "")
    assert opened.checkpoint.name == "checkpoint-4" and (folder / name).is_dir()


def test_a_run_that_was_copied_elsewhere_with_its_model_and_data_goes_on(
    flags, undisturbed, chat_model, chat_data, tmp_path, capsys
):
    there = tmp_path / "another machine"
    folder = cut_off(undisturbed("full"), there / "runs" / "copy")
    shutil.rmtree(folder / "checkpoint-4")
    shutil.copytree(chat_model, there / "model")
    data = shutil.copy(chat_data["sft"], there / "rows.jsonl")
    moved = flags(folder, model=there / "model", train_data=data)
    assert run(moved).status == COMPLETE
    assert "Going on from" in capsys.readouterr().out
    assert_same_end(folder, undisturbed("full"))


@pytest.mark.parametrize("changed", ["model", "train_data", "tokenizer"])
def test_another_model_or_data_under_another_path_is_refused(
    flags, undisturbed, chat_model, chat_data, tmp_path, changed
):
    folder = cut_off(undisturbed("full"), tmp_path / "run")
    shutil.rmtree(folder / "checkpoint-4")
    other = tmp_path / "other"
    if changed == "train_data":
        rows = chat_data["sft"].read_text().splitlines()
        other.with_suffix(".jsonl").write_text("\n".join([*rows[1:], rows[0]]))
        other = other.with_suffix(".jsonl")
    elif changed == "model":
        shutil.copytree(chat_model, other)
        content = bytearray((other / "model.safetensors").read_bytes())
        content[-1] ^= 1
        (other / "model.safetensors").write_bytes(content)
    else:
        shutil.copytree(chat_model, other)
        content = json.loads((other / "tokenizer.json").read_text())
        vocabulary = content["model"]["vocab"]
        one_token, another = list(vocabulary)[-2:]
        vocabulary[one_token], vocabulary[another] = vocabulary[another], vocabulary[one_token]
        (other / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="ha(ve|s) changed since .* was started"):
        run(flags(folder, **{changed: other}))


def test_a_check_that_takes_long_is_told(flags, undisturbed, tmp_path, capsys, monkeypatch):
    folder = cut_off(undisturbed("full"), tmp_path / "run")
    said: list[str] = []
    training.RunFolder.open(folder, read_recipe("sft", flags(folder)), 4, said.append)
    assert said == []
    monkeypatch.setattr(checkpoints, "_BYTES_WORTH_A_WORD", 1000)
    training.RunFolder.open(folder, read_recipe("sft", flags(folder)), 4, said.append)
    assert len(said) == 1 and re.fullmatch(r"Comparing checkpoint-4 \(0\.\d GB\) with its manifest", said[0])


def test_a_hidden_file_beside_a_checkpoint_does_no_harm(undisturbed, tmp_path):
    folder = cut_off(undisturbed("full"), tmp_path / "run")
    (folder / "checkpoint-4" / ".DS_Store").write_bytes(b"x")
    assert last_whole_checkpoint(folder).name == "checkpoint-4"


def test_a_checkpoint_of_another_step_or_run_is_not_taken(flags, undisturbed, tmp_path):
    folder = cut_off(undisturbed("full"), tmp_path / "run")
    other = cut_off(undisturbed("full"), tmp_path / "other")
    (folder / "checkpoint-4").rename(folder / "checkpoint-6")
    opened = training.RunFolder.open(folder, read_recipe("sft", flags(folder)), 4)
    assert opened.checkpoint.name == "checkpoint-2" and "step 4 by its manifest" in opened.found.damaged[0][1]
    record = json.loads((other / "run.json").read_text())
    (other / "run.json").write_text(json.dumps({**record, "run": "0123"}))
    with pytest.raises(ValueError, match="is a checkpoint of another run"):
        run(flags(other))


@pytest.mark.parametrize("kind", ["link", "file", "fifo"])
def test_something_else_under_the_name_of_a_checkpoint_is_refused(flags, undisturbed, tmp_path, kind):
    folder = cut_off(undisturbed("full"), tmp_path / "run")
    target = folder / "checkpoint-6"
    if kind == "link":
        (tmp_path / "elsewhere").mkdir()
        target.symlink_to(tmp_path / "elsewhere")
    elif kind == "file":
        target.write_text("")
    else:
        os.mkfifo(target)
    with pytest.raises(ValueError, match="checkpoint-6 is (a link|not a folder); move it elsewhere"):
        run(flags(folder))
    assert os.path.lexists(target)


class TestManifests:
    @pytest.fixture
    def checkpoint(self, tmp_path) -> Path:
        folder = tmp_path / "checkpoint-7"
        (folder / "part").mkdir(parents=True)
        (folder / "a").write_bytes(b"1" * 5000)
        (folder / "part" / ".b").write_bytes(b"2")
        (folder / "empty").touch()
        write_manifest(folder, run="r")
        return folder

    def test_facts_come_back(self, checkpoint):
        facts = check_manifest(checkpoint)
        assert (facts["step"], facts["run"], list(facts["files"])) == (7, "r", ["a", "empty", "part/.b"])

    def test_every_flipped_byte_is_noticed(self, checkpoint):
        for name in ("a", "part/.b"):
            content = (checkpoint / name).read_bytes()
            for place in {0, len(content) // 2, len(content) - 1}:
                changed = bytearray(content)
                changed[place] ^= 1
                (checkpoint / name).write_bytes(changed)
                with pytest.raises(DamagedCheckpointError, match="another SHA-256"):
                    check_manifest(checkpoint)
            (checkpoint / name).write_bytes(content)
        check_manifest(checkpoint)

    def test_files_are_on_the_disk_before_the_manifest(self, checkpoint, monkeypatch):
        events = []
        sync, replace = os.fsync, Path.replace

        def fsync(descriptor):
            events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
            sync(descriptor)

        monkeypatch.setattr(os, "fsync", fsync)
        monkeypatch.setattr(Path, "replace", lambda self, target: (events.append("renamed"), replace(self, target))[1])
        (checkpoint / MANIFEST_NAME).unlink()
        write_manifest(checkpoint)
        renamed = events.index("renamed")
        assert {"a", ".b", "empty", "part", "checkpoint-7"} <= set(events[:renamed])
        assert "checkpoint-7" in events[renamed:] and checkpoint.parent.name in events[renamed:]

    def test_a_deletion_begins_with_the_manifest(self, tmp_path, monkeypatch):
        """What is left of one that a kill cuts off is partial, and not damaged."""
        for step in (1, 2, 3, 4):
            (tmp_path / f"checkpoint-{step}").mkdir()
            (tmp_path / f"checkpoint-{step}" / "a").touch()
            write_manifest(tmp_path / f"checkpoint-{step}")
        left = []
        monkeypatch.setattr(shutil, "rmtree", lambda folder: left.append((folder.name, tree(folder))))
        delete_older_checkpoints(tmp_path, 2, str(tmp_path / "checkpoint-1"))
        assert left == [("checkpoint-2", ["a"]), ("checkpoint-3", ["a"])]
        left.clear()
        delete_older_checkpoints(tmp_path, None, None)
        assert left == []


def test_the_checkpoint_before_is_deleted_when_the_new_one_has_its_manifest(
    flags,
    tmp_path,
    monkeypatch,
):
    """The Trainer by itself deletes it before."""
    from grinmoe.training import stop

    seen, write = [], stop.write_manifest

    def note(folder, **facts):
        seen.append(sorted(path.name for path in folder.parent.glob("checkpoint-*")))
        write(folder, **facts)

    monkeypatch.setattr(stop, "write_manifest", note)
    training.train(read_recipe("sft", flags(tmp_path / "run", save_total_limit=1, watch_routers=False)), "a test")
    assert seen == [["checkpoint-2"], ["checkpoint-2", "checkpoint-4"]]
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-4"]
