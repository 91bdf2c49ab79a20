"""Adapters that were made to break a reader: each is refused by name before anything is built of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from grinmoe import GrinMoeForCausalLM
from grinmoe.adapters import merge_adapter
from grinmoe.adapters.lora import AdapterError, base_of, check_adapter, load_adapter, lora_config
from tests.tiny import tiny_model

peft = pytest.importorskip("peft")
NAN = float("nan")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    tiny_model(pad_token_id=0).save_pretrained(folder / "base")
    model = GrinMoeForCausalLM.from_pretrained(folder / "base")
    peft.get_peft_model(model, lora_config(model, r=2)).save_pretrained(folder / "adapter")
    return folder


@pytest.fixture
def adapter(made, tmp_path) -> Path:
    return shutil.copytree(made / "adapter", tmp_path / "adapter")


def change(folder: Path, **fields) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


WRONG = [
    *(("r", value) for value in (None, True, "x", 0, -1, 1.5, 10**9, 10**30, [])),
    *(("lora_alpha", value) for value in (None, True, "x", 1e300, [], {})),
    *(("lora_dropout", value) for value in (None, "x", -1, 2, [])),
    *(("layers_to_transform", value) for value in (True, "x", -1, 1.5, ["x"], [-1], {}, 10**9, [10**9])),
    *(("target_modules", value) for value in (True, 1, [1], [None], {}, "(", "(a+)+$", "x" * 3000, "a*b*c*d*e*f*")),
    *(("exclude_modules", value) for value in (True, 1, [1], {}, "(", r"(\w+)+!")),
    *(("layers_pattern", value) for value in (True, 1, [1], "(", ["(a+)+"])),
    *(("rank_pattern", value) for value in (True, "x", [], {"x": 10**9}, {"(a+)+$": 2}, {"x": "y"}, {"(": 2})),
    *(("alpha_pattern", value) for value in (True, "x", [], {"x": "y"}, {"(a+)+$": 2})),
    *((name, value) for name in ("modules_to_save", "target_parameters") for value in (True, 1, "x", [1], {})),
    *(
        (name, value)
        for name in ("use_rslora", "shared_a", "inference_mode", "use_dora")
        for value in (None, 1, "x", [])
    ),
    *(("experts", value) for value in (None, True, 1, "x", [-1], ["x"], [99], {})),
    *(("bias", value) for value in (None, True, "x", [])),
    *(("base_model_name_or_path", value) for value in (True, 1, [], {}, ["x"])),
    *(("trainable_token_indices", value) for value in (True, 1, "x", [-1], {"x": "y"})),
    *(("layer_replication", value) for value in ([[0, 10**9]], "x", 1)),
    *(("megatron_config", value) for value in ({}, {"a": 1})),  # PEFT would import the module named as megatron_core
    *(("eva_config", value) for value in (1, "x", [])),
    *(("monteclora_config", value) for value in (1, "x", {"a": 1})),
    *(("peft_type", value) for value in (None, 1, [], {}, "IA3")),
]


def spelled(value) -> str:
    return repr(value) if len(repr(value)) < 40 else f"{repr(value)[:20]}..."


@pytest.mark.parametrize("name, value", WRONG, ids=[f"{name}={spelled(value)}" for name, value in WRONG])
def test_adapter_config_of_wrong_type_or_size_raises_adapter_error(made, adapter, name, value):
    change(adapter, **{name: value})
    config = GrinMoeForCausalLM.config_class.from_pretrained(made / "base")
    with pytest.raises(AdapterError) as raised:
        check_adapter(adapter, GrinMoeForCausalLM, config)
    assert len(str(raised.value)) < 1500


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "null",
        "",
        '{"a":' * 500 + "1" + "}" * 500,
        f'{{"r": {"9" * 400}}}',
        '{"r": NaN}',
        '{"r": 2, "r": 2}',
        "\ufeff{}",
    ],
    ids=["a list", "null", "empty", "500 levels", "400 digits", "NaN", "a key twice", "a byte order mark"],
)
def test_broken_adapter_config_raises_value_error_naming_it(made, adapter, content):
    (adapter / "adapter_config.json").write_text(content, encoding="utf-8")
    for read in (
        lambda: base_of(adapter),
        lambda: load_adapter(GrinMoeForCausalLM.from_pretrained(made / "base"), adapter),
        lambda: GrinMoeForCausalLM.from_pretrained(adapter),
    ):
        with pytest.raises(ValueError, match=r"adapter_config.json"):
            read()


@pytest.mark.parametrize("dtype", "int64 int8 uint8 bool float8_e4m3fn complex64".split())
def test_adapter_whose_weights_are_not_floats_is_refused(made, adapter, tmp_path, dtype):
    file = adapter / "adapter_model.safetensors"
    save_file({key: value.to(getattr(torch, dtype)) for key, value in load_file(file).items()}, file)
    for read in (
        lambda: load_adapter(GrinMoeForCausalLM.from_pretrained(made / "base"), adapter),
        lambda: merge_adapter(adapter, tmp_path / "merged", base=made / "base"),
        lambda: GrinMoeForCausalLM.from_pretrained(adapter),
    ):
        with pytest.raises(ValueError, match="where floats belong"):
            read()


@pytest.mark.parametrize(
    "content", [b"", bytes(64), (17 * 2**20).to_bytes(8, "little") + bytes(17 * 2**20)], ids=["empty", "zeros", "bomb"]
)
def test_broken_adapter_weights_raise_adapter_error(made, adapter, content):
    (adapter / "adapter_model.safetensors").write_bytes(content)
    with pytest.raises(AdapterError, match="truncated or not safetensors"):
        load_adapter(GrinMoeForCausalLM.from_pretrained(made / "base"), adapter)


def test_merge_into_a_base_whose_config_asks_for_more_than_it_holds_is_refused(made, adapter, tmp_path):
    base = shutil.copytree(made / "base", tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4096}))
    with pytest.raises(ValueError, match="num_hidden_layers=4096"):
        merge_adapter(adapter, tmp_path / "merged", base=base)
