"""Losses of the router beside the language loss: the balance loss over ranks and an accumulation window, and the z-loss.

Shapes: B batch, S sequence, T = B * S tokens, E experts, K experts per token, L layers.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from .routing_grinmoe import balance_of_counts, expert_counts, number_of_ranks, router_probs


class BalanceWindow:
    """
    Counts of dispatched tokens over all ranks and the micro-batches of an optimizer step so far (GRIN section 3.3).

    A window is what `num_items_in_batch` counts: it is complete when the shares of its micro-batches add up to 1, and the
    next one starts from nothing. So nothing crosses an optimizer step, and resuming needs no state. The first
    micro-batches of a window see fewer counts than the last: later ones are not known yet.
    """

    def __init__(self) -> None:
        self.counts: torch.Tensor | None = None  # (L, E), of the window so far
        self.share: torch.Tensor | None = None  # scalar, of the window that they are

    def start(
        self,
        router_logits: tuple[torch.Tensor, ...],
        selected_experts: tuple[torch.Tensor, ...],
        top_k: int,
        attention_mask: torch.Tensor | None = None,
        share: torch.Tensor | None = None,
        ranks_per_batch: int = 1,
    ) -> PendingBalanceLoss:
        """
        Count a micro-batch and send the counts on their way: one asynchronous collective of (L, E + 1) float32.

        Args:
            router_logits: one (T, E) per layer.
            selected_experts: one (T, K) per layer.
            top_k: K.
            attention_mask: (B, S) with B * S = T, 1 for tokens; None: every position counts.
            share: scalar, this rank's micro-batch as a share of the step's tokens, which every rank counts in the same
                way: over all ranks (the Trainer's default) or each over its own. None: the step is this forward.
            ranks_per_batch: how many ranks share one batch (tensor parallel).
        """
        probs, valid = router_probs(router_logits, attention_mask)
        counts = expert_counts(selected_experts, probs.shape[-1], valid)
        column = torch.ones_like(valid[:1]) if share is None else share.detach().to(counts).reshape(1)
        message = torch.cat([counts, column.expand(counts.shape[0], 1)], dim=1)
        ranks = number_of_ranks()
        work = None
        if ranks > 1:
            # The compiler has no word for a collective to wait for later, but overlaps a plain one by itself.
            work = dist.all_reduce(message, async_op=not torch.compiler.is_compiling())
        window = self if share is not None and not torch.compiler.is_compiling() else None
        return PendingBalanceLoss(probs, valid, top_k, message, work, ranks, window, ranks_per_batch)

    def add(self, counts: torch.Tensor, share: torch.Tensor, ranks_per_batch: int) -> torch.Tensor | None:
        """Enter a micro-batch: its counts (L, E) and share, over all ranks. Returns the window's counts before it."""
        earlier = None
        # Decided on the device: the host need not wait for the counts.
        if self.counts is not None and self.share is not None and self.counts.device == counts.device:
            goes_on = (self.share < ranks_per_batch - 1e-5).float()
            earlier = goes_on * self.counts
            share = share + goes_on * self.share
        self.counts = counts if earlier is None else earlier + counts
        self.share = share
        return earlier


class PendingBalanceLoss:
    """A balance loss whose counts are under way; `finish` waits for them."""

    def __init__(self, probs, valid, top_k, message, work, ranks, window, ranks_per_batch):
        self._probs, self._valid, self._top_k = probs, valid, top_k
        self._message, self._work, self._ranks = message, work, ranks
        self._window, self._ranks_per_batch = window, ranks_per_batch

    def finish(self) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Returns:
            The unscaled balance loss (see [`~routing_grinmoe.load_balancing_loss`], scope `global`), and the mean of the
            ranks' shares, by which it is to be weighted.
        """
        if self._work is not None:
            self._work.wait()
        counts, share = self._message[:, :-1], self._message[0, -1]
        earlier = None if self._window is None else self._window.add(counts, share, self._ranks_per_batch)
        loss = balance_of_counts(self._probs, self._valid, counts, self._top_k, earlier, self._ranks)
        return loss, share / self._ranks


def router_z_loss(router_logits: tuple[torch.Tensor, ...], attention_mask: torch.Tensor | None = None) -> torch.Tensor:
    """Mean square of the logits' log-sum-exp over tokens and layers, float32 (ST-MoE, arXiv:2202.08906, Eq. 5).

    Args:
        router_logits: one (T, E) per layer.
        attention_mask: (B, S) with B * S = T, 1 for tokens; None: every position counts.
    """
    device = router_logits[0].device
    log_z = torch.stack([torch.logsumexp(layer.to(device, torch.float32), dim=-1) for layer in router_logits])  # (L, T)
    if attention_mask is None:
        return log_z.square().mean()
    valid = attention_mask.reshape(-1).to(device, torch.float32)
    return (log_z.square().mean(0) * valid).sum() / valid.sum().clamp(min=1.0)


__all__ = ["BalanceWindow", "PendingBalanceLoss", "router_z_loss"]
