"""LoRA under FSDP2 on two gloo processes."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from peft import get_peft_model
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from grinmoe.adapters.lora import lora_config
from tests.adapters.test_lora import factors, randomised, step
from tests.distributed.two_ranks import run_on_two
from tests.tiny import tiny_model


@pytest.mark.slow
def test_compact_factors_under_fsdp2(tmp_path):
    """Sharded over two processes: the gradients, and state dicts in PEFT's shapes there and back.

    pytest -m slow tests/distributed/test_lora_sharded.py
    """
    run_on_two(_shard_and_compare, tmp_path)


def _shard_and_compare(rank: int) -> None:
    base = tiny_model()
    model = randomised(get_peft_model(base, lora_config(base, r=4, experts=[0, 3], shared_a=True)))
    whole = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    _, expected = step(model)
    for gradient in expected.values():
        dist.all_reduce(gradient)  # the ranks draw differently
    expected = {name: gradient / 2 for name, gradient in expected.items()}
    model.zero_grad()
    for layer in base.model.layers:
        fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
    fully_shard(model)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    for name, gradient in step(model)[1].items():
        torch.testing.assert_close(gradient.full_tensor(), expected[name], atol=1e-6, rtol=1e-4)
    sharded = {key: tensor.clone() for key, tensor in get_model_state_dict(model).items()}
    for parameter in factors(model).values():
        parameter.data.zero_()
    set_model_state_dict(model, sharded)
    full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        assert full.keys() == whole.keys()
        assert all(torch.equal(tensor, whole[key]) for key, tensor in full.items())
