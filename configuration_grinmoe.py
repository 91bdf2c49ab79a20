"""Configuration of GRIN-MoE: the fields of the released config.json, their defaults and their validation.

The defaults are those of the released model (16 x 3.8B experts, top-2, 42B parameters). A ``phimoe`` config
(Phi-3.5-MoE: the same network with LongRoPE) converts into this one.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import json
import math
import operator
import os
import re
import reprlib
import stat
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn

from transformers import MixtralConfig, PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.utils import logging

from .routing_grinmoe import ESTIMATORS

logger = logging.get_logger(__name__)

NORM_TYPES = ("layer_norm", "rms_norm")
ROUTER_AUX_LOSS_SCOPES = ("released", "local", "global")

# What each type of RoPE needs, and what it may have, besides rope_theta: by the names that Transformers reads.
_ORIGINAL = "original_max_position_embeddings"
_ROPE_FIELDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "yarn": (
        ("factor", _ORIGINAL),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", _ORIGINAL), ()),
    "longrope": (
        ("short_factor", "long_factor", _ORIGINAL, "longrope_switch"),
        ("factor", "attention_factor", "short_mscale", "long_mscale"),
    ),
}
# The longest row of a batch has the long factors from L = original_max_position_embeddings tokens on (GRIN-MoE, phimoe),
# or from L + 1 on (Phi-3, and every other model of Transformers).
LONGROPE_SWITCHES = ("at_original", "above_original")
# Fields of RoPE that a config may have beside rope_parameters (or rope_scaling, its older name).
_FLAT_ROPE = ("rope_theta", _ORIGINAL, "partial_rotary_factor")
_NOT_NUMBERS = {"rope_type", "truncate", "short_factor", "long_factor", "longrope_switch"}
# Factors, scales and betas of RoPE.
_ROPE_NUMBER = (1e-6, 1e6, "")

# Numbers: the lowest value, the highest (of integers; floats stay below it), and what null means where it is allowed. The
# upper bounds are far above any model and low enough that nothing made of a config's fields alone exhausts a machine.
_NUMBERS: dict[str, tuple[float, float, str]] = {
    "vocab_size": (1, 2**24, ""),
    "hidden_size": (1, 2**17, ""),
    "intermediate_size": (1, 2**20, ""),
    **dict.fromkeys(("num_hidden_layers", "num_attention_heads", "num_key_value_heads"), (1, 2**12, "")),
    **dict.fromkeys(("num_local_experts", "num_experts_per_tok"), (1, 2**14, "")),
    "head_dim": (1, 2**14, ", or leave it out"),
    "max_position_embeddings": (1, 2**31, ""),
    "original_max_position_embeddings": (2, 2**31, ", or leave it out"),
    "sliding_window": (1, 2**31, ", or None for full attention"),
    "num_labels": (1, 2**17, ", or leave it out"),
    "chunk_size_feed_forward": (0, 2**31, ""),
    "initializer_range": (0.0, 100.0, ""),
    "rms_norm_eps": (1e-30, 1.0, ""),
    "rope_theta": (1.1, 1e15, ", or leave it out"),
    **dict.fromkeys(("router_jitter_noise", "router_aux_loss_coef", "router_z_loss_coef"), (0.0, 1e4, "")),
    **dict.fromkeys(("input_jitter_noise", "attention_dropout", "hidden_dropout", "expert_dropout"), (0.0, 1.0, "")),
    "router_capacity_factor": (1e-3, 1e6, ", or None to drop no token"),
}


def is_int(value: Any, low: float = 0, high: float = 2**31) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def is_number(value: Any, low: float = -math.inf, high: float = math.inf) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value < high


def is_one_of(*types: type) -> Callable[[Any], bool]:
    return lambda value: value is None or isinstance(value, types)


def is_dict_of(is_key: Callable[[Any], bool], is_value: Callable[[Any], bool]) -> Callable[[Any], bool]:
    def is_right(value: Any) -> bool:
        return len(value) <= 2**17 and all(is_key(k) and is_value(v) for k, v in value.items())

    return lambda value: value is None or (isinstance(value, dict) and is_right(value))


def is_list_of(is_entry: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or (isinstance(value, (list, tuple)) and all(map(is_entry, value)))


def is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_label_id(value: Any) -> bool:  # JSON has only texts as keys
    return is_int(value) or (is_text(value) and value.isascii() and value.isdecimal() and len(value) < 10)


def _is_reference(value: Any) -> bool:  # a tokenizer has two, of which one may be null
    return is_text(value) or (isinstance(value, (list, tuple)) and all(map(is_one_of(str), value)))


TOKEN_IDS = (lambda value: is_int(value) or is_list_of(is_int)(value), "a token's id, a list of them or null")
_IS_LABEL: Callable[[Any], bool] = lambda value: is_one_of(str, int)(value) and not isinstance(value, bool)  # noqa: E731
# Fields that are not numbers: what is right, and how to say it.
_FORMS: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(
        "use_cache attention_bias lm_head_bias tie_word_embeddings output_router_logits is_encoder_decoder".split(),
        (lambda value: isinstance(value, bool), "True or False"),
    ),
    **dict.fromkeys(
        ("output_hidden_states", "output_attentions", "return_dict"),
        (is_one_of(bool), "True, False or null"),
    ),
    **dict.fromkeys(
        ("transformers_version", "_name_or_path", "tokenizer_class"),
        (is_one_of(str), "a text or null"),
    ),
    **dict.fromkeys(
        ("attn_implementation", "experts_implementation", "_attn_implementation", "_experts_implementation"),
        (is_one_of(str, dict), "a name or null"),
    ),
    "name_or_path": (is_one_of(str, os.PathLike), "a text or null"),
    **dict.fromkeys(("architectures", "layer_types", "mlp_layer_types"), (is_list_of(is_text), "a list of texts")),
    **dict.fromkeys(
        ("dtype", "torch_dtype"),
        (
            lambda value: (
                value is None or str(value).removeprefix("torch.") in ("bfloat16", "float16", "float32", "float64")
            ),
            "bfloat16, float16, float32 or float64",
        ),
    ),
    "problem_type": (
        lambda value: value in (None, "regression", "single_label_classification", "multi_label_classification"),
        "regression, single_label_classification, multi_label_classification or null",
    ),
    "id2label": (is_dict_of(_is_label_id, _IS_LABEL), "a map of ids to at most 131,072 labels"),
    "label2id": (is_dict_of(_IS_LABEL, _is_label_id), "a map of at most 131,072 labels to ids"),
    "auto_map": (is_dict_of(is_text, _is_reference), "a map of Auto classes to file.Class"),
    "per_layer_config": (lambda value: value in (None, {}), "left out: all layers of this model are alike"),
    "quantization_config": (lambda value: hasattr(value, "to_dict") or is_one_of(dict)(value), "an object or null"),
    "eos_token_id": TOKEN_IDS,
}
_TOKEN_ID = (lambda value: value is None or is_int(value), "a token's id, an integer of at least 0, or null")
# Fields of the library, which acts on them at once: it makes a list of num_labels, and some versions raise a TypeError.
_CHECKED_WHEN_ASSIGNED = {"num_labels", "chunk_size_feed_forward", *_FORMS} - {"dtype", "torch_dtype"}

# Fields of related models that this one does not have, each with the value that asks for nothing. null asks for nothing too.
_FOREIGN_FIELDS: dict[str, Any] = {
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "shared_expert_intermediate_size"), 0),
    **dict.fromkeys(("resid_pdrop", "embd_pdrop", "resid_dropout", "embd_dropout"), 0),
    **dict.fromkeys(("mlp_bias", "moe_bias", "qk_norm", "use_qk_norm", "qk_layernorm", "parallel_attn"), False),
    **dict.fromkeys(("n_group", "topk_group", "routed_scaling_factor", "moe_layer_freq", "decoder_sparse_step"), 1),
    **dict.fromkeys(("embedding_multiplier", "residual_multiplier", "logits_scaling", "logit_scale"), 1),
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping", "router_logit_softcapping", "clip_qkv")),
    **dict.fromkeys(("attention_chunk_size", "no_rope_layers", "no_rope_layer_interval", "sliding_window_pattern")),
    **dict.fromkeys(("max_window_layers", "attention_multiplier", "query_pre_attn_scalar", "swiglu_limit")),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "rope_local_base_freq", "num_nextn_predict_layers"), 0),
    **dict.fromkeys(("alibi", "rope_interleave", "attn_temperature_tuning"), False),
    "is_causal": True,
    "scoring_func": "softmax",
}
# Other models' names of our fields that a search for similar names does not find.
_OTHER_NAMES = {
    **dict.fromkeys(("n_layer", "n_layers", "num_layers"), "num_hidden_layers"),
    **dict.fromkeys(("n_head", "n_heads", "num_heads"), "num_attention_heads"),
    **dict.fromkeys(("n_embd", "d_model"), "hidden_size"),
    **dict.fromkeys(("d_ff", "ffn_dim", "n_inner"), "intermediate_size"),
    **dict.fromkeys(("n_routed_experts", "num_moe_experts"), "num_local_experts"),
    **dict.fromkeys(("moe_top_k", "moe_k", "num_selected_experts"), "num_experts_per_tok"),
    **dict.fromkeys(("n_positions", "n_ctx", "max_seq_len", "max_sequence_length"), "max_position_embeddings"),
    **dict.fromkeys(("rope_base", "rotary_emb_base"), "rope_theta"),
    **dict.fromkeys(("qkv_bias", "use_bias"), "attention_bias"),
    **dict.fromkeys(("window_size", "attention_window"), "sliding_window"),
    **dict.fromkeys(("activation_function", "hidden_activation"), "hidden_act"),
}

# Values that a phimoe config.json may leave out mean phimoe's own defaults, which differ from ours.
_PHIMOE_DEFAULTS: dict[str, Any] = {
    "max_position_embeddings": 4096 * 32,
    "rope_theta": 1e6,
    "sliding_window": None,
    "attention_bias": False,
    "lm_head_bias": False,
    "input_jitter_noise": 0.0,
    "router_aux_loss_coef": 0.001,
    "eos_token_id": 2,
}

# Where an export (to phimoe, to Mixtral) keeps our fields that the other model has not.
FOREIGN_EXTRAS = "grinmoe"

# Auto class -> "file.Class" for checkpoints that carry the flat remote-code files.
AUTO_MAP = {
    "AutoConfig": "configuration_grinmoe.GrinMoeConfig",
    "AutoModel": "modeling_grinmoe.GrinMoeModel",
    "AutoModelForCausalLM": "modeling_grinmoe.GrinMoeForCausalLM",
    "AutoModelForSequenceClassification": "modeling_grinmoe.GrinMoeForSequenceClassification",
}


# Bounds of the JSON that others write. The index of a model with 100,000 tensors has about 10 MB; a config has a few levels.
MAX_JSON_BYTES = 16 * 2**20
_MAX_JSON_DEPTH = 64


def read_json_object(
    file: str | os.PathLike,
    error_class: type[Exception] = ValueError,
    remedy: str = "take the original file again",
    max_bytes: int = MAX_JSON_BYTES,
    allow_nan: bool = False,
) -> dict[str, Any]:
    """
    Read a JSON file that holds an object. Every reader of JSON that others have written uses this function.

    Args:
        file: a regular file, or a link to one.
        error_class: raised for every fault; its message names the file and the reason, and ends with `remedy`.
        remedy: what the user can do.
        max_bytes: largest size of the file.
        allow_nan: take NaN and Infinity, which `json.dumps` writes and standard JSON does not have.

    Raises:
        error_class: the file is missing, unreadable, too large, or not a regular file (a FIFO or a device would block); it
            is not UTF-8 or not JSON; it holds something other than an object, one key twice, more than 64 levels, a number
            beyond 64 bits, NaN, Infinity or half of a surrogate pair.
    """

    def refuse_constant(name: str) -> NoReturn:
        raise ValueError(f"it holds {name}, which is not standard JSON")

    numbers: dict[str, Any] = {"parse_int": _json_int, "parse_float": _json_float}
    if not allow_nan:
        numbers["parse_constant"] = refuse_constant
    try:
        content = json.loads(_json_text(file, max_bytes), object_pairs_hook=_without_repetition, **numbers)
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}, not a JSON object")
        _check_json(content)
        return content
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        if isinstance(error, RecursionError):
            reason = f"it has more than {_MAX_JSON_DEPTH} levels"
        elif isinstance(error, json.JSONDecodeError):
            reason = f"it is not JSON ({error})"
        raise error_class(f"{os.fspath(file)} cannot be read: {reason}; {remedy}") from error


def _json_text(file: str | os.PathLike, max_bytes: int) -> str:
    # Without O_NONBLOCK, opening a FIFO waits for a writer.
    with open(os.open(file, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)), "rb") as opened:
        if not stat.S_ISREG(os.fstat(opened.fileno()).st_mode):
            raise ValueError("it is not a regular file")
        data = opened.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise ValueError(f"it is larger than {max_bytes:,} bytes")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 ({error.reason} at byte {error.start})") from error


def _json_int(digits: str) -> int:
    # The length first: Python takes quadratic time for long ones, and refuses those of more than 4,300 digits.
    if len(digits) > 20 or not -(2**63) <= (value := int(digits)) < 2**64:
        raise ValueError(f"it holds the integer {digits[:24]}, which has more than 64 bits")
    return value


def _json_float(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise ValueError(f"it holds the number {digits[:20]}, which is too large")
    return value


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"it names {ascii(twice)[1:-1]:.200} twice")
    return result


def _check_json(content: dict[str, Any]) -> None:
    """Bound the depth, which Python's copies and printers recurse into, and refuse strings that UTF-8 cannot write."""
    level: list[Any] = [content]
    for _ in range(_MAX_JSON_DEPTH + 1):
        below: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                below += value
                below += value.values()
            elif isinstance(value, list):
                below += value
            elif isinstance(value, str) and not value.isascii() and any("\ud800" <= char <= "\udfff" for char in value):
                raise ValueError(f"the text {value[:40]!r} holds half of a surrogate pair")
        if not below:
            return
        level = below
    raise RecursionError


