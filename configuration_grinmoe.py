"""Configuration of GRIN-MoE: the fields of the released config.json, their defaults and their validation.

The defaults are those of the released model (16 x 3.8B experts, top-2, 42B parameters). A ``phimoe`` config
(Phi-3.5-MoE: the same network with LongRoPE) converts into this one.
"""

from __future__ import annotations

import math
import operator
from typing import Any

from transformers import MixtralConfig, PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.utils import logging

from .routing_grinmoe import ESTIMATORS

logger = logging.get_logger(__name__)

NORM_TYPES = ("layer_norm", "rms_norm")
ROUTER_AUX_LOSS_SCOPES = ("released", "local", "global")

# What each type of RoPE cannot do without, by the names that Transformers reads.
_ROPE_REQUIRES: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("short_factor", "long_factor"),
}
_ROPE_NUMBERS = {
    "rope_theta",
    "factor",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
    "short_mscale",
    "long_mscale",
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
        rope_parameters (`dict`): RoPE type and parameters. `longrope` takes `short_mscale` and `long_mscale` as well.
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
    # Not parameters of RoPE itself, so the library's own check has to be told about them.
    ignore_keys_at_rope_validation = {"short_mscale", "long_mscale"}

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
        # Checked first: the library's own RoPE standardisation assumes sane sizes.
        self._check_fields()
        rope = kwargs.get("rope_scaling") or self.rope_parameters or {}
        _check_rope({"rope_theta": kwargs["rope_theta"], **rope} if "rope_theta" in kwargs else rope, self.head_size)
        super().__post_init__(**kwargs)
        self.check()
        if getattr(self, "auto_map", None):
            self.auto_map = _completed_auto_map(self.auto_map)

    @property
    def head_size(self) -> int:
        """Size of one attention head."""
        # No field of its own: where it is absent, library code takes the quotient, and would take a None as it is.
        return self.__dict__.get("head_dim") or self.hidden_size // self.num_attention_heads

    @property
    def rope_theta(self) -> float:
        """Base of RoPE, under the released file's flat name."""
        return (self.rope_parameters or {}).get("rope_theta", self.default_theta)

    @rope_theta.setter
    def rope_theta(self, value: float) -> None:
        self.rope_parameters = {**(self.rope_parameters or {}), "rope_theta": value}

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
        object.__setattr__(view, "_source", self)
        return view

    @classmethod
    def get_config_dict(cls, *args, **kwargs) -> tuple[dict[str, Any], dict[str, Any]]:
        """A config.json's content, converted if it is a phimoe one."""
        config_dict, kwargs = super().get_config_dict(*args, **kwargs)
        return _of_this_model(config_dict), kwargs

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """
        Build from a config.json's content. `model_type` must be `grinmoe`, or `phimoe`, which is converted. Keyword
        arguments override fields.

        Raises:
            ValueError: another `model_type`, or a wrong value.
        """
        # The library assigns overrides to the finished config. As part of the content they are checked and standardised.
        overrides = {name: kwargs.pop(name) for name in GrinMoeConfig.__annotations__ if name in kwargs}
        result = super().from_dict({**_of_this_model(config_dict), **overrides}, **kwargs)
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
        self._check_fields()
        _check_rope(self.rope_parameters or {}, self.head_size)

    def _check_fields(self) -> None:
        for name in (
            "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
            "max_position_embeddings num_local_experts num_experts_per_tok"
        ).split():
            _require_int(name, getattr(self, name), minimum=1)
        if self.__dict__.get("head_dim") is not None:
            _require_int("head_dim", self.head_dim, minimum=1, remedy=", or leave it out")
        if self.sliding_window is not None:
            _require_int("sliding_window", self.sliding_window, minimum=1, remedy=", or None for full attention")
        for name in ("router_jitter_noise", "router_aux_loss_coef", "router_z_loss_coef", "initializer_range"):
            _require_number(name, getattr(self, name), 0.0, math.inf)
        for name in ("input_jitter_noise", "attention_dropout", "hidden_dropout", "expert_dropout"):
            _require_number(name, getattr(self, name), 0.0, 1.0)
        capacity = self.router_capacity_factor
        if capacity is not None and not (_is_number(capacity) and 0 < capacity < math.inf):
            raise ValueError(
                f"router_capacity_factor={capacity!r} is not a positive number; give one, or None to drop no token"
            )
        if not _is_number(self.rms_norm_eps) or not 0 < self.rms_norm_eps < math.inf:
            raise ValueError(f"rms_norm_eps={self.rms_norm_eps!r} is not a positive number; the released value is 1e-5")
        for name in "use_cache attention_bias lm_head_bias tie_word_embeddings output_router_logits".split():
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r} is not a bool; give True or False")
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
        if self.num_experts_per_tok > self.num_local_experts:
            raise ValueError(
                f"num_experts_per_tok={self.num_experts_per_tok} exceeds num_local_experts={self.num_local_experts}; "
                "lower it"
            )


