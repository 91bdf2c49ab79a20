"""A phimoe checkpoint as vLLM, SGLang and llama.cpp read it: tensors that they insist on, and what they compute otherwise.

Read off vLLM 0.33.0 and SGLang 0.5.23; `tests/conversion/test_phimoe.py` runs their own model files. Both have biases on
attention and head whatever config.json says (vLLM refuses a checkpoint without them) and never tie the head (vLLM), so an
export writes these tensors out. Both mask routing with eps = 0.01, and neither adds the head's bias, which no export can
mend: `engine_difference` measures it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from ..configuration_grinmoe import FOREIGN_EXTRAS, GrinMoeConfig
from .compare import distribution_difference
from .configs import WRITTEN_OUT
from .shards import Entry, WeightSource

ENGINE_EPS = 0.01
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


def complete(entries: Iterable[Entry]) -> list[Entry]:
    """The tensors, and what PhiMoE requires beside them: zeros where there are no biases, and a tied head by itself."""
    result = {entry.name: entry for entry in entries}
    if _HEAD not in result:
        embedding = result[_EMBEDDING]
        # Of its own memory: safetensors writes no tensors that share theirs.
        result[_HEAD] = dataclasses.replace(embedding, name=_HEAD, make=lambda: embedding.make().clone())
    for name in [name for name in result if _may_have_bias(name)]:
        bias = name.removesuffix("weight") + "bias"
        if bias not in result:
            result[bias] = _zeros(bias, result[name])
    return list(result.values())


def _may_have_bias(name: str) -> bool:
    return name == _HEAD or (name.endswith(".weight") and ("_proj." in name or "norm." in name))


def _zeros(name: str, weight: Entry) -> Entry:
    shape = weight.shape[:1]
    return Entry(name, shape, weight.dtype, lambda: torch.zeros(shape, dtype=weight.dtype))


def as_it_was(config: GrinMoeConfig, content: dict[str, Any], source: WeightSource) -> GrinMoeConfig:
    """
    The config of the checkpoint that an export to phimoe was made of, without what was written out for it.

    Args:
        config: as `from_pretrained` reads the export.
        content: its config.json.
        source: its tensors. What was trained since (a bias that is not zero) stays.
    """
    before = (content.get(FOREIGN_EXTRAS) or {}).get(WRITTEN_OUT) or {}
    biases = [name for name in source.shapes if name.endswith("_proj.bias")]
    unchanged = {
        "attention_bias": lambda: all(not source.read(name).any() for name in biases),
        "lm_head_bias": lambda: not source.read("lm_head.bias").any(),
        "tie_word_embeddings": lambda: has_spare_head(source),
    }
    for name, value in before.items():
        if unchanged[name]():
            setattr(config, name, value)
    return config


def has_spare_head(source: WeightSource) -> bool:
    """Whether a head is written out that is the embedding."""
    if _HEAD not in source or _EMBEDDING not in source:
        return False
    return torch.equal(source.read(_HEAD), source.read(_EMBEDDING))


def engine_causes(config: GrinMoeConfig, source: WeightSource) -> list[str]:
    """Why vLLM and SGLang will not give a checkpoint's logits; empty where they should."""
    causes = []
    if config.lm_head_bias and "lm_head.bias" in source:
        bias = source.read("lm_head.bias").float()
        # The same amount on every logit changes no distribution.
        if (spread := (bias.max() - bias.min()).item()) > 0:
            causes.append(f"they do not add lm_head.bias (which spans {spread:.3g})")
    if config.router_jitter_noise != ENGINE_EPS:
        causes.append(f"they mask routing with {ENGINE_EPS:g}, not router_jitter_noise={config.router_jitter_noise:g}")
    if config.hidden_act not in ("silu", "swish"):
        causes.append(f"their experts have silu, not hidden_act={config.hidden_act!r}")
    return causes


def engine_difference(folder: Path, config: GrinMoeConfig) -> dict[str, Any]:
    """How far that moves the outputs, as [`distribution_difference`] says it; of hidden_act nothing is measured."""

    def as_engines(model: Any) -> None:
        if model.lm_head.bias is not None:
            model.lm_head.bias.zero_()
        for layer in model.model.layers:
            layer.block_sparse_moe.gate.jitter_eps = ENGINE_EPS

    return distribution_difference(folder, config, as_engines)


def routing_difference(folder: Path, config: GrinMoeConfig) -> dict[str, Any]:
    """How far llama.cpp's routing, a softmax over the chosen experts, moves the outputs."""

    def as_llama_cpp(model: Any) -> None:
        for layer in model.model.layers:
            layer.block_sparse_moe.gate.estimator = "topk_renormalized"

    return distribution_difference(folder, config, as_llama_cpp)
