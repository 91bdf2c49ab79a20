"""Routing of GRIN-MoE as functions of tensors: sparsemixer, its noise and its checks, capacity, the balance loss.

Source: "GRIN: GRadient-INformed MoE", arXiv:2409.12136, sections 2 and 3, and the behaviour of the released code,
which decides where the two differ (the differences are named at each function).

Shapes: T tokens, E experts, K experts per token, L layers. The estimators themselves are in estimators_grinmoe.py.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist

from .estimators_grinmoe import ESTIMATORS, WITHOUT_DRAWS, Routing, RoutingNoise, masked_softmax


class NonFiniteRouterLogitsError(ValueError):
    """Router logits that no choice can be made from: NaN, +inf, or fewer finite ones than a token needs experts.

    Attributes:
        layer: index of the layer, where it is known.
        step: optimizer step, where it is known.
    """

    def __init__(self, problem: str, layer: int | None = None, step: int | None = None):
        super().__init__(problem)
        self.layer = layer
        self.step = step

    def __str__(self) -> str:
        where = [f"layer {self.layer}"] * (self.layer is not None) + [f"step {self.step}"] * (self.step is not None)
        return f"{', '.join(where)}{': ' if where else ''}{self.args[0]}"


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


def routing_generator(seed: int, stream: int, device: torch.device | str) -> torch.Generator:
    """A generator on `device` for one stream (a layer, a rank) of a seed.

    Seed and stream are mixed by the finaliser of SplitMix64 (Steele, Lea and Flood, 2014), so that neighbours are
    unrelated: the CPU's generator looks at 32 bits of its seed only.
    """
    return torch.Generator(device).manual_seed(mix_seed(seed, stream))


def mix_seed(seed: int, stream: int) -> int:
    """A seed in [0, 2**63) for one stream of `seed`."""
    bits = (seed + (stream + 1) * 0x9E3779B97F4A7C15) % 2**64
    bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EB % 2**64
    return (bits ^ (bits >> 31)) >> 1


def routing_seed(device: torch.device, ranks_per_batch: int = 1) -> int | None:
    """The seed of one training forward: the layers' draws follow from it, on recomputation too.

    It is drawn from torch's CPU generator, so that runs repeat with their seed and resume with its state. Ranks that
    share a batch take the seed of the first of them; the others' are made to differ, whether or not they were seeded
    alike.

    Args:
        device: of the model's input.
        ranks_per_batch: how many consecutive ranks share a batch (tensor parallel). Above 1 this is a collective.

    Returns:
        The seed, or None where seeded generators do not work: compiled code, and the meta device.
    """
    if torch.compiler.is_compiling() or device.type == "meta":
        return None
    seed = int(torch.randint(2**63 - 1, (), dtype=torch.int64))
    ranks = number_of_ranks()
    if ranks == 1:
        return seed
    batch = this_rank() // ranks_per_batch
    if ranks_per_batch > 1:
        seeds = torch.empty(ranks, dtype=torch.int64, device=device)
        dist.all_gather_into_tensor(seeds, torch.tensor([seed], device=device))
        seed = int(seeds[batch * ranks_per_batch])
    return mix_seed(seed, batch)


def sparsemixer(
    router_logits: torch.Tensor,
    top_k: int,
    jitter_eps: float,
    training: bool,
    noise: RoutingNoise | None = None,
    estimator: str = "sparsemixer_v2",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose K experts for each token (GRIN Algorithm 3; SparseMixer-v2, Algorithm 1, in training).

    The k-th choice is made among the experts that the earlier choices left, from a fresh MaskedSoftmax over them. In
    evaluation it is the argmax and its weight is the masked probability; in training it is sampled from the masked
    probabilities, and its weight carries the Heun factor m in the forward but not in the backward. The weights are
    not renormalised: they do not sum to 1. All arithmetic is in the logits' dtype, as released.

    Args:
        router_logits: (T, E), floating point. -inf closes an expert to a token.
        top_k: K, from 1 to E.
        jitter_eps: half-width eps of the mask (the config's `router_jitter_noise`), at least 0.
        training: sample (True) or take the argmax (False).
        noise: the draws to use in training; None draws them from torch's generator. Ignored in evaluation.
        estimator: one of `ESTIMATORS`, each described at its function.

    Returns:
        routing_weights (T, K) in the logits' dtype, differentiable; selected_experts (T, K) int64. What the estimator
        asks of the experts' own gradient is in [`route`].

    Raises:
        ValueError: `router_logits` is not (T, E), `top_k` is not in [1, E], `jitter_eps` is negative, `estimator` is
            unknown, or `noise` does not have the shapes of [`RoutingNoise`].
        NonFiniteRouterLogitsError: a ValueError, see [`check_router_logits`].
    """
    routing = route(router_logits, top_k, jitter_eps, training, noise, estimator)
    return routing.routing_weights, routing.selected_experts


