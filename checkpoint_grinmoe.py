"""GRIN-MoE checkpoints: the released layout, checks before reading, and saving that replaces only what is whole.

On disk every expert has its own w1, w3 and w2, in sharded safetensors; in memory the experts of a layer are fused, and
Transformers' weight conversion fuses them while it loads. docs/checkpoint.md has the whole list of keys.

Shapes: E experts, H hidden size, I expert width.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any, cast

import torch
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError, safe_open
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import ConversionOps, MergeModulelist, WeightConverter
from transformers.utils import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_SAFE_WEIGHTS_NAME,
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    cached_file,
)
from transformers.utils.peft_utils import find_adapter_config_file

from .configuration_grinmoe import _FIELDS, AUTO_MAP, GrinMoeConfig, read_json_object
from .generation_grinmoe import check_generation_config
from .quantization_grinmoe import (
    FUSED,
    check_agreement,
    check_method,
    dense_shape,
    experts_are_quantized,
    packed_layout,
)

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

# On-disk name -> (fused parameter, position of its rows in there).
ON_DISK = {"w1": ("gate_up_proj", 0), "w3": ("gate_up_proj", 1), "w2": ("down_proj", 0)}
# Of the shards that save_pretrained(distributed_checkpoint=True) writes; Transformers prefers them to all other weights.
_DISTRIBUTED = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
# Names that safetensors has for dtypes. Each holds its values; integers, bools, 8-bit floats and complex numbers would be
# cast without their scales or their imaginary parts.
FLOATS = ("F64", "F32", "F16", "BF16")
# Of one file: 130,000 tensors. safetensors itself takes up to 100 MB, of which Python would make gigabytes.
_MAX_HEADER_BYTES = 16 * 2**20
_DTYPE_NAMES = {torch.uint8: "U8", torch.int8: "I8", torch.float32: "F32", torch.float64: "F64"}
_DTYPE_NAMES |= {torch.int32: "I32", torch.float16: "F16", torch.bfloat16: "BF16"}


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
    hidden, width = config.hidden_size, config.intermediate_size
    queries, keys = (
        (heads * config.head_size, hidden) for heads in (config.num_attention_heads, config.num_key_value_heads)
    )
    linears = {"q": queries, "k": keys, "v": keys, "o": queries[::-1]}
    norm = ("weight",) if config.norm_type == "rms_norm" else ("weight", "bias")
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for layer in range(config.num_hidden_layers):
        base = f"model.layers.{layer}"
        for name, shape in linears.items():
            shapes[f"{base}.self_attn.{name}_proj.weight"] = shape
            if config.attention_bias:
                shapes[f"{base}.self_attn.{name}_proj.bias"] = shape[:1]
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes |= {f"{base}.{name}.{part}": (hidden,) for part in norm}
        shapes[f"{base}.block_sparse_moe.gate.weight"] = (config.num_local_experts, hidden)
        for expert in range(config.num_local_experts):
            experts = f"{base}.block_sparse_moe.experts.{expert}"
            shapes |= {f"{experts}.w1.weight": (width, hidden), f"{experts}.w3.weight": (width, hidden)}
            shapes[f"{experts}.w2.weight"] = (hidden, width)
    shapes |= {f"model.norm.{part}": (hidden,) for part in norm}
    shapes["lm_head.weight"] = (config.vocab_size, hidden)
    if config.lm_head_bias:
        shapes["lm_head.bias"] = (config.vocab_size,)
    return shapes


def fused_shapes(config: GrinMoeConfig) -> dict[str, tuple[int, ...]]:
    """Our own names of the experts' weights, which load as well (save_pretrained(save_original_format=False))."""
    layers = [f"model.layers.{layer}.block_sparse_moe.experts" for layer in range(config.num_hidden_layers)]
    return {f"{experts}.{name}": dense_shape(config, name) for experts in layers for name in FUSED}


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
    found = (file for file in present if ours.fullmatch(file) or (not variant and _DISTRIBUTED.fullmatch(file)))
    return sorted(file for file in found if file not in entering)


def load_per_expert_weights(
    module, state_dict, prefix, local_metadata, strict, missing, unexpected, error_msgs
) -> None:
    """`load_state_dict` pre-hook: take per-expert (w1, w3, w2) keys, also when they are spread over several calls.

    The Trainer resumes and reloads its best model by plain `load_state_dict(strict=False)`, shard by shard, on the keys
    that `save_pretrained` wrote. Without this the trained experts would be dropped there without an error.
    """
    for name, rows in {"gate_up_proj": module.intermediate_dim, "down_proj": module.hidden_dim}.items():
        matrices = [(one, position) for one, (fused, position) in ON_DISK.items() if fused == name]
        places = {
            f"{prefix}{expert}.{one}.weight": (expert, slice(position * rows, (position + 1) * rows))
            for expert in range(module.num_experts)
            for one, position in matrices
        }
        found = {key: state_dict.pop(key) for key in places if key in state_dict}
        if not found:
            continue
        if prefix + name in state_dict:
            error_msgs.append(f"{prefix}{name} is there twice, fused and by single experts; keep one of them")
            continue
        fused = parameter = getattr(module, name).detach()
        if parameter.is_meta:
            # It has no memory to fill; load_state_dict(assign=True) puts this tensor in its place.
            fused = torch.zeros_like(parameter, device=next(iter(found.values())).device)
        loaded = 0
        for key, weight in found.items():
            target = fused[places[key]]
            if not target.is_floating_point():
                error_msgs.append(
                    f"{key} is full precision, and these experts are quantised; load it by from_pretrained(..., "
                    "quantization_config=...)"
                )
            elif weight.shape != target.shape:
                error_msgs.append(
                    f"size mismatch for {key}: the checkpoint has {tuple(weight.shape)}, the model {tuple(target.shape)}"
                )
            else:
                target.copy_(weight)
                loaded += 1
        if loaded == len(places):
            state_dict[prefix + name] = fused
        elif parameter.is_meta:
            error_msgs.append(
                f"{prefix}{name}: {loaded} of {len(places)} expert matrices cannot fill a parameter on the meta device; "
                "give all of them at once, or materialise the model first (model.to_empty)"
            )
        # Otherwise they are in place, and load_state_dict(strict=True) reports the parameter as missing.


