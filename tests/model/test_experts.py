"""The experts: one dense definition, and every implementation held to it on outputs and all gradients."""

from __future__ import annotations

import pytest
import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from grinmoe.modeling_grinmoe import GrinMoeExperts
from tests.tolerances import FAST_PATH_FLOAT32

TOKENS, TOP_K = 40, 2


def dense(experts, hidden_states, selected, weights):
    """Every expert on every token, then the chosen ones: the definition, one line per step."""
    gate, up = torch.einsum("th,eih->tei", hidden_states, experts.gate_up_proj).chunk(2, dim=-1)
    outputs = torch.einsum("tei,ehi->teh", torch.nn.functional.silu(gate) * up, experts.down_proj)
    chosen = outputs.gather(1, selected.unsqueeze(-1).expand(-1, -1, outputs.shape[-1]))
    return (chosen * weights.unsqueeze(-1)).sum(1)


ROUTINGS = {
    "spread": lambda e: torch.stack([torch.randperm(e)[:TOP_K] for _ in range(TOKENS)]),
    "one expert takes all": lambda e: torch.tensor([[2, 0]]).expand(TOKENS, -1),
    "half the experts idle": lambda e: torch.stack([torch.randperm(e // 2)[:TOP_K] for _ in range(TOKENS)]),
}


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize(
    "implementation", ["eager", "grouped_mm", "batched_mm", "grinmoe", "grinmoe_cpu", "grinmoe_triton"]
)
def test_implementations_match_the_definition(tiny_config, implementation, routing):
    torch.manual_seed(0)
    config = tiny_config(num_local_experts=8)
    config._experts_implementation = implementation
    experts = GrinMoeExperts(config)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    selected = ROUTINGS[routing](8)
    results = []
    for function in (lambda h, s, w: dense(experts, h, s, w), experts):
        torch.manual_seed(1)
        hidden_states = torch.randn(TOKENS, config.hidden_size, requires_grad=True)
        weights = torch.rand(TOKENS, TOP_K, requires_grad=True)
        output = function(hidden_states, selected, weights)
        upstream = torch.randn(output.shape)
        inputs = [hidden_states, weights, experts.gate_up_proj, experts.down_proj]
        results.append([output, *torch.autograd.grad((output * upstream).sum(), inputs)])
    for expected, found in zip(*results, strict=True):
        assert (found - expected).abs().max() <= FAST_PATH_FLOAT32 * expected.abs().max()


def test_no_token_is_dropped_when_one_expert_gets_them_all(tiny_config):
    """All tokens to one expert: every one of them comes out, none is zeroed."""
    torch.manual_seed(0)
    config = tiny_config()
    config._experts_implementation = "eager"
    experts = GrinMoeExperts(config)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    hidden_states = torch.randn(500, config.hidden_size)
    output = experts(hidden_states, torch.full((500, 1), 3), torch.ones(500, 1))
    assert (output.abs().sum(-1) > 0).all()


def test_custom_implementations_are_found(tiny_model):
    """The library's registry reaches experts in a sibling file, also where it greps for its decorator."""
    calls = []

    def recording(self, hidden_states, top_k_index, top_k_weights):
        calls.append(top_k_index.shape)
        return ALL_EXPERTS_FUNCTIONS["grouped_mm"](self, hidden_states, top_k_index, top_k_weights)

    ALL_EXPERTS_FUNCTIONS.register("recording", recording)
    try:
        model = tiny_model()
        model.set_experts_implementation("recording")
        model(torch.arange(6)[None])
    finally:
        del ALL_EXPERTS_FUNCTIONS._global_mapping["recording"]
    assert calls == [(6, 2)] * 2


def test_unknown_implementations_are_refused(tiny_model):
    with pytest.raises(ValueError, match="magic"):
        tiny_model().set_experts_implementation("magic")


@pytest.mark.parametrize("training", [False, True])
def test_apply_gate_borrowed_by_another_module_computes_swiglu(tiny_config, training):
    """llm-compressor puts the method of our class on modules of its own, which have an act_fn and nothing else of ours."""

    class LinearExperts(torch.nn.Module):
        _apply_gate = GrinMoeExperts._apply_gate

        def __init__(self):
            super().__init__()
            self.act_fn = torch.nn.SiLU()

    gate_up = torch.randn(5, 48)
    expected = GrinMoeExperts(tiny_config()).eval()._apply_gate(gate_up)
    assert torch.equal(LinearExperts().train(training)._apply_gate(gate_up), expected)


def test_experts_of_another_library_refuse_the_dropout_that_they_lack(tiny_model):
    model = tiny_model(expert_dropout=0.1).train()
    model.model.layers[1].block_sparse_moe.experts = torch.nn.Identity()
    with pytest.raises(ValueError, match="the experts are Identity, which drop nothing"):
        model(torch.arange(8)[None])
