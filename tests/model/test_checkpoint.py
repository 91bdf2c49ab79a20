"""Loading: the official layout bit for bit, and every broken checkpoint named before its weights are read."""

from __future__ import annotations

import json
import re
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
    PhimoeConfig,
)
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

from grinmoe import GrinMoeForCausalLM, GrinMoeForSequenceClassification, GrinMoeModel
from grinmoe.checkpoint_grinmoe import (
    CheckpointError,
    CheckpointFileError,
    FuseExperts,
    check_weights,
    official_shapes,
    official_state_dict,
    stale_weights,
)
from grinmoe.conversion.shards import WeightSource
from grinmoe.loading import base_of_model
from tests.tiny import tiny_model as make_tiny_model

CHECKPOINT_FILES = ("config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json")


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {
        key: tensor for file in sorted(folder.glob("model*.safetensors")) for key, tensor in load_file(file).items()
    }


@pytest.fixture
def snapshot(goldens, tmp_path):
    """A writable copy of golden-b's checkpoint, without the test data beside it."""
    folder = tmp_path / "snapshot"
    folder.mkdir()
    for pattern in CHECKPOINT_FILES:
        for file in goldens["golden-b"].folder.glob(pattern):
            shutil.copy(file, folder)
    return folder


@pytest.mark.parametrize("max_shard_size", ["100KB", "300KB", "5GB"])
@pytest.mark.parametrize("name", ["golden-a", "golden-b", "golden-c"])
def test_round_trip_is_bit_exact(goldens, tmp_path, name, max_shard_size):
    official = weights_of(goldens[name].folder)
    model = GrinMoeForCausalLM.from_pretrained(goldens[name].folder)
    assert all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    saved = weights_of(tmp_path)
    assert saved.keys() == official.keys()
    assert all(torch.equal(saved[key], official[key]) for key in official)
    shards = list(tmp_path.glob("model*.safetensors"))
    assert (len(shards) > 1) == (max_shard_size != "5GB")
    if len(shards) > 1:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in official.values())
        limit = int(max_shard_size.removesuffix("KB")) * 1000
        largest = max(t.numel() * t.element_size() for t in official.values())
        assert all(sum(t.nbytes for t in load_file(shard).values()) <= max(limit, largest) for shard in shards)


def test_official_shapes_are_those_of_the_files(goldens):
    for golden in goldens.values():
        config = GrinMoeForCausalLM.config_class.from_pretrained(golden.folder)
        assert official_shapes(config) == {key: tuple(t.shape) for key, t in weights_of(golden.folder).items()}


def test_saving_aliases_the_experts(tiny_model):
    state = tiny_model().state_dict()
    official = official_state_dict(state)
    fused = state["model.layers.0.block_sparse_moe.experts.gate_up_proj"]
    width = fused.shape[1] // 2
    for expert in range(fused.shape[0]):
        prefix = f"model.layers.0.block_sparse_moe.experts.{expert}"
        assert official[f"{prefix}.w1.weight"].data_ptr() == fused[expert].data_ptr()
        assert torch.equal(official[f"{prefix}.w3.weight"], fused[expert, width:])


class TestFuseExperts:
    """The conversion of w1 and w3 against Transformers' own two operations, which copy everything twice."""

    SOURCES = (".experts.*.w1.weight", ".experts.*.w3.weight")
    TARGET = ".experts.gate_up_proj"

    def converter(self, *operations) -> WeightConverter:
        return WeightConverter(list(self.SOURCES), self.TARGET, list(operations))

    def fuse(self, w1, w3, *operations) -> torch.Tensor:
        converter = self.converter(*operations)
        for pattern, matrices in zip(self.SOURCES, (w1, w3)):
            for matrix in matrices:
                converter.add_tensor(f"model.layers.0{self.TARGET}", "any", pattern, matrix)
        (fused,) = converter.convert(f"model.layers.0{self.TARGET}").values()
        return fused

    @pytest.mark.parametrize("shape", [(3, 5, 7), (1, 4, 2), (4, 1, 3)], ids=str)
    def test_fuses_as_transformers_does(self, shape):
        w1, w3 = torch.randn(2, *shape).to(torch.bfloat16)
        fused = self.fuse(w1, w3, FuseExperts())
        assert fused.is_contiguous() and fused.dtype == torch.bfloat16
        assert torch.equal(fused, self.fuse(w1, w3, MergeModulelist(dim=0), Concatenate(dim=1)))

    @pytest.mark.parametrize("shape", [(3, 5, 7), (1, 4, 2), (4, 1, 3)], ids=str)
    def test_its_reverse_gives_back_every_matrix(self, shape):
        w1, w3 = torch.randn(2, *shape)
        reverse = self.converter(FuseExperts()).reverse_transform()
        reverse.add_tensor("model.layers.0.experts.*.w1.weight", "any", self.TARGET, self.fuse(w1, w3, FuseExperts()))
        split = reverse.convert("model.layers.0.experts.*.w1.weight")
        expected = {
            f"model.layers.0.experts.{expert}.{name}.weight": matrix
            for name, matrices in (("w1", w1), ("w3", w3))
            for expert, matrix in enumerate(matrices)
        }
        assert split.keys() == expected.keys()
        assert all(torch.equal(split[key], expected[key]) for key in expected)
        (again,) = reverse.reverse_transform().operations
        assert isinstance(again, FuseExperts)

    def test_weights_that_an_earlier_operation_has_stacked_are_taken(self):
        w1, w3 = torch.randn(2, 3, 5, 7)
        fused = FuseExperts().convert(dict(zip(self.SOURCES, (w1, w3))), [*self.SOURCES, "consumed"], [self.TARGET])
        assert torch.equal(fused[self.TARGET], torch.cat([w1, w3], dim=1))

    def test_an_expert_without_its_w3_is_an_error(self):
        with pytest.raises(ValueError, match="shorter"):
            self.fuse(torch.randn(3, 5, 7), torch.randn(2, 5, 7), FuseExperts())


