"""The sparse block with estimators that scale the experts' gradient, against the algorithms as the paper prints them."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from grinmoe.block_grinmoe import GrinMoeSparseMoeBlock
from grinmoe.estimators_grinmoe import RoutingNoise
from grinmoe.routing_grinmoe import draw_routing_noise
from tests.tolerances import FAST_PATH_FLOAT32


def algorithm(block, hidden_states: torch.Tensor, noise: RoutingNoise, star: bool) -> torch.Tensor:
    """Algorithm 1 as printed, or Algorithm 2 (`star`): tokens (T, H) to (T, H), with autograd doing all of the rest."""
    router_logits = hidden_states @ block.gate.weight.t()  # (T, E)
    if star:
        router_logits = router_logits / 2
    gate, up = torch.einsum("th,eih->tei", hidden_states, block.experts.gate_up_proj).chunk(2, dim=-1)
    experts = torch.einsum("tei,ehi->teh", torch.nn.functional.silu(gate) * up, block.experts.down_proj)
    third, full_above = (1 / 3, 3 / 8) if star else (0.3333, 3 / 4)
    taken = torch.zeros_like(router_logits, dtype=torch.bool)
    output = torch.zeros_like(hidden_states)
    for exponential, uniform in zip(noise.exponential, noise.uniform):
        left = router_logits.masked_fill(taken, float("-inf"))
        best, argmax = left.max(-1, keepdim=True)
        far = best - router_logits > 2 * block.gate.jitter_eps * torch.maximum(router_logits.abs(), best)
        probs = left.masked_fill(far, float("-inf")).softmax(-1)
        choice = (probs.log() - exponential.log()).argmax(-1, keepdim=True)
        m = torch.where((choice == argmax) | (uniform > full_above), 1.0, third)
        chosen = experts.take_along_dim(choice.unsqueeze(-1), 1).squeeze(1)
        h = probs.take_along_dim(choice, 1) * chosen
        output = output + (2 * h + (m * h - 2 * h).detach() if star else h + (m * h - h).detach())
        taken = taken.scatter(1, choice, True)
    return output


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm", "grinmoe_cpu", "grinmoe_triton"])
@pytest.mark.parametrize("estimator", ["sparsemixer_v2_printed", "sparsemixer_v2_star"])
def test_the_block_is_the_printed_algorithm(tiny_config, estimator, implementation):
    """Output, and gradients of the input, the gate and the experts; float32 against float64."""
    torch.manual_seed(0)
    config = tiny_config(router_estimator=estimator, router_jitter_noise=0.3, input_jitter_noise=0.0)
    config._experts_implementation = implementation
    block = GrinMoeSparseMoeBlock(config, 0).train()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    hidden_states = torch.randn(2, 25, config.hidden_size, requires_grad=True)
    upstream = torch.randn(50, config.hidden_size)
    noise = draw_routing_noise(torch.empty(50, config.num_local_experts), 2)
    parameters = [hidden_states, *block.parameters()]

    output = block(hidden_states, noise).view(50, -1)
    found = [output, *torch.autograd.grad((output * upstream).sum(), parameters)]
    block.double()
    wide = hidden_states.detach().double().requires_grad_()
    output = algorithm(block, wide.view(50, -1), noise, star=estimator.endswith("star"))
    expected = [output, *torch.autograd.grad((output * upstream).sum(), [wide, *block.parameters()])]
    for one, other in zip(expected, found, strict=True):
        assert other.dtype == torch.float32
        assert (other - one).abs().max() <= FAST_PATH_FLOAT32 * one.abs().max()


def test_the_experts_may_be_wrapped_by_plain_peft(tiny_model):
    """It builds a weight as large as all experts in every forward; but it trains."""
    config = LoraConfig(target_parameters=["experts.gate_up_proj", "experts.down_proj"], r=2, init_lora_weights=False)
    model = get_peft_model(tiny_model(), config).train()
    ids = torch.arange(24).view(2, 12)
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)
