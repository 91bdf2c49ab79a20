"""The Triton kernels on parameters that FSDP2 shards: two gloo ranks against one process, kernels interpreted."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from tests.distributed.two_ranks import run_on_two
from tests.tiny import tiny_model
from tests.tolerances import FAST_PATH_FLOAT32

pytestmark = pytest.mark.integration

IDS = torch.arange(24).view(2, 12)


def loss_and_gradients(model) -> tuple[float, dict[str, torch.Tensor]]:
    """One training step's, with the draws of a given seed and recomputed layers."""
    model.gradient_checkpointing_enable()
    loss = model.train()(input_ids=IDS, labels=IDS, routing_seed=7).loss
    loss.backward()
    return loss.item(), {name: parameter.grad for name, parameter in model.named_parameters()}


def kernels(**fields):
    torch.manual_seed(0)
    model = tiny_model(router_jitter_noise=0.3, router_aux_loss_coef=0.1, **fields)
    model.set_experts_implementation("grinmoe_triton")
    return model


def sharded_job(rank: int, folder: str) -> None:
    model = kernels()
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    loss, gradients = loss_and_gradients(model)
    whole = {name: gradient.full_tensor() for name, gradient in gradients.items()}
    torch.save((loss, whole), f"{folder}/rank{rank}.pt")


def test_a_sharded_step_has_the_gradients_of_one_process(tmp_path):
    run_on_two(sharded_job, tmp_path, str(tmp_path))
    expected_loss, expected = loss_and_gradients(kernels())
    assert any("experts" in name for name in expected)
    for rank in range(2):
        loss, gradients = torch.load(tmp_path / f"rank{rank}.pt")
        assert abs(loss - expected_loss) <= FAST_PATH_FLOAT32 * expected_loss
        for name, gradient in expected.items():
            assert (gradients[name] - gradient).abs().max() <= FAST_PATH_FLOAT32 * gradient.abs().max() + 1e-8, name
