"""What makes the monitor of routing raise alarm: experts without tokens, logits that are not finite, wrong use."""

from __future__ import annotations

import copy
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import TrainerCallback
from transformers.training_args import ParallelMode

from grinmoe.monitoring.callback import ExpertCollapseError, ExpertCollapseWarning, RoutingMonitor
from grinmoe.routing_grinmoe import NonFiniteRouterLogitsError
from tests.monitoring.test_callback import Choices, count_hooks, full_rows, one_thread, train  # noqa: F401


class Script(TrainerCallback):
    """Calls `action(model)` before the given step."""

    def __init__(self, **actions):
        self.actions = actions

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if action := self.actions.get(f"step_{state.global_step + 1}"):
            action(model)


def test_an_expert_without_tokens_is_reported_once_until_it_recovers(tiny_model, tmp_path, monkeypatch):
    choices = Choices(monkeypatch)
    choices.closed = [2]
    script = Script(step_5=lambda model: choices.closed.clear(), step_7=lambda model: choices.closed.extend([1, 3]))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(tiny_model(), full_rows(8), tmp_path, RoutingMonitor(collapse_steps=3), max_steps=10, callbacks=[script])
    found = [str(one.message) for one in caught if issubclass(one.category, ExpertCollapseWarning)]
    assert len(found) == 2
    assert found[0].startswith("layer 1, step 3: no token has gone to expert 2 for 3 steps; raise router_aux_loss_coef")
    assert found[1].startswith("layer 1, step 9: no token has gone to expert 1 for 3 steps, expert 3 for 3 steps;")


def test_a_collapse_can_end_the_training(tiny_model, tmp_path, monkeypatch):
    """Noticed at the next log: here the expert has been without tokens for longer than was allowed."""
    Choices(monkeypatch).closed = [0]
    model, monitor = tiny_model(), RoutingMonitor(collapse_steps=3, on_collapse="raise")
    before = count_hooks(model)
    with pytest.raises(
        ExpertCollapseError, match="layer 1, step 4: no token has gone to expert 0 for 4 steps"
    ) as raised:
        train(model, full_rows(8), tmp_path, monitor, max_steps=6, logging_steps=2)
    assert (raised.value.layer, raised.value.experts, raised.value.step) == (1, [0], 4)
    assert count_hooks(model) == before


def test_collapse_is_not_looked_for_where_it_is_turned_off(tiny_model, tmp_path, monkeypatch):
    Choices(monkeypatch).closed = [0]
    with warnings.catch_warnings():
        warnings.simplefilter("error", ExpertCollapseWarning)
        train(tiny_model(), full_rows(4), tmp_path, RoutingMonitor(collapse_steps=None), max_steps=5)


@pytest.mark.parametrize("where", ["forward", "monitor"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_router_logit_that_is_not_finite_names_layer_and_step(tiny_model, tmp_path, monkeypatch, where, value):
    """On a CPU the forward looks; elsewhere the monitor does, once per step and before the weights are touched."""
    if where == "monitor":
        monkeypatch.setattr("grinmoe.routing_grinmoe.check_router_logits", lambda *arguments: None)
    weights = {}

    def poison(model):
        model.model.layers[1].block_sparse_moe.gate.weight.data[0] = value
        weights.update(copy.deepcopy(model.state_dict()))

    model, monitor = tiny_model(), RoutingMonitor()
    before = count_hooks(model)
    options = {"callbacks": [Script(step_2=poison)], "gradient_accumulation_steps": 2}
    with pytest.raises(NonFiniteRouterLogitsError, match="layer 1, step 2: .*lower the learning rate") as raised:
        train(model, full_rows(8), tmp_path, monitor, **options)
    assert (raised.value.layer, raised.value.step) == (1, 2)
    assert isinstance(raised.value, ValueError)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight.nan_to_num(), weights[name].nan_to_num()), name
    monitor.remove_hooks()
    assert count_hooks(model) == before


def test_without_a_monitor_the_step_is_not_known(tiny_model):
    model = tiny_model().train()
    model.model.layers[0].block_sparse_moe.gate.weight.data.fill_(float("nan"))
    with pytest.raises(NonFiniteRouterLogitsError, match="^layer 0: ") as raised:
        model(input_ids=torch.arange(6)[None])
    assert raised.value.step is None


@pytest.mark.parametrize(
    "options, message",
    [
        ({"collapse_steps": 0}, "collapse_steps=0 is not positive; give 1 or more"),
        ({"on_collapse": "stop"}, "on_collapse='stop' is unknown; choose 'warn' or 'raise'"),
    ],
    ids=str,
)
def test_wrong_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        RoutingMonitor(**options)


def test_what_cannot_be_watched_is_refused(tiny_model, tmp_path):
    args = SimpleNamespace(parallel_mode=ParallelMode.NOT_DISTRIBUTED)
    with pytest.raises(ValueError, match="DataParallel.*torchrun"):
        RoutingMonitor().on_train_begin(args, None, None, model=tiny_model())
    args.parallel_mode = ParallelMode.NOT_PARALLEL
    with pytest.raises(ValueError, match="Linear does not hold one"):
        RoutingMonitor().on_train_begin(args, None, None, model=nn.Linear(2, 2))