class _VisibleKeysConfig(GrinMoeConfig):
    """View of a [`GrinMoeConfig`] in which `sliding_window` counts the visible keys: see `get_text_config`."""

    __slots__ = ("_source",)

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
        # A copy must view the copied config, not own a stale copy of its fields.
        return operator.methodcaller("get_text_config", decoder=True), (self._source,)


def _of_this_model(config_dict: dict[str, Any]) -> dict[str, Any]:
    model_type = config_dict.get("model_type", GrinMoeConfig.model_type)
    if model_type == GrinMoeConfig.model_type:
        return config_dict
    if model_type == "phimoe":
        return _from_phimoe_dict(config_dict)
    raise ValueError(
        f"model_type={model_type!r} is not a GRIN-MoE config; give a checkpoint whose config.json has model_type "
        "'grinmoe' or 'phimoe', or load this one with its own class (AutoModelForCausalLM)"
    )


def _from_phimoe_dict(config_dict: dict[str, Any]) -> dict[str, Any]:
    rope = config_dict.get("rope_parameters") or {}
    defaults = {**_PHIMOE_DEFAULTS, **({"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {})}
    # An export of ours: its window is spelled for phimoe, and its own fields are beside (but `written_out` is no field).
    extras = {k: v for k, v in (config_dict.get(FOREIGN_EXTRAS) or {}).items() if k != "written_out"}
    converted = {**defaults, **config_dict, **extras, "model_type": GrinMoeConfig.model_type}
    converted.pop(FOREIGN_EXTRAS, None)
    # They name phimoe's own classes and files, unless somebody has put our code beside the weights.
    if not _is_our_auto_map(converted.get("auto_map")):
        converted.pop("auto_map", None)
    converted.pop("architectures", None)
    return converted


def _is_our_auto_map(auto_map: dict[str, Any] | None) -> bool:
    reference = (auto_map or {}).get("AutoConfig")
    return isinstance(reference, str) and reference.rpartition("--")[2].startswith("configuration_grinmoe.")


def _completed_auto_map(auto_map: dict[str, Any]) -> dict[str, Any]:
    """The released config.json maps only AutoConfig and AutoModelForCausalLM; our files serve every auto class."""
    if not _is_our_auto_map(auto_map):
        return auto_map
    repository = auto_map["AutoConfig"].rpartition("--")[0]
    prefix = f"{repository}--" if repository else ""
    return {**{auto_class: prefix + target for auto_class, target in AUTO_MAP.items()}, **auto_map}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _require_int(name: str, value: Any, minimum: int, remedy: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"{name}={value!r} is not an integer of at least {minimum}; give one{remedy}")


def _require_number(name: str, value: Any, low: float, high: float) -> None:
    if not _is_number(value) or not low <= value < high:
        raise ValueError(f"{name}={value!r} is not a number in [{low:g}, {high:g}); give one, 0 switches it off")


def _require_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(choices)}")


def _check_rope(rope: dict[str, Any], head_size: int) -> None:
    """Check what was given, in the current (`rope_type`) or the released (`type`) spelling."""
    if not isinstance(rope, dict):
        raise ValueError(f"rope_parameters={rope!r} is not a dict; give at least {{'rope_type': 'default'}}")
    rope_type: Any = rope.get("rope_type", rope.get("type", "default"))
    _require_choice("rope_type", rope_type, tuple(_ROPE_REQUIRES))
    for name in _ROPE_REQUIRES[rope_type]:
        if rope.get(name) is None:
            raise ValueError(
                f"rope_parameters has no {name}, which rope_type={rope_type!r} needs; it needs "
                f"{', '.join(_ROPE_REQUIRES[rope_type])}"
            )
    for name, value in rope.items():
        # null is how a file leaves a field out; booleans are switches ("truncate"), factor lists come below.
        if name in _ROPE_NUMBERS and value is not None and not (_is_number(value) and 0 < value < math.inf):
            raise ValueError(f"{name}={value!r} is not a positive number; correct it, or leave it out for the default")
    if rope_type != "longrope":
        return
    for name in ("short_factor", "long_factor"):
        factors = rope[name]
        if not isinstance(factors, (list, tuple)) or not all(_is_number(f) and 0 < f < math.inf for f in factors):
            raise ValueError(f"{name}={factors!r} is not a list of positive numbers; longrope needs one per frequency")
        if len(factors) != head_size // 2:
            raise ValueError(
                f"{name} has {len(factors)} entries, heads of size {head_size} have {head_size // 2} frequencies; give "
                "one factor for each"
            )


# The name in the released config.json's auto_map.
GRINMoEConfig = GrinMoeConfig


def _register_tokenizer_class() -> None:
    """
    Make `AutoTokenizer` read tokenizer.json as it is for this model type; here, because it loads the config first.

    Without an entry for the model type, AutoTokenizer trusts the `tokenizer_class` in tokenizer_config.json. The released
    checkpoint names LlamaTokenizer there, which replaces the normaliser of tokenizer.json and so gives other ids. The
    table is private to the library; `AutoTokenizer.register` writes another one, which is asked only later.
    (docs/tokenization.md; tests/test_tokenizer_loading.py notices when it moves.)
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
