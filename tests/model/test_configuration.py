"""The config: the released defaults, what it refuses, phimoe, and the one place where the window is translated."""

from __future__ import annotations

import copy
import json
import pickle
import re

import pytest
import torch
from transformers import AutoConfig, DynamicCache, MixtralConfig, PhimoeConfig, PreTrainedConfig, StaticCache

from grinmoe import GRINMoEConfig, GrinMoeConfig, GrinMoeForCausalLM
from grinmoe.configuration_grinmoe import AUTO_MAP
from grinmoe.routing_grinmoe import ESTIMATORS

RELEASED = {
    "vocab_size": 32064,
    "hidden_size": 4096,
    "intermediate_size": 6400,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_act": "silu",
    "num_local_experts": 16,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
    "attention_bias": True,
    "lm_head_bias": True,
    "tie_word_embeddings": False,
    "sliding_window": 2047,
    "router_jitter_noise": 0.01,
    "input_jitter_noise": 0.01,
    "router_aux_loss_coef": 0.0,
    "output_router_logits": False,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "initializer_range": 0.02,
    "use_cache": True,
    "bos_token_id": 1,
    "eos_token_id": 32000,
    "pad_token_id": None,
    "model_type": "grinmoe",
}


def test_defaults_are_the_released_model():
    config = GrinMoeConfig()
    assert {name: getattr(config, name) for name in RELEASED} == RELEASED
    assert GRINMoEConfig is GrinMoeConfig


def test_the_released_file_loads(goldens):
    config = GrinMoeConfig.from_pretrained(goldens["golden-a"].folder)
    written = json.loads((goldens["golden-a"].folder / "config.json").read_text())
    ignored = {"_name_or_path", "auto_map", "torch_dtype", "transformers_version"}
    assert {key: getattr(config, key) for key in written.keys() - ignored} == {
        key: written[key] for key in written.keys() - ignored
    }
    assert isinstance(AutoConfig.from_pretrained(goldens["golden-a"].folder), GrinMoeConfig)


def test_round_trip_through_a_file(tmp_path):
    config = GrinMoeConfig(sliding_window=7, router_aux_loss_scope="global", rope_theta=5e5)
    config.save_pretrained(tmp_path)
    again = GrinMoeConfig.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict()
    assert (again.sliding_window, again.rope_theta) == (7, 5e5)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_checkpoint_keeps_how_it_was_trained(tiny_model, tmp_path, estimator):
    """Loaded again it routes alike, in evaluation and, seeded alike, in training."""
    fields = {
        "router_estimator": estimator,
        "router_z_loss_coef": 0.1,
        "expert_dropout": 0.2,
        "router_capacity_factor": 1.5,
    }
    model = tiny_model(router_jitter_noise=0.4, **fields)
    model.save_pretrained(tmp_path)
    again = GrinMoeForCausalLM.from_pretrained(tmp_path)
    assert {name: getattr(again.config, name) for name in fields} == fields
    ids = torch.arange(24).view(2, 12)
    for training in (False, True):
        logits = []
        for one in (model, again):
            torch.manual_seed(1)
            logits.append(one.train(training)(ids).logits)
        assert torch.equal(*logits)


LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0] * 4,
    "long_factor": [2.0] * 4,
    "original_max_position_embeddings": 32,
    "short_mscale": 1.1,
    "long_mscale": 1.2,
}
SMALL = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 2}

