"""`grinmoe upcycle`: the result begins where the dense model is, differs where it is asked to, and trains."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
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
from grinmoe import GrinMoeForCausalLM, conversion
from grinmoe.checkpoint_grinmoe import CheckpointError
from grinmoe.conversion.configs import ConversionError, UnequalLogitsError
from grinmoe.conversion.upcycle import UpcycleOptions, single_candidate_share, upcycle_checkpoint
from tests import tiny

EQUAL = 1e-5
SIZES = {**tiny.SIZES, "initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
LENGTH = 32  # at which LongRoPE and dynamic RoPE change
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.0, 2.7, 4.4, 6.1],
    "original_max_position_embeddings": LENGTH,
}
ROPE = {
    "linear": {"rope_type": "linear", "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": LENGTH, "truncate": False},
    "longrope": LONGROPE,
    "longrope, its factor": {**LONGROPE, "factor": 32.0},
    "longrope, its scale": {**LONGROPE, "attention_factor": 1.4},
    "longrope, scales of phimoe": {**LONGROPE, "short_mscale": 1.1, "long_mscale": 1.7},
}
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
    return saved(DENSE[name](), folder, **saving)


def saved(model: torch.nn.Module, folder: Path, **saving) -> torch.nn.Module:
    """In evaluation mode, with norms and biases that show."""
    model.eval()
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


FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "phi3": (Phi3Config, Phi3ForCausalLM),
}
WITH_ROPE = [
    *(("llama", rope) for rope in ROPE),
    *(("phi3", rope) for rope in ROPE if "longrope" in rope),
    ("mistral", "longrope"),
]


def dense_with(family: str, folder: Path, **fields) -> None:
    config_class, model_class = FAMILIES[family]
    torch.manual_seed(0)
    saved(model_class(config_class(**{**SIZES, **fields})), folder)


def differences(folder: Path, lengths) -> list[float]:
    """Of dense and sparse logits, relative to the largest. Longer and longer: the dense dynamic RoPE remembers lengths."""
    sparse = GrinMoeForCausalLM.from_pretrained(folder / "sparse", router_jitter_noise=0.0).eval()
    dense = AutoModelForCausalLM.from_pretrained(folder / "dense").eval()
    found = []
    for length in sorted(lengths):
        expected = logits_of(dense, length)
        found.append(((logits_of(sparse, length) - expected).abs().max() / expected.abs().max()).item())
    return found


@pytest.mark.parametrize("family, rope", WITH_ROPE, ids=[", ".join(pair) for pair in WITH_ROPE])
def test_rope_of_the_dense_model_is_kept_where_it_changes(family, rope, tmp_path):
    """unsloth#10681: in all of Transformers the long factors hold above the original length, not at it."""
    dynamic = {"max_position_embeddings": LENGTH} if rope == "dynamic" else {}
    beside = {"original_max_position_embeddings": LENGTH} if family == "phi3" else {}
    dense_with(family, tmp_path / "dense", rope_parameters=ROPE[rope], **dynamic, **beside)
    record = upcycle_checkpoint(options(tmp_path, compare=True))
    assert max(differences(tmp_path, (LENGTH - 1, LENGTH, LENGTH + 1, 64))) <= EQUAL
    if rope == "dynamic" or "longrope" in rope:
        assert {LENGTH - 1, LENGTH, LENGTH + 1} <= {one["tokens"] for one in record["logits"]}
    assert all(one["unexplained"] <= EQUAL * one["largest"] for one in record["logits"])


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_scaling": {"type": "longrope", **LONGROPE}, "original_max_position_embeddings": LENGTH},
        {
            "rope_scaling": {**LONGROPE, "original_max_position_embeddings": None},
            "original_max_position_embeddings": LENGTH,
        },
        {"rope_scaling": LONGROPE, "original_max_position_embeddings": 48},  # the flat one is what the class takes
        {"rope_parameters": {**LONGROPE, "rope_theta": 5e4}, "original_max_position_embeddings": LENGTH},
    ],
    ids=["old", "beside it", "both", "new"],
)
@pytest.mark.parametrize("family", ["phi3", "mistral"])
def test_every_spelling_of_rope_means_what_the_dense_class_makes_of_it(family, spelling, tmp_path):
    dense_with(family, tmp_path / "dense", rope_parameters=LONGROPE, original_max_position_embeddings=LENGTH)
    file = tmp_path / "dense" / "config.json"
    content = json.loads(file.read_text())
    del content["rope_parameters"]
    file.write_text(json.dumps({**content, **spelling}))
    upcycle_checkpoint(options(tmp_path))
    length = spelling["original_max_position_embeddings"]
    assert max(differences(tmp_path, (31, 32, 33, length, length + 1))) <= EQUAL


