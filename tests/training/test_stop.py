"""A training that is stopped or killed goes on as if nothing had happened: bit for bit on a CPU."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer

from grinmoe.checkpoint_grinmoe import CheckpointError
from grinmoe.distributed import MANIFEST_NAME
from grinmoe.training.checkpoints import last_whole_checkpoint
from grinmoe.training.run_directory import COMPLETE, STOPPED
from grinmoe.training.stop import StopAtSignal
from tests.tiny import tiny_model, training_arguments
from tests.training.runs import At, assert_same_end, run, terminate

MOMENTS = {
    "at the end of a step": ("on_step_end", 3, 3),
    "between the micro-batches of a step": ("on_substep_end", 3, 2),
    "in an evaluation": ("on_prediction_step", 1, 2),
}


@pytest.mark.parametrize(
    "moment, method",
    [
        pytest.param(
            moment, method, marks=[pytest.mark.integration] * ((moment, method) != ("in an evaluation", "full"))
        )
        for moment in MOMENTS
        for method in ("full", "lora")
    ],
)
def test_a_signal_ends_a_run_with_a_checkpoint_and_the_same_command_goes_on_from_it(
    flags, undisturbed, tmp_path, monkeypatch, moment, method
):
    event, count, step = MOMENTS[moment]
    given = flags(tmp_path / "run", method=method)
    stopped = run(given, monkeypatch, At(event, count, terminate))
    assert (stopped.status, stopped.step, stopped.signal, stopped.model) == (STOPPED, step, "SIGTERM", None)
    assert not (tmp_path / "run" / "checkpoint-4").exists()
    assert last_whole_checkpoint(tmp_path / "run").name == f"checkpoint-{step}"
    again = run(given)
    assert (again.status, again.step) == (COMPLETE, 4)
    assert_same_end(tmp_path / "run", undisturbed(method))


@pytest.mark.integration
def test_a_signal_before_the_first_step_loses_nothing_and_does_not_fail(flags, undisturbed, tmp_path, monkeypatch):
    given = flags(tmp_path / "run")
    stopped = run(given, monkeypatch, At("on_substep_end", 1, terminate))
    assert (stopped.status, stopped.step) == (STOPPED, 0)
    assert run(given).status == COMPLETE
    assert_same_end(tmp_path / "run", undisturbed("full"))


@pytest.mark.integration
def test_evaluations_do_not_change_the_training(flags, undisturbed, tmp_path):
    """They leave the random state alone, which is what makes a stop in the middle of one exact."""
    run(flags(tmp_path / "run", eval_strategy="no", eval_share=0.2))
    assert_same_end(tmp_path / "run", undisturbed("full"))


def test_the_second_control_c_is_a_keyboard_interrupt():
    before = signal.getsignal(signal.SIGTERM)
    with StopAtSignal().listening():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.integration
def test_a_run_whose_result_was_not_saved_yet_does_not_train_a_step_more(flags, undisturbed, tmp_path):
    """From a last checkpoint the Trainer by itself would do step 5 of 4."""
    shutil.copytree(undisturbed("full"), tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "model")
    result = run(flags(tmp_path / "run"))
    assert (result.status, result.step) == (COMPLETE, 4)
    assert not (tmp_path / "run" / "checkpoint-5").exists()
    assert_same_end(tmp_path / "run", undisturbed("full"))


@pytest.mark.integration
def test_the_best_model_is_saved_also_when_the_run_was_cut_off_behind_its_last_step(flags, tmp_path):
    settings = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    run(flags(tmp_path / "run", **settings))
    expected = load_file(tmp_path / "run" / "model" / "model.safetensors")
    shutil.rmtree(tmp_path / "run" / "model")
    run(flags(tmp_path / "run", **settings))
    found = load_file(tmp_path / "run" / "model" / "model.safetensors")
    best = load_file(tmp_path / "run" / "checkpoint-2" / "model.safetensors")
    assert all(
        torch.equal(tensor, found[name]) and torch.equal(tensor, best[name]) for name, tensor in expected.items()
    )


@pytest.mark.integration
def test_a_signal_s_checkpoint_stays_where_the_best_one_is_kept_too(flags, tmp_path, monkeypatch):
    settings = {"load_best_model_at_end": True, "save_total_limit": 1, "max_steps": 6}
    given = flags(tmp_path / "run", **settings)
    stopped = run(given, monkeypatch, At("on_step_end", 3, terminate))
    assert (stopped.step, last_whole_checkpoint(tmp_path / "run").name) == (3, "checkpoint-3")
    assert (tmp_path / "run" / "checkpoint-2").is_dir(), "the best"
    assert run(given).status == COMPLETE


@pytest.mark.integration
def test_the_best_model_is_found_where_the_folder_has_another_name_now(flags, tmp_path, monkeypatch):
    settings = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "there")
    run(flags(Path("run"), **settings))
    best = load_file("run/model/model.safetensors")
    shutil.rmtree("run/model")
    Path("run").rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    run(flags(tmp_path / "moved", **settings))
    found = load_file(tmp_path / "moved" / "model" / "model.safetensors")
    assert all(torch.equal(tensor, found[name]) for name, tensor in best.items())


class TestWholeCheckpoints:
    """Of folders whose checkpoints have no manifest: a plain Trainer's."""

    @pytest.fixture(params=["full", pytest.param("lora", marks=pytest.mark.integration)])
    def checkpoint(self, undisturbed, tmp_path, request) -> Path:
        folder = tmp_path / "plain" / "checkpoint-4"
        shutil.copytree(undisturbed(request.param) / "checkpoint-4", folder)
        (folder / MANIFEST_NAME).unlink()
        return folder

    def test_one_is_whole_only_with_its_last_byte(self, checkpoint, tmp_path):
        """All that a kill can leave: the first files in the order of writing, the last of them cut."""
        assert last_whole_checkpoint(checkpoint.parent) == checkpoint
        files = sorted((file for file in checkpoint.iterdir()), key=lambda file: file.stat().st_mtime_ns)
        assert files[-1].name == "trainer_state.json"
        for count in range(len(files)):
            for share in (0.0, 0.5, 0.99):
                partial = tmp_path / f"{count}-{share}" / "checkpoint-4"
                partial.mkdir(parents=True)
                for file in files[:count]:
                    shutil.copy2(file, partial)
                content = files[count].read_bytes()
                (partial / files[count].name).write_bytes(content[: int(share * len(content))])
                assert last_whole_checkpoint(partial.parent) is None, (files[count].name, share)

    @pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "*.safetensors"])
    def test_a_file_that_the_machine_lost_is_noticed(self, checkpoint, name):
        (file,) = checkpoint.glob(name)
        file.write_bytes(file.read_bytes()[:-40])
        assert last_whole_checkpoint(checkpoint.parent) is None
        file.unlink()
        assert last_whole_checkpoint(checkpoint.parent) is None

    def test_the_newest_whole_one_is_taken(self, checkpoint, tmp_path):
        for number in (2, 10, 12):
            shutil.copytree(checkpoint, tmp_path / f"checkpoint-{number}")
        (tmp_path / "checkpoint-12" / "trainer_state.json").write_text('{"best_metric": 1')
        (tmp_path / "checkpoint-notes").mkdir()
        assert last_whole_checkpoint(tmp_path).name == "checkpoint-10"

    @pytest.mark.parametrize("stale", ["model.safetensors.index.json", "pytorch_model.bin", "no metadata"])
    def test_one_with_two_sets_of_weights_is_named_and_kept(self, undisturbed, tmp_path, stale):
        """Going on from an older one, or deleting this one, would be a guess."""
        shutil.copytree(undisturbed("full") / "checkpoint-4", tmp_path / "checkpoint-4")
        folder = tmp_path / "checkpoint-4"
        (folder / MANIFEST_NAME).unlink()
        names = load_file(folder / "model.safetensors")
        index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        if stale != "model.safetensors.index.json":
            (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
            assert last_whole_checkpoint(tmp_path) == folder
        if stale == "pytorch_model.bin":
            torch.save({}, folder / stale)
        if stale == "no metadata":
            (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index["weight_map"]}))
        message = re.escape(stale).replace("metadata", '"metadata"')
        with pytest.raises(CheckpointError, match=message):
            last_whole_checkpoint(tmp_path)
        with pytest.raises(CheckpointError, match=message):
            StopAtSignal().train(Trainer(tiny_model(), training_arguments(tmp_path / "again")), folder)
        assert folder.is_dir()

    def test_there_is_none_in_a_new_folder(self, tmp_path):
        assert last_whole_checkpoint(tmp_path / "new") is None


