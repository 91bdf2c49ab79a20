"""Checkpoints that were made to break a reader: each is refused by name, in bounded time and memory, or loads right."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from grinmoe import GrinMoeConfig, GrinMoeForCausalLM, GrinMoeForSequenceClassification, checkpoint_grinmoe
from grinmoe.checkpoint_grinmoe import CheckpointError, CheckpointFileError, add_remote_code
from grinmoe.conversion.shards import WeightSource
from grinmoe.hub.options import ReleaseOptions
from grinmoe.hub.release import make_release
from grinmoe.loading import load_for_use
from tests import ROOT
from tests.tiny import tiny_model

NAN, INFINITE = float("nan"), float("inf")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    tiny_model(pad_token_id=0).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(whole, tmp_path) -> Path:
    return shutil.copytree(whole, tmp_path / "model")


def change(folder: Path, name: str = "config.json", **fields) -> None:
    file = folder / name
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


INTEGERS = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
    "max_position_embeddings num_local_experts num_experts_per_tok sliding_window head_dim num_labels"
).split()
NUMBERS = (
    "initializer_range rms_norm_eps router_jitter_noise input_jitter_noise router_aux_loss_coef router_z_loss_coef "
    "router_capacity_factor attention_dropout hidden_dropout expert_dropout rope_theta"
).split()
BOOLS = "use_cache attention_bias lm_head_bias tie_word_embeddings output_router_logits".split()
NOT_INTEGERS = (True, "16", 0, -5, 16.0, 1.5, NAN, INFINITE, 10**10, 10**30, [1], {"a": 1})
NOT_NUMBERS = (True, "0.1", -1, NAN, INFINITE, 1e300, 10**400, [0.1], {})
WRONG = [
    *((name, value) for name in INTEGERS for value in NOT_INTEGERS),
    *((name, value) for name in NUMBERS for value in NOT_NUMBERS),
    *((name, value) for name in BOOLS for value in (None, 0, 1, "true", [], 1.0)),
    *((f"{one}_token_id", value) for one in ("bos", "pad", "eos") for value in ("x", NAN, -5, 1.5, True, 10**30, {})),
    *(("eos_token_id", value) for value in (["x"], [NAN], [-1], [[1]], [True])),
    *((name, value) for name in ("bos_token_id", "pad_token_id") for value in ([1], [])),
    *(("partial_rotary_factor", value) for value in (0, -1, 2, True, "1", 0.5, NAN)),
    *(
        (name, value)
        for name in ("dtype", "torch_dtype")
        for value in ("x", "", "nn", "int8", 7, NAN, [], {"": "float32"})
    ),
    *(("auto_map", value) for value in (True, 0, "x", [], 1.5, {"AutoConfig": 1}, {"AutoTokenizer": [1, None]})),
    *(
        ("id2label", value)
        for value in (True, 0, "x", [], {"x": "y"}, {"0": None, "-1": "b"}, {"0": ["a"]}, {"0": True})
    ),
    *(("label2id", value) for value in (True, 0, "x", [], {"a": "x"}, {"a": 1.5}, {"a": -1})),
    *(("architectures", value) for value in (True, 0, "x", {"a": 1}, [1], [None])),
    *(("transformers_version", value) for value in (True, 0, [], {}, 5.1)),
    *(("problem_type", value) for value in (True, 0, "x", [])),
    *(("quantization_config", value) for value in (True, 0, "x", [], 1.5)),
    *(("layer_types", value) for value in (True, 0, "x", {}, [1])),
    *(("per_layer_config", value) for value in (False, 0, "", [], {"0": {"hidden_size": 4}})),
    *(
        (name, value)
        for name in ("hidden_act", "norm_type", "router_estimator")
        for value in (None, 1, [], {}, "x" * 10**6)
    ),
    *((name, value) for name in ("rope_parameters", "rope_scaling") for value in (True, 0, "x", [], {"rope_type": []})),
    *(("original_max_position_embeddings", value) for value in (True, "x", -1, 1.5, [], 10**30)),
    # Names of the class itself.
    *(
        (name, value)
        for name in ("check", "to_dict", "attribute_map", "default_theta", "head_size")
        for value in (None, {})
    ),
    *(
        (name, {})
        for name in ("__class__", "self", "base_model_tp_plan", "sub_configs", "ignore_keys_at_rope_validation")
    ),
]


def spelled(value) -> str:
    return repr(value) if len(repr(value)) < 40 else f"{repr(value)[:20]}..."


@pytest.mark.parametrize("name, value", WRONG, ids=[f"{name}={spelled(value)}" for name, value in WRONG])
def test_config_field_of_wrong_type_or_size_raises_value_error_naming_it(name, value):
    with pytest.raises(ValueError, match="rope_" if name.startswith("rope") else name) as raised:
        GrinMoeConfig.from_dict({"model_type": "grinmoe", name: value})
    assert len(str(raised.value)) < 1000


@pytest.mark.parametrize("content", [None, 1, "x", [], [{"model_type": "grinmoe"}]])
def test_config_from_dict_of_no_object_raises_value_error(content):
    with pytest.raises(ValueError, match="not a JSON object"):
        GrinMoeConfig.from_dict(content)


@pytest.mark.parametrize("value", [True, 0, "x", [], 10**30])
def test_phimoe_config_with_wrong_extras_raises_value_error(value):
    with pytest.raises(ValueError, match="grinmoe="):
        GrinMoeConfig.from_dict({"model_type": "phimoe", "grinmoe": value})
    with pytest.raises(ValueError, match="not a GRIN-MoE config"):
        GrinMoeConfig.from_dict({"model_type": value})


def test_config_fields_that_released_files_hold_are_kept():
    """Of GRIN-MoE and Phi-3.5-MoE; unknown fields stay, as in Transformers."""
    fields = {
        "_name_or_path": "/data/model",
        "auto_map": {"AutoConfig": "configuration_grinmoe.GRINMoEConfig", "AutoTokenizer": ["a.B", None]},
        "torch_dtype": "bfloat16",
        "transformers_version": "4.37.2",
        "rope_scaling": None,
        "id2label": {"0": "yes", "1": "no", "2": "maybe"},
        "label2id": {"yes": 0, "no": 1, "maybe": 2},
        "eos_token_id": [1, 2],
        "unknown": {"any": [1, "thing"]},
    }
    config = GrinMoeConfig.from_dict({"model_type": "grinmoe", **fields})
    assert (config.dtype, config.num_labels, config.eos_token_id) == (torch.bfloat16, 3, [1, 2])
    assert config.unknown == fields["unknown"]


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_config_with_the_whole_name_of_a_dtype_has_that_dtype(name):
    config = GrinMoeConfig.from_dict({"model_type": "grinmoe", name: "torch.bfloat16"})
    assert config.dtype == torch.bfloat16
    assert config.to_dict()["dtype"] == "bfloat16"


@pytest.mark.parametrize("content", [[1], "x", {"a": [1.0]}, {"a": None}, {"a": torch.ones(1).numpy()}], ids=repr)
def test_a_state_dict_of_no_tensors_is_refused(content):
    with pytest.raises(CheckpointError, match="tensors"):
        GrinMoeForCausalLM.from_pretrained(None, config=tiny_model().config, state_dict=content)


GENERATION = [
    *(("temperature", value) for value in ("x", True, [], {}, 1e20)),
    *((name, value) for name in ("max_length", "top_k", "num_beams") for value in ("x", True, -5, 1.5, [], {}, 10**12)),
    *((name, value) for name in ("do_sample", "use_cache") for value in ("x", 1, [], {})),
    *(("eos_token_id", value) for value in ("x", -5, 1.5, ["x"], [[1]], {})),
    *(("pad_token_id", value) for value in ("x", -5, 1.5, [1], {})),
    *(("bad_words_ids", value) for value in ("x", 1, [1], [["x"]], {})),
    *(("encoder_no_repeat_ngram_size", value) for value in ("x", [], {}, 2**31)),
    *(("exponential_decay_length_penalty", value) for value in ("x", True, 1.5, [], [1], [[1], 2], {})),
    *(("penalty_alpha", value) for value in ("x", [], {})),
    *(("is_assistant", value) for value in (True, "x", 1, [1])),
    *(("stop_strings", value) for value in (1, [1], {})),
    *((name, value) for name in ("watermarking_config", "compile_config") for value in ("x", 1, [], {"a": 1})),
    *(("transformers_version", value) for value in (1, [], {})),
]


def test_generation_config_fields_of_everyday_files_are_kept(folder):
    """What Transformers of several years and other models' makers have written."""
    fields = {
        "_from_model_config": True,
        "eos_token_id": [2, 5],
        "decoder_start_token_id": [1],
        "do_sample": True,
        "temperature": 0.7,
        "max_length": 9,
        "cache_implementation": "static",
        "exponential_decay_length_penalty": [5, 1.1],
        "sequence_bias": [[[5], -1.0]],
        "num_assistant_tokens_schedule": "constant",
        "is_assistant": False,
        "chat_format": "chatml",
        "transformers_version": "4.31.0.dev0",
    }
    (folder / "generation_config.json").write_text(json.dumps(fields))
    model = GrinMoeForCausalLM.from_pretrained(folder)
    assert [model.generation_config.to_dict()[name] for name in ("eos_token_id", "max_length")] == [[2, 5], 9]
    assert model.generate(torch.tensor([[3, 4, 5]])).shape[1] <= 9


