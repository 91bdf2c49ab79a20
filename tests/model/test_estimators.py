"""The estimators of the router's gradient: every outcome enumerated, in float64, so that exact means 1e-12.

What is exact here is derived in docs/numerics.md; where an estimator is biased, its bias is measured and not hidden.
E = 6 experts unless a test says otherwise; `kept` is how many of them the first draw's mask leaves (None: no mask).
"""

from __future__ import annotations

import dataclasses
import math
import statistics

import pytest
import torch

import grinmoe.routing_grinmoe as estimators
from grinmoe.kernels import triton_router
from grinmoe.research.enumeration import (
    Decision,
    cosine_and_error,
    draw_probabilities,
    enumerate_outcomes,
    exact_gradients,
    moments,
    outcome_gradients,
    own_objective,
    random_decision,
    random_loss,
)
from grinmoe.routing_grinmoe import ESTIMATORS, RoutingNoise, route
from tests import ROOT

EXACT = 1e-12
SAMPLING = [name for name in ESTIMATORS if ESTIMATORS[name].draws]
# A token's gradient is its own for all but one.
ENUMERATED = [name for name in ESTIMATORS if name != "sparsemixer_centred"]
TO_GO = ["sparsemixer_togo", "sparsemixer_unscaled"]

masks = pytest.mark.parametrize("kept", [None, 4, 3, 2], ids=lambda kept: f"kept={kept or 'all'}")


def decisions(loss: str, top_k: int, kept: int | None, rows: int = 3, seed: int = 0) -> list[Decision]:
    generator = torch.Generator().manual_seed(seed)
    return [random_decision(loss, top_k, generator, kept) for _ in range(rows)]


def of_router(decision: Decision, estimator: str, equation: int | None = None) -> tuple[float, float]:
    """Cosine and relative error of an estimator's mean router gradient against Eq. 4 or 7, by default its own."""
    own, halved = own_objective(estimator)
    outcomes, gradients = outcome_gradients(decision, estimator)
    mean, _ = moments(outcomes.probability, gradients.router_logits)
    return cosine_and_error(mean, exact_gradients(decision, equation or own, halved).router_logits)


def of_experts(decision: Decision, estimator: str) -> tuple[float, float]:
    """The same for the experts' outputs, against the derivative of the expected loss."""
    outcomes, gradients = outcome_gradients(decision, estimator)
    mean, _ = moments(outcomes.probability, gradients.expert_outputs)
    exact = exact_gradients(decision, halved=own_objective(estimator)[1])
    return cosine_and_error(mean, exact.expert_outputs)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The tensors are tiny, and threads that wait for each other are slow on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def without_argmax_rule(monkeypatch):
    """Heun's rule for every draw, the argmax too, and with its third instead of the released literal."""
    choose = estimators._choose

    def no_argmax(*arguments):
        choices = choose(*arguments)
        return choices._replace(is_argmax=torch.zeros_like(choices.is_argmax))

    monkeypatch.setattr(estimators, "_choose", no_argmax)
    for name, spec in ESTIMATORS.items():
        monkeypatch.setitem(estimators.ESTIMATORS, name, dataclasses.replace(spec, third=1 / 3))