def test_the_three_auto_classes_load_the_snapshot(snapshot):
    causal = AutoModelForCausalLM.from_pretrained(snapshot)
    base = AutoModel.from_pretrained(snapshot)
    classifier = AutoModelForSequenceClassification.from_pretrained(snapshot, num_labels=3)
    assert (type(causal), type(base), type(classifier)) == (
        GrinMoeForCausalLM,
        GrinMoeModel,
        GrinMoeForSequenceClassification,
    )
    assert classifier.score.weight.shape[0] == 3 and torch.isfinite(classifier.score.weight).all()
    for model in (base, classifier.model):
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), causal.model.parameters(), strict=True))


@pytest.mark.parametrize("model_class", [GrinMoeModel, GrinMoeForSequenceClassification])
def test_other_classes_round_trip(tiny_config, tmp_path, model_class):
    model = model_class(tiny_config())
    model.save_pretrained(tmp_path)
    again = model_class.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


def test_a_headless_checkpoint_serves_a_model_with_a_head(tiny_config, tmp_path):
    base = GrinMoeModel(tiny_config())
    base.save_pretrained(tmp_path)
    causal, info = GrinMoeForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == {"lm_head.weight", "lm_head.bias"}
    assert torch.equal(
        causal.model.layers[0].block_sparse_moe.experts.down_proj, base.layers[0].block_sparse_moe.experts.down_proj
    )


