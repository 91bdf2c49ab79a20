"""The tests' tiny model and its short trainings, with one value for each field; a test overrides what it is about."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch

from grinmoe import GrinMoeConfig, GrinMoeForCausalLM

if TYPE_CHECKING:
    from transformers import TrainingArguments

# Fields that dense models have too.
SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def tiny_config(**overrides) -> GrinMoeConfig:
    """A config that trains in milliseconds."""
    fields = {**SIZES, "num_local_experts": 4, "sliding_window": 15, "eos_token_id": 95}
    return GrinMoeConfig(**{**fields, **overrides})


def tiny_model(seed: int = 0, **overrides) -> GrinMoeForCausalLM:
    """A randomly initialised model of `tiny_config`, the same for the same arguments; in training mode."""
    torch.manual_seed(seed)
    return GrinMoeForCausalLM(tiny_config(**overrides))


def training_arguments(folder: str | os.PathLike, **overrides) -> TrainingArguments:
    """Four steps on a CPU that print, report and save nothing."""
    from transformers import TrainingArguments  # takes seconds to import, and most tests train nothing

    options = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
    }
    return TrainingArguments(**{**options, **overrides})