WRONG = [
    ({"hidden_size": 65, "num_attention_heads": 8}, "hidden_size=65"),
    ({"hidden_size": 24, "num_attention_heads": 8, "num_key_value_heads": 8}, "even size"),
    ({"num_attention_heads": 32, "num_key_value_heads": 5}, "num_key_value_heads=5"),
    ({"num_experts_per_tok": 17}, "num_experts_per_tok=17 exceeds num_local_experts=16"),
    ({"num_experts_per_tok": 0}, "num_experts_per_tok=0"),
    ({"num_local_experts": 2.5}, "num_local_experts=2.5"),
    ({"vocab_size": -1}, "vocab_size=-1"),
    ({"num_hidden_layers": "3"}, "num_hidden_layers='3'"),
    ({"rms_norm_eps": -1e-5}, "rms_norm_eps=-1e-05"),
    ({"rms_norm_eps": 0.0}, "rms_norm_eps=0.0"),
    ({"router_jitter_noise": -0.01}, "router_jitter_noise=-0.01"),
    ({"router_jitter_noise": float("nan")}, "router_jitter_noise=nan"),
    ({"input_jitter_noise": 1.0}, "input_jitter_noise=1.0"),
    ({"attention_dropout": 1.5}, "attention_dropout=1.5"),
    ({"hidden_dropout": -0.5}, "hidden_dropout=-0.5"),
    ({"router_aux_loss_coef": -1}, "router_aux_loss_coef=-1"),
    ({"router_aux_loss_scope": "layer"}, "router_aux_loss_scope='layer'"),
    ({"router_estimator": "reinforce"}, "router_estimator='reinforce' is unknown; choose one of sparsemixer_v2, "),
    ({"router_z_loss_coef": -0.1}, "router_z_loss_coef=-0.1"),
    ({"router_capacity_factor": 0}, "router_capacity_factor=0 is not a number in "),
    ({"router_capacity_factor": "1"}, "router_capacity_factor='1'"),
    ({"expert_dropout": 1.0}, "expert_dropout=1.0"),
    ({"hidden_act": "swiglu9"}, "hidden_act='swiglu9'"),
    ({"sliding_window": 0}, "sliding_window=0"),
    ({"sliding_window": -1}, "sliding_window=-1"),
    ({"attention_bias": "yes"}, "attention_bias='yes'"),
    ({"head_dim": 0}, "head_dim=0"),
    ({"head_dim": 63}, "heads have 63 elements"),
    ({"rope_parameters": {"rope_type": "spiral"}}, "rope_type='spiral'"),
    ({"rope_scaling": {"type": "spiral"}}, "rope_type='spiral'"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": -1.0}}, "rope_theta=-1.0"),
    ({"rope_theta": 0}, "rope_theta=0"),
    ({**SMALL, "rope_parameters": {**LONGROPE, "long_factor": [1.0]}}, "long_factor has 1 entries"),
    ({**SMALL, "rope_parameters": {**LONGROPE, "short_factor": None}}, "no short_factor, which rope_type='longrope'"),
    ({**SMALL, "rope_parameters": {**LONGROPE, "short_factor": 1.0}}, "short_factor=1.0 is not a list"),
    ({**SMALL, "rope_parameters": {**LONGROPE, "original_max_position_embeddings": 0}}, "embeddings=0"),
    ({**SMALL, "rope_parameters": {**LONGROPE, "original_max_position_embeddings": "32"}}, "embeddings='32'"),
    ({"rope_parameters": {"rope_type": "linear"}}, "no factor, which rope_type='linear' needs"),
    ({"rope_parameters": {"rope_type": "dynamic"}}, "no factor, which rope_type='dynamic' needs"),
    ({"rope_scaling": {"type": "yarn"}}, "no factor, which rope_type='yarn' needs"),
    ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "no low_freq_factor, which rope_type='llama3'"),
    ({"rope_parameters": {"rope_type": "linear", "factor": "2"}}, "factor='2'"),
    ({"rope_parameters": {"rope_type": "linear", "factor": float("nan")}}, "factor=nan"),
    ({"rope_theta": float("nan")}, "rope_theta=nan"),
    ({**SMALL, "rope_parameters": {**LONGROPE, "long_mscale": 0}}, "long_mscale=0"),
]