def _plan_of_mixtral(plan: dict[str, Any]) -> dict[str, Any]:
    """Mixtral's sharding plan under this model's module names: same modules, and the plan of the installed version."""
    return {name.replace(".mlp.", ".block_sparse_moe."): style for name, style in plan.items()}


class GrinMoeConfig(PreTrainedConfig):
    r"""
    Configuration of [`GrinMoeModel`] and its heads. Keyword arguments only; every wrong value is a `ValueError` that
    names the field, the value and the remedy.

    Args:
        vocab_size, hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, num_key_value_heads (`int`):
            Sizes. `intermediate_size` is the width I of one expert.
        hidden_act (`str`): activation of the experts' gate half.
        max_position_embeddings (`int`): longest sequence that the model was trained for.
        head_dim (`int`): size of one attention head where it is not `hidden_size / num_attention_heads` (Phi-tiny-MoE).
        norm_type (`str`):
            `"layer_norm"`, LayerNorm with bias, as released; or `"rms_norm"`, for models that began as others (Mixtral, or
            a dense model whose feed-forward was copied).
        rms_norm_eps (`float`): eps of the norms, of whichever type; the released name is kept.
        attention_bias, lm_head_bias (`bool`): biases of q, k, v, o and of the language head.
        sliding_window (`int` or `None`):
            W as the released file spells it. A token sees **W + 1** keys, itself included (the released code's mask and
            flash-attention call agree on that; see [`~GrinMoeConfig.get_text_config`]). `None` is full attention.
        num_local_experts, num_experts_per_tok (`int`): E and K, the experts and how many of them a token uses.
        router_estimator (`str`):
            Gradient estimator of the router, one of `routing_grinmoe.ESTIMATORS`. Evaluation is the same greedy routing for
            all but three: `sparsemixer_v2_star` halves the logits, `topk` is GShard's gating (no mask), and
            `topk_renormalized` Mixtral's (weights that sum to 1).
        router_jitter_noise (`float`): half-width eps of the router's mask (MaskedSoftmax), in training and evaluation.
        input_jitter_noise (`float`): in training the MoE block's input is multiplied by U(1 - eps, 1 + eps).
        router_aux_loss_coef (`float`):
            Weight of the balance loss. Non-zero: it is part of the language model's training loss.
        router_aux_loss_scope (`str`):
            `"released"` pools the tokens of all layers and counts the plain top-k of the softmax; `"local"` counts, per
            layer, the experts that were actually used; `"global"` sums those counts over data-parallel ranks and the
            accumulation window, in training (evaluation counts locally: ranks go at their own pace there).
        router_z_loss_coef (`float`): weight of the router z-loss (ST-MoE), which keeps router logits small.
        router_capacity_factor (`float` or `None`):
            For comparison with GShard and Switch only: in training an expert takes at most this many times an even
            share of the choices, and the rest are dropped. `None`, the default, drops nothing.
        output_router_logits (`bool`): return router logits, selected experts and the balance loss.
        attention_dropout, hidden_dropout (`float`):
            Dropout of attention probabilities, and of both blocks' outputs before the residual sum.
        expert_dropout (`float`): dropout inside of the experts, of their activations before the down projection.
        rope_parameters (`dict`):
            RoPE type and parameters, in the one spelling that is kept. `rope_scaling`, `type` and values beside the dict
            (`rope_theta`, `original_max_position_embeddings`) are taken too; two that contradict each other are an error.
            `longrope` takes `short_mscale`, `long_mscale`, and `longrope_switch`: `"at_original"` (the long factors hold
            from `original_max_position_embeddings` tokens on, as released) or `"above_original"` (as in Phi-3).
        initializer_range, use_cache, tie_word_embeddings, bos_token_id, eos_token_id, pad_token_id: as everywhere.
    """

    model_type = "grinmoe"
    keys_to_ignore_at_inference = [
        "cache",
        "past_key_values",
        "router_logits",
        "selected_experts",
        "aux_loss",
        "z_loss",
    ]
    attribute_map = {"num_experts": "num_local_experts"}
    default_theta = 10000.0
    # The library's own check does not know them.
    ignore_keys_at_rope_validation = {"short_mscale", "long_mscale", "longrope_switch"}

    base_model_tp_plan = _plan_of_mixtral(MixtralConfig.base_model_tp_plan)
    base_model_ep_plan = _plan_of_mixtral(MixtralConfig.base_model_ep_plan)
    base_model_pp_plan = MixtralConfig.base_model_pp_plan
    base_model_fsdp_plan = MixtralConfig.base_model_fsdp_plan

    vocab_size: int = 32064
    hidden_size: int = 4096
    intermediate_size: int = 6400
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    hidden_act: str = "silu"
    max_position_embeddings: int = 4096
    initializer_range: float = 0.02
    norm_type: str = "layer_norm"
    rms_norm_eps: float = 1e-5
    use_cache: bool = True
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 32000
    pad_token_id: int | None = None
    tie_word_embeddings: bool = False
    rope_parameters: dict | None = None
    sliding_window: int | None = 2047
    attention_bias: bool = True
    lm_head_bias: bool = True
    attention_dropout: float | int = 0.0
    hidden_dropout: float | int = 0.0
    expert_dropout: float | int = 0.0
    num_local_experts: int = 16
    num_experts_per_tok: int = 2
    router_estimator: str = "sparsemixer_v2"
    router_jitter_noise: float | int = 0.01
    input_jitter_noise: float | int = 0.01
    router_aux_loss_coef: float | int = 0.0
    router_aux_loss_scope: str = "released"
    router_z_loss_coef: float | int = 0.0
    router_capacity_factor: float | int | None = None
    output_router_logits: bool = False

    def __post_init__(self, **kwargs):
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if (head_dim := kwargs.pop("head_dim", None)) is not None:
            self.head_dim = head_dim
        if (experts := kwargs.pop("num_experts", None)) is not None:
            if self.num_local_experts not in (experts, type(self).num_local_experts):
                raise ValueError(
                    f"num_experts={experts!r} contradicts num_local_experts={self.num_local_experts!r}; give one"
                )
            self.num_local_experts = experts
        _check_names_of_class(kwargs)
        self._check_fields({**self.__dict__, **kwargs})  # what follows assumes sane values
        if kwargs.get("num_labels", 2) is None:
            del kwargs["num_labels"]
        super().__post_init__(**kwargs)
        self.check()
        if getattr(self, "auto_map", None):
            self.auto_map = _completed_auto_map(self.auto_map)

    def convert_rope_params_to_dict(self, **kwargs: Any) -> dict[str, Any]:
        """The library's hook: RoPE's fields leave `kwargs`, whatever their spelling, and become `rope_parameters`."""
        spelled = _take_rope(kwargs := {"rope_parameters": self.rope_parameters, **kwargs})
        self.__dict__["rope_parameters"] = self._one_spelling({"rope_theta": self.default_theta, **spelled})
        return kwargs

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "dtype" and isinstance(value, str):
            value = value.removeprefix("torch.")  # str(torch.bfloat16), which the library cannot read
        if name in _CHECKED_WHEN_ASSIGNED:
            check_fields({name: value})
        # One spelling is kept, also of what is assigned. The first assignment, of the constructor, is converted above.
        if "rope_parameters" in self.__dict__:
            own = self.__dict__["rope_parameters"] or {}
            if name == _ORIGINAL and _ORIGINAL not in own:
                raise ValueError(
                    f"{name}={value!r}: rope_type={own.get('rope_type')!r} has none; assign rope_parameters"
                )
            if name in _FLAT_ROPE:
                name, value = "rope_parameters", {**own, name: value}
            if name == "rope_parameters":
                theta = own.get("rope_theta", self.default_theta)
                value = self._one_spelling({"rope_theta": theta, **_take_rope({name: value})})
        super().__setattr__(name, value)

    def _one_spelling(self, rope: dict[str, Any]) -> dict[str, Any]:
        """RoPE's fields with what the type implies, and without what says nothing. Wrong values stay, for `check`."""
        rope = {"rope_type": "default", **rope}
        if rope["rope_type"] == "su":  # its name in the first files of Phi-3
            rope["rope_type"] = "longrope"
        required, _ = _ROPE_FIELDS.get(str(rope["rope_type"]), ((), ()))
        if _ORIGINAL in required:
            rope.setdefault(_ORIGINAL, self.max_position_embeddings)
        elif rope["rope_type"] in ("default", "linear") or rope.get(_ORIGINAL) == self.max_position_embeddings:
            check_fields({_ORIGINAL: rope.pop(_ORIGINAL, None)})
        if "longrope_switch" in required:
            rope.setdefault("longrope_switch", LONGROPE_SWITCHES[0])
        if is_number(rope.get("partial_rotary_factor"), 1, 1.5) and rope["partial_rotary_factor"] == 1:
            del rope["partial_rotary_factor"]
        return rope

    @property
    def head_size(self) -> int:
        """Size of one attention head."""
        # No field of its own: where it is absent, library code takes the quotient, and would take a None as it is.
        return self.__dict__.get("head_dim") or self.hidden_size // self.num_attention_heads

    @property
    def rope_theta(self) -> float:
        """Base of RoPE, under the released file's flat name. Assigning it changes `rope_parameters`."""
        return self.__dict__["rope_parameters"]["rope_theta"]

    @property
    def original_max_position_embeddings(self) -> int:
        """As in `rope_parameters`, for library code that looks for it here; no attribute where RoPE's type has none."""
        rope = self.__dict__["rope_parameters"]
        if _ORIGINAL not in rope:
            raise AttributeError(f"rope_type={rope['rope_type']!r} has no {_ORIGINAL}")
        return rope[_ORIGINAL]

    @property
    def visible_keys(self) -> int | None:
        """How many keys a token sees, itself included: `sliding_window + 1`, or `None` for full attention."""
        return None if self.sliding_window is None else self.sliding_window + 1

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> GrinMoeConfig:
        """
        This config itself; with `decoder=True`, the view of it that sizes masks and caches.

        Transformers takes `sliding_window = W` to mean W visible keys, the released checkpoint means W + 1. Library
        code that sizes caches and generation masks asks for the decoder's config, so it gets a view of this config
        (same `__dict__`, so that writes go through) whose `sliding_window` is the number of visible keys. Without an
        argument the answer is the config itself, as for every text model: engines take any other for a multimodal one.
        """
        if self.sliding_window is None or not decoder:
            return self
        view = object.__new__(_VisibleKeysConfig)
        view.__dict__ = self.__dict__
        return view

    @classmethod
    def get_config_dict(cls, *args, **kwargs) -> tuple[dict[str, Any], dict[str, Any]]:
        """A config.json's content, converted if it is a phimoe one."""
        config_dict, kwargs = super().get_config_dict(*args, **kwargs)
        return _of_this_model(config_dict), kwargs

    @classmethod
    def _dict_from_json_file(cls, json_file: str | os.PathLike) -> dict[str, Any]:
        """The library's hook: every config.json that it reads for this class."""
        content = read_json_object(json_file, remedy="correct it, or take the original file again")
        if not is_list_of(is_text)(files := content.get("configuration_files")):
            raise ValueError(f"{json_file}: configuration_files={_shown(files)} must be a list of names; leave it out")
        return cls._decode_special_floats(content)

    @classmethod
    def from_json_file(cls, json_file: str | os.PathLike) -> GrinMoeConfig:
        """As `from_pretrained` of a file; the library's does not look at `model_type`."""
        return cls.from_dict(cls._dict_from_json_file(json_file))

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """
        Build from a config.json's content. `model_type` must be `grinmoe`, or `phimoe`, which is converted. Keyword
        arguments override fields.

        Raises:
            ValueError: another `model_type`, or a wrong value.
        """
        # The library assigns overrides to the finished config. As part of the content they are checked and standardised.
        overrides = {name: kwargs.pop(name) for name in _FIELDS if name in kwargs}
        if not isinstance(config_dict, Mapping):
            raise ValueError(f"the config is {_shown(config_dict)}, not a JSON object; give that of a checkpoint")
        content = {**_of_this_model(config_dict)}
        _check_names_of_class(content)
        rope = _take_rope(content)
        if overrides.keys() & {"rope_parameters", "rope_scaling"}:  # an override replaces the file's dict
            rope = {"rope_theta": rope.get("rope_theta")}
        rope |= _take_rope(overrides)
        if "num_experts" in overrides:
            content.pop("num_local_experts", None)
        _check_names({name: value for name, value in kwargs.items() if not hasattr(PreTrainedConfig, name)}, content)
        result = super().from_dict({**content, **overrides, "rope_parameters": rope}, **kwargs)
        config = result[0] if isinstance(result, tuple) else result
        config.check()  # the other overrides
        return result

    @classmethod
    def from_phimoe(cls, config: PreTrainedConfig) -> GrinMoeConfig:
        """Convert Transformers' `PhimoeConfig` (Phi-3.5-MoE): same network, LongRoPE and its own defaults."""
        return cls.from_dict({**config.to_dict(), "model_type": "phimoe"})

    def check(self) -> None:
        """
        Hold all fields against each other. The constructor does it, and so does a model that is built from this config:
        what was assigned in between is checked too.

        Raises:
            ValueError: names the field, its value and the remedy.
        """
        self._check_fields(self.__dict__)
        self.rope_parameters = self.rope_parameters  # an edit inside of the dict is put into the one spelling
        _check_rope(self.rope_parameters or {}, self.head_size)
        _check_names(self.__dict__, self.__dict__)
        self._check_foreign_fields()

    def _check_foreign_fields(self) -> None:
        """What related models have and this one does not must ask for nothing."""
        windowed = self.sliding_window is not None
        layer_type = "sliding_attention" if windowed else "full_attention"
        neutral = {
            **_FOREIGN_FIELDS,
            "attention_out_bias": self.attention_bias,
            "use_sliding_window": windowed,
            "norm_topk_prob": self.router_estimator == "topk_renormalized",
            "layer_types": [layer_type] * self.num_hidden_layers,
        }
        for name in neutral.keys() & self.__dict__.keys():
            if (value := self.__dict__[name]) is not None and value != neutral[name]:
                raise ValueError(
                    f"{name}={_shown(value)} is a field of another architecture, and this model computes what "
                    f"{name}={_shown(neutral[name])} means; leave it out, or load the checkpoint with its own class"
                )

    def _check_fields(self, fields: Mapping[str, Any]) -> None:
        check_fields(fields)
        _require_choice("hidden_act", self.hidden_act, tuple(ACT2FN))
        _require_choice("norm_type", self.norm_type, NORM_TYPES)
        _require_choice("router_estimator", self.router_estimator, tuple(ESTIMATORS))
        _require_choice("router_aux_loss_scope", self.router_aux_loss_scope, ROUTER_AUX_LOSS_SCOPES)
        self._check_divisibility()

    def _check_divisibility(self) -> None:
        if self.__dict__.get("head_dim") is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not divisible by num_attention_heads={self.num_attention_heads}; "
                "choose a multiple, or give head_dim"
            )
        if self.head_size % 2:
            raise ValueError(
                f"heads have {self.head_size} elements (head_dim, or hidden_size={self.hidden_size} over "
                f"num_attention_heads={self.num_attention_heads}), and RoPE needs an even size; change it"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} is not divisible by "
                f"num_key_value_heads={self.num_key_value_heads}; choose a divisor"
            )
        if self.pad_token_id is not None and self.pad_token_id >= self.vocab_size:
            raise ValueError(
                f"pad_token_id={self.pad_token_id} is not below vocab_size={self.vocab_size}; give a token's id, or null"
            )
        if self.num_hidden_layers * self.num_local_experts > 2**18:
            raise ValueError(
                f"num_hidden_layers={self.num_hidden_layers} times num_local_experts={self.num_local_experts} is more than "
                f"{2**18} experts; lower one"
            )
        if self.num_experts_per_tok > self.num_local_experts:
            raise ValueError(
                f"num_experts_per_tok={self.num_experts_per_tok} exceeds num_local_experts={self.num_local_experts}; "
                "lower it"
            )


