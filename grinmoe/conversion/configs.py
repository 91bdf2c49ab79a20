"""Configs of related models: Mixtral's and phimoe's into ours, and ours into theirs.

All three have the same keys on disk (`checkpoint_grinmoe.official_shapes`), so that what a conversion has to decide is in
config.json: norm, biases, window, gating.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, LlamaConfig, MixtralConfig, Phi3Config, PhimoeConfig, PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.utils import CONFIG_NAME

from ..configuration_grinmoe import FOREIGN_EXTRAS, GrinMoeConfig, check_fields, is_number, read_json_object
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


_CHECKED = {
    *"vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim".split(),
    *"max_position_embeddings num_local_experts num_experts_per_tok num_labels id2label label2id dtype torch_dtype".split(),
    *"auto_map architectures layer_types quantization_config initializer_range tie_word_embeddings".split(),
    *"attention_dropout eos_token_id bos_token_id pad_token_id use_cache".split(),
}


class ConversionError(ValueError):
    """A checkpoint that the target cannot represent."""


class UnequalLogitsError(ConversionError):
    """A conversion whose result does not compute what its source does."""


def load_foreign_config(folder: Path) -> Any:
    """
    The config of another model, by Transformers.

    Raises:
        ConversionError: Transformers refuses it.
    """
    content = read_json_object(folder / CONFIG_NAME, ConversionError)
    if (part := content.get("partial_rotary_factor")) is not None and not (is_number(part, 1, 1.5) and part == 1):
        raise ConversionError(
            f"this {str(content.get('model_type'))[:80]} has no counterpart: partial_rotary_factor={str(part)[:80]}; this "
            "architecture rotates whole heads"
        )
    try:
        # What its classes make lists of, or take as it is, before any weight is looked at.
        check_fields({name: content[name] for name in _CHECKED & content.keys() if content[name] is not None})
        return AutoConfig.from_pretrained(folder)
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        IndexError,
        ArithmeticError,
        StrictDataclassError,
    ) as error:
        raise ConversionError(f"Transformers refuses {folder}/config.json ({error}); correct it") from error


def fields_of_dense(config: PreTrainedConfig) -> dict[str, Any]:
    """
    Fields of our config that a dense model of Llama's kind has, and a Mixtral. Their window counts visible keys.

    A field that the model's class ignores (a window in Llama's config, biases in Mistral's) is ignored here too.

    Raises:
        ConversionError: layers that differ, attention without a causal mask, or a window of one key.
    """
    family, head_dim = config.model_type, getattr(config, "head_dim", None)
    window = None if family == LlamaConfig.model_type else getattr(config, "sliding_window", None)
    if window is not None and window < 2:
        raise ConversionError(
            f"sliding_window={window}: a token of this architecture sees at least 2 keys, itself included; there is no "
            "GRIN-MoE with this window"
        )
    if len(set(getattr(config, "layer_types", None) or ())) > 1:
        raise ConversionError(
            f"layer_types={config.layer_types}: all layers of this architecture have the same attention"
        )
    if not getattr(config, "is_causal", True):
        raise ConversionError("is_causal=false: this architecture has causal attention alone")
    residual_dropout = config.resid_pdrop if family == Phi3Config.model_type else 0.0
    if not 0 <= residual_dropout < 1:
        raise ConversionError(f"resid_pdrop={residual_dropout} is not in [0, 1); correct config.json")
    fields = {name: getattr(config, name) for name in _SHARED_WITH_DENSE}
    fields |= {
        "norm_type": "rms_norm",
        "sliding_window": None if window is None else window - 1,
        "lm_head_bias": False,
        "attention_bias": family == LlamaConfig.model_type and bool(config.attention_bias),
        "attention_dropout": config.attention_dropout or 0.0,  # Llama allows null
        "hidden_dropout": residual_dropout,
        "rope_parameters": _rope_of(config),
    }
    if head_dim is not None and head_dim * config.num_attention_heads != config.hidden_size:
        fields["head_dim"] = head_dim
    return fields


def _rope_of(config: PreTrainedConfig) -> dict[str, Any]:
    """RoPE's fields as the other model's own class reads them, and where Transformers' LongRoPE switches."""
    config = copy.deepcopy(config)
    # A model does it as it is built: what is beside rope_parameters comes in, and overrides what is there.
    config.standardize_rope_params()
    rope = {name: value for name, value in config.rope_parameters.items() if name != "type"}
    if rope["rope_type"] == "longrope":
        # phimoe's scales are nothing to the other classes.
        rope = {name: value for name, value in rope.items() if name not in ("short_mscale", "long_mscale")}
        rope["longrope_switch"] = "above_original"
    return rope


