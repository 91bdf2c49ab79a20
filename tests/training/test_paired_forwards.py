"""TRL's trainers that compare forwards: at learning rate 0 policy and reference are equal, and the loss says so exactly."""

from __future__ import annotations

import copy
import itertools
import math
import re
from pathlib import Path

import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainerCallback
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)

from grinmoe.training import SameDrawsForReference
from tests.small_chat import chat_model_of, preferences, words
from tests.tiny import training_arguments

ROOT = Path(__file__).parents[2]
LN2 = math.log(2)
WITHOUT_DRAWS = {"router_estimator": "topk", "input_jitter_noise": 0.0}
# Everything that makes two training forwards differ and that can be paired or switched off.
NOISY = {"input_jitter_noise": 0.1, "attention_dropout": 0.1, "hidden_dropout": 0.1, "expert_dropout": 0.2}
LORA = {"peft_config": LoraConfig(target_modules=["q_proj", "v_proj"])}


def small_model(**overrides):
    return chat_model_of(words(), **{"router_jitter_noise": 0.1, "initializer_range": 0.1, **overrides})


def build(kind, config_kind, rows, folder, model=None, arguments=None, **options):
    """A trainer of TRL at learning rate 0, whose reference is a copy of the model unless `options` say otherwise."""
    policy, tokenizer = small_model(**(model or {}))
    if issubclass(kind, DPOTrainer | KTOTrainer) and not {"peft_config", "ref_model", "policy"} & options.keys():
        options["ref_model"] = copy.deepcopy(policy)
    settings = {**training_arguments(folder).to_dict(), "learning_rate": 0.0, "per_device_train_batch_size": 2}
    names = {
        *("output_dir", "max_steps", "learning_rate", "logging_steps", "save_strategy", "report_to", "disable_tqdm"),
        *("use_cpu", "seed", "per_device_train_batch_size"),
    }
    chosen = {name: settings[name] for name in names} | {"max_steps": 2, "bf16": False} | (arguments or {})
    data = {"train_dataset": Dataset.from_list(rows), "processing_class": tokenizer}
    return kind(args=config_kind(**chosen), model=options.pop("policy", policy), **data, **options)


@pytest.fixture
def dpo(tmp_path):
    return lambda **options: build(options.pop("kind", DPOTrainer), DPOConfig, preferences()[:8], tmp_path, **options)


@pytest.fixture
def kto(tmp_path):
    rows = [
        {"prompt": row["prompt"], "completion": row[name], "label": name == "chosen"}
        for row in preferences()[:12]
        for name in ("chosen", "rejected")
    ]
    return lambda **options: build(KTOTrainer, KTOConfig, rows, tmp_path, **options)


def losses_and_margins(trainer, prefix: str = "") -> list[tuple[float, float]]:
    names = f"{prefix}loss", f"{prefix}rewards/margins"
    return [tuple(entry[name] for name in names) for entry in trainer.state.log_history if names[1] in entry]


def assert_starts_at_zero(found: list[tuple[float, float]], loss: float = LN2, steps: int = 2) -> None:
    assert len(found) == steps
    assert found == [(pytest.approx(loss, abs=1e-6), 0.0)] * steps


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="reference model"),
        pytest.param(LORA, id="adapter off"),
        pytest.param({"model": NOISY}, id="jitter and dropout, reference model"),
        pytest.param({"model": NOISY, **LORA}, id="jitter and dropout, adapter off"),
        pytest.param(
            {"model": {"input_jitter_noise": 0.1, "expert_dropout": 0.2}, "arguments": {"disable_dropout": False}},
            id="expert dropout kept, reference model",
        ),
        pytest.param(
            {"model": {"expert_dropout": 0.2}, "arguments": {"disable_dropout": False}, **LORA},
            id="expert dropout kept, adapter off",
        ),
        pytest.param(
            {"arguments": {"gradient_accumulation_steps": 3, "gradient_checkpointing": True}, **LORA},
            id="accumulation and checkpointing, adapter off",
        ),
        pytest.param(
            {"arguments": {"gradient_accumulation_steps": 3, "gradient_checkpointing": True}},
            id="accumulation and checkpointing, reference model",
        ),
        pytest.param(
            {"arguments": {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.5}},
            id="reference that is moved",
        ),
        pytest.param({"arguments": {"bf16": True}}, id="bfloat16, reference model"),
        pytest.param({"arguments": {"bf16": True}, **LORA}, id="bfloat16, adapter off"),
        pytest.param({"arguments": {"ld_alpha": 0.5}}, id="ld_alpha"),
        pytest.param({"model": {"router_estimator": "sparsemixer_joint"}}, id="another estimator"),
        pytest.param({"model": WITHOUT_DRAWS | {"router_capacity_factor": 1.0}}, id="capacity, reference model"),
        pytest.param(
            {"model": WITHOUT_DRAWS, "arguments": {"precompute_ref_log_probs": True}, **LORA},
            id="precomputed, nothing to draw",
        ),
    ],
)
def test_dpo_at_learning_rate_zero_has_loss_ln2_and_margin_zero(dpo, options):
    trainer = dpo(**options)
    SameDrawsForReference().attach(trainer)
    trainer.train()
    assert_starts_at_zero(losses_and_margins(trainer))


