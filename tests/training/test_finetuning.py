"""`grinmoe sft`, `dpo` and `pretrain` from data to a saved model, at a size of milliseconds a step."""

from __future__ import annotations

import json
import math
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from grinmoe import GrinMoeForCausalLM, load_tokenizer
from grinmoe.adapters.lora import load_adapter
from grinmoe.hub.card import CardFacts
from grinmoe.quantization_grinmoe import PackedExperts
from grinmoe.training import run as training
from grinmoe.training.recipe import read_recipe
from grinmoe.training.run_directory import COMPLETE
from tests.small_chat import chats, small_run, write_rows


@pytest.fixture
def flags(chat_model, chat_data, tmp_path):
    def make(task: str = "sft", **settings) -> list[str]:
        return small_run(chat_model, chat_data[task], tmp_path / "run", **settings)

    return make


def run(task: str, flags: list[str]) -> training.RunResult:
    return training.train(read_recipe(task, flags), "grinmoe of a test")


@pytest.fixture
def no_weights(monkeypatch):
    """An error that comes late, after weights have been loaded, is another error."""

    def refuse(*args, **kwargs):
        raise AssertionError("the weights were loaded before the mistake was noticed")

    monkeypatch.setattr(training, "load_model", refuse)


class TestWhatARunLeaves:
    @pytest.fixture(scope="class")
    def result(self, chat_model, chat_data, tmp_path_factory) -> training.RunResult:
        folder = tmp_path_factory.mktemp("runs") / "first"
        given = small_run(
            chat_model, chat_data["sft"], folder, max_steps=30, eval_steps=10, save_steps=10, report_to="tensorboard"
        )
        return run("sft", [*given, "--gradient_checkpointing", "true"])

    def test_the_model_has_learned(self, result):
        history = json.loads((result.model.parent / "metrics.json").read_text())
        losses = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
        assert losses[-1] < 0.7 * losses[0]
        assert result.metrics["eval_loss"] == losses[-1]

    def test_the_model_loads_with_its_tokenizer(self, result):
        model = GrinMoeForCausalLM.from_pretrained(result.model)
        assert model.config.use_cache is True
        assert len(load_tokenizer(result.model)) <= model.config.vocab_size
        assert not list(result.model.glob("*.bin")), "no pickles"

    def test_settings_versions_commit_and_data_are_written_down(self, result):
        record = json.loads((result.model.parent / "run.json").read_text())
        assert record["status"] == COMPLETE and record["step"] == 30
        assert record["settings"]["learning_rate"] == 1e-2 and record["settings"]["max_length"] == 48
        (start,) = record["starts"]
        assert start["torch"] == torch.__version__ and start["command"] == "grinmoe of a test" and start["commit"]
        assert 0 < 40 - record["data"]["samples"] < 16, "about a fifth is held out"

    def test_the_last_two_checkpoints_the_picture_and_the_log_are_there(self, result):
        names = {path.name for path in result.model.parent.iterdir()}
        assert {"checkpoint-20", "checkpoint-30", "training.png", "metrics.json"} <= names
        assert "checkpoint-10" not in names
        assert any(path.name.startswith("events.out") for path in result.model.parent.rglob("*"))

    def test_the_card_knows_the_training(self, result, chat_model):
        facts = CardFacts.read(result.model)
        assert facts.base_model == str(chat_model) and facts.base_model_relation == "finetune"
        assert facts.hyperparameters["optimizer steps"] == 30
        assert facts.picture == "training.png" and (result.model / "training.png").is_file()
        assert facts.evaluations[0].metric_type == "perplexity"
        assert facts.evaluations[0].value == pytest.approx(math.exp(result.metrics["eval_loss"]), abs=1e-3)

    def test_started_again_it_is_complete_already(self, result, chat_model, chat_data, no_weights, capsys):
        given = small_run(chat_model, chat_data["sft"], result.model.parent, max_steps=30, eval_steps=10, save_steps=10)
        again = run("sft", [*given, "--gradient_checkpointing", "true"])
        assert (again.status, again.model) == (COMPLETE, result.model)
        assert "complete already" in capsys.readouterr().out


