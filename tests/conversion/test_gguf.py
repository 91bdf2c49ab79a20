"""`grinmoe export --to gguf`: weights with which RMSNorm is LayerNorm, what is said of the routing, and the converter.

The real converter and llama.cpp itself (docs/export.md says how to get them):

    PATH=llama.cpp:$PATH python -m pytest -m slow tests/test_gguf_export.py
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from sentencepiece import SentencePieceProcessor
from transformers import PhimoeConfig

import grinmoe_cli
from grinmoe import GrinMoeForCausalLM
from grinmoe.conversion.export import ExportOptions, export_checkpoint, official_entries, read_config
from grinmoe.conversion.gguf import CONVERTER, centred, find_converter
from grinmoe.conversion.phimoe import routing_difference
from grinmoe.conversion.shards import WeightSource
from tests.conversion.test_export import EQUAL, WINDOW, logits_of, model_of
from tests.tokenization.tokenizer_files import train

# Stands for llama.cpp's: reads what that reads, and writes what it was asked to.
STAND_IN = """
import argparse, json, pathlib, sys
parser = argparse.ArgumentParser()
parser.add_argument("folder", type=pathlib.Path)
for name in ("--outfile", "--outtype", "--model-name"):
    parser.add_argument(name)
asked = parser.parse_args()
config = json.loads((asked.folder / "config.json").read_text())
assert config["architectures"] == ["PhiMoEForCausalLM"] and (asked.folder / "tokenizer.model").is_file()
if config["vocab_size"] == 97:
    sys.exit("ValueError: 97 is no vocabulary")