def route(
    router_logits: torch.Tensor,
    top_k: int,
    jitter_eps: float,
    training: bool,
    noise: RoutingNoise | None = None,
    estimator: str = "sparsemixer_v2",
    generator: torch.Generator | None = None,
    layer: int | None = None,
) -> Routing:
    """As [`sparsemixer`], with all that an estimator asks for. Missing noise is drawn from `generator`; `layer` is named
    in errors.
    """
    check_arguments(router_logits, top_k, jitter_eps, noise if training else None, estimator)
    check_router_logits(router_logits, top_k, layer)
    if training and noise is None and estimator not in WITHOUT_DRAWS:
        noise = draw_routing_noise(router_logits, top_k, generator)
    return ESTIMATORS[estimator](router_logits, top_k, jitter_eps, noise if training else None)


def within_capacity(selected_experts: torch.Tensor, num_experts: int, capacity_factor: float) -> torch.Tensor:
    """Which choices fit when an expert takes at most ceil(capacity_factor * T * K / E) of them (GShard, Switch).

    All first choices come before all second ones, and tokens in their order, padding included.

    Args:
        selected_experts: (T, K).
        num_experts: E.
        capacity_factor: 1 gives every expert an even share, and no more.

    Returns:
        (T, K) bool; False is a choice that is dropped.
    """
    num_tokens, top_k = selected_experts.shape
    # 1.1 * 100 * 2 / 20 is a little more than 11 in floating point, and means 11.
    capacity = math.ceil(capacity_factor * num_tokens * top_k / num_experts - 1e-9)
    one_hot = torch.nn.functional.one_hot(selected_experts.t().reshape(-1), num_experts)  # (K * T, E)
    place = (one_hot.cumsum(0) * one_hot).sum(-1)  # 1 for the first that an expert gets
    return (place <= capacity).view(top_k, num_tokens).t()


def without_choice(router_logits: torch.Tensor, top_k: int) -> torch.Tensor:
    """Tokens that no choice can be made for: NaN or +inf among their logits (..., E), or fewer than K finite. (...) bool."""
    impossible = router_logits.isnan() | (router_logits == float("inf"))
    return impossible.any(-1) | (router_logits.isfinite().sum(-1) < top_k)


def check_router_logits(router_logits: torch.Tensor, top_k: int, layer: int | None = None) -> None:
    """
    Raises:
        NonFiniteRouterLogitsError: a token has NaN or +inf among its logits, or fewer than K finite ones.

    On a CPU only. Elsewhere the check would make the host wait for the device in every layer; the training monitor
    (`RoutingMonitor`) makes it once per step there.
    """
    if router_logits.device.type != "cpu" or torch.compiler.is_compiling():
        return
    # The common case costs one reduction: a sum is finite if all of its terms are, unless it overflows.
    if math.isfinite(router_logits.detach().sum()):
        return
    bad = without_choice(router_logits, top_k)
    if bool(bad.any()):
        raise NonFiniteRouterLogitsError(
            f"{int(bad.sum())} of {bad.numel()} tokens have router logits that are NaN or infinite "
            f"({int(router_logits.isnan().sum())} NaN, {int(router_logits.isinf().sum())} infinite in all), so no expert "
            "can be chosen; look for the first step with a large loss or gradient, and lower the learning rate or clip "
            "gradients there",
            layer,
        )


