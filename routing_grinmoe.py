"""Routing of GRIN-MoE as functions of tensors: the estimators of the router's gradient, their draws and their checks.

Source: "GRIN: GRadient-INformed MoE", arXiv:2409.12136, sections 2, 3 and appendix A, and the behaviour of the released
code, which decides where the two differ (each difference is named where it is). `togo` and `joint` are derived in
docs/numerics.md. [`sparsemixer`] is the entry point.

Shapes: T tokens, E experts, K experts per token.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist


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
    dropped = _too_far(router_logits, remaining, jitter_eps) | (remaining == float("-inf"))
    return torch.softmax(remaining.masked_fill(dropped, float("-inf")), dim=-1), dropped


def _too_far(router_logits: torch.Tensor, remaining: torch.Tensor, jitter_eps: float) -> torch.Tensor:
    """(T, E) bool, by the rule of [`masked_softmax`]; of experts that do not remain either."""
    values = router_logits.detach()  # the mask has no derivative
    top = remaining.detach().amax(dim=-1, keepdim=True)
    # NaN (0/0) compares false: kept.
    return (top - values) / torch.maximum(values.abs(), top) > 2 * jitter_eps


class _Choices(NamedTuple):
    """K choices without replacement.

    Attributes:
        probs: (K, T, E), one masked softmax per choice; with its graph where nothing is drawn.
        experts: (T, K).
        is_argmax: (T, K) bool, whether a draw took the most probable expert; (T, 0) where nothing is drawn.
    """

    probs: torch.Tensor
    experts: torch.Tensor
    is_argmax: torch.Tensor


def _choose(router_logits: torch.Tensor, top_k: int, jitter_eps: float, noise: RoutingNoise | None) -> _Choices:
    """The choices of Algorithm 3: sampled with `noise`, the argmax without."""
    if noise is not None:  # the estimator is the gradient
        router_logits = router_logits.detach()
    remaining = router_logits  # (T, E), -inf where an earlier choice took the expert
    probs: list[torch.Tensor] = []
    experts: list[torch.Tensor] = []
    is_argmax: list[torch.Tensor] = []
    for k in range(top_k):
        if k > 0:
            remaining = remaining.scatter(-1, experts[-1], float("-inf"))
        if noise is None:  # experts that do not remain have no probability anyway
            dropped = _too_far(router_logits, remaining, jitter_eps)
            masked_probs = torch.softmax(remaining.masked_fill(dropped, float("-inf")), dim=-1)
            choice = remaining.argmax(dim=-1, keepdim=True)  # (T, 1)
        else:
            masked_probs, dropped = masked_softmax(router_logits, remaining, jitter_eps)
            # The Gumbel trick: -log of a unit exponential is Gumbel noise.
            perturbed = remaining - noise.exponential[k].log()
            choice = perturbed.masked_fill(dropped, float("-inf")).argmax(dim=-1, keepdim=True)
            is_argmax.append(choice == masked_probs.argmax(dim=-1, keepdim=True))
        probs.append(masked_probs)
        experts.append(choice)
    chosen = torch.cat(experts, dim=-1)
    drawn = torch.cat(is_argmax, dim=-1) if is_argmax else chosen.new_empty(chosen.shape[0], 0, dtype=torch.bool)
    return _Choices(torch.stack(probs), chosen, drawn)


# How the contributions c_k = p_k <g, E_k> of a token's draws (T, K) become the factors of their scores.
_Credit = Callable[[torch.Tensor], torch.Tensor]


def own_credit(contributions: torch.Tensor) -> torch.Tensor:
    """Every draw answers for itself (the paper)."""
    return contributions


def credit_to_go(contributions: torch.Tensor) -> torch.Tensor:
    """A draw also answers for the later ones, among which it decides who is left: c_k + ... + c_K."""
    return contributions.flip(-1).cumsum(-1).flip(-1)


def centred_credit_to_go(contributions: torch.Tensor) -> torch.Tensor:
    """As `credit_to_go`, less the mean over the other tokens."""
    credit = credit_to_go(contributions)
    others = max(1, credit.shape[0] - 1)
    return credit - (credit.sum(0, keepdim=True) - credit) / others


def joint_credit(contributions: torch.Tensor) -> torch.Tensor:
    """Every draw answers for the whole output."""
    return contributions.sum(-1, keepdim=True).expand_as(contributions)


def _chosen(probs: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
    """(K, T, E) and (T, K) to the chosen experts' probabilities (T, K)."""
    return probs.gather(-1, experts.t().unsqueeze(-1)).squeeze(-1).t()


