"""Losses of the router beside the language loss: the balance loss in its three scopes, and the z-loss.

Shapes: B batch, S sequence, T = B * S tokens, E experts, K experts per token, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist

from .routing_grinmoe import NonFiniteRouterLogitsError, number_of_ranks


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
    return counts.scatter_add(1, chosen.reshape(num_layers, -1), weight)


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


class BalanceWindow:
    """
    Counts of dispatched tokens over all ranks and the micro-batches of an optimizer step so far (GRIN section 3.3).

    A window is what `num_items_in_batch` counts, and complete when its micro-batches have that many target tokens. The
    next one starts from nothing, and so does one with another `num_items_in_batch`. So nothing crosses an optimizer
    step, and resuming needs no state. The first micro-batches of a window see fewer counts than the last: later ones are
    not known yet.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget a window that was left in the middle."""
        self.counts: torch.Tensor | None = None  # (L, E), of the window so far
        self.targets: torch.Tensor | None = None  # target tokens that they stand for, over all ranks
        self.items: torch.Tensor | None = None  # what makes the window complete, summed over all ranks

    def start(
        self,
        router_logits: tuple[torch.Tensor, ...],
        selected_experts: tuple[torch.Tensor, ...],
        top_k: int,
        attention_mask: torch.Tensor | None = None,
        targets: torch.Tensor | int = 1,
        items: torch.Tensor | int | None = None,
        ranks_per_batch: int = 1,
    ) -> PendingBalanceLoss:
        """
        Count a micro-batch and send the counts on their way: one asynchronous collective of (L, E + 2) numbers.

        Args:
            router_logits: one (T, E) per layer.
            selected_experts: one (T, K) per layer.
            top_k: K.
            attention_mask: (B, S) with B * S = T, 1 for tokens; None: every position counts.
            targets: target tokens of this rank's micro-batch.
            items: target tokens of the optimizer step, as every rank counts them: over all ranks (the Trainer's default)
                or each over its own. None: the step is this forward.
            ranks_per_batch: how many ranks share one batch (tensor parallel).
        """
        probs, valid = router_probs(router_logits, attention_mask)
        counts = expert_counts(selected_experts, probs.shape[-1], valid)
        # Whole numbers, exact in float64 for any number of tokens; one device type has no float64.
        counts = counts if counts.device.type == "mps" else counts.double()
        step = torch.stack([_scalar(targets, counts), _scalar(targets if items is None else items, counts)])
        message = torch.cat([counts, step.expand(counts.shape[0], 2)], dim=1)
        ranks = number_of_ranks()
        compiling = torch.compiler.is_compiling()
        work = None
        if ranks > 1:
            # The compiler has no word for a collective to wait for later, but overlaps a plain one by itself.
            work = dist.all_reduce(message, async_op=not compiling)
        window = None if items is None or compiling else self
        return PendingBalanceLoss(probs, valid, top_k, message, work, ranks, ranks_per_batch, window)

    def add(
        self, counts: torch.Tensor, targets: torch.Tensor, items: torch.Tensor, ranks: int, ranks_per_batch: int
    ) -> torch.Tensor:
        """
        Enter a micro-batch. What it decides is decided on the device: the host does not wait for the counts.

        Args:
            counts, targets, items: of the micro-batch, summed over all ranks.
            ranks: how many ranks `items` was summed over, each of which counted the whole step.
            ranks_per_batch: how many ranks counted the same `targets`.

        Returns:
            The window's counts before this micro-batch, (L, E).
        """
        if self.counts is None or self.targets is None or self.items is None or self.counts.device != counts.device:
            earlier_counts, earlier_targets = torch.zeros_like(counts), torch.zeros_like(targets)
        else:
            # Targets per batch and items per rank, brought to one denominator. Both are whole numbers: half of one allows
            # for the rounding of devices that have no float64.
            missing = self.items * ranks_per_batch - self.targets * ranks
            starts_anew = (missing <= 0.5) | (self.items != items)
            earlier_counts = self.counts.masked_fill(starts_anew, 0.0)
            earlier_targets = self.targets.masked_fill(starts_anew, 0.0)
        # A micro-batch without a target has no weight. Counted, it would open the next step's window.
        has_targets = targets != 0
        self.counts = earlier_counts + counts.masked_fill(~has_targets, 0.0)
        self.targets = earlier_targets + targets
        self.items = items.clone()
        return earlier_counts


def _scalar(value: torch.Tensor | int, like: torch.Tensor) -> torch.Tensor:
    # nn.DataParallel gives each replica a vector of one number.
    return torch.as_tensor(value, dtype=like.dtype, device=like.device).detach().reshape(-1)[0]


@dataclass
class PendingBalanceLoss:
    """
    A balance loss whose counts are under way; `finish` waits for them.

    Attributes:
        probs, valid, top_k: of this rank's tokens, see [`balance_of_counts`].
        message: (L, E + 2) counts by expert, target tokens of the micro-batch and of the step; the sum over ranks once
            `work` is done.
        work: the collective, or None where there is nothing to wait for.
        ranks, ranks_per_batch: how many ranks there are, and how many of them share a batch.
        window: takes the counts; None where the step is this one forward.
    """

    probs: torch.Tensor
    valid: torch.Tensor
    top_k: int
    message: torch.Tensor
    work: dist.Work | None
    ranks: int
    ranks_per_batch: int
    window: BalanceWindow | None

    def finish(self) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Returns:
            The unscaled balance loss (see [`load_balancing_loss`], scope `global`), and the share of the optimizer step by
            which it is to be weighted, a mean over ranks.
        """
        if self.work is not None:
            self.work.wait()
        counts, targets, items = self.message[:, :-2], self.message[0, -2], self.message[0, -1]
        earlier_counts = None
        if self.window is not None:
            earlier_counts = self.window.add(counts, targets, items, self.ranks, self.ranks_per_batch).float()
        loss = balance_of_counts(self.probs, self.valid, counts.float(), self.top_k, earlier_counts, self.ranks)
        return loss, (targets / items).float()


class RouterLosses(NamedTuple):
    """The router's losses of one forward.

    Attributes:
        aux_loss: unscaled balance loss.
        z_loss: unscaled z-loss, or None where its coefficient is 0.
        weighted: their sum, times their coefficients and this micro-batch's share of the optimizer step.
    """

    aux_loss: torch.Tensor
    z_loss: torch.Tensor | None
    weighted: torch.Tensor


@dataclass
class PendingRouterLosses:
    """
    The router's losses of one forward, before other ranks' counts have arrived; `finish` waits for them.

    The Trainer adds up the losses of a step's micro-batches: the language loss is divided by the step's
    `num_items_in_batch` and so adds up to a mean. Weighted by their share of those target tokens the router's losses do
    too, and do not grow with gradient accumulation.

    Attributes:
        router_logits: one (T, E) per layer.
        selected_experts: one (T, K) per layer.
        top_k: K.
        attention_mask: (B, S) with B * S = T, or None.
        scope: of the balance loss, where `balance` is None.
        aux_loss_coef, z_loss_coef: weights of the two losses.
        share: of the optimizer step, or None for all of it.
        balance: the balance loss of scope `global`, or None.
    """

    router_logits: tuple[torch.Tensor, ...]
    selected_experts: tuple[torch.Tensor, ...]
    top_k: int
    attention_mask: torch.Tensor | None
    scope: str
    aux_loss_coef: float
    z_loss_coef: float
    share: torch.Tensor | None
    balance: PendingBalanceLoss | None

    def finish(self) -> RouterLosses:
        aux_share = self.share
        if self.balance is not None:
            aux_loss, aux_share = self.balance.finish()
        else:
            aux_loss = load_balancing_loss(
                self.router_logits, self.selected_experts, self.top_k, self.scope, self.attention_mask
            )
        weighted = self.aux_loss_coef * _times(aux_loss, aux_share)
        z_loss = None
        if self.z_loss_coef > 0:
            z_loss = router_z_loss(self.router_logits, self.attention_mask)
            weighted = weighted + self.z_loss_coef * _times(z_loss, self.share)
        return RouterLosses(aux_loss, z_loss, weighted)


def _times(loss: torch.Tensor, share: torch.Tensor | None) -> torch.Tensor:
    return loss if share is None else loss * share.to(loss.device)


def router_z_loss(router_logits: tuple[torch.Tensor, ...], attention_mask: torch.Tensor | None = None) -> torch.Tensor:
    """Mean square of the logits' log-sum-exp over tokens and layers, float32 (ST-MoE, arXiv:2202.08906, Eq. 5).

    Args:
        router_logits: one (T, E) per layer.
        attention_mask: (B, S) with B * S = T, 1 for tokens; None: every position counts.

    Raises:
        NonFiniteRouterLogitsError: logits too large for their square to be finite; on a CPU only, as with
            `routing_grinmoe.check_router_logits`.
    """
    device = router_logits[0].device
    log_z = torch.stack([torch.logsumexp(layer.to(device, torch.float32), dim=-1) for layer in router_logits])  # (L, T)
    if device.type == "cpu" and not torch.compiler.is_compiling():
        for layer, square in enumerate(log_z.detach().square()):
            if not bool(square.isfinite().all()):
                raise NonFiniteRouterLogitsError(
                    "router logits are so large that the z-loss is infinite; lower the learning rate", layer
                )
    if attention_mask is None:
        return log_z.square().mean()
    valid = attention_mask.reshape(-1).to(device, torch.float32)
    return (log_z.square().mean(0) * valid).sum() / valid.sum().clamp(min=1.0)
