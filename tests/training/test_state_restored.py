"""Early stopping, the best model and the order of the data are after a resume what they would have been without."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import EarlyStoppingCallback, Trainer
from transformers.trainer_pt_utils import LengthGroupedSampler

from grinmoe.training import StopAtSignal
from grinmoe.training import run as training
from grinmoe.training.recipe import read_recipe
from grinmoe.training.run_directory import COMPLETE, STOPPED
from grinmoe.training.trainer import EpochSeededSampler
from tests.small_chat import small_run, write_rows
from tests.tiny import tiny_model, training_arguments
from tests.training.runs import At, cut_off, run, terminate, tree

pytestmark = pytest.mark.integration


class Killed(BaseException):
    """What is on the disk stays as it is at this moment."""


def kill() -> None:
    raise Killed


def end_of(folder: Path) -> dict:
    """What a run has come to."""
    record, history = (json.loads((folder / name).read_text()) for name in ("run.json", "metrics.json"))
    (weights,) = [*folder.glob("model/*.safetensors"), *folder.glob("adapter/*.safetensors")]
    return {
        "step": record["step"],
        "evaluations": {entry["step"]: entry["eval_loss"] for entry in history if "eval_loss" in entry},
        "weights": {name: tensor.numpy().tobytes() for name, tensor in load_file(weights).items()},
    }


def disturbed_end(task: str, given: list[str], event: str, count: int, action) -> dict:
    """The end of a run that something happened to, after starts until it is complete."""
    try:
        with pytest.MonkeyPatch.context() as monkeypatch:
            build = training.build_trainer

            def with_disturbance(*args):
                trainer, monitor = build(*args)
                trainer.add_callback(At(event, count, action))
                return trainer, monitor

            monkeypatch.setattr(training, "build_trainer", with_disturbance)
            assert training.train(read_recipe(task, given), "a test").status == STOPPED
    except Killed:
        pass
    result = training.train(read_recipe(task, given), "a test")
    assert result.status == COMPLETE and result.model is not None
    return end_of(result.model.parent)


# Stops at the fourth evaluation: the first is the best.
EARLY = {"max_steps": 40, "eval_steps": 1, "save_steps": 1, "learning_rate": 1.0, "early_stopping_patience": 3}


@pytest.fixture(scope="module")
def stopped_early(flags, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("early") / "run"
    run(flags(folder, **EARLY))
    end = end_of(folder)
    assert end["step"] == 4 and sorted(end["evaluations"]) == [1, 2, 3, 4]
    return end


@pytest.mark.parametrize(
    "event, count, action",
    [
        ("on_step_end", 3, terminate),
        *(
            pytest.param(*moment, marks=pytest.mark.integration)
            for moment in (
                ("on_step_end", 2, terminate),
                ("on_step_end", 4, terminate),
                ("on_substep_end", 3, terminate),
                ("on_prediction_step", 3, terminate),
                ("on_prediction_step", 7, terminate),
                ("on_evaluate", 3, kill),
                ("on_save", 3, kill),
                ("on_save", 4, kill),
                ("on_step_begin", 4, kill),
            )
        ),
    ],
)
def test_early_stopping_counts_on(flags, tmp_path, stopped_early, event, count, action):
    given = flags(tmp_path / "run", **EARLY)
    if (event, count, action) == ("on_save", 4, kill):
        # Behind all other callbacks: the checkpoint of the last step is whole.
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr(training, "_finish", lambda *args: kill())
            with pytest.raises(Killed):
                run(given)
        run(given)
        assert end_of(tmp_path / "run") == stopped_early
        return
    assert disturbed_end("sft", given, event, count, action) == stopped_early


@pytest.mark.integration
@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize(
    "event, count, action", [("on_step_end", 2, terminate), ("on_prediction_step", 3, terminate), ("on_save", 2, kill)]
)
def test_early_stopping_counts_on_in_dpo(chat_model, chat_data, tmp_path, method, event, count, action):
    def given(name: str) -> list[str]:
        return small_run(
            chat_model, chat_data["dpo"], tmp_path / name, method=method, **{**EARLY, "learning_rate": 0.1}
        )

    training.train(read_recipe("dpo", given("straight")), "a test")
    assert disturbed_end("dpo", given("cut"), event, count, action) == end_of(tmp_path / "straight")


@pytest.mark.integration
@pytest.mark.parametrize("event, count", [("on_step_end", 2), ("on_step_end", 4), ("on_prediction_step", 3)])
@pytest.mark.parametrize(
    "settings",
    [
        {"load_best_model_at_end": True, "learning_rate": 0.05},
        {"lr_scheduler_type": "reduce_lr_on_plateau", "learning_rate": 0.3, "metric_for_best_model": "loss"},
    ],
    ids=["best model", "plateau"],
)
def test_an_evaluation_that_a_signal_left_out_is_made_up_for(flags, tmp_path, settings, event, count):
    """Step 4 is the last one: without its evaluation the best model would be another."""
    run(flags(tmp_path / "straight", **settings))
    given = flags(tmp_path / "cut", **settings)
    assert disturbed_end("sft", given, event, count, terminate) == end_of(tmp_path / "straight")


EPOCHS = {
    "max_steps": None,
    "num_train_epochs": 3,
    "per_device_train_batch_size": 4,
    "save_steps": 100,
    "eval_steps": 100,
}


@pytest.mark.parametrize(
    "strategy",
    ["group_by_length", *(pytest.param(s, marks=pytest.mark.integration) for s in ("random", "batch_rebalance"))],
)
def test_a_run_that_goes_on_in_its_second_epoch_sees_the_same_rows(flags, tmp_path, strategy):
    settings = {**EPOCHS, "train_sampling_strategy": strategy}
    run(flags(tmp_path / "straight", **settings))
    end = disturbed_end("sft", flags(tmp_path / "cut", **settings), "on_step_end", 8, terminate)
    assert end == end_of(tmp_path / "straight")


def test_the_sampler_repeats_an_epoch_and_changes_with_it():
    epoch = 0
    lengths = [3, 9, 4, 4, 8, 1, 7, 2] * 4
    sampler = EpochSeededSampler(lengths, 4, 5, lambda: epoch)
    first = list(sampler)
    torch.rand(3)
    assert list(sampler) == first and sorted(first) == list(range(32))
    epoch = 1
    assert list(sampler) != first


def test_the_sampler_groups_as_the_library_s():
    lengths = [i * 7 % 61 for i in range(500)]
    library = LengthGroupedSampler(8, lengths=lengths, generator=torch.Generator().manual_seed(7))
    assert list(EpochSeededSampler(lengths, 8, 5, lambda: 2)) == list(library)


@pytest.mark.integration
def test_early_stopping_may_be_asked_for_later(flags, tmp_path, monkeypatch):
    """The Trainer by itself ends with a KeyError at the next checkpoint, whose state has no entry for it."""
    given = flags(tmp_path / "run")
    assert run(given, monkeypatch, At("on_step_end", 1, terminate)).status == STOPPED
    result = run(flags(tmp_path / "run", early_stopping_patience=5))
    assert (result.status, result.step) == (COMPLETE, 4)


@pytest.mark.integration
def test_a_patience_that_was_changed_counts_from_what_was_counted(flags, tmp_path, monkeypatch):
    given = flags(tmp_path / "run", **EARLY)
    run(given, monkeypatch, At("on_step_begin", 4, terminate))
    longer = run(flags(tmp_path / "run", **{**EARLY, "early_stopping_patience": 5}))
    assert longer.step == 6


def test_callbacks_of_one_class_get_their_own_state_back(tmp_path):
    callbacks = [EarlyStoppingCallback(5), EarlyStoppingCallback(7)]
    trainer = Trainer(tiny_model(), training_arguments(tmp_path), callbacks=callbacks)
    stop = StopAtSignal()
    stop._trainer = trainer
    entries = [{"args": {}, "attributes": {"early_stopping_patience_counter": count}} for count in (0, 0, 2, 3)]
    trainer.state.stateful_callbacks = {"EarlyStoppingCallback": entries}
    stop._restore_callbacks(trainer.state)
    assert [callback.early_stopping_patience_counter for callback in callbacks] == [2, 3]
    assert len(trainer.state.stateful_callbacks["EarlyStoppingCallback"]) == 2
    assert "TrainerControl" in trainer.state.stateful_callbacks


BEST = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}


@pytest.fixture(scope="module")
def best_first(flags, tmp_path_factory) -> Path:
    """A run whose best checkpoint is that of step 2."""
    folder = tmp_path_factory.mktemp("best") / "run"
    run(flags(folder, **BEST))
    return folder


@pytest.mark.parametrize("damage", ["altered", "missing"])
def test_a_best_checkpoint_that_is_not_whole_is_refused(flags, best_first, tmp_path, damage):
    folder = cut_off(best_first, tmp_path / "run")
    if damage == "missing":
        shutil.rmtree(folder / "checkpoint-2")
    else:
        file = folder / "checkpoint-2" / "model.safetensors"
        tensors = load_file(file)
        save_file({**tensors, "lm_head.bias": tensors["lm_head.bias"] + 1}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="checkpoint-2.*best checkpoint so far"):
        run(flags(folder, **BEST))
    assert run(flags(folder)).status == COMPLETE, "without the best model it is not needed"


def test_another_measure_of_the_best_is_refused(flags, best_first, tmp_path):
    folder = cut_off(best_first, tmp_path / "run")
    with pytest.raises(ValueError, match="greater_is_better=True .now False., by which the best checkpoint was chosen"):
        run(flags(folder, **{**BEST, "greater_is_better": False}))


def change(kind: str, model: Path, rows: Path) -> None:
    if kind == "data":
        lines = rows.read_text().splitlines()
        rows.write_text("\n".join(reversed(lines)) + "\n")
    elif kind == "weights":
        file = model / "model.safetensors"
        tensors = load_file(file)
        save_file({**tensors, "lm_head.bias": tensors["lm_head.bias"] + 1}, file, metadata={"format": "pt"})
    else:
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**config, "router_jitter_noise": 0.2}))


@pytest.mark.parametrize("kind", ["data", "weights", "config"])
def test_another_model_or_other_rows_of_the_same_number_are_refused(chat_model, chat_data, tmp_path, kind):
    model, rows = tmp_path / "model", tmp_path / "rows.jsonl"
    shutil.copytree(chat_model, model)
    shutil.copyfile(chat_data["sft"], rows)
    given = small_run(model, rows, tmp_path / "run", method="lora", max_steps=2, watch_routers=False)
    run(given)
    shutil.rmtree(tmp_path / "run" / "adapter")
    before = tree(tmp_path / "run")
    change(kind, model, rows)
    with pytest.raises(ValueError, match="(rows of the data, or the tokenizer, have|model has) changed since"):
        run(given)
    assert tree(tmp_path / "run") == before


def test_data_in_another_file_format_with_the_same_rows_is_the_same(chat_model, chat_data, tmp_path):
    """By content, however the table is cut."""
    rows = [json.loads(line) for line in chat_data["sft"].read_text().splitlines()]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    given = small_run(chat_model, file, tmp_path / "run", max_steps=2, watch_routers=False)
    run(given)
    shutil.rmtree(tmp_path / "run" / "model")
    file.write_text("".join(json.dumps(row, indent=None, separators=(",", ":")) + "\n" for row in rows))
    assert run(given).status == COMPLETE


def test_weights_alone_are_not_gone_on_from(flags, tmp_path, capsys, monkeypatch):
    given = flags(tmp_path / "run", save_only_model=True, watch_routers=False)
    run(given, monkeypatch, At("on_step_end", 3, terminate))
    assert "no run goes on from its checkpoints" in capsys.readouterr().out
    with pytest.raises(ValueError, match="checkpoint-3 holds no state of the optimizer .save_only_model"):
        run(given)
    assert (tmp_path / "run" / "checkpoint-3").is_dir()


@pytest.mark.integration
def test_a_reference_model_that_moves_is_not_gone_on_with(chat_model, chat_data, tmp_path, capsys):
    settings = {"sync_ref_model": True, "ref_model_sync_steps": 1, "max_steps": 2, "save_steps": 1}
    given = small_run(chat_model, chat_data["dpo"], tmp_path / "run", **settings)
    result = training.train(read_recipe("dpo", given), "a test")
    shutil.rmtree(result.model)
    with pytest.raises(ValueError, match="sync_ref_model=True, whose reference model is not in the checkpoints"):
        training.train(read_recipe("dpo", given), "a test")
