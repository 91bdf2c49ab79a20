"""`grinmoe upcycle`: the result begins where the dense model is, differs where it is asked to, and trains."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import grinmoe_cli
from grinmoe import GrinMoeForCausalLM
from grinmoe.checkpoint_grinmoe import CheckpointError
from grinmoe.conversion.configs import ConversionError
from grinmoe.conversion.upcycle import UpcycleOptions, single_candidate_share, upcycle_checkpoint
from tests import tiny

EQUAL = 1e-5
SIZES = {**tiny.SIZES, "initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
DENSE = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "llama, biases and llama3 rope": lambda: LlamaForCausalLM(
        LlamaConfig(
            **SIZES,
            attention_bias=True,
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": 1e4,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        )
    ),
    "mistral, window": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=10, head_dim=6)),
    "mistral, tied": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=None, tie_word_embeddings=True)),
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**SIZES, sliding_window=10)),
}


def dense_of(name: str, folder: Path, **saving) -> torch.nn.Module:
    torch.manual_seed(0)
    model = DENSE[name]().eval()
    for parameter_name, parameter in model.named_parameters():
        if "norm" in parameter_name or "bias" in parameter_name:
            torch.nn.init.normal_(parameter, mean=float("norm" in parameter_name), std=0.3)
    model.save_pretrained(folder, **saving)
    return model


def logits_of(model, length: int) -> torch.Tensor:
    ids = torch.arange(length).mul(7).remainder(90).unsqueeze(0)
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def options(tmp_path: Path, **overrides) -> UpcycleOptions:
    fields = {"model": str(tmp_path / "dense"), "experts": 4, "top_k": 2, "output": str(tmp_path / "sparse")}
    return UpcycleOptions(**{**fields, "compare": False, **overrides})


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("name", DENSE)
def test_it_begins_at_the_dense_model(name, top_k, tmp_path):
    """Without a mask's width every draw has one candidate: equal on a text within the window and on one beyond."""
    dense = dense_of(name, tmp_path / "dense", max_shard_size="20KB")
    upcycle_checkpoint(options(tmp_path, top_k=top_k))
    sparse = GrinMoeForCausalLM.from_pretrained(tmp_path / "sparse", router_jitter_noise=0.0).eval()
    for length in (6, 40):
        expected = logits_of(dense, length)
        assert (logits_of(sparse, length) - expected).abs().max() <= EQUAL * expected.abs().max()
    assert sparse.config.norm_type == "rms_norm" and sparse.config.num_experts_per_tok == top_k