class TestEnumeration:
    """The measuring device itself."""

    @masks
    @pytest.mark.parametrize("top_k", [1, 2, 3])
    @pytest.mark.parametrize("estimator", ESTIMATORS)
    def test_probabilities_sum_to_one(self, estimator, top_k, kept):
        (decision,) = decisions("linear", top_k, kept, rows=1)
        outcomes = enumerate_outcomes(decision, estimator)
        assert (outcomes.probability > 0).all()
        assert outcomes.probability.sum().item() == pytest.approx(1.0, abs=EXACT)

    def test_one_draw_has_as_many_outcomes_as_the_mask_keeps(self):
        (decision,) = decisions("linear", 1, 3, rows=1)
        experts = enumerate_outcomes(decision, "sparsemixer_v2").experts
        assert sorted(set(experts.flatten().tolist())) == sorted(decision.router_logits.topk(3).indices.tolist())
        assert len(experts) == 3 * 2, "each with m = 1 and with m = 1/3"

    def test_the_exact_gradients_are_derivatives(self):
        """Eq. 4 against finite differences of the expected loss; so are the experts' gradients."""
        (decision,) = decisions("mlp", 2, None, rows=1)

        def expected_loss(logits, outputs):
            orders = torch.cartesian_prod(torch.arange(6), torch.arange(6))
            orders = orders[orders[:, 0] != orders[:, 1]]
            probs = torch.stack([logits.softmax(-1)[i] for i in orders[:, 0]])
            later = torch.stack([(logits[j] - _log_sum_without(logits, i)).exp() for i, j in orders.tolist()])
            y = probs.unsqueeze(1) * outputs[orders[:, 0]] + later.unsqueeze(1) * outputs[orders[:, 1]]
            return (probs * later * decision.loss(y)).sum()

        exact = exact_gradients(decision, equation=4)
        for i in range(6):
            step = torch.zeros(6, dtype=torch.float64)
            step[i] = 1e-5
            up, down = (expected_loss(decision.router_logits + s, decision.expert_outputs) for s in (step, -step))
            assert exact.router_logits[i].item() == pytest.approx(((up - down) / 2e-5).item(), abs=1e-8)
            step = step.unsqueeze(1).expand(6, 5)
            up, down = (expected_loss(decision.router_logits, decision.expert_outputs + s) for s in (step, -step))
            assert exact.expert_outputs[i].sum().item() == pytest.approx(((up - down) / 2e-5).item(), abs=1e-8)

    def test_eq_7_is_eq_4_without_the_derivative_of_the_weights(self):
        """For a loss that is the same everywhere only the weights' own derivative could be left, and both are zero."""
        (decision,) = decisions("cubic", 2, 3, rows=1)
        constant = decision._replace(loss=lambda y: y.sum(-1) * 0 + 3.0)
        assert exact_gradients(constant, 7).router_logits.abs().max() < EXACT
        assert exact_gradients(constant, 4).router_logits.abs().max() < EXACT
        difference = exact_gradients(decision, 4).router_logits - exact_gradients(decision, 7).router_logits
        assert difference.abs().max() > 1e-3

    def test_unknown_objectives_and_losses_are_refused(self):
        (decision,) = decisions("linear", 1, None, rows=1)
        with pytest.raises(ValueError, match="equation=5"):
            exact_gradients(decision, 5)
        with pytest.raises(ValueError, match="kind='quartic'"):
            random_loss("quartic", 5, torch.Generator())
        with pytest.raises(ValueError, match="sparsemixer_centred"):
            outcome_gradients(decision, "sparsemixer_centred")


def _log_sum_without(logits: torch.Tensor, expert: int) -> torch.Tensor:
    return torch.cat([logits[:expert], logits[expert + 1 :]]).logsumexp(0)


