"""Routing of GRIN-MoE: SparseMixer-v2 and the balance losses, as pure functions of tensors.

Source: "GRIN: GRadient-INformed MoE", arXiv:2409.12136, sections 2 and 3, and the behaviour of the released code,
which decides where the two differ (the differences are named at each function).

Shapes: T tokens, E experts, K experts per token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

# The released literal; Heun's rule has 1/3 (Algorithm 1).
_HEUN_SCALE = 0.3333
# A non-argmax draw keeps its full weight when its uniform draw exceeds this: probability 1/4 (Algorithm 1).
_HEUN_THRESHOLD = 0.75


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


def draw_routing_noise(
    router_logits: torch.Tensor, top_k: int, generator: torch.Generator | None = None
) -> RoutingNoise:
    """Draw the noise of one routing decision from `generator`, or from torch's default one on the logits' device.

    Draws are float32 whatever the logits' dtype: half-precision exponentials are too coarse and can underflow to 0.
    """
    shape = (top_k, *router_logits.shape)
    options = {"dtype": torch.float32, "device": router_logits.device}
    exponential = torch.empty(shape, **options).exponential_(generator=generator)
    uniform = torch.empty((*shape[:-1], 1), **options).uniform_(generator=generator)
    return RoutingNoise(exponential, uniform)


def sparsemixer(
    router_logits: torch.Tensor,
    top_k: int,
    jitter_eps: float,
    training: bool,
    noise: RoutingNoise | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose K experts for each token (GRIN Algorithm 3; SparseMixer-v2, Algorithm 1, in training).

    The k-th choice is made among the experts that the earlier choices left, from a fresh MaskedSoftmax over them. In
    evaluation it is the argmax and its weight is the masked probability; in training it is sampled from the masked
    probabilities, and its weight carries the Heun factor m in the forward but not in the backward. The weights are
    not renormalised: they do not sum to 1. All arithmetic is in the logits' dtype, as released.

    Args:
        router_logits: (T, E), floating point.
        top_k: K, from 1 to E.
        jitter_eps: half-width eps of the mask (the config's `router_jitter_noise`), at least 0.
        training: sample (True) or take the argmax (False).
        noise: the draws to use in training; None draws them from torch's generator. Ignored in evaluation.

    Returns:
        routing_weights (T, K) in the logits' dtype, differentiable; selected_experts (T, K) int64.

    Raises:
        ValueError: `router_logits` is not (T, E), `top_k` is not in [1, E], `jitter_eps` is negative, or `noise` does
            not have the shapes of [`RoutingNoise`].
    """
    _check_arguments(router_logits, top_k, jitter_eps, noise if training else None)
    if training and noise is None:
        noise = draw_routing_noise(router_logits, top_k)
    remaining = router_logits.detach()  # (T, E), -inf where an earlier choice took the expert
    routing_weights, selected_experts = [], []
    for k in range(top_k):
        masked_probs, dropped = masked_softmax(router_logits.detach(), remaining, jitter_eps)
        greedy = remaining.argmax(dim=-1, keepdim=True)  # (T, 1)
        if training:
            choice = _sample(remaining, dropped, noise.exponential[k])
            scale = _heun_scale(choice == masked_probs.argmax(dim=-1, keepdim=True), noise.uniform[k], masked_probs)
        else:
            choice, scale = greedy, None
        routing_weights.append(_ScoreFunctionWeight.apply(router_logits, masked_probs, choice, scale))
        selected_experts.append(choice)
        remaining = remaining.scatter(-1, choice, float("-inf"))
    return torch.cat(routing_weights, dim=-1), torch.cat(selected_experts, dim=-1)


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


def _sample(remaining: torch.Tensor, dropped: torch.Tensor, exponential: torch.Tensor) -> torch.Tensor:
    """One draw per row from the masked softmax by the Gumbel trick: -log(exponential) is Gumbel noise. (T, 1)."""
    perturbed = remaining - exponential.log()
    return perturbed.masked_fill(dropped, float("-inf")).argmax(dim=-1, keepdim=True)


