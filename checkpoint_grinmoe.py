"""The GRIN-MoE checkpoint: official layout in and out, checked before it is read, replaced only when it is whole.

Official layout: sharded safetensors with one w1, w3 and w2 per expert. In memory they are fused (see
`experts_grinmoe.py`); Transformers' weight conversion fuses them while it loads. See docs/checkpoint.md.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from .configuration_grinmoe import AUTO_MAP, GrinMoeConfig
from .experts_grinmoe import ON_DISK


class CheckpointError(ValueError, RuntimeError):
    """A checkpoint that cannot be used: unreadable, incomplete, or not of this model.

    A RuntimeError as well, because that is what Transformers raises for tensors that do not fit.
    """


class CheckpointFileError(CheckpointError, OSError):
    """A file of the checkpoint is missing, truncated or of a refused kind. An OSError, as in Transformers."""


def register_weight_conversion() -> None:
    """Teach Transformers' loader the official layout. Idempotent: this module may be imported under several names."""
    gate, up, down = (f".experts.*.{name}.weight" for name in ("w1", "w3", "w2"))
    register_checkpoint_conversion_mapping(
        GrinMoeConfig.model_type,
        [
            WeightConverter([gate, up], ".experts.gate_up_proj", [MergeModulelist(dim=0), Concatenate(dim=1)]),
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
            shapes |= {f"{base}.{norm}.weight": (hidden,), f"{base}.{norm}.bias": (hidden,)}
        shapes[f"{base}.block_sparse_moe.gate.weight"] = (config.num_local_experts, hidden)
        for expert in range(config.num_local_experts):
            experts = f"{base}.block_sparse_moe.experts.{expert}"
            shapes |= {f"{experts}.w1.weight": (width, hidden), f"{experts}.w3.weight": (width, hidden)}
            shapes[f"{experts}.w2.weight"] = (hidden, width)
    shapes |= {
        "model.norm.weight": (hidden,),
        "model.norm.bias": (hidden,),
        "lm_head.weight": (config.vocab_size, hidden),
    }
    if config.lm_head_bias:
        shapes["lm_head.bias"] = (config.vocab_size,)
    return shapes


def read_shapes(folder: str | os.PathLike) -> dict[str, tuple[int, ...]] | None:
    """Shapes of all tensors of a local checkpoint, read from the shards' headers only.

    Args:
        folder: holds model.safetensors, or model.safetensors.index.json and its shards.

    Returns:
        Shape by key, or None if the folder holds no weights at all.

    Raises:
        CheckpointFileError: only pickled weights are there; the index names a missing file; a shard is truncated or not
            safetensors; a shard lacks a tensor that the index promises.
    """
    folder = Path(folder)
    index_file, single_file = folder / SAFE_WEIGHTS_INDEX_NAME, folder / SAFE_WEIGHTS_NAME
    if single_file.is_file():
        return _read_header(single_file)
    if not index_file.is_file():
        pickles = [name for name in (WEIGHTS_NAME, WEIGHTS_INDEX_NAME) if (folder / name).is_file()]
        if pickles:
            raise CheckpointFileError(
                f"{folder} holds only pickled weights ({pickles[0]}), which can run code when they are loaded and are "
                "refused; convert them to safetensors first (safetensors.torch.save_file)"
            )
        return None
    try:
        weight_map = json.loads(index_file.read_text(encoding="utf-8"))["weight_map"]
    except (json.JSONDecodeError, KeyError, UnicodeDecodeError) as error:
        raise CheckpointFileError(f"{index_file} is not a safetensors index ({error!r}); download it again") from error
    shapes: dict[str, tuple[int, ...]] = {}
    for shard in sorted(set(weight_map.values())):
        promised = {key for key, file in weight_map.items() if file == shard}
        if not (folder / shard).is_file():
            raise CheckpointFileError(
                f"{index_file} places {len(promised)} tensors in {shard}, which is not there; download that shard again"
            )
        header = _read_header(folder / shard)
        if absent := promised - header.keys():
            raise CheckpointFileError(
                f"{folder / shard} lacks {len(absent)} tensors that the index promises, {min(absent)} for one; the "
                "shard and the index are of different checkpoints: download both again"
            )
        shapes |= header
    return shapes


def check_shapes(
    shapes: dict[str, tuple[int, ...]],
    config: GrinMoeConfig,
    folder: str | os.PathLike,
    head_keys: tuple[str, ...] = (),
) -> None:
    """
    Hold a checkpoint's tensors against the config.

    Args:
        shapes: by key, from `read_shapes`. Keys of a headless model may lack the `model.` prefix.
        config: what the checkpoint claims to be.
        folder: for the message.
        head_keys: prefixes of further heads whose tensors are not checked.

    Raises:
        CheckpointError: an unknown key, or a tensor of the wrong shape.
    """
    expected = official_shapes(config)
    # Our own fused names load as well (save_pretrained(save_original_format=False)).
    num_experts, hidden, width = config.num_local_experts, config.hidden_size, config.intermediate_size
    for layer in range(config.num_hidden_layers):
        experts = f"model.layers.{layer}.block_sparse_moe.experts"
        expected[f"{experts}.gate_up_proj"] = (num_experts, 2 * width, hidden)
        expected[f"{experts}.down_proj"] = (num_experts, hidden, width)
    for key, shape in shapes.items():
        name = key if key in expected else f"model.{key}"
        if name not in expected:
            if key.startswith(head_keys):
                continue
            raise CheckpointError(
                f"{folder} holds {key}, which is no weight of this config (num_hidden_layers={config.num_hidden_layers}, "
                f"num_local_experts={config.num_local_experts}, attention_bias={config.attention_bias}, "
                f"lm_head_bias={config.lm_head_bias}); the shards and config.json do not belong together"
            )
        if shape != expected[name]:
            raise CheckpointError(
                f"{folder} holds {key} with shape {shape}, config.json makes it {expected[name]}; use the config that "
                "the weights were saved with, or pass ignore_mismatched_sizes=True to initialise it anew"
            )


def code_files() -> list[Path]:
    """The flat remote-code files beside this one, which travel with every checkpoint."""
    return sorted(Path(__file__).parent.glob("*_grinmoe.py"))


def add_remote_code(folder: str | os.PathLike) -> None:
    """Put the flat code into a checkpoint folder and point its config.json at it for every auto class."""
    folder = Path(folder)
    for file in code_files():
        shutil.copyfile(file, folder / file.name)
    config_file = folder / "config.json"
    content = json.loads(config_file.read_text(encoding="utf-8"))
    content["auto_map"] = AUTO_MAP
    config_file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def refuse_checkout(folder: str | os.PathLike) -> None:
    """Raise ValueError if `folder` is where this code lives: a checkpoint would overwrite or mix with the sources."""
    here = Path(__file__).resolve().parent
    if Path(folder).resolve() == here:
        raise ValueError(
            f"save_directory={os.fspath(folder)!r} is the folder of the model's source code; save to a folder of its own"
        )


@contextlib.contextmanager
def replaced_when_whole(folder: str | os.PathLike) -> Iterator[Path]:
    """Write a checkpoint beside its final place; move it there only when all of it has been written.

    Yields an empty temporary folder inside `folder` (the same file system, so that moving is a rename). If the body
    raises (a full disk, say), what was in `folder` stays as it was. Files of the new checkpoint replace their
    namesakes, shards of the previous one that are not among them are removed, other files stay.
    """
    folder = Path(folder)
    if folder.is_file():
        raise ValueError(f"save_directory={os.fspath(folder)!r} is a file; give a folder")
    folder.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".saving-", dir=folder))
    try:
        yield staging
        written = sorted(path.relative_to(staging) for path in staging.rglob("*") if path.is_file())
        # The index goes last: until then it names the previous shards.
        for path in sorted(written, key=lambda path: path.name.endswith(".index.json")):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            os.replace(staging / path, folder / path)
        if any(path.suffix == ".safetensors" for path in written):
            _remove_stale_weights(folder, {path.name for path in written})
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _remove_stale_weights(folder: Path, written: set[str]) -> None:
    stem = next((re.sub(r"-\d{5}-of-\d{5}|\.safetensors", "", n) for n in written if n.endswith(".safetensors")), "")
    ours = re.compile(re.escape(stem) + r"(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
    for path in folder.iterdir():
        if ours.fullmatch(path.name) and path.name not in written:
            path.unlink()


def _read_header(file: Path) -> dict[str, tuple[int, ...]]:
    try:
        with safe_open(file, framework="pt") as tensors:
            return {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}
    except SafetensorError as error:
        raise CheckpointFileError(
            f"{file} ({file.stat().st_size} bytes) is truncated or not safetensors ({error}); download it again"
        ) from error


def describe_missing(missing_keys: list[str], head_prefixes: tuple[str, ...]) -> str | None:
    """A message if weights of the network itself (not of a head) were not in the checkpoint, else None."""
    missing = sorted(key for key in missing_keys if not key.startswith(head_prefixes))
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

        A folder's shards are checked by their headers before anything is read. Only safetensors are loaded. A weight of
        the network itself that the checkpoint lacks is an error (a new head is not). `output_loading_info=True` leaves
        keys and shapes to the caller, `ignore_mismatched_sizes=True` leaves shapes.

        Raises:
            CheckpointError: (a ValueError) missing or truncated shard, pickled weights, unknown or missing key, tensor
                that does not fit the config.
            ValueError: config of another model_type.
        """
        quantized = kwargs.get("quantization_config") is not None
        if pretrained_model_name_or_path is not None and kwargs.get("gguf_file") is None:
            kwargs = safetensors_only(kwargs)
            folder = Path(pretrained_model_name_or_path, kwargs.get("subfolder", ""))
            shapes = read_shapes(folder) if folder.is_dir() and not kwargs.get("variant") else None
            if shapes and not (output_loading_info or ignore_mismatched_sizes or quantized):
                config = kwargs.get("config") or cls.config_class.from_pretrained(folder)
                if getattr(config, "quantization_config", None) is None:
                    check_shapes(shapes, config, folder, head_keys=("score.",))
        model, loading_info = super().from_pretrained(
            pretrained_model_name_or_path,
            *model_args,
            output_loading_info=True,
            ignore_mismatched_sizes=ignore_mismatched_sizes,
            **kwargs,
        )
        if output_loading_info:
            return model, loading_info
        if message := describe_missing(loading_info["missing_keys"], cls._head_prefixes):
            raise CheckpointError(f"{pretrained_model_name_or_path}: {message}")
        return model

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
        (a full disk leaves it whole), and no copy of the weights is made. Further arguments are passed on.

        Raises:
            ValueError: `save_directory` is the folder of this source code, or a file.
        """
        refuse_checkout(save_directory)
        kwargs |= {"is_main_process": is_main_process, "push_to_hub": push_to_hub, "max_shard_size": max_shard_size}
        if not is_main_process or kwargs.get("distributed_checkpoint"):
            kwargs |= {"state_dict": state_dict, "save_original_format": save_original_format}
            super().save_pretrained(save_directory, **kwargs)
            return
        if push_to_hub:
            kwargs.setdefault("repo_id", Path(save_directory).name)
        adapter_only = getattr(self, "_hf_peft_config_loaded", False)
        if save_original_format and not adapter_only and getattr(self, "hf_quantizer", None) is None:
            weights = self.state_dict() if state_dict is None else state_dict
            if can_alias(weights):
                state_dict, save_original_format = official_state_dict(weights), False
        with replaced_when_whole(save_directory) as staging:
            super().save_pretrained(staging, state_dict=state_dict, save_original_format=save_original_format, **kwargs)
            if not adapter_only:
                add_remote_code(staging)


__all__ = [
    "CheckpointError",
    "CheckpointFileError",
    "OfficialCheckpointMixin",
    "official_shapes",
    "official_state_dict",
    "read_shapes",
]
