"""The router's losses over an accumulation window, and the recipes that are there for comparison."""

from __future__ import annotations

import pytest
import torch

from grinmoe.balance_grinmoe import BalanceWindow, load_balancing_loss, router_z_loss
from grinmoe.routing_grinmoe import NonFiniteRouterLogitsError, within_capacity


@pytest.fixture
def micro_batches():
    """Two micro-batches of two layers: logits that load other experts, and the choices."""
    generator = torch.Generator().manual_seed(3)
    batches = []
    for favourites in ([3.0, 3.0, 0.0, 0.0], [0.0, 0.0, 3.0, 3.0]):
        logits = torch.randn(2, 6, 4, generator=generator) + torch.tensor(favourites)
        batches.append((tuple(logits), tuple(logits.topk(2).indices)))
    return batches


def loss_of(window, batch, targets=None, items=None, mask=None):
    step = {} if items is None else {"targets": torch.tensor(targets), "items": torch.tensor(items)}
    return window.start(*batch, 2, mask, **step).finish()


def test_without_a_step_a_forward_stands_for_itself(micro_batches):
    window = BalanceWindow()
    for logits, experts in micro_batches:
        loss, share = loss_of(window, (logits, experts))
        torch.testing.assert_close(loss, load_balancing_loss(logits, experts, 2, "local"))
        assert share == 1 and window.counts is None


def test_a_window_counts_its_micro_batches_and_the_next_starts_anew(micro_batches):
    """Half and half: the second one's f is the mean of both, its P its own."""
    window = BalanceWindow()
    first, second = micro_batches
    alone, share = loss_of(window, first, 3, 6)
    torch.testing.assert_close(alone, load_balancing_loss(*first, 2, "local"))
    assert share == 0.5
    both, _ = loss_of(window, second, 3, 6)
    fraction = torch.stack(
        [
            sum(torch.bincount(experts[layer].flatten(), minlength=4) for _, experts in micro_batches) / 12
            for layer in (0, 1)
        ]
    )
    mean_probs = torch.stack([torch.softmax(layer, -1).mean(0) for layer in second[0]])
    torch.testing.assert_close(both, 4 * (fraction * mean_probs).sum(-1).mean())
    assert (both - load_balancing_loss(*second, 2, "local")).abs() > 0.5, "the scopes differ on this batch"
    next_step, _ = loss_of(window, second, 3, 6)
    torch.testing.assert_close(next_step, load_balancing_loss(*second, 2, "local"))


def test_windows_of_any_length_are_told_apart(micro_batches):
    window = BalanceWindow()
    for _ in range(3 * 7):
        loss_of(window, micro_batches[0], 1_000_003, 7 * 1_000_003)
    assert window.counts.sum() == 7 * 2 * 12, "all of the third window, nothing of the others"


@pytest.mark.parametrize("last", [(0, 6), (0, 0)], ids=["without targets", "without any item"])
def test_a_micro_batch_without_targets_opens_no_window(micro_batches, last):
    """It has no weight; counted, it would be the beginning of the next step's window."""
    window, (first, second) = BalanceWindow(), micro_batches
    for targets, items in ((3, 6), (3, 6), last):
        loss_of(window, first, targets, items)
    found, _ = loss_of(window, second, 3, 6)
    torch.testing.assert_close(found, load_balancing_loss(*second, 2, "local"))


def test_a_window_left_in_the_middle_is_forgotten_when_the_step_is_another(micro_batches):
    window, (first, second) = BalanceWindow(), micro_batches
    loss_of(window, first, 3, 6)
    torch.testing.assert_close(loss_of(window, second, 3, 7)[0], load_balancing_loss(*second, 2, "local"))


def test_padding_counts_neither_for_f_nor_for_the_window(micro_batches):
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    kept = mask.flatten().bool()
    window, of_kept = BalanceWindow(), BalanceWindow()
    for logits, experts in micro_batches:
        found, _ = loss_of(window, (logits, experts), 3, 6, mask)
        shorter = tuple(layer[kept] for layer in logits), tuple(layer[kept] for layer in experts)
        torch.testing.assert_close(found, loss_of(of_kept, shorter, 3, 6)[0])