def test_dpo_loss_and_gradient_do_not_depend_on_how_a_batch_is_cut(dpo):
    """DPO's loss is a mean over pairs; the Trainer's `num_items_in_batch` counts tokens."""
    steps = []
    for rows, accumulation in ((4, 1), (1, 4)):
        arguments = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": accumulation, "max_steps": 1}
        trainer = dpo(model=WITHOUT_DRAWS, arguments=arguments)
        SameDrawsForReference().attach(trainer)
        trainer.train()
        steps.append([trainer.state.log_history[0][name] for name in ("loss", "grad_norm", "logps/chosen")])
    assert steps[0][0] == pytest.approx(LN2, abs=1e-6) and steps[0] == pytest.approx(steps[1], rel=1e-5)


def test_dpo_with_an_adapter_and_a_reference_model_starts_at_zero(dpo):
    trainer = dpo(ref_model=small_model()[0].eval(), **LORA)
    SameDrawsForReference().attach(trainer)
    trainer.train()
    assert_starts_at_zero(losses_and_margins(trainer))


def test_dpo_against_a_copy_of_the_adapter_starts_at_zero(dpo):
    model, _ = small_model()
    model = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    trainer = dpo(policy=model)
    assert trainer.ref_model is None and "ref" in trainer.model.peft_config
    SameDrawsForReference().attach(trainer)
    trainer.train()
    assert_starts_at_zero(losses_and_margins(trainer))


@pytest.mark.parametrize("options", [{}, LORA], ids=["reference model", "adapter off"])
def test_dpo_without_pairing_compares_routings(dpo, options):
    """What the pairing is for."""
    trainer = dpo(**options)
    trainer.train()
    assert all(margin != 0 for _, margin in losses_and_margins(trainer))


@pytest.fixture(scope="module")
def paired(tmp_path_factory):
    """A paired trainer of the noisiest model, and one of its batches."""
    trainer = build(DPOTrainer, DPOConfig, preferences()[:4], tmp_path_factory.mktemp("dpo"), model=NOISY)
    SameDrawsForReference().attach(trainer)
    trainer.model.train()
    return trainer, next(iter(trainer.get_train_dataloader()))


BETA = 0.1
LOSS_AT_ZERO = {
    "sigmoid": LN2,
    "sigmoid_norm": LN2,
    "hinge": 1.0,
    "ipo": (1 / (2 * BETA)) ** 2,
    "exo_pair": 0.5 * (math.log(0.5) - math.log(0.9)) + 0.5 * (math.log(0.5) - math.log(0.1)),
    "nca_pair": 2 * LN2,
    "robust": LN2,
    "bco_pair": 2 * LN2,
    "sppo_hard": 2 * (0.5 / BETA) ** 2,
    "aot": LN2,
    "aot_unpaired": LN2,
    "apo_zero": 1.0,
    "apo_down": 1.0,
    "discopop": 0.5 * LN2 + 0.5,
}


# Those that TRL combines with other divergences than the reverse KL.
ANY_DIVERGENCE = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop")