def _heun_scale(is_argmax: torch.Tensor, uniform: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """m of Algorithm 1: 1 for the argmax; else 1 with probability 1/4 and 0.3333 otherwise. (T, 1)."""
    full = is_argmax | (uniform > _HEUN_THRESHOLD)
    return torch.where(full, 1.0, _HEUN_SCALE).to(like.dtype)


class _ScoreFunctionWeight(torch.autograd.Function):
    """Weight of the chosen expert, `scale * p_D`, whose backward ignores `scale`.

    dL/dz_j = g * p_D * (1[j = D] - p_j) with g = dL/d(weight): Algorithm 1's router gradient, and with no scale the
    plain derivative of the masked softmax. One kept expert (p_D = 1) gives zero.
    """

    @staticmethod
    def forward(ctx, router_logits, masked_probs, choice, scale):
        chosen_prob = masked_probs.gather(-1, choice)  # (T, 1)
        ctx.save_for_backward(masked_probs, choice, chosen_prob)
        return chosen_prob.clone() if scale is None else chosen_prob * scale

    @staticmethod
    @once_differentiable  # an estimate has no derivative of its own
    def backward(ctx, grad_weight):
        masked_probs, choice, chosen_prob = ctx.saved_tensors
        grad_choice = grad_weight * chosen_prob
        grad_logits = (-grad_choice * masked_probs).scatter_add(-1, choice, grad_choice)
        return grad_logits, None, None, None


def _check_arguments(router_logits: torch.Tensor, top_k: int, jitter_eps: float, noise: RoutingNoise | None) -> None:
    if router_logits.dim() != 2 or not router_logits.is_floating_point():
        raise ValueError(
            f"router_logits has shape {tuple(router_logits.shape)} and dtype {router_logits.dtype}; give floating-point "
            "logits of shape (tokens, experts)"
        )
    num_tokens, num_experts = router_logits.shape
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k={top_k} is not between 1 and the {num_experts} experts; change it")
    if not jitter_eps >= 0:
        raise ValueError(f"jitter_eps={jitter_eps} is negative; give 0 or more")
    if noise is not None:
        expected = (top_k, num_tokens, num_experts), (top_k, num_tokens, 1)
        found = tuple(noise.exponential.shape), tuple(noise.uniform.shape)
        if found != expected:
            raise ValueError(
                f"noise has exponential {found[0]} and uniform {found[1]}; they must be {expected[0]} and {expected[1]}"
            )


def load_balancing_loss(
    router_logits: tuple[torch.Tensor, ...],
    selected_experts: tuple[torch.Tensor, ...] | None,
    top_k: int,
    scope: str = "released",
    attention_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Balance loss, unscaled: E * sum_e f_e P_e, which is K when the load is even.

    f_e is the share of tokens sent to expert e (its sum over e is K, and it carries no gradient), P_e the mean
    probability of expert e under the plain softmax.

    * `released`: the tokens of all layers pooled, f from the plain top-k of the softmax, as in the released code.
    * `local`: per layer, f from the experts that were actually chosen; mean over layers (GRIN section 3.3).
    * `global`: as `local`, with f counted over all data-parallel ranks. P stays local, which is exact because
      gradients are averaged over ranks; ranks that share their data (tensor parallel) do not change a share.

    Args:
        router_logits: one (T, E) per layer.
        selected_experts: one (T, K) per layer; not needed for `released`.
        top_k: K.
        scope: `released`, `local` or `global`.
        attention_mask: (B, S) with B * S = T, 1 for tokens; padding is left out. None: every position counts.

    Returns:
        float32 scalar, 0 where no token counts.

    Raises:
        ValueError: an unknown scope, or a mask for another number of tokens.
    """
    if scope not in ("released", "local", "global"):
        raise ValueError(f"scope={scope!r} is unknown; choose released, local or global")
    logits = torch.stack([layer.float() for layer in router_logits])  # (L, T, E)
    probs = torch.softmax(logits, dim=-1)
    num_layers, num_tokens, num_experts = probs.shape
    valid = torch.ones(num_tokens, device=probs.device) if attention_mask is None else attention_mask
    valid = valid.reshape(-1).to(probs.device, torch.float32)  # (T,)
    if valid.shape[0] != num_tokens:
        raise ValueError(
            f"attention_mask marks {valid.shape[0]} positions, the router saw {num_tokens}; give a mask of shape "
            "(batch, sequence) for this very batch"
        )
    if scope == "released":
        chosen = probs.detach().topk(top_k, dim=-1).indices
    else:
        chosen = torch.stack([layer.to(probs.device) for layer in selected_experts])
    with torch.no_grad():
        weight = valid.repeat_interleave(chosen.shape[-1]).expand(num_layers, -1)  # (L, T * K)
        # (L, E + 1): tokens of each expert, and the number of tokens, which travels in the same collective.
        counts = torch.zeros(num_layers, num_experts + 1, device=probs.device)
        counts.scatter_add_(1, chosen.reshape(num_layers, -1), weight)
        counts[:, -1] = valid.sum()
        if scope == "global" and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(counts)
        expert_fraction = counts[:, :-1] / counts[:, -1:].clamp(min=1.0)  # (L, E)
    mean_probs = torch.einsum("lte,t->le", probs, valid) / valid.sum().clamp(min=1.0)  # (L, E)
    if scope == "released":
        expert_fraction, mean_probs = expert_fraction.mean(0, keepdim=True), mean_probs.mean(0, keepdim=True)
    return num_experts * (expert_fraction * mean_probs).sum(-1).mean()


__all__ = ["RoutingNoise", "draw_routing_noise", "load_balancing_loss", "masked_softmax", "sparsemixer"]