def test_the_gradient_is_that_of_the_mean_probabilities_only(micro_batches):
    window = BalanceWindow()
    loss_of(window, micro_batches[0], 3, 6)
    leaves = tuple(layer.clone().requires_grad_() for layer in micro_batches[1][0])
    loss, _ = loss_of(window, (leaves, micro_batches[1][1]), 3, 6)
    loss.backward()
    assert all(leaf.grad.abs().max() > 0 for leaf in leaves)
    assert not window.counts.requires_grad


@pytest.mark.parametrize("mask", [None, torch.tensor([[1, 1, 0, 1, 0, 0]])])
def test_z_loss_is_the_mean_square_of_log_z(micro_batches, mask):
    logits = micro_batches[0][0]
    rows = slice(None) if mask is None else mask.flatten().bool()
    expected = torch.stack([layer[rows].exp().sum(-1).log() ** 2 for layer in logits]).mean()
    torch.testing.assert_close(router_z_loss(logits, mask), expected)


def test_logits_too_large_for_the_z_loss_are_named(micro_batches):
    first, second = micro_batches[0][0]
    with pytest.raises(NonFiniteRouterLogitsError, match="layer 1: router logits are so large"):
        router_z_loss((first, second * 1e30))


class TestCapacity:
    def test_first_choices_come_before_second_ones_and_tokens_in_order(self):
        """Four tokens, top-2 of four experts, factor 1: two places each."""
        experts = torch.tensor([[0, 1], [0, 1], [0, 2], [1, 0]])
        expected = torch.tensor([[True, True], [True, False], [False, True], [True, False]])
        assert torch.equal(within_capacity(experts, 4, 1.0), expected)

    def test_a_large_factor_drops_nothing(self):
        experts = torch.zeros(9, 1, dtype=torch.int64)
        assert within_capacity(experts, 4, 4.0).all()
        assert within_capacity(experts, 4, 1.0).sum() == 3, "rounded up from 2.25"
        assert within_capacity(torch.zeros(100, 2, dtype=torch.int64), 20, 1.1).sum() == 11, (
            "not from 11.000000000000002"
        )

    @pytest.mark.parametrize("experts", ["eager", "grouped_mm", "batched_mm", "grinmoe_cpu"])
    def test_a_dropped_choice_adds_nothing(self, tiny_model, experts):
        model = tiny_model(router_capacity_factor=0.5, input_jitter_noise=0.0).train()
        model.set_experts_implementation(experts)
        block = model.model.layers[0].block_sparse_moe
        hidden = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(1))
        seen = {}
        block.gate.register_forward_hook(lambda _, __, output: seen.update(routing=output))
        output = block(hidden).reshape(-1, 32)
        _, weights, chosen, *_ = seen["routing"]
        fits = within_capacity(chosen, 4, 0.5)
        assert torch.equal(weights == 0, ~fits) and not fits.all()
        assert (output[~fits.any(-1)] == 0).all() and (output[fits.any(-1)] != 0).any(-1).all()

    def test_evaluation_drops_nothing(self, tiny_model):
        ids = torch.arange(12).view(2, 6)
        expected = tiny_model()(ids).logits
        assert torch.equal(tiny_model(router_capacity_factor=0.01)(ids).logits, expected)

    @pytest.mark.parametrize("estimator", ["sparsemixer_v2", "topk"])
    @pytest.mark.parametrize("experts", ["eager", "grouped_mm", "batched_mm", "grinmoe_cpu"])
    def test_the_default_loses_nothing_when_all_tokens_go_to_one_expert(self, tiny_model, experts, estimator):
        """Every token's output is what that expert alone gives for it."""
        model = tiny_model(num_experts_per_tok=1, input_jitter_noise=0.0, router_estimator=estimator).train()
        model.set_experts_implementation(experts)
        block = model.model.layers[0].block_sparse_moe
        generator = torch.Generator().manual_seed(1)
        hidden = torch.randn(4, 16, 32, generator=generator).abs()
        with torch.no_grad():
            block.gate.weight.copy_(torch.tensor([-1.0, -1.0, 5.0, -1.0])[:, None].expand(4, 32))
        output = block(hidden)
        gate, up = (hidden @ block.experts.gate_up_proj[2].T).chunk(2, dim=-1)
        expected = (torch.nn.functional.silu(gate) * up) @ block.experts.down_proj[2].T
        torch.testing.assert_close(output, expected, atol=1e-6, rtol=1e-5)
