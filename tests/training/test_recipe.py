"""Recipes: a YAML file and flags, and every mistake in them named before anything is loaded."""

from __future__ import annotations

import pytest
import torch
import yaml
from transformers import TrainingArguments

from grinmoe.training.recipe import option_help, read_recipe
from tests import ROOT
from tests.small_chat import small_run

RECIPES = ROOT / "recipes"


@pytest.fixture
def flags(chat_model, chat_data, tmp_path):
    """Flags that make a right recipe, with changes."""

    def make(task: str = "sft", **settings) -> list[str]:
        return small_run(chat_model, chat_data[task], tmp_path / "run", **settings)

    return make


@pytest.mark.parametrize("file", sorted(RECIPES.glob("*.yaml")), ids=lambda file: file.stem)
def test_the_recipes_that_come_with_the_project_are_right(file, chat_model, chat_data, tmp_path):
    task = yaml.safe_load(file.read_text())["task"]
    source = "model" if task != "pretrain" else "model_config"
    given = [f"--{source}", str(chat_model), "--train_data", str(chat_data[task]), "--output_dir", str(tmp_path / "r")]
    if task == "pretrain":
        given += ["--tokenizer", str(chat_model)]
    recipe = read_recipe(task, ["--config", str(file), *given])
    assert recipe.training.save_total_limit in (1, 2)
    assert recipe.settings()["learning_rate"] == recipe.training.learning_rate > 0