@pytest.mark.parametrize("in_config", [False, True], ids=["generation_config.json", "config.json"])
def test_generation_config_of_wrong_type_raises_value_error_naming_file_and_field(folder, in_config):
    """The library makes a generation config of config.json where there is no other."""
    names = {name for name, _ in GENERATION} - ({"transformers_version"} if in_config else set())
    file, good = folder / "config.json", json.loads((folder / "config.json").read_text())
    if in_config:
        (folder / "generation_config.json").unlink()
    else:
        file, good = folder / "generation_config.json", {"eos_token_id": 2}
    for name, value in GENERATION:
        if name not in names:
            continue
        file.write_text(json.dumps({**good, name: value}))
        with pytest.raises(ValueError, match=name if not name.endswith("_config") else f"{file.name} cannot|{name}"):
            GrinMoeForCausalLM.from_pretrained(folder)


BROKEN_JSON = {
    "a list": "[]",
    "null": "null",
    "500 levels": '{"a":' * 500 + "1" + "}" * 500,
    "400 digits": f'{{"vocab_size": {"9" * 400}}}',
    "5,000 digits": f'{{"vocab_size": {"9" * 5000}}}',
    "NaN": '{"rope_theta": NaN}',
    "a key twice": '{"vocab_size": 1, "vocab_size": 2}',
    "half a surrogate pair": '{"a": "\\ud800"}',
    "a byte order mark": "\ufeff{}",
    "half": '{"a": ',
}