@pytest.mark.parametrize(
    "method, settings",
    [
        ("lora", {"packing": True}),
        ("qlora", {"gradient_checkpointing": True}),
        *(
            pytest.param(method, settings, marks=pytest.mark.integration)
            for method, settings in (
                ("full-8bit", {}),
                ("lora", {"lora_experts": "0,2", "lora_shared_a": True, "lora_router": True}),
                ("lora", {"lora_experts": "none", "gradient_checkpointing": True}),
                ("qlora", {"quantization": "int8"}),
            )
        ),
    ],
    ids=str,
)
def test_every_method_trains_and_leaves_what_loads(flags, chat_model, method, settings):
    result = run("sft", flags(method=method, max_steps=8, eval_steps=4, save_steps=8, **settings))
    history = json.loads((result.model.parent / "metrics.json").read_text())
    losses = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    assert losses[-1] < losses[0]
    if method == "full-8bit":
        return
    base = GrinMoeForCausalLM.from_pretrained(chat_model)
    ids = torch.arange(10)[None]
    before = base.eval()(ids).logits
    after = load_adapter(base, result.model).eval()(ids).logits
    assert (after - before).abs().max() > 1e-3


def test_qlora_trains_on_a_base_that_is_quantised(flags, monkeypatch):
    build, seen = training.build_trainer, {}

    def keep(*args):
        seen["trainer"], monitor = build(*args)
        return seen["trainer"], monitor

    monkeypatch.setattr(training, "build_trainer", keep)
    run("sft", flags(method="qlora"))
    model = seen["trainer"].model
    assert sum(isinstance(module, PackedExperts) for module in model.modules()) == 2
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained and all(p.dtype == torch.float32 for p in trained)


@pytest.mark.integration
def test_an_adapter_is_trained_on(flags, tmp_path):
    first = run("sft", flags(method="lora", eval_strategy="no", eval_share=0.0))
    again = flags(method="lora", adapter=first.model, output_dir=tmp_path / "on", learning_rate=0.0)
    result = run("sft", again)
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (first.model, result.model))
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert any(tensor.abs().max() > 0 for name, tensor in after.items() if "lora_B" in name)


def test_pretraining_from_scratch(flags, chat_model):
    given = flags("pretrain", model=None, model_config=chat_model, tokenizer=chat_model, max_steps=8)
    result = run("pretrain", [*given, "--config_overrides", '{"num_hidden_layers": 3}'])
    model = GrinMoeForCausalLM.from_pretrained(result.model)
    assert model.config.num_hidden_layers == 3
    end = load_tokenizer(result.model).convert_tokens_to_ids("<|end|>")
    assert end in model.generation_config.eos_token_id, "chats with what is fine-tuned from it end"
    assert CardFacts.read(result.model).base_model is None
    assert (result.model / "README.md").is_file()


@pytest.mark.integration
def test_early_stopping_and_the_best_model(flags):
    result = run("sft", flags(max_steps=40, eval_steps=1, save_steps=1, learning_rate=3.0, early_stopping_patience=2))
    history = json.loads((result.model.parent / "metrics.json").read_text())
    losses = {entry["step"]: entry["eval_loss"] for entry in history if "eval_loss" in entry}
    best = min(losses, key=losses.__getitem__)
    assert max(losses) == best + 2 < 40
    kept = load_file(result.model.parent / f"checkpoint-{best}" / "model.safetensors")
    assert all(torch.equal(t, kept[n]) for n, t in load_file(result.model / "model.safetensors").items())


@pytest.mark.integration
def test_the_held_out_loss_is_the_mean_over_target_tokens_however_rows_are_batched(flags, chat_model, tmp_path):
    losses = []
    given = {"messages_column": "talk", "train_data": uneven(tmp_path)}
    for batch in (1, 3, 7):
        settings = {"max_steps": 1, "eval_steps": 1, "learning_rate": 0.0, "per_device_eval_batch_size": batch}
        flagged = flags(output_dir=tmp_path / str(batch), **given, **settings)
        losses.append(run("sft", flagged).metrics["eval_loss"])
    recipe = read_recipe("sft", flags(**given))
    tokenizer = load_tokenizer(chat_model)
    held_out = training.load_data("sft", recipe.data, tokenizer, len(tokenizer)).evaluation
    model = GrinMoeForCausalLM.from_pretrained(chat_model).eval()
    total, count = 0.0, 0
    for row in held_out:
        ids, labels = torch.tensor(row["input_ids"]), torch.tensor(row["labels"])
        with torch.no_grad():
            logits = model(ids[None]).logits[0, :-1]
        total += float(torch.nn.functional.cross_entropy(logits, labels[1:], ignore_index=-100, reduction="sum"))
        count += int((labels[1:] != -100).sum())
    assert len(held_out) > 3 and losses == pytest.approx([total / count] * 3, rel=1e-5)