class _VisibleKeysConfig(GrinMoeConfig):
    """View of a [`GrinMoeConfig`] in which `sliding_window` counts the visible keys: see `get_text_config`."""

    @property
    def sliding_window(self) -> int | None:
        window = self.__dict__["sliding_window"]
        return None if window is None else window + 1

    @sliding_window.setter
    def sliding_window(self, visible_keys: int | None) -> None:
        self.__dict__["sliding_window"] = None if visible_keys is None else visible_keys - 1

    @property
    def visible_keys(self) -> int | None:
        return self.sliding_window

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> GrinMoeConfig:
        return self

    def __reduce__(self):
        # The copied fields, viewed again. No attribute may lead to the config: it would be among the config's own fields.
        config = object.__new__(GrinMoeConfig)
        config.__dict__ = self.__dict__
        return operator.methodcaller("get_text_config", decoder=True), (config,)


def _of_this_model(config_dict: dict[str, Any]) -> dict[str, Any]:
    model_type = config_dict.get("model_type", GrinMoeConfig.model_type)
    if model_type == GrinMoeConfig.model_type:
        return config_dict
    if model_type == "phimoe":
        return _from_phimoe_dict(config_dict)
    raise ValueError(
        f"model_type={_shown(model_type)} is not a GRIN-MoE config; give a checkpoint whose config.json has model_type "
        "'grinmoe' or 'phimoe', or load this one with its own class (AutoModelForCausalLM)"
    )


