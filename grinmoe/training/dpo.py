"""DPO with a router that samples: the reference sees the draws of the policy."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from ..modeling_grinmoe import GrinMoeModel
from ..routing_grinmoe import routing_seed


class SameDrawsForReference(TrainerCallback):
    """
    Gives the reference's forward of a preference loss the routing draws and jitter of the policy's forward before it.

    In training a GRIN-MoE samples its experts. TRL's DPOTrainer computes the policy's and the reference's probabilities in
    two forwards, whose draws would differ: the loss would compare two routings rather than two models, and with a new
    adapter the rewards would not start at zero. With a reference model of its own, which TRL runs in evaluation mode, the
    reference would not sample at all; here it follows the policy's mode.

        SameDrawsForReference().attach(trainer)  # a DPOTrainer, before trainer.train()
    """

    def __init__(self):
        self._seed: int | None = None
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._trainer: Any = None

    def attach(self, trainer: Any) -> SameDrawsForReference:
        """Become a callback of `trainer`."""
        self._trainer = trainer
        trainer.add_callback(self)
        return self

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.remove_hooks()
        policy = _decoder(model)
        self._hooks.append(policy.register_forward_pre_hook(self._before_policy, with_kwargs=True))
        reference = getattr(self._trainer, "ref_model", None)
        if reference is None:  # the policy itself, with its adapter off
            return

        def before_reference(decoder: nn.Module, args, kwargs):
            decoder.train(policy.training)
            return args, kwargs | {"routing_seed": self._seed} if policy.training else kwargs

        self._hooks.append(_decoder(reference).register_forward_pre_hook(before_reference, with_kwargs=True))

    def on_train_end(self, args, state, control, **kwargs):
        self.remove_hooks()

    def remove_hooks(self) -> None:
        """Leave the models as they were. Needed only after a training that an error has ended."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _before_policy(self, decoder: GrinMoeModel, args, kwargs):
        if not decoder.training:
            return args, kwargs
        if torch.is_grad_enabled():
            device = next(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)).device
            self._seed = routing_seed(device, decoder._ranks_per_batch())
        return args, kwargs | {"routing_seed": self._seed}


def _decoder(model: nn.Module) -> GrinMoeModel:
    return next(module for module in model.modules() if isinstance(module, GrinMoeModel))