class _ScoreFunctionWeights(torch.autograd.Function):
    """Weights of the sampled experts, `scale * p_D` (T, K), whose backward ignores `scale`.

    With g_k = dL/d(weight k) and c_k = g_k p_k, draw k adds credit_k (1[j = D_k] - p^(k)_j) to dL/dz_j. With each draw's
    own credit that is Algorithm 1's router gradient. A draw with one kept expert (p_D = 1) adds zero.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(router_logits, probs, experts, scale, credit):
        return _chosen(probs, experts) * scale

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, probs, experts, _, ctx.credit = inputs
        ctx.save_for_backward(probs, experts)

    @staticmethod
    def backward(ctx, grad_weights):
        return _EstimatedGradient.apply(grad_weights, *ctx.saved_tensors, ctx.credit), None, None, None, None


class _EstimatedGradient(torch.autograd.Function):
    """dL/d(logits) (T, E) of dL/d(weights) (T, K). Its own derivative does not exist, because it is an estimate."""

    generate_vmap_rule = True

    @staticmethod
    def forward(grad_weights, probs, experts, credit):
        shared = credit(grad_weights * _chosen(probs, experts))  # (T, K)
        return -(shared.t().unsqueeze(-1) * probs).sum(0).scatter_add(-1, experts, -shared)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *gradients):
        raise RuntimeError(
            "second derivatives through a router that samples: its gradient is an estimate, which has no derivative of its "
            "own; call model.eval() first, where the router has its exact derivatives of every order"
        )


def _weights(
    router_logits: torch.Tensor, choices: _Choices, scale: torch.Tensor | None, credit: _Credit = own_credit
) -> torch.Tensor:
    if scale is None:  # evaluation has the derivatives of what was computed
        return _chosen(choices.probs, choices.experts)
    return _ScoreFunctionWeights.apply(router_logits, choices.probs, choices.experts, scale, credit)


class _ScaleGradient(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(tensor, scale):
        return tensor.view_as(tensor)

    @staticmethod
    def setup_context(ctx, inputs, output):
        scale = inputs[1]
        ctx.scale = scale if isinstance(scale, float) else None
        ctx.save_for_backward(*([] if ctx.scale is not None else [scale]))

    @staticmethod
    def backward(ctx, gradient):
        (scale,) = ctx.saved_tensors or (ctx.scale,)
        return gradient * scale, None


def scale_gradient(tensor: torch.Tensor, scale: torch.Tensor | float) -> torch.Tensor:
    """`tensor` itself, whose gradient is multiplied by `scale` (broadcast over it)."""
    return _ScaleGradient.apply(tensor, scale)


def _topk(router_logits: torch.Tensor, top_k: int) -> Routing:
    """The gating of GShard, and with K = 1 of the Switch Transformer: no mask, no sampling, the gradient of the gate.

    Weights are the plain softmax over all experts, not renormalised over the chosen ones: with K = 1 they would be
    constant.
    """
    experts = router_logits.detach().topk(top_k, dim=-1).indices
    return Routing(torch.softmax(router_logits, dim=-1).gather(-1, experts), experts)


def _topk_renormalized(router_logits: torch.Tensor, top_k: int) -> Routing:
    """The gating of Mixtral: as `topk`, with the weights of the chosen experts renormalised to sum to 1."""
    experts = router_logits.detach().topk(top_k, dim=-1).indices
    # Of the chosen logits alone: the same as all experts' softmax over its own sum.
    return Routing(torch.softmax(router_logits.gather(-1, experts), dim=-1), experts)


@dataclass(frozen=True)
class EstimatorSpec:
    """
    An estimator of the router's gradient: the one place that says what it computes, and what it can be used for.

    Attributes:
        source: where it comes from.
        exact_for: the number of experts per token and the losses for which its gradient is exact (tests/research).
        gating: for estimators without draws, (router_logits, top_k) to a `Routing`; None samples experts by Algorithm 3.
        full_probability: probability that the Heun factor m of a draw other than the argmax is 1.
        third: m otherwise. Heun's rule has 1/3; the released code has the literal 0.3333.
        shared_scale: one m for all draws of a token, without the exception for the argmax.
        credit: turns the contributions of a token's draws into the factors of their scores.
        halves_logits: sample from halved logits (Algorithm 2).
        expert_gradient: over m, the factor of the experts' own gradient; None leaves it scaled by m with the output.
        kernel: whether `grinmoe.kernels` has a Triton kernel for it.
        exports_to: architectures of other projects (phimoe, mixtral) that route alike in evaluation.
        equal_experts_sum: sum of the K routing weights where the mask leaves one candidate to every draw, as a function of
            K; None where upcycling a dense checkpoint to it is not offered.
    """

    source: str
    exact_for: str
    gating: Callable[[torch.Tensor, int], Routing] | None = None
    full_probability: float = 1 / 4
    third: float = 0.3333
    shared_scale: bool = False
    credit: _Credit = own_credit
    halves_logits: bool = False
    expert_gradient: float | None = None
    kernel: bool = False
    exports_to: tuple[str, ...] = ()
    equal_experts_sum: Callable[[int], float] | None = None

    @property
    def draws(self) -> bool:
        """Whether training samples experts; otherwise it routes as evaluation does."""
        return self.gating is None

    def route(self, router_logits: torch.Tensor, top_k: int, jitter_eps: float, noise: RoutingNoise | None) -> Routing:
        """One routing decision: sampled with `noise`, greedy with None. Arguments as in [`sparsemixer`], unchecked."""
        if self.gating is not None:
            return self.gating(router_logits, top_k)
        if self.halves_logits:  # the mask does not depend on the scale of the logits
            router_logits = router_logits / 2
        choices = _choose(router_logits, top_k, jitter_eps, noise)
        scale = None if noise is None else self._scale(choices, noise)
        weights = _weights(router_logits, choices, scale, self.credit)
        if scale is None:
            return Routing(weights, choices.experts)
        if self.halves_logits:
            weights = scale_gradient(weights, 2.0)  # y = 2h + detach(m h - 2h) undoes the halving for the router
        expert_gradient = None if self.expert_gradient is None else self.expert_gradient / scale
        return Routing(weights, choices.experts, expert_gradient)

    def _scale(self, choices: _Choices, noise: RoutingNoise) -> torch.Tensor:
        """m of each draw (T, K)."""
        dtype = choices.probs.dtype
        if self.full_probability == 1:
            return torch.ones_like(choices.experts, dtype=dtype)
        if self.shared_scale:
            full = (noise.uniform[0] > 1 - self.full_probability).expand_as(choices.experts)
        else:
            full = choices.is_argmax | (noise.uniform.squeeze(-1).t() > 1 - self.full_probability)
        # Filled in the final dtype: a Python number would pass through float32 first.
        return torch.full(full.shape, self.third, dtype=dtype, device=full.device).masked_fill(full, 1.0)


ESTIMATORS: dict[str, EstimatorSpec] = {
    # The experts are trained through the scaled weight m p_D.
    "sparsemixer_v2": EstimatorSpec(
        "released code", "top-1, linear loss", kernel=True, exports_to=("phimoe",), equal_experts_sum=float
    ),
    # y = h + detach(m h - h): the experts' gradient is not scaled by m.
    "sparsemixer_v2_printed": EstimatorSpec(
        "Algorithm 1", "top-1, linear loss", expert_gradient=1.0, kernel=True, exports_to=("phimoe",)
    ),
    # The probability inside of the weight is differentiated too (Eq. 4).
    "sparsemixer_v2_star": EstimatorSpec(
        "Algorithm 2",
        "top-1, linear loss (Eq. 4)",
        full_probability=5 / 8,
        third=1 / 3,
        halves_logits=True,
        expert_gradient=2.0,
        kernel=True,
    ),
    # The first choice decides what the later ones can be, so its score takes their contributions as well.
    "sparsemixer_togo": EstimatorSpec(
        "this project",
        "any K, linear loss",
        credit=credit_to_go,
        kernel=True,
        exports_to=("phimoe",),
        equal_experts_sum=float,
    ),
    # The loss is integrated by Heun's rule along the ray to the token's output, and every draw's score takes all of it.
    "sparsemixer_joint": EstimatorSpec(
        "this project",
        "any K, cubic loss",
        third=1 / 3,
        shared_scale=True,
        credit=joint_credit,
        kernel=True,
        exports_to=("phimoe",),
        equal_experts_sum=float,
    ),
    # As togo with m = 1: training sees unshrunk outputs, as evaluation does, and gives up Heun's correction.
    "sparsemixer_unscaled": EstimatorSpec(
        "this project",
        "any K, linear loss",
        full_probability=1,
        credit=credit_to_go,
        kernel=True,
        exports_to=("phimoe",),
        equal_experts_sum=float,
    ),
    # As togo with a baseline. The score's expectation is zero, so the baseline changes the variance only. (Within one block
    # that is so; through attention of later layers the other tokens' credit depends on this token's draw a little.)
    "sparsemixer_centred": EstimatorSpec(
        "this project",
        "any K, linear loss",
        credit=centred_credit_to_go,
        exports_to=("phimoe",),
        equal_experts_sum=float,
    ),
    "topk": EstimatorSpec("GShard; top-1: Switch", "its own objective", gating=_topk),
    "topk_renormalized": EstimatorSpec(
        "Mixtral",
        "its own objective",
        gating=_topk_renormalized,
        exports_to=("mixtral",),
        equal_experts_sum=lambda top_k: 1.0,
    ),
}


class FusedRouter(NamedTuple):
    """A faster router, with the contract of [`route`] for the estimators whose spec says `kernel`.

    Attributes:
        route: (router_logits, top_k, jitter_eps, training, estimator, noise, routing_seed, layer) to a `Routing`.
        input_jitter: (hidden_states (T, H), jitter_eps, routing_seed, layer) to the jittered (T, H).
    """

    route: Callable[..., Routing]
    input_jitter: Callable[..., torch.Tensor]


def _shared_routers() -> dict[str, FusedRouter]:
    """The table of the copy of this file that was imported first: remote code runs in a copy of its own."""
    for name, module in list(sys.modules.items()):
        if name.endswith(".routing_grinmoe") and isinstance(getattr(module, "ROUTERS", None), dict):
            return module.ROUTERS
    return {}


# Faster routers, by the name of the experts implementation that they belong to. `import grinmoe` fills it.
ROUTERS: dict[str, FusedRouter] = _shared_routers()


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
    exponential = router_logits.new_empty(shape, dtype=torch.float32).exponential_(generator=generator)
    uniform = router_logits.new_empty((*shape[:-1], 1), dtype=torch.float32).uniform_(generator=generator)
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
        The seed, or None where seeded generators do not work: compiled code, the meta device, and samples of
        `torch.func.vmap` that draw differently.
    """
    if torch.compiler.is_compiling() or device.type == "meta":
        return None
    seed = _on_host(torch.randint(2**63 - 1, (), dtype=torch.int64))
    if seed is None:
        return None
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
        estimator: one of `ESTIMATORS`, which describes each.

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
    spec = ESTIMATORS[estimator]
    if training and noise is None and spec.draws:
        noise = draw_routing_noise(router_logits, top_k, generator)
    return spec.route(router_logits, top_k, jitter_eps, noise if training else None)


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


def _on_host(number: torch.Tensor) -> Any:
    """The number in a CPU tensor of one element; None under `torch.func.vmap`, where each sample has its own."""
    try:
        return number.item()
    except RuntimeError:
        return None


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
    total = _on_host(router_logits.detach().sum())
    if total is None or math.isfinite(total):
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


def number_of_ranks() -> int:
    """Processes of the default group, 1 where there is none."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def this_rank() -> int:
    """Rank in the default group, 0 where there is none."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
