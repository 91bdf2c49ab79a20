"""`grinmoe export`: the result computes what its source does, round trips are exact, and memory is that of one shard."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    MixtralForSequenceClassification,
    PhimoeForCausalLM,
)

import grinmoe_cli
from grinmoe import GrinMoeConfig, GrinMoeForCausalLM, GrinMoeForSequenceClassification, conversion
from grinmoe.checkpoint_grinmoe import WORKSPACE, Workspace
from grinmoe.conversion.compare import compare_logits, require_equal, text_lengths
from grinmoe.conversion.configs import ConversionError, UnequalLogitsError, to_phimoe
from grinmoe.conversion.export import ExportOptions, export_checkpoint, official_entries, read_config
from grinmoe.conversion.shards import WeightSource, write_shards
from tests import tiny
from tests.tiny import tiny_config

EQUAL = 1e-5
WINDOW = 12  # keys that a token sees
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.0, 2.7, 4.4, 6.1],
    "original_max_position_embeddings": 16,
}


def config_of(**overrides) -> GrinMoeConfig:
    """Tiny, with weights so large that a wrong one shows."""
    return tiny_config(**{"sliding_window": WINDOW - 1, "initializer_range": 0.3, **overrides})


def model_of(**overrides) -> GrinMoeForCausalLM:
    torch.manual_seed(0)
    model = GrinMoeForCausalLM(config_of(**overrides)).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name:
            torch.nn.init.normal_(parameter, mean=float("norm.weight" in name), std=0.3)
    return model


def logits_of(model, length: int) -> torch.Tensor:
    ids = torch.arange(length).mul(7).remainder(90).unsqueeze(0)
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def assert_same_logits(model, other, bound: float = EQUAL) -> None:
    for length in (WINDOW // 2, 3 * WINDOW):
        assert (logits_of(model, length) - logits_of(other, length)).abs().max() <= bound


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    model_of().save_pretrained(folder, max_shard_size="20KB")
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def phimoe(checkpoint, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "phimoe"
    export_checkpoint(ExportOptions(str(checkpoint), "phimoe", str(folder)))
    return folder


class TestPhimoe:
    def test_transformers_own_class_gives_the_same_logits(self, checkpoint, phimoe):
        """On a text shorter than the window and on one longer."""
        theirs = PhimoeForCausalLM.from_pretrained(phimoe).eval()
        assert_same_logits(GrinMoeForCausalLM.from_pretrained(checkpoint), theirs)

    def test_the_window_is_what_makes_them_equal(self, checkpoint, phimoe):
        theirs = PhimoeForCausalLM.from_pretrained(phimoe, sliding_window=WINDOW - 1).eval()
        ours = GrinMoeForCausalLM.from_pretrained(checkpoint)
        assert (logits_of(ours, 3 * WINDOW) - logits_of(theirs, 3 * WINDOW)).abs().max() > 0.01

    def test_auto_classes_find_transformers_own(self, phimoe):
        assert type(AutoModelForCausalLM.from_pretrained(phimoe)) is PhimoeForCausalLM
        assert json.loads((phimoe / "config.json").read_text())["architectures"] == ["PhiMoEForCausalLM"]
        assert not list(phimoe.glob("*.py"))

    def test_what_it_says_of_the_difference(self, phimoe):
        record = json.loads((phimoe / "export.json").read_text())
        assert [one["tokens"] for one in record["logits"]] == [WINDOW // 2, 64]
        assert all(one["difference"] <= EQUAL < one["largest"] for one in record["logits"])

    def test_companions_come_along(self, phimoe):
        assert (phimoe / "generation_config.json").is_file()
        assert (phimoe / "tokenizer.json").read_text() == "{}"

    def test_there_and_back_is_exact(self, checkpoint, phimoe, tmp_path):
        export_checkpoint(ExportOptions(str(phimoe), "safetensors", str(tmp_path / "back")))
        first, last = WeightSource(checkpoint), WeightSource(tmp_path / "back")
        assert first.shapes == last.shapes
        for name in first.shapes:
            assert torch.equal(first.read(name), last.read(name)), name
        config, back = (GrinMoeConfig.from_pretrained(folder).to_dict() for folder in (checkpoint, tmp_path / "back"))
        assert config == back

    def test_fields_that_phimoe_has_not_come_back(self):
        config = config_of(router_estimator="sparsemixer_togo", expert_dropout=0.1, router_z_loss_coef=0.5)
        assert GrinMoeConfig.from_dict(to_phimoe(config)).to_dict() == config.to_dict()

    def test_heads_of_their_own_size(self, tmp_path):
        """Phi-tiny-MoE: fewer heads than hidden_size has room for."""
        model = model_of(head_dim=6, sliding_window=None)
        model.save_pretrained(tmp_path / "model")
        export_checkpoint(ExportOptions(str(tmp_path / "model"), "phimoe", str(tmp_path / "phimoe")))
        assert_same_logits(model, PhimoeForCausalLM.from_pretrained(tmp_path / "phimoe").eval())
        # And one that Transformers saved.
        PhimoeForCausalLM.from_pretrained(tmp_path / "phimoe").save_pretrained(tmp_path / "theirs")
        export_checkpoint(ExportOptions(str(tmp_path / "theirs"), "safetensors", str(tmp_path / "ours")))
        assert_same_logits(model, GrinMoeForCausalLM.from_pretrained(tmp_path / "ours"))

    def test_longrope_keeps_its_factors_and_says_what_transformers_does(self, goldens, tmp_path):
        folder = goldens["golden-c"].folder
        record = export_checkpoint(ExportOptions(str(folder), "phimoe", str(tmp_path / "phimoe")))
        assert any("LongRoPE" in note for note in record["notes"])
        by_length = {one["tokens"]: one for one in record["logits"]}
        assert {31, 32, 33} < by_length.keys()
        for length, one in by_length.items():
            assert (one["difference"] <= EQUAL) == (length < 32), length
            # With the released frequencies in Transformers' class nothing is left.
            assert one["unexplained"] <= EQUAL
        back, config = GrinMoeConfig.from_pretrained(tmp_path / "phimoe"), GrinMoeConfig.from_pretrained(folder)
        for name in ("short_factor", "long_factor", "original_max_position_embeddings"):
            assert back.rope_parameters[name] == config.rope_parameters[name]
        # What the config left out is written out, since phimoe does not compute it.
        written = json.loads((tmp_path / "phimoe" / "config.json").read_text())["rope_scaling"]
        rotary = GrinMoeForCausalLM(config).model.rotary_emb
        assert written["short_mscale"] == pytest.approx(rotary.short_mscale)
        assert written["long_mscale"] == pytest.approx(rotary.long_mscale)

    def test_old_spellings_of_longrope_are_exported_as_they_are_meant(self, tmp_path):
        """transformers#42513: the length beside rope_scaling was lost, and with it the scales."""
        scaling = {"type": "longrope", **{name: LONGROPE[name] for name in ("short_factor", "long_factor")}}
        fields = {"rope_scaling": scaling, "original_max_position_embeddings": 16, "max_position_embeddings": 64}
        model_of(**fields, sliding_window=None).save_pretrained(tmp_path / "model")
        file = tmp_path / "model" / "config.json"  # as the user wrote it
        content = json.loads(file.read_text())
        del content["rope_parameters"]
        file.write_text(json.dumps({**content, **fields}))
        record = export_checkpoint(ExportOptions(str(tmp_path / "model"), "phimoe", str(tmp_path / "phimoe")))
        written = json.loads((tmp_path / "phimoe" / "config.json").read_text())
        scale = math.sqrt(1 + math.log(4) / math.log(16))
        for rope in (written["rope_scaling"], written["rope_parameters"]):
            assert rope["original_max_position_embeddings"] == 16 and "longrope_switch" not in rope
            assert (rope["short_mscale"], rope["long_mscale"]) == pytest.approx((scale, scale))
        assert written["original_max_position_embeddings"] == 16
        assert {15, 16, 17} < {one["tokens"] for one in record["logits"]}
        assert all(one["unexplained"] <= EQUAL for one in record["logits"])
        theirs = PhimoeForCausalLM.from_pretrained(tmp_path / "phimoe").eval()
        assert (
            logits_of(GrinMoeForCausalLM.from_pretrained(tmp_path / "model"), 15) - logits_of(theirs, 15)
        ).abs().max() <= EQUAL

    @pytest.mark.parametrize(
        "fields, message",
        [
            ({"norm_type": "rms_norm"}, "norm_type='rms_norm'"),
            ({"router_estimator": "topk"}, "router_estimator='topk'"),
            ({"router_estimator": "sparsemixer_v2_star"}, "router_estimator='sparsemixer_v2_star'"),
            ({"num_experts_per_tok": 3}, "num_experts_per_tok=3"),
            ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "rope_type='linear'"),
            (
                {"rope_parameters": {**LONGROPE, "longrope_switch": "above_original"}},
                "longrope_switch='above_original'",
            ),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_what_it_cannot_represent_is_refused(self, fields, message, tmp_path):
        model_of(**fields).save_pretrained(tmp_path / "model")
        with pytest.raises(ConversionError, match=message):
            export_checkpoint(ExportOptions(str(tmp_path / "model"), "phimoe", str(tmp_path / "out")))
        assert not (tmp_path / "out").exists()


class TestMixtral:
    @pytest.mark.parametrize(
        "fields",
        [{}, {"sliding_window": WINDOW}, {"num_experts_per_tok": 3, "head_dim": 6}, {"tie_word_embeddings": True}],
        ids=["full attention", "window", "top-3, heads of their own size", "tied"],
    )
    def test_it_becomes_ours_with_the_same_logits(self, fields, tmp_path):
        own = config_of().to_dict()
        shared = (
            "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
            "max_position_embeddings num_local_experts initializer_range eos_token_id"
        )
        torch.manual_seed(0)
        mixtral = MixtralForCausalLM(MixtralConfig(**{name: own[name] for name in shared.split()}, **fields)).eval()
        for name, parameter in mixtral.named_parameters():
            if "norm" in name:
                torch.nn.init.normal_(parameter, mean=1.0, std=0.3)
        mixtral.save_pretrained(tmp_path / "mixtral")
        record = export_checkpoint(ExportOptions(str(tmp_path / "mixtral"), "safetensors", str(tmp_path / "ours")))
        ours = GrinMoeForCausalLM.from_pretrained(tmp_path / "ours")
        assert_same_logits(mixtral, ours)
        assert all(one["difference"] <= EQUAL for one in record["logits"])
        assert ours.config.router_estimator == "topk_renormalized"
        back = export_checkpoint(ExportOptions(str(tmp_path / "ours"), "mixtral", str(tmp_path / "back")))
        assert all(one["difference"] <= EQUAL for one in back["logits"])
        assert_same_logits(mixtral, AutoModelForCausalLM.from_pretrained(tmp_path / "back"))
        first, last = WeightSource(tmp_path / "mixtral"), WeightSource(tmp_path / "back")
        assert first.shapes == last.shapes
        assert all(torch.equal(first.read(name), last.read(name)) for name in first.shapes)
        configs = [MixtralConfig.from_pretrained(tmp_path / name).to_dict() for name in ("mixtral", "back")]
        different = {name for name in configs[0] | configs[1] if configs[0].get(name) != configs[1].get(name)}
        assert different <= {"grinmoe", "head_dim"}

    def test_a_model_of_ours_goes_there_and_back(self, tmp_path):
        fields = {"attention_bias": False, "lm_head_bias": False, "norm_type": "rms_norm"}
        model = model_of(**fields, router_estimator="topk_renormalized", router_jitter_noise=0.2, expert_dropout=0.1)
        model.save_pretrained(tmp_path / "model")
        export_checkpoint(ExportOptions(str(tmp_path / "model"), "mixtral", str(tmp_path / "mixtral")))
        assert_same_logits(model, MixtralForCausalLM.from_pretrained(tmp_path / "mixtral").eval())
        export_checkpoint(ExportOptions(str(tmp_path / "mixtral"), "safetensors", str(tmp_path / "back")))
        configs = [GrinMoeConfig.from_pretrained(tmp_path / name).to_dict() for name in ("model", "back")]
        assert configs[0] == configs[1]

    @pytest.mark.parametrize(
        "rope",
        [
            {"rope_type": "linear", "factor": 2.0},
            {"rope_type": "dynamic", "factor": 2.0},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
            LONGROPE,
            {**LONGROPE, "attention_factor": 1.4},
            {**LONGROPE, "short_mscale": 1.1, "long_mscale": 1.7},  # Mixtral's class ignores phimoe's scales
        ],
        ids=["linear", "dynamic", "yarn", "longrope", "longrope, its scale", "longrope, scales of phimoe"],
    )
    def test_its_rope_comes_along_and_back(self, rope, tmp_path):
        sizes = {name: getattr(config_of(), name) for name in tiny.SIZES} | {"head_dim": 8, "num_local_experts": 4}
        torch.manual_seed(0)
        config = MixtralConfig(**sizes, initializer_range=0.3, rope_parameters={"rope_theta": 1e4, **rope})
        MixtralForCausalLM(config).save_pretrained(tmp_path / "mixtral")
        for source, to, result in (("mixtral", "safetensors", "ours"), ("ours", "mixtral", "back")):
            record = export_checkpoint(ExportOptions(str(tmp_path / source), to, str(tmp_path / result)))
            assert all(one["difference"] <= EQUAL for one in record["logits"])
            for length in (15, 16, 17, 65):
                mixtral = MixtralForCausalLM.from_pretrained(tmp_path / "mixtral").eval()
                other = AutoModelForCausalLM.from_pretrained(tmp_path / result).eval()
                assert (logits_of(mixtral, length) - logits_of(other, length)).abs().max() <= EQUAL

    @pytest.mark.parametrize(
        "rope, message",
        [
            (LONGROPE, "longrope_switch='at_original': Mixtral has"),
            (
                {**LONGROPE, "longrope_switch": "above_original", "short_mscale": 1.1, "long_mscale": 1.2},
                "short_mscale=1.1 and long_mscale=1.2: Mixtral has one scale",
            ),
        ],
    )
    def test_longrope_that_mixtral_has_not_is_refused(self, rope, message, tmp_path):
        fields = {"attention_bias": False, "lm_head_bias": False, "norm_type": "rms_norm"}
        fields |= {"router_estimator": "topk_renormalized", "rope_parameters": rope}
        model_of(**fields).save_pretrained(tmp_path / "model")
        with pytest.raises(ConversionError, match=message):
            export_checkpoint(ExportOptions(str(tmp_path / "model"), "mixtral", str(tmp_path / "out")))
        fields["rope_parameters"] = {
            **rope,
            "longrope_switch": "above_original",
            "short_mscale": 1.3,
            "long_mscale": 1.3,
        }
        model_of(**fields).save_pretrained(tmp_path / "one scale")
        record = export_checkpoint(ExportOptions(str(tmp_path / "one scale"), "mixtral", str(tmp_path / "mixtral")))
        assert all(one["difference"] <= EQUAL for one in record["logits"])

    @pytest.mark.parametrize(
        "fields, message",
        [
            ({"sliding_window": 1}, "sliding_window=1: a token"),
            ({"router_jitter_noise": 1.5}, "router_jitter_noise=1.5 is not in"),
            ({"partial_rotary_factor": 0.5}, "this mixtral has no counterpart: partial_rotary_factor=0.5"),
            ({"sliding_window": 8, "layer_types": ["full_attention", "sliding_attention"]}, "layer_types="),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_a_mixtral_that_we_are_not_is_refused_by_its_own_values(self, fields, message, tmp_path):
        sizes = {name: getattr(config_of(), name) for name in tiny.SIZES}
        MixtralForCausalLM(MixtralConfig(**sizes, num_local_experts=4)).save_pretrained(tmp_path / "m")
        file = tmp_path / "m" / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
        with pytest.raises(ConversionError, match=message):
            export_checkpoint(ExportOptions(str(tmp_path / "m"), "safetensors", str(tmp_path / "out")))
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("name, value", [("norm_type", "layer_norm"), ("router_estimator", "sparsemixer_v2")])
    def test_what_mixtral_has_not_is_refused(self, name, value, tmp_path):
        fields = {"attention_bias": False, "lm_head_bias": False, "norm_type": "rms_norm"}
        model_of(**{**fields, "router_estimator": "topk_renormalized", name: value}).save_pretrained(tmp_path / "model")
        with pytest.raises(ConversionError, match=f"{name}='{value}': Mixtral has"):
            export_checkpoint(ExportOptions(str(tmp_path / "model"), "mixtral", str(tmp_path / "out")))

    def test_it_is_no_phimoe(self, tmp_path):
        sizes = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        MixtralForCausalLM(MixtralConfig(vocab_size=32, num_key_value_heads=2, **sizes)).save_pretrained(tmp_path / "m")
        with pytest.raises(ConversionError, match="rms_norm"):
            export_checkpoint(ExportOptions(str(tmp_path / "m"), "phimoe", str(tmp_path / "out")))


class TestSafetensors:
    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_shards_of_another_dtype_and_size(self, checkpoint, tmp_path, dtype):
        export_checkpoint(ExportOptions(str(checkpoint), "safetensors", str(tmp_path / "out"), dtype, "30KB"))
        shards = sorted((tmp_path / "out").glob("model-*.safetensors"))
        sizes = [sum(tensor.nbytes for tensor in load_file(shard).values()) for shard in shards]
        assert len(shards) > 1 and max(sizes) <= 30_000
        source, result = WeightSource(checkpoint), WeightSource(tmp_path / "out")
        for name in source.shapes:
            assert torch.equal(result.read(name), source.read(name).to(getattr(torch, dtype))), name
        assert GrinMoeForCausalLM.from_pretrained(tmp_path / "out").dtype == getattr(torch, dtype)

    def test_eight_bits_are_those_of_the_quantised_model(self, checkpoint, tmp_path):
        pytest.importorskip("bitsandbytes")
        export_checkpoint(ExportOptions(str(checkpoint), "safetensors", str(tmp_path / "out"), "int8"))
        model, dense = (
            GrinMoeForCausalLM.from_pretrained(tmp_path / "out"),
            GrinMoeForCausalLM.from_pretrained(checkpoint),
        )
        for layer, reference in zip(model.model.layers, dense.model.layers, strict=True):
            experts, exact = layer.block_sparse_moe.experts, reference.block_sparse_moe.experts
            for name in ("gate_up_proj", "down_proj"):
                assert getattr(experts, name).dtype == torch.int8
                for expert in range(4):
                    weight = getattr(exact, name)[expert]
                    rounded = experts.dequantize(name, expert, torch.float32)
                    step = weight.abs().amax(dim=1, keepdim=True) / 127
                    assert ((rounded - weight).abs() <= 0.51 * step).all()
            assert torch.equal(layer.self_attn.q_proj.weight, reference.self_attn.q_proj.weight)

    def test_a_number_that_float16_does_not_hold_is_named(self, tmp_path):
        model = model_of()
        model.model.layers[1].block_sparse_moe.experts.down_proj.data[2, 3, 4] = 1e5
        model.save_pretrained(tmp_path / "model")
        with pytest.raises(ConversionError, match=r"layers\.1\.block_sparse_moe\.experts\.2\.w2\.weight has 1e\+05"):
            export_checkpoint(ExportOptions(str(tmp_path / "model"), "safetensors", str(tmp_path / "out"), "float16"))
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("save_original_format", [True, False], ids=["official", "fused"])
    def test_fused_experts_are_taken_apart(self, tmp_path, save_original_format):
        model = model_of()
        model.save_pretrained(tmp_path / "model", save_original_format=save_original_format)
        export_checkpoint(ExportOptions(str(tmp_path / "model"), "safetensors", str(tmp_path / "out")))
        assert "model.layers.1.block_sparse_moe.experts.3.w3.weight" in WeightSource(tmp_path / "out")
        assert_same_logits(model, GrinMoeForCausalLM.from_pretrained(tmp_path / "out"), bound=0)

    def test_a_classifier_keeps_its_head(self, tmp_path):
        torch.manual_seed(0)
        model = GrinMoeForSequenceClassification(config_of(num_labels=3, pad_token_id=95)).eval()
        model.save_pretrained(tmp_path / "model")
        export_checkpoint(ExportOptions(str(tmp_path / "model"), "safetensors", str(tmp_path / "out")))
        loaded = GrinMoeForSequenceClassification.from_pretrained(tmp_path / "out")
        assert torch.equal(loaded.score.weight, model.score.weight)
        assert loaded.config.architectures == ["GrinMoeForSequenceClassification"]
        with pytest.raises(ConversionError, match="no language head"):
            export_checkpoint(ExportOptions(str(tmp_path / "model"), "phimoe", str(tmp_path / "phimoe")))


@pytest.mark.parametrize(
    "fields, lengths",
    [
        ({"sliding_window": 2047, "max_position_embeddings": 4096}, [64, 2112]),  # as released
        ({"sliding_window": None, "max_position_embeddings": 131072}, [64]),
        ({"sliding_window": 11, "max_position_embeddings": 64}, [6, 64]),
    ],
    ids=["released", "long without a window", "small"],
)
def test_texts_that_are_compared_are_not_as_long_as_the_model_allows(fields, lengths):
    assert text_lengths(config_of(**fields)) == lengths


@pytest.mark.parametrize(
    "fields, lengths",
    [
        ({"rope_parameters": LONGROPE}, [6, 15, 16, 17, 64]),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, [6, 63, 64, 65]),
        # Of longer texts the last tokens are compared, at their positions.
        (
            {
                "rope_parameters": {**LONGROPE, "original_max_position_embeddings": 4096},
                "max_position_embeddings": 131072,
            },
            [6, 76, 4095, 4096, 4097],
        ),
    ],
    ids=["longrope", "dynamic", "long"],
)
def test_texts_are_compared_around_the_length_where_rope_changes(fields, lengths):
    assert text_lengths(config_of(**fields)) == lengths


@pytest.mark.parametrize("positions_off, is_kept", [(0.0, True), (0.005, True), (0.02, False), (1.0, False)])
def test_a_difference_that_should_not_be_is_an_error(positions_off, is_kept):
    row = {"tokens": 8, "unexplained": 0.5, "largest": 9.0, "positions_off": positions_off}
    if is_kept:
        return require_equal([row])
    with pytest.raises(UnequalLogitsError, match=r"text of 8 tokens the logits differ by 0\.5 of 9 "):
        require_equal([row])


def test_positions_that_are_off_are_counted(checkpoint):
    """By hand: one whose logits are another's, and one that is not a number."""

    def change(model):
        def hook(module, inputs, logits):
            logits[:, 1], logits[:, 3] = 0.0, math.nan

        model.lm_head.register_forward_hook(hook)

    both = (GrinMoeForCausalLM, checkpoint)
    rows = compare_logits(both, both, GrinMoeConfig.from_pretrained(checkpoint), explained=change)
    assert [one["positions_off"] * one["tokens"] for one in rows] == pytest.approx([2, 2])
    assert all(one["difference"] == 0 for one in rows)


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
@pytest.mark.parametrize("wrong", ["sliding_window", "rms_norm_eps", "rope_theta"])
def test_an_export_that_computes_something_else_is_not_kept(checkpoint, tmp_path, monkeypatch, capsys, wrong, dtype):
    """Also where the cast moves logits by more than the wrong field could hide behind."""
    right = conversion.export.to_phimoe
    values = {"sliding_window": WINDOW - 1, "rms_norm_eps": 0.1, "rope_theta": 5e4}

    def lossy(config):
        content = right(config)
        target = content["rope_parameters"] if wrong == "rope_theta" else content
        target[wrong] = values[wrong]
        return content

    monkeypatch.setattr(conversion.export, "to_phimoe", lossy)
    command = ["export", "--model", str(checkpoint), "--to", "phimoe", "--dtype", dtype]
    assert grinmoe_cli.main([*command, "--output", str(tmp_path / "out")]) == 2
    assert "does not compute what its source does, and was not kept" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert grinmoe_cli.main([*command, "--output", str(tmp_path / "unchecked"), "--no-compare"]) == 0


def test_a_cast_alone_is_no_difference(checkpoint, tmp_path):
    record = export_checkpoint(ExportOptions(str(checkpoint), "phimoe", str(tmp_path / "out"), "bfloat16"))
    assert all(one["unexplained"] <= EQUAL < one["difference"] for one in record["logits"])


def test_longrope_scales_are_those_of_the_model(tmp_path):
    """Also where the config names a factor of its own."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 32.0, "original_max_position_embeddings": 16}
    rope |= {"short_factor": [1.0] * 4, "long_factor": [1.5] * 4}
    model = model_of(rope_parameters=rope, sliding_window=None)
    written = to_phimoe(model.config)["rope_scaling"]
    assert written["short_mscale"] == pytest.approx(model.model.rotary_emb.short_mscale)
    assert written["long_mscale"] == pytest.approx(model.model.rotary_emb.long_mscale)


def test_a_mixtral_classifier_keeps_its_labels(tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    mixtral = MixtralForSequenceClassification(
        MixtralConfig(vocab_size=32, num_key_value_heads=2, num_labels=5, pad_token_id=0, **sizes)
    )
    mixtral.save_pretrained(tmp_path / "m")
    record = export_checkpoint(ExportOptions(str(tmp_path / "m"), "safetensors", str(tmp_path / "out")))
    ours = GrinMoeForSequenceClassification.from_pretrained(tmp_path / "out")
    assert ours.config.num_labels == 5 and torch.equal(ours.score.weight, mixtral.score.weight)
    assert "logits" not in record


def test_a_window_of_a_phimoe_is_said_to_be_one_more(checkpoint, phimoe, tmp_path):
    record = export_checkpoint(ExportOptions(str(phimoe), "safetensors", str(tmp_path / "ours")))
    assert record["notes"] == []
    file = phimoe / "config.json"
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    for path in phimoe.iterdir():
        (foreign / path.name).write_bytes(path.read_bytes())
    content = json.loads(file.read_text())
    del content["grinmoe"]
    (foreign / "config.json").write_text(json.dumps(content))
    record = export_checkpoint(ExportOptions(str(foreign), "safetensors", str(tmp_path / "other")))
    assert f"sliding_window={WINDOW} is taken as in the released models" in record["notes"][0]


def test_no_more_than_one_shard_is_in_memory(checkpoint, tmp_path):
    """Bytes of all tensors that were made and are alive, at most: those of a shard, whatever the checkpoint's size."""
    alive = most = 0

    def gone(size: int) -> None:
        nonlocal alive
        alive -= size

    def counted(make):
        def wrapped():
            nonlocal alive, most
            tensor = make().clone()
            alive += tensor.nbytes
            most = max(most, alive)
            weakref.finalize(tensor, gone, tensor.nbytes)
            return tensor

        return wrapped

    source = WeightSource(checkpoint)
    entries = list(official_entries(source, read_config(checkpoint)))
    total = write_shards([dataclasses.replace(entry, make=counted(entry.make)) for entry in entries], tmp_path, "20KB")
    assert total == sum(entry.nbytes for entry in entries) > 5 * 20_000
    assert 10_000 < most <= 20_000 and alive == 0


class TestCommand:
    def run(self, *arguments, capsys) -> tuple[int, str, str]:
        code = grinmoe_cli.main(["export", *map(str, arguments)])
        output = capsys.readouterr()
        return code, output.out, output.err

    def test_it_says_what_it_wrote(self, checkpoint, tmp_path, capsys):
        out = tmp_path / "out [" / "b]"  # which a terminal library takes for its markup
        code, said, _ = self.run("--model", checkpoint, "--to", "phimoe", "--output", out, capsys=capsys)
        assert code == 0 and str(out) in said and "largest difference of logits" in said
        assert PhimoeForCausalLM.from_pretrained(out).dtype == torch.float32

    def test_without_a_comparison_it_says_so(self, checkpoint, tmp_path, capsys):
        options = ("--to", "phimoe", "--output", tmp_path / "out", "--no-compare", "--dtype", "bfloat16")
        code, said, _ = self.run("--model", checkpoint, *options, capsys=capsys)
        assert code == 0 and "not compared, as asked" in said

    @pytest.fixture
    def broken(self, checkpoint, tmp_path):
        """Makers of folders that are no whole checkpoint, by what is wrong."""
        folder = tmp_path / "broken"
        folder.mkdir()
        for file in checkpoint.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())

        def make(what: str) -> Path:
            shards = sorted(folder.glob("model-*.safetensors"))
            if what == "a shard is missing":
                shards[1].unlink()
            elif what == "a shard is cut off":
                shards[1].write_bytes(shards[1].read_bytes()[:-40])
            elif what == "a tensor is missing":
                tensors = load_file(shards[1])
                tensors.popitem()
                save_file(tensors, shards[1], metadata={"format": "pt"})
            elif what == "the index lacks a tensor":
                index = json.loads((folder / "model.safetensors.index.json").read_text())
                del index["weight_map"]["model.layers.0.self_attn.q_proj.weight"]
                (folder / "model.safetensors.index.json").write_text(json.dumps(index))
            elif what == "an adapter":
                (folder / "config.json").rename(folder / "adapter_config.json")
            elif what == "another model":
                (folder / "config.json").write_text('{"model_type": "llama"}')
            elif what == "no JSON":
                (folder / "config.json").write_text("{")
            elif what == "quantised":
                content = json.loads((folder / "config.json").read_text())
                content["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
                (folder / "config.json").write_text(json.dumps(content))
            return folder

        return make

    @pytest.mark.parametrize(
        "what, message",
        [
            ("a shard is missing", "download that shard again"),
            ("a shard is cut off", "truncated"),
            ("a tensor is missing", "lacks 1 tensors"),
            ("the index lacks a tensor", "1 tensors that the index does not name"),
            ("an adapter", "grinmoe merge --adapter"),
            ("another model", "model_type='llama'"),
            ("no JSON", "cannot be read"),
        ],
    )
    def test_a_broken_source_is_one_line_and_leaves_nothing(self, broken, tmp_path, capsys, what, message):
        out = tmp_path / "out"
        code, _, said = self.run("--model", broken(what), "--to", "safetensors", "--output", out, capsys=capsys)
        assert code == 2 and message in said and len(said.strip().splitlines()) == 1
        assert not out.exists()

    def test_a_quantised_one_is_refused(self, tmp_path, capsys, checkpoint):
        pytest.importorskip("bitsandbytes")
        export_checkpoint(ExportOptions(str(checkpoint), "safetensors", str(tmp_path / "int8"), "int8"))
        code, _, said = self.run(
            "--model", tmp_path / "int8", "--to", "phimoe", "--output", tmp_path / "out", capsys=capsys
        )
        assert code == 2 and "is quantised" in said and not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        "options, message",
        [
            (("--to", "onnx"), "invalid choice: 'onnx'"),
            (("--to", "phimoe", "--dtype", "int8"), "--dtype int8 is for safetensors and gguf"),
            (("--to", "phimoe", "--max-shard-size", "big"), "--max-shard-size 'big' is not a size"),
            (("--to", "phimoe", "--model", "./nowhere"), "no folder ./nowhere"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_wrong_options_are_named(self, checkpoint, tmp_path, capsys, options, message):
        arguments = ["export", "--model", str(checkpoint), "--output", str(tmp_path / "out"), *options]
        try:
            code = grinmoe_cli.main(arguments)
        except SystemExit as end:
            code = end.code
        assert code == 2 and message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()

    def test_what_a_killed_export_left_is_in_nobody_s_way(self, checkpoint, tmp_path, capsys):
        out = tmp_path / "out"
        out.mkdir()
        left = Workspace.make(out, WORKSPACE)
        (left.new / "config.json").write_text("{")
        left.close()  # as the end of its process does
        code, _, _ = self.run("--model", checkpoint, "--to", "safetensors", "--output", out, capsys=capsys)
        assert code == 0 and not list(out.glob(".saving-*"))

    def test_a_home_folder_that_the_shell_left_is_found(self, checkpoint, tmp_path, capsys, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        code, _, _ = self.run("--model", checkpoint, "--to", "safetensors", "--output=~/out", capsys=capsys)
        assert code == 0 and (tmp_path / "out" / "config.json").is_file()

    def test_a_folder_with_something_in_it_is_left_alone(self, checkpoint, tmp_path, capsys):
        (tmp_path / "notes.txt").write_text("mine")
        code, _, said = self.run("--model", checkpoint, "--to", "phimoe", "--output", tmp_path, capsys=capsys)
        assert code == 2 and re.search("is not empty", said)
        assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