def test_tied_embeddings_round_trip(tiny_model, tmp_path):
    model = tiny_model(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    again = GrinMoeForCausalLM.from_pretrained(tmp_path)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


class TestLoadStateDict:
    """Per-expert keys through plain load_state_dict, as the Trainer does it."""

    @pytest.fixture
    def official(self, goldens):
        return weights_of(goldens["golden-b"].folder)

    @pytest.fixture
    def fresh(self, goldens):
        config = GrinMoeForCausalLM.config_class.from_pretrained(goldens["golden-b"].folder)
        return lambda: GrinMoeForCausalLM(config).to(torch.bfloat16)

    def matches(self, model, official) -> bool:
        mine = official_state_dict(model.state_dict())
        return all(torch.equal(mine[key], official[key]) for key in official)

    def test_all_at_once(self, official, fresh):
        model = fresh()
        result = model.load_state_dict(official)
        assert not result.missing_keys and not result.unexpected_keys and self.matches(model, official)

    def test_split_over_calls(self, official, fresh):
        model = fresh()
        for part in range(3):
            result = model.load_state_dict(
                {key: tensor for i, (key, tensor) in enumerate(official.items()) if i % 3 == part}, strict=False
            )
            assert not result.unexpected_keys
        assert self.matches(model, official)

    def test_the_given_dict_is_left_alone(self, official, fresh):
        keys = list(official)
        fresh().load_state_dict(official)
        assert list(official) == keys

    def test_fused_keys_still_load(self, official, fresh):
        source, model = fresh(), fresh()
        source.load_state_dict(official)
        assert not model.load_state_dict(source.state_dict()).missing_keys
        assert self.matches(model, official)

    def test_onto_the_meta_device(self, official, fresh):
        with torch.device("meta"):
            model = fresh()
        model.load_state_dict(official, assign=True)
        assert self.matches(model, official)

    def test_an_incomplete_dict_is_missing_in_strict_mode(self, official, fresh):
        official.pop("model.layers.1.block_sparse_moe.experts.3.w1.weight")
        with pytest.raises(RuntimeError, match="layers.1.block_sparse_moe.experts.gate_up_proj"):
            fresh().load_state_dict(official)

    def test_a_wrong_shape_is_named(self, official, fresh):
        official["model.layers.1.block_sparse_moe.experts.3.w1.weight"] = torch.zeros(5, 64)
        with pytest.raises(RuntimeError, match=r"experts\.3\.w1\.weight: the checkpoint has \(5, 64\)"):
            fresh().load_state_dict(official)


class TestBadCheckpoint:
    """Every broken checkpoint is named before weights are read."""

    def shards(self, folder: Path) -> list[Path]:
        return sorted(folder.glob("model-*.safetensors"))

    def test_missing_shard(self, snapshot):
        self.shards(snapshot)[1].unlink()
        with pytest.raises(CheckpointFileError, match="model-00002-of-00003.safetensors, which is not there"):
            GrinMoeForCausalLM.from_pretrained(snapshot)

    @pytest.mark.parametrize("keep", [0, 4, 1000, -1])
    def test_truncated_shard(self, snapshot, keep):
        shard = self.shards(snapshot)[2]
        content = shard.read_bytes()
        shard.write_bytes(content[:keep])
        with pytest.raises(CheckpointFileError, match="model-00003-of-00003.safetensors .* truncated"):
            GrinMoeForCausalLM.from_pretrained(snapshot)

    def rewrite(self, shard: Path, change) -> None:
        tensors = load_file(shard)
        change(tensors)
        save_file(tensors, shard, metadata={"format": "pt"})

    def test_wrong_shape(self, snapshot):
        key = "model.layers.0.block_sparse_moe.experts.0.w2.weight"
        index = json.loads((snapshot / "model.safetensors.index.json").read_text())
        self.rewrite(snapshot / index["weight_map"][key], lambda tensors: tensors.update({key: torch.zeros(3, 5)}))
        with pytest.raises(CheckpointError, match=r"experts\.0\.w2\.weight with shape \(3, 5\), config.json makes it"):
            GrinMoeForCausalLM.from_pretrained(snapshot)

    def test_unknown_key(self, snapshot):
        add_tensor(snapshot, "model.layers.0.bonus", torch.zeros(1))
        with pytest.raises(CheckpointError, match="model.layers.0.bonus, which is no weight of this config"):
            GrinMoeForCausalLM.from_pretrained(snapshot)

    def test_a_layer_too_many(self, snapshot):
        config = json.loads((snapshot / "config.json").read_text())
        (snapshot / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
        with pytest.raises(CheckpointError, match="num_hidden_layers=2"):
            GrinMoeForCausalLM.from_pretrained(snapshot)

    def test_a_layer_too_few(self, snapshot):
        config = json.loads((snapshot / "config.json").read_text())
        (snapshot / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))
        with pytest.raises(CheckpointError, match=r"lacks .* weights of the network, model\.layers\.3"):
            GrinMoeForCausalLM.from_pretrained(snapshot)

    @pytest.mark.parametrize("in_one_file", [False, True])
    def test_a_missing_expert_matrix(self, snapshot, in_one_file):
        key = "model.layers.1.block_sparse_moe.experts.3.w1.weight"
        if in_one_file:
            weights = weights_of(snapshot)
            for file in snapshot.glob("model*"):
                file.unlink()
            save_file(weights, snapshot / "model.safetensors", metadata={"format": "pt"})
            self.rewrite(snapshot / "model.safetensors", lambda tensors: tensors.pop(key))
        else:
            file = snapshot / "model.safetensors.index.json"
            index = json.loads(file.read_text())
            self.rewrite(snapshot / index["weight_map"].pop(key), lambda tensors: tensors.pop(key))
            file.write_text(json.dumps(index))
        with pytest.raises(CheckpointError, match=f"lacks 1 weights of the network, {re.escape(key)}"):
            GrinMoeForCausalLM.from_pretrained(snapshot)

    def test_index_that_promises_too_much(self, snapshot):
        file = snapshot / "model.safetensors.index.json"
        index = json.loads(file.read_text())
        index["weight_map"]["model.extra"] = self.shards(snapshot)[0].name
        file.write_text(json.dumps(index))
        with pytest.raises(CheckpointFileError, match="lacks 1 tensors that the index promises, model.extra"):
            GrinMoeForCausalLM.from_pretrained(snapshot)

    def test_index_that_is_no_index(self, snapshot):
        (snapshot / "model.safetensors.index.json").write_text("{")
        with pytest.raises(CheckpointFileError, match="is not a safetensors index"):
            GrinMoeForCausalLM.from_pretrained(snapshot)

    def test_pickles_are_refused(self, snapshot):
        for shard in self.shards(snapshot):
            shard.unlink()
        (snapshot / "model.safetensors.index.json").unlink()
        torch.save({}, snapshot / "pytorch_model.bin")
        with pytest.raises(CheckpointFileError, match="only pickled weights"):
            GrinMoeForCausalLM.from_pretrained(snapshot)
        with pytest.raises(ValueError, match="use_safetensors=False"):
            GrinMoeForCausalLM.from_pretrained(snapshot, use_safetensors=False)

    def test_no_weights_at_all(self, snapshot):
        for file in snapshot.glob("model*"):
            file.unlink()
        with pytest.raises(OSError, match="model.safetensors"):
            GrinMoeForCausalLM.from_pretrained(snapshot)

    def test_another_model_type(self, snapshot):
        config = json.loads((snapshot / "config.json").read_text())
        (snapshot / "config.json").write_text(json.dumps({**config, "model_type": "mixtral"}))
        with pytest.raises(ValueError, match="model_type='mixtral'"):
            GrinMoeForCausalLM.from_pretrained(snapshot)

    def test_a_caller_who_looks_at_the_keys_still_gets_whole_shards(self, snapshot):
        shard = self.shards(snapshot)[0]
        shard.write_bytes(shard.read_bytes()[:-1])
        with pytest.raises(CheckpointFileError, match="truncated"):
            GrinMoeForCausalLM.from_pretrained(snapshot, output_loading_info=True)

    def test_shapes_can_be_left_to_the_library(self, snapshot):
        key = "model.embed_tokens.weight"
        index = json.loads((snapshot / "model.safetensors.index.json").read_text())
        self.rewrite(snapshot / index["weight_map"][key], lambda tensors: tensors.update({key: torch.zeros(7, 64)}))
        model = GrinMoeForCausalLM.from_pretrained(snapshot, ignore_mismatched_sizes=True)
        assert model.model.embed_tokens.weight.shape == (320, 64)


EXPERT = "model.layers.0.block_sparse_moe.experts.0.w1.weight"
FUSED = "model.layers.0.block_sparse_moe.experts.gate_up_proj"
INDEX = "model.safetensors.index.json"


def change_index(folder: Path, change) -> None:
    """`change` mends the index, or returns what takes its place."""
    index = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(json.dumps(change(index) or index))


def change_shard(shard: Path, change) -> None:
    tensors = load_file(shard)
    change(tensors)
    save_file(tensors, shard, metadata={"format": "pt"})


def shard_of(folder: Path, key: str) -> Path:
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][key]


def add_tensor(folder: Path, key: str, tensor: torch.Tensor) -> None:
    """Put a tensor into the first shard and the index, or replace it where it is."""
    index = json.loads((folder / INDEX).read_text())
    shard = index["weight_map"].setdefault(key, min(index["weight_map"].values()))
    (folder / INDEX).write_text(json.dumps(index))
    change_shard(folder / shard, lambda tensors: tensors.update({key: tensor}))


