"""Every outcome of one routing decision: what an estimator of the router's gradient gives on average, and what it should.

In training a token's experts and their Heun factors m are drawn. Here nothing is: `enumerate_outcomes` makes the noise
that forces each outcome of one token's decision, and its probability, so that an estimator's mean and variance are sums.
`exact_gradients` differentiates the expected loss itself, straight from its definition and without the estimators' code.

The loss is f(y) of y = sum_k w_k E_k, and its expectation is over the draws D = (D_1, ..., D_K), without replacement:
P(D) = prod_k p_k, where p_k is the masked softmax over what earlier draws left. GRIN, arXiv:2409.12136: Eq. 4 is the
derivative of sum_D P(D) f(y_D) in full; Eq. 7 only that through P, with y_D held fixed. Where the mask lies is not
differentiated in either.

Shapes: E experts, K draws, H width of the experts' outputs, S sequences of draws, N outcomes (sequences times factors).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch

from ..routing_grinmoe import ESTIMATORS, RoutingNoise, route, scale_gradient

# f, for many outputs at once: (N, H) to (N,).
Loss = Callable[[torch.Tensor], torch.Tensor]

LOSSES = ("linear", "quadratic", "cubic", "mlp")


class Decision(NamedTuple):
    """One token's routing decision and what hangs on it.

    Attributes:
        router_logits: (E,) float64.
        expert_outputs: (E, H) float64, E_i for this token.
        loss: f.
        top_k: K.
        jitter_eps: half-width of the mask; infinite keeps every expert.
    """

    router_logits: torch.Tensor
    expert_outputs: torch.Tensor
    loss: Loss
    top_k: int
    jitter_eps: float


class Gradients(NamedTuple):
    """Of a loss by the router's logits (..., E) and by the experts' outputs (..., E, H)."""

    router_logits: torch.Tensor
    expert_outputs: torch.Tensor


class Outcomes(NamedTuple):
    """All outcomes of a decision: probability (N,), the experts they choose (N, K), and the noise that forces them."""

    probability: torch.Tensor
    experts: torch.Tensor
    noise: RoutingNoise | None


def own_objective(estimator: str) -> tuple[int, bool]:
    """The equation that an estimator estimates, 4 or 7, and whether its logits are halved."""
    star = estimator == "sparsemixer_v2_star"
    return (4 if star else 7), star


def sequences(num_experts: int, top_k: int) -> torch.Tensor:
    """All ways to draw K of E experts in order, (S, K)."""
    return torch.tensor(list(itertools.permutations(range(num_experts), top_k)))


def draw_probabilities(router_logits: torch.Tensor, orders: torch.Tensor, jitter_eps: float) -> torch.Tensor:
    """p_k of every draw of every sequence, given the sequence's earlier draws.

    Written from the definition, for one token, and differentiable; the mask is the released one (docs/numerics.md).

    Args:
        router_logits: (E,).
        orders: (S, K).
        jitter_eps: eps.

    Returns:
        (S, K).
    """
    closed = torch.zeros(orders.shape[0], router_logits.shape[0], dtype=torch.bool)
    probabilities = []
    for choice in orders.unbind(1):
        open_logits = router_logits.masked_fill(closed, float("-inf"))  # (S, E)
        best = open_logits.detach().amax(-1, keepdim=True)
        size = torch.maximum(router_logits.detach().abs(), best)
        far = (best - router_logits.detach()) > 2 * jitter_eps * size
        probs = torch.softmax(open_logits.masked_fill(far, float("-inf")), dim=-1)
        probabilities.append(probs.gather(1, choice.unsqueeze(1)).squeeze(1))
        closed = closed.scatter(1, choice.unsqueeze(1), True)
    return torch.stack(probabilities, dim=1)


def exact_gradients(decision: Decision, equation: int = 7, halved: bool = False) -> Gradients:
    """The gradient to be estimated: Eq. 4 or Eq. 7 for the logits, the expected loss' own derivative for the experts.

    Args:
        decision: one token's.
        equation: 4 or 7.
        halved: sample and weight with the softmax of half the logits (SparseMixer-v2*).
    """
    if equation not in (4, 7):
        raise ValueError(f"equation={equation} is not one of the objectives; choose 4 or 7")
    logits = decision.router_logits.detach().requires_grad_()
    outputs = decision.expert_outputs.detach().requires_grad_()
    orders = sequences(len(logits), decision.top_k)
    probs = draw_probabilities(logits / 2 if halved else logits, orders, decision.jitter_eps)
    weights = probs if equation == 4 else probs.detach()
    losses = decision.loss((weights.unsqueeze(-1) * outputs[orders]).sum(1))  # (S,)
    return Gradients(*torch.autograd.grad((probs.prod(1) * losses).sum(), (logits, outputs)))


def enumerate_outcomes(decision: Decision, estimator: str) -> Outcomes:
    """All outcomes that an estimator can draw, with the noise that makes it draw them, one per row.

    Sequences of probability 0 are left out. A factor is listed also where it is without effect (the argmax of a draw).
    """
    logits = decision.router_logits.detach()
    num_experts, top_k = len(logits), decision.top_k
    if not ESTIMATORS[estimator].draws:
        return Outcomes(logits.new_ones(1), logits.topk(top_k).indices.unsqueeze(0), None)
    _, halved = own_objective(estimator)
    orders = sequences(num_experts, top_k)
    order_probability = draw_probabilities(logits / 2 if halved else logits, orders, decision.jitter_eps).prod(1)
    possible = order_probability > 0
    full, full_probability = _heun_patterns(estimator, top_k)
    patterns = len(full)
    orders = orders[possible].repeat_interleave(patterns, dim=0)  # (N, K)
    full = full.repeat(int(possible.sum()), 1)
    probability = torch.outer(order_probability[possible], full_probability.to(logits.dtype)).flatten()
    # -log of the smallest exponential is 708: more than logits of ordinary size can differ by.
    exponential = logits.new_ones(top_k, len(orders), num_experts)
    exponential.scatter_(2, orders.t().unsqueeze(-1), torch.finfo(logits.dtype).tiny)
    uniform = full.t().unsqueeze(-1).to(logits.dtype) * (1 - torch.finfo(logits.dtype).eps)
    return Outcomes(probability, orders, RoutingNoise(exponential, uniform))


def _heun_patterns(estimator: str, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which draws have m = 1, (M, K) bool, and the probability of each pattern (M,)."""
    chance = ESTIMATORS[estimator].full_probability
    if ESTIMATORS[estimator].shared_scale:
        return torch.tensor([[False] * top_k, [True] * top_k]), torch.tensor([1 - chance, chance])
    full = torch.tensor(list(itertools.product([False, True], repeat=top_k)))
    # The chances are binary fractions, so that their products are exact in float32 too.
    probability = torch.where(full, chance, 1 - chance).prod(1)
    return full[probability > 0], probability[probability > 0]


