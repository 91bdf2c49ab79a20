"""Checkpoints for other programs, and from other models: `grinmoe export`.

| `to` | what is written |
|---|---|
| `safetensors` | a GRIN-MoE checkpoint of another dtype or shard size; also from a phimoe or a Mixtral |
| `phimoe` | a checkpoint that Transformers' own class, vLLM and SGLang load without code |
| `mixtral` | the same, of a model with RMSNorm and renormalised top-k gating |
| `gguf` | a file for llama.cpp, whose routing is another (`gguf.py`) |

Tensors are read, converted and written shard by shard, and the folder appears when it is whole.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import torch
from huggingface_hub import snapshot_download
from rich.console import Console
from transformers import BitsAndBytesConfig, MixtralConfig, MixtralForCausalLM, PhimoeConfig, PhimoeForCausalLM
from transformers.utils import ADAPTER_CONFIG_NAME, CONFIG_NAME, GENERATION_CONFIG_NAME

from .. import files
from ..checkpoint_grinmoe import (
    ON_DISK,
    add_remote_code,
    check_weights,
    fused_name,
    official_shapes,
    refuse_checkout,
)
from ..configuration_grinmoe import FOREIGN_EXTRAS, GrinMoeConfig, read_json_object
from ..files import atomic_write_text, copy_files, folder_or_repository
from ..modeling_grinmoe import GrinMoeForCausalLM, GrinMoeRotaryEmbedding
from ..outputs import check_output, checkpoint_when_whole
from ..provenance import markdown_table
from ..quantization_grinmoe import FUSED, dense_shape, quantize_rows
from ..routing_grinmoe import ESTIMATORS
from ..tokenization import TOKENIZER_FILES
from .compare import compare_logits, require_equal, why_not_compared
from .configs import ConversionError, from_mixtral, load_foreign_config, longrope_scales, to_mixtral, to_phimoe
from .gguf import check_gguf, find_converter, write_gguf
from .options import ExportOptions, Target
from .phimoe import as_it_was, complete, engine_causes, engine_difference, has_spare_head, routing_difference
from .shards import Entry, WeightSource, write_shards

TARGETS = get_args(Target)
DTYPES = (*files.DTYPES, "int8")
_RECORD = "export.json"
# What lies beside the weights and goes with them.
COMPANIONS = (*TOKENIZER_FILES, GENERATION_CONFIG_NAME)
# bitsandbytes would convert them too, and they are 4 % of the weights.
_NOT_IN_8_BITS = ["q_proj", "k_proj", "v_proj", "o_proj", "lm_head"]
_WANTED = ["*.json", "*.safetensors", "*.model", "*.jinja"]


def export_checkpoint(options: ExportOptions) -> dict[str, Any]:
    """
    Convert a checkpoint.

    Returns:
        What `export.json` in the result says: source, target, bytes, notes, and the comparison if one was made.

    Raises:
        ConversionError: the target cannot represent the checkpoint, or the source is none that is known.
        UnequalLogitsError: the result does not compute what the source does; it was not kept.
        CheckpointError: the source is broken or incomplete.
        ValueError: an unknown target, dtype or size; an output that is no new or empty folder.
        FileNotFoundError: no such model.
    """
    target = _check_options(options)
    folder = local_folder(options.model)
    config = read_config(folder)
    source = WeightSource(folder)
    _check_target(options, config, source)
    check_weights(source.tensors, config, folder, head_keys=("score.",))
    converter = find_converter(options.converter) if options.to == "gguf" else None
    record: dict[str, Any] = {"source": options.model, "to": options.to, "dtype": options.dtype, "notes": []}
    if model_type_of(folder) == PhimoeConfig.model_type:
        config = as_it_was(config, _content(folder), source)
    with checkpoint_when_whole(target) as staging:
        dtype = "auto" if options.to == "gguf" else options.dtype  # there the converter casts
        entries = list(official_entries(source, config, dtype))
        parameters = sum(math.prod(entry.shape) for entry in entries)
        if converter is not None:
            file = write_gguf(entries, config, folder, staging, converter, options.dtype, options.max_shard_size)
            record["bytes"] = file.stat().st_size
        else:
            if options.to == "phimoe":
                entries = complete(entries)
            if options.dtype == "int8":
                entries = _in_8_bits(entries, config)
            _write_config(options, config, entries, staging)
            copy_files(COMPANIONS, folder, staging)
            record["bytes"] = write_shards(entries, staging, options.max_shard_size, f"writing {options.to}")
        _compare(options, source, config, parameters, staging, record)
        if options.to == "safetensors" and _reads_one_key_more(folder, config):
            record["notes"].append(
                f"sliding_window={config.sliding_window} is taken as in the released models, which see "
                f"{config.visible_keys} keys; Transformers' phimoe sees one less. For a checkpoint that was trained with "
                "that, lower it by one"
            )
        atomic_write_text(staging / _RECORD, json.dumps(record, indent=2) + "\n")
    return record


def run_export(options: ExportOptions) -> None:
    """`grinmoe export`."""
    console = Console(soft_wrap=True, markup=False)
    record = export_checkpoint(options)
    console.print(f"{options.to}: {options.output} ({record['bytes'] / 1e9:.3g} GB)")
    if differences := record.get("logits"):
        rows = [
            [one["tokens"], one["window"], f"{one['difference']:.2g}", f"{one['largest']:.3g}"] for one in differences
        ]
        header = ["tokens", "keys that a token sees", "largest difference of logits", "largest logit"]
        console.print(markdown_table(header, rows))
    for key, whose in {"routing": "with llama.cpp's routing", "engines": "as vLLM and SGLang compute it"}.items():
        if difference := record.get(key):
            console.print(
                f"{whose}, on {difference['tokens']} tokens ({difference['text']}): another likeliest next token at "
                f"{difference['next_token_differs']:.1%} of them, mean divergence {difference['kl']:.3g} nats"
            )
    for note in record["notes"]:
        console.print(f"note: {note}")


# --- what is asked for -------------------------------------------------------------------------------------------------


def _check_options(options: ExportOptions) -> Path:
    if options.to not in TARGETS:
        raise ValueError(f"--to {options.to!r} is unknown; choose one of {', '.join(TARGETS)}")
    files.check_dtype(options.dtype, DTYPES)
    if options.dtype == "int8" and options.to in ("phimoe", "mixtral"):
        raise ConversionError(f"--dtype int8 is for safetensors and gguf; choose bfloat16 or float16 for {options.to}")
    return check_new_checkpoint(options.output, options.max_shard_size)


def check_new_checkpoint(output: str, max_shard_size: int | str) -> Path:
    """
    Check where a new checkpoint is to be written, and in shards of which size. Returns the absolute path of the former.

    Raises:
        ValueError: the folder is not new or empty, or is that of the source code; or the size is not one.
    """
    if isinstance(max_shard_size, str) and not re.fullmatch(r"\d+(\.\d+)?[KMGT]?B", max_shard_size):
        raise ValueError(f"--max-shard-size {max_shard_size!r} is not a size; give one such as 500MB or 5GB")
    refuse_checkout(output)
    return check_output(output)


def local_folder(model: str) -> Path:
    """The checkpoint's folder; that of a repository is downloaded into the Hub's cache."""
    source = folder_or_repository(model, "--model")
    if Path(source).is_dir():
        return Path(source)
    return Path(snapshot_download(source, allow_patterns=_WANTED))


def read_config(folder: Path) -> GrinMoeConfig:
    """
    Of a GRIN-MoE, a phimoe or a Mixtral, as ours.

    Raises:
        ConversionError: no config, that of an adapter alone, or of another model.
    """
    file = folder / CONFIG_NAME
    if not file.is_file():
        if (folder / ADAPTER_CONFIG_NAME).is_file():
            raise ConversionError(
                f"{folder} is an adapter, which is not exported by itself; merge it into its base before (grinmoe merge "
                f"--adapter {folder} --output merged)"
            )
        raise ConversionError(f"{folder} holds no {CONFIG_NAME}; give the folder of a checkpoint")
    model_type = model_type_of(folder)
    if model_type == MixtralConfig.model_type:
        return from_mixtral(load_foreign_config(folder))
    if model_type not in (GrinMoeConfig.model_type, "phimoe"):
        raise ConversionError(f"{file} has model_type={model_type!r}; grinmoe, phimoe and mixtral can be converted")
    return GrinMoeConfig.from_pretrained(folder)


def model_type_of(folder: Path) -> str | None:
    """Of a folder's config.json; ConversionError where that is no JSON object."""
    return _content(folder).get("model_type")


