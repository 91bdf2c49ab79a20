"""Statistics of how a model routes text: counts that add up, and what is derived of them. Pure functions of tensors.

Routing is that of evaluation: choice k is the best of the experts that the choices before it have left.

Shapes: D domains, L layers, T tokens, E experts, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch

from ..monitoring import kept_experts, routing_sums
from ..routing_grinmoe import sparsemixer

_ENTROPY = 1  # the column of `routing_sums`
_FITTING_STEPS = 500


@dataclass(frozen=True)
class RoutingCounts:
    """What the routers did with some tokens, padding left out. Sums: the counts of two texts add up to those of both.

    Attributes:
        tokens: how many.
        choices: (L, K, E) int64, tokens whose k-th choice was the expert.
        weights: (L, K, E) float64, routing weights of these choices, summed.
        kept: (L, K, E) int64, tokens for whose k-th choice the mask kept 1, 2, ... E experts.
        pairs: (L, E, E) int64, tokens that went to both experts; on the diagonal, tokens that went to the expert.
        entropy: (L,) float64, entropy in nats of the plain softmax of the router's logits, summed over tokens.
        probs: (L, E) float64, the plain softmax, summed over tokens.
    """

    tokens: int
    choices: torch.Tensor
    weights: torch.Tensor
    kept: torch.Tensor
    pairs: torch.Tensor
    entropy: torch.Tensor
    probs: torch.Tensor

    @classmethod
    def of_nothing(cls, num_layers: int, num_experts: int, top_k: int) -> RoutingCounts:
        """To start a sum with."""
        per_choice, integers = (num_layers, top_k, num_experts), torch.int64
        return cls(
            0,
            torch.zeros(per_choice, dtype=integers),
            torch.zeros(per_choice, dtype=torch.float64),
            torch.zeros(per_choice, dtype=integers),
            torch.zeros(num_layers, num_experts, num_experts, dtype=integers),
            torch.zeros(num_layers, dtype=torch.float64),
            torch.zeros(num_layers, num_experts, dtype=torch.float64),
        )

    def __add__(self, other: RoutingCounts) -> RoutingCounts:
        return RoutingCounts(*(getattr(self, one.name) + getattr(other, one.name) for one in fields(self)))

    @property
    def top_k(self) -> int:
        return self.choices.shape[1]

    @property
    def tokens_per_expert(self) -> torch.Tensor:
        """(L, E) int64."""
        return self.choices.sum(1)

    @property
    def load_share(self) -> torch.Tensor:
        """(L, E) float64, share of the layer's choices that the expert got: 1 / E when the load is even."""
        return self.tokens_per_expert.double() / (self.tokens * self.top_k)

    @property
    def max_over_mean_load(self) -> torch.Tensor:
        """(L,) load of the busiest expert over the mean load: 1 when it is even, at most E / K."""
        return self.load_share.amax(1) * self.load_share.shape[1]

    @property
    def load_entropy(self) -> torch.Tensor:
        """(L,) entropy of `load_share` in nats: log E when it is even. Its exponential is a number of experts."""
        return torch.special.entr(self.load_share).sum(1)

    @property
    def router_entropy(self) -> torch.Tensor:
        """(L,) entropy in nats of the plain softmax of the router's logits, mean over tokens; at most log E."""
        return self.entropy / self.tokens

    @property
    def balance_loss(self) -> torch.Tensor:
        """(L,) E * sum_e f_e P_e (GRIN section 3.3), unscaled: K when the load is even."""
        fraction = self.tokens_per_expert / self.tokens
        return fraction.shape[1] * (fraction * self.probs / self.tokens).sum(1)

    @property
    def kept_share(self) -> torch.Tensor:
        """(L, K, E) float64, share of the tokens for whose k-th choice the mask kept 1, 2, ... E experts."""
        return self.kept.double() / self.tokens

    @property
    def kept_experts(self) -> torch.Tensor:
        """(L, K) experts that the mask keeps for the k-th choice, mean over tokens; 1 to E - k + 1."""
        return self.kept_share @ torch.arange(1, self.kept.shape[-1] + 1, dtype=torch.float64)

    @property
    def near_tie_share(self) -> torch.Tensor:
        """
        (L,) share of the tokens at a near tie: their *set* of experts is one that sampling in training could change.

        With z_K the logit of the last choice (the K-th largest) and z_i that of any expert that was not chosen, a token is
        at a near tie if (z_K - z_i) / max(|z_i|, z_K) <= 2 eps for at least one i, eps being the config's
        `router_jitter_noise`: the mask of the last choice keeps more than one expert. For K = 2 that is the gap between
        the second and the third logit, measured as the released mask measures it. 0 where K = E leaves no other.
        Ties of earlier choices among themselves do not count: both experts are chosen anyway.
        """
        return 1 - self.kept_share[:, -1, 0]

    @property
    def mean_weights(self) -> torch.Tensor:
        """(L, K) routing weight of the k-th choice, mean over tokens. Weights are not renormalised."""
        return self.weights.sum(-1) / self.tokens

    @property
    def pair_lift(self) -> torch.Tensor:
        """
        (L, E, E) float64: tokens that went to both experts, over those that the loads alone would give.

        Expected is w_e w_f, with w such that every expert is in as many pairs as it was seen in (quasi-independence, by
        iterative proportional fitting): 1 where choices know nothing of each other but that they differ. NaN on the
        diagonal, where less than half a token is expected, and everywhere for K = 1.
        """
        off_diagonal = (~torch.eye(self.pairs.shape[-1], dtype=torch.bool)).double()
        observed = self.pairs * off_diagonal
        in_pairs = observed.sum(2)
        weights = in_pairs / in_pairs.sum(1, keepdim=True).sqrt().clamp(min=1)
        for _ in range(_FITTING_STEPS):
            fitted = weights * (weights[:, None] * off_diagonal).sum(2)
            # The root, since a pair has both weights.
            weights = torch.where(in_pairs > 0, weights * (in_pairs / fitted).sqrt(), 0.0)
        expected = weights[:, :, None] * weights[:, None, :] * off_diagonal
        return torch.where(expected >= 0.5, observed / expected, torch.nan)


