"""Merging an adapter into its base: exact in float32, whole or not at all, and measured where it cannot be exact."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file

from grinmoe import GrinMoeForCausalLM, GrinMoeForSequenceClassification
from grinmoe.adapters import MergeOptions, merge, merge_adapter, run_merge
from grinmoe.adapters.lora import AdapterError, load_adapter, lora_config
from grinmoe.checkpoint_grinmoe import official_shapes, official_state_dict, read_tensors

IDS = torch.arange(24).view(2, 12)
FORMS = {"all experts": {}, "chosen experts": {"experts": [1]}, "shared A": {"shared_a": True}}


@pytest.fixture
def make(tiny_model, tmp_path):
    """Factory of a saved base and an adapter of it, every target adapted; returns the adapted model too."""

    def make(model=None, dtype=torch.float32, **options):
        base = tiny_model(**(model or {})).to(dtype)
        base.save_pretrained(tmp_path / "base")
        base = GrinMoeForCausalLM.from_pretrained(tmp_path / "base", dtype=dtype)
        adapted = get_peft_model(base, lora_config(base, **{"r": 4, "router": True, **options}))
        torch.manual_seed(1)
        for name, parameter in adapted.named_parameters():
            if ".lora_" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        adapted.eval().save_pretrained(tmp_path / "adapter")
        return tmp_path / "base", tmp_path / "adapter", adapted

    return make


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("form", FORMS)
def test_a_float32_merge_is_exact(make, tmp_path, form):
    base, adapter, adapted = make(**FORMS[form])
    before = contents(base), contents(adapter)
    assert merge_adapter(adapter, tmp_path / "merged") == tmp_path / "merged"
    merged = GrinMoeForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    expected = adapted(IDS).logits
    assert (merged(IDS).logits - expected).abs().max() <= 1e-5
    with adapted.disable_adapter():
        assert (adapted(IDS).logits - expected).abs().max() > 1e-2
    assert (contents(base), contents(adapter)) == before


def test_the_result_is_a_checkpoint_of_its_own(make, tmp_path):
    """The official layout with code, and nothing of PEFT."""
    _, adapter, adapted = make()
    merge_adapter(adapter, tmp_path / "merged")
    found = {key: tensor.shape for key, tensor in read_tensors(tmp_path / "merged").items()}
    assert found == official_shapes(adapted.config)
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["auto_map"] and config["dtype"] == "float32"
    names = {path.name for path in (tmp_path / "merged").iterdir()}
    assert "modeling_grinmoe.py" in names and not any("adapter" in name or name.startswith(".") for name in names)


def test_a_classifier_merges_too(tiny_config, tmp_path):
    torch.manual_seed(0)
    GrinMoeForSequenceClassification(tiny_config(num_labels=3)).save_pretrained(tmp_path / "base")
    base = GrinMoeForSequenceClassification.from_pretrained(tmp_path / "base")
    adapted = get_peft_model(base, lora_config(base, r=2, task_type="SEQ_CLS", init_lora_weights=False)).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    merged = GrinMoeForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    assert (merged(IDS).logits - adapted(IDS).logits).abs().max() <= 1e-5


def test_a_classifier_of_a_base_without_labels_merges_too(make, tmp_path):
    """How many labels there are is known from the head in the adapter alone."""
    base = GrinMoeForSequenceClassification.from_pretrained(make()[0], num_labels=3)
    adapted = get_peft_model(base, lora_config(base, r=2, task_type="SEQ_CLS", init_lora_weights=False)).eval()
    adapted.save_pretrained(tmp_path / "classifier")
    merge_adapter(tmp_path / "classifier", tmp_path / "merged")
    merged = GrinMoeForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    assert (merged(IDS).logits - adapted(IDS).logits).abs().max() <= 1e-5


def test_embeddings_and_head_can_be_targets(make, tmp_path):
    """PEFT then saves their own weights beside the factors."""
    base = GrinMoeForCausalLM.from_pretrained(make()[0])
    config = lora_config(base, r=2, init_lora_weights=False)
    config.target_modules = {*config.target_modules, "embed_tokens", "lm_head"}
    adapted = get_peft_model(base, config).eval()
    adapted.save_pretrained(tmp_path / "embeddings")
    merge_adapter(tmp_path / "embeddings", tmp_path / "merged")
    merged = GrinMoeForCausalLM.from_pretrained(tmp_path / "merged")
    assert (merged(IDS).logits - adapted(IDS).logits).abs().max() <= 1e-5


def test_what_is_merged_never_lies_beside_an_adapter(make, tmp_path):
    """Transformers would load that on top: the delta would be added twice."""
    _, adapter, _ = make()
    shutil.copytree(adapter, tmp_path / "run")
    with pytest.raises(ValueError, match="is not empty"):
        merge_adapter(adapter, tmp_path / "run")
    assert contents(tmp_path / "run") == contents(adapter)


@pytest.mark.parametrize("holders, winner", [(["base"], "base"), (["base", "adapter"], "adapter"), ([], None)])
def test_the_tokenizer_comes_along(make, tmp_path, tiny_tokenizer_folder, holders, winner):
    """That of the adapter, with which it was trained, before that of the base."""
    make()
    for holder in holders:
        shutil.copy(tiny_tokenizer_folder / "tokenizer.json", tmp_path / holder)
        (tmp_path / holder / "chat_template.jinja").write_text(holder)
    merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    template = tmp_path / "merged" / "chat_template.jinja"
    assert (template.read_text() if template.exists() else None) == winner
    assert (tmp_path / "merged" / "tokenizer.json").exists() == (winner is not None)


def test_the_base_can_be_elsewhere_and_in_another_dtype(make, tmp_path, capsys):
    base, adapter, adapted = make()
    base.rename(tmp_path / "moved")
    with pytest.raises(AdapterError, match="as its base, which is not there; give it"):
        merge_adapter(adapter, tmp_path / "merged")
    with pytest.warns(UserWarning, match="was made for"):
        run_merge(MergeOptions(str(adapter), str(tmp_path / "merged"), str(tmp_path / "moved"), "bfloat16"))
    assert str(tmp_path / "merged") in capsys.readouterr().out
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == "bfloat16"
    before = load_file(tmp_path / "moved" / "model.safetensors")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    exact = official_state_dict(adapted.merge_and_unload().state_dict())
    changed = 0
    for key, weight in exact.items():
        # The base, the sum and, but for the experts, the delta are each rounded by up to 2**-8.
        assert ((merged[key].float() - weight).abs() <= 2**-7 * (before[key].abs() + weight.abs())).all(), key
        changed += not torch.equal(before[key].bfloat16(), merged[key])
    assert changed == 2 * (4 + 1 + 3 * 4), "four projections, the router and three matrices of four experts a layer"


def test_no_base_is_known(make, tmp_path):
    _, adapter, _ = make()
    content = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**content, "base_model_name_or_path": None}))
    with pytest.raises(AdapterError, match="does not name its base; give it"):
        merge_adapter(adapter, tmp_path / "merged")


def test_what_does_not_fit_is_refused_before_any_weight_is_read(make, tmp_path, monkeypatch, tiny_model):
    _, adapter, _ = make()
    tiny_model(num_local_experts=8).save_pretrained(tmp_path / "other")
    monkeypatch.setattr(merge, "_load_base", lambda *_: pytest.fail("the weights were loaded"))
    with pytest.raises(AdapterError, match="this base needs"):
        merge_adapter(adapter, tmp_path / "merged", base=tmp_path / "other")
    for place in ("base", "adapter"):
        with pytest.raises(ValueError, match="is the folder of the adapter or of its base"):
            merge_adapter(adapter, tmp_path / place)
    with pytest.raises(ValueError, match="'int3' is unknown; choose one of auto"):
        run_merge(MergeOptions(str(adapter), str(tmp_path / "merged"), dtype="int3"))
    with pytest.raises(ValueError, match="'int8' is unknown; choose one of auto"):
        merge_adapter(adapter, tmp_path / "merged", dtype=torch.int8)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file; give a new folder"):
        merge_adapter(adapter, tmp_path / "file")
    for occupied in ("other", "adapter"):  # a checkpoint, with and without an adapter
        before = {path: path.read_bytes() for path in (tmp_path / "other").iterdir()}
        with pytest.raises(ValueError, match="is not empty" if occupied == "other" else "is the folder of the adapter"):
            merge_adapter(adapter, tmp_path / occupied)
        assert before == {path: path.read_bytes() for path in (tmp_path / "other").iterdir()}
    (tmp_path / "empty").mkdir()
    for base, message in (
        ("nowhere", "is not there; give a folder or an id on the Hub"),
        ("empty", "holds no config.json"),
        ("adapter", "holds an adapter itself"),
    ):
        with pytest.raises(AdapterError, match=message):
            merge_adapter(adapter, tmp_path / "merged", base=tmp_path / base)
    assert not (tmp_path / "merged").exists()


def test_a_failed_merge_leaves_what_was_there(make, tmp_path, monkeypatch):
    _, adapter, _ = make()
    before = sorted(tmp_path.rglob("*"))

    def full_disk(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(merge, "_copy_tokenizer", full_disk)
    with pytest.raises(OSError, match="no space left"):
        merge_adapter(adapter, tmp_path / "merged")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_an_adapter_of_quantised_weights_merges_into_what_it_was_trained_on(make, tmp_path, kind):
    """Into the dequantised weights it is exact; into the dense ones it meets weights that it was not trained on.

    (In 8 bits the linears round activations as well, which no merge can keep: there the experts alone are adapted and
    compared, layer by layer.)
    """
    pytest.importorskip("bitsandbytes")
    from grinmoe.adapters.presets import quantization_config

    base, adapter, _ = make(model={"hidden_size": 64, "intermediate_size": 64}, experts=[0, 2])
    quantised = GrinMoeForCausalLM.from_pretrained(
        base, dtype=torch.float32, quantization_config=quantization_config(kind, torch.float32)
    )
    expected = load_adapter(quantised, adapter)
    results = {}
    for name, quantized_base in (("own", kind), ("dense", None)):
        run_merge(MergeOptions(str(adapter), str(tmp_path / name), quantized_base=quantized_base))
        merged = GrinMoeForCausalLM.from_pretrained(tmp_path / name)
        assert merged.dtype == torch.float32 and getattr(merged.config, "quantization_config", None) is None
        results[name] = _error(kind, merged, expected.get_base_model())
    assert results["own"] <= 1e-5
    assert results["dense"] > 10 * results["own"]


@torch.no_grad()
def _error(kind: str, merged, adapted) -> float:
    if kind == "nf4":
        return (merged(IDS).logits - adapted(IDS).logits).abs().max().item()
    torch.manual_seed(0)
    routed = torch.randn(10, 64), torch.randint(0, 4, (10, 1)), torch.ones(10, 1)
    pairs = zip(merged.model.layers, adapted.model.layers, strict=True)
    errors = [
        (one.block_sparse_moe.experts(*routed) - two.block_sparse_moe.experts(*routed)).abs() for one, two in pairs
    ]
    return max(error.max().item() for error in errors)
