"""What is measured of the routers while a model trains: the counts of one rank, and the record that all ranks make of them.

Shapes: L layers, T tokens, E experts, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from ..balance_grinmoe import expert_counts
from ..routing_grinmoe import masked_softmax, number_of_ranks, without_choice

# The columns of `routing_sums` before its two times E.
_TOKENS, _ENTROPY, _KEPT, _SAMPLED, _DROPPED = range(5)


@dataclass(frozen=True)
class RoutingRecord:
    """What the routers did in a few steps in a row, over all ranks and without padding. Sums: two records add up to one.

    Attributes:
        first_step, last_step: optimizer steps, counted from 1.
        logs: how many of the Trainer's logs it covers.
        seconds: time that the steps took, waiting for data included, evaluating and saving left out.
        tokens: how many were trained on.
        load: (L, E) int64, tokens that each expert got (`tokens_per_expert`), dropped choices included.
        sums: (L, 5 + 2E) float64, of the measured steps; see [`routing_sums`].
        gradient_norm: (L,) float64, sum over the measured steps in which the router had a gradient.
        gradient_steps: (L,) how many those are.
        top_k: K.
    """

    first_step: int
    last_step: int
    logs: int
    seconds: float
    tokens: int
    load: torch.Tensor
    sums: torch.Tensor
    gradient_norm: torch.Tensor
    gradient_steps: torch.Tensor
    top_k: int

    def __add__(self, later: RoutingRecord) -> RoutingRecord:
        added = {
            name: getattr(self, name) + getattr(later, name)
            for name in ("logs", "seconds", "tokens", "load", "sums", "gradient_norm", "gradient_steps")
        }
        return replace(self, last_step=later.last_step, **added)

    @property
    def measured(self) -> bool:
        """Whether any of the steps was measured in detail."""
        return bool(self.sums[:, _TOKENS].any())

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds

    @property
    def max_over_mean_load(self) -> torch.Tensor:
        """(L,) load of the busiest expert over the mean load of its layer; 1 when the load is even."""
        load = self.load.double()
        return load.amax(1) / load.mean(1)

    @property
    def entropy(self) -> torch.Tensor:
        """(L,) entropy in nats of the plain softmax of the router's logits, mean over tokens; at most log E."""
        return self._per_token(_ENTROPY)

    @property
    def kept_experts(self) -> torch.Tensor:
        """(L,) experts between which the first choice is drawn: those that the mask keeps, mean over tokens."""
        return self._per_token(_KEPT)

    @property
    def sampled_share(self) -> torch.Tensor:
        """(L,) share of the choices that fell on another expert than the best of the remaining ones."""
        return self._per_token(_SAMPLED) / self.top_k

    @property
    def dropped_share(self) -> torch.Tensor:
        """(L,) share of the choices that were dropped, beyond an expert's capacity."""
        return self._per_token(_DROPPED) / self.top_k

    @property
    def balance_loss(self) -> torch.Tensor:
        """(L,) E * sum_e f_e P_e (GRIN section 3.3), unscaled: K when the load is even."""
        experts = self.load.shape[1]
        counts, probs = self.sums[:, -2 * experts :].split(experts, dim=1)
        return experts * (counts * probs).sum(1) / self.sums[:, _TOKENS] ** 2

    @property
    def router_gradient_norm(self) -> torch.Tensor:
        """(L,) norm of the router's gradient after clipping, mean over measured steps; NaN where it has none."""
        return self.gradient_norm / self.gradient_steps

    def _per_token(self, column: int) -> torch.Tensor:
        return self.sums[:, column] / self.sums[:, _TOKENS]


def kept_experts(router_logits: torch.Tensor, selected_experts: torch.Tensor, jitter_eps: float) -> torch.Tensor:
    """
    Count the experts that the mask keeps for each choice.

    Args:
        router_logits: (..., E).
        selected_experts: (..., K), in the order of the choices.
        jitter_eps: eps of the mask.

    Returns:
        (..., K) int64, 1 or more.
    """
    remaining, kept = router_logits, []
    for choice in selected_experts.unbind(-1):
        _, dropped = masked_softmax(router_logits, remaining, jitter_eps)
        kept.append((~dropped).sum(-1))
        remaining = remaining.scatter(-1, choice.unsqueeze(-1), float("-inf"))
    return torch.stack(kept, dim=-1)


