"""Sharded checkpoints of FSDP2 (torch.distributed.checkpoint): which are whole, and their export in the official layout.

    python -m grinmoe.distributed export --checkpoint run/checkpoint-200 --output model

The Trainer writes and resumes them itself, also on another number of ranks; docs/sharding.md says how. What is here runs
on one process without GPU and process group.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import nn
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME, CONFIG_NAME

from ..checkpoint_grinmoe import CheckpointError, CheckpointFileError, replaced_when_whole
from ..configuration_grinmoe import GrinMoeConfig
from ..modeling_grinmoe import GrinMoeForCausalLM, GrinMoeForSequenceClassification

# Accelerate's names; a change of them shows in tests/distributed/test_fsdp2.py.
_MODEL, _OPTIMIZER = "pytorch_model_fsdp_0", "optimizer_0"
_METADATA = ".metadata"


def is_sharded(checkpoint: str | os.PathLike) -> bool:
    """Whether a Trainer's checkpoint folder holds sharded weights, whole or not."""
    return Path(checkpoint, _MODEL).is_dir()


def is_whole(checkpoint: str | os.PathLike) -> bool:
    """
    Whether a Trainer's sharded checkpoint was written to its end, so that training can go on from it.

    torch writes the metadata of weights and optimizer when all ranks have written their parts, and the Trainer its state
    last. A job that was killed while it saved leaves a folder without one of them.
    """
    parts = (f"{_MODEL}/{_METADATA}", f"{_OPTIMIZER}/{_METADATA}", "scheduler.pt", TRAINER_STATE_NAME)
    return all(Path(checkpoint, part).is_file() for part in parts)


def export_sharded(
    checkpoint: str | os.PathLike,
    output: str | os.PathLike,
    config: str | os.PathLike | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """
    Write a sharded checkpoint as a full one in the official layout with the model's code, or as a PEFT adapter.

    `output` is replaced when all of it has been written. Needs host memory for the weights in `dtype` and about as much
    again for what save_pretrained holds. Also right on one rank of a job: nothing is sent to the others.

    Args:
        checkpoint: the Trainer's folder (`checkpoint-200`). torch keeps its metadata as a pickle, which can run code when
            it is read: only export what you trained yourself.
        output: folder of the model or adapter. The tokenizer is not among the weights: save it there yourself.
        config: folder or Hub id whose config.json (adapter_config.json) belongs to the weights; by default the
            checkpoint's own, which `shard_for` puts there.
        dtype: of the weights that are written. Adapters keep the dtype they were trained in.

    Raises:
        CheckpointFileError: no sharded checkpoint, or one that was not written to its end, or parts of it are missing.
        CheckpointError: the config is of another model.
    """
    folder = _weights_folder(checkpoint)
    reader = dcp.FileSystemReader(folder)
    stored = {
        name.removeprefix("model."): entry
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, dcp.metadata.TensorStorageMetadata)
    }
    source = Path(checkpoint if config is None else config)
    if any(name.startswith("base_model.") for name in stored):
        _export_adapter(folder, stored, source, output)
        return
    if config is None and not (source / CONFIG_NAME).is_file():
        raise CheckpointFileError(
            f"{source} has no {CONFIG_NAME}; give config=, the folder of the model that was trained"
        )
    model = _empty_model(GrinMoeConfig.from_pretrained(config or checkpoint), stored, dtype)
    _read(folder, dict(model.state_dict()))
    model.save_pretrained(output)


def _weights_folder(checkpoint: str | os.PathLike) -> Path:
    folder = Path(checkpoint, _MODEL)
    if not folder.is_dir():
        raise CheckpointFileError(
            f"{checkpoint} holds no sharded weights ({_MODEL}/); give a checkpoint folder of a training with FSDP2, as "
            "run/checkpoint-200 (others are full checkpoints already)"
        )
    if not (folder / _METADATA).is_file():
        raise CheckpointFileError(
            f"{folder} has no {_METADATA}: the job was stopped while it saved this checkpoint; take the one before"
        )
    return folder


def _empty_model(config: GrinMoeConfig, stored: dict, dtype: torch.dtype):
    """A model of uninitialised weights on the CPU, after a look whether they are what is stored."""
    classifier = "score.weight" in stored
    if classifier:
        config.num_labels = stored["score.weight"].size[0]
    with torch.device("meta"):
        model = (GrinMoeForSequenceClassification if classifier else GrinMoeForCausalLM)(config)
    for name, tensor in model.state_dict().items():
        if name not in stored:
            raise CheckpointError(
                f"the sharded weights lack {name}, which the config has; give the config they belong to"
            )
        if stored[name].size != tensor.shape:
            raise CheckpointError(
                f"{name} is {tuple(stored[name].size)} in the sharded weights and {tuple(tensor.shape)} by the config; "
                "give the config they belong to"
            )
    if unknown := stored.keys() - model.state_dict().keys():
        raise CheckpointError(
            f"the sharded weights hold {min(unknown)}, which the config has not; give the one they belong to"
        )
    nn.Module.to(model, dtype)
    return model.to_empty(device="cpu")


def _export_adapter(folder: Path, stored: dict, source: Path, output: str | os.PathLike) -> None:
    if not (source / ADAPTER_CONFIG_NAME).is_file():
        raise CheckpointFileError(f"{source} has no {ADAPTER_CONFIG_NAME}; give config=, a folder that has it")
    tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in stored.items()}
    _read(folder, tensors)
    with replaced_when_whole(output) as staging:
        save_file(tensors, staging / ADAPTER_SAFE_WEIGHTS_NAME, metadata={"format": "pt"})
        shutil.copyfile(source / ADAPTER_CONFIG_NAME, staging / ADAPTER_CONFIG_NAME)


def _read(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Fill tensors in place, in their own dtype."""
    try:
        dcp.load({"model": tensors}, storage_reader=dcp.FileSystemReader(folder), no_dist=True)
    except (dcp.CheckpointException, OSError, RuntimeError) as error:
        raise CheckpointFileError(f"{folder} cannot be read ({error}); take another checkpoint") from error
