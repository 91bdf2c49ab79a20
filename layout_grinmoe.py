"""The official layout of GRIN-MoE checkpoints: keys, shapes, file names, and the way to the fused weights and back.

On disk every expert has its own w1, w3 and w2; in memory the experts of a layer are fused (see `experts_grinmoe.py`).
Transformers' weight conversion fuses them while it loads. docs/checkpoint.md has the whole list of keys.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

import torch
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import ConversionOps, MergeModulelist, WeightConverter

from .configuration_grinmoe import GrinMoeConfig
from .experts_grinmoe import ON_DISK


class FuseExperts(MergeModulelist):
    """w1 and w3 of E experts, each (I, H), to gate_up_proj (E, 2I, H).

    Transformers' own MergeModulelist and Concatenate copy every byte twice. This is a MergeModulelist for them too: up to
    transformers 5.17, a loader that reads only the rank's own experts looks for one among the operations.
    """

    @torch.no_grad()
    def convert(self, input_dict, source_patterns, target_patterns, **kwargs):  # type: ignore[override]
        # What an operation before this one has consumed is not there. Popped, so that matrices are freed with this call.
        halves = [input_dict.pop(pattern) for pattern in source_patterns if pattern in input_dict]
        matrices = [matrix for expert in zip(*halves, strict=True) for matrix in expert]
        return {target_patterns[0]: torch.cat(matrices).unflatten(0, (len(halves[0]), -1))}

    @property
    def reverse_op(self) -> ConversionOps:
        return SplitExperts()


class SplitExperts(ConversionOps):
    """The inverse of `FuseExperts`: what `save_pretrained` does where `official_state_dict` cannot."""

    @torch.no_grad()
    def convert(self, input_dict, source_patterns, target_patterns, **kwargs):
        (fused,) = input_dict.values()
        fused = fused[0] if isinstance(fused, list) else fused
        split = {}
        for pattern, half in zip(target_patterns, fused.chunk(len(target_patterns), dim=1)):
            # One storage for each half, as down_proj has one: sharding by size goes by storages.
            for expert, matrix in enumerate(half.contiguous().unbind(0)):
                split[pattern.replace("*", str(expert))] = matrix
        return split

    @property
    def reverse_op(self) -> ConversionOps:
        return FuseExperts()


def register_weight_conversion() -> None:
    """Teach Transformers' loader the official layout. Idempotent: this module may be imported under several names."""
    gate, up, down = (f".experts.*.{name}.weight" for name in ("w1", "w3", "w2"))
    register_checkpoint_conversion_mapping(
        GrinMoeConfig.model_type,
        [
            WeightConverter([gate, up], ".experts.gate_up_proj", [FuseExperts()]),
            WeightConverter([down], ".experts.down_proj", [MergeModulelist(dim=0)]),
        ],
        overwrite=True,
    )