def _from_phimoe_dict(config_dict: dict[str, Any]) -> dict[str, Any]:
    rope = _take_rope({name: config_dict.get(name) for name in ("rope_parameters", "rope_scaling", *_FLAT_ROPE)})
    defaults = {name: value for name, value in _PHIMOE_DEFAULTS.items() if name not in rope}
    if config_dict.get("num_experts_per_tok", 2) != 2:
        raise ValueError(
            f"num_experts_per_tok={_shown(config_dict['num_experts_per_tok'])}: phimoe's own code computes 2 whatever it "
            "says; correct config.json"
        )
    # An export of ours: its window is spelled for phimoe, and its own fields are beside (but `written_out` is no field).
    own = config_dict.get(FOREIGN_EXTRAS)
    if not is_one_of(dict)(own):
        raise ValueError(
            f"{FOREIGN_EXTRAS}={_shown(own)} must be an object; leave it out, or export the checkpoint again"
        )
    extras = {k: v for k, v in (own or {}).items() if k != "written_out"}
    converted = {**defaults, **config_dict, **extras, "model_type": GrinMoeConfig.model_type}
    converted.pop(FOREIGN_EXTRAS, None)
    # They name phimoe's own classes and files, unless somebody has put our code beside the weights.
    if not _is_our_auto_map(converted.get("auto_map")):
        converted.pop("auto_map", None)
    converted.pop("architectures", None)
    return converted


