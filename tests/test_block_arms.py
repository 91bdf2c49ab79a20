"""Peers of the block's benchmark that need a GPU: what of them can be checked without one."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import transformers.integrations.sonicmoe as sonicmoe
from torch import nn

from benchmarks.block_arms import BlockSize, _quack, _sonic, build_block, describe, share_weights
from grinmoe import GrinMoeConfig
from grinmoe.kernels import quack_experts
from grinmoe.modeling_grinmoe import GrinMoeSparseMoeBlock
from tests.tolerances import FAST_PATH_FLOAT32

SIZE = BlockSize(hidden_size=32, intermediate_size=24, experts=4, top_k=2)


def sonic_in_torch(hidden_states, scores, tokens, experts, w1, b1, w2, b2, *, E, activation_type, **options):
    """SonicMoE's function as Transformers calls it: w1 (2I, H, E), w2 (H, I, E)."""
    assert (b1, b2, activation_type, E) == (None, None, "swiglu", SIZE.experts)
    assert options == {"is_inference_mode_enabled": False, "concat_layout": True, "stream_id": None}
    output = torch.zeros_like(hidden_states)
    for expert in range(E):
        chosen = experts == expert
        gate, up = (hidden_states[tokens[chosen]] @ w1[..., expert].t()).chunk(2, dim=-1)
        rows = nn.functional.silu(gate) * up @ w2[..., expert].t()
        output = output.index_add(0, tokens[chosen], rows * scores[chosen, None])
    return output, None


def test_sonicmoe_of_transformers_takes_our_experts(monkeypatch):
    """Up to the kernel itself: the attributes that the library reads, and the layout of weights that it passes on."""
    kernel = SimpleNamespace(
        activation_type_enum=SimpleNamespace(SWIGLU="swiglu"), moe_general_routing_inputs=sonic_in_torch
    )
    monkeypatch.setattr(sonicmoe, "load_sonicmoe_kernel", lambda: kernel)
    blocks = {"sonic": _sonic(SIZE), "eager": build_block(GrinMoeConfig, GrinMoeSparseMoeBlock, "eager", SIZE)}
    torch.manual_seed(0)
    share_weights(blocks, torch.eye(4, 32), SIZE, std=0.3)
    results = []
    for block in blocks.values():
        torch.manual_seed(1)
        hidden_states = torch.randn(1, 20, 32, requires_grad=True)
        output = block(hidden_states)
        parameters = block.get_submodule("experts").parameters()
        results.append([output, *torch.autograd.grad(output.square().sum(), [hidden_states, *parameters])])
    for found, expected in zip(*results, strict=True):
        assert (found - expected).abs().max() <= FAST_PATH_FLOAT32 * expected.abs().max()


@pytest.mark.parametrize("has_kernels, reason", [(False, "requires the `kernels` package"), (True, "requires CUDA")])
def test_sonicmoe_that_cannot_be_loaded_says_why(monkeypatch, has_kernels, reason):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sonicmoe, "is_kernels_available", lambda: has_kernels)
    with pytest.raises(ImportError) as raised:
        _sonic(SIZE)
    assert reason in describe(raised.value) and describe(raised.value).startswith("ImportError: sonic-moe ")


def test_quack_that_is_not_installed_is_left_out_with_the_reason(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(quack_experts.importlib.util, "find_spec", lambda name: None if name == "quack" else name)
    with pytest.raises(ImportError) as raised:
        _quack(SIZE)
    assert "pip install quack-kernels" in describe(raised.value)