@pytest.mark.parametrize("fields, message", WRONG, ids=[message for _, message in WRONG])
def test_wrong_values_are_named(fields, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        GrinMoeConfig(**fields)


OVERRIDES = [
    ({"router_aux_loss_scope": "globl"}, "router_aux_loss_scope='globl'"),
    ({"router_aux_loss_coef": "0.02"}, "router_aux_loss_coef='0.02'"),
    ({"num_experts_per_tok": 17}, "num_experts_per_tok=17 exceeds"),
    ({"num_attention_heads": 5}, "num_attention_heads=5"),
    ({"sliding_window": 0}, "sliding_window=0"),
    ({"rope_parameters": {"rope_type": "nope"}}, "rope_type='nope'"),
    ({"rope_theta": -1.0}, "rope_theta=-1.0"),
]


@pytest.mark.parametrize("fields, message", OVERRIDES, ids=[message for _, message in OVERRIDES])
def test_overrides_are_checked_like_the_file(goldens, fields, message):
    folder = goldens["golden-a"].folder
    with pytest.raises(ValueError, match=message):
        GrinMoeConfig.from_pretrained(folder, **fields)
    with pytest.raises(ValueError, match=message):
        AutoConfig.from_pretrained(folder, **fields)
    with pytest.raises(ValueError, match=message):
        GrinMoeForCausalLM.from_pretrained(folder, **fields)


@pytest.mark.parametrize("fields, message", OVERRIDES, ids=[message for _, message in OVERRIDES])
def test_a_model_refuses_what_was_assigned_since(tiny_config, fields, message):
    config = tiny_config(num_local_experts=16)
    for name, value in fields.items():
        setattr(config, name, value)
    with pytest.raises(ValueError, match=message):
        GrinMoeForCausalLM(config)


def test_overrides_replace_what_the_file_says(goldens):
    folder = goldens["golden-a"].folder
    config, unused = GrinMoeConfig.from_pretrained(
        folder, sliding_window=9, rope_theta=5e4, num_labels=4, extra=1, return_unused_kwargs=True
    )
    assert (config.sliding_window, config.rope_theta, config.num_labels, unused) == (9, 5e4, 4, {"extra": 1})
    scaled = GrinMoeConfig.from_pretrained(folder, rope_parameters={"rope_type": "linear", "factor": 2.0})
    assert scaled.rope_parameters == {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}


ROPE_TYPES = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 2.0, "attention_factor": None, "original_max_position_embeddings": 32},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "longrope": LONGROPE,
    "longrope, scales computed": {**LONGROPE, "short_mscale": None, "long_mscale": None},
}


def spellings(rope: dict) -> dict[str, dict]:
    """Fields of a config that all say `rope` with theta 5e5."""
    old = {"type" if name == "rope_type" else name: value for name, value in rope.items()}
    inside = {name: value for name, value in old.items() if name != "original_max_position_embeddings"}
    beside = {name: rope[name] for name in rope.keys() & {"original_max_position_embeddings"}}
    return {
        "one dict": {"rope_parameters": {**rope, "rope_theta": 5e5}},
        "its older name": {"rope_scaling": {**old, "rope_theta": 5e5}},
        "type as well": {"rope_parameters": {**rope, **old, "rope_theta": 5e5}},
        "theta beside it": {"rope_parameters": rope, "rope_theta": 5e5},
        "as released": {"rope_scaling": old, "rope_theta": 5e5, **beside},
        "the original length beside it": {"rope_scaling": inside, "rope_theta": 5e5, **beside},
        "all at once": {"rope_parameters": rope, "rope_scaling": old, "rope_theta": 5e5, **beside},
        "whole heads": {"rope_parameters": rope, "rope_theta": 5e5, "partial_rotary_factor": 1.0},
    }


@pytest.mark.parametrize("spelling", spellings(LONGROPE))
@pytest.mark.parametrize("rope", ROPE_TYPES)
def test_rope_has_one_meaning_in_every_spelling(tiny_config, tmp_path, rope, spelling):
    """transformers#42513: two spellings gave two models, and building one changed its config."""
    small = {**SMALL, "max_position_embeddings": 128}
    fields = spellings(ROPE_TYPES[rope])[spelling]
    given = copy.deepcopy(fields)
    config = tiny_config(**small, **fields)
    expected = {name: value for name, value in ROPE_TYPES[rope].items() if value is not None} | {"rope_theta": 5e5}
    expected |= {"longrope_switch": "at_original"} if rope.startswith("longrope") else {}
    assert config.rope_parameters == expected
    before = config.to_dict()
    model = GrinMoeForCausalLM(config)
    model(torch.arange(40)[None])
    assert config.to_dict() == before and model.config.to_dict() == before
    assert fields == given  # what the caller passed in
    config.save_pretrained(tmp_path)
    assert GrinMoeConfig.from_pretrained(tmp_path).rope_parameters == expected
    # The same, over what a file says.
    tiny_config(**small).save_pretrained(tmp_path)
    assert GrinMoeConfig.from_pretrained(tmp_path, **fields).rope_parameters == expected
    assert fields == given


