"""The estimators of the router's gradient: how experts are drawn, what their weights are, and what flows back.

Source: "GRIN: GRadient-INformed MoE", arXiv:2409.12136, sections 2 and appendix A; `togo` and `joint` are derived in
docs/numerics.md. `routing_grinmoe.sparsemixer` is the way in.

Shapes: T tokens, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

# Heun's rule has 1/3 (Algorithm 1); the released code has this literal.
_RELEASED_THIRD = 0.3333


class RoutingNoise(NamedTuple):
    """The random draws of one routing decision, so that it can be replayed.

    Attributes:
        exponential: (K, T, E) unit exponentials; draw k samples argmax(z - log exponential[k]).
        uniform: (K, T, 1) uniforms in [0, 1) that choose between full and Heun-scaled weight.
        input_jitter: (T, H) factors for the MoE block's input, or None to draw them. Not used by `sparsemixer`.
    """

    exponential: torch.Tensor
    uniform: torch.Tensor
    input_jitter: torch.Tensor | None = None


class Routing(NamedTuple):
    """One routing decision.

    Attributes:
        routing_weights: (T, K), what the experts' outputs are multiplied with; its backward is the estimator.
        selected_experts: (T, K) int64.
        expert_gradient_scale: (T, K) by which the experts' own gradient is to be multiplied (the weights' gradient is
            not), or None for 1.
    """

    routing_weights: torch.Tensor
    selected_experts: torch.Tensor
    expert_gradient_scale: torch.Tensor | None = None


def masked_softmax(
    router_logits: torch.Tensor, remaining: torch.Tensor, jitter_eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """MaskedSoftmax over the remaining experts: those too far below the best get probability 0.

    The released rule keeps expert i when (top - z_i) / max(|z_i|, top) <= 2 eps, top being the best remaining logit
    and 0/0 counting as kept. (GRIN Eq. 2 has z* - z_i <= r (|z_i| + |z*|); 0.06 % of random rows differ.)

    Args:
        router_logits: (T, E) the raw logits, whose |z_i| the rule uses.
        remaining: (T, E) the same with -inf for the experts already chosen.
        jitter_eps: eps.

    Returns:
        masked_probs (T, E), summing to 1; dropped (T, E) bool, experts with probability 0.
    """
    top = remaining.amax(dim=-1, keepdim=True)
    gap = (top - router_logits) / router_logits.abs().clamp(min=top)
    # NaN (0/0) compares false: kept.
    dropped = (gap > 2 * jitter_eps) | (remaining == float("-inf"))
    return torch.softmax(remaining.masked_fill(dropped, float("-inf")), dim=-1), dropped


class _Choices(NamedTuple):
    """K choices without replacement.

    Attributes:
        probs: (K, T, E), one masked softmax per choice.
        experts: (T, K).
        is_argmax: (T, K) bool, whether a draw took the most probable expert; None where nothing is drawn.
    """

    probs: torch.Tensor
    experts: torch.Tensor
    is_argmax: torch.Tensor | None


def _choose(router_logits: torch.Tensor, top_k: int, jitter_eps: float, noise: RoutingNoise | None) -> _Choices:
    """The choices of Algorithm 3: sampled with `noise`, the argmax without."""
    router_logits = router_logits.detach()
    remaining = router_logits  # (T, E), -inf where an earlier choice took the expert
    probs: list[torch.Tensor] = []
    experts: list[torch.Tensor] = []
    is_argmax: list[torch.Tensor] = []
    for k in range(top_k):
        if k > 0:
            remaining = remaining.scatter(-1, experts[-1], float("-inf"))
        masked_probs, dropped = masked_softmax(router_logits, remaining, jitter_eps)
        if noise is None:
            choice = remaining.argmax(dim=-1, keepdim=True)  # (T, 1)
        else:
            # The Gumbel trick: -log of a unit exponential is Gumbel noise.
            perturbed = remaining - noise.exponential[k].log()
            choice = perturbed.masked_fill(dropped, float("-inf")).argmax(dim=-1, keepdim=True)
            is_argmax.append(choice == masked_probs.argmax(dim=-1, keepdim=True))
        probs.append(masked_probs)
        experts.append(choice)
    drawn = torch.cat(is_argmax, dim=-1) if is_argmax else None
    return _Choices(torch.stack(probs), torch.cat(experts, dim=-1), drawn)


def _draw_scale(
    choices: _Choices, noise: RoutingNoise | None, full_probability: float, third: float
) -> torch.Tensor | None:
    """m of each draw: 1 for the argmax; else 1 with `full_probability` and a third otherwise. (T, K); None: no draws."""
    if noise is None or choices.is_argmax is None:
        return None
    full = choices.is_argmax | (noise.uniform.squeeze(-1).t() > 1 - full_probability)
    return _one_or_third(full, third, choices.probs.dtype)


def _one_or_third(full: torch.Tensor, third: float, dtype: torch.dtype) -> torch.Tensor:
    # Filled in the final dtype: a Python number would pass through float32 first.
    return torch.full(full.shape, third, dtype=dtype, device=full.device).masked_fill(full, 1.0)


# How the contributions c_k = p_k <g, E_k> of a token's draws (T, K) become the factors of their scores.
_Credit = Callable[[torch.Tensor], torch.Tensor]


def _own(contributions: torch.Tensor) -> torch.Tensor:
    """Every draw answers for itself (the paper)."""
    return contributions


def _to_go(contributions: torch.Tensor) -> torch.Tensor:
    """A draw also answers for the later ones, among which it decides who is left: c_k + ... + c_K."""
    return contributions.flip(-1).cumsum(-1).flip(-1)


def _to_go_centred(contributions: torch.Tensor) -> torch.Tensor:
    """As `_to_go`, less the mean over the other tokens."""
    credit = _to_go(contributions)
    others = max(1, len(credit) - 1)
    return credit - (credit.sum(0, keepdim=True) - credit) / others


def _joint(contributions: torch.Tensor) -> torch.Tensor:
    """Every draw answers for the whole output."""
    return contributions.sum(-1, keepdim=True).expand_as(contributions)


def _chosen(probs: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
    """(K, T, E) and (T, K) to the chosen experts' probabilities (T, K)."""
    return probs.gather(-1, experts.t().unsqueeze(-1)).squeeze(-1).t()