def test_generation_crosses_the_switch_as_the_dense_model_does(tmp_path):
    dense_with("phi3", tmp_path / "dense", rope_parameters=LONGROPE, original_max_position_embeddings=LENGTH)
    upcycle_checkpoint(options(tmp_path))
    sparse = GrinMoeForCausalLM.from_pretrained(tmp_path / "sparse", router_jitter_noise=0.0).eval()
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    ids = torch.arange(LENGTH - 4).mul(7).remainder(90).unsqueeze(0)
    expected = ids
    for _ in range(10):  # without a cache
        with torch.no_grad():
            expected = torch.cat([expected, dense(expected, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    asked = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "attention_mask": torch.ones_like(ids)}
    for cache in ({}, {"cache_implementation": "static"}):
        assert torch.equal(sparse.generate(ids, **asked, **cache), expected)
    # Speculative decoding is served up to the last length with short factors.
    sparse.generate(ids, prompt_lookup_num_tokens=2, max_new_tokens=5, do_sample=False)
    with pytest.raises(ValueError, match=f"serves up to {LENGTH + 1} tokens per request"):
        sparse.generate(ids, prompt_lookup_num_tokens=2, max_new_tokens=6, do_sample=False)


IGNORED_BY_THE_CLASS = [
    ("llama", {"sliding_window": 8}),
    ("mistral", {"attention_bias": True}),
    ("mistral", {"sliding_window": 8, "use_sliding_window": False}),
    ("mistral", {"mlp_bias": True}),
    ("phi3", {"attention_bias": True, "sliding_window": 8, "layer_types": ["sliding_attention"] * 2}),
    ("llama", {"attention_dropout": None, "pretraining_tp": 2, "num_key_value_heads": None}),
    ("llama", {"hidden_act": "gelu_pytorch_tanh", "rms_norm_eps": 0.1, "head_dim": 6}),
]


@pytest.mark.parametrize(
    "family, fields", IGNORED_BY_THE_CLASS, ids=[str(fields) for _, fields in IGNORED_BY_THE_CLASS]
)
def test_fields_mean_what_the_dense_class_makes_of_them(family, fields, tmp_path):
    dense_with(family, tmp_path / "dense", **fields)
    record = upcycle_checkpoint(options(tmp_path))
    assert max(differences(tmp_path, (6, 40))) <= EQUAL
    assert [note for note in record["notes"] if "not compared" not in note] == (
        ["sliding_window=8: Llama's class ignores it, and the result has full attention"]
        if "sliding_window" in fields and family == "llama"
        else []
    )


def test_dropout_of_the_residual_stream_is_kept(tmp_path):
    dense_with("phi3", tmp_path / "dense", resid_pdrop=0.2, attention_dropout=0.1)
    upcycle_checkpoint(options(tmp_path))
    config = GrinMoeForCausalLM.from_pretrained(tmp_path / "sparse").config
    assert (config.hidden_dropout, config.attention_dropout) == (0.2, 0.1)


@pytest.mark.parametrize("top_k", [2, 3])
def test_rounding_of_the_results_dtype_is_no_difference(top_k, tmp_path):
    """A third of a bfloat16 matrix is another bfloat16 matrix: said, and not taken for a wrong conversion."""
    dense_of("llama", tmp_path / "dense")
    record = upcycle_checkpoint(
        options(tmp_path, compare=True, dtype="bfloat16", top_k=top_k, estimator="topk_renormalized")
    )
    assert all(one["unexplained"] <= EQUAL * one["largest"] < one["difference"] for one in record["logits"])


def test_a_result_that_computes_something_else_is_not_kept(tmp_path, monkeypatch, capsys):
    """Were a field lost on the way, the command must fail and leave nothing; copies with noise are expected to differ."""
    dense_of("mistral, window", tmp_path / "dense")
    right = conversion.upcycle.sparse_config

    def wrong(*arguments):
        config = right(*arguments)
        config.sliding_window -= 1
        return config

    monkeypatch.setattr(conversion.upcycle, "sparse_config", wrong)
    with pytest.raises(UnequalLogitsError, match="does not compute what its source does, and was not kept"):
        upcycle_checkpoint(options(tmp_path, compare=True))
    assert not (tmp_path / "sparse").exists()
    command = ["upcycle", "--model", str(tmp_path / "dense"), "--experts", "4", "--top-k", "2"]
    assert grinmoe_cli.main([*command, "--output", str(tmp_path / "out")]) == 2
    assert "does not compute" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert "logits" in upcycle_checkpoint(options(tmp_path, compare=True, noise=0.1))


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
            ({"top_k": 5}, "--top-k 5: num_experts_per_tok=5 exceeds num_local_experts=4, --experts"),
            ({"top_k": 0}, "--top-k 0: num_experts_per_tok=0"),
            ({"experts": 0}, "--experts 0: num_local_experts=0"),
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
            (lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=1)), "sliding_window=1: a token"),
            (lambda: Phi3ForCausalLM(Phi3Config(**SIZES, sliding_window=0)), "sliding_window=0: a token"),
            (lambda: Phi3ForCausalLM(Phi3Config(**SIZES, resid_pdrop=1.0)), "resid_pdrop=1.0"),
            (lambda: LlamaForCausalLM(LlamaConfig(**SIZES, is_causal=False)), "is_causal=false"),
            (
                lambda: LlamaForCausalLM(
                    LlamaConfig(**SIZES, rope_parameters={"rope_type": "proportional", "rope_theta": 1e4})
                ),
                "this llama has no counterpart: rope_type='proportional'",
            ),
            (
                lambda: MistralForCausalLM(
                    MistralConfig(**SIZES, sliding_window=8, layer_types=["full_attention", "sliding_attention"])
                ),
                "layer_types=",
            ),
            (
                lambda: Phi3ForCausalLM(
                    Phi3Config(**SIZES, sliding_window=8, layer_types=["full_attention", "sliding_attention"])
                ),
                "layer_types=.*: all layers of this architecture have the same attention",
            ),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_models_that_have_no_place(self, make, message, tmp_path):
        make().save_pretrained(tmp_path / "dense")
        with pytest.raises(ConversionError, match=message):
            upcycle_checkpoint(options(tmp_path))
        assert not (tmp_path / "sparse").exists()

    def test_tensors_that_the_config_does_not_explain_are_named(self, tmp_path):
        """The dense model's class ignores them, with a warning."""
        dense_of("mistral, tied", tmp_path / "dense")
        file = tmp_path / "dense" / "model.safetensors"
        tensors = load_file(file)
        known = {
            "lm_head.weight": tensors["model.embed_tokens.weight"].clone(),
            "model.rotary_emb.inv_freq": torch.ones(4),
        }
        save_file({**tensors, **known}, file, metadata={"format": "pt"})
        upcycle_checkpoint(options(tmp_path))
        norm = {"model.layers.1.self_attn.q_norm.weight": torch.ones(8)}
        save_file({**tensors, **norm}, file, metadata={"format": "pt"})
        with pytest.raises(ConversionError, match=r"holds 1 tensors .*layers\.1\.self_attn\.q_norm\.weight"):
            upcycle_checkpoint(options(tmp_path, output=str(tmp_path / "other")))

    def test_a_config_that_transformers_refuses_is_named(self, tmp_path):
        dense_of("mistral, window", tmp_path / "dense")
        file = tmp_path / "dense" / "config.json"
        content = json.loads(file.read_text()) | {"num_key_value_heads": None}
        file.write_text(json.dumps(content))
        with pytest.raises(ConversionError, match="Transformers refuses .*config.json.*num_key_value_heads"):
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