def _content(folder: Path) -> dict[str, Any]:
    return read_json_object(folder / CONFIG_NAME, ConversionError, "download it again")


def _speaks(source: WeightSource, config: GrinMoeConfig) -> bool:
    """Whether the checkpoint has a language head."""
    return "score.weight" not in source and ("lm_head.weight" in source or config.tie_word_embeddings)


def _check_target(options: ExportOptions, config: GrinMoeConfig, source: WeightSource) -> None:
    if _content(source.folder).get("quantization_config") is not None:
        raise ConversionError(
            f"{source.folder} is quantised, and its packed weights have no other layout; export the checkpoint that it was "
            "made of"
        )
    if options.to == "phimoe":
        to_phimoe(config)  # refuses
    if options.to == "mixtral":
        to_mixtral(config)
    if options.to == "gguf":
        check_gguf(source.folder, config)
    if options.to != "safetensors" and not _speaks(source, config):
        raise ConversionError(f"{source.folder} has no language head; {options.to} is a language model")


# --- tensors -----------------------------------------------------------------------------------------------------------


def official_entries(source: WeightSource, config: GrinMoeConfig, dtype: str = "auto") -> Iterator[Entry]:
    """A checkpoint's tensors under their official keys, cast; fused experts are taken apart as they are read."""
    for name, shape in official_shapes(config).items():
        if name == "lm_head.weight" and config.tie_word_embeddings and has_spare_head(source):
            continue
        key = name if name in source else name.removeprefix("model.")
        if key in source:
            yield _entry(name, shape, source, key, (), dtype)
            continue
        fused = fused_name(name)
        key = fused if fused in source else fused.removeprefix("model.")
        if fused == name or key not in source:
            continue  # a head that the checkpoint has not; what else is missing, check_weights has refused
        yield _entry(name, shape, source, key, _part_of_fused(name, shape), dtype)
    for name in ("score.weight", "score.bias"):
        if name in source:
            yield _entry(name, source.shapes[name], source, name, (), dtype)