def official_state_dict(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state dict in the official layout, without a copy: every expert matrix is an alias of its fused weight.

    (Transformers' own reverse conversion copies all experts at once: peak memory 1.6x of the model.)

    Args:
        state_dict: fused weights, as `model.state_dict()` gives them; other entries pass through.

    Returns:
        A new dict, in the official order of keys.
    """
    official = {}
    for key, tensor in state_dict.items():
        prefix, _, name = key.rpartition(".")
        if not prefix.endswith(".experts") or name not in ("gate_up_proj", "down_proj"):
            official[key] = tensor
            continue
        matrices = [on_disk for on_disk in ON_DISK if ON_DISK[on_disk][0] == name]
        for expert, fused in enumerate(tensor.detach().unbind(0)):
            for on_disk, matrix in zip(matrices, fused.chunk(len(matrices))):
                # Through DLPack the alias gets a storage of its own, which is what sharding by size goes by.
                official[f"{prefix}.{expert}.{on_disk}.weight"] = torch.from_dlpack(matrix)
    return official


def can_alias(state_dict: dict[str, torch.Tensor]) -> bool:
    """Whether `official_state_dict` applies: not to sharded (DTensor), offloaded (meta) or quantized weights."""
    plain = (torch.Tensor, torch.nn.Parameter)
    return all(type(tensor) in plain and not tensor.is_meta for tensor in state_dict.values())


def official_shapes(config: GrinMoeConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of an official checkpoint, by its key."""
    hidden, width, head = config.hidden_size, config.intermediate_size, config.head_size
    heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads, "v": config.num_key_value_heads}
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for layer in range(config.num_hidden_layers):
        base = f"model.layers.{layer}"
        for name, count in heads.items():
            shapes[f"{base}.self_attn.{name}_proj.weight"] = (count * head, hidden)
            if config.attention_bias:
                shapes[f"{base}.self_attn.{name}_proj.bias"] = (count * head,)
        shapes[f"{base}.self_attn.o_proj.weight"] = (hidden, config.num_attention_heads * head)
        if config.attention_bias:
            shapes[f"{base}.self_attn.o_proj.bias"] = (hidden,)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes |= _norm_shapes(f"{base}.{norm}", config)
        shapes[f"{base}.block_sparse_moe.gate.weight"] = (config.num_local_experts, hidden)
        for expert in range(config.num_local_experts):
            experts = f"{base}.block_sparse_moe.experts.{expert}"
            shapes |= {f"{experts}.w1.weight": (width, hidden), f"{experts}.w3.weight": (width, hidden)}
            shapes[f"{experts}.w2.weight"] = (hidden, width)
    shapes |= _norm_shapes("model.norm", config)
    shapes["lm_head.weight"] = (config.vocab_size, hidden)
    if config.lm_head_bias:
        shapes["lm_head.bias"] = (config.vocab_size,)
    return shapes


def _norm_shapes(name: str, config: GrinMoeConfig) -> dict[str, tuple[int, ...]]:
    parts = ("weight",) if config.norm_type == "rms_norm" else ("weight", "bias")
    return {f"{name}.{part}": (config.hidden_size,) for part in parts}


def fused_shapes(config: GrinMoeConfig) -> dict[str, tuple[int, ...]]:
    """Our own names of the experts' weights, which load as well (save_pretrained(save_original_format=False))."""
    num_experts, hidden, width = config.num_local_experts, config.hidden_size, config.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(config.num_hidden_layers):
        experts = f"model.layers.{layer}.block_sparse_moe.experts"
        shapes[f"{experts}.gate_up_proj"] = (num_experts, 2 * width, hidden)
        shapes[f"{experts}.down_proj"] = (num_experts, hidden, width)
    return shapes


def fused_name(key: str) -> str:
    """The fused weight that an official expert key is a part of; other keys as they are."""
    prefix, separator, rest = key.partition(".experts.")
    on_disk = rest.split(".")[1] if separator and "." in rest else ""
    return f"{prefix}.experts.{ON_DISK[on_disk][0]}" if on_disk in ON_DISK else key


def stale_weights(present: Iterable[str], entering: Collection[str]) -> list[str]:
    """
    Weight files of a checkpoint that a new one leaves behind, because it has another number of shards.

    Left where they are, they may be loaded in place of the new ones: Transformers prefers model.safetensors to an index.

    Args:
        present: names of the files that are there, in a folder or a repository.
        entering: names of the new checkpoint's files.

    Returns:
        Those of `present` that are weights of the same variant and not among `entering`; none if no weights enter.
    """
    weights = next((name for name in entering if name.endswith(".safetensors")), None)
    if weights is None:
        return []
    # "model", or "model.fp16" for a variant; the index of that is model.safetensors.index.fp16.json.
    stem = re.sub(r"(-\d{5}-of-\d{5})?\.safetensors$", "", weights)
    name, _, variant = stem.partition(".")
    index = f"{name}.safetensors.index{'.' + variant if variant else ''}.json"
    ours = re.compile(rf"{re.escape(stem)}(-\d{{5}}-of-\d{{5}})?\.safetensors|{re.escape(index)}")
    return sorted(file for file in present if ours.fullmatch(file) and file not in entering)


__all__ = [
    "can_alias",
    "fused_name",
    "fused_shapes",
    "official_shapes",
    "official_state_dict",
    "register_weight_conversion",
    "stale_weights",
]