class TestTopOne:
    @masks
    @pytest.mark.parametrize("loss", ["linear", "quadratic", "cubic"])
    @pytest.mark.parametrize("estimator", ["sparsemixer_v2", "sparsemixer_v2_printed", "sparsemixer_v2_star"])
    def test_heun_for_every_draw_is_exact_up_to_a_cubic(self, without_argmax_rule, estimator, loss, kept):
        """v2 for Eq. 7, and v2* for Eq. 4."""
        for decision in decisions(loss, 1, kept):
            assert of_router(decision, estimator)[1] < EXACT

    def test_and_not_beyond(self, without_argmax_rule):
        for estimator in ("sparsemixer_v2", "sparsemixer_v2_star"):
            assert all(of_router(decision, estimator)[1] > 1e-4 for decision in decisions("mlp", 1, None))

    @masks
    @pytest.mark.parametrize("estimator", [name for name in ENUMERATED if ESTIMATORS[name].draws])
    def test_the_argmax_rule_keeps_a_linear_loss_exact(self, estimator, kept):
        for decision in decisions("linear", 1, kept):
            assert of_router(decision, estimator)[1] < EXACT

    @pytest.mark.parametrize(
        "estimator, cosines", [("sparsemixer_v2", (0.9, 0.98)), ("sparsemixer_v2_star", (0.98, 0.9999))]
    )
    def test_the_argmax_rule_biases_a_cubic_loss(self, estimator, cosines):
        results = [of_router(decision, estimator) for decision in decisions("cubic", 1, None, rows=50)]
        low, high = cosines
        assert low < statistics.fmean(cosine for cosine, _ in results) < high
        assert statistics.median(error for _, error in results) > 0.1

    @masks
    def test_v2_is_one_half_of_eq_4_for_a_linear_loss(self, kept):
        for decision in decisions("linear", 1, kept):
            outcomes, gradients = outcome_gradients(decision, "sparsemixer_v2")
            mean, _ = moments(outcomes.probability, gradients.router_logits)
            exact = exact_gradients(decision, equation=4).router_logits
            assert cosine_and_error(2 * mean, exact)[1] < EXACT

    def test_togo_is_v2(self):
        for decision in decisions("mlp", 1, 3):
            (_, one), (_, other) = (
                outcome_gradients(decision, name) for name in ("sparsemixer_v2", "sparsemixer_togo")
            )
            assert torch.equal(one.router_logits, other.router_logits)
            assert torch.equal(one.expert_outputs, other.expert_outputs)