def add_overlay(folder: Path, name: str) -> None:
    """A shard with the right copy of a tensor, which the index names; the older shard keeps a stale one."""
    shard = shard_of(folder, EXPERT)
    right = load_file(shard)[EXPERT]
    save_file({EXPERT: right}, folder / name, metadata={"format": "pt"})
    change_shard(shard, lambda tensors: tensors.update({EXPERT: torch.zeros_like(right)}))
    change_index(folder, lambda index: index["weight_map"].update({EXPERT: name}))


def save_zeros(folder: Path, name: str) -> None:
    save_file({key: torch.zeros_like(t) for key, t in weights_of(folder).items()}, folder / name, {"format": "pt"})


def set_config(folder: Path, **fields) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


def repeat_key(folder: Path) -> None:
    text = (folder / INDEX).read_text()
    again = f'"weight_map": {{"{EXPERT}": "model-00001-of-00003.safetensors", '
    (folder / INDEX).write_text(text.replace('"weight_map": {', again, 1))


def move_shard(folder: Path, name: str) -> None:
    """The first shard under another name, as the index then says."""
    shard = min(json.loads((folder / INDEX).read_text())["weight_map"].values())
    (folder / shard).rename(folder / name)
    change_index(
        folder,
        lambda index: index.update(
            weight_map={key: name if file == shard else file for key, file in index["weight_map"].items()}
        ),
    )


# What each breaks, and what the error says. Transformers loads most of them, and some with stale weights.
AMBIGUOUS_FILES = {
    "overlay last": (
        lambda f: add_overlay(f, "model-99999-of-99999.safetensors"),
        "holds 1 tensors .* places .*w1.weight",
    ),
    "overlay first": (
        lambda f: add_overlay(f, "model-00000-of-99999.safetensors"),
        "in model-00000-of-99999.safetensors",
    ),
    "unnamed tensor": (
        lambda f: change_index(f, lambda i: i["weight_map"].pop(EXPERT) and None),
        "w1.weight in no file",
    ),
    "a copy in two shards that the index does not name": (
        lambda f: [
            change_shard(shard, lambda tensors: tensors.update({"model.bonus": torch.zeros(2)}))
            for shard in sorted(f.glob("model-*"))[:2]
        ],
        "model.bonus in no file",
    ),
    "a whole model beside the index": (lambda f: save_zeros(f, "model.safetensors"), "two sets of weights"),
    "a distributed model beside the index": (
        lambda f: save_zeros(f, "shard-00000-model-00001-of-00001.safetensors"),
        "two sets of weights .* and shard-00000-model",
    ),
    "index without metadata": (lambda f: change_index(f, lambda i: i.pop("metadata") and None), 'no "metadata" object'),
    "index with metadata null": (lambda f: change_index(f, lambda i: i.update(metadata=None)), 'no "metadata" object'),
    "index that is a list": (lambda f: change_index(f, lambda i: [i]), "no weight_map that names tensors"),
    "empty weight_map": (
        lambda f: change_index(f, lambda i: i.update(weight_map={})),
        "no weight_map that names tensors",
    ),
    "weight_map that is a list": (
        lambda f: change_index(f, lambda i: i.update(weight_map=list(i["weight_map"].items()))),
        "no weight_map that names tensors",
    ),
    "a number for a shard": (
        lambda f: change_index(f, lambda i: i["weight_map"].update({EXPERT: 1})),
        "places .* in 1,",
    ),
    "a key twice": (repeat_key, "names model.layers.0.block_sparse_moe.experts.0.w1.weight twice"),
    "a shard above the folder": (lambda f: move_shard(f, "../x.safetensors"), "'../x.safetensors', which is not a"),
    "a shard by its whole path": (
        lambda f: move_shard(f, str(f.parent / "x.safetensors")),
        "x.safetensors', which is not a",
    ),
    "a pickle for a shard": (
        lambda f: move_shard(f, "model-00001-of-00003.bin"),
        "model-00001-of-00003.bin', which is not",
    ),
}
AMBIGUOUS_TENSORS = {
    "fused and by single experts": (
        lambda f: add_tensor(f, FUSED, torch.zeros(GOLDEN_FUSED)),
        "gate_up_proj and the matrices of single experts",
    ),
    "with and without a prefix": (
        lambda f: add_tensor(f, "norm.weight", torch.zeros(64)),
        "two copies of one weight",
    ),
    "integers": (
        lambda f: add_tensor(f, "lm_head.bias", torch.ones(320, dtype=torch.int32)),
        "lm_head.bias as I32, where F32, F16 or BF16 belongs",
    ),
    "float8 without scales": (
        lambda f: add_tensor(f, "model.norm.weight", torch.ones(64).to(torch.float8_e4m3fn)),
        "model.norm.weight as F8_E4M3",
    ),
    "tied to another head": (lambda f: set_config(f, tie_word_embeddings=True), "holds another lm_head.weight than"),
    "weights of another name": (
        lambda f: (save_zeros(f, "other.safetensors"), set_config(f, transformers_weights="other.safetensors")),
        "'other.safetensors' as transformers_weights",
    ),
}
GOLDEN_FUSED = (16, 64, 64)  # golden-b: E, 2I, H


def read_as_a_model(folder: Path) -> None:
    GrinMoeForCausalLM.from_pretrained(folder)


def read_by_the_auto_class(folder: Path) -> None:
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def read_as_a_conversion(folder: Path) -> None:
    source = WeightSource(folder)
    check_weights(source.tensors, GrinMoeForCausalLM.config_class.from_pretrained(folder), folder)