@pytest.mark.parametrize(
    ("loss_type", "divergence"),
    [
        *((loss_type, "reverse_kl") for loss_type in LOSS_AT_ZERO),
        *itertools.product(ANY_DIVERGENCE, ("forward_kl", "js_divergence", "alpha_divergence")),
    ],
)
def test_every_dpo_loss_has_its_value_at_equal_models(paired, monkeypatch, loss_type, divergence):
    trainer, batch = paired
    for name, value in {"loss_types": [loss_type], "label_smoothing": 0.1, "f_divergence_type": divergence}.items():
        monkeypatch.setattr(trainer, name, value)
    loss = trainer.compute_loss(trainer.model, batch)
    assert loss.item() == pytest.approx(LOSS_AT_ZERO[loss_type], rel=1e-5)


def test_every_call_of_the_loss_draws_anew(paired):
    trainer, batch = paired
    losses = []
    for _ in range(2):
        trainer.compute_loss(trainer.model, batch)
        losses.append(trainer._metrics["train"]["logps/chosen"][-1])
    assert losses[0] != losses[1]


@pytest.mark.parametrize("options", [{}, LORA], ids=["reference model", "adapter off"])
@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_kto_at_learning_rate_zero_has_loss_half_and_kl_zero(kto, options, loss_type):
    trainer = kto(model=NOISY, arguments={"max_steps": 5, "loss_type": loss_type}, **options)
    passes = []
    kl_logps = trainer._compute_kl_logps

    def recorded(*arguments):
        passes.append(kl_logps(*arguments))
        return passes[-1]

    trainer._compute_kl_logps = recorded
    SameDrawsForReference().attach(trainer)
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "kl" in entry]
    assert len(history) == 5
    for entry in history:
        rewards = {name: value for name, value in entry.items() if name.startswith("rewards/")}
        assert (entry["loss"], entry["kl"]) == (0.5, 0.0) and rewards and set(rewards.values()) == {0.0}
    if loss_type == "kto":  # the logged KL is cut off below 0
        assert len(passes) == 10
        assert all(torch.equal(policy, reference) for policy, reference in zip(passes[::2], passes[1::2]))


