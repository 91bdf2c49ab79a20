"""Preference losses of a router that samples: policy and reference are compared under the same draws.

docs/training.md has the table of TRL's trainers: which of them compare forwards, and which are supported.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from ..configuration_grinmoe import GrinMoeConfig
from ..routing_grinmoe import ESTIMATORS, routing_seed

_SUPPORTED = ("DPOTrainer", "KTOTrainer")
_FUNCTION_DROPOUTS = ("attention_dropout", "hidden_dropout", "expert_dropout")


class SameDrawsForReference(TrainerCallback):
    """
    Gives every forward of a preference loss the same routing draws, input jitter and expert dropout.

    In training a GRIN-MoE samples its experts. TRL's DPOTrainer and KTOTrainer compute the probabilities of the policy and
    of the reference in forwards of their own, whose draws would differ: the loss would compare two routings rather than
    two models, and rewards would not start at zero. A reference model of its own, which TRL runs in evaluation mode,
    would not sample at all; within the loss it follows the policy's mode.

        SameDrawsForReference().attach(trainer)  # a DPOTrainer or KTOTrainer, before or after trainer.train() begins
    """

    def __init__(self):
        self._is_attached = False

    def attach(self, trainer: Any) -> SameDrawsForReference:
        """
        Pair the forwards of `trainer`'s loss from now on. A trainer that is paired already stays as it is.

        With `disable_dropout`, TRL's default, it also sets the model's dropout to 0: TRL looks for dropout modules, and
        the model's are functions.

        Raises:
            ValueError: another trainer than TRL's DPOTrainer and KTOTrainer (subclasses are supported), unless two
                training forwards of its model are equal anyway; a model that has no GRIN-MoE; or settings that
                [`check_paired_forwards`] names.
        """
        decoders = _decoders(trainer.model)
        if not decoders:
            raise ValueError(
                f"the trainer's model is a {type(trainer.model).__name__}, not a GRIN-MoE, whose draws "
                "SameDrawsForReference pairs; leave it out"
            )
        config = decoders[0].config
        if not _is_supported(trainer):
            _check_nothing_to_pair(trainer, config)
        elif not isinstance(trainer.compute_loss, _PairedLoss):
            decoders += _decoders(trainer.ref_model)
            for decoder in decoders:
                check_paired_forwards(decoder.config, trainer.args)
                if (other := _different_draws(decoder.config)) != (own := _different_draws(config)):
                    raise ValueError(
                        f"policy and reference draw by different rules ({own or 'nothing'}; {other or 'nothing'}); give "
                        "both models the same router_estimator, input_jitter_noise and router_capacity_factor"
                    )
            _disable_dropout(trainer, decoders)
            trainer.remove_callback(SameDrawsForReference)  # one that was given to the trainer but not attached
            trainer.add_callback(self)
            trainer.compute_loss = _PairedLoss(trainer)
        self._is_attached = True
        return self

    def on_train_begin(self, args, state, control, **kwargs):
        if not self._is_attached:
            raise ValueError(
                "SameDrawsForReference was given to a trainer as a callback, which pairs nothing; take it out of callbacks "
                "and call SameDrawsForReference().attach(trainer)"
            )


def check_paired_forwards(config: GrinMoeConfig, arguments: Any) -> None:
    """
    Check that policy and reference can be given the same draws.

    Args:
        config: of the policy.
        arguments: a DPOConfig or KTOConfig of TRL.

    Raises:
        ValueError: the reference is computed before training, the model is compiled, or noise comes from torch's own
            generator.
    """
    different = _different_draws(config)
    if arguments.precompute_ref_log_probs and (all_random := different or _nonzero(config, _FUNCTION_DROPOUTS)):
        raise ValueError(
            f"precompute_ref_log_probs=True with {all_random}: the reference would be computed once, under other draws "
            "than the policy's of each step; set precompute_ref_log_probs to False"
        )
    if arguments.torch_compile and different:
        raise ValueError(
            f"torch_compile=True with {different}: compiled forwards draw by themselves, and policy and reference would "
            "differ; leave torch_compile out"
        )
    if arguments.neftune_noise_alpha:
        raise ValueError(
            f"neftune_noise_alpha={arguments.neftune_noise_alpha} adds other noise to the policy than to the reference; "
            "leave it out"
        )
    if not arguments.disable_dropout and (dropout := _nonzero(config, ("attention_dropout", "hidden_dropout"))):
        raise ValueError(
            f"disable_dropout=False with {dropout}: policy and reference would drop different activations; set "
            "disable_dropout to True, or the dropout to 0 (expert_dropout can stay)"
        )


class _SharedDraws:
    """A forward pre-hook that gives one routing seed to all decoders in training mode, and remembers which took it."""

    def __init__(self):
        self.seed: int | None = None
        self.decoders: set[Any] = set()

    def __call__(self, decoder: Any, args: tuple, kwargs: dict[str, Any]):
        if not decoder.training:
            return None
        if self.seed is None:
            device = next(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)).device
            self.seed = routing_seed(device, decoder._ranks_per_batch())
        if self.seed is not None:  # compiled code has none
            self.decoders.add(decoder)
        return args, {**kwargs, "routing_seed": self.seed}


class _PairedLoss:
    """`compute_loss` of a trainer, with the same draws in all of its forwards and new ones at the next call."""

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.compute_loss = trainer.compute_loss

    def __call__(self, *args: Any, **kwargs: Any):
        is_training = self.trainer.model.training
        policy = _decoders(self.trainer.model)
        references = [decoder for decoder in _decoders(self.trainer.ref_model) if decoder not in policy]
        for reference in references:
            reference.train(is_training)
        draws = _SharedDraws()
        hooks = [module.register_forward_pre_hook(draws, with_kwargs=True) for module in policy + references]
        try:
            loss = self.compute_loss(*args, **kwargs)
        finally:
            for hook in hooks:
                hook.remove()
            for reference in references:
                reference.eval()
        if is_training and _different_draws(policy[0].config) and not {*policy, *references} <= draws.decoders:
            raise ValueError(
                "the forwards of this loss were not given the same draws: torch.compile hides them, or the trainer computes "
                "its reference elsewhere; train a model that is not compiled, and the reference within the loss"
            )
        return loss


def _decoders(model: nn.Module | None) -> list[Any]:
    """All `GrinMoeModel`s of a model; by name, because remote code has a class of its own."""
    modules = () if model is None else model.modules()
    return [module for module in modules if any(kind.__name__ == "GrinMoeModel" for kind in type(module).__mro__)]


def _is_supported(trainer: Any) -> bool:
    return any(kind.__name__ in _SUPPORTED and kind.__module__.startswith("trl.") for kind in type(trainer).__mro__)


def _check_nothing_to_pair(trainer: Any, config: GrinMoeConfig) -> None:
    name = type(trainer).__name__
    if different := _different_draws(config) or _nonzero(config, _FUNCTION_DROPOUTS):
        raise ValueError(
            f"{name} is not supported: SameDrawsForReference pairs the forwards of TRL's {' and '.join(_SUPPORTED)}, and "
            f"with {different} two training forwards differ. A trainer that compares no forwards (SFT, Reward, CPO, ORPO) "
            "needs no pairing: leave it out. Otherwise choose one of the two, or a model that draws nothing in training "
            "(docs/training.md)"
        )


def _different_draws(config: GrinMoeConfig) -> str:
    """The fields by which two training forwards of one text differ, dropout aside; empty if they do not."""
    fields = [f"router_estimator={config.router_estimator!r}"] * ESTIMATORS[config.router_estimator].draws
    fields += [_nonzero(config, (name,)) for name in ("input_jitter_noise", "router_capacity_factor")]
    return ", ".join(filter(None, fields))


def _nonzero(config: GrinMoeConfig, names: tuple[str, ...]) -> str:
    return ", ".join(f"{name}={getattr(config, name)}" for name in names if getattr(config, name))


def _disable_dropout(trainer: Any, decoders: list[Any]) -> None:
    """Do what TRL's `disable_dropout` says, or check that what remains can be paired."""
    for module in (module for decoder in decoders for module in decoder.modules()):
        if trainer.args.disable_dropout:
            for name in (*_FUNCTION_DROPOUTS, "dropout"):  # `dropout` of the experts
                if isinstance(vars(module).get(name), float | int):
                    setattr(module, name, 0.0)
        elif isinstance(module, nn.Dropout) and module.p > 0:
            raise ValueError(
                f"disable_dropout=False with a dropout module (p={module.p}), such as lora_dropout: policy and reference "
                "would drop different activations; set disable_dropout to True, or the dropout to 0"
            )