class TestAmbiguousCheckpoint:
    """Two copies of a weight, or a place that readers see differently: no reader may guess."""

    @pytest.mark.parametrize("read", [read_as_a_model, read_by_the_auto_class, read_as_a_conversion])
    @pytest.mark.parametrize("kind", [*AMBIGUOUS_FILES, *AMBIGUOUS_TENSORS])
    def test_every_reader_refuses_it(self, snapshot, kind, read):
        spoil, message = (AMBIGUOUS_FILES | AMBIGUOUS_TENSORS)[kind]
        spoil(snapshot)
        with pytest.raises(ValueError, match=message):
            read(snapshot)

    @pytest.mark.parametrize("kind", AMBIGUOUS_FILES)
    def test_a_caller_who_looks_at_the_keys_is_told_too(self, snapshot, kind):
        spoil, message = AMBIGUOUS_FILES[kind]
        spoil(snapshot)
        with pytest.raises(CheckpointError, match=message):
            GrinMoeForCausalLM.from_pretrained(snapshot, output_loading_info=True)

    @pytest.mark.parametrize(
        "allow",
        [
            lambda f: change_index(f, lambda index: index.update(metadata={})),
            lambda f: save_file({"x": torch.zeros(1)}, f / "consolidated.safetensors"),
            lambda f: torch.save({}, f / "pytorch_model.bin"),
            lambda f: (f / "model.safetensors.index.fp16.json").write_text("{}"),
            lambda f: move_shard(f, "other-name.safetensors"),
            lambda f: (
                [file.rename(f.parent / file.name) for file in f.glob("model-*")]
                and [(f / file.name).symlink_to(file) for file in f.parent.glob("model-*")]
            ),
        ],
        ids=["empty metadata", "consolidated", "pickle", "other variant", "other shard name", "links"],
    )
    def test_what_is_not_ambiguous_loads_the_weights_of_the_index(self, goldens, snapshot, allow):
        expected = weights_of(goldens["golden-b"].folder)
        allow(snapshot)
        found = official_state_dict(GrinMoeForCausalLM.from_pretrained(snapshot).state_dict())
        assert all(torch.equal(found[key], expected[key]) for key in expected)

    def test_an_index_of_one_file_loads(self, snapshot):
        """As MLX and others write it."""
        weights = weights_of(snapshot)
        for shard in snapshot.glob("model-*"):
            shard.unlink()
        save_file(weights, snapshot / "model.safetensors", {"format": "pt"})
        change_index(snapshot, lambda index: index.update(weight_map=dict.fromkeys(weights, "model.safetensors")))
        model = GrinMoeForCausalLM.from_pretrained(snapshot)
        assert torch.equal(model.lm_head.weight, weights["lm_head.weight"])
        assert torch.equal(WeightSource(snapshot).read(EXPERT), weights[EXPERT])

    def test_halves_of_a_weight_in_two_dtypes_load_as_their_values(self, snapshot):
        wide = torch.randn(weights_of(snapshot)[EXPERT].shape)
        add_tensor(snapshot, EXPERT, wide)
        model = GrinMoeForCausalLM.from_pretrained(snapshot, dtype=torch.float32)
        rows = wide.shape[0]
        assert torch.equal(model.model.layers[0].block_sparse_moe.experts.gate_up_proj[0, :rows], wide)

    def test_a_variant_is_checked_like_any_other(self, snapshot):
        for shard in snapshot.glob("model-*"):
            shard.rename(snapshot / shard.name.replace("model-", "model.fp16-"))
        change_index(
            snapshot,
            lambda i: i.update(weight_map={k: v.replace("model-", "model.fp16-") for k, v in i["weight_map"].items()}),
        )
        index = snapshot / "model.safetensors.index.fp16.json"
        (snapshot / INDEX).rename(index)
        expected = weights_of(snapshot)["model.embed_tokens.weight"]
        model = GrinMoeForCausalLM.from_pretrained(snapshot, variant="fp16")
        assert torch.equal(model.model.embed_tokens.weight, expected)
        content = json.loads(index.read_text())
        del content["weight_map"][EXPERT]
        index.write_text(json.dumps(content))
        with pytest.raises(CheckpointError, match="w1.weight in no file"):
            GrinMoeForCausalLM.from_pretrained(snapshot, variant="fp16")

    def test_an_adapter_beside_the_model_is_refused(self, snapshot):
        """Transformers silently loads it on top: logits move by 2.6 for a random one."""
        peft = pytest.importorskip("peft")
        model = GrinMoeForCausalLM.from_pretrained(snapshot)
        peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(snapshot)
        for read in (read_as_a_model, read_by_the_auto_class, read_as_a_conversion, base_of_model):
            with pytest.raises(CheckpointError, match="holds a model and an adapter"):
                read(snapshot)

    def test_the_base_that_an_adapter_names_is_checked(self, snapshot, tmp_path):
        peft = pytest.importorskip("peft")
        model = GrinMoeForCausalLM.from_pretrained(snapshot)
        peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
        assert GrinMoeForCausalLM.from_pretrained(tmp_path / "adapter")._hf_peft_config_loaded
        add_overlay(snapshot, "model-99999-of-99999.safetensors")
        with pytest.raises(CheckpointError, match="holds 1 tensors that the index does not name there"):
            GrinMoeForCausalLM.from_pretrained(tmp_path / "adapter")

    @pytest.mark.parametrize("content", ["{", "[]", "{}", "null"])
    def test_an_adapter_that_names_no_base_is_named(self, tmp_path, content):
        (tmp_path / "adapter_config.json").write_text(content)
        with pytest.raises(CheckpointFileError, match="adapter_config.json does not name the adapter's base"):
            GrinMoeForCausalLM.from_pretrained(tmp_path)

    def test_load_state_dict_refuses_an_expert_that_is_there_twice(self, goldens):
        weights = weights_of(goldens["golden-b"].folder)
        model = GrinMoeForCausalLM(GrinMoeForCausalLM.config_class.from_pretrained(goldens["golden-b"].folder))
        both = weights | {FUSED: model.state_dict()[FUSED]}
        with pytest.raises(RuntimeError, match="gate_up_proj is there twice, fused and by single experts"):
            model.load_state_dict(both, strict=False)

    def test_a_distributed_save_before_is_removed_by_a_whole_one(self, snapshot):
        assert stale_weights(
            ["shard-00000-model-00001-of-00001.safetensors", "config.json"], ["model.safetensors"]
        ) == ["shard-00000-model-00001-of-00001.safetensors"]