@pytest.mark.parametrize("spelling", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("rope", ROPE_TYPES)
def test_assigned_rope_is_complete_before_a_model_is_built(tiny_config, rope, spelling):
    config = tiny_config(**SMALL, rope_theta=5e5)
    setattr(config, spelling, ROPE_TYPES[rope])
    before = config.to_dict()
    assert before["rope_parameters"]["rope_theta"] == 5e5 and None not in before["rope_parameters"].values()
    GrinMoeForCausalLM(config)(torch.arange(40)[None])
    assert config.to_dict() == before


def test_flat_fields_of_rope_change_the_dict(tiny_config):
    config = tiny_config(**SMALL, rope_parameters=LONGROPE)
    config.original_max_position_embeddings, config.rope_theta, config.partial_rotary_factor = 16, 5e5, 1.0
    expected = {**LONGROPE, "original_max_position_embeddings": 16, "rope_theta": 5e5, "longrope_switch": "at_original"}
    assert config.rope_parameters == expected and config.original_max_position_embeddings == 16
    config = tiny_config()
    assert not hasattr(config, "original_max_position_embeddings")
    with pytest.raises(ValueError, match="original_max_position_embeddings=16: rope_type='default' has none"):
        config.original_max_position_embeddings = 16
    config.partial_rotary_factor = 0.5
    with pytest.raises(ValueError, match="partial_rotary_factor=0.5"):
        GrinMoeForCausalLM(config)


def test_rope_changed_in_place_means_what_the_constructor_makes_of_it(tiny_config):
    """Transformers' own tests edit the dict so."""
    config = tiny_config(**SMALL)
    fields = {name: LONGROPE[name] for name in ("short_factor", "long_factor", "rope_type")}
    config.rope_parameters.update(fields)
    model = GrinMoeForCausalLM(config)
    assert config.rope_parameters == tiny_config(**SMALL, rope_parameters=fields).rope_parameters
    assert model.model.rotary_emb.original_length == config.max_position_embeddings
    config.rope_parameters.update(rope_type="default", original_max_position_embeddings=16)
    with pytest.raises(ValueError, match="rope_type='default' has no such field"):
        GrinMoeForCausalLM(config)


CONTRADICTIONS = [
    (
        {"rope_theta": 5e5, "rope_parameters": {"rope_theta": 1e4}},
        "rope_parameters['rope_theta']=10000.0 and rope_theta=",
    ),
    (
        {"rope_parameters": {"rope_type": "default", "type": "linear", "factor": 2.0}},
        "rope_parameters['type']='linear'",
    ),
    (
        {"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"type": "linear", "factor": 2.0}},
        "rope_parameters['rope_type']='default' and rope_scaling['type']='linear'",
    ),
    (
        {**SMALL, "rope_scaling": LONGROPE, "original_max_position_embeddings": 64},
        "rope_scaling['original_max_position_embeddings']=32 and original_max_position_embeddings=64",
    ),
    ({"rope_parameters": {"partial_rotary_factor": 1.0}, "partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    (
        {**SMALL, "rope_parameters": {**LONGROPE, "attention_factor": 3.0}},
        "attention_factor=3.0 contradicts short_mscale",
    ),
    ({"num_local_experts": 4, "num_experts": 8}, "num_experts=8 contradicts num_local_experts=4"),
]


@pytest.mark.parametrize("fields, message", CONTRADICTIONS, ids=[message for _, message in CONTRADICTIONS])
def test_contradictory_spellings_are_refused_by_both_names(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        GrinMoeConfig(**fields)


IGNORED = [
    # Fields of RoPE that its type does not read.
    (
        {"rope_parameters": {"rope_type": "default", "factor": 4.0}},
        "rope_parameters['factor']=4.0: rope_type='default'",
    ),
    ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "beta_fast": 8}}, "rope_parameters['beta_fast']=8"),
    ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rope_parameters['full_attention']"),
    ({"rope_parameters": {"mrope_section": [2, 2]}}, "rope_parameters['mrope_section']"),
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 64}}, "embeddings']=64"),
    (
        {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "mscale": 0.7}},
        "mscale and mscale_all_dim do nothing without each other",
    ),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "truncate": "no"}}, "truncate='no' is not a bool"),
    (
        {"per_layer_config": {0: {"intermediate_size": 8}}},
        "per_layer_config={0: {'intermediate_size': 8}} must be left out: all layers",
    ),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5: this architecture rotates whole heads"),
    ({**SMALL, "rope_parameters": {**LONGROPE, "longrope_switch": "below"}}, "longrope_switch='below' is unknown"),
    # Names that are meant for a field of ours.
    (
        {"num_experts_per_token": 4},
        "num_experts_per_token=4 is not a field of this model and would do nothing; did you",
    ),
    ({"n_experts": 8}, "did you mean num_experts?"),
    ({"router_jitter": 0.1}, "did you mean router_jitter_noise?"),
    ({"sliding_windows": 7}, "did you mean sliding_window?"),
    ({"n_layers": 3}, "did you mean num_hidden_layers?"),
    ({"layer_norm_eps": 1e-3}, "did you mean rms_norm_eps?"),
    ({"aux_loss_coef": 0.1}, "did you mean router_aux_loss_coef?"),
    ({"rope_thetas": 1e6}, "did you mean rope_theta?"),
    # What related models compute and this one does not.
    ({"num_shared_experts": 1}, "num_shared_experts=1 is a field of another architecture"),
    ({"use_qk_norm": True}, "use_qk_norm=True"),
    ({"norm_topk_prob": True}, "norm_topk_prob=True"),
    ({"mlp_bias": True}, "mlp_bias=True"),
    ({"attention_out_bias": False}, "attention_out_bias=False"),
    ({"layer_types": ["full_attention"] * 32}, "layer_types="),
    ({"use_sliding_window": False}, "use_sliding_window=False"),
    ({"resid_pdrop": 0.1}, "resid_pdrop=0.1"),
    ({"is_causal": False}, "is_causal=False"),
    ({"no_rope_layers": [1, 0]}, "no_rope_layers="),
    ({"attention_chunk_size": 64}, "attention_chunk_size=64"),
    ({"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0"),
    ({"routed_scaling_factor": 2.5}, "routed_scaling_factor=2.5"),
    ({"rope_interleave": True}, "rope_interleave=True"),
    ({"kv_lora_rank": 64}, "kv_lora_rank=64"),
    ({"moe_intermediate_size": 64}, "did you mean intermediate_size?"),
]