def outcome_gradients(decision: Decision, estimator: str) -> tuple[Outcomes, Gradients]:
    """What an estimator gives in every outcome: gradients (N, E) and (N, E, H), through `route` and autograd alone.

    Raises:
        ValueError: `sparsemixer_centred`, whose gradient for a token takes in the other rows.
    """
    if estimator == "sparsemixer_centred":
        raise ValueError(
            "estimator='sparsemixer_centred' takes its baseline from the other rows, which are other outcomes of the same "
            "token here; enumerate 'sparsemixer_togo', which has the same mean"
        )
    outcomes = enumerate_outcomes(decision, estimator)
    rows = len(outcomes.probability)
    logits = decision.router_logits.detach().repeat(rows, 1).requires_grad_()
    outputs = decision.expert_outputs.detach().repeat(rows, 1, 1).requires_grad_()
    routing = route(logits, decision.top_k, decision.jitter_eps, True, outcomes.noise, estimator)
    assert torch.equal(routing.selected_experts, outcomes.experts), "the noise did not force the intended draws"
    chosen = outputs[torch.arange(rows).unsqueeze(1), routing.selected_experts]  # (N, K, H)
    if routing.expert_gradient_scale is not None:
        chosen = scale_gradient(chosen, routing.expert_gradient_scale.unsqueeze(-1))
    losses = decision.loss((routing.routing_weights.unsqueeze(-1) * chosen).sum(1))
    return outcomes, Gradients(*torch.autograd.grad(losses.sum(), (logits, outputs)))


def moments(probability: torch.Tensor, gradients: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Mean (...) and total variance (the trace of the covariance) of gradients (N, ...) that come with `probability`."""
    mean = torch.tensordot(probability, gradients, dims=1)
    squared_distance = (gradients - mean).flatten(1).square().sum(1)
    return mean, float(probability @ squared_distance)


def cosine_and_error(found: torch.Tensor, exact: torch.Tensor) -> tuple[float, float]:
    """Cosine of two gradients, and |found - exact| / |exact|."""
    found, exact = found.flatten(), exact.flatten()
    cosine = found @ exact / (found.norm() * exact.norm())
    return float(cosine), float((found - exact).norm() / exact.norm())


def jitter_eps_keeping(router_logits: torch.Tensor, kept: int) -> float:
    """An eps with which the first draw's mask keeps `kept` of the experts of one row (E,), half-way to the next number."""
    best = router_logits.max()
    gaps = ((best - router_logits) / torch.maximum(router_logits.abs(), best)).sort().values
    # The mask compares gaps with 2 eps.
    return float("inf") if kept == len(gaps) else float(gaps[kept - 1] + gaps[kept]) / 4


def random_loss(kind: str, width: int, generator: torch.Generator) -> Loss:
    """A random f of outputs (N, H), of a kind in `LOSSES`. Polynomials have all terms up to their degree."""

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    if kind not in LOSSES:
        raise ValueError(f"kind={kind!r} is unknown; choose one of {', '.join(LOSSES)}")
    if kind == "mlp":
        into, bias, out = draw(width, 16), draw(16), draw(16)
        return lambda y: torch.tanh(y @ into + bias) @ out
    constant, linear, quadratic, cubic = draw(1), draw(width), draw(width, width), draw(width, width, width)
    terms: list[Loss] = [
        lambda y: constant + y @ linear,
        lambda y: torch.einsum("ni,nj,ij->n", y, y, quadratic),
        lambda y: torch.einsum("ni,nj,nk,ijk->n", y, y, y, cubic),
    ]
    degree = LOSSES.index(kind) + 1
    return lambda y: functools.reduce(torch.add, (term(y) for term in terms[:degree]))


def random_decision(
    kind: str,
    top_k: int,
    generator: torch.Generator,
    kept: int | None = None,
    num_experts: int = 6,
    width: int = 5,
) -> Decision:
    """A random decision with standard normal logits and experts' outputs; the first draw's mask keeps `kept` experts."""
    logits = torch.randn(num_experts, generator=generator, dtype=torch.float64)
    outputs = torch.randn(num_experts, width, generator=generator, dtype=torch.float64)
    eps = float("inf") if kept is None else jitter_eps_keeping(logits, kept)
    return Decision(logits, outputs, random_loss(kind, width, generator), top_k, eps)