def test_evaluation_before_during_and_after_training_compares_without_draws(dpo):
    trainer = dpo(
        model=NOISY,
        arguments={"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True},
        eval_dataset=Dataset.from_list(preferences()[8:12]),
    )
    SameDrawsForReference().attach(trainer)
    before = trainer.evaluate()
    trainer.train()
    trainer.evaluate()
    evaluations = [(before["eval_loss"], before["eval_rewards/margins"]), *losses_and_margins(trainer, "eval_")]
    assert_starts_at_zero(evaluations, steps=5)
    assert_starts_at_zero(losses_and_margins(trainer))


@pytest.mark.parametrize("options", [{}, LORA], ids=["reference model", "adapter off"])
def test_training_still_samples_and_learns(dpo, options):
    seeds = []
    trainer = dpo(arguments={"learning_rate": 1e-2, "gradient_accumulation_steps": 2, "max_steps": 3}, **options)
    SameDrawsForReference().attach(trainer)
    for layer in (module for module in trainer.model.modules() if type(module).__name__ == "GrinMoeDecoderLayer"):
        if layer.layer_idx == 0:
            layer.register_forward_pre_hook(
                lambda module, args, kwargs: seeds.append(kwargs["routing_seed"]), with_kwargs=True
            )
    trainer.train()
    assert None not in seeds and len(set(seeds)) == 6  # one for each micro-batch
    found = losses_and_margins(trainer)
    assert found[0] == (pytest.approx(LN2, abs=1e-6), 0.0) and found[-1][1] != 0


def test_pairing_goes_on_after_resumption(dpo):
    whole = dpo(arguments={"max_steps": 3, "learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 2}, **LORA)
    SameDrawsForReference().attach(whole)
    whole.train()
    resumed = dpo(arguments={"max_steps": 3, "learning_rate": 1e-2}, **LORA)
    SameDrawsForReference().attach(resumed)
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-2")
    assert losses_and_margins(resumed)[-1] == losses_and_margins(whole)[-1]


def test_attach_while_training_pairs_from_then_on(dpo):
    class Late(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                SameDrawsForReference().attach(trainer)

    trainer = dpo(arguments={"max_steps": 3}, callbacks=[Late()])
    trainer.train()
    first, *later = losses_and_margins(trainer)
    assert first[1] != 0
    assert_starts_at_zero(later)


def test_attach_twice_is_attach_once(dpo):
    trainer = dpo()
    SameDrawsForReference().attach(trainer)
    compute_loss = trainer.compute_loss
    SameDrawsForReference().attach(trainer)
    assert trainer.compute_loss is compute_loss
    trainer.train()
    assert_starts_at_zero(losses_and_margins(trainer))


def test_subclass_of_a_supported_trainer_is_paired(dpo):
    class Weighted(DPOTrainer):
        def compute_loss(self, *args, **kwargs):
            return 2 * super().compute_loss(*args, **kwargs)

    trainer = dpo(kind=Weighted)
    SameDrawsForReference().attach(trainer)
    trainer.train()
    assert_starts_at_zero(losses_and_margins(trainer), 2 * LN2)


def test_callback_without_attach_is_refused(dpo):
    trainer = dpo(callbacks=[SameDrawsForReference()])
    with pytest.raises(ValueError, match=r"SameDrawsForReference\(\).attach\(trainer\)"):
        trainer.train()
    SameDrawsForReference().attach(trainer)  # takes the other one's place
    trainer.train()
    assert_starts_at_zero(losses_and_margins(trainer))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arguments": {"precompute_ref_log_probs": True}, **LORA}, "precompute_ref_log_probs=True with router_est"),
        (
            {
                "model": WITHOUT_DRAWS | {"input_jitter_noise": 0.1},
                "arguments": {"precompute_ref_log_probs": True},
                **LORA,
            },
            "precompute_ref_log_probs=True with input_jitter_noise=0.1",
        ),
        (
            {
                "model": WITHOUT_DRAWS | {"router_capacity_factor": 1.0},
                "arguments": {"precompute_ref_log_probs": True},
                **LORA,
            },
            "precompute_ref_log_probs=True with router_capacity_factor=1.0",
        ),
        ({"arguments": {"neftune_noise_alpha": 5.0}}, "neftune_noise_alpha=5.0"),
        ({"arguments": {"torch_compile": True}}, "torch_compile=True"),
        (
            {
                "model": WITHOUT_DRAWS | {"hidden_dropout": 0.1},
                "arguments": {"precompute_ref_log_probs": True},
                **LORA,
            },
            "precompute_ref_log_probs=True with hidden_dropout=0.1",
        ),
        (
            {"model": {"hidden_dropout": 0.1}, "arguments": {"disable_dropout": False}},
            "disable_dropout=False with hidden_dropout=0.1",
        ),
        (
            {"model": {"attention_dropout": 0.1}, "arguments": {"disable_dropout": False}},
            "disable_dropout=False with attention_dropout=0.1",
        ),
        (
            {
                "arguments": {"disable_dropout": False},
                "peft_config": LoraConfig(target_modules=["q_proj"], lora_dropout=0.1),
            },
            "such as lora_dropout",
        ),
    ],
)
def test_attach_refuses_what_cannot_be_paired(dpo, options, message):
    trainer = dpo(**options)
    with pytest.raises(ValueError, match=message):
        SameDrawsForReference().attach(trainer)


@pytest.mark.parametrize("other", [{"router_estimator": "topk"}, {"input_jitter_noise": 0.0}], ids=str)
def test_attach_refuses_a_reference_that_draws_by_other_rules(dpo, other):
    trainer = dpo(ref_model=small_model(**other)[0])
    with pytest.raises(ValueError, match="policy and reference draw by different rules"):
        SameDrawsForReference().attach(trainer)


def test_attach_refuses_dropout_of_the_reference_alone(dpo):
    reference, _ = small_model(hidden_dropout=0.1)
    trainer = dpo(ref_model=reference, arguments={"disable_dropout": False})
    with pytest.raises(ValueError, match="disable_dropout=False with hidden_dropout=0.1"):
        SameDrawsForReference().attach(trainer)


@pytest.mark.parametrize("options", [{}, LORA], ids=["reference model", "adapter off"])
@pytest.mark.integration
def test_compiled_model_is_refused_at_the_first_loss(dpo, options):
    """`model.compile` leaves no trace in the trainer's arguments."""
    trainer = dpo(model={"num_hidden_layers": 1}, **options)
    trainer.model.get_decoder().compile(backend="eager")
    SameDrawsForReference().attach(trainer)
    with pytest.raises(ValueError, match="torch.compile hides them"):
        trainer.train()


def test_plain_trainer_is_refused_by_name(tmp_path):
    model, _ = small_model()
    with pytest.raises(ValueError, match="^Trainer is not supported"):
        SameDrawsForReference().attach(Trainer(model, training_arguments(tmp_path)))


def test_sft_is_refused_by_name(tmp_path):
    trainer = build(SFTTrainer, SFTConfig, [{"text": "a red stone"}], tmp_path)
    with pytest.raises(ValueError, match="^SFTTrainer is not supported.*leave it out"):
        SameDrawsForReference().attach(trainer)


def rl_trainer(kind, config_kind, folder, **options):
    """A trainer of TRL that generates what it trains on, as in trl#3000."""
    rows = [{"prompt": row["prompt"]} for row in preferences()[:8]]
    arguments = {"beta": 0.1, "num_iterations": 2, "num_generations": 2, "max_completion_length": 4, "max_steps": 4}
    arguments |= options.pop("arguments", {})
    options["reward_funcs"] = lambda completions, **kwargs: [float(i) for i, _ in enumerate(completions)]
    return build(kind, config_kind, rows, folder, arguments=arguments, **options)


@pytest.mark.parametrize(("kind", "config_kind"), [(GRPOTrainer, GRPOConfig), (RLOOTrainer, RLOOConfig)])
def test_trainers_that_generate_are_refused_by_name(tmp_path, kind, config_kind):
    trainer = rl_trainer(kind, config_kind, tmp_path, **LORA)
    with pytest.raises(ValueError, match=f"^{kind.__name__} is not supported.*router_estimator='sparsemixer_v2'"):
        SameDrawsForReference().attach(trainer)


@pytest.mark.parametrize("field", ["input_jitter_noise", "router_capacity_factor", "hidden_dropout", "expert_dropout"])
def test_trainers_that_generate_are_refused_whatever_makes_forwards_differ(tmp_path, field):
    trainer = rl_trainer(GRPOTrainer, GRPOConfig, tmp_path, model=WITHOUT_DRAWS | {field: 0.5}, **LORA)
    with pytest.raises(ValueError, match=f"^GRPOTrainer is not supported.*with {field}=0.5"):
        SameDrawsForReference().attach(trainer)


@pytest.mark.integration
@pytest.mark.parametrize(("kind", "config_kind"), [(GRPOTrainer, GRPOConfig), (RLOOTrainer, RLOOConfig)])
def test_trainers_that_generate_are_exact_where_nothing_is_drawn(tmp_path, kind, config_kind):
    trainer = rl_trainer(kind, config_kind, tmp_path, model=WITHOUT_DRAWS, **LORA)
    SameDrawsForReference().attach(trainer)  # there is nothing to pair
    trainer.train()
    history = trainer.state.log_history
    for name in ("kl", "clip_ratio/region_mean"):
        assert {entry[name] for entry in history if name in entry} == {0.0}


@pytest.mark.integration
def test_reference_that_follows_the_policy_is_paired(dpo):
    from trl.experimental import bema_for_ref_model as bema

    callback = bema.BEMACallback(update_freq=1, update_ref_model=True, ref_model_update_freq=1)
    trainer = dpo(kind=bema.DPOTrainer, callbacks=[callback])
    SameDrawsForReference().attach(trainer)
    trainer.train()
    assert_starts_at_zero(losses_and_margins(trainer))


def test_documentation_names_every_trainer_of_trl():
    """A new one must be looked at: does it compare forwards?"""
    sources = Path(trl.__file__).parent.rglob("*.py")
    found = {name for file in sources for name in re.findall(r"^class (\w+Trainer)\(", file.read_text(), re.MULTILINE)}
    documented = set(re.findall(r"`(\w+Trainer)`", (ROOT / "docs" / "training.md").read_text()))
    assert {"DPOTrainer", "KTOTrainer", "GRPOTrainer", "_BaseTrainer"} <= found
    assert found - {"_BaseTrainer"} <= documented


def test_model_of_another_kind_is_refused(tmp_path):
    trainer = Trainer(torch.nn.Linear(2, 2), training_arguments(tmp_path))
    with pytest.raises(ValueError, match="Linear, not a GRIN-MoE"):
        SameDrawsForReference().attach(trainer)
