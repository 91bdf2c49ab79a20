"""4-bit and 8-bit experts: what is stored, loaded and saved, and that nothing else than the rounding changes."""

from __future__ import annotations

import copy
import gc
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    FineGrainedFP8Config,
    GPTQConfig,
    QuantoConfig,
)
from transformers.quantizers import auto as quantizers
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin

from grinmoe import (
    GrinMoeConfig,
    GrinMoeForCausalLM,
    GrinMoeForSequenceClassification,
    GrinMoeModel,
    quantization_grinmoe,
)
from grinmoe.checkpoint_grinmoe import AUTO_MAP, CheckpointError, CheckpointFileError, code_files, official_shapes
from grinmoe.modeling_grinmoe import GrinMoeExperts
from grinmoe.planning.random_model import random_quantized_model
from grinmoe.quantization_grinmoe import (
    FUSED,
    QUANTIZERS,
    PackedExperts,
    experts_are_quantized,
    packed_layout,
    quantize_model,
)
from tests import ROOT
from tests.tiny import tiny_model

bitsandbytes = pytest.importorskip("bitsandbytes")

DOCUMENT = ROOT / "docs" / "quantization.md"
METHODS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4 double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}
INPUT = torch.arange(3, 15)[None]
every_method = pytest.mark.parametrize("method", METHODS)
two_methods = pytest.mark.parametrize("method", ["nf4 double", "int8"])


def asked(method: str, **options) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(**METHODS[method], **options)


def experts_of(model, layer: int = 0):
    return getattr(model, "model", model).layers[layer].block_sparse_moe.experts


def load(folder, method: str | None = None, **options):
    if method is not None:
        options["quantization_config"] = asked(method)
    return GrinMoeForCausalLM.from_pretrained(folder, **{"dtype": torch.float32, **options})


@torch.no_grad()
def logits_of(model) -> torch.Tensor:
    return model(INPUT).logits


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def same_tensors(left, right) -> bool:
    left, right = left.state_dict(), right.state_dict()
    return left.keys() == right.keys() and all(
        torch.equal(left[key], right[key]) for key in left if "format" not in key
    )


def _with_lora(model):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))


@pytest.fixture(scope="module")
def dense_folder(tmp_path_factory) -> Path:
    """A checkpoint in the official layout, in several shards, whose experts matter to its logits."""
    folder = tmp_path_factory.mktemp("dense")
    model = tiny_model(hidden_size=64, intermediate_size=128, pad_token_id=95, initializer_range=0.1)
    model.save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder


@pytest.fixture(scope="module")
def quantized_folders(dense_folder, tmp_path_factory) -> dict[str, Path]:
    """The same, saved quantised."""
    folders = {}
    for method in ("nf4 double", "int8"):
        folders[method] = tmp_path_factory.mktemp("quantized")
        load(dense_folder, method).save_pretrained(folders[method], max_shard_size="50KB")
    return folders