def config_of_fields(fields: dict[str, Any], model_type: str) -> GrinMoeConfig:
    """
    Our config of another model's fields.

    Raises:
        ConversionError: a value that our config refuses.
    """
    try:
        return GrinMoeConfig(**fields)
    except ValueError as error:
        raise ConversionError(f"this {model_type} has no counterpart: {error}") from error


def from_mixtral(config: MixtralConfig) -> GrinMoeConfig:
    """
    The GRIN-MoE that computes what a Mixtral does: RMSNorm, renormalised top-k gating, W visible keys.

    Its `router_jitter_noise` is noise on the block's input in training, our `input_jitter_noise`; our own
    `router_jitter_noise`, the width of the mask, is not used by this gating and gets its default, for those who go on
    training with `router_estimator="sparsemixer_v2"`.

    Raises:
        ConversionError: what this architecture does not have.
    """
    if not 0 <= config.router_jitter_noise < 1:
        raise ConversionError(f"router_jitter_noise={config.router_jitter_noise} is not in [0, 1); correct config.json")
    fields: dict[str, Any] = {
        **{name: getattr(config, name) for name in _SHARED_WITH_MIXTRAL},
        **fields_of_dense(config),
        "router_estimator": "topk_renormalized",
        "input_jitter_noise": config.router_jitter_noise,
        **(getattr(config, FOREIGN_EXTRAS, None) or {}),
    }
    return config_of_fields(fields, config.model_type)


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
        "rope_parameters": _rope_for_mixtral(config),
        "sliding_window": config.visible_keys,
        "head_dim": config.head_size,
        "router_jitter_noise": config.input_jitter_noise,
        FOREIGN_EXTRAS: {name: getattr(config, name) for name in extras},
    }
    return MixtralConfig(**fields)


def _rope_for_mixtral(config: GrinMoeConfig) -> dict[str, Any]:
    """LongRoPE as Mixtral has it: the switch above the original length, and one scale."""
    rope = dict(config.rope_parameters or {})
    if rope["rope_type"] != "longrope":
        return rope
    if (switch := rope.pop("longrope_switch")) != "above_original":
        raise ConversionError(
            f"longrope_switch={switch!r}: Mixtral has 'above_original' alone; serve with `grinmoe serve`"
        )
    short, long = longrope_scales(config)
    if short != long:
        raise ConversionError(
            f"short_mscale={short} and long_mscale={long}: Mixtral has one scale; serve with `grinmoe serve`"
        )
    if scales := rope.keys() & {"short_mscale", "long_mscale"}:
        rope = {name: value for name, value in rope.items() if name not in scales} | {"attention_factor": short}
    return rope


def longrope_scales(config: GrinMoeConfig) -> tuple[float, float]:
    """What cos and sin are multiplied with: up to the original length, and above it."""
    rope = config.rope_parameters or {}
    _, computed = ROPE_INIT_FUNCTIONS["longrope"](config)
    return rope.get("short_mscale", computed), rope.get("long_mscale", computed)


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
    if rope_type == "longrope" and (switch := (config.rope_parameters or {})["longrope_switch"]) != "at_original":
        raise ConversionError(f"longrope_switch={switch!r}: phimoe has 'at_original' alone; serve with `grinmoe serve`")


def _longrope(config: GrinMoeConfig) -> dict[str, Any]:
    """LongRoPE with the two scales written out, which phimoe's config does not compute."""
    rope = {name: value for name, value in (config.rope_parameters or {}).items() if name != "longrope_switch"}
    rope["short_mscale"], rope["long_mscale"] = longrope_scales(config)
    released = {"type": "longrope", **{name: rope[name] for name in ("short_factor", "long_factor")}}
    released |= {name: rope[name] for name in ("short_mscale", "long_mscale", "original_max_position_embeddings")}
    return {
        "rope_parameters": rope,
        "rope_scaling": released,
        "original_max_position_embeddings": rope["original_max_position_embeddings"],
    }