@torch.no_grad()
def routing_sums(
    router_logits: torch.Tensor,
    routing_weights: torch.Tensor,
    selected_experts: torch.Tensor,
    valid: torch.Tensor,
    jitter_eps: float,
) -> torch.Tensor:
    """Sums over tokens of all that is measured of a forward pass, (L, 5 + 2E) float32.

    Its columns: tokens; entropy of the plain softmax in nats; experts kept by the first choice's mask; choices that are
    not the best of the remaining experts; choices with weight 0; how often each expert was chosen (E); and its plain
    probability (E).

    Args:
        router_logits: (L, T, E).
        routing_weights, selected_experts: (L, T, K).
        valid: (T,) float32, 1 for tokens and 0 for padding.
        jitter_eps: eps of the mask.
    """
    probs = torch.softmax(router_logits.float(), dim=-1)
    _, masked = masked_softmax(router_logits, router_logits, jitter_eps)
    remaining = router_logits
    not_the_best = torch.zeros_like(selected_experts[..., 0])  # (L, T)
    for choice in selected_experts.unbind(-1):
        choice = choice.unsqueeze(-1)
        # By value: of equal logits each is the best.
        not_the_best += (remaining.gather(-1, choice) < remaining.amax(-1, keepdim=True)).squeeze(-1)
        remaining = remaining.scatter(-1, choice, float("-inf"))
    per_token = (
        torch.ones_like(probs[..., 0]),
        torch.special.entr(probs).sum(-1),
        (~masked).sum(-1).float(),
        not_the_best.float(),
        (routing_weights == 0).sum(-1).float(),
    )
    sums = torch.einsum("clt,t->lc", torch.stack(per_token), valid)
    counts = expert_counts(selected_experts, probs.shape[-1], valid)
    return torch.cat([sums, counts, torch.einsum("lte,t->le", probs, valid)], dim=1)


class RankCounts:
    """What one rank has counted since the last log. It stays on the device: no step waits for it."""

    def __init__(self, num_layers: int, num_experts: int, device: torch.device, step: int):
        def integers(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=device)

        self.load = integers(num_layers, num_experts)
        # The last step in which each expert got a token; they count as used at the start.
        self.last_used = integers(num_layers, num_experts) + step
        # The step that runs: a tensor, because a number would be a constant of compiled code, compiled anew in each step.
        self.step = integers() + step
        self.impossible = integers(num_layers)  # tokens whose logits allow no choice
        self.sums = torch.zeros(num_layers, 5 + 2 * num_experts, device=device)
        self.gradient_norm = torch.zeros(num_layers, device=device)
        self.gradient_steps = torch.zeros(num_layers)

    def add(self, routing: list[tuple[torch.Tensor, ...]], valid: torch.Tensor, eps: float | None) -> None:
        """Count a micro-batch.

        Args:
            routing: router_logits (T, E), routing_weights (T, K) and selected_experts (T, K) of every layer.
            valid: (T,) float32, 1 for tokens and 0 for padding.
            eps: of the router's mask, to measure in detail; None: only count.
        """
        device = self.load.device
        valid = valid.to(device)
        logits, weights, experts = (torch.stack([part.to(device) for part in parts]) for parts in zip(*routing))
        self.impossible += without_choice(logits, experts.shape[-1]).sum(-1)
        counts = expert_counts(experts, logits.shape[-1], valid).long()
        self.load += counts
        self.last_used = torch.where(counts > 0, self.step, self.last_used)
        if eps is not None:
            self.sums += routing_sums(logits, weights, experts, valid, eps)

    def add_gradients(self, gates: list[nn.Module]) -> None:
        for layer, gate in enumerate(gates):
            # By parts: an adapted router has several parameters.
            norms = [_norm(parameter.grad) for parameter in gate.parameters() if parameter.grad is not None]
            if norms:
                device = self.gradient_norm.device
                self.gradient_norm[layer] += torch.linalg.vector_norm(torch.stack([norm.to(device) for norm in norms]))
                self.gradient_steps[layer] += 1

    def over_all_ranks(self) -> None:
        """Add up what the ranks have: a collective, to be called on all of them."""
        if number_of_ranks() > 1:
            dist.all_reduce(self.load)
            dist.all_reduce(self.sums)
            dist.all_reduce(self.last_used, op=dist.ReduceOp.MAX)

    def reset(self) -> None:
        for counts in (self.load, self.sums, self.gradient_norm, self.gradient_steps):
            counts.zero_()


def _norm(gradient: torch.Tensor) -> torch.Tensor:
    if isinstance(gradient, DTensor):
        gradient = gradient.full_tensor()
    return torch.linalg.vector_norm(gradient.float())