class CheckpointError(ValueError, RuntimeError):
    """A checkpoint that cannot be used: unreadable, incomplete, or not of this model.

    A RuntimeError as well, because that is what Transformers raises for tensors that do not fit.
    """


class CheckpointFileError(CheckpointError, OSError):
    """A file of the checkpoint is missing, truncated or of a refused kind. An OSError, as in Transformers."""


@dataclass(frozen=True)
class StoredTensor:
    """Where a checkpoint has a tensor, and its form.

    Attributes:
        file: the shard.
        shape: of the tensor.
        dtype: as safetensors names it ("BF16").
        value: the tensor itself, where a state dict and no file has it.
    """

    file: Path
    shape: tuple[int, ...]
    dtype: str
    value: torch.Tensor | None = None

    @classmethod
    def of_value(cls, value: torch.Tensor) -> StoredTensor:
        dtype = _DTYPE_NAMES.get(value.dtype, str(value.dtype))
        return cls(Path("state_dict"), tuple(value.shape), dtype, value)

    def read(self, key: str) -> torch.Tensor:
        if self.value is not None:
            return self.value
        with safe_open(self.file, framework="pt") as shard:
            return shard.get_tensor(key)


def read_index(file: Path) -> dict[str, str]:
    """Read which shard holds each key.

    Raises:
        CheckpointFileError: not JSON (see `read_json_object`), as a part of a file.
        CheckpointError: an index that Transformers cannot read, or that leads out of its folder.
    """
    error_class: type[CheckpointError] = CheckpointFileError
    try:
        index = read_json_object(file, remedy="it has no weight_map that names tensors")
        error_class = CheckpointError  # it is whole
        if not isinstance(weight_map := index.get("weight_map"), dict) or not weight_map:
            raise ValueError("it has no weight_map that names tensors")
        if not isinstance(index.get("metadata"), dict):
            raise ValueError('it has no "metadata" object, which Transformers needs; add "metadata": {}')
        # One key for each shard, whose path is looked up on the disk.
        for key, shard in {repr(shard): (key, shard) for key, shard in weight_map.items()}.values():
            path = PureWindowsPath(str(shard))  # which takes both separators
            is_inside = isinstance(shard, str) and shard.isprintable() and not path.anchor and ".." not in path.parts
            # The file itself may be a link, as in the Hub's cache; a folder in between may not lead out.
            is_inside = is_inside and path.suffix == ".safetensors"
            if not (is_inside and _is_below(file.parent, (file.parent / shard).parent)):
                place = repr(shard)[:200]
                raise ValueError(f"it places {key[:200]} in {place}, which is not a safetensors file of its folder")
        return weight_map
    except ValueError as error:
        raise error_class(f"{file} is not a safetensors index ({error}); download it again") from error


def _is_below(folder: Path, place: Path) -> bool:
    try:
        return place.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError):  # a link to itself, a name that is too long
        return False


def _with_variant(name: str, variant: str | None) -> str:
    stem, _, ending = name.rpartition(".")
    return f"{stem}.{variant}.{ending}" if variant else name