@pytest.mark.parametrize("fields, message", IGNORED, ids=[message for _, message in IGNORED])
def test_fields_that_would_do_nothing_are_refused(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        GrinMoeConfig(**fields)
    with pytest.raises(ValueError, match=re.escape(message)):
        GrinMoeConfig.from_dict({"model_type": "grinmoe", **fields})


@pytest.mark.parametrize("name, value", [("num_experts_per_token", 4), ("use_qk_norm", True), ("norm_topk_prob", True)])
def test_assigned_fields_that_would_do_nothing_are_refused(tiny_config, name, value):
    config = tiny_config()
    setattr(config, name, value)
    with pytest.raises(ValueError, match=f"{name}={value}"):
        GrinMoeForCausalLM(config)


def test_an_override_that_would_do_nothing_is_refused(goldens):
    with pytest.raises(ValueError, match="num_experts_per_token=4 .* did you mean num_experts_per_tok"):
        GrinMoeConfig.from_pretrained(goldens["golden-a"].folder, num_experts_per_token=4)


def test_fields_that_ask_for_nothing_are_kept():
    """As Transformers keeps them: nulls, the values of this architecture, and names that mean nothing here."""
    fields = {
        "num_shared_experts": 0,
        "use_qk_norm": False,
        "use_sliding_window": True,
        "layer_types": ["sliding_attention"] * 32,
        "attention_chunk_size": None,
        "n_layers": 32,
        "num_labels": 3,
        "pretraining_tp": 1,
        "my_note": "mine",
        "sep_token_id": 3,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.40.2",
        "tokenizer_class": "LlamaTokenizer",
    }
    config = GrinMoeConfig(**fields)
    assert (config.my_note, config.num_labels, config.dtype) == ("mine", 3, torch.bfloat16)
    assert GrinMoeConfig(num_experts=8).num_local_experts == 8


def test_overrides_of_rope_replace_the_files(goldens):
    """golden-c is a phimoe with LongRoPE; an override is not a second spelling of what the file says."""
    folder = goldens["golden-c"].folder
    own = GrinMoeConfig.from_pretrained(folder).rope_parameters
    assert GrinMoeConfig.from_pretrained(folder, original_max_position_embeddings=16).rope_parameters == {
        **own,
        "original_max_position_embeddings": 16,
    }
    linear = GrinMoeConfig.from_pretrained(folder, rope_scaling={"type": "linear", "factor": 2.0}, rope_theta=5e5)
    assert linear.rope_parameters == {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}
    assert GrinMoeConfig.from_pretrained(folder, rope_scaling=None).rope_parameters["rope_type"] == "default"
    assert GrinMoeConfig.from_pretrained(folder, num_experts=8).num_local_experts == 8


def test_the_released_phimoe_file_means_what_it_meant(goldens):
    """Switch at the original length, both scales, theta beside the dict."""
    content = json.loads((goldens["golden-c"].folder / "config.json").read_text())
    given = copy.deepcopy(content)
    expected = {"rope_type": "longrope", "rope_theta": 10000.0, "longrope_switch": "at_original"}
    expected |= {name: value for name, value in content["rope_scaling"].items() if name != "type"}
    assert GrinMoeConfig.from_dict(content).rope_parameters == expected and content == given


@pytest.mark.parametrize("length", [31, 32, 33])
@pytest.mark.parametrize("switch", ["at_original", "above_original"])
def test_longrope_switch_decides_at_the_original_length(tiny_config, tmp_path, switch, length):
    config = tiny_config(**SMALL, rope_parameters={**LONGROPE, "longrope_switch": switch})
    config.save_pretrained(tmp_path)
    rotary = GrinMoeForCausalLM(GrinMoeConfig.from_pretrained(tmp_path)).model.rotary_emb
    cos, _ = rotary(torch.zeros(1), torch.arange(length)[None])
    long = length > 32 or (length == 32 and switch == "at_original")
    frequency = 10000.0 ** (-torch.arange(0, 8, 2) / 8) / (2.0 if long else 1.0)
    scale = 1.2 if length > 32 else 1.1
    torch.testing.assert_close(cos[0, -1, :4], (frequency * (length - 1)).cos() * scale)


def test_dynamic_rope_does_not_depend_on_earlier_calls(tiny_model):
    """Transformers' own remembers the longest batch so far."""
    model = tiny_model(rope_parameters={"rope_type": "dynamic", "factor": 2.0}, max_position_embeddings=16).eval()
    texts = [torch.arange(length)[None] for length in (20, 60, 16, 10)]
    with torch.no_grad():
        first = [model(text).logits for text in texts]
        again = [model(text).logits for text in reversed(texts)][::-1]
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


def test_dynamic_rope_generates_what_recomputing_gives(tiny_model):
    """Beyond max_position_embeddings every token changes all frequencies, and with them what a cache holds."""
    fields = {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}, "initializer_range": 0.3}
    model = tiny_model(**fields, max_position_embeddings=16, sliding_window=None).eval()
    ids = torch.arange(13)[None]
    asked = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "attention_mask": torch.ones_like(ids)}
    expected = model.generate(ids, use_cache=False, **asked)
    for cache in ({}, {"cache_implementation": "static"}):
        assert torch.equal(model.generate(ids, **asked, **cache), expected)
    with torch.no_grad():
        cache = model(expected[:, :16], use_cache=True).past_key_values
        with pytest.raises(ValueError, match="at 17 tokens dynamic RoPE changes"):
            model(expected[:, 16:17], past_key_values=cache)
    with pytest.raises(ValueError, match="speculative decoding with dynamic RoPE serves up to 17 tokens"):
        model.generate(ids, prompt_lookup_num_tokens=2, **asked)