@pytest.mark.parametrize("kind", BROKEN_JSON)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors.index.json"])
def test_broken_json_of_a_checkpoint_raises_value_error_naming_the_file(folder, name, kind):
    if name.endswith("index.json"):
        (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    (folder / name).write_text(BROKEN_JSON[kind], encoding="utf-8")
    readers = [lambda: GrinMoeForCausalLM.from_pretrained(folder)]
    if name == "config.json":
        readers += [
            lambda: GrinMoeConfig.from_pretrained(folder),
            lambda: GrinMoeConfig.from_json_file(folder / name),
            lambda: load_for_use(str(folder), device="cpu"),
        ]
    for read in readers:
        with pytest.raises(ValueError, match=re.escape(name)):
            read()


@pytest.mark.parametrize("value", [True, 0, "x", [], ["("], ["(a+)+$"], ["a*b*c*d*e*f*"], ["x" * 3000], {"a": 1}])
def test_stored_quantization_config_with_wrong_skip_modules_raises_value_error(folder, value):
    stored = {"quant_method": "bitsandbytes", "load_in_4bit": True, "llm_int8_skip_modules": value}
    change(folder, quantization_config=stored)
    with pytest.raises(ValueError, match="llm_int8_skip_modules|names no module|holds"):
        GrinMoeForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    "name, value",
    [("load_in_4bit", "x"), ("bnb_4bit_compute_dtype", "x"), ("bnb_4bit_quant_type", 1), ("llm_int8_threshold", None)],
)
def test_stored_quantization_config_of_wrong_type_raises_value_error(folder, name, value):
    change(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True, name: value})
    with pytest.raises(ValueError, match="quantization_config cannot be used"):
        GrinMoeForCausalLM.from_pretrained(folder)


# --- weights -----------------------------------------------------------------------------------------------------------

NOT_FLOATS = "int64 int32 int16 int8 uint8 uint16 uint32 bool float8_e4m3fn float8_e5m2 complex64".split()
MODES = {
    "as it is": {},
    "with loading info": {"output_loading_info": True},
    "with mismatched sizes": {"ignore_mismatched_sizes": True},
}


