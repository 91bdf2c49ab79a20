"""The sparse block with estimators that scale the experts' gradient, against the algorithms as the paper prints them."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from grinmoe.kernels.philox import counter_jitter, counter_noise
from grinmoe.modeling_grinmoe import GrinMoeSparseMoeBlock
from grinmoe.routing_grinmoe import ESTIMATORS, RoutingNoise, draw_routing_noise
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


class TestTritonKernels:
    """`experts_implementation="grinmoe_triton"`: router and jitter by kernels too, with draws that follow from the seed."""

    def build(self, tiny_config, implementation="grinmoe_triton", **fields):
        config = tiny_config(router_jitter_noise=0.3, input_jitter_noise=0.2, **fields)
        config._experts_implementation = implementation
        torch.manual_seed(0)
        block = GrinMoeSparseMoeBlock(config, layer_idx=1).train()
        for parameter in block.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        return block

    @pytest.mark.parametrize("estimator", ["sparsemixer_v2", "sparsemixer_v2_star", "sparsemixer_centred", "topk"])
    def test_a_training_step_is_that_of_the_reference_with_the_same_draws(self, tiny_config, estimator):
        hidden_states, upstream = torch.randn(2, 15, 32), torch.randn(2, 15, 32)
        noise = counter_noise(7, 1, 30, 4, 2)._replace(input_jitter=counter_jitter(7, 1, 30, 32, 0.2))
        outcomes = []
        for implementation in ("eager", "grinmoe_triton"):
            block = self.build(tiny_config, implementation, router_estimator=estimator)
            # What has no kernel draws by the reference from a generator; so it is given the noise.
            fused = implementation != "eager" and ESTIMATORS[estimator].kernel
            leaf = hidden_states.clone().requires_grad_()
            output = block(leaf, **({"routing_seed": 7} if fused else {"noise": noise}))
            outcomes.append([output, *torch.autograd.grad(output, [leaf, *block.parameters()], upstream)])
        for expected, found in zip(*outcomes, strict=True):
            assert (found - expected).abs().max() <= FAST_PATH_FLOAT32 * expected.abs().max()

    def test_layers_and_seeds_draw_differently_and_repeat(self, tiny_config):
        block, hidden_states = self.build(tiny_config), torch.randn(1, 20, 32)
        first = block(hidden_states, routing_seed=7)
        assert torch.equal(block(hidden_states, routing_seed=7), first)
        assert not torch.equal(block(hidden_states, routing_seed=8), first)
        block.layer_idx = block.gate.layer_idx = 2
        assert not torch.equal(block(hidden_states, routing_seed=7), first)

    def test_only_input_and_pre_activation_are_kept(self, tiny_config):
        """Goal G4 for the whole block, jitter and router included."""
        block = self.build(tiny_config, hidden_size=128, intermediate_size=96)
        parameters = {p.untyped_storage().data_ptr() for p in block.parameters()}
        kept = {}

        def keep(tensor):
            if tensor.untyped_storage().data_ptr() not in parameters:
                kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            block(torch.randn(1, 200, 128, requires_grad=True), routing_seed=7)
        minimum = 4 * (200 * 128 + 200 * 2 * 2 * 96)
        assert minimum <= sum(kept.values()) <= 1.1 * minimum

    def test_logits_that_allow_no_choice_are_named(self, tiny_config):
        hidden_states = torch.ones(1, 5, 32)
        hidden_states[0, 2] = float("nan")
        with pytest.raises(ValueError, match="layer 1: 1 of 5 tokens"):
            self.build(tiny_config)(hidden_states, routing_seed=7)