def choices_in_detail(
    router_logits: torch.Tensor, selected_experts: torch.Tensor, jitter_eps: float, estimator: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    What the model's outputs do not say of each choice.

    Args:
        router_logits: (L, T, E), as the model returns them: its dtype is that of the routing's arithmetic.
        selected_experts: (L, T, K).
        jitter_eps: eps of the mask.
        estimator: the config's `router_estimator`, which decides what a weight is.

    Returns:
        routing_weights (L, T, K); kept (L, T, K) int64, experts that the mask kept for each choice, 1 or more (for `topk`,
        which has no mask: would have kept).

    Raises:
        NonFiniteRouterLogitsError: a ValueError; a token has NaN or +inf among its logits.
    """
    num_layers, _, top_k = selected_experts.shape
    flat = router_logits.flatten(0, 1)  # (L * T, E)
    weights, _ = sparsemixer(flat, top_k, jitter_eps, training=False, estimator=estimator)
    return weights.unflatten(0, (num_layers, -1)), kept_experts(router_logits, selected_experts, jitter_eps)


@torch.no_grad()
def count_routing(
    router_logits: torch.Tensor,
    selected_experts: torch.Tensor,
    valid: torch.Tensor,
    jitter_eps: float,
    estimator: str = "sparsemixer_v2",
) -> RoutingCounts:
    """Counts of one forward pass: as [`choices_in_detail`], with `valid` (T,) bool, False for padding."""
    logits, experts = router_logits[:, valid], selected_experts[:, valid]
    num_tokens, num_experts = logits.shape[1:]
    if num_tokens == 0:
        return RoutingCounts.of_nothing(logits.shape[0], num_experts, experts.shape[-1])
    weights, kept = choices_in_detail(logits, experts, jitter_eps, estimator)
    one_hot = torch.nn.functional.one_hot(experts, num_experts)  # (L, T, K, E)
    chosen = one_hot.sum(2).double()  # (L, T, E), 1 where the token went
    sums = routing_sums(logits, weights, experts, torch.ones(num_tokens), jitter_eps).double()
    return RoutingCounts(
        num_tokens,
        one_hot.sum(1),
        torch.einsum("ltke,ltk->lke", one_hot.double(), weights.double()),
        torch.nn.functional.one_hot(kept - 1, num_experts).sum(1),
        (chosen.transpose(1, 2) @ chosen).round().long(),
        sums[:, _ENTROPY],
        sums[:, -num_experts:],
    )


@dataclass(frozen=True)
class Similarity:
    """How alike the domains' loads are: cosines, 1 for the same direction. Float64.

    Attributes:
        whole: (D, D) of the load shares of all layers in one vector of L * E.
        deviation: (D, D) of the same less 1 / E: of what a domain prefers. Balanced loads are all nearly even, so that
            `whole` is near 1 whatever the domains; this one is 0 for unrelated preferences and -1 for opposite ones.
            NaN where a load is exactly even.
        per_layer: (L, D, D), of each layer's load shares.
        within: (D,) `deviation` that two texts of a domain's own kind and this length would have, from that of two halves of
            its text, row by row in turn (r of halves is 2 r / (1 + r) of wholes, by Spearman and Brown): what chance
            leaves of 1. Two domains are no more different than chance makes them if their `deviation` reaches it. Rows of
            one document are more alike than documents are, so for a domain of one document it is at most that. NaN for
            a single row.
    """

    whole: torch.Tensor
    deviation: torch.Tensor
    per_layer: torch.Tensor
    within: torch.Tensor


def similarity_of(halves: list[tuple[RoutingCounts, RoutingCounts]]) -> Similarity:
    """Of the domains, given as the counts of two halves each (an empty second half is allowed)."""
    loads = torch.stack([(first + second).load_share for first, second in halves])  # (D, L, E)
    even = 1 / loads.shape[-1]
    within = [
        _cosines(torch.stack([half.load_share.flatten() - even for half in both]))[0, 1]
        if all(half.tokens for half in both)
        else torch.tensor(torch.nan, dtype=torch.float64)
        for both in halves
    ]
    return Similarity(
        _cosines(loads.flatten(1)),
        _cosines(loads.flatten(1) - even),
        torch.stack([_cosines(layer) for layer in loads.unbind(1)]),
        2 * torch.stack(within) / (1 + torch.stack(within)),
    )


def _cosines(vectors: torch.Tensor) -> torch.Tensor:
    """(D, N) to (D, D); NaN for a vector of zeros."""
    norms = torch.linalg.vector_norm(vectors, dim=1)
    return (vectors @ vectors.T) / (norms[:, None] * norms[None, :])


@dataclass(frozen=True)
class SentenceRouting:
    """Every token of one sentence.

    Attributes:
        text: the sentence.
        tokens: T texts of tokens, as they are to be shown.
        experts: (L, T, K) int64.
        weights: (L, T, K) routing weights.
        kept: (L, T, K) int64, experts that the mask kept for each choice.
        probs: (L, T, E) the plain softmax of the router's logits.
    """

    text: str
    tokens: list[str]
    experts: torch.Tensor
    weights: torch.Tensor
    kept: torch.Tensor
    probs: torch.Tensor


@torch.no_grad()
def route_sentence(
    text: str,
    tokens: list[str],
    router_logits: torch.Tensor,
    selected_experts: torch.Tensor,
    jitter_eps: float,
    estimator: str = "sparsemixer_v2",
) -> SentenceRouting:
    """Of the router's logits (L, T, E) and choices (L, T, K) of a sentence alone."""
    weights, kept = choices_in_detail(router_logits, selected_experts, jitter_eps, estimator)
    probs = torch.softmax(router_logits.double(), dim=-1)
    return SentenceRouting(text, tokens, selected_experts, weights.double(), kept, probs)


@dataclass(frozen=True)
class RoutingAnalysis:
    """All that a report shows.

    Attributes:
        domains: their names, in the order given.
        halves: counts of each domain, in two halves.
        sentence: a sentence, token by token.
        jitter_eps: eps of the mask.
        facts: of the run, as they are to be shown.
    """

    domains: list[str]
    halves: list[tuple[RoutingCounts, RoutingCounts]]
    sentence: SentenceRouting
    jitter_eps: float
    facts: dict[str, Any]

    @property
    def counts(self) -> list[RoutingCounts]:
        """Of each domain."""
        return [first + second for first, second in self.halves]

    @property
    def total(self) -> RoutingCounts:
        """Of all domains together."""
        first, *others = self.counts
        return sum(others, first)
