"""The default implementation of the experts: what it takes where, and that it computes what was asked for."""

from __future__ import annotations

import pytest
import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from grinmoe.kernels.dispatch import implementation_for
from grinmoe.modeling_grinmoe import GrinMoeExperts
from tests.tolerances import FAST_PATH_BFLOAT16, FAST_PATH_FLOAT32

CHOICES = torch.tensor([[0, 2], [1, 3], [2, 0], [3, 1], [0, 1]])


@pytest.fixture
def build(tiny_config):
    def make(implementation="grinmoe", dtype=torch.float32, **fields) -> GrinMoeExperts:
        torch.manual_seed(0)
        experts = GrinMoeExperts(tiny_config(**fields))
        experts.config._experts_implementation = implementation
        for parameter in experts.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        return experts.to(dtype)

    return make


def results(experts, dtype=torch.float32) -> list[torch.Tensor]:
    """Output, and gradients of the input, the weights and the parameters."""
    torch.manual_seed(1)
    hidden_states = torch.randn(5, experts.hidden_dim).to(dtype).requires_grad_()
    weights = torch.rand(5, 2).to(dtype).requires_grad_()
    output = experts(hidden_states, CHOICES, weights)
    return [output, *torch.autograd.grad(output.sum(), [hidden_states, weights, *experts.parameters()])]


def assert_close(found, expected, bound):
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        assert (a - b).abs().max() <= bound * b.abs().max()


def test_it_is_the_default_and_yields_to_what_is_asked_for(tiny_model):
    model = tiny_model()
    assert model.config._experts_implementation == "grinmoe"
    model.set_experts_implementation("eager")
    assert model.config._experts_implementation == "eager"


@pytest.mark.parametrize(
    "fields, dtype, expected",
    [
        ({}, torch.float32, "grinmoe_cpu"),
        ({"hidden_act": "gelu"}, torch.float32, "grouped_mm"),
        ({}, torch.bfloat16, "grouped_mm"),
    ],
    ids=["float32", "gelu", "bfloat16"],
)
def test_what_serves_on_a_cpu(build, fields, dtype, expected):
    experts = build(dtype=dtype, **fields)
    assert implementation_for(experts, torch.ones(5, 32, dtype=dtype), CHOICES) == expected
    bound = FAST_PATH_FLOAT32 if dtype == torch.float32 else FAST_PATH_BFLOAT16
    assert_close(results(experts, dtype), results(build("eager", dtype, **fields), dtype), bound)


def test_what_serves_on_another_device(build):
    """Few choices without a gradient are decoding; batched_mm then copies no more weights than the layer has."""
    experts, hidden_states = build(), torch.ones(5, 32, device="meta")
    assert implementation_for(experts, hidden_states, CHOICES) == "grouped_mm"
    with torch.no_grad():
        assert implementation_for(experts, hidden_states, CHOICES) == "grouped_mm"
        assert implementation_for(experts, hidden_states, CHOICES[:2]) == "batched_mm"
    assert implementation_for(experts, hidden_states, CHOICES[:2]) == "grouped_mm"


def test_autocast_reaches_grouped_products(build):
    """Transformers' own function would compute in the weights' float32."""
    dtypes = []

    def recording(module, hidden_states, *arguments):
        dtypes.append((hidden_states.dtype, module.gate_up_proj.dtype, module.down_proj.dtype))
        return original(module, hidden_states, *arguments)

    original = ALL_EXPERTS_FUNCTIONS["grouped_mm"]
    ALL_EXPERTS_FUNCTIONS["grouped_mm"] = recording
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = results(build())
    finally:
        del ALL_EXPERTS_FUNCTIONS["grouped_mm"]
    assert dtypes == [(torch.bfloat16,) * 3]
    expected = results(build("eager"))
    assert_close(found, expected, FAST_PATH_BFLOAT16)
    assert all((a - b).abs().max() > 0 for a, b in zip(found, expected))


def test_an_export_holds_no_operator_of_ours(tiny_model):
    model = tiny_model().eval()
    program = torch.export.export(model, (), {"input_ids": torch.arange(6)[None], "use_cache": False}, strict=False)
    assert not any("grinmoe" in str(node.target) for node in program.graph.nodes)