class TestMoreThanOne:
    @masks
    @pytest.mark.parametrize("top_k", [1, 2, 3])
    @pytest.mark.parametrize("loss", ["linear", "quadratic", "cubic"])
    def test_joint_is_exact_up_to_a_cubic(self, loss, top_k, kept):
        for decision in decisions(loss, top_k, kept, rows=2):
            assert of_router(decision, "sparsemixer_joint")[1] < EXACT

    @masks
    @pytest.mark.parametrize("top_k", [2, 3])
    @pytest.mark.parametrize("estimator", TO_GO)
    def test_togo_is_exact_for_a_linear_loss(self, estimator, top_k, kept):
        for decision in decisions("linear", top_k, kept, rows=2):
            assert of_router(decision, estimator)[1] < EXACT

    @pytest.mark.parametrize(
        "estimator, kept, cosines, errors",
        [
            ("sparsemixer_v2", None, (0.95, 0.995), (0.2, 0.5)),
            ("sparsemixer_v2", 3, (0.6, 0.9), (0.6, 1.0)),
            ("sparsemixer_v2", 2, (-0.5, 0.1), (1.5, 2.2)),
            ("sparsemixer_v2_star", None, (0.99, 0.9999), (0.03, 0.2)),
            ("sparsemixer_v2_star", 3, (0.95, 0.999), (0.1, 0.4)),
            ("sparsemixer_v2_star", 2, (0.2, 0.6), (1.5, 4.0)),
        ],
    )
    def test_the_papers_estimators_are_biased_at_top_2_even_for_a_linear_loss(self, estimator, kept, cosines, errors):
        """The cross terms are missing: the first draw also decides what the second can be.

        With two candidates v2's mean points elsewhere altogether.
        """
        results = [of_router(decision, estimator) for decision in decisions("linear", 2, kept, rows=50)]
        assert all(error > 1e-3 for _, error in results)
        assert cosines[0] < statistics.fmean(cosine for cosine, _ in results) < cosines[1]
        assert errors[0] < statistics.median(error for _, error in results) < errors[1]

    def test_togo_and_joint_are_biased_where_they_must_be(self):
        """Beyond a linear loss, and beyond a cubic one."""
        for estimator in TO_GO:
            assert all(of_router(decision, estimator)[1] > 1e-2 for decision in decisions("cubic", 2, None))
        assert all(of_router(decision, "sparsemixer_joint")[1] > 1e-3 for decision in decisions("mlp", 2, None))

    @masks
    def test_togo_has_v2s_forward(self, kept):
        (decision,) = decisions("linear", 2, kept, rows=1)
        noise = enumerate_outcomes(decision, "sparsemixer_v2").noise
        logits = decision.router_logits.expand(noise.exponential.shape[1], -1)
        v2, togo = (
            route(logits, 2, decision.jitter_eps, True, noise, name) for name in ("sparsemixer_v2", "sparsemixer_togo")
        )
        assert torch.equal(v2.routing_weights, togo.routing_weights)
        assert torch.equal(v2.selected_experts, togo.selected_experts)
        assert v2.expert_gradient_scale is None and togo.expert_gradient_scale is None

    @pytest.mark.parametrize("top_k", [1, 2])
    def test_a_baseline_from_another_token_leaves_togos_mean(self, top_k):
        """Whatever the other token drew: all outcomes of the first beside one outcome of the second."""
        first, second = decisions("mlp", top_k, 4, rows=2)
        outcomes, togo = outcome_gradients(first, "sparsemixer_togo")
        beside = enumerate_outcomes(second._replace(jitter_eps=first.jitter_eps), "sparsemixer_togo")
        for other in (0, len(beside.probability) - 1):
            pairs = [
                RoutingNoise(
                    *(torch.stack([a[:, row], b[:, other]], 1) for a, b in zip(outcomes.noise[:2], beside.noise))
                )
                for row in range(len(outcomes.probability))
            ]
            found = torch.stack([self.centred(first, second, noise) for noise in pairs])
            assert not torch.allclose(found, togo.router_logits, rtol=1e-3), "the baseline is there"
            assert found.sum(-1).abs().max() < EXACT
            means = [moments(outcomes.probability, gradients)[0] for gradients in (found, togo.router_logits)]
            assert cosine_and_error(*means)[1] < EXACT

    def centred(self, first: Decision, second: Decision, noise: RoutingNoise) -> torch.Tensor:
        """The first token's gradient (E,) where the two are one batch."""
        logits = torch.stack([first.router_logits, second.router_logits]).requires_grad_()
        weights, experts, _ = route(logits, first.top_k, first.jitter_eps, True, noise, "sparsemixer_centred")
        outputs = torch.stack([first.expert_outputs, second.expert_outputs])
        y = (weights.unsqueeze(-1) * outputs.take_along_dim(experts.unsqueeze(-1), 1)).sum(1)
        (gradient,) = torch.autograd.grad(first.loss(y[:1]).sum() + second.loss(y[1:]).sum(), logits)
        return gradient[0]

    def test_the_baseline_is_the_mean_of_the_other_tokens_credit(self):
        contributions = torch.tensor([[1.0, 2.0], [3.0, 4.0], [8.0, 0.0]])  # to go: (3, 2), (7, 4), (8, 0)
        expected = torch.tensor([[3 - 7.5, 2 - 2.0], [7 - 5.5, 4 - 1.0], [8 - 5.0, 0 - 3.0]])
        assert torch.equal(estimators.centred_credit_to_go(contributions), expected)

    def test_without_another_token_there_is_no_baseline(self):
        (decision,) = decisions("mlp", 2, None, rows=1)
        noise = enumerate_outcomes(decision, "sparsemixer_togo").noise
        one = RoutingNoise(*(tensor[:, :1] for tensor in noise[:2]))
        leaf = decision.router_logits[None].clone().requires_grad_()
        gradients = []
        for estimator in ("sparsemixer_togo", "sparsemixer_centred"):
            weights = route(leaf, 2, math.inf, True, one, estimator).routing_weights
            gradients.append(torch.autograd.grad((weights**2).sum(), leaf)[0])
        torch.testing.assert_close(*gradients, rtol=EXACT, atol=EXACT)

    @masks
    @pytest.mark.parametrize("top_k", [1, 2, 3])
    def test_unscaled_weights_are_the_probabilities(self, top_k, kept):
        (decision,) = decisions("linear", top_k, kept, rows=1)
        outcomes = enumerate_outcomes(decision, "sparsemixer_unscaled")
        logits = decision.router_logits.expand(len(outcomes.experts), -1)
        noise = outcomes.noise._replace(uniform=torch.zeros_like(outcomes.noise.uniform))
        weights = route(logits, top_k, decision.jitter_eps, True, noise, "sparsemixer_unscaled").routing_weights
        expected = draw_probabilities(decision.router_logits, outcomes.experts, decision.jitter_eps)
        torch.testing.assert_close(weights, expected, rtol=EXACT, atol=EXACT)


