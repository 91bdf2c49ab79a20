"""Configs of related models: Mixtral's and phimoe's into ours, and ours into theirs.

All three have the same keys on disk (`checkpoint_grinmoe.official_shapes`), so that what a conversion has to decide is in
config.json: norm, biases, window, gating.
"""

from __future__ import annotations

import math
from typing import Any

from transformers import MixtralConfig, PhimoeConfig, PreTrainedConfig

from ..configuration_grinmoe import FOREIGN_EXTRAS, GrinMoeConfig
from ..routing_grinmoe import ESTIMATORS

# Fields that are spelled alike in our config and in those of dense models, of phimoe and of Mixtral.
_SHARED_WITH_DENSE = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads hidden_act "
    "max_position_embeddings initializer_range rms_norm_eps use_cache pad_token_id bos_token_id eos_token_id "
    "tie_word_embeddings attention_dropout"
).split()
_OF_EXPERTS = "num_experts_per_tok num_local_experts output_router_logits router_aux_loss_coef".split()
_SHARED_WITH_PHIMOE = (
    *_SHARED_WITH_DENSE,
    *_OF_EXPERTS,
    *"router_jitter_noise input_jitter_noise attention_bias lm_head_bias".split(),
)
_SHARED_WITH_MIXTRAL = (*_SHARED_WITH_DENSE, *_OF_EXPERTS, *"id2label label2id problem_type dtype".split())
# What others have no field for. They are kept beside its fields, where nothing else reads them, for the way back.
_EXTRAS = (
    "sliding_window router_estimator router_aux_loss_scope router_z_loss_coef router_capacity_factor hidden_dropout "
    "expert_dropout"
).split()
# Under it, how a checkpoint was before tensors were written out for engines that insist on them.
WRITTEN_OUT = "written_out"


class ConversionError(ValueError):
    """A checkpoint that the target cannot represent."""


def fields_of_dense(config: PreTrainedConfig) -> dict[str, Any]:
    """Fields of our config that a dense model of Llama's kind has, and a Mixtral. Their window counts visible keys."""
    window, head_dim = getattr(config, "sliding_window", None), getattr(config, "head_dim", None)
    fields = {name: getattr(config, name) for name in _SHARED_WITH_DENSE}
    fields |= {
        "norm_type": "rms_norm",
        "sliding_window": None if window is None else window - 1,
        "lm_head_bias": False,
    }
    if head_dim is not None and head_dim * config.num_attention_heads != config.hidden_size:
        fields["head_dim"] = head_dim
    return fields


def from_mixtral(config: MixtralConfig) -> GrinMoeConfig:
    """
    The GRIN-MoE that computes what a Mixtral does: RMSNorm, renormalised top-k gating, W visible keys.

    Its `router_jitter_noise` is noise on the block's input in training, our `input_jitter_noise`; our own
    `router_jitter_noise`, the width of the mask, is not used by this gating and gets its default, for those who go on
    training with `router_estimator="sparsemixer_v2"`.
    """
    fields: dict[str, Any] = {
        **{name: getattr(config, name) for name in _SHARED_WITH_MIXTRAL},
        **fields_of_dense(config),
        "rope_parameters": dict(config.rope_parameters or {}),
        "attention_bias": False,
        "router_estimator": "topk_renormalized",
        "input_jitter_noise": config.router_jitter_noise,
        **(getattr(config, FOREIGN_EXTRAS, None) or {}),
    }
    return GrinMoeConfig(**fields)


def to_mixtral(config: GrinMoeConfig) -> MixtralConfig:
    """
    The Mixtral that computes what this model does in evaluation; what it has no field for is kept as in `to_phimoe`.

    Raises:
        ConversionError: a norm, gating or bias that Mixtral does not have.
    """
    wanted = {
        "norm_type": "rms_norm",
        "router_estimator": "topk_renormalized",
        "attention_bias": False,
        "lm_head_bias": False,
    }
    for name, value in wanted.items():
        if (own := getattr(config, name)) != value:
            raise ConversionError(
                f"{name}={own!r}: Mixtral has {value!r} alone; serve this checkpoint with `grinmoe serve`, or by "
                "trust_remote_code"
            )
    extras = (name for name in ("router_jitter_noise", *_EXTRAS) if name not in ("router_estimator", "sliding_window"))
    fields: dict[str, Any] = {
        **{name: getattr(config, name) for name in _SHARED_WITH_MIXTRAL},
        "architectures": ["MixtralForCausalLM"],
        "rope_parameters": dict(config.rope_parameters or {}),
        "sliding_window": config.visible_keys,
        "head_dim": config.head_size,
        "router_jitter_noise": config.input_jitter_noise,
        FOREIGN_EXTRAS: {name: getattr(config, name) for name in extras},
    }
    return MixtralConfig(**fields)


