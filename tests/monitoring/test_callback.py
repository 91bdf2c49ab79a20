"""The monitor of routing: what it counts and leaves out, where its figures go, and that it leaves the training alone."""

from __future__ import annotations

import functools
import math
import os
from types import SimpleNamespace

import peft
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerCallback

import grinmoe.monitoring.callback as monitoring
from grinmoe import modeling_grinmoe
from grinmoe.modeling_grinmoe import GrinMoeModel, GrinMoeRouter
from grinmoe.monitoring.callback import RoutingMonitor
from grinmoe.monitoring.plots import plot_training
from grinmoe.routing_grinmoe import route, within_capacity
from tests import tiny
from tests.distributed.two_ranks import run_on_two
from tests.tiny import training_arguments

SEQUENCE = 9
MEANS = {"tokens_per_s", "max_over_mean_load", "grad_norm", "entropy", "sampled_share", "kept_experts", "balance_loss"}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tensors of a few hundred numbers: threads would only wait for each other."""
    before, _ = torch.get_num_threads(), torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def padded_rows(lengths=(5, 9, 3, 7)) -> list[dict[str, torch.Tensor]]:
    """Rows of SEQUENCE positions, padded on the left."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for length in lengths:
        ids = torch.randint(0, 90, (SEQUENCE,), generator=generator)
        mask = (torch.arange(SEQUENCE) >= SEQUENCE - length).long()
        rows.append({"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)})
    return rows


def full_rows(count: int) -> list[dict[str, torch.Tensor]]:
    """Rows without a mask."""
    return [{name: row[name] for name in ("input_ids", "labels")} for row in padded_rows((SEQUENCE,) * count)]


def trainer_of(model, rows, folder, callbacks=(), collator=None, **overrides) -> Trainer:
    options = {"max_steps": 3, "per_device_train_batch_size": 2, "dataloader_pin_memory": False, **overrides}
    return Trainer(
        model=model,
        args=training_arguments(folder, **options),
        train_dataset=rows,
        eval_dataset=rows[:2],
        data_collator=collator,
        callbacks=list(callbacks),
    )


def train(model, rows, folder, monitor=None, **overrides) -> tuple[RoutingMonitor, Trainer]:
    trainer = trainer_of(model, rows, folder, **overrides)
    monitor = (monitor or RoutingMonitor()).attach(trainer)
    trainer.train()
    return monitor, trainer


def count_hooks(model) -> int:
    watched = [module for module in model.modules() if isinstance(module, GrinMoeRouter | GrinMoeModel)]
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in [model, *watched])


class Choices:
    """What the routers choose, noted beside the monitor; `closed` experts of layer 1 are never chosen."""

    def __init__(self, monkeypatch):
        self.experts: list[list[torch.Tensor]] = [[], []]  # of each layer, one (T, K) per call
        self.closed: list[int] = []
        monkeypatch.setattr(modeling_grinmoe, "route", self._route)

    def _route(self, router_logits, *arguments, layer=None, **options):
        if layer == 1 and self.closed:
            router_logits = router_logits.index_fill(1, torch.tensor(self.closed), float("-inf"))
        routing = route(router_logits, *arguments, layer=layer, **options)
        self.experts[layer].append(routing.selected_experts)
        return routing


# --- counting ----------------------------------------------------------------------------------------------------------


def accumulating(tiny_model, folder, checkpointing: bool, collator=None) -> RoutingMonitor:
    """2 steps of 2 micro-batches, with an evaluation after each."""
    return train(
        tiny_model(router_aux_loss_coef=0.01, router_jitter_noise=0.5),
        padded_rows(),
        folder,
        collator=collator,
        max_steps=2,
        gradient_accumulation_steps=2,
        gradient_checkpointing=checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if checkpointing else None,
        eval_strategy="steps",
        eval_steps=1,
    )[0]


def test_the_load_is_that_of_a_hand_count(tiny_model, tmp_path, monkeypatch):
    """Micro-batches add up; padding and evaluation are left out."""
    choices = Choices(monkeypatch)
    masks = []

    def collate(rows):
        batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        masks.append(batch["attention_mask"].flatten())
        return batch

    monitor = accumulating(tiny_model, tmp_path, False, collate)
    assert [len(calls) for calls in choices.experts] == [6, 6], "in each step two micro-batches and an evaluation"
    for step, record in enumerate(monitor.records):
        for layer in range(2):
            counted = [0] * 4
            for call in (3 * step, 3 * step + 1):
                for token, experts in enumerate(choices.experts[layer][call].tolist()):
                    for expert in experts:
                        counted[expert] += int(masks[call][token])
            assert record.load[layer].tolist() == counted
        assert (record.tokens, record.first_step, record.last_step) == (24, step + 1, step + 1)
        assert record.load.sum(1).tolist() == [48, 48]
    assert monitor.tokens == 48
    assert torch.equal(monitor.final_load(1.0), sum(record.load for record in monitor.records).float())
    assert len(monitor.loss) == len(monitor.eval_loss) == 2


def test_recomputed_forwards_count_once(tiny_model, tmp_path):
    plain, checkpointed = (accumulating(tiny_model, tmp_path, checkpointing) for checkpointing in (False, True))
    for one, other in zip(plain.records, checkpointed.records, strict=True):
        assert torch.equal(one.load, other.load)
        torch.testing.assert_close(one.sums, other.sums)


def test_forwards_without_gradients_do_not_count(tiny_model, tmp_path):
    """The reference of a preference loss, for one, runs in training mode."""

    class Reference(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            with torch.no_grad():
                model(input_ids=torch.arange(12).view(2, 6))

    monitor, _ = train(tiny_model(), full_rows(4), tmp_path, callbacks=[Reference()])
    assert [record.tokens for record in monitor.records] == [2 * SEQUENCE] * 3


def test_a_batch_may_come_by_position_and_with_a_long_mask(tiny_model):
    """And without a mask, or with a prepared one, every position counts."""
    model = tiny_model().train()
    mask = torch.tensor([[1, 1, 1, 0, 1, 1], [1, 1, 0, 0, 0, 1]])
    state = SimpleNamespace(global_step=0, max_steps=9, logging_steps=1, is_world_process_zero=True, log_history=[])
    args = SimpleNamespace(parallel_mode=None, device="cpu", logging_strategy="steps", logging_first_step=False)
    for arguments, options, tokens in (
        ((torch.ones(2, 4, dtype=torch.long), mask[:, 2:]), {}, 4),
        ((torch.ones(2, 6, dtype=torch.long),), {}, 12),
        ((), {"input_ids": torch.ones(2, 6, dtype=torch.long), "attention_mask": mask}, 8),
        ((torch.ones(2, 6, dtype=torch.long),), {"attention_mask": torch.ones(2, 1, 6, 6, dtype=torch.bool)}, 12),
    ):
        monitor = RoutingMonitor()
        monitor.on_train_begin(args, state, None, model=model)
        monitor.on_step_begin(args, state, None)
        model(*arguments, **options)
        monitor.on_train_end(args, state, None)
        assert monitor.latest.tokens == tokens


# --- figures -----------------------------------------------------------------------------------------------------------


def test_a_router_that_does_not_tell_experts_apart_is_measured_so(tiny_model, tmp_path):
    """All logits 0: the highest entropy, every expert kept, every choice as good as the best."""
    model = tiny_model()
    for layer in model.model.layers:
        nn.init.zeros_(layer.block_sparse_moe.gate.weight)
    monitor, trainer = train(model, full_rows(4), tmp_path, learning_rate=0.0)
    logged = trainer.state.log_history[-2]
    assert logged["routing/entropy"] == pytest.approx(math.log(4), rel=1e-6)
    assert (logged["routing/kept_experts"], logged["routing/sampled_share"]) == (4.0, 0.0)
    assert logged["routing/balance_loss"] == pytest.approx(2.0, rel=1e-6)
    assert monitor.latest.max_over_mean_load.max() == logged["routing/max_over_mean_load"] > 1.0


def test_dropped_choices_are_those_beyond_the_capacity(tiny_model, tmp_path, monkeypatch):
    choices = Choices(monkeypatch)
    monitor, trainer = train(tiny_model(router_capacity_factor=0.5), full_rows(4), tmp_path)
    expected = [(~within_capacity(calls[-1], 4, 0.5)).double().mean() for calls in choices.experts]
    assert monitor.latest.dropped_share.tolist() == pytest.approx([float(share) for share in expected])
    assert trainer.state.log_history[-2]["routing/dropped_share"] == pytest.approx(float(sum(expected)) / 2)
    assert min(expected) > 0.4, "half of the choices fit at most"


def test_the_norm_of_the_gradient_is_taken_after_clipping_and_by_layer(tiny_model, tmp_path):
    found = []

    class Gradients(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            found.append([float(layer.block_sparse_moe.gate.weight.grad.norm()) for layer in model.model.layers])

    model = tiny_model(router_aux_loss_coef=1.0, router_jitter_noise=0.5)
    monitor, _ = train(model, full_rows(4), tmp_path, callbacks=[Gradients()], max_grad_norm=0.01)
    for record, norms in zip(monitor.records, found, strict=True):
        assert record.router_gradient_norm.tolist() == pytest.approx(norms, rel=1e-6)
    assert 0 < max(map(max, found)) < 0.01


def test_a_frozen_router_has_no_gradient_to_report(tiny_model, tmp_path):
    model = tiny_model()
    model.model.layers[1].block_sparse_moe.gate.weight.requires_grad_(False)
    monitor, trainer = train(model, full_rows(4), tmp_path)
    assert monitor.latest.router_gradient_norm.isnan().tolist() == [False, True]
    assert trainer.state.log_history[-2]["routing/grad_norm"] == float(monitor.latest.router_gradient_norm[0])
    for layer in model.model.layers:
        layer.block_sparse_moe.gate.weight.requires_grad_(False)
    monitor, trainer = train(model, full_rows(4), tmp_path)
    assert "routing/grad_norm" not in trainer.state.log_history[-2]
    plot_training(monitor, tmp_path / "picture.png")


def test_only_steps_that_are_logged_are_measured(tiny_model, tmp_path):
    """But all are counted; the last one is measured for the history, and all of them on demand."""
    for every_step, measured in ((False, [1, 1, 1]), (True, [3, 3, 1])):
        monitor = RoutingMonitor(every_step=every_step)
        train(tiny_model(), full_rows(4), tmp_path, monitor, max_steps=7, logging_steps=3)
        assert [(one.first_step, one.last_step) for one in monitor.records] == [(1, 3), (4, 6), (7, 7)]
        assert [one.tokens for one in monitor.records] == [6 * SEQUENCE, 6 * SEQUENCE, 2 * SEQUENCE]
        assert [int(one.sums[0, 0]) // (2 * SEQUENCE) for one in monitor.records] == measured
        assert [int(one.gradient_steps[0]) for one in monitor.records] == measured


def test_tokens_per_second_leave_out_evaluation(tiny_model, tmp_path, monkeypatch):
    """A clock that a batch moves by 1 s, and one of the evaluation by 100 s."""
    now = [0.0]
    monkeypatch.setattr(monitoring, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def collate(rows):
        now[0] += 1.0 if len(rows) == 2 else 100.0
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    options = {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True, "per_device_eval_batch_size": 1}
    monitor, _ = train(tiny_model(), full_rows(8), tmp_path, collator=collate, logging_steps=2, max_steps=4, **options)
    assert now[0] == 4 + 5 * 200
    assert sum(record.seconds for record in monitor.records) == 4
    assert monitor.latest.tokens_per_s == 4 * SEQUENCE / monitor.latest.seconds


# --- where the figures go ----------------------------------------------------------------------------------------------


class Reports(TrainerCallback):
    """Stands for TensorBoard and its kin, which come before a user's callbacks."""

    def __init__(self):
        self.logs: list[dict[str, float]] = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


def test_loggers_that_come_first_get_the_figures_too(tiny_model, tmp_path, capsys):
    reports = Reports()
    trainer = trainer_of(tiny_model(), full_rows(4), tmp_path, callbacks=[reports], eval_strategy="steps", eval_steps=1)
    assert RoutingMonitor(per_expert=True).attach(trainer).attach(trainer) is trainer.callback_handler.callbacks[0]
    trainer.train()
    training = [logs for logs in reports.logs if "loss" in logs]
    assert len(training) == 3 and len(reports.logs) == 7
    layers = MEANS - {"tokens_per_s"} | {f"expert_{expert:02d}" for expert in range(4)}
    expected = {f"routing/{name}" for name in MEANS}
    expected |= {f"routing/layer_{layer:02d}/{name}" for layer in range(2) for name in layers}
    for logs in training:
        assert {name for name in logs if name.startswith("routing/")} == expected
        assert all(type(logs[name]) is float for name in expected)
        for layer in range(2):
            assert sum(logs[f"routing/layer_{layer:02d}/expert_{e:02d}"] for e in range(4)) == pytest.approx(1.0)
        highest = max(logs[f"routing/layer_{layer:02d}/max_over_mean_load"] for layer in range(2))
        assert logs["routing/max_over_mean_load"] == highest
    assert not any(name.startswith("routing/") for logs in reports.logs if "loss" not in logs for name in logs)
    printed = capsys.readouterr().out
    assert "routing/entropy" in printed and "routing/layer_" not in printed
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert all(
        {name for name in entry if name.startswith("routing/")} == {f"routing/{n}" for n in MEANS} for entry in history
    )


def test_the_history_of_the_trainer_has_them_without_attaching(tiny_model, tmp_path):
    monitor = RoutingMonitor(per_layer=False)
    trainer = trainer_of(tiny_model(), full_rows(4), tmp_path, callbacks=[monitor])
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(history) == 3
    for entry, record in zip(history, monitor.records, strict=True):
        assert {name for name in entry if name.startswith("routing/")} == {f"routing/{name}" for name in MEANS}
        assert entry["routing/entropy"] == float(record.entropy.mean())
    assert [value for _, value in monitor.loss] == [entry["loss"] for entry in history]


def test_a_log_per_epoch_measures_its_steps(tiny_model, tmp_path):
    monitor, trainer = train(
        tiny_model(), full_rows(4), tmp_path, logging_strategy="epoch", max_steps=-1, num_train_epochs=2
    )
    assert [(one.last_step, one.measured) for one in monitor.records] == [(2, True), (4, True)]
    assert "routing/entropy" in trainer.state.log_history[0]


# --- the model is left alone -------------------------------------------------------------------------------------------


def test_training_is_bit_identical_with_a_monitor(tiny_model, tmp_path):
    """Sampled routing, input jitter and dropout included."""
    options = {"router_jitter_noise": 0.5, "router_aux_loss_coef": 0.1, "hidden_dropout": 0.1}
    watched, alone = tiny_model(**options), tiny_model(**options)
    train(watched, padded_rows(), tmp_path, RoutingMonitor(every_step=True, per_expert=True))
    trainer_of(alone, padded_rows(), tmp_path).train()
    for (name, one), other in zip(watched.state_dict().items(), alone.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


def test_hooks_come_and_go_with_the_training(tiny_model, tmp_path):
    model = tiny_model()
    before = count_hooks(model)
    monitor, _ = train(model, full_rows(4), tmp_path)
    assert count_hooks(model) == before
    train(model, full_rows(4), tmp_path, monitor)
    assert count_hooks(model) == before
    assert [one.tokens for one in monitor.records] == [2 * SEQUENCE] * 3, "a second training starts from nothing"


def test_a_training_that_raised_leaves_nothing_that_counts_twice(tiny_model, tmp_path):
    class Interrupt(TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs):
            raise InterruptedError

    model, monitor = tiny_model(), RoutingMonitor()
    before = count_hooks(model)
    options = {"gradient_accumulation_steps": 2}
    with pytest.raises(InterruptedError):
        train(model, full_rows(4), tmp_path, monitor, callbacks=[Interrupt()], **options)
    watching, during = count_hooks(model), []
    assert watching > before

    class Count(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            during.append(count_hooks(model))

    train(model, full_rows(4), tmp_path, monitor, callbacks=[Count()], **options)
    assert set(during) == {watching}
    assert [one.tokens for one in monitor.records] == [4 * SEQUENCE] * 3
    with pytest.raises(InterruptedError):
        train(model, full_rows(4), tmp_path, monitor, callbacks=[Interrupt()], **options)
    monitor.remove_hooks()
    assert count_hooks(model) == before


@pytest.mark.parametrize(
    "targets",
    [{"target_modules": ["q_proj"]}, {"target_modules": [], "target_parameters": ["gate.weight"]}],
    ids=["attention", "router"],
)
def test_adapted_models_are_watched(tiny_model, tmp_path, targets):
    """A router that is adapted itself reports the gradient of its adapter."""
    model = peft.get_peft_model(
        tiny_model(router_jitter_noise=0.5), peft.LoraConfig(r=2, task_type="CAUSAL_LM", **targets)
    )
    before = count_hooks(model)
    monitor, trainer = train(model, padded_rows(), tmp_path, gradient_accumulation_steps=2)
    assert [one.tokens for one in monitor.records] == [24] * 3
    assert ("routing/grad_norm" in trainer.state.log_history[0]) == ("target_parameters" in targets)
    assert count_hooks(model) == before


def test_a_copied_router_of_an_adapter_does_not_count_twice(tiny_model, tmp_path):
    options = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["gate"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(tiny_model(router_jitter_noise=0.5), options)
    monitor, trainer = train(model, full_rows(4), tmp_path)
    assert [one.tokens for one in monitor.records] == [2 * SEQUENCE] * 3
    assert "routing/grad_norm" in trainer.state.log_history[0]


# --- history -----------------------------------------------------------------------------------------------------------


def test_a_long_history_is_thinned_and_loses_nothing(tiny_model, tmp_path, monkeypatch):
    monitor_of_all = train(tiny_model(), full_rows(4), tmp_path, max_steps=23)[0]
    monkeypatch.setattr(monitoring, "MAX_RECORDS", 4)
    monitor = train(tiny_model(), full_rows(4), tmp_path, max_steps=23)[0]
    assert [(one.first_step, one.last_step) for one in monitor.records] == [(1, 8), (9, 16), (17, 23)]
    assert [one.logs for one in monitor.records] == [8, 8, 7]
    assert monitor.tokens == monitor_of_all.tokens
    for one in monitor.records:
        parts = monitor_of_all.records[one.first_step - 1 : one.last_step]
        assert torch.equal(one.load, sum(part.load for part in parts))
        torch.testing.assert_close(one.entropy, sum(part.entropy for part in parts) / len(parts))
    assert torch.equal(monitor.latest.load, monitor_of_all.latest.load)


# --- several processes -------------------------------------------------------------------------------------------------


def train_on_two(rank: int, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    # Each rank has an expert without tokens, but it is another one: no collapse.
    modeling_grinmoe.route = functools.partial(route_past, rank)
    mine = []
    monitoring.RankCounts.add = functools.partialmethod(note_and_add, mine, monitoring.RankCounts.add)
    trainer = trainer_of(
        tiny.tiny_model(router_jitter_noise=0.5),
        padded_rows((3, 9, 4, 8, 5, 7, 6, 2)),
        folder,
        max_steps=4,
        logging_steps=2,
    )
    monitor = RoutingMonitor(collapse_steps=2, on_collapse="raise").attach(trainer)
    # What one process logs by itself is no reason to wait for the other.
    trainer.add_callback(LogAlone(trainer))
    trainer.train()
    assert len(mine) == 4
    for record, steps in zip(monitor.records, (mine[:2], mine[2:]), strict=True):
        everywhere = sum(steps)
        assert everywhere[1, rank] == 0
        dist.all_reduce(everywhere)
        assert torch.equal(record.load, everywhere)
        assert record.tokens == everywhere[0].sum() // 2
    assert monitor.tokens == 88
    seen = [None, None]
    dist.all_gather_object(seen, [entry for entry in trainer.state.log_history if "routing/entropy" in entry])
    assert len(seen[0]) == len(seen[1]) == trainer.args.world_size == 2
    for one, other in zip(*seen, strict=True):
        same = {f"routing/{name}" for name in MEANS} - {"routing/tokens_per_s"}
        assert same <= one.keys() and all(one[name] == other[name] for name in same)


class LogAlone(TrainerCallback):
    def __init__(self, trainer):
        self.trainer = trainer

    def on_step_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.trainer.log({"loss": 0.0})


def route_past(closed: int, router_logits, *arguments, layer=None, **options):
    if layer == 1:
        router_logits = router_logits.index_fill(1, torch.tensor([closed]), float("-inf"))
    return route(router_logits, *arguments, layer=layer, **options)


def note_and_add(counts, mine, add, routing, valid, eps) -> None:
    chosen = torch.stack([experts for _, _, experts in routing])[:, valid.bool()]
    mine.append(nn.functional.one_hot(chosen.flatten(1), 4).sum(1))
    add(counts, routing, valid, eps)


def sharded_gradients(rank: int) -> None:
    whole, sharded = tiny.tiny_model(router_aux_loss_coef=1.0), tiny.tiny_model(router_aux_loss_coef=1.0)
    for layer in (*sharded.model.layers, sharded):
        fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
    ids = torch.arange(16).view(2, 8)
    norms = []
    for model in (whole, sharded):
        torch.manual_seed(0)
        model.train()(input_ids=ids, labels=ids, routing_seed=7).loss.backward()
        gates = [layer.block_sparse_moe.gate for layer in model.model.layers]
        counts = monitoring.RankCounts(2, 4, torch.device("cpu"), 0)
        counts.add_gradients(gates)
        norms.append(counts.gradient_norm)
    assert isinstance(gates[0].weight.grad, DTensor)
    assert norms[0].min() > 0
    torch.testing.assert_close(norms[0], norms[1])


def on_two_processes(rank: int, folder: str) -> None:
    sharded_gradients(rank)
    train_on_two(rank, folder)


@pytest.mark.integration
def test_two_processes_count_together_and_measure_whole_gradients(tmp_path):
    """Both in one, because processes take long to start."""
    run_on_two(on_two_processes, tmp_path, str(tmp_path / "trainer"))