class TestConfigOfTheCall:
    """The weights are held against the config that the library goes on with: fields given as keywords belong to it."""

    @pytest.mark.parametrize(
        "fields, message",
        [
            ({"num_hidden_layers": 1}, "num_hidden_layers=1"),
            ({"num_hidden_layers": 5}, "lacks .* weights of the network"),
            ({"attention_bias": False}, "attention_bias=False"),
            ({"norm_type": "rms_norm"}, "no weight of this config"),
            ({"lm_head_bias": False}, "lm_head_bias=False"),
            ({"num_local_experts": 2}, "num_local_experts=2"),
            ({"num_experts": 2}, "num_local_experts=2"),
            ({"num_local_experts": 32}, "config.json makes it"),
            ({"head_dim": 4}, "config.json makes it"),
            ({"intermediate_size": 12}, "config.json makes it"),
            ({"vocab_size": 50}, "config.json makes it"),
            ({"tie_word_embeddings": True}, "holds another lm_head.weight"),
        ],
        ids=str,
    )
    @pytest.mark.parametrize("auto_class", [GrinMoeForCausalLM, AutoModelForCausalLM])
    def test_a_field_that_the_weights_do_not_have_is_refused(self, snapshot, auto_class, fields, message):
        with pytest.raises(CheckpointError, match=message):
            auto_class.from_pretrained(snapshot, **fields)

    def test_a_field_that_changes_no_weight_is_taken(self, snapshot):
        model = GrinMoeForCausalLM.from_pretrained(snapshot, rope_theta=5e5, sliding_window=7)
        assert (model.config.rope_theta, model.config.sliding_window) == (5e5, 7)

    @pytest.mark.parametrize("as_state_dict", [False, True])
    def test_a_config_of_another_model_is_refused(self, snapshot, as_state_dict):
        weights = {"state_dict": weights_of(snapshot)} if as_state_dict else {}
        with pytest.raises(ValueError, match="config has model_type='phimoe'.*GrinMoeConfig.from_phimoe"):
            GrinMoeForCausalLM.from_pretrained(None if as_state_dict else snapshot, config=PhimoeConfig(), **weights)

    @pytest.mark.parametrize("as_file", [False, True])
    def test_a_config_by_its_path_is_read_where_the_library_reads_it(self, snapshot, tmp_path, as_file):
        """In the subfolder, without which the library goes on with the default config, of 42 billion weights."""
        shutil.copytree(snapshot, tmp_path / "root" / "s")
        config = tmp_path / "other"
        (config / "s").mkdir(parents=True)
        shutil.copy(snapshot / "config.json", config)
        arguments = {"subfolder": "s", "config": str(config / "config.json" if as_file else config)}
        if not as_file:
            with pytest.raises(CheckpointFileError, match="other.s holds no config.json"):
                GrinMoeForCausalLM.from_pretrained(tmp_path / "root", **arguments)
            shutil.copy(snapshot / "config.json", config / "s")
            set_config(config, num_hidden_layers=2)  # which the library does not read
        assert GrinMoeForCausalLM.from_pretrained(tmp_path / "root", **arguments).config.num_hidden_layers == 3


class TestStateDict:
    """`from_pretrained(None, config=..., state_dict=...)` is checked as the same weights in a folder are."""

    SPOILED = {
        "layers dropped": (lambda s: None, {"num_hidden_layers": 2}, "num_hidden_layers=2"),
        "integers": (
            lambda s: s.update({"lm_head.bias": torch.ones(320, dtype=torch.int32)}),
            {},
            "lm_head.bias as I32",
        ),
        "two copies": (lambda s: s.update({"norm.weight": torch.ones(64)}), {}, "two copies of one weight"),
        "fused and single": (lambda s: s.update({FUSED: torch.zeros(GOLDEN_FUSED)}), {}, "matrices of single experts"),
        "tied to another head": (lambda s: None, {"tie_word_embeddings": True}, "holds another lm_head.weight"),
        "shape": (lambda s: s.update({EXPERT: torch.zeros(3, 5)}), {}, r"shape \(3, 5\)"),
        "half a prefix": (lambda s: s.update({EXPERT.removeprefix("model."): s.pop(EXPERT)}), {}, "without .*prefix"),
    }

    @pytest.mark.parametrize("kind", SPOILED)
    def test_what_a_folder_may_not_hold_is_refused(self, snapshot, kind):
        spoil, fields, message = self.SPOILED[kind]
        config = GrinMoeForCausalLM.config_class.from_pretrained(snapshot, **fields)
        weights = weights_of(snapshot)
        spoil(weights)
        with pytest.raises(CheckpointError, match=message):
            GrinMoeForCausalLM.from_pretrained(None, config=config, state_dict=weights)

    @pytest.mark.parametrize("fused", [False, True])
    @pytest.mark.parametrize("tied", [False, True])
    def test_a_whole_one_loads(self, tiny_model, fused, tied):
        model = tiny_model(tie_word_embeddings=tied)
        weights = model.state_dict() if fused else official_state_dict(model.state_dict())
        again = GrinMoeForCausalLM.from_pretrained(None, config=model.config, state_dict=weights)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


