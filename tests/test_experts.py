"""The experts: one dense definition, and every implementation held to it on outputs and all gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

import grinmoe.experts_grinmoe as experts_module
from grinmoe.experts_grinmoe import GrinMoeExperts
from tests.tolerances import FAST_PATH_BFLOAT16, FAST_PATH_FLOAT32

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
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm", "grinmoe_cpu"])
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


def test_the_default_is_grouped_mm(tiny_model):
    assert tiny_model().config._experts_implementation == "grouped_mm"


def test_unknown_implementations_are_refused(tiny_model):
    with pytest.raises(ValueError, match="magic"):
        tiny_model().set_experts_implementation("magic")


class TestCpuPath:
    """`grinmoe_cpu` where it differs from the loop: what it leaves out, and what it refuses."""

    def build(self, config, implementation: str) -> GrinMoeExperts:
        config._experts_implementation = implementation
        torch.manual_seed(0)
        experts = GrinMoeExperts(config)
        for parameter in experts.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        return experts

    def results(self, experts, choices, dtype=torch.float32):
        """Output, and gradients of the input, of the weights and of whichever parameters train."""
        torch.manual_seed(1)
        hidden_states = torch.randn(choices.shape[0], experts.hidden_dim).to(dtype).requires_grad_()
        weights = torch.rand(choices.shape).to(dtype).requires_grad_()
        output = experts(hidden_states, choices, weights)
        upstream = torch.randn(output.shape).to(output.dtype)
        inputs = [hidden_states, weights, *(p for p in experts.parameters() if p.requires_grad)]
        return [output, *torch.autograd.grad((output * upstream).sum(), inputs)]

    def assert_like_the_loop(self, config, choices, prepare=lambda experts: None, **options):
        pair = []
        for implementation in ("eager", "grinmoe_cpu"):
            experts = self.build(copy.deepcopy(config), implementation)
            prepare(experts)
            pair.append(self.results(experts, choices, **options))
        bound = FAST_PATH_BFLOAT16 if options.get("dtype") == torch.bfloat16 else FAST_PATH_FLOAT32
        for expected, found in zip(*pair, strict=True):
            assert found.dtype == expected.dtype
            assert (found - expected).abs().max() <= bound * expected.abs().max()

    @pytest.mark.parametrize("tokens, top_k", [(1, 1), (1, 4), (33, 3), (0, 2)])
    def test_odd_shapes(self, tiny_config, tokens, top_k):
        choices = torch.stack([torch.randperm(5)[:top_k] for _ in range(tokens)] or [torch.empty(0, dtype=int)])
        config = tiny_config(num_local_experts=5, num_experts_per_tok=top_k, intermediate_size=7)
        if tokens == 0:
            output = self.build(config, "grinmoe_cpu")(
                torch.empty(0, 32), torch.empty(0, 2, dtype=int), torch.empty(0, 2)
            )
            assert output.shape == (0, 32)
        else:
            self.assert_like_the_loop(config, choices)

    def test_choices_served_elsewhere_add_nothing(self, tiny_config):
        """Expert parallelism marks them with the number of local experts."""
        choices = torch.tensor([[0, 4], [4, 4], [3, 1], [4, 2]])
        self.assert_like_the_loop(tiny_config(), choices)
        output = self.build(tiny_config(), "grinmoe_cpu")(torch.ones(4, 32), choices, torch.ones(4, 2))
        assert (output[1] == 0).all() and (output[0] != 0).any()

    @pytest.mark.parametrize("frozen", [("gate_up_proj",), ("down_proj",), ("gate_up_proj", "down_proj")], ids=str)
    def test_frozen_experts(self, tiny_config, frozen):
        def freeze(experts):
            for name in frozen:
                getattr(experts, name).requires_grad_(False)

        self.assert_like_the_loop(tiny_config(), ROUTINGS["spread"](4), freeze)

    def test_bfloat16(self, tiny_config):
        self.assert_like_the_loop(
            tiny_config(), ROUTINGS["spread"](4), lambda experts: experts.bfloat16(), dtype=torch.bfloat16
        )

    def test_autocast(self, tiny_config):
        """Products in bfloat16, master weights and their gradients in float32."""
        experts, choices = self.build(tiny_config(), "grinmoe_cpu"), ROUTINGS["spread"](4)
        expected = self.results(experts, choices)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = self.results(experts, choices)
        for a, b in zip(expected, found, strict=True):
            assert b.dtype == torch.float32
            assert 0 < (a - b).abs().max() <= FAST_PATH_BFLOAT16 * a.abs().max()

    def test_only_input_and_pre_activation_are_kept(self, tiny_config):
        """Goal G4: unique storages saved for the backward, parameters excluded, at most 1.1 (T H + T K 2I) elements."""
        config = tiny_config(hidden_size=128, intermediate_size=96)
        experts = self.build(config, "grinmoe_cpu")
        parameters = {p.untyped_storage().data_ptr() for p in experts.parameters()}
        kept = {}

        def keep(tensor):
            if tensor.is_floating_point() and tensor.untyped_storage().data_ptr() not in parameters:
                kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        hidden_states = torch.randn(200, 128, requires_grad=True)
        weights = torch.rand(200, 2, requires_grad=True)
        choices = torch.stack([torch.randperm(4)[:2] for _ in range(200)])
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            experts(hidden_states, choices, weights)
        minimum = 4 * (200 * 128 + 200 * 2 * 2 * 96)
        assert minimum <= sum(kept.values()) <= 1.1 * minimum

    def test_other_activations_and_devices_are_refused(self, tiny_config):
        experts = self.build(tiny_config(hidden_act="gelu"), "grinmoe_cpu")
        choices, weights = torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1)
        with pytest.raises(ValueError, match="hidden_act='silu', not 'gelu'"):
            experts(torch.ones(2, 32), choices, weights)
        with pytest.raises(ValueError, match="got tensors on meta"):
            experts(torch.ones(2, 32, device="meta"), choices, weights)

    def test_the_private_onednn_operator_is_still_there(self):
        """If this fails, torch has moved it: `_onednn_linear` then falls back to MKL, at half the speed on AMD."""
        assert torch.backends.mkldnn.is_available()
        linear = experts_module._onednn_linear()
        left, right = torch.randn(7, 12).t(), torch.randn(7, 5).t()
        torch.testing.assert_close(linear(left, right), left @ right.t())