def check_arguments(
    router_logits: torch.Tensor, top_k: int, jitter_eps: float, noise: RoutingNoise | None, estimator: str
) -> None:
    """
    Raises:
        ValueError: see [`sparsemixer`]; NaN and infinite logits are for [`check_router_logits`].
    """
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator={estimator!r} is unknown; choose one of {', '.join(ESTIMATORS)}")
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
    * `global`: as `local`, with f and the number of tokens counted over all ranks. Each rank returns its own tokens'
      part, so that the mean over ranks, of losses and of gradients, is that of the whole batch.

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
    probs, valid = router_probs(router_logits, attention_mask)
    if scope == "released":
        counts = expert_counts(probs.detach().topk(top_k, dim=-1).indices, probs.shape[-1], valid)
        # Every layer has the same tokens, so pooled means are means of the layers' means.
        pooled = probs.mean(0, keepdim=True)
        return balance_of_counts(pooled, valid, counts.mean(0, keepdim=True), top_k)
    if selected_experts is None:
        raise ValueError(f"scope={scope!r} counts the chosen experts; give selected_experts, one (T, K) per layer")
    counts = expert_counts(selected_experts, probs.shape[-1], valid)
    ranks = number_of_ranks() if scope == "global" else 1
    if ranks > 1:
        dist.all_reduce(counts)
    return balance_of_counts(probs, valid, counts, top_k, ranks=ranks)


def router_probs(
    router_logits: tuple[torch.Tensor, ...], attention_mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain softmax of all layers, (L, T, E) float32, and (T,) float32: 1 for tokens, 0 for padding.

    Raises:
        ValueError: the mask marks another number of positions than the router saw.
    """
    device = router_logits[0].device
    probs = torch.softmax(torch.stack([layer.to(device, torch.float32) for layer in router_logits]), dim=-1)
    num_tokens = probs.shape[1]
    if attention_mask is None:
        return probs, torch.ones(num_tokens, device=device)
    valid = attention_mask.reshape(-1).to(device, torch.float32)
    if valid.shape[0] != num_tokens:
        raise ValueError(
            f"attention_mask marks {valid.shape[0]} positions, the router saw {num_tokens}; give a mask of shape "
            "(batch, sequence) for this very batch"
        )
    return probs, valid


@torch.no_grad()
def expert_counts(
    selected_experts: torch.Tensor | tuple[torch.Tensor, ...], num_experts: int, valid: torch.Tensor
) -> torch.Tensor:
    """How many choices each expert got, (L, E) float32: of (L, T, K) choices, those of tokens with `valid` (T,) 1."""
    chosen = torch.stack([layer.to(valid.device) for layer in selected_experts])
    num_layers, _, top_k = chosen.shape
    weight = valid.repeat_interleave(top_k).expand(num_layers, -1)  # (L, T * K)
    counts = torch.zeros(num_layers, num_experts, device=valid.device)
    return counts.scatter_add_(1, chosen.reshape(num_layers, -1), weight)


def balance_of_counts(
    probs: torch.Tensor,
    valid: torch.Tensor,
    counts: torch.Tensor,
    top_k: int,
    earlier_counts: torch.Tensor | None = None,
    ranks: int = 1,
) -> torch.Tensor:
    """E * sum_e f_e P_e, mean over layers.

    Args:
        probs: (L, T, E) of this rank's tokens.
        valid: (T,) 1 for tokens.
        counts: (L, E) choices of these tokens and of all other ranks'. Their sum tells how many tokens there are.
        top_k: K.
        earlier_counts: (L, E) to be added for f.
        ranks: how many ranks `counts` is of; the mean of their results is the loss of all tokens.
    """
    num_tokens = counts.sum(-1, keepdim=True) / top_k  # (L, 1)
    mean_probs = ranks * torch.einsum("lte,t->le", probs, valid) / num_tokens.clamp(min=1.0)
    if earlier_counts is not None:
        counts = counts + earlier_counts
    expert_fraction = counts * top_k / counts.sum(-1, keepdim=True).clamp(min=1.0)  # (L, E)
    return probs.shape[-1] * (expert_fraction * mean_probs).sum(-1).mean()


def number_of_ranks() -> int:
    """Processes of the default group, 1 where there is none."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def this_rank() -> int:
    """Rank in the default group, 0 where there is none."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


__all__ = [
    "ESTIMATORS",
    "NonFiniteRouterLogitsError",
    "Routing",
    "RoutingNoise",
    "draw_routing_noise",
    "load_balancing_loss",
    "masked_softmax",
    "route",
    "sparsemixer",
]