def read_tensors(folder: str | os.PathLike, variant: str | None = None) -> dict[str, StoredTensor] | None:
    """
    Find all tensors of a local checkpoint by the shards' headers. Every reader of weights asks this function first.

    Transformers opens the files that an index names and takes whatever they hold, so that the order of the files decides
    between two copies of a tensor. Here each tensor has one place, or the checkpoint is refused.

    Args:
        folder: holds model.safetensors, or model.safetensors.index.json and its shards.
        variant: as in `from_pretrained`: "fp16" for model.fp16.safetensors.

    Returns:
        Place and form by key, or None if the folder holds no such weights at all.

    Raises:
        CheckpointFileError: only pickled weights are there; the index is cut off or names a missing file; a shard is
            truncated or not safetensors; a shard lacks a tensor that the index promises.
        CheckpointError: there are two sets of weights, or an adapter beside them, a shard holds a tensor that the index does
            not place in it, or the index cannot be used (see `read_index`).
    """
    folder = Path(folder)
    index_file = folder / _with_variant(SAFE_WEIGHTS_INDEX_NAME, variant)
    single_file = folder / _with_variant(SAFE_WEIGHTS_NAME, variant)
    sets = [file for file in (single_file, index_file) if file.is_file()]
    if not sets:
        if pickles := sorted(path.name for path in folder.glob("pytorch_model*.bin*")):
            raise CheckpointFileError(
                f"{folder} holds only pickled weights ({pickles[0]}), which can run code when they are loaded and are "
                "refused; convert them to safetensors first (safetensors.torch.save_file)"
            )
        return None
    if (folder / ADAPTER_CONFIG_NAME).is_file():
        raise CheckpointError(
            f"{folder} holds a model and an adapter ({ADAPTER_CONFIG_NAME}), which Transformers would load on top of it, or "
            "on its own base silently; move the adapter to a folder of its own, and load it with model.load_adapter"
        )
    sets += sorted(path for path in folder.iterdir() if _DISTRIBUTED.fullmatch(path.name))
    weight_map = read_index(index_file) if index_file in sets else {}
    if len(sets) > 1 and not (len(sets) == 2 and set(weight_map.values()) == {single_file.name}):
        raise CheckpointError(
            f"{folder} holds two sets of weights ({sets[0].name} and {sets[1].name}), and Transformers takes one without a "
            "word; remove the one that is out of date"
        )
    tensors: dict[str, StoredTensor] = {}
    shards: dict[str, set[str]] = {}
    for key, shard in weight_map.items():
        shards.setdefault(shard, set()).add(key)
    for shard, promised in sorted(shards.items()):
        if not (folder / shard).is_file():
            raise CheckpointFileError(
                f"{index_file} places {len(promised)} tensors in {shard}, which is not there; download that shard again"
            )
        header = read_header(folder / shard)
        if absent := promised - header.keys():
            raise CheckpointFileError(
                f"{folder / shard} lacks {len(absent)} tensors that the index promises, {min(absent)} for one; the "
                "shard and the index are of different checkpoints: download both again"
            )
        if extra := header.keys() - promised:
            place = weight_map.get(min(extra), "no file")
            raise CheckpointError(
                f"{folder / shard} holds {len(extra)} tensors that the index does not name there: it places {min(extra)} "
                f"in {place}. Which copy is loaded depends on the order of the files; remove the stale ones from the "
                "shard, or download index and shards again"
            )
        tensors |= header
    return tensors if weight_map else read_header(single_file)


def check_weights(
    tensors: Mapping[str, StoredTensor],
    config: GrinMoeConfig,
    folder: str | os.PathLike,
    head_keys: tuple[str, ...] = (),
    only_dtypes: bool = False,
) -> None:
    """
    Hold a checkpoint's tensors against the config: first its sizes, before anything is listed.

    Args:
        tensors: by key, from `read_tensors`. Keys of a headless model may lack the `model.` prefix.
        config: what the checkpoint claims to be; its `quantization_config` says whether its experts are packed.
        folder: for the message.
        head_keys: prefixes of further heads, of whose tensors only the dtype is checked.
        only_dtypes: leave keys and shapes to the caller.

    Raises:
        CheckpointError: a config that needs far more weights than there are, an unknown key, two keys of one weight, a
            tensor of the wrong shape or dtype, a weight of the network that is not there, or a head that differs from the
            embedding it is tied to.
        ValueError: the config names weights of another file, or a quantisation method other than bitsandbytes.
    """
    _check_config(config)
    _check_size(tensors, config, folder)
    quantization_config = getattr(config, "quantization_config", None)
    official = official_shapes(config)
    expected = official | fused_shapes(config)
    packed: Mapping[str, Any] = {}
    if quantization_config is not None:
        linears = {key.removesuffix(".weight"): shape for key, shape in official.items() if "_proj.weight" in key}
        packed = packed_layout(config, quantization_config, linears)
        # Skipped experts are in there in full precision, under their fused names.
        official = {key: shape for key, shape in expected.items() if key not in official or fused_name(key) == key}
        official |= {key: shape for key, (shape, _) in packed.items()}
        expected = official
    dtypes = {key: _DTYPE_NAMES[dtype] for key, (_, dtype) in packed.items()}
    keys: dict[str, str] = {}
    for key, tensor in tensors.items():
        name = key if key.startswith(("model.", "lm_head.", *head_keys)) else f"model.{key}"
        is_head = key.startswith(head_keys) and name not in expected
        if name in expected and not only_dtypes:
            if name in keys:
                raise CheckpointError(
                    f"{folder} holds {key} and {keys[name]}, two copies of one weight; remove a stale one"
                )
            keys[name] = key
            if tensor.shape != expected[name] and ".quant_state." not in name:  # a text, whose length varies
                raise CheckpointError(
                    f"{folder} holds {key} with shape {tensor.shape}, config.json makes it {expected[name]}; use the config "
                    "that the weights were saved with, or pass ignore_mismatched_sizes=True to initialise it anew"
                )
        elif not (is_head or only_dtypes or name.removesuffix("_format") in packed):  # a constant of bitsandbytes'
            raise CheckpointError(
                f"{folder} holds {key}, which is no weight of this config (num_hidden_layers={config.num_hidden_layers}, "
                f"num_local_experts={config.num_local_experts}, attention_bias={config.attention_bias}, "
                f"lm_head_bias={config.lm_head_bias}); the shards and config.json do not belong together"
            )
        if (is_head or name in expected) and tensor.dtype not in ([dtypes[name]] if name in dtypes else FLOATS):
            raise CheckpointError(
                f"{folder} holds {key} as {tensor.dtype}, where {dtypes.get(name, 'F32, F16 or BF16')} belongs; "
                "convert it, or use the config.json that the weights were saved with, with its quantization_config"
            )
    if only_dtypes:
        return
    bare = [key for name, key in keys.items() if name != key]
    whole = [key for key in keys.values() if key.startswith("model.")]
    if bare and whole:
        raise CheckpointError(
            f'{folder} holds {bare[0]} without the prefix "model." and {whole[0]} with it; Transformers sorts experts by '
            "their whole keys, so that they would change places; give all keys the prefix, or none"
        )
    if both := {fused_name(name) for name in keys if fused_name(name) != name} & keys.keys():
        raise CheckpointError(
            f"{folder} holds {min(both)} and the matrices of single experts that it is made of; remove the stale ones"
        )
    missing = [name for name in official if name not in keys and fused_name(name) not in keys]
    if message := describe_missing(missing, head_prefixes=("lm_head.", *head_keys)):
        raise CheckpointError(f"{folder}: {message}")
    head, embedding = keys.get("lm_head.weight"), keys.get("model.embed_tokens.weight")
    tied = [tensors[key].read(key) for key in (head, embedding) if key and config.tie_word_embeddings]
    if len(tied) == 2 and not torch.equal(*tied):
        raise CheckpointError(
            f"{folder} holds another {head} than {embedding}, and config.json ties them (tie_word_embeddings=True); set it "
            "to False to use both, or remove the head"
        )