def cast(folder: Path, dtype: str, only: str = "") -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    changed = {key: value.to(getattr(torch, dtype)) if only in key else value for key, value in tensors.items()}
    save_file(changed, file, metadata={"format": "pt"})


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", NOT_FLOATS)
def test_weights_that_are_not_floats_are_refused(folder, dtype, mode):
    cast(folder, dtype)
    with pytest.raises(CheckpointError, match="where F32, F16 or BF16 belongs"):
        GrinMoeForCausalLM.from_pretrained(folder, **MODES[mode])


@pytest.mark.parametrize("dtype", NOT_FLOATS)
def test_every_other_reader_refuses_one_weight_that_is_not_floats(folder, tmp_path, dtype):
    cast(folder, dtype, only="layers.0.self_attn.q_proj.weight")
    (tmp_path / "release").mkdir()
    for read in (
        lambda: load_for_use(str(folder), device="cpu"),
        lambda: make_release(folder, tmp_path / "release", "me/model", ReleaseOptions(load_check=False)),
        lambda: WeightSource(folder).dtype("model.layers.0.self_attn.q_proj.weight"),
    ):
        with pytest.raises(ValueError, match="belongs|convert it|tokenizer"):
            read()


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn", "complex64", "bool"])
def test_a_classifiers_head_that_is_not_floats_is_refused(tmp_path, dtype):
    GrinMoeForSequenceClassification(tiny_model(pad_token_id=0).config).save_pretrained(tmp_path)
    cast(tmp_path, dtype, only="score")
    with pytest.raises(CheckpointError, match="score.weight as"):
        GrinMoeForSequenceClassification.from_pretrained(tmp_path)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_weights_of_every_float_dtype_load_as_their_values(folder, whole, dtype):
    cast(folder, dtype)
    found = GrinMoeForCausalLM.from_pretrained(folder, dtype=torch.float32).lm_head.weight
    assert torch.equal(
        found, load_file(whole / "model.safetensors")["lm_head.weight"].to(getattr(torch, dtype)).float()
    )


def header_of(content: bytes, length: int | None = None) -> bytes:
    return (len(content) if length is None else length).to_bytes(8, "little") + content


ENTRY = b'{"lm_head.weight":{"dtype":"F32","shape":[%s],"data_offsets":[%s]}}'
BROKEN_FILES = {
    "empty": b"",
    "seven bytes": b"1234567",
    "zeros": bytes(64),
    "a length beyond the file": header_of(b"{}", 10**6),
    "a length of 2**63": header_of(b"{}", 2**63),
    "a header bomb": header_of(b"{" + b" " * (17 * 2**20) + b"}"),
    "not JSON": header_of(b"{]"),
    "a list": header_of(b"[]"),
    "metadata of numbers": header_of(b'{"__metadata__":{"a":1}}'),
    "metadata that is a list": header_of(b'{"__metadata__":[]}'),
    "an unknown dtype": header_of(ENTRY.replace(b"F32", b"F31") % (b"1", b"0,4")) + bytes(4),
    "extra bytes": header_of(ENTRY % (b"1", b"0,4")) + bytes(9),
    "bytes missing": header_of(ENTRY % (b"2", b"0,8")) + bytes(4),
    "a shape that overflows": header_of(ENTRY % (b"4294967296,4294967296,4", b"0,4")) + bytes(4),
    "offsets that overlap": header_of(
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    )
    + bytes(4),
}


@pytest.mark.parametrize("kind", BROKEN_FILES)
def test_broken_safetensors_file_is_refused_by_name(folder, kind):
    (folder / "model.safetensors").write_bytes(BROKEN_FILES[kind])
    with pytest.raises(CheckpointFileError, match=r"model.safetensors .* is truncated or not safetensors"):
        GrinMoeForCausalLM.from_pretrained(folder, output_loading_info=True)


@pytest.mark.parametrize("kind", ["a scalar", "an empty tensor", "no tensor"])
def test_tensor_of_no_size_is_refused(folder, kind):
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = {"a scalar": torch.tensor(1.0), "an empty tensor": torch.zeros(0, 32)}.get(kind)
    tensors = {} if kind == "no tensor" else tensors
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="with shape|holds no|lacks|0 tensors"):
        GrinMoeForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("equal", [True, False])