def test_flags_win_over_the_file_and_numbers_may_be_written_like_1e_minus_4(flags, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("task: sft\nlearning_rate: 1e-4\nweight_decay: 0\nmax_steps: 7\npacking: true\n")
    given = flags(learning_rate=None, max_steps=None)
    recipe = read_recipe("sft", ["--config", str(file), *given, "--max_steps", "9"])
    assert (recipe.training.learning_rate, recipe.training.max_steps) == (1e-4, 9)
    assert recipe.training.weight_decay == 0.0 and recipe.data.packing is True


def test_the_arguments_are_those_of_the_libraries(flags):
    from trl import DPOConfig

    assert type(read_recipe("sft", flags()).training) is TrainingArguments
    dpo = read_recipe("dpo", flags("dpo", beta=0.3, loss_type="ipo")).training
    assert type(dpo) is DPOConfig and (dpo.beta, dpo.loss_type) == (0.3, ["ipo"])
    assert (dpo.max_length, dpo.truncation_mode) == (48, "keep_start"), "what the data part counts by"


def test_the_eight_bit_optimizer_is_bitsandbytes(flags):
    assert read_recipe("sft", flags(method="full-8bit")).training.optim == "adamw_bnb_8bit"


def test_overrides_of_the_config_may_be_a_mapping_or_json(flags, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("config_overrides:\n  router_aux_loss_coef: 0.5\n")
    assert read_recipe("sft", ["--config", str(file), *flags()]).run.config_overrides == {"router_aux_loss_coef": 0.5}
    given = flags(config_overrides='{"expert_dropout": 0.1}')
    assert read_recipe("sft", given).run.config_overrides == {"expert_dropout": 0.1}


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"learning_rte": 1}, "unknown flag 'learning_rte' .did you mean 'learning_rate'"),
        ({"max_steps": "many"}, "max-steps: invalid int value: 'many'"),
        ({"method": "lara"}, "method='lara' is unknown; choose of full, full-8bit, lora, qlora"),
        ({"quantization": "nf5"}, "quantization='nf5' is unknown"),
        ({"dtype": "int3"}, "dtype='int3' is unknown"),
        ({"resume": "yes"}, "resume='yes' is unknown; choose of auto, never"),
        ({"lora_experts": "some"}, "neither all, none nor numbers"),
        ({"lora_r": 0}, "lora_r=0 is no rank"),
        ({"config_overrides": "{]"}, "is not JSON"),
        ({"config_overrides": "[1]"}, "is not a mapping"),
        ({"early_stopping_patience": 0}, "early_stopping_patience=0 is below 1"),
        ({"early_stopping_patience": 2, "eval_strategy": "no"}, "chosen by evaluations"),
        ({"too_long": "wrap"}, "too_long='wrap' is unknown"),
        ({"model": None}, "model is missing"),
        ({"model": "/nowhere/at/all"}, "there is no folder /nowhere/at/all"),
        ({"train_data": None}, "train_data"),
        ({"output_dir": None}, "output_dir is missing"),
        ({"model_config": "/"}, "starts from scratch, which is for pretrain only"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps=0; give a number from 1 up"),
        ({"per_device_train_batch_size": -1}, "per_device_train_batch_size=-1"),
        ({"learning_rate": "nan"}, "learning_rate=nan; give a number from 0 up"),
        ({"num_train_epochs": -1}, "num_train_epochs=-1.0; give a number above 0"),
        ({"lora_alpha": 0}, "lora_alpha=0.0; give a number above 0"),
        ({"save_steps": 0}, "save_steps=0.0; give a number above 0"),
        ({"max_steps": 0}, "max_steps=0 trains nothing"),
        ({"push_to_hub": "true"}, "grinmoe push --model"),
        ({"hub_token": "hf_secret"}, "hub_token would be written"),
        ({"use_liger_kernel": True}, "use_liger_kernel does nothing"),
        ({"metric_for_best_model": "accuracy"}, "only the loss is measured"),
        ({"save_strategy": "best"}, "needs metric_for_best_model"),
        ({"resume_from_checkpoint": "x"}, "resume_from_checkpoint='x' is decided by this command"),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_a_wrong_setting_is_named(flags, settings, message):
    with pytest.raises((ValueError, OSError), match=message):
        read_recipe("sft", flags(**settings))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1 .* give label_smoothing"),
        ({"label_smoothing": 0.1}, "label_smoothing=0.1 is not read by loss_type sigmoid; choose one of .*robust"),
        ({"label_smoothing": 0.5, "loss_type": "robust"}, "label_smoothing=0.5 .* below 0.5"),
        ({"truncation_mode": "keep_end"}, "truncation_mode='keep_end'"),
        ({"sync_ref_model": "true", "method": "lora"}, "sync_ref_model=True with method='lora'"),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_dpo_setting_without_effect_is_refused(flags, settings, message):
    with pytest.raises(ValueError, match=message):
        read_recipe("dpo", flags("dpo", **settings))


def test_dpo_label_smoothing_is_read_by_robust(flags):
    assert read_recipe("dpo", flags("dpo", label_smoothing=0.1, loss_type="robust")).training.label_smoothing == 0.1


def test_an_adapter_needs_a_method_that_has_one(flags, tmp_path):
    with pytest.raises(ValueError, match="adapter=.* with method='full'; choose method lora or qlora"):
        read_recipe("sft", flags(adapter=tmp_path))


def test_pretraining_starts_from_a_model_or_from_a_config(flags, chat_model):
    with pytest.raises(ValueError, match="either model .* or model_config"):
        read_recipe("pretrain", flags("pretrain", model_config=chat_model))
    with pytest.raises(ValueError, match="needs method full and a tokenizer"):
        read_recipe("pretrain", flags("pretrain", model=None, model_config=chat_model))
    given = flags("pretrain", model=None, model_config=chat_model / "config.json", tokenizer=chat_model)
    assert read_recipe("pretrain", given).run.model is None


@pytest.mark.parametrize(
    "content, message",
    [
        ("learning_rte: 1\n", "unknown key 'learning_rte' .did you mean 'learning_rate'"),
        ("task: dpo\n", "no recipe for sft"),
        ("- a list\n", "no mapping"),
        ("a: b: c\n", "is not YAML"),
        ("max_steps: 1.5\n", "max-steps: invalid int value: '1.5'"),
        ("packing: perhaps\n", "packing"),
        ("3: 4\n", "key 3 is no text"),
        ("text_column: [a, b]\n", "text_column is .'a', 'b'.; give one value"),
        ("config_overrides: [1]\n", "is not a mapping"),
        ("learning_rate: null\n", "learning_rate=None; give a number"),
    ],
)
def test_a_wrong_file_is_named(flags, tmp_path, content, message):
    file = tmp_path / "recipe.yaml"
    file.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_recipe("sft", ["--config", str(file), *flags(max_steps=None, learning_rate=None)])


def test_a_missing_file_is_named(flags):
    with pytest.raises(ValueError, match="--config nowhere.yaml is not there"):
        read_recipe("sft", ["--config", "nowhere.yaml", *flags()])


def test_more_processes_than_gpus_is_said_before_a_gpu_is_taken(flags, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="8 GPUs on each machine.* 2 are visible"):
        read_recipe("sft", flags(use_cpu=None))


def test_all_flags_are_listed_with_their_help():
    text = option_help("dpo")
    for flag in ("--lora_experts", "--too_long", "--gradient_accumulation_steps", "--beta"):
        assert flag in text


def test_what_yaml_makes_of_no_and_null_and_lists_is_what_was_meant(flags, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("save_strategy: no\nreport_to: null\nlora_experts: [0, 2]\n")
    recipe = read_recipe("sft", ["--config", str(file), *flags(method="lora"), "--packing"])
    assert recipe.training.save_strategy.value == "no" and recipe.training.report_to == []
    assert recipe.run.chosen_experts() == [0, 2] and recipe.data.packing is True


def test_one_checkpoint_beside_the_best_is_two(flags):
    """With 1 the Trainer deletes at its end what a signal has just saved."""
    recipe = read_recipe("sft", flags(load_best_model_at_end="true", save_total_limit=1))
    assert recipe.training.save_total_limit == 2


def test_pairs_are_not_grouped_by_a_length_that_they_do_not_have(flags):
    assert read_recipe("dpo", flags("dpo", train_sampling_strategy=None)).training.train_sampling_strategy == "random"
    with pytest.raises(ValueError, match="pairs are text"):
        read_recipe("dpo", flags("dpo", train_sampling_strategy="group_by_length"))