def check_folder(folder: str | os.PathLike, config: GrinMoeConfig) -> None:
    """`check_weights` for the weights of a folder, if it holds any: before a model is made of its config."""
    if tensors := read_tensors(folder):
        check_weights(tensors, config, folder, head_keys=("score.",))


def _check_size(tensors: Mapping[str, StoredTensor], config: GrinMoeConfig, folder: str | os.PathLike) -> None:
    """
    Raise CheckpointError where a config's sizes are out of all proportion to what the headers hold.

    What is built, filled or listed for a config is bounded by the weights that are really there: four times their number
    (two 4-bit codes are one stored byte), and 2**28, the size of a new head or of new embeddings, for a caller who takes a
    model that differs from its checkpoint.
    """
    hidden, stored = config.hidden_size, sum(math.prod(tensor.shape) for tensor in tensors.values())
    heads = 2 * (config.num_attention_heads + config.num_key_value_heads) * config.head_size
    experts = config.num_local_experts * (3 * config.intermediate_size + 1)
    needed = hidden * (config.num_hidden_layers * (heads + experts) + config.vocab_size + (config.num_labels or 0))
    # A layer has one tensor at the least.
    if needed > 4 * stored + 2**28 or config.num_hidden_layers > len(tensors):
        names = "num_hidden_layers hidden_size num_attention_heads intermediate_size num_local_experts vocab_size num_labels"
        sizes = ", ".join(f"{name}={getattr(config, name)}" for name in names.split())
        raise CheckpointError(
            f"{folder} holds {stored:,} weights in {len(tensors):,} tensors, and config.json makes them {needed:,} "
            f"({sizes}); use the config that the weights were saved with"
        )


def _check_config(config: PreTrainedConfig, asked: Any = None) -> None:
    """Raise ValueError for a config whose weights this file cannot check: in another file, or of another method.

    And for one that says quantised in another form than `asked`, the `quantization_config` of `from_pretrained`.
    """
    if (other := getattr(config, "transformers_weights", None)) is not None:
        raise ValueError(
            f"the config names {other!r} as transformers_weights, a file that only Transformers' loader reads; rename the "
            f"weights to {SAFE_WEIGHTS_NAME} and remove the entry"
        )
    stored = getattr(config, "quantization_config", None)
    check_method(stored)
    if asked is not None and stored is not None:
        check_agreement(asked, stored)


def gather_sharded_weights(model: Any) -> dict[str, Any] | None:
    """
    All weights of a model that `torch.distributed.fsdp.fully_shard` has sharded, on the CPU of rank 0; collective.

    Returns:
        The full state dict on rank 0, an empty one elsewhere; None for a model that is not sharded, or whose sharding is
        the library's own (a `distributed_config`), which it gathers itself.
    """
    if not any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        return None
    if getattr(model.config, "distributed_config", None) is not None:
        return None
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


# The remote code of every checkpoint. A list, because the folder that this file is in may hold more: Transformers' cache of
# remote code keeps the files of a former version.
CODE_FILES = tuple(
    f"{name}_grinmoe.py"
    for name in ("balance", "checkpoint", "configuration", "generation", "modeling", "quantization", "routing")
)


def code_files() -> list[Path]:
    """The flat remote-code files beside this one, which travel with every checkpoint."""
    return [Path(__file__).parent / name for name in CODE_FILES]


def add_remote_code(folder: str | os.PathLike) -> None:
    """Put the flat code into a checkpoint folder and point its config.json at it for every auto class."""
    folder = Path(folder)
    for file in code_files():
        shutil.copyfile(file, folder / file.name)
    config_file = folder / CONFIG_NAME
    content = read_json_object(config_file)
    content["auto_map"] = AUTO_MAP
    config_file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def refuse_checkout(folder: str | os.PathLike) -> None:
    """Raise ValueError if `folder` is where this code lives: a checkpoint would overwrite or mix with the sources."""
    if Path(folder).resolve() == Path(__file__).resolve().parent:
        raise ValueError(
            f"save_directory={os.fspath(folder)!r} is the folder of the model's source code; save to a folder of its own"
        )


# Without one of these a folder does not load. So they leave first and come last, and a process that is killed in between
# leaves no mixture of two checkpoints that would load.
_KEYSTONES = (CONFIG_NAME, ADAPTER_CONFIG_NAME)
WORKSPACE = ".saving-"
_OWNED = "grinmoe-workspace"


