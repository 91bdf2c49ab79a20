"""FSDP2 under the Trainer on CPU processes, for tests: Accelerate itself never chooses it there."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from unittest import mock

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from transformers import Trainer, TrainerCallback

from grinmoe import modeling_grinmoe
from grinmoe.distributed.sharding import shard_for
from grinmoe.routing_grinmoe import route
from tests.tiny import training_arguments

SETTINGS = {
    "ACCELERATE_USE_FSDP": "true",
    "ACCELERATE_USE_CPU": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
}
"""What `accelerate launch` makes of a configuration in recipes/accelerate/."""


@contextlib.contextmanager
def fsdp_on_cpu(**settings: str) -> Iterator[None]:
    """Within, a new Trainer trains with FSDP2 on the process group that is there, also on one of a single rank.

    Accelerate takes FSDP for GPUs only; here its state is told that it has been chosen. Everything after that choice is
    what happens on GPUs.
    """
    original = AcceleratorState.__init__

    def with_fsdp(self, *args, fsdp_plugin=None, **kwargs):
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = fsdp_plugin
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    rank, ranks = str(dist.get_rank()), str(dist.get_world_size())
    launched = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    AcceleratorState._reset_state(reset_partial_state=True)
    with mock.patch.dict(os.environ, {**SETTINGS, **launched, **settings}):
        with mock.patch.object(AcceleratorState, "__init__", with_fsdp):
            yield
    AcceleratorState._reset_state(reset_partial_state=True)


def rows(count: int = 32, length: int = 12) -> list[dict[str, torch.Tensor]]:
    tokens = torch.randint(0, 90, (count, length), generator=torch.Generator().manual_seed(7))
    return [{"input_ids": row, "labels": row} for row in tokens]


def greedy_routing():
    """Training without sampling: ranks draw differently, and here their sum is compared with one process."""

    def evaluate(router_logits, top_k, jitter_eps, training, *args, **kwargs):
        return route(router_logits, top_k, jitter_eps, False)

    return mock.patch.object(modeling_grinmoe, "route", evaluate)


class Gradients(TrainerCallback):
    """Keeps the gradients of the first optimizer step, before clipping, whole."""

    def __init__(self):
        self.first: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if not self.first:
            for name, parameter in model.named_parameters():
                if parameter.grad is not None:
                    self.first[name] = whole(parameter.grad).clone()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def trainer_for(model, folder, batch: int, callbacks=(), sharded: bool = True, **overrides) -> Trainer:
    options = {"per_device_train_batch_size": batch, "max_grad_norm": 0.0, **overrides}
    arguments = training_arguments(folder, **options)
    trainer = Trainer(model, arguments, train_dataset=rows(), eval_dataset=rows(), callbacks=list(callbacks))
    if sharded:
        shard_for(trainer)
    return trainer