def test_it_says_how_near(tmp_path):
    """The share of draws with one candidate, by hand; and where that is all of them, the logits are equal."""
    dense = dense_of("llama", tmp_path / "dense")
    record = upcycle_checkpoint(options(tmp_path, compare=True))
    assert json.loads((tmp_path / "sparse" / "upcycle.json").read_text()) == record
    sparse = GrinMoeForCausalLM.from_pretrained(tmp_path / "sparse").eval()
    ids = torch.randint(96, (1, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        output = sparse(ids, output_router_logits=True)
    single = []
    for logits in output.router_logits:
        left = logits.clone()
        for _ in range(2):
            top = left.max(-1, keepdim=True)
            near = (top.values - logits) / torch.maximum(logits.abs(), top.values) <= 0.02
            single += ((near & (left > float("-inf"))).sum(-1) == 1).tolist()
            left.scatter_(-1, top.indices, float("-inf"))
    assert record["single_candidate_share"] == pytest.approx(sum(single) / len(single))
    assert 0.5 < record["single_candidate_share"] < 1
    assert all(0 < one["difference"] < one["largest"] for one in record["logits"])
    # A gating whose weights sum to 1 begins there whatever the mask.
    upcycle_checkpoint(options(tmp_path, output=str(tmp_path / "top-k"), estimator="topk_renormalized"))
    other = GrinMoeForCausalLM.from_pretrained(tmp_path / "top-k").eval()
    assert (logits_of(other, 40) - logits_of(dense, 40)).abs().max() <= EQUAL * logits_of(dense, 40).abs().max()
    assert single_candidate_share(tmp_path / "top-k", other.config) == 1


def experts_of(folder: Path) -> list[torch.nn.Module]:
    model = GrinMoeForCausalLM.from_pretrained(folder)
    return [layer.block_sparse_moe.experts for layer in model.model.layers]


def test_noise_makes_every_copy_another(tmp_path):
    dense = dense_of("llama", tmp_path / "dense")
    upcycle_checkpoint(options(tmp_path, noise=0.1))
    for layer, experts in zip(dense.model.layers, experts_of(tmp_path / "sparse"), strict=True):
        up = layer.mlp.up_proj.weight
        added = [weight[24:] - up for weight in experts.gate_up_proj]
        for one in added:
            assert one.std().item() == pytest.approx(0.1 * up.std().item(), rel=0.15)
        assert (added[0] - added[1]).std() > 0.1 * up.std()
    record = upcycle_checkpoint(options(tmp_path, output=str(tmp_path / "again"), noise=0.1))
    assert any("no exact copies" in note for note in record["notes"])
    assert torch.equal(experts_of(tmp_path / "again")[1].down_proj, experts_of(tmp_path / "sparse")[1].down_proj)


def test_a_share_of_the_neurons_begins_anew(tmp_path):
    """The same in an expert's three matrices, others in every expert, with the matrix's own mean and deviation."""
    dense = dense_of("phi3", tmp_path / "dense")
    upcycle_checkpoint(options(tmp_path, reinit=0.5))
    for layer, experts in zip(dense.model.layers, experts_of(tmp_path / "sparse"), strict=True):
        gate, up = layer.mlp.gate_up_proj.weight.chunk(2)
        down = layer.mlp.down_proj.weight / 2
        changed = []
        for gate_up, other_down in zip(experts.gate_up_proj, experts.down_proj, strict=True):
            in_gate = (gate_up[:24] != gate).any(1)
            assert torch.equal(in_gate, (gate_up[24:] != up).any(1))
            assert torch.equal(in_gate, (other_down != down).any(0)) and in_gate.sum() == 12
            assert gate_up[:24][in_gate].std().item() == pytest.approx(gate.std().item(), rel=0.15)
            changed.append(in_gate)
        assert not torch.equal(changed[0], changed[1])


def test_it_trains(tmp_path):
    """Equal copies come apart, and the loss on what is trained on falls."""
    dense_of("llama", tmp_path / "dense")
    upcycle_checkpoint(options(tmp_path))
    torch.manual_seed(0)
    model = GrinMoeForCausalLM.from_pretrained(tmp_path / "sparse").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    ids = torch.randint(96, (4, 16))
    losses = []
    for _ in range(20):
        losses.append(model(input_ids=ids, labels=ids).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.8 * losses[0]
    down = model.model.layers[0].block_sparse_moe.experts.down_proj
    assert (down[0] - down[1]).abs().max() > 1e-3


class TestBadInput:
    @pytest.mark.parametrize(
        "fields, message",
        [
            ({"top_k": 5}, "num_experts_per_tok=5 exceeds"),
            ({"experts": 0}, "num_local_experts=0"),
            ({"estimator": "topk"}, "'topk' does not begin where the dense model is"),
            ({"noise": -1.0}, "--noise -1.0"),
            ({"reinit": 1.5}, "--reinit 1.5"),
            ({"dtype": "int8"}, "--dtype 'int8'"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_wrong_options(self, fields, message, tmp_path):
        dense_of("llama", tmp_path / "dense")
        with pytest.raises(ValueError, match=message):
            upcycle_checkpoint(options(tmp_path, **fields))
        assert not (tmp_path / "sparse").exists()

    @pytest.mark.parametrize(
        "make, message",
        [
            (lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)), "model_type='qwen2'"),
            (lambda: LlamaForCausalLM(LlamaConfig(**SIZES, mlp_bias=True)), "mlp_bias"),
            (
                lambda: Phi3ForCausalLM(
                    Phi3Config(
                        **{**SIZES, "hidden_size": 64},
                        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
                    )
                ),
                "partial_rotary_factor",
            ),
        ],
        ids=["another model", "biases", "partial rope"],
    )
    def test_models_that_have_no_place(self, make, message, tmp_path):
        make().save_pretrained(tmp_path / "dense")
        with pytest.raises(ConversionError, match=message):
            upcycle_checkpoint(options(tmp_path))

    def test_half_a_checkpoint(self, tmp_path, capsys):
        dense_of("llama", tmp_path / "dense", max_shard_size="20KB")
        sorted((tmp_path / "dense").glob("model-*"))[1].unlink()
        command = ["upcycle", "--model", str(tmp_path / "dense"), "--experts", "4", "--top-k", "2"]
        capsys.readouterr()
        assert grinmoe_cli.main([*command, "--output", str(tmp_path / "out")]) == 2
        assert "download that shard again" in capsys.readouterr().err and not (tmp_path / "out").exists()

    def test_weights_of_another_config(self, tmp_path):
        dense_of("llama", tmp_path / "dense")
        file = tmp_path / "dense" / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "num_hidden_layers": 3}))
        with pytest.raises(CheckpointError, match=r"lacks model\.layers\.2"):
            upcycle_checkpoint(options(tmp_path))


def test_the_command_says_what_it_made(tmp_path, capsys):
    dense_of("llama", tmp_path / "dense")
    command = ["upcycle", "--model", str(tmp_path / "dense"), "--experts", "4", "--top-k", "2", "--dtype", "bfloat16"]
    assert grinmoe_cli.main([*command, "--output", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "draws with one candidate" in said and "largest difference of logits" in said
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