@pytest.fixture
def weights_are_not_read(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("weights were read")

    monkeypatch.setattr("transformers.modeling_utils.convert_and_load_state_dict_in_model", refuse)


class TestLoading:
    @every_method
    def test_experts_and_linears_are_quantised_and_nothing_else(self, dense_folder, method):
        model = load(dense_folder, method)
        for layer in range(2):
            experts = experts_of(model, layer)
            assert isinstance(experts, PackedExperts)
            assert {getattr(experts, name).dtype for name in FUSED} <= {torch.uint8, torch.int8}
        linear = bitsandbytes.nn.Linear8bitLt if method == "int8" else bitsandbytes.nn.Linear4bit
        linears = [name for name, module in model.named_modules() if isinstance(module, linear)]
        assert len(linears) == 2 * 4 and all("self_attn" in name for name in linears)
        assert type(model.lm_head) is torch.nn.Linear and model.lm_head.weight.dtype == torch.float32
        assert model.model.layers[0].block_sparse_moe.gate.weight.dtype == torch.float32
        assert not any(buffer.is_meta for buffer in model.buffers())

    @every_method
    def test_the_documented_errors_are_those_measured(self, dense_folder, method):
        """docs/quantization.md, in percent: of the experts' weights, of their output for the same input, of the logits."""
        dense, model = load(dense_folder), load(dense_folder, method)
        weights = [
            relative(getattr(experts_of(model).dense(torch.float32), n), getattr(experts_of(dense), n)) for n in FUSED
        ]
        routed = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)), torch.arange(128).view(64, 2) % 4
        outputs = [experts_of(m)(*routed, torch.ones(64, 2)) for m in (model, dense)]
        measured = [max(weights), relative(*outputs), relative(logits_of(model), logits_of(dense))]
        row = next(line for line in DOCUMENT.read_text().splitlines() if line.startswith(f"| {method} |"))
        documented = [float(cell) / 100 for cell in row.strip("| ").split("|")[1:]]
        assert measured == pytest.approx(documented, rel=0.03)
        assert max(weights) < 1.1 * min(weights), "both fused weights are rounded alike"

    @pytest.mark.integration
    def test_the_model_never_exists_in_full_precision(self, dense_folder, tmp_path, monkeypatch):
        """Whenever a fused weight is packed, what is alive of unpacked experts is no more than that weight in three forms:
        the matrices as read, stacked, and fused. It does not grow with the number of layers."""
        config = GrinMoeConfig.from_pretrained(dense_folder, num_hidden_layers=8)
        GrinMoeForCausalLM(config).save_pretrained(tmp_path, max_shard_size="100KB")
        alive, pack = [], PackedExperts.pack
        num_experts, hidden, width = 4, 64, 128
        fused_bytes = 4 * num_experts * 2 * width * hidden

        def measuring(experts, name, weight):
            storages = {}
            for thing in gc.get_objects():
                if (
                    type(thing) not in (torch.Tensor, torch.nn.Parameter)
                    or thing.is_meta
                    or not thing.is_floating_point()
                ):
                    continue
                if {hidden, width} <= set(thing.shape) or {hidden, 2 * width} <= set(thing.shape):
                    storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
            alive.append(sum(storages.values()))
            return pack(experts, name, weight)

        gc.collect()
        monkeypatch.setattr(PackedExperts, "pack", measuring)
        model = load(tmp_path, "nf4")
        assert len(alive) == 2 * 8
        assert (
            max(alive)
            <= 3 * fused_bytes
            < sum(p.numel() * 4 for p in experts_of(model).dense(torch.float32).parameters()) * 8
        )
        assert alive[-2:] == alive[:2] and min(alive) >= fused_bytes / 2, (
            "it measures the weights, and they do not add up"
        )

    def test_the_official_and_the_fused_layout_give_the_same(self, dense_folder, tmp_path):
        load(dense_folder).save_pretrained(tmp_path, save_original_format=False)
        assert same_tensors(load(tmp_path, "nf4 double"), load(dense_folder, "nf4 double"))

    def test_a_headless_model_is_quantised_too(self, dense_folder):
        model = GrinMoeModel.from_pretrained(dense_folder, quantization_config=asked("int8"), dtype=torch.float32)
        assert same_tensors(experts_of(model), experts_of(load(dense_folder, "int8")))

    @pytest.mark.parametrize(
        "skip, left",
        [
            (["experts"], [True, True]),
            (["block_sparse_moe"], [True, True]),
            (["model.layers.1.block_sparse_moe"], [False, True]),
            (["layers.1.block_sparse_moe"], [False, True]),
            ([r"model\.layers\.[1-9]\.block_sparse_moe", "lm_head"], [False, True]),
            ([r".*1\.block_sparse_moe\.experts"], [False, True]),
        ],
        ids=str,
    )
    def test_skipped_experts_stay_dense_and_the_head_does_too(self, dense_folder, tmp_path, skip, left):
        model = load(dense_folder, quantization_config=asked("nf4", llm_int8_skip_modules=skip))
        assert [type(experts_of(model, layer)) is GrinMoeExperts for layer in range(2)] == left
        assert (
            type(model.lm_head) is torch.nn.Linear
            and type(model.model.layers[0].self_attn.q_proj) is not torch.nn.Linear
        )
        assert torch.equal(experts_of(model, 1).gate_up_proj, experts_of(load(dense_folder), 1).gate_up_proj)
        model.save_pretrained(tmp_path)
        again = load(tmp_path)
        assert relative(logits_of(again), logits_of(model)) < 1e-6 and same_tensors(again, model)

    def test_experts_that_the_checkpoint_lacks_start_anew_where_the_caller_takes_that(self, dense_folder, tmp_path):
        weights = {key: t for file in dense_folder.glob("*.safetensors") for key, t in load_file(file).items()}
        lost = {key for key in weights if ".1.block_sparse_moe.experts." in key}
        save_file(
            {key: weights[key] for key in weights.keys() - lost}, tmp_path / "model.safetensors", {"format": "pt"}
        )
        shutil.copy(dense_folder / "config.json", tmp_path)
        with pytest.raises(CheckpointError, match="lacks 12 weights"):
            load(tmp_path, "nf4")
        model, info = load(tmp_path, "nf4", output_loading_info=True)
        assert "model.layers.1.block_sparse_moe.experts.gate_up_proj" in info["missing_keys"]
        assert experts_of(model, 1).gate_up_proj.dtype == torch.uint8 and logits_of(model).isfinite().all()

    def test_a_model_that_is_there_becomes_the_same_as_one_that_is_loaded(self, dense_folder, tmp_path):
        for method in METHODS:
            model = quantize_model(load(dense_folder), asked(method))
            expected = load(dense_folder, method)
            assert same_tensors(model, expected) and torch.equal(logits_of(model), logits_of(expected))
        model.save_pretrained(tmp_path)
        assert same_tensors(load(tmp_path), model)
        with pytest.raises(ValueError, match="quantised already"):
            quantize_model(model, asked("nf4"))

    @pytest.mark.parametrize(
        "refused, message",
        [
            (lambda model: quantize_model(model, {"load_in_4bit": True}), "give a transformers.BitsAndBytesConfig"),
            (lambda model: quantize_model(_with_lora(model), asked("int8")), "before adapters are added"),
            (lambda model: quantize_model(model, asked("nf4")), "has rows of 96 weights"),
        ],
    )
    def test_a_model_that_cannot_be_quantised_stays_as_it_was(self, tiny_config, refused, message):
        model = GrinMoeForCausalLM(tiny_config(hidden_size=64, intermediate_size=96)).eval()
        before, expected = [type(module) for module in model.modules()], logits_of(model)
        with pytest.raises(ValueError, match=message):
            refused(copy.deepcopy(model) if "adapters" in message else model)
        assert [type(module) for module in model.modules()] == before
        assert torch.equal(logits_of(model), expected)

    def test_a_random_model_is_like_one_that_is_loaded(self, dense_folder):
        config = GrinMoeConfig.from_pretrained(dense_folder)
        model = random_quantized_model(config, asked("nf4 double"), dtype=torch.float32, seed=3)
        expected = load(dense_folder, "nf4 double")
        # bitsandbytes' own note beside each linear is text, whose length varies.
        shapes = [
            {key: t.shape for key, t in m.state_dict().items() if "quant_state" not in key} for m in (model, expected)
        ]
        assert shapes[0] == shapes[1]
        weight = experts_of(model).dense(torch.float32).gate_up_proj
        assert weight.std().item() == pytest.approx(config.initializer_range, rel=0.05)
        assert not torch.equal(weight[0], weight[1]) and (model.model.norm.weight == 1).all()
        assert same_tensors(model, random_quantized_model(config, asked("nf4 double"), dtype=torch.float32, seed=3))

    def test_parameters_are_counted_and_memory_is_that_of_the_bytes(self, dense_folder):
        dense = load(dense_folder)
        for method in METHODS:
            model = load(dense_folder, method)
            assert model.num_parameters() == dense.num_parameters()
            assert model.num_parameters(only_trainable=True) < dense.num_parameters(only_trainable=True) / 4
            tensors = [*experts_of(model).parameters(), *experts_of(model).buffers()]
            per_weight = sum(t.nbytes for t in tensors) / sum(p.numel() for p in experts_of(dense).parameters())
            assert per_weight < (1.07 if method == "int8" else 0.6)
            assert model.get_memory_footprint() < dense.get_memory_footprint() / 2


