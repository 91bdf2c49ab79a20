"""Merge a LoRA adapter into its base and save the result in the official layout.

    merge_adapter("adapter", "merged")                                    # into the base that the adapter names
    merge_adapter("adapter", "merged", from_quantized=BitsAndBytesConfig(load_in_4bit=True, ...))

Each expert's delta is added in float32 and rounded once, so that a float32 merge equals the adapter on its base within
rounding. An adapter trained on 4-bit weights was trained to correct *those*: merged into the dense weights, it meets others
(docs/lora.md has the errors). `from_quantized` merges into the dequantised weights instead.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from peft.utils import CONFIG_NAME as ADAPTER_CONFIG
from transformers.utils import CONFIG_NAME

from ..checkpoint_grinmoe import check_folder, refuse_checkout
from ..configuration_grinmoe import GrinMoeConfig
from ..files import check_dtype, copy_files
from ..modeling_grinmoe import GrinMoeForCausalLM, GrinMoeForSequenceClassification, GrinMoePreTrainedModel
from ..outputs import check_output, checkpoint_when_whole
from ..tokenization import TOKENIZER_FILES
from .lora import AdapterError, base_of, check_adapter, load_adapter, may_be_there, read_lora_config, stored_shapes
from .options import MergeOptions
from .presets import quantization_config


def merge_adapter(
    adapter: str | os.PathLike,
    output: str | os.PathLike,
    base: str | os.PathLike | None = None,
    dtype: torch.dtype | str = "auto",
    from_quantized: Any = None,
) -> Path:
    """
    Merge an adapter's folder into its base: a checkpoint in the official layout, with the code and the tokenizer.

    The output appears when it is whole. Neither the base nor the adapter is changed. The tokenizer is copied from the
    adapter's folder, else from the base's, if one is there.

    Args:
        adapter: folder of a PEFT adapter.
        output: folder of the merged checkpoint, new or empty.
        base: folder or Hub id of the base; by default what the adapter's configuration names.
        dtype: of the merge and of what is saved; "auto" is the base's own.
        from_quantized: the `quantization_config` that the adapter was trained on: the base is loaded so, and dequantised
            before the merge.

    Returns:
        Path of `output`.

    Raises:
        AdapterError: no base is known or it is not there, or the adapter does not fit it (before any weight is loaded).
        ValueError: (before, too) a wrong dtype; `output` is not a new or empty folder, or is this source code's.
    """
    config = read_lora_config(adapter)
    base = base_of(adapter) if base is None else os.fspath(base)
    dtype = _floating_dtype(dtype)
    refuse_checkout(output)
    target = _check_folders(adapter, base, output)
    base_config = GrinMoeConfig.from_pretrained(base)
    model_class: type[GrinMoePreTrainedModel] = GrinMoeForCausalLM
    if config.task_type == "SEQ_CLS":
        model_class = GrinMoeForSequenceClassification
        _take_number_of_labels(base_config, adapter)
    if Path(base).is_dir():
        check_folder(base, base_config)
    check_adapter(adapter, model_class, base_config)
    with checkpoint_when_whole(target) as staging:  # which says now that nothing can be written there, not hours later
        model = _load_base(model_class, base, base_config, dtype, from_quantized)
        merged = load_adapter(model, adapter).merge_and_unload(safe_merge=True)
        merged.save_pretrained(staging)
        _copy_tokenizer((Path(adapter), Path(base)), staging)
    return Path(output)


def run_merge(options: MergeOptions) -> None:
    """`grinmoe merge`. A quantised base in 4 bits has double quantisation."""
    from_quantized = None
    if options.quantized_base is not None:
        from_quantized = quantization_config(options.quantized_base, torch.float32)
    path = merge_adapter(options.adapter, options.output, options.base, options.dtype, from_quantized)
    print(f"merged: {path}")


def _floating_dtype(dtype: torch.dtype | str) -> torch.dtype | str:
    """The same as torch has it, "auto" apart; refused is what weights cannot be merged in."""
    name = str(dtype).removeprefix("torch.")
    check_dtype(name)
    return name if name == "auto" else getattr(torch, name)


def _take_number_of_labels(config: GrinMoeConfig, adapter: str | os.PathLike) -> None:
    """A classifier that was made of a base without labels has its head, and so their number, in the adapter alone."""
    for key, shape in stored_shapes(adapter).items():
        if key.endswith(".score.weight") and shape[0] != config.num_labels:
            config.num_labels = shape[0]


def _check_folders(adapter: str | os.PathLike, base: str, output: str | os.PathLike) -> Path:
    for folder in (adapter, base):
        if Path(folder).exists() and Path(output).resolve() == Path(folder).resolve():
            raise ValueError(
                f"output={os.fspath(output)!r} is the folder of the adapter or of its base; give another one"
            )
    target = check_output(output, "output")
    if not may_be_there(base):
        raise AdapterError(f"base={base!r} is not there; give a folder or an id on the Hub")
    if Path(base).is_dir() and (Path(base) / ADAPTER_CONFIG).exists():
        raise AdapterError(
            f"base={base!r} holds an adapter itself, which Transformers would load with it; give a folder of the base alone"
        )
    if Path(base).is_dir() and not (Path(base) / CONFIG_NAME).is_file():
        raise AdapterError(f"base={base!r} holds no {CONFIG_NAME}; give the folder of a checkpoint")
    return target


def _load_base(
    model_class: type[GrinMoePreTrainedModel],
    base: str,
    config: GrinMoeConfig,
    dtype: torch.dtype | str,
    from_quantized: Any,
) -> GrinMoePreTrainedModel:
    options = {} if from_quantized is None else {"quantization_config": from_quantized}
    model = model_class.from_pretrained(base, config=config, dtype=dtype, **options)
    if getattr(model, "hf_quantizer", None) is None:
        return model
    return model.dequantize(dtype=model.dtype if dtype == "auto" else dtype)


def _copy_tokenizer(sources: tuple[Path, ...], target: Path) -> None:
    for folder in sources:
        # A chat template alone is not a tokenizer.
        if any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
            copy_files(TOKENIZER_FILES, folder, target)
            return
