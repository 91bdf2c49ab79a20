"""The forms in which a base is quantised for adapters, by the names that commands and recipes give them."""

from __future__ import annotations

from typing import get_args

import torch
from transformers import BitsAndBytesConfig

from .options import Quantization

QUANTIZATIONS = get_args(Quantization)


def quantization_config(kind: str, compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    """
    For `from_pretrained`.

    Args:
        kind: "nf4" or "fp4" (both with double quantisation), or "int8".
        compute_dtype: of products with 4-bit weights.
    """
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )
