"""DPO of a model whose router samples: policy and reference are compared under the same draws."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file

from grinmoe.training import run as training
from grinmoe.training.paired_forwards import SameDrawsForReference
from grinmoe.training.recipe import read_recipe
from grinmoe.training.run_directory import COMPLETE
from tests.small_chat import small_run


@pytest.fixture
def flags(chat_model, chat_data, tmp_path):
    def make(task: str = "dpo", **settings) -> list[str]:
        return small_run(chat_model, chat_data[task], tmp_path / task, **settings)

    return make


def run(task: str, flags: list[str]) -> tuple[training.RunResult, list[dict]]:
    result = training.train(read_recipe(task, flags), "a test")
    return result, json.loads((result.model.parent / "metrics.json").read_text())


def rewards(history: list[dict]) -> list[float]:
    return [entry["rewards/margins"] for entry in history if "rewards/margins" in entry]


@pytest.mark.parametrize(
    "method", ["lora", *(pytest.param(name, marks=pytest.mark.integration) for name in ("full", "qlora"))]
)
def test_rewards_start_at_zero_exactly_and_grow(flags, method):
    """A reference of its own; the model with its adapter off; and that quantised."""
    settings = {"config_overrides": '{"expert_dropout": 0.2}', "gradient_accumulation_steps": 4, "max_steps": 6}
    result, history = run("dpo", flags(method=method, warmup_steps=0, **settings))
    assert rewards(history)[0] == 0.0
    assert rewards(history)[-1] > 0.05
    assert "eval_rewards/accuracies" in result.metrics


@pytest.mark.integration
def test_on_an_adapter_the_reference_is_that_adapter(flags):
    """Not the base model: TRL trains against a copy, which keeps its float32."""
    first, _ = run("sft", flags("sft", method="qlora", max_steps=8, eval_steps=8, save_steps=8))
    result, history = run("dpo", flags(method="qlora", adapter=first.model, warmup_steps=0, max_steps=3, save_steps=3))
    assert rewards(history)[0] == 0.0 and rewards(history)[-1] != 0.0
    config = json.loads((result.model / "adapter_config.json").read_text())
    assert (
        config["base_model_name_or_path"]
        == json.loads((first.model / "adapter_config.json").read_text())["base_model_name_or_path"]
    )
    assert not (result.model / "ref").exists(), "the reference is not a part of the result"


@pytest.mark.integration
def test_without_the_same_draws_rewards_do_not_start_at_zero(flags, tmp_path, monkeypatch):
    monkeypatch.setattr(SameDrawsForReference, "attach", lambda self, trainer: self)
    for method in ("full", "lora"):
        settings = {"max_steps": 1, "eval_strategy": "no", "eval_share": 0, "output_dir": tmp_path / method}
        _, history = run("dpo", flags(method=method, **settings))
        assert rewards(history)[0] != 0.0


@pytest.mark.parametrize("accumulation", [1, pytest.param(2, marks=pytest.mark.integration)])
def test_balance_loss_counts_once_and_only_if_it_is_asked_for(flags, accumulation):
    settings = {"learning_rate": 0, "max_steps": 1, "eval_strategy": "no", "eval_share": 0, "watch_routers": False}
    given = flags(router_aux_loss_coef=0.1, gradient_accumulation_steps=accumulation, **settings)
    step = next(entry for entry in run("dpo", given)[1] if "loss" in entry)
    assert step["aux_loss"] > 1 and step["loss"] == pytest.approx(math.log(2) + 0.1 * step["aux_loss"], abs=1e-6)


WITHOUT_DRAWS = '{"router_estimator": "topk", "input_jitter_noise": 0}'


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_accumulation_steps": 2, "gradient_checkpointing": True},
        pytest.param({"ld_alpha": 0.5}, marks=pytest.mark.integration),
        pytest.param({"f_divergence_type": "js_divergence"}, marks=pytest.mark.integration),
        pytest.param({"loss_type": "robust", "label_smoothing": 0.1}, marks=pytest.mark.integration),
        {"precompute_ref_log_probs": True, "config_overrides": WITHOUT_DRAWS},
    ],
    ids=str,
)
def test_loss_at_learning_rate_zero_is_ln2(flags, method, settings):
    _, history = run("dpo", flags(method=method, learning_rate=0, max_steps=2, watch_routers=False, **settings))
    steps = [entry for entry in history if "loss" in entry]
    assert len(steps) == 2
    assert [entry["loss"] for entry in steps] == [pytest.approx(math.log(2), abs=1e-6)] * 2
    assert [entry["eval_loss"] for entry in history if "eval_loss" in entry] == [pytest.approx(math.log(2), abs=1e-6)]
    assert {entry[name] for entry in history for name in entry if name.endswith("rewards/margins")} == {0.0}


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
@pytest.mark.parametrize(
    "settings, message",
    [
        ({"precompute_ref_log_probs": True}, "precompute_ref_log_probs=True with router_estimator='sparsemixer_v2'"),
        ({"neftune_noise_alpha": 5}, "neftune_noise_alpha=5.0"),
        ({"config_overrides": '{"router_z_loss_coef": 0.1}'}, "router_z_loss_coef has no effect in dpo"),
        ({"config_overrides": '{"router_aux_loss_coef": 0.1}'}, "router_aux_loss_coef as a setting of its own"),
        (
            {"disable_dropout": False, "config_overrides": '{"hidden_dropout": 0.1}'},
            "disable_dropout=False with hidden",
        ),
    ],
    ids=["precompute", "neftune", "z-loss", "balance loss", "dropout"],
)
def test_what_cannot_be_paired_is_refused_before_the_data_are_read(flags, method, settings, message, monkeypatch):
    monkeypatch.setattr(training, "load_data", None)
    with pytest.raises(ValueError, match=message):
        run("dpo", flags(method=method, **settings))


def test_dropout_of_the_config_is_off_unless_it_is_asked_for(flags):
    given = flags(config_overrides='{"expert_dropout": 0.2}')
    assert training.load_config(read_recipe("dpo", given)).expert_dropout == 0.0
    assert training.load_config(read_recipe("dpo", [*given, "--disable_dropout", "false"])).expert_dropout == 0.2


@pytest.mark.integration
def test_a_stopped_run_goes_on_to_the_same_end(flags, tmp_path):
    straight, _ = run("dpo", flags(method="lora", output_dir=tmp_path / "straight"))
    cut, _ = run("dpo", flags(method="lora", output_dir=tmp_path / "cut"))
    record = json.loads((cut.model.parent / "run.json").read_text())
    (cut.model.parent / "run.json").write_text(json.dumps({**record, "status": "running"}))
    shutil.rmtree(cut.model)
    shutil.rmtree(cut.model.parent / "checkpoint-4")
    again, _ = run("dpo", flags(method="lora", output_dir=tmp_path / "cut"))
    assert (again.status, again.step) == (COMPLETE, 4)
    expected, found = (load_file(result.model / "adapter_model.safetensors") for result in (straight, again))
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
