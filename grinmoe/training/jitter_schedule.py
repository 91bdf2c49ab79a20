"""A Trainer callback that lets the router explore at first: its mask starts wide and narrows to the config's."""

from __future__ import annotations

import math

from torch import nn
from transformers import TrainerCallback

from ..modeling_grinmoe import GrinMoeRouter


class NarrowingMask(TrainerCallback):
    """
    The half-width of the router's mask goes from `start` to the config's `router_jitter_noise` along a half cosine.

    With a narrow mask nearly every draw has one candidate, and a draw with one candidate teaches the router nothing. In
    this project's comparison (docs/numerics.md) a mask that starts wide ends at a lower loss than a narrow or a wide one.
    The width follows from the step, so that a resumed training goes on exactly; the config, and so every checkpoint, has
    the final width all the time. Evaluation during training sees the width of the moment.

    Args:
        start: half-width at the first step, above the config's.
        until: share of the steps after which the mask has the config's width, in (0, 1].

    Raises:
        ValueError: a wrong argument, or a model without a GRIN-MoE router.
    """

    def __init__(self, start: float = 0.5, until: float = 1.0):
        if not 0 < start < math.inf:
            raise ValueError(
                f"start={start} is not a positive number; give the half-width of the first step, such as 0.5"
            )
        if not 0 < until <= 1:
            raise ValueError(f"until={until} is not a share of the steps in (0, 1]; 1 narrows over the whole training")
        self.start, self.until = start, until
        self._routers: list[tuple[GrinMoeRouter, float]] = []

    def width(self, done: float, end: float) -> float:
        """Half-width after a share `done` of all steps, when the config's is `end`."""
        return end + (self.start - end) * 0.5 * (1 + math.cos(math.pi * min(1.0, done / self.until)))

    def on_train_begin(self, args, state, control, model: nn.Module | None = None, **kwargs):
        routers = [module for module in model.modules() if isinstance(module, GrinMoeRouter)] if model else []
        if not routers:
            raise ValueError(f"NarrowingMask is for GRIN-MoE models; {type(model).__name__} has no router of one")
        # From a training that was ended by an error a router may still be wide.
        finals = dict(self._routers)
        self._routers = [(router, finals.get(router, router.jitter_eps)) for router in routers]
        widest = max(end for _, end in self._routers)
        if self.start < widest:
            raise ValueError(f"start={self.start} is narrower than router_jitter_noise={widest}; give more than that")

    def on_step_begin(self, args, state, control, **kwargs):
        for router, end in self._routers:
            router.jitter_eps = self.width(state.global_step / state.max_steps, end)

    def on_train_end(self, args, state, control, **kwargs):
        for router, end in self._routers:
            router.jitter_eps = end
        self._routers = []