def _is_our_auto_map(auto_map: Any) -> bool:
    reference = auto_map.get("AutoConfig") if isinstance(auto_map, dict) else None
    return isinstance(reference, str) and reference.rpartition("--")[2].startswith("configuration_grinmoe.")


def _completed_auto_map(auto_map: dict[str, Any]) -> dict[str, Any]:
    """The released config.json maps only AutoConfig and AutoModelForCausalLM; our files serve every auto class."""
    if not _is_our_auto_map(auto_map):
        return auto_map
    repository = auto_map["AutoConfig"].rpartition("--")[0]
    prefix = f"{repository}--" if repository else ""
    return {**{auto_class: prefix + target for auto_class, target in AUTO_MAP.items()}, **auto_map}


def _shown(value: Any) -> str:
    """A value for a message, cut where it is long."""
    return _SHORT.repr(value)


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60


def _check_number(name: str, value: Any, low: float, high: float, remedy: str = "") -> None:
    if value is None and remedy:
        return
    if isinstance(low, int):
        if not is_int(value, low, high):
            raise ValueError(f"{name}={_shown(value)} is not an integer from {low} to {high}; give one{remedy}")
    elif not is_number(value, low, high):
        raise ValueError(f"{name}={_shown(value)} is not a number in [{low:g}, {high:g}); give one{remedy}")