def _entry(name, shape, source: WeightSource, key: str, part, dtype: str) -> Entry:
    own = source.dtype(key)
    wanted = own if dtype in ("auto", "int8") or not own.is_floating_point else getattr(torch, dtype)
    return Entry(name, shape, wanted, lambda: _cast(source.read(key, part), wanted, name).view(shape))


def _part_of_fused(name: str, shape: tuple[int, ...]) -> tuple[slice, ...]:
    """Where an expert's matrix lies in the fused weight of its layer."""
    expert, on_disk = re.search(r"\.experts\.(\d+)\.(\w+)\.weight$", name).groups()  # type: ignore[union-attr]
    position = ON_DISK[on_disk][1] * shape[0]
    return slice(int(expert), int(expert) + 1), slice(position, position + shape[0])


def _cast(tensor: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    if tensor.dtype == dtype:
        return tensor
    result = tensor.to(dtype)
    if dtype == torch.float16 and not result.isfinite().all() and tensor.isfinite().all():
        raise ConversionError(
            f"{name} has {tensor.abs().max():.4g}, more than float16 holds ({torch.finfo(dtype).max:.0f}); choose bfloat16"
        )
    return result


def _in_8_bits(entries: list[Entry], config: GrinMoeConfig) -> list[Entry]:
    """Each layer's experts, fused and packed, in place of their matrices."""
    matrices = {entry.name: entry for entry in entries if ".experts." in entry.name}
    result = [entry for entry in entries if entry.name not in matrices]
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}.block_sparse_moe.experts"
        for fused in FUSED:
            shape = dense_shape(config, fused)
            packed = _Packed([_rows(matrices, prefix, fused, expert) for expert in range(shape[0])])
            result.append(Entry(f"{prefix}.{fused}", shape, torch.int8, packed.codes))
            result.append(Entry(f"{prefix}.{fused}_scale", shape[:2], torch.float32, packed.scales))
    return result


def _rows(matrices: dict[str, Entry], prefix: str, fused: str, expert: int) -> list[Entry]:
    return [matrices[f"{prefix}.{expert}.{one}.weight"] for one, (name, _) in ON_DISK.items() if name == fused]


class _Packed:
    """The experts of a layer as int8, one matrix after the other; codes and scales are written apart."""

    def __init__(self, experts: list[list[Entry]]):
        self.experts = experts
        self._scales: torch.Tensor | None = None

    def codes(self) -> torch.Tensor:
        packed = [quantize_rows(torch.cat([entry.make() for entry in parts])) for parts in self.experts]
        self._scales = torch.stack([scale for _, scale in packed])
        return torch.stack([codes for codes, _ in packed])

    def scales(self) -> torch.Tensor:
        assert self._scales is not None, "codes are written before their scales"
        return self._scales


# --- what lies beside them ---------------------------------------------------------------------------------------------


def _reads_one_key_more(folder: Path, config: GrinMoeConfig) -> bool:
    """Whether it is a phimoe that may have been trained with a window of W keys, not W + 1."""
    content = _content(folder)
    is_foreign = content.get("model_type") == "phimoe" and FOREIGN_EXTRAS not in content
    return is_foreign and (config.visible_keys or math.inf) < config.max_position_embeddings