def test_another_model_type_is_refused(tmp_path):
    MixtralConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model_type='mixtral'"):
        GrinMoeConfig.from_pretrained(tmp_path)


def test_phimoe_converts_with_phimoes_own_defaults():
    native = PhimoeConfig(**SMALL, sliding_window=None, rope_parameters={**LONGROPE, "rope_theta": 1e4})
    config = GrinMoeConfig.from_phimoe(native)
    assert config.model_type == "grinmoe" and config.rope_parameters["rope_type"] == "longrope"
    assert config.rope_theta == 1e4 and config.sliding_window is None
    bare = GrinMoeConfig.from_dict({"model_type": "phimoe", **SMALL})
    expected = PhimoeConfig(**SMALL)
    for name in ("attention_bias", "lm_head_bias", "max_position_embeddings", "sliding_window", "input_jitter_noise"):
        assert getattr(bare, name) == getattr(expected, name), name
    assert bare.rope_theta == expected.rope_parameters["rope_theta"]


def test_phimoe_drops_its_own_classes(goldens):
    config = GrinMoeConfig.from_pretrained(goldens["golden-c"].folder)
    assert getattr(config, "auto_map", None) is None and config.architectures is None


def test_phimoe_keeps_an_auto_map_that_is_ours(goldens):
    """Our files beside a phimoe checkpoint: trust_remote_code must find them."""
    content = json.loads((goldens["golden-c"].folder / "config.json").read_text())
    config = GrinMoeConfig.from_dict({**content, "auto_map": {"AutoConfig": "configuration_grinmoe.GrinMoeConfig"}})
    assert config.auto_map == AUTO_MAP


