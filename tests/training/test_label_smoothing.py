"""Losses that the Trainer computes in place of the model: label smoothing and `compute_loss_func`."""

import pytest
import torch
from torch.distributed.fsdp import FSDPModule
from transformers import Trainer
from transformers.models.auto import modeling_auto

from grinmoe import GrinMoeForCausalLM, GrinMoeForSequenceClassification
from tests.tiny import tiny_config, tiny_model, training_arguments

ROWS = torch.randint(0, 90, (8, 12), generator=torch.Generator().manual_seed(7))
SMOOTHING = 0.1
# Rows of a micro-batch, and micro-batches of a step.
ACCUMULATIONS = [(8, 1), (2, 4)]


def without_draws(**overrides) -> GrinMoeForCausalLM:
    return tiny_model(router_estimator="topk", input_jitter_noise=0.0, **overrides)


def step(model, data, folder, rows, micro_batches, trainer_options=None, **overrides) -> Trainer:
    """One step of plain gradient descent over all of `data`."""
    options = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": micro_batches, "max_steps": 1}
    arguments = training_arguments(folder, **{"optim": "sgd", "max_grad_norm": 0.0, **options, **overrides})
    trainer = Trainer(model, arguments, train_dataset=data, **(trainer_options or {}))
    trainer.train()
    return trainer


def texts():
    labels = ROWS.clone()
    labels[:3, :5] = -100  # micro-batches with different numbers of targets
    return [{"input_ids": row, "labels": label} for row, label in zip(ROWS, labels, strict=True)]


def smoothed_loss(model, data) -> torch.Tensor:
    """By its definition: the target is the next token, and every token by a share of SMOOTHING."""
    inputs, labels = (torch.stack([row[name] for row in data]) for name in ("input_ids", "labels"))
    surprise = -model(inputs, use_cache=False).logits[:, :-1].log_softmax(-1)
    is_target = labels[:, 1:] != -100
    likelihood = surprise.gather(-1, labels[:, 1:, None].clamp(min=0)).squeeze(-1)
    return ((1 - SMOOTHING) * likelihood + SMOOTHING * surprise.mean(-1))[is_target].mean()


@pytest.mark.parametrize("rows, micro_batches", ACCUMULATIONS)
def test_label_smoothing_predicts_the_next_token(tmp_path, rows, micro_batches):
    model, expected, data = without_draws(), without_draws(), texts()
    loss = smoothed_loss(expected, data)
    loss.backward()
    trainer = step(model, data, tmp_path, rows, micro_batches, label_smoothing_factor=SMOOTHING, learning_rate=1.0)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    for trained, parameter in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(trained, parameter - parameter.grad, rtol=1e-4, atol=1e-6)


def test_language_model_keeps_its_name_when_it_is_sharded():
    """The Trainer looks the name up; `fully_shard` puts a subclass of this name in its place."""

    class FSDPGrinMoeForCausalLM(FSDPModule, GrinMoeForCausalLM):
        pass

    model = tiny_model()
    model.__class__ = FSDPGrinMoeForCausalLM
    assert model._get_name() in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


def test_label_smoothing_of_a_classifier_shifts_nothing(tmp_path):
    model, data = classifier(), classes()
    inputs, labels = ROWS, torch.tensor([row["labels"] for row in data])
    surprise = -model(inputs).logits.log_softmax(-1)
    expected = (1 - SMOOTHING) * surprise.gather(-1, labels[:, None]).mean() + SMOOTHING * surprise.mean()
    trainer = step(model, data, tmp_path, 4, 2, label_smoothing_factor=SMOOTHING)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected.item(), rel=1e-5)


def own_loss(outputs, labels, num_items_in_batch=None):
    return torch.nn.functional.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten())


@pytest.mark.parametrize("coefficient", ["router_aux_loss_coef", "router_z_loss_coef"])
@pytest.mark.parametrize(
    "outside", [{"label_smoothing_factor": SMOOTHING}, {"trainer_options": {"compute_loss_func": own_loss}}]
)
def test_router_losses_that_would_be_left_out_are_refused(tmp_path, coefficient, outside):
    model = tiny_model(**{coefficient: 0.1})
    with pytest.raises(ValueError, match=f"{coefficient}=0.1.*take the labels out of the batch.*set both to 0"):
        step(model, texts(), tmp_path, 4, 2, **outside)


def test_own_loss_may_add_the_balance_loss_itself(tmp_path):
    model, seen = tiny_model(output_router_logits=True), []

    def with_balance(outputs, labels, num_items_in_batch=None):
        seen.append(outputs.aux_loss.item())
        return own_loss(outputs, labels) + 0.1 * outputs.aux_loss

    step(model, texts(), tmp_path, 4, 2, {"compute_loss_func": with_balance})
    assert len(seen) == 2 and all(loss > 1 for loss in seen)


# --- the classifier's own loss -----------------------------------------------------------------------------------------

PROBLEMS = {
    "single_label_classification": lambda index: index % 3,
    "multi_label_classification": lambda index: [float(index % 2), 1.0, float(index % 3 == 0)],
    "regression": lambda index: [0.1 * index, 1.0, -100.0 if index == 2 else -1.0],
}


def classifier(problem: str = "single_label_classification", **overrides):
    torch.manual_seed(0)
    config = tiny_config(router_estimator="topk", input_jitter_noise=0.0, pad_token_id=95, **overrides)
    config.num_labels, config.problem_type = 3, problem
    return GrinMoeForSequenceClassification(config)


def classes(problem: str = "single_label_classification") -> list[dict]:
    return [{"input_ids": row, "labels": PROBLEMS[problem](index)} for index, row in enumerate(ROWS)]


@pytest.mark.parametrize("problem", PROBLEMS)
def test_classifier_update_does_not_depend_on_accumulation(tmp_path, problem):
    """Eight rows at once, four times two, and with an incomplete last micro-batch."""
    data, updates = classes(problem), []
    for rows, micro_batches in [*ACCUMULATIONS, (3, 3)]:
        model = classifier(problem)
        trainer = step(model, data, tmp_path, rows, micro_batches, learning_rate=0.1)
        updates.append((trainer.state.log_history[0]["loss"], list(model.parameters())))
    for loss, parameters in updates[1:]:
        assert loss == pytest.approx(updates[0][0], rel=1e-5)
        for one, other in zip(parameters, updates[0][1], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_classifier_loss_without_the_trainer_is_the_mean(tmp_path):
    model, labels = classifier(), torch.arange(8) % 3
    output = model(ROWS, labels=labels)
    torch.testing.assert_close(output.loss, torch.nn.functional.cross_entropy(output.logits, labels))
    loss, logits = model(ROWS, labels=labels, num_items_in_batch=16, return_dict=False)[:2]
    torch.testing.assert_close(loss, output.loss / 2)
    assert torch.equal(logits, output.logits)