class TestSaving:
    @two_methods
    def test_round_trip_is_bit_exact(self, dense_folder, quantized_folders, method):
        folder, model = quantized_folders[method], load(dense_folder, method)
        assert len(list(folder.glob("*.safetensors"))) > 3
        again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        assert same_tensors(model, again) and torch.equal(logits_of(model), logits_of(again))
        content = json.loads((folder / "config.json").read_text())
        assert content["quantization_config"]["quant_method"] == "bitsandbytes" and content["auto_map"] == AUTO_MAP
        assert {file.name for file in code_files()} <= {file.name for file in folder.iterdir()}
        keys = {key for file in folder.glob("*.safetensors") for key in load_file(file)}
        assert keys == model.state_dict().keys() and packed_layout(model.config, asked(method)).keys() < keys

    def test_evaluation_does_not_change_what_is_saved(self, dense_folder, quantized_folders, tmp_path):
        model = load(dense_folder, "nf4 double").eval()
        model(INPUT)
        model.save_pretrained(tmp_path)
        assert same_tensors(load(tmp_path), load(quantized_folders["nf4 double"]))

    @two_methods
    def test_dequantised_it_saves_in_the_official_layout(self, quantized_folders, tmp_path, method):
        model = load(quantized_folders[method])
        model.save_pretrained(tmp_path / "quantised")  # which changes the config
        held = experts_of(model).dense(torch.float32).gate_up_proj
        before, model = logits_of(model), model.dequantize()
        assert type(experts_of(model)) is GrinMoeExperts and torch.equal(experts_of(model).gate_up_proj, held)
        # LLM.int8 rounds the activations of the linears as well.
        assert relative(logits_of(model), before) < (2e-2 if method == "int8" else 1e-6)
        model.save_pretrained(tmp_path)
        weights = load_file(tmp_path / "model.safetensors")
        assert {key: tuple(t.shape) for key, t in weights.items()} == official_shapes(model.config)
        assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
        assert torch.equal(logits_of(load(tmp_path)), logits_of(model))

    @two_methods
    def test_dequantised_where_experts_alone_are_quantised(self, dense_folder, tmp_path, method):
        """The library's own step fails where it finds no linear of bitsandbytes."""
        model = load(dense_folder, quantization_config=asked(method, llm_int8_skip_modules=["self_attn"]))
        held, before = experts_of(model).dense(torch.float32).down_proj, logits_of(model)
        model = model.dequantize()
        assert type(experts_of(model)) is GrinMoeExperts and torch.equal(experts_of(model).down_proj, held)
        assert relative(logits_of(model), before) < 1e-6
        assert not (model.is_quantized or model.is_loaded_in_4bit or model.is_loaded_in_8bit)
        model.save_pretrained(tmp_path)
        assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
        assert torch.equal(logits_of(load(tmp_path)), logits_of(model))

    @two_methods
    def test_dequantised_after_use_it_computes_in_16_bits(self, dense_folder, method):
        """bitsandbytes' 4-bit linears leave float32 biases in a bfloat16 model that has computed once."""
        model = load(dense_folder, method, dtype=torch.bfloat16)
        before, model = logits_of(model), model.dequantize()
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
        assert relative(logits_of(model), before) < 0.1

    @pytest.mark.integration
    def test_it_loads_without_the_package(self, dense_folder, quantized_folders, tmp_path):
        from tests.remote_code.test_remote_code import run_without_package

        script = """
            import json, torch
            from transformers import AutoModelForCausalLM, BitsAndBytesConfig
            four_bits = BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
            )
            found = {}
            for name, folder, asked in (
                ("loaded", sys.argv[1], {"quantization_config": four_bits}), ("saved", sys.argv[2], {})
            ):
                model = AutoModelForCausalLM.from_pretrained(
                    folder, trust_remote_code=True, dtype=torch.float32, **asked
                )
                with torch.no_grad():
                    found[name] = model(torch.arange(3, 15)[None]).logits.double().sum().item()
                experts = type(model.model.layers[0].block_sparse_moe.experts)
                found["experts"], found["module"] = experts.__name__, experts.__module__.split(".")[0]
            try:
                AutoModelForCausalLM.from_pretrained(
                    sys.argv[1], trust_remote_code=True, quantization_config={"quant_method": "torchao"}
                )
            except ValueError as error:
                found["refused"] = str(error)
            print(json.dumps(found))
        """
        found = run_without_package(script, tmp_path, str(dense_folder), str(quantized_folders["nf4 double"]))
        assert (found["experts"], found["module"]) == ("GrinMoeExperts4bit", "transformers_modules")
        assert "asks for torchao, which does not quantise the experts" in found["refused"]
        expected = logits_of(load(dense_folder, "nf4 double")).double().sum().item()
        assert found["loaded"] == found["saved"] == pytest.approx(expected, rel=1e-5)