# Kills itself in the middle of writing the optimizer of the second checkpoint.
KILLED_WHILE_SAVING = """
import os, signal, sys, torch
from grinmoe.training import train
from grinmoe.training.recipe import read_recipe
save = torch.save
def killed(content, file, *args, **kwargs):
    save(content, file, *args, **kwargs)
    if "checkpoint-4" in str(file):
        os.truncate(file, os.path.getsize(file) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
torch.save = killed
train(read_recipe("sft", sys.argv[1:]), "a test")
"""


@pytest.mark.integration
def test_kill_9_while_a_checkpoint_is_written_loses_the_steps_since_the_one_before(flags, undisturbed, tmp_path):
    given = flags(tmp_path / "run")
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    killed = subprocess.run([sys.executable, "-c", KILLED_WHILE_SAVING, *given], capture_output=True, env=environment)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()[-2000:]
    assert (tmp_path / "run" / "checkpoint-4").is_dir()
    assert last_whole_checkpoint(tmp_path / "run").name == "checkpoint-2"
    assert run(given).status == COMPLETE
    assert_same_end(tmp_path / "run", undisturbed("full"))


@pytest.mark.integration
def test_sigterm_to_the_command_is_answered_with_a_checkpoint_and_exit_code_0(flags, tmp_path):
    given = flags(tmp_path / "run", max_steps=100000, save_steps=100000, eval_strategy="no")
    command = [sys.executable, "-m", "grinmoe_cli", "sft", *given]
    started = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert started.stdout is not None
    for line in started.stdout:
        if "'loss'" in line:  # a step has been logged
            break
    started.terminate()
    output = started.communicate(timeout=600)[0]  # 100,000 steps take hours
    assert started.returncode == 0, output
    assert "Stopped by SIGTERM after step" in output
    assert last_whole_checkpoint(tmp_path / "run") is not None