def _write_config(options: ExportOptions, config: GrinMoeConfig, entries: list[Entry], staging: Path) -> None:
    if options.dtype not in ("auto", "int8"):
        config.dtype = getattr(torch, options.dtype)
    if options.to == "phimoe":
        text = json.dumps(to_phimoe(config), indent=2, sort_keys=True) + "\n"
        (staging / CONFIG_NAME).write_text(text, encoding="utf-8")
        return
    if options.to == "mixtral":
        to_mixtral(config).save_pretrained(staging)
        return
    names = {entry.name for entry in entries}
    architecture = "GrinMoeForCausalLM" if "lm_head.weight" in names or config.tie_word_embeddings else "GrinMoeModel"
    config.architectures = ["GrinMoeForSequenceClassification" if "score.weight" in names else architecture]
    if options.dtype == "int8":
        config.quantization_config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=_NOT_IN_8_BITS)
    config.save_pretrained(staging)
    add_remote_code(staging)


# --- how far apart they are --------------------------------------------------------------------------------------------


def _compare(
    options: ExportOptions,
    source: WeightSource,
    config: GrinMoeConfig,
    parameters: int,
    staging: Path,
    record: dict[str, Any],
) -> None:
    folder = source.folder
    classes = _classes(options, folder, _speaks(source, config))
    causes = engine_causes(config, source) if options.to == "phimoe" else []
    rope = config.rope_parameters or {}
    longrope = rope["rope_type"] == "longrope"
    if causes:
        record["notes"].append(f"vLLM and SGLang give other logits: {', and '.join(causes)}")
    if options.to == "gguf":
        record["notes"] += _notes_of_gguf(config)
    elif classes is None:
        return
    if note := why_not_compared(config, parameters, options.compare):
        record["notes"].append(note)
    elif classes is None:
        record["routing"] = routing_difference(folder, config)
    else:
        rounding, explained = _rounding(options.dtype), None
        if longrope and options.to == "phimoe":
            explained = functools.partial(_give_released_longrope, folder=staging)
        compared = (classes[0], folder), (classes[1], staging)
        record["logits"] = compare_logits(*compared, config, rounding, explained)
        require_equal(record["logits"])
        if causes:
            record["engines"] = engine_difference(folder, config)
    if options.to == "phimoe" and longrope:
        original = rope["original_max_position_embeddings"]
        record["notes"].append(
            f"LongRoPE: Transformers' phimoe keeps the short factors beyond {original} tokens, where this model and vLLM "
            "change to the long ones"
        )


def _rounding(dtype: str) -> Callable[[Any], None] | None:
    """What a cast did to the weights, for a model in float32."""

    def round_weights(model: Any) -> None:
        for parameter in model.parameters():
            parameter.copy_(parameter.to(getattr(torch, dtype)))

    return round_weights if dtype in ("bfloat16", "float16") else None


def _give_released_longrope(model: Any, folder: Path) -> None:
    """Transformers' phimoe never takes the long factors: what remains is what config.json says."""
    model.model.rotary_emb = GrinMoeRotaryEmbedding(GrinMoeConfig.from_pretrained(folder))


def _notes_of_gguf(config: GrinMoeConfig) -> list[str]:
    notes = []
    if "mixtral" not in ESTIMATORS[config.router_estimator].exports_to:
        notes.append(
            "llama.cpp routes by a softmax over the chosen experts, this model by SparseMixer's masked softmax, so the file "
            "computes something else than the checkpoint"
        )
    if config.visible_keys is not None and config.visible_keys < config.max_position_embeddings:
        notes.append(
            f"llama.cpp's PhiMoE has no window: texts of more than {config.visible_keys} tokens differ besides"
        )
    rope = config.rope_parameters or {}
    if rope["rope_type"] == "longrope":
        original = rope["original_max_position_embeddings"]
        notes.append(
            f"llama.cpp takes LongRoPE's factors by the size of its context, not by the text's: the short ones up to -c "
            f"{original}, the long ones above it"
        )
        factor, scales = config.max_position_embeddings / original, longrope_scales(config)
        written = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
        if any(not math.isclose(scale, written, rel_tol=1e-6) for scale in scales):
            notes.append(
                f"llama.cpp's converter writes {written:.6g} for LongRoPE's scale, where this model has "
                f"short_mscale={scales[0]:.6g} and long_mscale={scales[1]:.6g}"
            )
    return notes


def _classes(options: ExportOptions, folder: Path, has_head: bool) -> tuple[type, type] | None:
    """Of the source and of the result, where they are two models that should compute the same."""
    if options.to == "phimoe":
        return GrinMoeForCausalLM, PhimoeForCausalLM
    if options.to == "mixtral":
        return GrinMoeForCausalLM, MixtralForCausalLM
    if model_type_of(folder) == MixtralConfig.model_type and has_head and options.dtype != "int8":
        return MixtralForCausalLM, GrinMoeForCausalLM
    return None
