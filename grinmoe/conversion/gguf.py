"""To GGUF, through llama.cpp's converter: what its PhiMoE cannot compute is put into the weights where that is possible.

Its PhiMoE has RMSNorm (with a bias) where this model has LayerNorm. Everything that is added to the residual stream comes
from the embeddings, o_proj or an expert's w2. With the mean over the hidden dimension subtracted from these, the stream's
mean is 0, and there both norms are the same. What cannot be mended is routing: a softmax over the chosen experts alone, as
`router_estimator="topk_renormalized"` has it, in place of SparseMixer's masked softmax; and the window, which it ignores.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from transformers.utils import CONFIG_NAME

from ..configuration_grinmoe import GrinMoeConfig
from ..files import copy_files
from ..tokenization import TOKENIZER_FILES
from .configs import ConversionError, phimoe_fields
from .phimoe import complete
from .shards import Entry, write_shards

CONVERTER = "convert_hf_to_gguf.py"
# Our names of dtypes, and the converter's.
OUTTYPES = {"auto": "auto", "bfloat16": "bf16", "float16": "f16", "float32": "f32", "int8": "q8_0"}
# llama.cpp turns Phi-3's special tokens on by the model's name.
_NAME = "Phi-3-MoE"


def find_converter(path: str | None) -> Path:
    """
    llama.cpp's converter.

    Args:
        path: of the script, or of llama.cpp's folder; None: it is looked for on the PATH.

    Raises:
        ValueError: it is not there.
    """
    if path is None:
        found = shutil.which(CONVERTER)
        if found is None:
            raise ValueError(
                f"{CONVERTER} is not on the PATH; give llama.cpp's folder with --converter (its source has the script)"
            )
        return Path(found)
    file = Path(path).expanduser()
    file = file / CONVERTER if file.is_dir() else file
    if not file.is_file():
        raise ValueError(f"--converter {path}: there is no {CONVERTER}; give llama.cpp's folder")
    return file


def check_gguf(folder: Path, config: GrinMoeConfig) -> None:
    """
    Raises:
        ConversionError: what llama.cpp's PhiMoE cannot represent, or a tokenizer that its converter does not read.
    """
    if config.head_size * config.num_attention_heads != config.hidden_size:
        raise ConversionError(
            f"head_dim={config.head_size}: llama.cpp's PhiMoE has heads of hidden_size / num_attention_heads alone"
        )
    if config.hidden_act not in ("silu", "swish"):
        raise ConversionError(f"hidden_act={config.hidden_act!r}: llama.cpp's PhiMoE has silu alone")
    if (config.rope_parameters or {})["rope_type"] not in ("default", "longrope"):
        raise ConversionError(
            f"rope_type={(config.rope_parameters or {})['rope_type']!r}: 'default' and 'longrope' alone"
        )
    if not (folder / "tokenizer.model").is_file():
        raise ConversionError(
            f"{folder} holds no tokenizer.model, which llama.cpp's converter makes the vocabulary of; put that of the "
            "released model there"
        )


def centred(entries: Iterable[Entry], config: GrinMoeConfig) -> list[Entry]:
    """
    The tensors with which RMSNorm gives what LayerNorm gave, and what PhiMoE requires beside them: zero biases.

    A tied head is written apart, as it was. Where the norm is RMSNorm already, nothing is subtracted.
    """
    result = []
    for entry in complete(entries):
        dim = None if config.norm_type == "rms_norm" else _mean_of(entry.name)
        result.append(entry if dim is None else _without_mean(entry, dim))
    return result


def _mean_of(name: str) -> int | None:
    """The dimension of a tensor that is added to the residual stream's hidden dimension."""
    if name == "model.embed_tokens.weight":
        return 1
    return 0 if name.endswith((".o_proj.weight", ".o_proj.bias", ".w2.weight")) else None


def _without_mean(entry: Entry, dim: int) -> Entry:
    def make() -> torch.Tensor:
        tensor = entry.make().float()
        return (tensor - tensor.mean(dim=dim, keepdim=True)).to(entry.dtype)

    return dataclasses.replace(entry, make=make)


def write_gguf(
    entries: list[Entry],
    config: GrinMoeConfig,
    folder: Path,
    staging: Path,
    converter: Path,
    dtype: str,
    shard_size: int | str,
) -> Path:
    """
    Write the checkpoint that the converter reads, and convert it.

    Args:
        entries: as `official_entries` gives them.
        folder: the source, for the tokenizer.
        staging: where the result goes; the checkpoint in between is removed.
        dtype: one of `OUTTYPES`.

    Returns:
        Path of the .gguf.

    Raises:
        ConversionError: the converter failed; its last lines.
    """
    between = staging / _NAME
    between.mkdir()
    content = phimoe_fields(config)
    original = content.get("original_max_position_embeddings", config.max_position_embeddings)
    content["original_max_position_embeddings"] = original
    content["rope_parameters"] = {**content["rope_parameters"], "original_max_position_embeddings": original}
    (between / CONFIG_NAME).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    copy_files(TOKENIZER_FILES, folder, between)
    write_shards(centred(entries, config), between, shard_size, "writing what the converter reads")
    file = staging / f"model-{OUTTYPES[dtype]}.gguf"
    command = [sys.executable, str(converter), str(between), "--outfile", str(file), "--outtype", OUTTYPES[dtype]]
    done = subprocess.run([*command, "--model-name", _NAME], capture_output=True, text=True)
    if done.returncode != 0 or not file.is_file():
        last = " ".join((done.stderr.strip() or "it wrote no file").splitlines()[-3:])
        raise ConversionError(f"{converter} failed with exit code {done.returncode}: {last}")
    shutil.rmtree(between)
    return file
