"""Folders that must not be published: what was done to a good one, the error, and what its message says."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from grinmoe import GrinMoeForCausalLM
from grinmoe.checkpoint_grinmoe import CheckpointError
from grinmoe.hub.checks import ReleaseError
from grinmoe.tokenization import TokenizerError
from tests.hub.release_folders import INDEX, SHARDS, edit_json, edit_weights, small_tokenizer, truncated


def without(name: str):
    """A change that takes a file away."""
    return lambda folder: (folder / name).unlink()


def poison(value: float, name: str = "adapter_model.safetensors"):
    """A change that puts a value into two places of a file of weights."""

    def change(folder: Path) -> None:
        edit_weights(folder / name, lambda tensors: next(iter(tensors.values())).view(-1)[3:5].fill_(value))

    return change


def without_token(folder: Path, token: str) -> None:
    """As if a special token had never been added."""
    content = json.loads((folder / "tokenizer.json").read_text())
    content["added_tokens"] = [entry for entry in content["added_tokens"] if entry["content"] != token]
    content["model"]["vocab"].pop(token, None)
    (folder / "tokenizer.json").write_text(json.dumps(content))


def lead_outside(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    (folder.parent / "outside.safetensors").write_bytes((folder / SHARDS[2]).read_bytes())
    weight_map = {key: name.replace(SHARDS[2], "../outside.safetensors") for key, name in index["weight_map"].items()}
    (folder / INDEX).write_text(json.dumps({**index, "weight_map": weight_map}))


def no_weights(folder: Path) -> None:
    for name in (*SHARDS, INDEX):
        (folder / name).unlink()


def fuse(folder: Path) -> None:
    model = GrinMoeForCausalLM.from_pretrained(folder)
    no_weights(folder)
    model.save_pretrained(folder, save_original_format=False)


def only_pickles(folder: Path) -> None:
    no_weights(folder)
    torch.save({}, folder / "pytorch_model.bin")


def cut_shard(folder: Path) -> None:
    (folder / SHARDS[1]).write_bytes(truncated((folder / SHARDS[1]).read_bytes()))


BAD_FOLDERS = {
    "truncated shard": (cut_shard, CheckpointError, f"{SHARDS[1]} .* is truncated or not safetensors"),
    "missing shard": (without(SHARDS[0]), CheckpointError, f"in {SHARDS[0]}, which is not there; download that shard"),
    "only pickles": (only_pickles, CheckpointError, "only pickled weights .* convert them to safetensors"),
    "no weights": (no_weights, CheckpointError, "holds no safetensors weights; save the model with save_pretrained"),
    "no config": (without("config.json"), ReleaseError, "holds neither config.json nor adapter_config.json"),
    "broken config": (lambda folder: (folder / "config.json").write_text("{"), ValueError, "cannot be read"),
    "config of another model": (
        lambda folder: edit_json(folder / "config.json", model_type="llama"),
        ValueError,
        "llama",
    ),
    "config of other sizes": (
        lambda folder: edit_json(folder / "config.json", intermediate_size=48),
        CheckpointError,
        "with shape .* config.json makes it",
    ),
    "index of another folder": (
        lead_outside,
        CheckpointError,
        "'../outside.safetensors', which is not a safetensors file of its folder",
    ),
    "fused experts": (fuse, ReleaseError, "fused experts' weights, .* save it again"),
    "no tokenizer": (without("tokenizer.json"), ReleaseError, "holds no tokenizer.json, .* --tokenizer"),
    "tokenizer of a larger model": (
        lambda folder: small_tokenizer(400).save_pretrained(folder),
        TokenizerError,
        "the model's vocab_size is 320; take the model's own tokenizer",
    ),
    "missing special tokens": (
        lambda folder: without_token(folder, "<|end|>"),
        TokenizerError,
        "lacks the special tokens <|end|>",
    ),
    "another template": (
        lambda folder: (folder / "chat_template.jinja").write_text("{{ messages[0].content }}"),
        ReleaseError,
        "is not the family's: it renders .*--own-template",
    ),
    "broken template": (
        lambda folder: (folder / "chat_template.jinja").write_text("{% for %}"),
        ReleaseError,
        "is not the family's: it fails on",
    ),
    "broken card": (
        lambda folder: (folder / "README.md").write_text("---\nlicense: [mit\n---\n# x\n"),
        ValueError,
        "README.md cannot be read .* correct the lines between",
    ),
    "NaN in an expert": (poison(float("nan"), SHARDS[1]), ReleaseError, f"{SHARDS[1]}: .* has 2 values that are NaN"),
    "infinite weights": (poison(float("-inf"), SHARDS[2]), ReleaseError, "NaN or infinite; .* an earlier checkpoint"),
    "broken generation config": (
        lambda folder: (folder / "generation_config.json").write_text("{"),
        ReleaseError,
        "generation_config.json cannot be read",
    ),
    "licence in another encoding": (
        lambda folder: (folder / "LICENSE").write_bytes("Lizenz für alle".encode("latin-1")),
        ReleaseError,
        "LICENSE is not UTF-8 text; convert it",
    ),
    "a pickle with another name": (
        lambda folder: (folder / "training.png").write_bytes(b"\x80\x04\x95state"),
        ReleaseError,
        "training.png is a pickle",
    ),
    "an archive of torch with another name": (
        lambda folder: torch.save({}, folder / "LICENSE"),
        ReleaseError,
        "LICENSE is a zip archive, as torch.save and Keras write it",
    ),
}
