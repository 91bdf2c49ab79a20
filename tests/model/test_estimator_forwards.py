"""What the estimators compute forwards: evaluation, the gates without sampling, and the distribution of their draws."""

from __future__ import annotations

import math

import pytest
import torch

from grinmoe.research.enumeration import draw_probabilities, enumerate_outcomes, jitter_eps_keeping, outcome_gradients
from grinmoe.routing_grinmoe import RoutingNoise, route
from tests.model.test_estimators import EXACT, SAMPLING, decisions, masks

# --- evaluation, and the gate without sampling --------------------------------------------------------------------------


def rows_of_logits(kept: int | None, rows: int = 20) -> tuple[torch.Tensor, float]:
    """(T, E) logits and an eps for all of them, which is taken from the first row."""
    logits = torch.randn(rows, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return logits, math.inf if kept is None else jitter_eps_keeping(logits[0], kept)


def greedy_weights(logits: torch.Tensor, top_k: int, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and choices of evaluation from the definition, differentiable."""
    choices = logits.detach().topk(top_k).indices
    return torch.cat([draw_probabilities(row, choice[None], eps) for row, choice in zip(logits, choices)]), choices


@masks
@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("estimator", SAMPLING)
def test_evaluation_is_the_masked_softmax_and_its_derivative(estimator, top_k, kept):
    """For all alike, but that v2* halves the logits."""
    logits, eps = rows_of_logits(kept)
    upstream = torch.randn(len(logits), top_k, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    leaf, other = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    expected, choices = greedy_weights(other / 2 if estimator.endswith("star") else other, top_k, eps)
    found = route(leaf, top_k, eps, False, None, estimator)
    assert torch.equal(found.selected_experts, choices) and found.expert_gradient_scale is None
    torch.testing.assert_close(found.routing_weights, expected, rtol=EXACT, atol=EXACT)
    (found.routing_weights * upstream).sum().backward()
    (expected * upstream).sum().backward()
    torch.testing.assert_close(leaf.grad, other.grad, rtol=EXACT, atol=EXACT)


def test_evaluation_is_the_same_to_the_last_bit_for_all_that_share_it():
    logits, eps = rows_of_logits(4)
    first, *rest = (route(logits, 2, eps, False, None, name) for name in SAMPLING if name != "sparsemixer_v2_star")
    for other in rest:
        assert torch.equal(first.routing_weights, other.routing_weights)
        assert torch.equal(first.selected_experts, other.selected_experts)
    star = route(2 * logits, 2, eps, False, None, "sparsemixer_v2_star")
    assert torch.equal(first.routing_weights, star.routing_weights)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_topk_is_the_softmax_of_the_largest_logits_and_its_derivative(top_k, training):
    logits, _ = rows_of_logits(None)
    upstream = torch.randn(len(logits), top_k, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    leaf = logits.clone().requires_grad_()
    routing = route(leaf, top_k, 0.01, training, None, "topk")
    probs = logits.exp() / logits.exp().sum(-1, keepdim=True)
    order = logits.argsort(descending=True)[:, :top_k]
    assert torch.equal(routing.selected_experts, order)
    torch.testing.assert_close(routing.routing_weights, probs.gather(1, order), rtol=EXACT, atol=EXACT)
    (routing.routing_weights * upstream).sum().backward()
    expected = torch.zeros_like(logits)
    for k in range(top_k):
        one_hot = torch.nn.functional.one_hot(order[:, k], 6)
        expected += (upstream[:, k] * probs.gather(1, order)[:, k]).unsqueeze(1) * (one_hot - probs)
    torch.testing.assert_close(leaf.grad, expected, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_topk_renormalized_is_the_softmax_over_its_own_sum_and_its_derivative(top_k, training):
    """Mixtral's gating."""
    logits, _ = rows_of_logits(None)
    upstream = torch.randn(len(logits), top_k, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    results = []
    for renormalise_by_hand in (True, False):
        leaf = logits.clone().requires_grad_()
        if renormalise_by_hand:
            probs, experts = leaf.softmax(-1).topk(top_k, dim=-1)
            weights = probs / probs.sum(-1, keepdim=True)
        else:
            weights, experts, scale = route(leaf, top_k, 0.01, training, None, "topk_renormalized")
            assert scale is None
        results.append((experts, weights, torch.autograd.grad((weights * upstream).sum(), leaf)[0]))
    (experts, *expected), (found_experts, *found) = results
    assert torch.equal(found_experts, experts)
    torch.testing.assert_close(found, expected, rtol=EXACT, atol=EXACT)


def test_top_1_of_topk_is_the_gate_of_the_switch_transformer():
    """y = p_i E_i of the most probable expert i alone, and the gradient of that (Fedus et al., Eq. 1 and 2)."""
    (decision,) = decisions("mlp", 1, None, rows=1)
    leaf = decision.router_logits.clone().requires_grad_()
    probs = leaf.softmax(-1)
    expert = int(probs.argmax())
    (expected,) = torch.autograd.grad(
        decision.loss((probs[expert] * decision.expert_outputs[expert])[None]).sum(), leaf
    )
    _, gradients = outcome_gradients(decision, "topk")
    torch.testing.assert_close(gradients.router_logits[0], expected, rtol=EXACT, atol=EXACT)


# --- draws --------------------------------------------------------------------------------------------------------------

# 99.9 % quantiles of the chi-square distribution, by degrees of freedom.
CHI_SQUARE = {2: 13.816, 3: 16.266, 4: 18.467, 5: 20.515}


def chi_square(drawn: torch.Tensor, probs: torch.Tensor) -> tuple[float, float]:
    """Statistic of draws (n,) against probabilities (E,), and its critical value. What cannot be drawn must not be."""
    counts = torch.bincount(drawn, minlength=len(probs)).double()
    possible = probs > 0
    assert (counts[~possible] == 0).all()
    expected = len(drawn) * probs[possible]
    return float(((counts[possible] - expected) ** 2 / expected).sum()), CHI_SQUARE[int(possible.sum()) - 1]


@pytest.mark.parametrize("kept", [None, 4])
@pytest.mark.parametrize("estimator", SAMPLING)
def test_draws_have_the_probabilities_of_the_masked_softmax(estimator, kept):
    """The first draw, and the second one given the most frequent first. Other probabilities would be noticed."""
    (decision,) = decisions("linear", 2, kept, rows=1, seed=1)
    logits = decision.router_logits / 2 if estimator.endswith("star") else decision.router_logits
    generator = torch.Generator().manual_seed(0)
    rows = decision.router_logits.float().repeat(20_000, 1)
    experts = route(rows, 2, decision.jitter_eps, True, None, estimator, generator=generator).selected_experts
    best = int(logits.argmax())
    every = torch.arange(6)

    def probabilities(logits):
        others = every[every != best]
        later = torch.zeros(6, dtype=torch.float64)
        pairs = torch.stack([torch.full_like(others, best), others], dim=1)
        later[others] = draw_probabilities(logits, pairs, decision.jitter_eps)[:, 1]
        return draw_probabilities(logits, every[:, None], decision.jitter_eps)[:, 0], later

    drawn = experts[:, 0], experts[experts[:, 0] == best, 1]
    for draws, right, wrong in zip(drawn, probabilities(logits), probabilities(logits / 2)):
        statistic, critical = chi_square(draws, right)
        assert statistic < critical
        assert chi_square(draws, wrong)[0] > critical


@pytest.mark.parametrize(
    "estimator, threshold, third",
    [
        ("sparsemixer_v2", 0.75, 0.3333),
        ("sparsemixer_v2_printed", 0.75, 0.3333),
        ("sparsemixer_togo", 0.75, 0.3333),
        ("sparsemixer_centred", 0.75, 0.3333),
        ("sparsemixer_v2_star", 0.375, 1 / 3),
    ],
)
def test_the_factor_turns_at_its_threshold(estimator, threshold, third):
    """m = 1 above it, so with probability 1/4 (v2* 5/8); the argmax has m = 1 whatever was drawn."""
    (decision,) = decisions("linear", 2, None, rows=1)
    outcomes = enumerate_outcomes(decision, estimator)
    logits = decision.router_logits.expand(len(outcomes.experts), -1)
    halved = decision.router_logits / 2 if estimator.endswith("star") else decision.router_logits
    full_weights = draw_probabilities(halved, outcomes.experts, math.inf)
    first = outcomes.experts[:, 0]
    best = decision.router_logits.argmax()
    rest = decision.router_logits.repeat(len(first), 1).scatter(1, first[:, None], float("-inf"))
    is_argmax = torch.stack([first == best, outcomes.experts[:, 1] == rest.argmax(-1)], dim=1)
    above = math.nextafter(threshold, 1.0)
    for uniform, expected in ((0.0, third), (threshold, third), (above, 1.0), (math.nextafter(1.0, 0.0), 1.0)):
        noise = outcomes.noise._replace(uniform=torch.full_like(outcomes.noise.uniform, uniform))
        scale = route(logits, 2, math.inf, True, noise, estimator).routing_weights / full_weights
        torch.testing.assert_close(scale[~is_argmax], torch.full_like(scale[~is_argmax], expected), rtol=EXACT, atol=0)
        torch.testing.assert_close(scale[is_argmax], torch.ones_like(scale[is_argmax]), rtol=EXACT, atol=0)


def test_joint_draws_one_factor_per_token_and_has_no_rule_for_the_argmax():
    (decision,) = decisions("linear", 2, None, rows=1)
    outcomes = enumerate_outcomes(decision, "sparsemixer_joint")
    logits = decision.router_logits.expand(len(outcomes.experts), -1)
    full_weights = draw_probabilities(decision.router_logits, outcomes.experts, math.inf)
    for first, second, expected in ((0.75, 0.99, 1 / 3), (math.nextafter(0.75, 1.0), 0.0, 1.0)):
        uniform = torch.tensor([first, second], dtype=torch.float64).view(2, 1, 1).expand(2, len(logits), 1)
        noise = RoutingNoise(outcomes.noise.exponential, uniform)
        scale = route(logits, 2, math.inf, True, noise, "sparsemixer_joint").routing_weights / full_weights
        torch.testing.assert_close(scale, torch.full_like(scale, expected), rtol=EXACT, atol=0)