class TestBadInput:
    def test_without_bitsandbytes_the_error_says_what_to_install(
        self, dense_folder, quantized_folders, monkeypatch, weights_are_not_read
    ):
        monkeypatch.setattr(quantization_grinmoe, "is_bitsandbytes_available", lambda: False)
        for folder, method in [(dense_folder, "nf4"), (dense_folder, "int8"), (quantized_folders["int8"], None)]:
            with pytest.raises(ImportError, match=r"pip install 'grinmoe\[quant\]'"):
                load(folder, method)

    @pytest.mark.parametrize(
        "options, message",
        [
            ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf5"}, "bnb_4bit_quant_type='nf5'; choose 'nf4'"),
            ({"load_in_4bit": True, "bnb_4bit_quant_storage": torch.bfloat16}, "stored as torch.uint8"),
            ({"load_in_4bit": True, "bnb_4bit_compute_dtype": "int8"}, "compute_dtype=torch.int8 gives wrong products"),
            ({"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float64}, "float64 gives wrong products"),
            ({"load_in_8bit": True, "llm_int8_has_fp16_weight": True}, "llm_int8_has_fp16_weight=True trains"),
            ({}, "neither load_in_4bit nor load_in_8bit"),
        ],
    )
    def test_what_the_experts_do_not_have_is_refused(self, dense_folder, weights_are_not_read, options, message):
        with pytest.raises(ValueError, match=message):
            load(dense_folder, quantization_config=BitsAndBytesConfig(**options))

    @pytest.mark.parametrize(
        "sizes, message",
        [
            ({"intermediate_size": 96}, "the experts' down_proj has rows of 96 weights"),
            ({"hidden_size": 96}, "q_proj.weight has rows of 96 weights"),
        ],
    )
    def test_sizes_that_blocks_do_not_fit_are_refused_in_4_bits(self, tiny_config, tmp_path, sizes, message):
        GrinMoeForCausalLM(tiny_config(**{"hidden_size": 64, "intermediate_size": 64, **sizes})).save_pretrained(
            tmp_path
        )
        skip = ["experts"] if "hidden_size" in sizes else None
        with pytest.raises(ValueError, match=message):
            load(tmp_path, quantization_config=asked("nf4", llm_int8_skip_modules=skip))
        assert logits_of(load(tmp_path, "int8")).isfinite().all()

    @pytest.fixture(params=["loaded", "reloaded"])
    def broken(self, request, dense_folder, quantized_folders, tmp_path):
        """A copy to be broken, and how it is to be loaded."""
        folder, method = (dense_folder, "int8") if request.param == "loaded" else (quantized_folders["int8"], None)
        shutil.copytree(folder, tmp_path / "broken")
        return tmp_path / "broken", method

    def test_shards_that_are_missing_or_truncated_are_named(self, broken, weights_are_not_read):
        folder, method = broken
        shard = sorted(folder.glob("*.safetensors"))[1]
        content = shard.read_bytes()
        shard.write_bytes(content[:-100])
        with pytest.raises(CheckpointFileError, match="truncated"):
            load(folder, method)
        shard.unlink()
        with pytest.raises(CheckpointFileError, match="which is not there"):
            load(folder, method)

    def test_tensors_that_do_not_fit_are_named(self, broken, weights_are_not_read):
        folder, method = broken
        content = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**content, "intermediate_size": 64}))
        with pytest.raises(CheckpointError, match=r"experts\..* with shape .*config.json makes it"):
            load(folder, method)

    def test_layers_that_a_quantised_checkpoint_has_too_many_are_named(
        self, quantized_folders, tmp_path, weights_are_not_read
    ):
        for method, folder in quantized_folders.items():
            shutil.copytree(folder, tmp_path / method)
            content = json.loads((folder / "config.json").read_text())
            (tmp_path / method / "config.json").write_text(json.dumps({**content, "num_hidden_layers": 1}))
            with pytest.raises(CheckpointError, match=r"holds model\.layers\.1\..*, which is no weight of this config"):
                load(tmp_path / method)

    def test_scales_that_a_quantised_checkpoint_lacks_are_named(
        self, quantized_folders, tmp_path, weights_are_not_read
    ):
        weights = {k: t for file in quantized_folders["int8"].glob("*.safetensors") for k, t in load_file(file).items()}
        del weights["model.layers.1.block_sparse_moe.experts.down_proj_scale"]
        save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
        shutil.copy(quantized_folders["int8"] / "config.json", tmp_path)
        with pytest.raises(CheckpointError, match=r"lacks 1 weights .*experts\.down_proj_scale"):
            load(tmp_path)