facts = {"outtype": asked.outtype, "name": asked.model_name, "config": config}
pathlib.Path(asked.outfile).write_text(json.dumps(facts))
"""


@pytest.fixture
def converter(tmp_path) -> Path:
    folder = tmp_path / "llama.cpp"
    folder.mkdir()
    (folder / CONVERTER).write_text(STAND_IN)
    return folder


def saved(tmp_path: Path, **overrides) -> Path:
    model_of(**overrides).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "tokenizer.model").write_bytes(b"pieces")
    return tmp_path / "model"


def rms_norm(hidden, shape, weight=None, bias=None, eps=1e-5):
    """As PhiMoE of llama.cpp normalises: LayerNorm without the mean."""
    return F.rms_norm(hidden, shape, weight, eps) + bias


@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied"])
@pytest.mark.parametrize("attention_bias", [True, False], ids=["biases", "no biases"])
def test_without_the_mean_rms_norm_gives_what_layer_norm_gave(tmp_path, monkeypatch, attention_bias, tied):
    folder = saved(tmp_path, attention_bias=attention_bias, tie_word_embeddings=tied, lm_head_bias=not tied)
    expected = logits_of(GrinMoeForCausalLM.from_pretrained(folder), 3 * WINDOW)
    config = read_config(folder)
    tensors = {entry.name: entry.make() for entry in centred(official_entries(WeightSource(folder), config), config)}
    # What PhiMoE requires, whether the checkpoint had it or not.
    assert {"lm_head.bias", "lm_head.weight", "model.layers.1.self_attn.o_proj.bias"} <= tensors.keys()
    other = model_of(attention_bias=True, lm_head_bias=True)
    other.load_state_dict(tensors)
    assert (logits_of(other, 3 * WINDOW) - expected).abs().max() <= 10 * EQUAL  # LayerNorm does not see the mean
    monkeypatch.setattr(F, "layer_norm", rms_norm)
    assert (logits_of(other, 3 * WINDOW) - expected).abs().max() <= 10 * EQUAL
    # The test can fail: with the mean RMSNorm gives something else.
    other.load_state_dict(tensors | {"model.embed_tokens.weight": tensors["model.embed_tokens.weight"] + 0.5})
    assert (logits_of(other, 3 * WINDOW) - expected).abs().max() > 0.01


def test_rms_norm_models_keep_their_weights(tmp_path):
    folder = saved(tmp_path, norm_type="rms_norm")
    config, source = read_config(folder), WeightSource(folder)
    tensors = {entry.name: entry.make() for entry in centred(official_entries(source, config), config)}
    assert all(torch.equal(tensors[name], source.read(name)) for name in source.shapes)
    assert not tensors["model.norm.bias"].any() and not tensors["model.layers.0.input_layernorm.bias"].any()


def test_what_routing_does_is_measured(tmp_path):
    """By hand: the same model with the other gating."""
    folder = saved(tmp_path)
    found = routing_difference(folder, read_config(folder))
    model, generator = GrinMoeForCausalLM.from_pretrained(folder), torch.Generator().manual_seed(0)
    ids = torch.randint(96, (1, 64), generator=generator)
    other = model_of(router_estimator="topk_renormalized")
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        own, changed = (one(ids).logits[0].log_softmax(-1) for one in (model, other))
    assert found["tokens"] == 64 and found["text"] == "random tokens"
    assert found["next_token_differs"] == (own.argmax(-1) != changed.argmax(-1)).float().mean() > 0
    assert found["kl"] == pytest.approx(F.kl_div(changed, own, log_target=True, reduction="batchmean").item(), rel=1e-4)
    # And nothing where the checkpoint routes so itself.
    (tmp_path / "second").mkdir()
    folder = saved(tmp_path / "second", router_estimator="topk_renormalized")
    assert routing_difference(folder, read_config(folder))["kl"] == pytest.approx(0, abs=1e-9)


def test_the_converter_gets_a_phimoe_and_its_words_are_passed_on(tmp_path, converter):
    folder = saved(tmp_path)
    record = export_checkpoint(
        ExportOptions(str(folder), "gguf", str(tmp_path / "out"), "int8", converter=str(converter))
    )
    facts = json.loads((tmp_path / "out" / "model-q8_0.gguf").read_text())
    assert facts["outtype"] == "q8_0" and "phi-3" in facts["name"].lower()
    config = PhimoeConfig(**facts["config"])
    assert config.original_max_position_embeddings == 64 and config.sliding_window == WINDOW
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["export.json", "model-q8_0.gguf"]
    assert any("routes by a softmax" in note for note in record["notes"])
    assert any("no window" in note for note in record["notes"])
    assert record["routing"]["kl"] > 0


def test_longrope_is_said_to_go_by_the_context_and_with_its_own_scale(tmp_path, converter):
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    rope["original_max_position_embeddings"] = 16
    scale = math.sqrt(1 + math.log(4) / math.log(16))  # which llama.cpp's converter computes from both lengths
    for name, scales, notes in (("computed", {}, 3), ("own", {"short_mscale": scale, "long_mscale": 1.7}, 4)):
        (tmp_path / name).mkdir()
        folder = saved(tmp_path / name, rope_parameters={**rope, **scales})
        out = tmp_path / name / "out"
        record = export_checkpoint(ExportOptions(str(folder), "gguf", str(out), converter=str(converter)))
        assert any("by the size of its context" in note for note in record["notes"])
        assert len(record["notes"]) == notes and ("1.22474" in record["notes"][-1]) == bool(scales)
        config = json.loads((out / "model-auto.gguf").read_text())["config"]
        assert config["original_max_position_embeddings"] == 16 and "longrope_switch" not in config["rope_parameters"]


class TestBadInput:
    def run(self, folder: Path, converter: Path | None, tmp_path: Path, capsys) -> str:
        given = [] if converter is None else ["--converter", str(converter)]
        command = ["export", "--model", str(folder), "--to", "gguf", "--output", str(tmp_path / "out"), *given]
        capsys.readouterr()
        assert grinmoe_cli.main(command) == 2
        said = capsys.readouterr().err
        assert len(said.strip().splitlines()) == 1
        assert not (tmp_path / "out").exists()
        return said

    def test_a_converter_that_fails(self, tmp_path, converter, capsys):
        said = self.run(saved(tmp_path, vocab_size=97), converter, tmp_path, capsys)
        assert "exit code 1: ValueError: 97 is no vocabulary" in said

    def test_no_converter(self, tmp_path, capsys, monkeypatch):
        monkeypatch.setenv("PATH", str(tmp_path))
        folder = saved(tmp_path)
        assert f"{CONVERTER} is not on the PATH" in self.run(folder, None, tmp_path, capsys)
        assert f"there is no {CONVERTER}" in self.run(folder, tmp_path / "nowhere", tmp_path, capsys)

    def test_no_vocabulary(self, tmp_path, converter, capsys):
        folder = saved(tmp_path)
        (folder / "tokenizer.model").unlink()
        assert "no tokenizer.model" in self.run(folder, converter, tmp_path, capsys)

    @pytest.mark.parametrize(
        "fields, message",
        [
            ({"head_dim": 6}, "head_dim=6"),
            ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
            ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "rope_type='linear'"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_what_it_cannot_represent(self, tmp_path, converter, capsys, fields, message):
        assert message in self.run(saved(tmp_path, **fields), converter, tmp_path, capsys)


@pytest.mark.slow
def test_llama_cpp_computes_what_is_said_of_it(tmp_path):
    """Its logits are those of this model with the other routing and no window: exactly what the notes say differs."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not here (docs/export.md)")
    if shutil.which(CONVERTER) is None:
        pytest.skip(f"{CONVERTER} is not on the PATH (docs/export.md)")
    model_file = train()
    size = SentencePieceProcessor(model_proto=model_file).vocab_size()
    model = model_of(
        vocab_size=size + 1,
        eos_token_id=2,
        router_estimator="topk_renormalized",
        sliding_window=None,
        hidden_size=64,
        intermediate_size=32,
    )
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "tokenizer.model").write_bytes(model_file)
    (tmp_path / "model" / "added_tokens.json").write_text(json.dumps({"<|endoftext|>": size}))  # as Phi-3 has it
    export_checkpoint(ExportOptions(str(tmp_path / "model"), "gguf", str(tmp_path / "out"), "float32"))
    file = tmp_path / "out" / "model-f32.gguf"
    exact = {
        "type_k": llama_cpp.GGML_TYPE_F32,
        "type_v": llama_cpp.GGML_TYPE_F32,
    }  # a cache in float16 moves them by 1e-3
    theirs = llama_cpp.Llama(str(file), logits_all=True, n_ctx=64, verbose=False, n_threads=2, **exact)
    ids = [1, *range(10, 40)]
    theirs.eval(ids)
    found = torch.from_numpy(theirs.scores[: len(ids)].copy())
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0]
    assert (found - expected).abs().max() <= EQUAL * expected.abs().max()


def test_the_converter_is_found_on_the_path(converter, monkeypatch):
    (converter / CONVERTER).chmod(0o755)
    monkeypatch.setenv("PATH", str(converter))
    assert find_converter(None) == converter / CONVERTER
    assert find_converter(str(converter)) == find_converter(str(converter / CONVERTER)) == converter / CONVERTER