def check_fields(
    fields: Mapping[str, Any],
    numbers: Mapping[str, tuple[float, float, str]] = _NUMBERS,
    forms: Mapping[str, tuple[Callable[[Any], bool], str]] = _FORMS,
) -> None:
    """
    Hold fields against tables of numbers (bounds) and of other forms. Names that no table has are not looked at.

    Raises:
        ValueError: for the first field of another type or beyond its bounds: its name, value, and what is right.
    """
    for name, value in fields.items():
        if name in numbers:
            _check_number(name, value, *numbers[name])
        if name in forms or name.endswith("_token_id"):
            is_right, form = forms.get(name, _TOKEN_ID)
            if not is_right(value):
                raise ValueError(f"{name}={_shown(value)} must be {form}")


def check_pattern(name: str, pattern: Any) -> None:
    """
    Check a regular expression of others, which is matched against the names of modules.

    Raises:
        ValueError: not a regular expression, or one whose matching can take exponential time: a repeated group, more than
            five repetitions, or more than 2,000 characters.
    """
    bare = re.sub(r"\\.|\[[^\]]*\]", "x", pattern) if isinstance(pattern, str) else ""
    try:
        if (
            not isinstance(pattern, str)
            or len(pattern) > 2000
            or len(re.findall(r"[*+{]", bare)) > 5
            or re.search(r"\)[*+{]", bare)
        ):
            raise ValueError("repeated groups and more than five repetitions are not taken")
        re.compile(pattern)
    except (re.error, ValueError, RecursionError, OverflowError) as error:
        raise ValueError(f"{name} has {_shown(pattern)}, which is not a pattern of module names ({error})") from error