@masks
@pytest.mark.parametrize("top_k", [1, 2, 3, 6])
@pytest.mark.parametrize("estimator", ENUMERATED)
def test_the_routers_gradient_sums_to_zero_in_every_outcome(estimator, top_k, kept):
    num_experts = 4 if top_k == 6 else 6  # all 46,080 outcomes of 6 draws from 6 would take long
    generator = torch.Generator().manual_seed(3)
    kept = kept and min(kept, num_experts - 1)
    decision = random_decision("mlp", min(top_k, num_experts), generator, kept, num_experts)
    _, gradients = outcome_gradients(decision, estimator)
    assert gradients.router_logits.sum(-1).abs().max() < EXACT * (1 + gradients.router_logits.abs().max())


class TestExpertsGradient:
    @masks
    @pytest.mark.parametrize("top_k", [1, 2])
    def test_printed_and_released_differ_in_it_alone(self, top_k, kept):
        """In every outcome the router's gradients are the same, and the released experts' is the printed one times m."""
        (decision,) = decisions("mlp", top_k, kept, rows=1)
        outcomes, released = outcome_gradients(decision, "sparsemixer_v2")
        _, printed = outcome_gradients(decision, "sparsemixer_v2_printed")
        assert torch.equal(released.router_logits, printed.router_logits)
        scale = torch.ones_like(released.expert_outputs)
        for row, (choices, uniform) in enumerate(zip(outcomes.experts, outcomes.noise.uniform.squeeze(-1).t())):
            left = decision.router_logits.clone()
            for expert, draw in zip(choices, uniform):
                if expert != left.argmax() and draw < 0.75:
                    scale[row, expert] = 0.3333
                left[expert] = float("-inf")
        torch.testing.assert_close(printed.expert_outputs * scale, released.expert_outputs, rtol=EXACT, atol=EXACT)
        if kept != 2 or top_k == 1:
            assert not torch.allclose(printed.expert_outputs, released.expert_outputs, rtol=1e-3)

    @masks
    @pytest.mark.parametrize("top_k", [1, 2])
    def test_against_the_expected_losss_own_derivative(self, top_k, kept):
        """For a linear loss: printed is exact, v2* twice that and joint half of it; the released one is turned a little."""
        for decision in decisions("linear", top_k, kept):
            assert of_experts(decision, "sparsemixer_v2_printed")[1] < EXACT
            assert of_experts(decision, "sparsemixer_v2_star") == pytest.approx((1.0, 1.0), abs=EXACT)
            assert of_experts(decision, "sparsemixer_joint") == pytest.approx((1.0, 0.5), abs=EXACT)
            assert 0.8 < of_experts(decision, "sparsemixer_v2")[0] < 1 - 1e-6

    @masks
    @pytest.mark.parametrize("top_k", [1, 2])
    def test_unscaled_is_exact_for_any_loss(self, top_k, kept):
        """It evaluates the loss where the loss is."""
        for decision in decisions("mlp", top_k, kept):
            assert of_experts(decision, "sparsemixer_unscaled")[1] < EXACT


def test_documented_estimators_are_those_of_the_specs():
    lines = (ROOT / "docs" / "numerics.md").read_text(encoding="utf-8").splitlines()
    table = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in lines
        if line.startswith(("| `sparse", "| `topk"))
    ]
    documented = {cells[0].strip("`"): (cells[1], cells[5]) for cells in table}
    assert documented == {name: (spec.source, spec.exact_for) for name, spec in ESTIMATORS.items()}


def test_estimators_with_a_kernel_have_their_credit_in_the_kernel():
    assert {name for name, spec in ESTIMATORS.items() if spec.kernel} == {
        name for name, spec in ESTIMATORS.items() if spec.draws and spec.credit in triton_router._CREDITS
    }