def to_phimoe(config: GrinMoeConfig) -> dict[str, Any]:
    """
    The config.json with which Transformers' phimoe, vLLM and SGLang compute what this model does in evaluation.

    `sliding_window` is the number of visible keys, which is what they read it as; ours is one less. What phimoe has no
    field for (estimator, dropout, losses) is kept under `grinmoe`, for the way back (`GrinMoeConfig.from_pretrained`).

    Raises:
        ConversionError: a norm, gating, number of experts per token or type of RoPE that phimoe does not have.
    """
    _refuse_what_phimoe_has_not(config)
    return phimoe_fields(config)


def phimoe_fields(config: GrinMoeConfig) -> dict[str, Any]:
    """As `to_phimoe`, whatever the config says: for programs whose PhiMoE is another one (llama.cpp).

    It is the config of all tensors that `phimoe.complete` writes out.
    """
    whole = {"attention_bias": True, "lm_head_bias": True, "tie_word_embeddings": False}
    before = {name: getattr(config, name) for name, value in whole.items() if getattr(config, name) != value}
    content: dict[str, Any] = {
        # As in the released Phi-3.5-MoE: vLLM, SGLang and llama.cpp look for it. Transformers goes by model_type.
        "architectures": ["PhiMoEForCausalLM"],
        "model_type": PhimoeConfig.model_type,
        **{name: getattr(config, name) for name in _SHARED_WITH_PHIMOE},
        **whole,
        "sliding_window": config.visible_keys,
        "dtype": None if config.dtype is None else str(config.dtype).removeprefix("torch."),
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "rope_parameters": dict(config.rope_parameters or {}),
        FOREIGN_EXTRAS: {name: getattr(config, name) for name in _EXTRAS},
    }
    if before:
        content[FOREIGN_EXTRAS][WRITTEN_OUT] = before
    if config.head_size * config.num_attention_heads != config.hidden_size:
        content["head_dim"] = config.head_size
    if content["rope_parameters"]["rope_type"] == "longrope":
        content |= _longrope(config)
    return content


def _refuse_what_phimoe_has_not(config: GrinMoeConfig) -> None:
    if config.norm_type != "layer_norm":
        raise ConversionError(
            f"norm_type={config.norm_type!r}: phimoe has LayerNorm alone; serve this checkpoint with `grinmoe serve`, or "
            "by trust_remote_code"
        )
    if "phimoe" not in ESTIMATORS[config.router_estimator].exports_to:
        raise ConversionError(
            f"router_estimator={config.router_estimator!r} routes otherwise than phimoe, which has SparseMixer alone; "
            "train on with 'sparsemixer_v2' before, or serve this checkpoint with `grinmoe serve`"
        )
    if config.num_experts_per_tok != 2:
        raise ConversionError(
            f"num_experts_per_tok={config.num_experts_per_tok}: phimoe ignores the field and takes 2; serve this "
            "checkpoint with `grinmoe serve`"
        )
    rope_type = (config.rope_parameters or {})["rope_type"]
    if rope_type not in ("default", "longrope"):
        raise ConversionError(f"rope_type={rope_type!r}: phimoe has 'default' and 'longrope' alone")


def _longrope(config: GrinMoeConfig) -> dict[str, Any]:
    """LongRoPE with the two scales written out, which phimoe's config does not compute."""
    rope = dict(config.rope_parameters or {})
    original = rope["original_max_position_embeddings"]
    factor = rope.get("factor") or config.max_position_embeddings / original  # as Transformers computes it
    computed = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    for name in ("short_mscale", "long_mscale"):
        rope[name] = rope.get(name) or rope.get("attention_factor") or computed
    released = {"type": "longrope", **{name: rope[name] for name in ("short_factor", "long_factor")}}
    released |= {name: rope[name] for name in ("short_mscale", "long_mscale", "original_max_position_embeddings")}
    return {
        "rope_parameters": rope,
        "rope_scaling": released,
        "original_max_position_embeddings": original,
    }