class TestPrefix:
    """Keys of a headless model may lack `model.`: all of them, because Transformers sorts experts by their whole keys."""

    @pytest.mark.parametrize(
        "is_bare", [lambda key: ".experts.3." in key, lambda key: "norm" in key], ids=["experts", "norms"]
    )
    def test_a_mixture_is_refused(self, snapshot, is_bare):
        weights = weights_of(snapshot)
        for file in snapshot.glob("model*"):
            file.unlink()
        mixed = {key.removeprefix("model.") if is_bare(key) else key: tensor for key, tensor in weights.items()}
        save_file(mixed, snapshot / "model.safetensors", {"format": "pt"})
        with pytest.raises(CheckpointError, match='without the prefix "model." and .* with it'):
            GrinMoeForCausalLM.from_pretrained(snapshot)

    @pytest.mark.parametrize("model_class", [GrinMoeForCausalLM, GrinMoeModel])
    def test_no_prefix_at_all_loads(self, goldens, snapshot, model_class):
        weights = weights_of(snapshot)
        for file in snapshot.glob("model*"):
            file.unlink()
        bare = {key.removeprefix("model."): tensor for key, tensor in weights.items()}
        save_file(bare, snapshot / "model.safetensors", {"format": "pt"})
        model = model_class.from_pretrained(snapshot)
        expected = model_class.from_pretrained(goldens["golden-b"].folder)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))


class TestQuantizedLinears:
    """bitsandbytes' linears of a quantised checkpoint: their parts are held against the config as well."""

    LINEAR = "model.layers.0.self_attn.q_proj"

    @pytest.fixture(scope="class")
    def folders(self, tmp_path_factory):
        pytest.importorskip("bitsandbytes")
        folder = tmp_path_factory.mktemp("quantised")
        make_tiny_model(hidden_size=64, intermediate_size=64, num_hidden_layers=1).save_pretrained(folder / "dense")
        forms = {"4": {"load_in_4bit": True}, "8": {"load_in_8bit": True}}
        forms["4 nested"] = {"load_in_4bit": True, "bnb_4bit_use_double_quant": True, "bnb_4bit_quant_type": "nf4"}
        forms |= {f"{bits} skip": {**forms[bits], "llm_int8_skip_modules": ["self_attn"]} for bits in "48"}
        for name, options in forms.items():
            asked = BitsAndBytesConfig(**options)
            GrinMoeForCausalLM.from_pretrained(folder / "dense", quantization_config=asked).save_pretrained(
                folder / name
            )
        return folder

    @pytest.fixture
    def spoiled(self, folders, tmp_path):
        def spoil(name, change):
            shutil.copytree(folders / name, tmp_path / "copy")
            change_shard(tmp_path / "copy" / "model.safetensors", change)
            return tmp_path / "copy"

        return spoil

    @pytest.mark.parametrize("name", ["4", "8", "4 nested", "4 skip", "8 skip"])
    @pytest.mark.parametrize("as_state_dict", [False, True])
    def test_a_whole_one_loads(self, folders, name, as_state_dict):
        model = GrinMoeForCausalLM.from_pretrained(folders / name)
        if as_state_dict:
            weights = load_file(folders / name / "model.safetensors")
            config = GrinMoeForCausalLM.config_class.from_pretrained(folders / name)
            again = GrinMoeForCausalLM.from_pretrained(None, config=config, state_dict=weights)
            ids = torch.arange(1, 9)[None]
            assert torch.equal(again(ids).logits, model(ids).logits)

    @pytest.mark.parametrize(
        "name, part, change, message",
        [
            ("4", "weight.absmax", lambda t: t[:4].clone(), r"absmax with shape \(4,\)"),
            ("4", "weight", lambda t: t[:8].clone(), r"weight with shape \(8, 1\)"),
            ("4", "weight", lambda t: t.float(), "weight as F32, where U8 belongs"),
            ("4", "weight", lambda t: torch.zeros(64, 64), r"weight with shape \(64, 64\)"),
            ("4", "weight.absmax", None, r"lacks 1 .*absmax"),
            ("4", "weight.quant_state.bitsandbytes__fp4", None, r"lacks 1 .*bitsandbytes__fp4"),
            ("4 nested", "weight.nested_absmax", None, r"lacks 1 .*nested_absmax"),
            ("4 nested", "weight.absmax", lambda t: t.float(), "absmax as F32, where U8 belongs"),
            ("8", "weight", lambda t: t.float(), "weight as F32, where I8 belongs"),
            ("8", "weight", lambda t: t[:8].clone(), r"weight with shape \(8, 64\)"),
            ("8", "SCB", lambda t: t[:4].clone(), r"SCB with shape \(4,\)"),
            ("8", "SCB", None, "lacks 1 .*SCB"),
            ("4 skip", "weight", lambda t: t.to(torch.uint8), "weight as U8, where F32"),
            ("8 skip", "weight", lambda t: t.to(torch.int8), "weight as I8, where F32"),
        ],
    )
    def test_a_part_that_does_not_fit_is_refused(self, spoiled, name, part, change, message):
        key = f"{self.LINEAR}.{part}"
        folder = spoiled(
            name, lambda tensors: tensors.update({key: change(tensors[key])}) if change else tensors.pop(key)
        )
        with pytest.raises(CheckpointError, match=message):
            GrinMoeForCausalLM.from_pretrained(folder)

    def test_a_part_that_the_form_does_not_have_is_refused(self, spoiled):
        folder = spoiled("4", lambda tensors: tensors.update({f"{self.LINEAR}.weight.foo": torch.ones(1)}))
        with pytest.raises(CheckpointError, match="weight.foo, which is no weight of this config"):
            GrinMoeForCausalLM.from_pretrained(folder)

    @pytest.mark.parametrize(
        "name, skipped", [("4", ["q_proj"]), ("8", ["self_attn"]), ("4 skip", None), ("8 skip", None)]
    )
    def test_a_config_that_skips_other_linears_is_refused(self, spoiled, name, skipped):
        folder = spoiled(name, lambda tensors: None)
        content = json.loads((folder / "config.json").read_text())["quantization_config"]
        set_config(folder, quantization_config={**content, "llm_int8_skip_modules": skipped})
        with pytest.raises(CheckpointError, match=r"[qkvo]_proj"):
            GrinMoeForCausalLM.from_pretrained(folder)

    def test_a_config_of_another_4_bit_type_is_refused(self, spoiled):
        folder = spoiled("4", lambda tensors: None)
        content = json.loads((folder / "config.json").read_text())["quantization_config"]
        set_config(folder, quantization_config={**content, "bnb_4bit_quant_type": "nf4"})
        with pytest.raises(CheckpointError, match="bitsandbytes__fp4, which is no weight of this config"):
            GrinMoeForCausalLM.from_pretrained(folder)