@pytest.mark.parametrize("is_indexed", [True, False])
def test_one_key_in_two_shards_is_refused(folder, equal, is_indexed):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    key = "model.norm.weight"
    save_file(tensors, folder / "a.safetensors", metadata={"format": "pt"})
    others = {key: tensors[key] * (1 if equal else 2), **({} if is_indexed else {"unknown": torch.zeros(1)})}
    save_file(others, folder / "b.safetensors", metadata={"format": "pt"})
    weight_map = dict.fromkeys(tensors, "a.safetensors") | (
        {key: "b.safetensors"} if is_indexed else {"unknown": "b.safetensors"}
    )
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for mode in MODES.values():
        with pytest.raises(CheckpointError, match="the index does not name there"):
            GrinMoeForCausalLM.from_pretrained(folder, **mode)


@pytest.mark.parametrize(
    "place", ["link/a.safetensors", "../a.safetensors", "loop/a.safetensors", "a\x00.safetensors", "C:\\a.safetensors"]
)
def test_index_that_leads_out_of_its_folder_is_refused(folder, place):
    outside = folder.parent / "outside"
    outside.mkdir()
    (folder / "model.safetensors").rename(outside / "a.safetensors")
    (folder / "link").symlink_to(outside)
    (folder / "loop").symlink_to(folder / "loop")
    index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(outside / "a.safetensors"), place)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="not a safetensors file of its folder"):
        GrinMoeForCausalLM.from_pretrained(folder)


def test_index_looks_up_each_shard_once(folder, monkeypatch):
    """A lookup costs milliseconds on a network's disk, and an index may name a hundred thousand tensors."""
    looked_up = []
    monkeypatch.setattr(checkpoint_grinmoe, "_is_below", lambda *places: looked_up.append(places) or True)
    weight_map = {f"key.{number}": f"model-{number % 3}.safetensors" for number in range(3000)}
    (folder / "index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert checkpoint_grinmoe.read_index(folder / "index.json") == weight_map
    assert len(looked_up) == 3


# --- sizes -------------------------------------------------------------------------------------------------------------

BOMBS = [
    {"num_hidden_layers": 10**9},
    {"num_hidden_layers": 4096},
    {"num_local_experts": 10**8},
    {"num_local_experts": 16384, "num_hidden_layers": 16},
    {"num_local_experts": 64, "num_hidden_layers": 4096},
    {"num_labels": 10**9},
    {"vocab_size": 10**30},
    {"vocab_size": 2**24},
    {"hidden_size": 2**17, "intermediate_size": 2**20},
    {"intermediate_size": 2**20, "num_local_experts": 1024},
    {"num_attention_heads": 4096, "num_key_value_heads": 4096, "head_dim": 16384},
    {"max_position_embeddings": 10**18},
    {"id2label": {str(i): "x" for i in range(2**17 + 1)}},
    {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0] * 10**6, "long_factor": [1.0] * 10**6}},
]
LOAD_BOMBS = """
    import json, resource, sys
    resource.setrlimit(resource.RLIMIT_AS, (8 * 2**30, 8 * 2**30))
    from pathlib import Path
    from transformers import AutoModelForCausalLM
    if sys.argv[3] == "package":
        from grinmoe import GrinMoeForCausalLM
        load = GrinMoeForCausalLM.from_pretrained
        modes = [{}, {"output_loading_info": True}, {"ignore_mismatched_sizes": True}]
    else:
        load, modes = AutoModelForCausalLM.from_pretrained, [{"trust_remote_code": True}]
    folder = Path(sys.argv[1])
    good, found = json.loads((folder / "config.json").read_text()), []
    for fields in json.loads(Path(sys.argv[2]).read_text()):
        (folder / "config.json").write_text(json.dumps({**good, **fields}))
        for mode in modes:
            try:
                load(str(folder), **mode)
                found.append([list(fields), "loaded", ""])
            except Exception as error:
                found.append([list(fields), isinstance(error, ValueError), str(error)[-2000:]])
    print(json.dumps(found))
"""


@pytest.mark.integration
@pytest.mark.parametrize("way", ["package", "remote code"])
def test_config_that_asks_for_more_than_the_shards_hold_is_refused_in_bounded_memory(folder, tmp_path, way):
    (tmp_path / "bombs.json").write_text(json.dumps(BOMBS))
    add_remote_code(folder)
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(ROOT) if way == "package" else ""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(LOAD_BOMBS), str(folder), str(tmp_path / "bombs.json"), way],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert len(found) == len(BOMBS) * (3 if way == "package" else 1)
    assert all(is_right is True for _, is_right, _ in found), [one for one in found if one[1] is not True]
    assert all(
        any(name in message for name in [*names, "short_factor", "config.json cannot be read"])
        for names, _, message in found
    ), found