class Workspace:
    """A private folder of this process beside the place where its content goes.

    Its name is random, so nobody can have put a link there. It holds a file that stays locked while the process lives.
    A folder with that file and no lock belonged to a killed process. Nothing else counts as ours, whatever its name.

    Attributes:
        path: the folder.
        new: an empty folder in it, for what is written.
        previous: an empty folder in it, for what is replaced.
        purpose: what it was made for.
    """

    def __init__(self, path: Path, purpose: str, lock: int | None):
        self.path, self.purpose, self._lock = path, purpose, lock
        self.new, self.previous = path / "new", path / "previous"

    @classmethod
    def make(cls, parent: Path, prefix: str, purpose: str = "") -> Workspace:
        """Make one in `parent`, under a name that begins with `prefix`."""
        path, lock = Path(tempfile.mkdtemp(prefix=prefix, dir=parent)), None
        if fcntl is not None:  # elsewhere a workspace of a killed process stays
            # Locked before it has its name: nobody can take it for one of a killed process in between.
            lock = os.open(path / "making", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            os.write(lock, purpose.encode())
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.rename(path / "making", path / _OWNED)
        for folder in (path / "new", path / "previous"):
            folder.mkdir()
        return cls(path, purpose, lock)

    @classmethod
    def left_in(cls, parent: Path, prefix: str) -> Iterator[Workspace]:
        """Take over the workspaces that killed processes of this user have left in `parent`, one after the other."""
        names: list[str] = []
        with contextlib.suppress(OSError):  # a folder that cannot be listed
            names = sorted(os.listdir(parent)) if fcntl is not None else []
        # mkdtemp adds 8 characters: .a-b-12345678 is not of .a-
        for path in (parent / n for n in names if n.startswith(prefix) and len(n) == len(prefix) + 8):
            try:
                lock = os.open(path / _OWNED, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
            except OSError:
                continue
            with contextlib.suppress(OSError, UnicodeDecodeError):  # locked by a process that lives, or not ours
                folder, marker = os.lstat(path), os.fstat(lock)
                is_ours = folder.st_uid == marker.st_uid == os.geteuid()
                if is_ours and stat.S_ISDIR(folder.st_mode) and stat.S_ISREG(marker.st_mode):
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    yield cls(path, os.pread(lock, 4096, 0).decode(), lock)
                    continue
            os.close(lock)

    def holds_replaced_files(self) -> bool:
        """Whether there is anything in `previous`: perhaps the only copy of what was to be replaced."""
        if self.previous.is_symlink():
            return False
        return any(not path.is_dir() or path.is_symlink() for path in self.previous.rglob("*"))

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        self.close()

    def close(self) -> None:
        """Leave the folder to a later process."""
        if self._lock is not None:
            os.close(self._lock)
        self._lock = None


@contextlib.contextmanager
def replaced_when_whole(folder: str | os.PathLike) -> Iterator[Path]:
    """Write a checkpoint beside its final place; move it there only when all of it has been written.

    Yields an empty temporary folder inside `folder` (the same file system, so that moving is a rename). If the body or a
    move raises (a full disk, say), `folder` stays, or becomes again, what it was. Files of the new checkpoint replace
    their namesakes, shards of the previous one that are not among them are removed, other files stay. If the process is
    killed while files are moved, or a move can neither be done nor undone, what was moved aside is in the hidden folder
    `.saving-*`, and `folder` does not load; the next save that succeeds removes that. New files are on the disk before
    an old one leaves.

    Raises:
        ValueError: `folder` is a file or a link that leads nowhere, or its name is empty; or something in it that is
            not a file has the name of a new file.
    """
    if not os.fspath(folder):
        raise ValueError("save_directory is empty; give a folder ('.' is the current one)")
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"save_directory={os.fspath(folder)!r} is a file; give a folder")
    if folder.is_symlink() and not folder.exists():
        raise ValueError(f"save_directory={os.fspath(folder)!r} is a link that leads nowhere; give a folder")
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for left in Workspace.left_in(folder, WORKSPACE):
        left.close() if left.holds_replaced_files() else left.remove()
    workspace = Workspace.make(folder, WORKSPACE)
    replaced = False
    try:
        yield workspace.new
        write_through(*workspace.new.rglob("*"), workspace.new)
        _move_in(workspace.new, folder, workspace.previous)
        replaced = True
        for left in Workspace.left_in(folder, WORKSPACE):
            left.remove()
    finally:
        # A move that could not be undone either has left the only copy of an old file here.
        if replaced or not workspace.holds_replaced_files():
            workspace.remove()
        workspace.close()
        with contextlib.suppress(OSError):  # up to the first one that holds something
            list(map(Path.rmdir, made))


def write_through(*paths: Path) -> None:
    """Have the disk hold these files, and the names in these folders: what is renamed then survives a loss of power."""
    for path in paths if os.name == "posix" else ():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _move_in(staging: Path, folder: Path, previous: Path) -> None:
    """Move all files of `staging` into `folder`, and what they replace to `previous`; undone if a move fails."""
    entering = [path.relative_to(staging) for path in staging.rglob("*") if path.is_file()]
    entering.sort(key=lambda path: path.name in _KEYSTONES)
    names = {path.name for path in entering}
    stale = [Path(name) for name in stale_weights((path.name for path in folder.iterdir()), names)]
    leaving = [path for path in entering if os.path.lexists(folder / path)] + stale
    leaving.sort(key=lambda path: path.name not in _KEYSTONES)
    for name in (*leaving, *{parent for path in entering for parent in list(path.parents)[:-1]}):
        # A link is replaced and never followed.
        found, kind = folder / name, "file" if name in leaving else "folder"
        fits = found.is_symlink() or found.is_file() if kind == "file" else found.is_dir() and not found.is_symlink()
        if os.path.lexists(found) and not fits:
            raise ValueError(f"{found} is not a {kind} and is in the way of a new one; move it elsewhere")
    moves = [(folder / path, previous / path) for path in leaving]
    moves += [(staging / path, folder / path) for path in entering]
    with contextlib.ExitStack() as undo:
        for source, target in moves:
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(source, target)
            undo.callback(os.replace, target, source)
        undo.pop_all()
    write_through(folder)


def read_header(file: Path) -> dict[str, StoredTensor]:
    """
    Read the form of each tensor of a safetensors file. No weight is read.

    Raises:
        CheckpointFileError: not a regular file, truncated, not safetensors, or a header of more than `_MAX_HEADER_BYTES`.
    """
    try:
        if not file.is_file():
            raise OSError("not a regular file")  # opening a FIFO would wait for a writer
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
        if length > _MAX_HEADER_BYTES:
            raise OSError(f"its header has {length:,} bytes, more than {_MAX_HEADER_BYTES:,}")
        with safe_open(file, framework="pt") as tensors:
            slices = {key: tensors.get_slice(key) for key in tensors.keys()}
            return {key: StoredTensor(file, tuple(one.get_shape()), one.get_dtype()) for key, one in slices.items()}
    except (SafetensorError, OSError) as error:
        size = file.stat().st_size if file.exists() else 0
        raise CheckpointFileError(
            f"{file} ({size} bytes) is truncated or not safetensors ({error}); download it again"
        ) from error


def describe_missing(missing_keys: Iterable[str], head_prefixes: tuple[str, ...]) -> str | None:
    """A message if weights of the network itself (not of a head) were not in the checkpoint, else None."""
    missing = [key for key in missing_keys if not key.startswith(head_prefixes)]
    if not missing:
        return None
    return (
        f"the checkpoint lacks {len(missing)} weights of the network, {', '.join(missing[:3])} first; they would start "
        "from random values. Complete the checkpoint, or pass output_loading_info=True to take the model as it is"
    )


def safetensors_only(kwargs: dict[str, Any]) -> dict[str, Any]:
    """`from_pretrained` arguments that require safetensors: pickled weights can run code and are refused."""
    if kwargs.get("use_safetensors") is False:
        raise ValueError("use_safetensors=False asks for pickled weights, which are refused; leave it out")
    return {**kwargs, "use_safetensors": True}


def _base_of_adapter(name: str | os.PathLike) -> str | os.PathLike:
    """
    The model whose weights the library loads: for an adapter's folder, the base that it names.

    Raises:
        CheckpointFileError: the adapter names none, or its weights are pickled, broken or not floats.
    """
    adapter = Path(name, ADAPTER_CONFIG_NAME)
    if not adapter.is_file() or Path(name, CONFIG_NAME).is_file():
        return name
    try:
        base = read_json_object(adapter)["base_model_name_or_path"]
        if not isinstance(base, (str, type(None))):
            raise ValueError(f"base_model_name_or_path={str(base)[:80]} is not a text")
    except (KeyError, ValueError) as error:
        raise CheckpointFileError(f"{adapter} does not name the adapter's base ({error}); save it again") from error
    for key, tensor in read_header(adapter.with_name(ADAPTER_SAFE_WEIGHTS_NAME)).items():
        if tensor.dtype not in FLOATS:
            raise CheckpointFileError(
                f"{tensor.file} holds {key} as {tensor.dtype}, where floats belong; save it again"
            )
    return base or name


def _fetched(repo_id: str, name: str, where: dict[str, Any]) -> Path | None:
    """A file of a repository, from the Hub or its cache; None where it is not to be had."""
    try:
        file = cached_file(repo_id, name, _raise_exceptions_for_missing_entries=False, **where)
    except OSError:
        return None
    return None if file is None else Path(file)


class OfficialCheckpointMixin:
    """`from_pretrained` and `save_pretrained` of the GRIN-MoE models; goes before `PreTrainedModel`."""

    # Weights of heads: a checkpoint may lack them (a new head starts fresh), the network's own it may not.
    _head_prefixes = ("lm_head.", "score.")

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Nothing to register: `save_pretrained` always writes the code files and the full `auto_map`.

        (The library's way copies the file of `type(model)`; once FSDP2 has wrapped the model that is a file of torch.)
        """

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *model_args,
        output_loading_info: bool = False,
        ignore_mismatched_sizes: bool = False,
        **kwargs,
    ):
        """
        As in Transformers, from a folder or a Hub id in the official layout, with these checks on top.

        A folder's shards are checked by their headers before anything is built or read, a repository's when they have been
        fetched. Only safetensors are loaded. A weight of the network that the checkpoint lacks is an error, a new head not.
        `output_loading_info=True` leaves keys and shapes to the caller, `ignore_mismatched_sizes=True` leaves shapes.

        Raises:
            CheckpointError: (a ValueError) missing or truncated shard, pickled weights, an index that cannot be used, two
                copies of a tensor, unknown or missing key, tensor that does not fit the config, an adapter beside the model.
            ValueError: config of another model_type, or a `quantization_config` of another method than bitsandbytes.
        """
        # The checks do not know GGUF files.
        name, check_tensors = pretrained_model_name_or_path, not (output_loading_info or ignore_mismatched_sizes)
        if kwargs.get("gguf_file") is None:
            check_method(kwargs.get("quantization_config"))
            if fields := [key for key in kwargs if key.startswith(("load_in_", "bnb_4bit_", "llm_int8_"))]:
                asked = ", ".join(f"{key}={kwargs[key]!r}" for key in fields)
                raise ValueError(f"{asked}: give quantization_config=BitsAndBytesConfig({asked}) instead")
            if name is not None:
                kwargs = safetensors_only(kwargs)
                base = _base_of_adapter(name)
                if not cls._check_folder(base, kwargs, check_tensors):
                    kwargs = cls._check_repository(str(base), kwargs, check_tensors)
            elif kwargs.get("config") is not None:
                _check_config(config := cls._read_config("", kwargs), kwargs.get("quantization_config"))
                if kwargs.get("state_dict") and check_tensors:
                    weights = kwargs["state_dict"]
                    # Or of objects that give one when the library reads them.
                    if not isinstance(weights, Mapping) or not all(
                        isinstance(getattr(one, "dtype", None), torch.dtype) for one in weights.values()
                    ):
                        raise CheckpointError("state_dict holds something else than tensors; give those of a model")
                    tensors = {key: StoredTensor.of_value(value) for key, value in weights.items()}
                    check_weights(tensors, config, "state_dict", head_keys=("score.",))
        options = {"output_loading_info": True, "ignore_mismatched_sizes": ignore_mismatched_sizes, **kwargs}
        with experts_are_quantized():
            model, loading_info = super().from_pretrained(name, *model_args, **options)
        if output_loading_info:
            return model, loading_info
        # An empty state dict asks for new weights, which Transformers' own tests do.
        message = describe_missing(loading_info["missing_keys"], cls._head_prefixes)
        if message and kwargs.get("state_dict") != {}:
            raise CheckpointError(f"{name}: {message}")
        return model

    @classmethod
    def _check_folder(cls, name: str | os.PathLike, kwargs: dict[str, Any], check_tensors: bool) -> bool:
        """Raise CheckpointError unless a folder's shards are whole and, if asked, those of its config. False: no folder."""
        folder = Path(name, kwargs.get("subfolder") or "")
        if not folder.is_dir():
            return False
        config = cls._read_config(name, kwargs)
        tensors = read_tensors(folder, kwargs.get("variant"))
        _check_config(config, kwargs.get("quantization_config"))
        check_generation_config(folder / GENERATION_CONFIG_NAME)
        if tensors:
            check_weights(tensors, config, folder, head_keys=("score.",), only_dtypes=not check_tensors)
        return True

    @classmethod
    def _read_config(cls, name: str | os.PathLike, kwargs: dict[str, Any]) -> GrinMoeConfig:
        """The config that the library goes on with: that of `kwargs`, or the checkpoint's, with the fields in `kwargs`."""
        if isinstance(given := kwargs.get("config"), PreTrainedConfig):
            if given.model_type != GrinMoeConfig.model_type:  # not by its class, which remote code has a second time
                remedy = "give a GrinMoeConfig (GrinMoeConfig.from_phimoe makes one of a PhimoeConfig)"
                raise ValueError(f"config has model_type={given.model_type!r}; {remedy}")
            return cast(GrinMoeConfig, given)
        source, where = given or name, {key: kwargs[key] for key in _DOWNLOAD_OPTIONS & kwargs.keys()}
        content, _ = cls.config_class.get_config_dict(source, **where)
        if not content:
            # The library would go on with the default config, that of the released model.
            folder = Path(source, kwargs.get("subfolder") or "")
            left = next(folder.glob(f"{WORKSPACE}*"), None)
            remedy = f"a save was interrupted, and its files are in {left}" if left else "give a checkpoint"
            raise CheckpointFileError(f"{folder} holds no {CONFIG_NAME}; {remedy}")
        return cls.config_class.from_dict(content, **{key: kwargs[key] for key in _FIELDS if key in kwargs})

    @classmethod
    def _check_repository(cls, repo_id: str, kwargs: dict[str, Any], check_tensors: bool) -> dict[str, Any]:
        """
        `_check_folder` for a repository, whose files are fetched for it: the small ones, which say whether the large ones
        are worth it, first. What is not there is left to the library.

        Returns:
            `kwargs` for the library, which need not fetch them once more.
        """
        where = {key: kwargs[key] for key in _DOWNLOAD_OPTIONS & kwargs.keys()}
        try:
            _check_config(cls._read_config(repo_id, kwargs), kwargs.get("quantization_config"))
        except CheckpointFileError:
            adapter = None if kwargs.get("adapter_kwargs") else find_adapter_config_file(repo_id, **where)
            if adapter is None:
                raise
            if _fetched(repo_id, ADAPTER_SAFE_WEIGHTS_NAME, where) is None:
                return kwargs
            base = str(_base_of_adapter(folder := Path(adapter).parent))
            if base not in (repo_id, str(folder)) and not cls._check_folder(base, kwargs, check_tensors):
                cls._check_repository(base, kwargs, check_tensors)
            return kwargs
        except OSError:
            return kwargs
        _fetched(repo_id, GENERATION_CONFIG_NAME, where)
        single = _fetched(repo_id, _with_variant(SAFE_WEIGHTS_NAME, kwargs.get("variant")), where)
        index = _fetched(repo_id, _with_variant(SAFE_WEIGHTS_INDEX_NAME, kwargs.get("variant")), where)
        for shard in sorted(set(read_index(index).values())) if index else ():
            if _fetched(repo_id, shard, where) is None:
                return kwargs
        if found := index or single:
            folder = found.parents[len(Path(kwargs.get("subfolder") or "").parts)]
            cls._check_folder(folder, kwargs, check_tensors)
        return {key: value for key, value in kwargs.items() if key != "force_download"}

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
        push_to_hub: bool = False,
        max_shard_size: int | str = "5GB",
        save_original_format: bool = True,
        **kwargs: Any,
    ) -> None:
        """
        Save in the official layout, with the flat code and a full `auto_map`, so that the folder loads on its own.

        Beyond Transformers: the folder's previous checkpoint is replaced only once the new one is completely written
        (a full disk leaves it whole), and no copy of the weights is made. With `push_to_hub=True` the folder's new files
        are uploaded when they are in place; `repo_id`, `private`, `token`, `commit_message`, `revision` and `create_pr` as
        in Transformers. Further arguments are passed on.

        A model that `fully_shard` has sharded is gathered to the first rank, so every rank must call this, with
        `is_main_process` as it is; where `state_dict` is given (as the Trainer does), nothing is gathered.

        Raises:
            ValueError: `save_directory` is the folder of this source code, or a file.
        """
        refuse_checkout(save_directory)
        if state_dict is None and not kwargs.get("distributed_checkpoint"):
            state_dict = gather_sharded_weights(self)
        kwargs |= {"is_main_process": is_main_process, "max_shard_size": max_shard_size}
        if not is_main_process or kwargs.get("distributed_checkpoint"):
            kwargs |= {"push_to_hub": push_to_hub, "save_original_format": save_original_format}
            super().save_pretrained(save_directory, state_dict=state_dict, **kwargs)
            return
        hub_options = {name: kwargs.pop(name) for name in _HUB_OPTIONS & kwargs.keys()} if push_to_hub else {}
        adapter_only = getattr(self, "_hf_peft_config_loaded", False)
        if not adapter_only:
            state_dict, save_original_format = self._weights_to_write(state_dict, save_original_format)
        with replaced_when_whole(save_directory) as staging:
            super().save_pretrained(staging, state_dict=state_dict, save_original_format=save_original_format, **kwargs)
            if not adapter_only:
                add_remote_code(staging)
            _make_readable(staging)
            written = _files_below(staging)
        if push_to_hub:
            # After the folder is whole, so that a failed upload costs no checkpoint.
            repo_id = hub_options.pop("repo_id", None) or Path(save_directory).resolve().name
            _upload(Path(save_directory), written, repo_id, self.model_tags or (), **hub_options)

    def _weights_to_write(
        self, state_dict: dict[str, torch.Tensor] | None, save_original_format: bool
    ) -> tuple[dict[str, torch.Tensor] | None, bool]:
        """The state dict to hand to the library (None: the model's own), and whether the library has to convert it."""
        if getattr(self, "hf_quantizer", None) is not None:
            return state_dict, False  # packed weights have no official layout
        if save_original_format:
            weights = self.state_dict() if state_dict is None else state_dict
            if can_alias(weights):
                return official_state_dict(weights), False
        return state_dict, save_original_format

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        max_shard_size: int | str = "5GB",
        tags: list[str] | str | None = None,
    ) -> CommitInfo:
        """
        Upload the model and its code; arguments as in Transformers.

        Beyond Transformers: the commit also deletes the shards of a former checkpoint that this one does not replace, which
        the library would load in place of the new ones; and a model card that is there stays as it is, so that tags go into
        a card that this call makes. `grinmoe push` publishes a whole folder, with tokenizer and card, and checks it before.
        """
        tags = [tags] if isinstance(tags, str) else tags or []
        options: dict[str, Any] = {"private": private, "token": token, "revision": revision, "create_pr": create_pr}
        options |= {"commit_message": commit_message, "commit_description": commit_description}
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, max_shard_size=max_shard_size, token=token)
            all_tags = [*(self.model_tags or ()), *tags]
            return _upload(Path(folder), _files_below(Path(folder)), repo_id, all_tags, **options)