class TestQuantizationArguments:
    @pytest.mark.parametrize("auto_class", [GrinMoeForCausalLM, AutoModelForCausalLM])
    @pytest.mark.parametrize("given", ["nf4", True, 4], ids=str)
    def test_what_is_no_config_is_refused_by_name(self, snapshot, auto_class, given):
        with pytest.raises(ValueError, match=rf"quantization_config={given!r}.*BitsAndBytesConfig"):
            auto_class.from_pretrained(snapshot, quantization_config=given)

    @pytest.mark.parametrize("auto_class", [GrinMoeForCausalLM, AutoModelForCausalLM])
    @pytest.mark.parametrize("field", ["load_in_8bit", "load_in_4bit", "bnb_4bit_use_double_quant"])
    def test_its_fields_as_keywords_are_refused_with_the_way(self, snapshot, auto_class, field):
        with pytest.raises(ValueError, match=rf"{field}=True.*quantization_config=BitsAndBytesConfig\({field}=True"):
            auto_class.from_pretrained(snapshot, **{field: True})


class TestBadDownload:
    """The same for a Hub id: the library's loader takes some of these without a word."""

    @pytest.fixture
    def cached(self, snapshot, tmp_path):
        """The snapshot as the Hub's client caches a repository, and the arguments that load it from there."""
        repository = tmp_path / "cache" / "models--someone--grin"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text("0" * 40)
        folder = repository / "snapshots" / ("0" * 40)
        folder.parent.mkdir()
        snapshot.rename(folder)
        return folder, ("someone/grin",), {"cache_dir": tmp_path / "cache", "local_files_only": True}

    def change_config(self, folder: Path, **fields) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **fields}))

    def test_a_whole_one_loads(self, cached):
        folder, arguments, options = cached
        model = GrinMoeForCausalLM.from_pretrained(*arguments, **options)
        assert torch.equal(model.lm_head.weight, weights_of(folder)["lm_head.weight"])

    @pytest.mark.parametrize(
        "fields, message",
        [
            ({"num_hidden_layers": 2}, "num_hidden_layers=2"),
            ({"attention_bias": False}, "attention_bias=False"),
            ({"lm_head_bias": False}, "lm_head_bias=False"),
            ({"num_hidden_layers": 4}, "lacks .* weights of the network"),
            ({"intermediate_size": 16}, "config.json makes it"),
        ],
        ids=str,
    )
    def test_a_config_of_another_checkpoint(self, cached, fields, message):
        folder, arguments, options = cached
        self.change_config(folder, **fields)
        with pytest.raises(CheckpointError, match=message):
            GrinMoeForCausalLM.from_pretrained(*arguments, **options)

    @pytest.mark.parametrize("as_config", [False, True])
    def test_no_config_is_refused_before_the_weights_are_fetched(self, cached, as_config, monkeypatch):
        """The library would go on with the default config, of 42 billion weights."""
        folder, arguments, options = cached
        (folder / "config.json").unlink()
        marker = folder.parents[1] / ".no_exist" / folder.name / "config.json"  # how the Hub's client remembers it
        marker.parent.mkdir(parents=True)
        marker.touch()
        arguments, options = ((folder,), {**options, "config": arguments[0]}) if as_config else (arguments, options)
        monkeypatch.setattr(GrinMoeForCausalLM, "__init__", None)  # nothing is built
        # Without the Hub, Transformers up to 5.17 asks for the file again and says that it could not.
        with pytest.raises(OSError, match="holds no config.json|couldn't find them in the cached files"):
            GrinMoeForCausalLM.from_pretrained(*arguments, **options)

    def test_a_truncated_shard(self, cached):
        folder, arguments, options = cached
        shard = folder / "model-00003-of-00003.safetensors"
        shard.write_bytes(shard.read_bytes()[:1000])
        with pytest.raises(CheckpointFileError, match="model-00003-of-00003.safetensors .* truncated"):
            GrinMoeForCausalLM.from_pretrained(*arguments, **options)

    @pytest.mark.parametrize("kind", AMBIGUOUS_FILES)
    def test_an_ambiguous_one(self, cached, kind):
        folder, arguments, options = cached
        spoil, message = AMBIGUOUS_FILES[kind]
        spoil(folder)
        with pytest.raises(CheckpointError, match=message):
            GrinMoeForCausalLM.from_pretrained(*arguments, **options)

    def test_an_adapter_whose_base_it_is(self, cached, tmp_path):
        peft = pytest.importorskip("peft")
        folder, arguments, options = cached
        model = GrinMoeForCausalLM.from_pretrained(*arguments, **options)
        peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
        assert GrinMoeForCausalLM.from_pretrained(tmp_path / "adapter", **options)._hf_peft_config_loaded
        add_overlay(folder, "model-99999-of-99999.safetensors")
        with pytest.raises(CheckpointError, match="holds 1 tensors that the index does not name there"):
            GrinMoeForCausalLM.from_pretrained(tmp_path / "adapter", **options)