def _check_names_of_class(names: Iterable[str]) -> None:
    """Raise ValueError for a name of the class itself (a method, a plan, a constant), which a config would overwrite."""
    for name in names:
        own = inspect.getattr_static(GrinMoeConfig, name, None)
        is_field = name in (*(field.name for field in dataclasses.fields(GrinMoeConfig)), *_FIELDS, "model_type")
        if name in ("self", "s") or not (own is None or is_field or (isinstance(own, property) and own.fset)):
            raise ValueError(f"{name} is a name of the class GrinMoeConfig, which a config cannot set; leave it out")


def _require_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}={_shown(value)} is unknown; choose one of {', '.join(choices)}")


def _take_rope(fields: dict[str, Any]) -> dict[str, Any]:
    """
    Take RoPE's fields out of a config's fields, in every spelling: one dict, a copy without nulls (null leaves out).

    Raises:
        ValueError: two spellings contradict each other.
    """
    spelled: list[tuple[str, str, Any]] = []
    for place in ("rope_parameters", "rope_scaling"):
        if (inside := fields.pop(place, None)) is not None:
            if not isinstance(inside, dict):
                raise ValueError(f"{place}={_shown(inside)} is not a dict; give at least {{'rope_type': 'default'}}")
            spelled += [(f"{place}[{key!r}]", key, value) for key, value in inside.items()]
    spelled += [(key, key, fields.pop(key)) for key in _FLAT_ROPE if key in fields]
    rope: dict[str, Any] = {}
    places: dict[str, str] = {}
    for place, key, value in spelled:
        name = "rope_type" if key == "type" else key
        value = list(value) if isinstance(value, (list, tuple)) else value
        if value is None:
            continue
        if name in rope and rope[name] != value:
            raise ValueError(
                f"{places[name]}={_shown(rope[name])} and {place}={_shown(value)} contradict each other; give one of them"
            )
        rope[name], places[name] = value, place
    return rope