def uneven(folder):
    """Answers of one word and of ten."""
    rows = [
        {"talk": [chat["messages"][0], {"role": "assistant", "content": "red " * (1 + 9 * (i % 2))}]}
        for i, chat in enumerate(chats())
    ]
    return write_rows(folder / "uneven.jsonl", rows)


class TestMistakesAreFoundBeforeWeightsAreLoaded:
    @pytest.mark.parametrize(
        "settings, message",
        [
            ({"max_length": 4096}, "max_length=4096 is more than the model's max_position_embeddings=64"),
            ({"eval_share": 0.0}, "eval_strategy='steps' has no data"),
            ({"config_overrides": '{"hiden_size": 3}'}, "hiden_size is no field of GrinMoeConfig"),
            ({"method": "lora", "lora_experts": "7"}, "7"),
            ({"method": "lora", "lora_experts": "none", "lora_attention": False}, "nothing to adapt"),
            ({"label_smoothing_factor": 0.1, "config_overrides": '{"router_aux_loss_coef": 0.1}'}, "label_smoothing"),
            ({"label_smoothing_factor": 0.1, "config_overrides": '{"router_z_loss_coef": 0.1}'}, "router_z_loss_coef"),
            ({"label_smoothing_factor": 0.1, "torch_compile": True}, "label_smoothing_factor with torch_compile"),
            ({"messages_column": "talk"}, "its columns are messages"),
        ],
        ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
    )
    def test_settings(self, flags, no_weights, settings, message):
        with pytest.raises(ValueError, match=message):
            run("sft", flags(**settings))

    @pytest.mark.parametrize("method, extra", [("qlora", "quant"), ("full-8bit", "quant"), ("lora", "train")])
    def test_missing_packages(self, flags, no_weights, monkeypatch, method, extra):
        module = {"quant": "bitsandbytes", "train": "peft"}[extra]
        recipe = read_recipe("sft", flags(method=method))
        find = training.importlib.util.find_spec
        monkeypatch.setattr(training.importlib.util, "find_spec", lambda name: None if name == module else find(name))
        with pytest.raises(ImportError, match=rf"{module} is not installed.*pip install 'grinmoe\[{extra}\]'"):
            training.train(recipe, "")

    def test_flash_attention_without_the_package(self, flags, no_weights):
        with pytest.raises(ImportError, match=r"pip install 'grinmoe\[flash\]', or choose 'sdpa'"):
            run("sft", flags(attn_implementation="flash_attention_2"))

    def test_a_tracker_that_is_not_installed(self, flags, no_weights, monkeypatch):
        recipe = read_recipe("sft", flags())
        recipe.training.report_to = ["wandb"]
        monkeypatch.setitem(sys.modules, "wandb", None)
        find = training.importlib.util.find_spec
        monkeypatch.setattr(training.importlib.util, "find_spec", lambda name: None if name == "wandb" else find(name))
        with pytest.raises(ImportError, match="pip install wandb"):
            training.train(recipe, "")

    def test_a_model_of_another_kind(self, flags, no_weights, tmp_path):
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "config.json").write_text('{"model_type": "llama"}')
        with pytest.raises(ValueError, match="llama"):
            run("sft", flags(model=tmp_path / "other"))

    def test_a_vocabulary_larger_than_the_model_s(self, flags, no_weights):
        with pytest.raises(ValueError, match="vocab_size(=| is )100"):
            run("sft", flags(config_overrides='{"vocab_size": 100}'))

    def test_an_adapter_for_another_base(self, flags, no_weights, chat_model, tmp_path):
        first = run_with_weights(
            "sft", flags(method="lora", output_dir=tmp_path / "a", eval_strategy="no", eval_share=0)
        )
        with pytest.raises(ValueError, match="another base"):
            run("sft", flags(method="lora", adapter=first.model, config_overrides='{"num_hidden_layers": 1}'))