class _ScoreFunctionWeights(torch.autograd.Function):
    """Weights of the chosen experts, `scale * p_D` (T, K), whose backward ignores `scale`.

    With g_k = dL/d(weight k) and c_k = g_k p_k, draw k adds credit_k (1[j = D_k] - p^(k)_j) to dL/dz_j. With each draw's
    own credit that is Algorithm 1's router gradient, and the plain derivative of the masked softmax where there is no
    scale. A draw with one kept expert (p_D = 1) adds zero.
    """

    @staticmethod
    def forward(ctx, router_logits, probs, experts, scale, credit):
        chosen_probs = _chosen(probs, experts)
        ctx.save_for_backward(probs, experts, chosen_probs)
        ctx.credit = credit
        return chosen_probs.clone() if scale is None else chosen_probs * scale

    @staticmethod
    @once_differentiable  # an estimate has no derivative of its own
    def backward(ctx, grad_weights):
        probs, experts, chosen_probs = ctx.saved_tensors
        credit = ctx.credit(grad_weights * chosen_probs)  # (T, K)
        grad_logits = -(credit.t().unsqueeze(-1) * probs).sum(0)
        return grad_logits.scatter_add(-1, experts, credit), None, None, None, None


def _weights(
    router_logits: torch.Tensor, choices: _Choices, scale: torch.Tensor | None, credit: _Credit = _own
) -> torch.Tensor:
    if scale is None:
        if not (torch.is_grad_enabled() and router_logits.requires_grad):
            return _chosen(choices.probs, choices.experts)
        credit = _own  # in evaluation the derivative of what was computed
    return _ScoreFunctionWeights.apply(router_logits, choices.probs, choices.experts, scale, credit)


def _sparsemixer_v2(router_logits, top_k: int, jitter_eps: float, noise: RoutingNoise | None) -> Routing:
    """SparseMixer-v2 as released: the experts are trained through the scaled weight m p_D."""
    choices = _choose(router_logits, top_k, jitter_eps, noise)
    scale = _draw_scale(choices, noise, 1 / 4, _RELEASED_THIRD)
    return Routing(_weights(router_logits, choices, scale), choices.experts)


def _sparsemixer_v2_printed(router_logits, top_k: int, jitter_eps: float, noise: RoutingNoise | None) -> Routing:
    """SparseMixer-v2 as Algorithm 1 prints it, y = h + detach(m h - h): the experts' gradient is not scaled by m."""
    choices = _choose(router_logits, top_k, jitter_eps, noise)
    scale = _draw_scale(choices, noise, 1 / 4, _RELEASED_THIRD)
    return Routing(_weights(router_logits, choices, scale), choices.experts, None if scale is None else 1 / scale)


def _sparsemixer_v2_star(router_logits, top_k: int, jitter_eps: float, noise: RoutingNoise | None) -> Routing:
    """SparseMixer-v2* (Algorithm 2): logits halved, m = 1 with probability 5/8, y = 2h + detach(m h - 2h).

    The probability inside of the weight is differentiated too (Eq. 4). The factor 2 undoes the halving for the router;
    the experts' gradient keeps it. The mask does not depend on the scale of the logits.
    """
    halved = router_logits / 2
    choices = _choose(halved, top_k, jitter_eps, noise)
    scale = _draw_scale(choices, noise, 5 / 8, 1 / 3)
    weights = _weights(halved, choices, scale)
    if scale is None:
        return Routing(weights, choices.experts)
    return Routing(scale_gradient(weights, 2.0), choices.experts, 2 / scale)