def _check_names(names: dict[str, Any], fields: dict[str, Any]) -> None:
    """Other names are kept, as Transformers does, but not those that are meant for a field of ours and would do nothing."""
    for name, value in names.items():
        if name in _FIELDS or name in _FOREIGN_FIELDS or name.startswith("_") or "token_i" in name or value is None:
            continue
        # The last one is set on every model by Transformers' own tests.
        if hasattr(PreTrainedConfig, name) or name in ("attention_out_bias", "use_sliding_window", "num_dense_layers"):
            continue
        meant = (
            [_OTHER_NAMES[name]] if name in _OTHER_NAMES else difflib.get_close_matches(name, _FIELDS, 1, cutoff=0.75)
        )
        if meant and value != fields.get(meant[0], fields):
            raise ValueError(
                f"{name}={_shown(value)} is not a field of this model and would do nothing; did you mean {meant[0]}?"
            )


def _check_rope(rope: dict[str, Any], head_size: int) -> None:
    rope_type: Any = rope.get("rope_type")
    _require_choice("rope_type", rope_type, tuple(_ROPE_FIELDS))
    required, optional = _ROPE_FIELDS[rope_type]
    for name in ("rope_theta", *required):
        if rope.get(name) is None:
            raise ValueError(
                f"rope_parameters has no {name}, which rope_type={rope_type!r} needs; it needs {', '.join(required)}"
            )
    if rope.get("partial_rotary_factor") is not None:
        factor = _shown(rope["partial_rotary_factor"])
        raise ValueError(f"partial_rotary_factor={factor}: this architecture rotates whole heads; leave it out")
    for name, value in rope.items():
        if name not in ("rope_type", "rope_theta", *required, *optional):
            raise ValueError(
                f"rope_parameters[{name!r}]={_shown(value)}: rope_type={rope_type!r} has no such field, and it would do "
                f"nothing; leave it out (fields: {', '.join(('rope_theta', *required, *optional))})"
            )
        if name not in _NOT_NUMBERS:
            _check_number(name, value, *_NUMBERS.get(name, _ROPE_NUMBER))
    if not isinstance(rope.get("truncate", True), bool):
        raise ValueError(f"truncate={_shown(rope['truncate'])} is not a bool; give True or False")
    if ("mscale" in rope) != ("mscale_all_dim" in rope):
        raise ValueError(f"rope_parameters={rope!r}: mscale and mscale_all_dim do nothing without each other")
    if rope_type != "longrope":
        return
    _require_choice("longrope_switch", rope["longrope_switch"], LONGROPE_SWITCHES)
    scales = [rope[name] for name in ("short_mscale", "long_mscale") if name in rope]
    if "attention_factor" in rope and len(scales) == 2 and rope["attention_factor"] not in scales:
        raise ValueError(
            f"attention_factor={rope['attention_factor']!r} contradicts short_mscale={scales[0]!r} and "
            f"long_mscale={scales[1]!r}; leave it out"
        )
    for name in ("short_factor", "long_factor"):
        factors = rope[name]
        if not isinstance(factors, list) or not all(is_number(f, *_ROPE_NUMBER[:2]) for f in factors):
            raise ValueError(
                f"{name}={_shown(factors)} is not a list of positive numbers; longrope needs one per frequency"
            )
        if len(factors) != head_size // 2:
            raise ValueError(
                f"{name} has {len(factors)} entries, heads of size {head_size} have {head_size // 2} frequencies; give "
                "one factor for each"
            )


# Everything that a config may say about this model.
_FIELDS = (*GrinMoeConfig.__annotations__, "head_dim", "num_experts", "rope_scaling", *_FLAT_ROPE)

# The name in the released config.json's auto_map.
GRINMoEConfig = GrinMoeConfig


def _register_tokenizer_class() -> None:
    """
    Make `AutoTokenizer` read tokenizer.json as it is for this model type; here, because it loads the config first.

    Without an entry for the model type, AutoTokenizer trusts the `tokenizer_class` in tokenizer_config.json. The released
    checkpoint names LlamaTokenizer there, which replaces the normaliser of tokenizer.json and so gives other ids. The
    table is private to the library; `AutoTokenizer.register` writes another one, which is asked only later.
    (docs/tokenization.md; tests/tokenization/test_loading.py notices when it moves.)
    """
    try:
        from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES
    except ImportError:
        logger.warning(
            "this version of Transformers has no TOKENIZER_MAPPING_NAMES: AutoTokenizer may give wrong ids for GRIN-MoE; "
            "load tokenizers with grinmoe.load_tokenizer, or with TokenizersBackend.from_pretrained"
        )
        return
    TOKENIZER_MAPPING_NAMES[GrinMoeConfig.model_type] = "TokenizersBackend"


_register_tokenizer_class()


def _register_class_names() -> None:
    """
    Enter the classes into the library's tables of class names, which it asks where it cannot ask the class.

    The Trainer shifts the labels of `label_smoothing_factor` only for names of causal language models: any other model
    learns to copy its input. Pipelines, model cards and lm-eval ask as well. `AutoModel.register` writes other tables.
    (tests/training/test_label_smoothing.py notices when they move.)
    """
    from transformers.models.auto import modeling_auto

    for table, auto_class in (
        (modeling_auto.MODEL_MAPPING_NAMES, "AutoModel"),
        (modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "AutoModelForCausalLM"),
        (modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES, "AutoModelForSequenceClassification"),
    ):
        table[GrinMoeConfig.model_type] = AUTO_MAP[auto_class].partition(".")[2]


_register_class_names()