def _files_below(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]


def _upload(
    folder: Path,
    files: list[str],
    repo_id: str,
    tags: Sequence[str] = (),
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str | None = None,
    commit_description: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> CommitInfo:
    """Upload `files` of `folder` in one commit, with a first model card, and delete what `stale_weights` names."""
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/pr/"):
        try:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        except HfHubHTTPError as error:
            # Without the right to make branches, a pull request can be against one that is there.
            if not (create_pr and error.response.status_code == 403):
                raise
    present = api.list_repo_files(repo_id, revision=revision)
    names = sorted(set(files) - {_CARD})
    operations: list[Any] = [CommitOperationAdd(name, str(folder / name)) for name in names]
    if _CARD not in present:
        card = folder / _CARD
        first = ModelCardData(tags=list(dict.fromkeys(tags)), library_name="transformers")
        content = card.read_bytes() if card.is_file() else str(ModelCard.from_template(first)).encode()
        operations.append(CommitOperationAdd(_CARD, content))
    operations += [CommitOperationDelete(name) for name in stale_weights(present, names)]
    how: dict[str, Any] = {"commit_description": commit_description, "revision": revision, "create_pr": create_pr}
    return api.create_commit(repo_id, operations, commit_message=commit_message or "Upload model", **how)


def _make_readable(folder: Path) -> None:
    """Give the weights the permissions of the other files: safetensors writes them for their owner alone."""
    config = next(folder.glob("*config.json"))
    for weights in folder.glob("*.safetensors"):
        weights.chmod(config.stat().st_mode)


_CARD = "README.md"
_DOWNLOAD_OPTIONS = {"cache_dir", "force_download", "revision", "token", "local_files_only", "proxies", "subfolder"}
_HUB_OPTIONS = {"repo_id", "private", "token", "commit_message", "revision", "create_pr"}
