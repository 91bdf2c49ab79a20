"""An export to phimoe as other engines take it: what is written for them, and how far they are from this model."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PhimoeConfig, PhimoeForCausalLM

from grinmoe import GrinMoeConfig, GrinMoeForCausalLM
from grinmoe.conversion.export import ExportOptions, export_checkpoint, read_config
from grinmoe.conversion.phimoe import engine_causes
from grinmoe.conversion.shards import WeightSource
from tests.conversion.engine_layers import engine_logits, engine_module
from tests.conversion.test_export import EQUAL, WINDOW, assert_same_logits, logits_of, model_of

BARE = {"attention_bias": False, "lm_head_bias": False}
NO_HEAD_BIAS = {"lm_head_bias": False}


def exported(model: GrinMoeForCausalLM, folder: Path, **options) -> Path:
    model.save_pretrained(folder / "model")
    export_checkpoint(ExportOptions(str(folder / "model"), "phimoe", str(folder / "phimoe"), **options))
    return folder / "phimoe"


def record_of(folder: Path) -> dict:
    return json.loads((folder / "export.json").read_text())


@pytest.mark.parametrize(
    "fields", [BARE, {**BARE, "tie_word_embeddings": True}, NO_HEAD_BIAS], ids=["bare", "tied", "head"]
)
class TestWrittenOut:
    """vLLM refuses a checkpoint without biases on attention and head, or without a head."""

    def test_transformers_gives_the_same_logits(self, fields, tmp_path):
        model = model_of(**fields)
        phimoe = exported(model, tmp_path)
        shapes = WeightSource(phimoe).shapes
        assert {"lm_head.weight", "lm_head.bias", "model.layers.0.self_attn.o_proj.bias"} <= shapes.keys()
        config = json.loads((phimoe / "config.json").read_text())
        assert (config["attention_bias"], config["lm_head_bias"], config["tie_word_embeddings"]) == (True, True, False)
        assert_same_logits(model, PhimoeForCausalLM.from_pretrained(phimoe).eval())
        # And loads here as it is.
        assert_same_logits(model, GrinMoeForCausalLM.from_pretrained(phimoe).eval())

    def test_the_way_back_is_exact(self, fields, tmp_path):
        phimoe = exported(model_of(**fields), tmp_path)
        export_checkpoint(ExportOptions(str(phimoe), "safetensors", str(tmp_path / "back")))
        first, last = WeightSource(tmp_path / "model"), WeightSource(tmp_path / "back")
        assert first.shapes == last.shapes
        assert all(torch.equal(first.read(name), last.read(name)) for name in first.shapes)
        configs = [GrinMoeConfig.from_pretrained(tmp_path / name).to_dict() for name in ("model", "back")]
        assert configs[0] == configs[1]

    def test_what_was_trained_since_stays(self, fields, tmp_path):
        phimoe = exported(model_of(**fields), tmp_path)
        weights = load_file(phimoe / "model.safetensors")
        for name in ("lm_head.weight", "lm_head.bias", "model.layers.1.self_attn.q_proj.bias"):
            weights[name] += 0.5
        save_file(weights, phimoe / "model.safetensors", metadata={"format": "pt"})
        export_checkpoint(ExportOptions(str(phimoe), "safetensors", str(tmp_path / "back")))
        assert_same_logits(
            PhimoeForCausalLM.from_pretrained(phimoe).eval(),
            GrinMoeForCausalLM.from_pretrained(tmp_path / "back").eval(),
        )


class TestDifferences:
    def test_the_head_s_bias_is_measured(self, tmp_path):
        model = model_of()
        record = record_of(exported(model, tmp_path))
        (note,) = (note for note in record["notes"] if "vLLM" in note)
        assert "they do not add lm_head.bias (which spans " in note
        measured = record["engines"]
        ids = torch.randint(
            model.config.vocab_size, (1, measured["tokens"]), generator=torch.Generator().manual_seed(0)
        )
        with torch.no_grad():
            own = model(ids).logits[0].log_softmax(-1)
            other = (model(ids).logits[0] - model.lm_head.bias).log_softmax(-1)
        assert measured["kl"] == pytest.approx((own.exp() * (own - other)).sum(-1).mean().item(), rel=1e-3)
        assert measured["next_token_differs"] == (own.argmax(-1) != other.argmax(-1)).float().mean().item() > 0

    def test_a_bias_that_is_the_same_everywhere_changes_nothing(self, tmp_path):
        model = model_of()
        model.lm_head.bias.data.fill_(3.0)
        record = record_of(exported(model, tmp_path))
        assert "engines" not in record and not any("vLLM" in note for note in record["notes"])

    def test_other_fields_that_they_do_not_read(self, tmp_path):
        model = model_of(**NO_HEAD_BIAS, router_jitter_noise=0.3, hidden_act="gelu")
        exported(model, tmp_path, compare=False)
        causes = engine_causes(read_config(tmp_path / "phimoe"), WeightSource(tmp_path / "phimoe"))
        assert causes == [
            "they mask routing with 0.01, not router_jitter_noise=0.3",
            "their experts have silu, not hidden_act='gelu'",
        ]


ENGINES = {"vllm": "GRINMOE_VLLM_PHIMOE", "sglang": "GRINMOE_SGLANG_PHIMOE"}


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("fields", [{}, BARE, {**BARE, "tie_word_embeddings": True}], ids=["biases", "bare", "tied"])
def test_the_engines_own_files(engine, fields, tmp_path):
    """Their code builds, loads and runs the export (docs/export.md says how to get their files)."""
    if not (file := os.environ.get(ENGINES[engine])):
        pytest.skip(f"{ENGINES[engine]} does not say where {engine}'s phimoe.py is")
    model = model_of(**fields, sliding_window=None if engine == "sglang" else WINDOW - 1)
    phimoe = exported(model, tmp_path)
    if model.lm_head.bias is not None:
        # Where a release adds it, this fails, and the note of the export can go.
        model.lm_head.bias.data.zero_()
    weights, config = load_file(phimoe / "model.safetensors"), PhimoeConfig.from_pretrained(phimoe)
    with engine_module(engine, Path(file)) as module:
        for length in (WINDOW // 2, 3 * WINDOW):
            ids = torch.arange(length).mul(7).remainder(90)
            found = engine_logits(engine, module, config, weights, ids)
            assert (found - logits_of(model, length)[0]).abs().max() <= EQUAL
