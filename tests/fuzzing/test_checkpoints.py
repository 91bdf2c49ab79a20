"""Configs, indices and shards of others: a named error before anything large is built, or a model that computes."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from grinmoe import GrinMoeConfig, GrinMoeForCausalLM
from tests.fuzzing.strategies import as_json, json_values, tried, with_other_fields
from tests.tiny import tiny_config, tiny_model

FURTHER = (
    "rope_theta", "rope_scaling", "rope_parameters", "auto_map", "quantization_config", "dtype", "torch_dtype", "id2label",
    "label2id", "num_labels", "architectures", "head_dim", "partial_rotary_factor", "transformers_version",
)  # fmt: skip
CONFIG = {**tiny_config().to_dict(), "architectures": ["GrinMoeForCausalLM"]}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("fuzzed") / "model"
    tiny_model().save_pretrained(folder, max_shard_size="40KB")
    return folder


@pytest.fixture
def copy(saved, tmp_path) -> Path:
    shutil.copytree(saved, tmp_path / "copy")
    return tmp_path / "copy"


def loads_or_is_refused(folder: Path) -> GrinMoeForCausalLM | None:
    """The property: a ValueError or OSError that says something, or a model whose logits are numbers of its vocabulary."""
    model, refusal = tried(lambda: GrinMoeForCausalLM.from_pretrained(folder), ValueError, OSError)
    if refusal is not None:
        return None
    with torch.no_grad():
        logits = model.eval()(torch.tensor([[1, 2, 3]]), return_dict=True).logits
    assert logits.shape == (1, 3, model.config.vocab_size)
    return model


def test_config_of_any_fields_is_refused_by_name_or_saved_the_same(tmp_path, bounded, fuzzed):
    file = tmp_path / "config.json"

    @fuzzed
    @given(with_other_fields(CONFIG, FURTHER))
    def check(content):
        file.write_bytes(as_json(content))
        with bounded():
            config, refusal = tried(lambda: GrinMoeConfig.from_pretrained(tmp_path), ValueError, OSError)
            if refusal is not None:
                return
            again = GrinMoeConfig.from_dict(json.loads(config.to_json_string(use_diff=False)))
        assert again.to_dict() == config.to_dict()

    check()


def test_checkpoint_with_a_config_of_any_fields_loads_or_is_refused(copy, bounded, fuzzed):
    @fuzzed
    @given(with_other_fields(CONFIG, FURTHER))
    def check(content):
        (copy / "config.json").write_bytes(as_json(content))
        with bounded():
            loads_or_is_refused(copy)

    check()


@pytest.mark.parametrize("name", ["generation_config.json", "model.safetensors.index.json"])
def test_checkpoint_with_any_json_beside_its_weights_loads_or_is_refused(copy, bounded, fuzzed, name):
    valid = json.loads((copy / name).read_text())
    further = ("temperature", "max_new_tokens", "pad_token_id", "top_k", "metadata", "weight_map", "eos_token_id")

    @fuzzed
    @given(with_other_fields(valid, further) | json_values)
    def check(content):
        (copy / name).write_bytes(as_json(content))
        with bounded():
            loads_or_is_refused(copy)

    check()


DTYPES = ["F32", "F16", "BF16", "F64", "I64", "I32", "I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "C64", "U16", "X", "", 3]


@st.composite
def changed_headers(draw, header):
    """A shard's header with entries of other dtypes, shapes and offsets, and entries more or fewer."""
    header = json.loads(json.dumps(header))
    for key in draw(st.lists(st.sampled_from(sorted(header)), min_size=1, max_size=3, unique=True)):
        entry, kind = header[key], draw(st.sampled_from(["dtype", "shape", "data_offsets", "gone", "renamed", "any"]))
        if kind in ("gone", "renamed"):
            header.pop(key)
            if kind == "renamed":
                header[draw(st.sampled_from(["x", "model.norm.weight", "", "a" * 3000]))] = entry
        elif kind == "dtype" and isinstance(entry, dict):
            entry["dtype"] = draw(st.sampled_from(DTYPES))
        elif kind in ("shape", "data_offsets") and isinstance(entry, dict):
            entry[kind] = draw(st.lists(st.integers(-1, 2**63) | st.integers(0, 100), max_size=3))
        else:
            header[key] = draw(json_values)
    return header


def test_shard_with_any_header_is_refused_or_loads(copy, bounded, fuzzed):
    shard = sorted(copy.glob("*.safetensors"))[0]
    content = shard.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]

    @fuzzed
    @given(changed_headers(header), st.integers(-50, 50), st.sampled_from([0, 0, 0, 0, 1, -1, 2**40, 2**63]))
    def check(changed, cut, off):
        text = as_json(changed)
        claimed = min(max(len(text) + off, 0), 2**64 - 1)
        body = data[:cut] if cut < 0 else data + bytes(cut if cut > 40 else 0)
        shard.write_bytes(struct.pack("<Q", claimed) + text + body)
        with bounded():
            model = loads_or_is_refused(copy)
        if model is not None:
            kinds = {entry["dtype"] for name, entry in changed.items() if name != "__metadata__"}
            assert kinds <= {"F32", "F16", "BF16", "F64"}, "integers, bytes and complex numbers are not weights"

    check()


TORCH_DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.int16]
TORCH_DTYPES += [torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64]


def test_shards_with_tensors_of_any_dtype_and_shape_are_refused_or_load_as_floats(copy, bounded, fuzzed):
    first, second, *_ = sorted(copy.glob("*.safetensors"))
    whole = load_file(first), load_file(second)
    change = st.sampled_from(["flat", "transposed", "more", "less", "none", "twice", "same"])

    @fuzzed
    @given(st.lists(st.tuples(st.sampled_from(sorted(whole[0])), st.sampled_from(TORCH_DTYPES), change), max_size=3))
    def check(changes):
        tensors, others = dict(whole[0]), dict(whole[1])
        for key, dtype, how in changes:
            value = whole[0][key].to(dtype)
            shapes = {"flat": value.flatten(), "transposed": value.t() if value.ndim == 2 else value, "less": value[:1]}
            shapes |= {"none": value[:0], "more": value.repeat(2, *([1] * (value.ndim - 1)))}
            tensors[key] = shapes.get(how, value).contiguous()
            if how == "twice":
                others[key] = (whole[0][key] + 1).contiguous()
        save_file(tensors, first, metadata={"format": "pt"})
        save_file(others, second, metadata={"format": "pt"})
        with bounded():
            model = loads_or_is_refused(copy)
        if model is not None:
            assert all(how != "twice" for _, _, how in changes), "one key in two shards with two values"
            assert all(tensors[key].is_floating_point() and tensors[key].element_size() > 1 for key, _, _ in changes)
            assert all(tensors[key].shape == whole[0][key].shape for key, _, _ in changes)

    check()


def test_shard_of_any_bytes_is_refused_or_loads(copy, bounded, fuzzed):
    shard = sorted(copy.glob("*.safetensors"))[0]
    content = shard.read_bytes()

    @fuzzed
    @given(st.lists(st.tuples(st.integers(0, 3000), st.binary(min_size=1, max_size=8)), max_size=4), st.integers(0, 4))
    def check(changes, cut):
        damaged = bytearray(content[: len(content) * cut // 4] if cut < 4 else content)
        for place, replaced in changes:
            damaged[place : place + len(replaced)] = replaced
        shard.write_bytes(damaged)
        with bounded():
            loads_or_is_refused(copy)

    check()