class TestSkipModules:
    """`llm_int8_skip_modules`, which Transformers compares with the beginnings and ends of names and never checks."""

    @pytest.mark.parametrize(
        "entry",
        [
            "mlp",
            "gate_up_proj",
            "experts.gate_up_proj",
            "experts.0.w1",
            "*.experts",
            "(",
            "",
            "model.layers.7",
            "block_sparse",
        ],
    )
    def test_an_entry_that_names_no_module_is_refused(self, dense_folder, entry):
        asked_for = asked("int8", llm_int8_skip_modules=["lm_head", entry])
        with pytest.raises(ValueError, match="which names no module of the model. Give the end of a name"):
            load(dense_folder, quantization_config=asked_for)
        model = load(dense_folder)
        with pytest.raises(ValueError, match="which names no module of the model"):
            quantize_model(model, asked_for)
        assert type(experts_of(model)) is GrinMoeExperts

    @pytest.mark.parametrize("skip", [["self_attn"], ["model.layers.0", "q_proj"], ["layers.0.self_attn"]], ids=str)
    def test_linears_and_experts_are_skipped_by_the_same_entries(self, dense_folder, skip):
        model = load(dense_folder, quantization_config=asked("int8", llm_int8_skip_modules=skip))
        found = {name for name, m in model.named_modules() if type(m) in (torch.nn.Linear, GrinMoeExperts)}
        names = {
            name
            for name, m in load(dense_folder).named_modules()
            if isinstance(m, torch.nn.Linear | GrinMoeExperts)
            and any(f".{entry}." in f".{name}." or name == "lm_head" for entry in skip)
        }
        assert found == names and len(found) > 2

    @pytest.mark.parametrize("saved_by", [GrinMoeForCausalLM, GrinMoeModel])
    @pytest.mark.parametrize("entry", ["model.layers.0.block_sparse_moe", "layers.0", "lm_head"])
    def test_a_saved_one_means_the_same_modules_in_every_class(self, dense_folder, tmp_path, saved_by, entry):
        model = saved_by.from_pretrained(
            dense_folder, dtype=torch.float32, quantization_config=asked("int8", llm_int8_skip_modules=[entry])
        )
        model.save_pretrained(tmp_path)
        expected = [type(experts_of(model, layer)) for layer in range(2)]
        assert (expected[0] is GrinMoeExperts) == (entry != "lm_head") and issubclass(expected[1], PackedExperts)
        for other in (GrinMoeModel, GrinMoeForSequenceClassification, GrinMoeForCausalLM):
            again, info = other.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
            assert [type(experts_of(again, layer)) for layer in range(2)] == expected
            assert not info["mismatched_keys"] and all("score" in k or "lm_head" in k for k in info["missing_keys"])
            assert same_tensors(experts_of(again), experts_of(model)) and same_tensors(
                experts_of(again, 1), experts_of(model, 1)
            )

    def test_a_layer_is_not_its_namesake_with_one_digit_more(self, tiny_config):
        with torch.device("meta"):
            model = GrinMoeForCausalLM(tiny_config(num_hidden_layers=12, hidden_size=64))
        quantizer = QUANTIZERS["bitsandbytes_8bit"](asked("int8", llm_int8_skip_modules=["model.layers.1"]))
        skipped = quantizer.get_modules_to_not_convert(model, ["model.layers.1"])
        left = [n for n, m in model.named_modules() if n.endswith("experts") and not should_convert_module(n, skipped)]
        assert left == ["model.layers.1.block_sparse_moe.experts"]

    @pytest.mark.parametrize("options", [{"load_in_4bit": True}, {"load_in_8bit": True}], ids=["4", "8"])
    def test_the_flag_for_32_bits_on_the_cpu_is_refused_where_it_would_skip_all(self, dense_folder, options):
        flag = {"llm_int8_enable_fp32_cpu_offload": True}
        with pytest.raises(ValueError, match="precision: here the whole model, or what the checkpoint"):
            load(dense_folder, quantization_config=BitsAndBytesConfig(**options, **flag))

    def test_what_stays_on_the_cpu_is_written_into_the_config(self, tiny_config):
        with torch.device("meta"):
            model = GrinMoeForCausalLM(tiny_config(hidden_size=64))
        given = asked("int8", llm_int8_enable_fp32_cpu_offload=True, llm_int8_skip_modules=["q_proj"])
        quantizer = QUANTIZERS["bitsandbytes_8bit"](given, pre_quantized=False)
        quantizer.preprocess_model(model, device_map={"model.layers.0": 0, "model.layers.1": "cpu", "lm_head": "cpu"})
        assert [type(experts_of(model, layer)) is GrinMoeExperts for layer in range(2)] == [False, True]
        assert quantizer.quantization_config.llm_int8_skip_modules == ["q_proj", "model.layers.1", "lm_head"]
        assert given.llm_int8_skip_modules == ["q_proj"]
        assert {key.split(".")[2] for key in packed_layout(model.config, quantizer.quantization_config)} == {"0"}

    def test_a_quantised_checkpoint_cannot_stay_in_32_bits_on_the_cpu(self, quantized_folders, tmp_path):
        shutil.copytree(quantized_folders["int8"], tmp_path / "copy")
        content = json.loads((tmp_path / "copy" / "config.json").read_text())
        content["quantization_config"]["llm_int8_enable_fp32_cpu_offload"] = True
        (tmp_path / "copy" / "config.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match="what the checkpoint has quantised; set it to False"):
            load(tmp_path / "copy")


class TestOtherMethods:
    """All other quantisers of Transformers pass over the experts, or leave what their products cannot take."""

    NAMES = sorted(set(quantizers.AUTO_QUANTIZER_MAPPING) - {"bitsandbytes_4bit", "bitsandbytes_8bit"})
    REFUSAL = "asks for {}, which does not quantise the experts .* gate_up_proj and down_proj .*BitsAndBytesConfig"

    @pytest.mark.parametrize("name", NAMES)
    def test_every_one_is_refused_before_weights_are_read(self, dense_folder, tmp_path, weights_are_not_read, name):
        message = self.REFUSAL.format(name)
        for given in ({"quant_method": name}, QuantizationConfigMixin(quant_method=name)):
            with pytest.raises(ValueError, match=message):
                load(dense_folder, quantization_config=given)
        content = json.loads((dense_folder / "config.json").read_text())
        content["quantization_config"] = {"quant_method": name}
        (tmp_path / "config.json").write_text(json.dumps(content))
        for weights in dense_folder.glob("model*"):
            (tmp_path / weights.name).symlink_to(weights)
        with pytest.raises(ValueError, match=message):
            load(tmp_path)
        with pytest.raises(ValueError, match=message):
            load(dense_folder, config=GrinMoeConfig.from_pretrained(tmp_path))

    @pytest.mark.parametrize(
        "given",
        [
            GPTQConfig(4),
            QuantoConfig("int8"),
            FineGrainedFP8Config(),
            {"quant_method": "torchao"},
            {"quant_method": "new"},
            {},
        ],
        ids=["gptq", "quanto", "fp8", "torchao", "new", "None"],
    )
    @pytest.mark.parametrize(
        "model_class",
        [AutoModelForCausalLM, AutoModel, AutoModelForSequenceClassification, GrinMoeModel],
        ids=lambda c: c.__name__,
    )
    def test_every_class_refuses_them(self, dense_folder, given, model_class):
        method = given.get("quant_method") if isinstance(given, dict) else given.quant_method.value
        with pytest.raises(ValueError, match=self.REFUSAL.format(method)):
            model_class.from_pretrained(dense_folder, quantization_config=given)

    def test_a_repository_is_refused_by_its_config_alone(self, dense_folder, tmp_path):
        folder = tmp_path / "models--someone--grin" / "snapshots" / ("0" * 40)
        folder.mkdir(parents=True)
        (folder.parents[1] / "refs").mkdir()
        (folder.parents[1] / "refs" / "main").write_text("0" * 40)
        content = json.loads((dense_folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**content, "quantization_config": {"quant_method": "gptq"}}))
        for model_class in (GrinMoeForCausalLM, AutoModelForCausalLM):
            with pytest.raises(ValueError, match=self.REFUSAL.format("gptq")):
                model_class.from_pretrained("someone/grin", cache_dir=tmp_path, local_files_only=True)

    @pytest.mark.parametrize("given", [{"load_in_8bit": True}, {"load_in_4bit": True, "quant_method": "bitsandbytes"}])
    def test_bitsandbytes_as_a_dict_is_loaded(self, dense_folder, given):
        assert isinstance(experts_of(load(dense_folder, quantization_config=given)), PackedExperts)

    @pytest.mark.parametrize(
        "given, message",
        [
            ({"load_in_4bit": True}, "load_in_4bit=True, and the checkpoint is quantised with load_in_4bit=False"),
            ({"load_in_8bit": True, "llm_int8_skip_modules": ["experts"]}, r"llm_int8_skip_modules=\['experts'\], and"),
        ],
        ids=["bits", "skips"],
    )
    def test_a_quantised_checkpoint_in_another_form_is_refused(self, quantized_folders, given, message):
        """Transformers takes what is stored, with a warning."""
        for load_it in (GrinMoeForCausalLM.from_pretrained, AutoModelForCausalLM.from_pretrained):
            with pytest.raises(ValueError, match=message):
                load_it(quantized_folders["int8"], quantization_config=BitsAndBytesConfig(**given))
        assert isinstance(experts_of(load(quantized_folders["int8"], "int8")), PackedExperts)


