"""Losses of the router beside the language loss: the balance loss over ranks and an accumulation window, and the z-loss.

Shapes: B batch, S sequence, T = B * S tokens, E experts, K experts per token, L layers.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from .routing_grinmoe import NonFiniteRouterLogitsError, balance_of_counts, expert_counts, number_of_ranks, router_probs


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
        work = None
        if ranks > 1:
            # The compiler has no word for a collective to wait for later, but overlaps a plain one by itself.
            work = dist.all_reduce(message, async_op=not torch.compiler.is_compiling())
        window = self if items is not None and not torch.compiler.is_compiling() else None
        return PendingBalanceLoss(probs, valid, top_k, message, work, ranks, window, ranks_per_batch)

    def add(
        self, counts: torch.Tensor, targets: torch.Tensor, items: torch.Tensor, ranks: int, ranks_per_batch: int
    ) -> torch.Tensor:
        """Enter a micro-batch, all of it summed over ranks. Returns the window's counts before it, (L, E)."""
        if self.counts is None or self.targets is None or self.items is None or self.counts.device != counts.device:
            earlier, before = torch.zeros_like(counts), torch.zeros_like(targets)
        else:
            # Decided on the device: the host need not wait for the counts. Ranks that share a batch count it twice.
            complete = self.targets * ranks >= self.items * ranks_per_batch - 0.5
            anew = complete | (self.items != items)
            earlier, before = self.counts.masked_fill(anew, 0.0), self.targets.masked_fill(anew, 0.0)
        # Without a target a micro-batch has no weight. Counted, it would open the next step's window.
        empty = targets == 0
        self.counts = earlier + counts.masked_fill(empty, 0.0)
        self.targets = before + targets
        self.items = items.clone()
        return earlier


def _scalar(value: torch.Tensor | int, like: torch.Tensor) -> torch.Tensor:
    # nn.DataParallel gives each replica a vector of one number.
    return torch.as_tensor(value, dtype=like.dtype, device=like.device).detach().reshape(-1)[0]


class PendingBalanceLoss:
    """A balance loss whose counts are under way; `finish` waits for them."""

    def __init__(self, probs, valid, top_k, message, work, ranks, window, ranks_per_batch):
        self._probs, self._valid, self._top_k = probs, valid, top_k
        self._message, self._work, self._ranks = message, work, ranks
        self._window, self._ranks_per_batch = window, ranks_per_batch

    def finish(self) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Returns:
            The unscaled balance loss (see [`~routing_grinmoe.load_balancing_loss`], scope `global`), and the share of the
            optimizer step by which it is to be weighted, a mean over ranks.
        """
        if self._work is not None:
            self._work.wait()
        counts, targets, items = self._message[:, :-2], self._message[0, -2], self._message[0, -1]
        earlier = None
        if self._window is not None:
            earlier = self._window.add(counts, targets, items, self._ranks, self._ranks_per_batch).float()
        loss = balance_of_counts(self._probs, self._valid, counts.float(), self._top_k, earlier, self._ranks)
        return loss, (targets / items).float()


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


__all__ = ["BalanceWindow", "PendingBalanceLoss", "router_z_loss"]