load_model = training.load_model


def run_with_weights(task: str, flags: list[str]) -> training.RunResult:
    refusing, training.load_model = training.load_model, load_model
    try:
        return run(task, flags)
    finally:
        training.load_model = refusing


class TestAFolderThatHoldsARun:
    @pytest.fixture(scope="class")
    def stopped(self, chat_model, chat_data, tmp_path_factory):
        """A run that was cut off behind its second step."""
        folder = tmp_path_factory.mktemp("runs") / "cut"
        run("sft", small_run(chat_model, chat_data["sft"], folder, method="lora"))
        record = json.loads((folder / "run.json").read_text())
        (folder / "run.json").write_text(json.dumps({**record, "status": "running"}))
        return folder

    @pytest.fixture
    def again(self, stopped, chat_model, chat_data):
        def make(**settings) -> list[str]:
            return small_run(chat_model, chat_data["sft"], stopped, **{"method": "lora", **settings})

        return make

    @pytest.mark.parametrize(
        "settings, message",
        [
            ({"learning_rate": 1e-3}, r"other settings: learning_rate=0.01 \(now 0.001\)"),
            ({"seed": 7, "lora_r": 8}, r"lora_r=4 \(now 8\); seed=42 \(now 7\)"),
            ({"method": "full"}, "method='lora'"),
            ({"gradient_accumulation_steps": 2}, r"2 samples in a step \(now 4"),
            ({"resume": "never"}, "holds a run, and resume=never"),
        ],
        ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
    )
    def test_is_not_gone_on_in_with_other_settings(self, again, no_weights, settings, message):
        with pytest.raises(ValueError, match=message):
            run("sft", again(**settings))

    def test_is_gone_on_in_where_only_the_watching_differs_or_the_batch_is_cut_otherwise(self, again, monkeypatch):
        settings = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "logging_steps": 3}
        assert run("sft", again(**settings)).status == COMPLETE

    def test_is_not_gone_on_in_with_other_data(self, again, no_weights, tmp_path):
        fewer = write_rows(tmp_path / "fewer.jsonl", chats()[:30])
        with pytest.raises(ValueError, match="train_data="):
            run("sft", again(train_data=fewer))

    @pytest.mark.integration
    def test_or_with_the_same_file_and_other_rows_in_it(self, chat_model, no_weights, tmp_path):
        data = write_rows(tmp_path / "data.jsonl", chats())
        given = small_run(chat_model, data, tmp_path / "run", method="lora")
        run_with_weights("sft", given)
        record = json.loads((tmp_path / "run" / "run.json").read_text())
        (tmp_path / "run" / "run.json").write_text(json.dumps({**record, "status": "running"}))
        write_rows(data, chats()[:30])
        with pytest.raises(ValueError, match="the data has changed"):
            run("sft", given)

    @pytest.mark.integration
    def test_is_free_after_a_start_that_did_not_get_anywhere(self, flags, monkeypatch):
        def fail(*args, **kwargs):
            raise ValueError("no such luck")

        monkeypatch.setattr(training.StopAtSignal, "train", fail)
        with pytest.raises(ValueError, match="no such luck"):
            run("sft", flags(learning_rate=1.0))
        monkeypatch.undo()
        assert run("sft", flags(learning_rate=1e-3)).status == COMPLETE

    def test_of_somebody_else_is_left_alone(self, flags, no_weights, tmp_path):
        (tmp_path / "run").mkdir()
        save_file({"a": torch.ones(1)}, tmp_path / "run" / "precious.safetensors")
        with pytest.raises(ValueError, match="holds precious.safetensors and no run.json"):
            run("sft", flags())
        (tmp_path / "run" / "run.json").write_text("{}")
        with pytest.raises(ValueError, match="not what this command writes"):
            run("sft", flags())
        with pytest.raises(ValueError, match="output_dir=/proc/x/y cannot be written"):
            run("sft", flags(output_dir="/proc/x/y"))
        with pytest.raises(ValueError, match="is a file"):
            run("sft", flags(output_dir=tmp_path / "run" / "run.json"))