def _sparsemixer_togo(router_logits, top_k: int, jitter_eps: float, noise: RoutingNoise | None) -> Routing:
    """The forward of SparseMixer-v2, and a backward that is exact for a linear loss at any K and mask.

    The first choice decides what the later ones can be, so its score takes their contributions as well.
    """
    choices = _choose(router_logits, top_k, jitter_eps, noise)
    scale = _draw_scale(choices, noise, 1 / 4, _RELEASED_THIRD)
    return Routing(_weights(router_logits, choices, scale, _to_go), choices.experts)


def _sparsemixer_joint(router_logits, top_k: int, jitter_eps: float, noise: RoutingNoise | None) -> Routing:
    """One m per token, 1 with probability 1/4 and 1/3 otherwise, for every draw and without an exception for the argmax.

    The loss is integrated by Heun's rule along the ray to the token's output, and every draw's score takes all of it:
    unbiased for Eq. 7 up to a cubic loss, at any K and mask. `noise.uniform[0]` decides m.
    """
    choices = _choose(router_logits, top_k, jitter_eps, noise)
    scale = None
    if noise is not None:
        scale = _one_or_third(noise.uniform[0] > 0.75, 1 / 3, choices.probs.dtype).expand_as(choices.experts)
    return Routing(_weights(router_logits, choices, scale, _joint), choices.experts)


def _sparsemixer_unscaled(router_logits, top_k: int, jitter_eps: float, noise: RoutingNoise | None) -> Routing:
    """As `togo` with m = 1: exact for a linear loss, and training sees experts' outputs as evaluation does, unshrunk.

    What Heun's rule corrects beyond first order is given up for that.
    """
    choices = _choose(router_logits, top_k, jitter_eps, noise)
    scale = None if noise is None else torch.ones_like(choices.experts, dtype=choices.probs.dtype)
    return Routing(_weights(router_logits, choices, scale, _to_go), choices.experts)


def _sparsemixer_centred(router_logits, top_k: int, jitter_eps: float, noise: RoutingNoise | None) -> Routing:
    """As `togo`, with a baseline: from a draw's credit the mean of the other tokens' is subtracted.

    The score's expectation is zero, so what does not depend on the draw changes the variance only. (Within one block that
    is so; through attention of later layers the others' credit depends on this token's draw a little.)
    """
    choices = _choose(router_logits, top_k, jitter_eps, noise)
    scale = _draw_scale(choices, noise, 1 / 4, _RELEASED_THIRD)
    return Routing(_weights(router_logits, choices, scale, _to_go_centred), choices.experts)


def _topk(router_logits, top_k: int, jitter_eps: float, noise: RoutingNoise | None) -> Routing:
    """The gating of GShard, and with K = 1 of the Switch Transformer: no mask, no sampling, the gradient of the gate.

    Weights are the plain softmax over all experts, not renormalised over the chosen ones: with K = 1 they would be
    constant.
    """
    experts = router_logits.detach().topk(top_k, dim=-1).indices
    return Routing(torch.softmax(router_logits, dim=-1).gather(-1, experts), experts)


def _topk_renormalized(router_logits, top_k: int, jitter_eps: float, noise: RoutingNoise | None) -> Routing:
    """The gating of Mixtral: as `topk`, with the weights of the chosen experts renormalised to sum to 1."""
    experts = router_logits.detach().topk(top_k, dim=-1).indices
    # Of the chosen logits alone: the same as all experts' softmax over its own sum.
    return Routing(torch.softmax(router_logits.gather(-1, experts), dim=-1), experts)


ESTIMATORS: dict[str, Callable[..., Routing]] = {
    "sparsemixer_v2": _sparsemixer_v2,
    "sparsemixer_v2_printed": _sparsemixer_v2_printed,
    "sparsemixer_v2_star": _sparsemixer_v2_star,
    "sparsemixer_togo": _sparsemixer_togo,
    "sparsemixer_joint": _sparsemixer_joint,
    "sparsemixer_unscaled": _sparsemixer_unscaled,
    "sparsemixer_centred": _sparsemixer_centred,
    "topk": _topk,
    "topk_renormalized": _topk_renormalized,
}
# They take no draws, and route in training as in evaluation.
WITHOUT_DRAWS = ("topk", "topk_renormalized")


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, scale):
        ctx.scale = scale if isinstance(scale, float) else None
        ctx.save_for_backward(*([] if ctx.scale is not None else [scale]))
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, gradient):
        (scale,) = ctx.saved_tensors or (ctx.scale,)
        return gradient * scale, None


def scale_gradient(tensor: torch.Tensor, scale: torch.Tensor | float) -> torch.Tensor:
    """`tensor` itself, whose gradient is multiplied by `scale` (broadcast over it)."""
    return _ScaleGradient.apply(tensor, scale)


__all__ = ["ESTIMATORS", "WITHOUT_DRAWS", "Routing", "RoutingNoise", "masked_softmax", "scale_gradient"]