@pytest.mark.parametrize("prefix", ["", "microsoft/GRIN-MoE--"])
def test_the_released_auto_map_is_completed(prefix):
    released = {
        "AutoConfig": f"{prefix}configuration_grinmoe.GRINMoEConfig",
        "AutoModelForCausalLM": f"{prefix}modeling_grinmoe.GRINMoEForCausalLM",
    }
    auto_map = GrinMoeConfig(auto_map=released).auto_map
    assert auto_map.keys() == AUTO_MAP.keys()
    assert auto_map["AutoModel"] == f"{prefix}modeling_grinmoe.GrinMoeModel"
    assert auto_map["AutoModelForCausalLM"] == released["AutoModelForCausalLM"]


class TestWindow:
    """`sliding_window` is W everywhere that a person reads it, W + 1 where the library sizes masks and caches."""

    @pytest.mark.parametrize("window", [None, 1, 7, 2047])
    def test_text_config_of_a_text_model_is_the_config(self, window):
        """Engines take a model for a multimodal one where it is another object (vLLM asks with `is` and `!=`)."""
        config = GrinMoeConfig(sliding_window=window)
        assert config.get_text_config() is config
        assert config.get_text_config(decoder=False) is config and config.get_text_config(encoder=True) is config

    def test_library_view_counts_visible_keys(self):
        config = GrinMoeConfig(sliding_window=7)
        view = config.get_text_config(decoder=True)
        assert (config.sliding_window, config.visible_keys, view.sliding_window) == (7, 8, 8)
        assert view.get_text_config() is view and isinstance(view, GrinMoeConfig)
        assert view.to_dict()["sliding_window"] == 7

    def test_view_writes_through(self):
        config = GrinMoeConfig()
        view = config.get_text_config(decoder=True)
        view.vocab_size, view.sliding_window = 100, 12
        assert (config.vocab_size, config.sliding_window) == (100, 11)
        config.sliding_window = None
        assert view.sliding_window is None

    @pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda view: pickle.loads(pickle.dumps(view))])
    def test_copied_view_counts_visible_keys(self, duplicate):
        view = duplicate(GrinMoeConfig(sliding_window=7).get_text_config(decoder=True))
        assert (view.sliding_window, view.to_dict()["sliding_window"]) == (8, 7)

    def test_no_field_leads_to_a_config(self):
        """vLLM walks through a config's attributes and into every config among them."""
        config = GrinMoeConfig()
        config.get_text_config(decoder=True)
        assert not any(isinstance(value, PreTrainedConfig) for value in vars(config).values())

    def test_caches_are_sized_by_it(self):
        config = GrinMoeConfig(sliding_window=7, num_hidden_layers=1)
        assert DynamicCache(config=config).layers[0].sliding_window == 8
        assert StaticCache(config=config, max_cache_len=64).layers[0].max_cache_len == 8

    def test_full_attention_has_no_view(self):
        config = GrinMoeConfig(sliding_window=None)
        assert config.get_text_config(decoder=True) is config and config.visible_keys is None


def test_sharding_plans_name_modules_that_exist(tiny_model):
    modules = {name for name, _ in tiny_model().model.named_modules()} | {
        name for name, _ in tiny_model().model.named_parameters()
    }
    config = tiny_model().config
    for plan in (config.base_model_tp_plan, config.base_model_ep_plan, config.base_model_pp_plan):
        for pattern in plan:
            assert pattern.replace("*", "0") in modules, pattern


def test_heads_may_have_a_size_of_their_own(tmp_path):
    """Where hidden_size is no multiple of their number, and with one LongRoPE factor for each of their frequencies."""
    fields = {"hidden_size": 40, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8}
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.0] * 4}
    rope["original_max_position_embeddings"] = 16
    GrinMoeConfig(**fields, rope_parameters=rope).save_pretrained(tmp_path)
    assert GrinMoeConfig.from_pretrained(tmp_path).head_size == 8
    # Library code takes a None as it is.
    assert "head_dim" not in GrinMoeConfig(head_dim=None).to_dict()
