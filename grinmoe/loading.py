"""What a user names as a model: a folder on this machine or a repository of the Hub, found, and loaded to be used."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers.utils import ADAPTER_CONFIG_NAME, CONFIG_NAME, logging

from .checkpoint_grinmoe import check_folder, read_tensors
from .configuration_grinmoe import GrinMoeConfig
from .files import check_dtype, folder_or_repository
from .modeling_grinmoe import GrinMoeForCausalLM
from .tokenization import load_tokenizer


def load_for_use(
    source: str, dtype: str = "auto", device: str | None = None, needs_head: bool = True
) -> tuple[Any, Any]:
    """
    A model in evaluation mode and its tokenizer, by this package's own classes: no remote code runs.

    Args:
        source: folder or Hub repository. The folder may be that of an adapter, which names its base.
        dtype: one of `DTYPES`; "auto" is the checkpoint's.
        device: "cpu", "cuda", "cuda:1", ...; "auto" spreads the layers over all accelerators and, where they are full, the
            CPU's memory (Accelerate's `device_map="auto"`); None is an accelerator if there is one.
        needs_head: whether the caller uses logits. `from_pretrained` starts a missing language head from random values.

    Raises:
        ValueError: the device or dtype cannot be used, or has too little memory; the checkpoint has no language head, or
            not all of it; or it is broken (see `GrinMoeForCausalLM.from_pretrained`).
        OSError: there is no such folder or repository.
    """
    check_dtype(dtype)
    device = _usable(device)
    source = folder_or_repository(source, "--model")
    folder = Path(source)
    if folder.is_dir() and not any((folder / name).is_file() for name in (CONFIG_NAME, ADAPTER_CONFIG_NAME)):
        raise ValueError(
            f"--model {source} is no model's folder: it has no {CONFIG_NAME} and no {ADAPTER_CONFIG_NAME}; give the folder "
            "that save_pretrained, a training command or grinmoe pull has made"
        )
    base = base_of_model(source)
    # The small files first: what is wrong with them is said before gigabytes have been read.
    config = GrinMoeConfig.from_pretrained(base)
    # That of the adapter where it has one: it is `source` then, and `base` otherwise.
    tokenizer = load_tokenizer(source if (folder / "tokenizer.json").is_file() else base)
    if Path(base).is_dir():
        check_folder(base, config)
        if needs_head:
            _check_head(base, base, config)
    if base != source:
        from .adapters import check_adapter

        check_adapter(source, GrinMoeForCausalLM, config)
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    # Straight onto an accelerator: the CPU may have less memory.
    where: dict[str, Any] = {} if device == "cpu" else {"device_map": "auto" if device == "auto" else {"": device}}
    try:
        model = GrinMoeForCausalLM.from_pretrained(base, config=config, dtype=dtype, **where)
        if needs_head and not Path(base).is_dir():
            # The weights of a repository are beside its config now.
            _check_head(base, snapshot_download(base, allow_patterns=CONFIG_NAME), config)
        if base != source:
            from .adapters import load_adapter

            model = load_adapter(model, source)
            if device != "auto":
                model = model.to(device)
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"--model {source} does not fit into the memory of {device} ({error}); spread it over several GPUs with "
            "--device auto, or use a quantised checkpoint"
        ) from error
    return model.eval(), tokenizer


def base_of_model(source: str) -> str:
    """`source` itself, or the model that it names as its base if it is an adapter's folder."""
    if not (Path(source) / ADAPTER_CONFIG_NAME).is_file():
        return source
    read_tensors(source)  # refuses a model beside the adapter
    from .adapters import base_of

    return folder_or_repository(base_of(source), "base of the adapter")


def _check_head(source: str, folder: str, config: GrinMoeConfig) -> None:
    """Raise ValueError where the weights in `folder` lack a part of the language head that `config` describes."""
    parts = [] if config.tie_word_embeddings else ["lm_head.weight"]
    parts += ["lm_head.bias"] if config.lm_head_bias else []
    tensors = read_tensors(folder)
    missing = [part for part in parts if tensors is not None and part not in tensors]
    if missing:
        raise ValueError(
            f"the checkpoint {source} lacks {' and '.join(missing)}: its language head is not complete, and answers would "
            "come from random weights. Give a checkpoint that GrinMoeForCausalLM has saved, or train a head first; where "
            "only the bias is missing and the model has none, set lm_head_bias to false in config.json"
        )


def _usable(device: str | None) -> str:
    if device == "auto":
        return device
    device = device or (torch.accelerator.current_accelerator() or torch.device("cpu")).type
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"--device {device} cannot be used here ({error}); leave it out for the best there is"
        ) from error
    return device