class TestTheLibrarysTable:
    """The one internal that loading depends on: if a test here fails, Transformers has moved it."""

    def test_it_has_the_librarys_own_quantizers_but_for_the_length_of_a_load(self, dense_folder):
        library = [quantizers.Bnb4BitHfQuantizer, quantizers.Bnb8BitHfQuantizer]
        names = ["bitsandbytes_4bit", "bitsandbytes_8bit"]
        assert [quantizers.AUTO_QUANTIZER_MAPPING[name] for name in names] == library
        model = load(dense_folder, "nf4")
        assert type(model.hf_quantizer) is quantization_grinmoe.GrinMoeBnb4BitHfQuantizer
        with pytest.raises(ValueError, match="bnb_4bit_quant_type"):
            load(dense_folder, quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="x"))
        assert [quantizers.AUTO_QUANTIZER_MAPPING[name] for name in names] == library

    def test_other_models_are_quantised_as_ever(self, tmp_path):
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=32, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4
        )
        LlamaForCausalLM(config).save_pretrained(tmp_path)
        asked_for = asked("nf4", llm_int8_skip_modules=["q_proj"])
        options = {"quantization_config": asked_for, "dtype": torch.float32}
        expected = LlamaForCausalLM.from_pretrained(tmp_path, **options)
        with experts_are_quantized():
            found = LlamaForCausalLM.from_pretrained(tmp_path, **options)
        assert type(found.hf_quantizer) is not type(expected.hf_quantizer)
        assert [type(m) for m in found.modules()] == [type(m) for m in expected.modules()]
        assert same_tensors(found, expected)

    def test_a_copied_model_is_equal_and_separate(self, dense_folder):
        model = load(dense_folder, "nf4 double")
        twin = copy.deepcopy(model)
        assert same_tensors(model, twin) and torch.equal(logits_of(model), logits_of(twin))
        experts_of(twin).gate_up_proj.zero_()
        assert not same_tensors(model, twin)


@pytest.mark.parametrize("method", ["nf4", "nf4 double", "int8"])
def test_the_documented_memory_is_that_of_the_released_config(method):
    """docs/quantization.md: GB of the experts' tensors in the released model, computed from its config."""
    layout = packed_layout(GrinMoeConfig(), asked(method))
    total = sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in layout.values())
    row = next(line for line in DOCUMENT.read_text().splitlines() if line.startswith(f"| experts, {method} |"))
    assert float(row.strip("| ").split("|")[1]) == pytest.approx(total / 1e9, abs=0.005)
