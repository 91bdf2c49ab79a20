"""Assemble the folder that is published of a model, and check it: what `grinmoe push` sends, and nothing else.

A release is made beside the model, from the files that belong to one: weights (linked, not copied), config, code,
tokenizer, card. What else lies in the model's folder (optimizer state, logs, pickles) is left out, and every file that
goes in is looked into.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from huggingface_hub import ModelCard, get_token
from rich.console import Console
from rich.progress import track
from safetensors import SafetensorError, safe_open
from transformers import GenerationConfig
from transformers.utils import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_SAFE_WEIGHTS_NAME,
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
)

from ..checkpoint_grinmoe import CheckpointFileError, StoredTensor, add_remote_code, check_weights, read_tensors
from ..configuration_grinmoe import GrinMoeConfig, read_json_object
from ..files import copy_files, physical_memory_bytes
from ..modeling_grinmoe import GrinMoeForCausalLM, GrinMoeForSequenceClassification, GrinMoeModel
from ..tokenization import check_tokenizer, load_tokenizer, template_difference
from .card import card_for
from .card_facts import FACTS_NAME
from .card_metadata import BASE_MODEL_TAG, is_repo_id
from .checks import ReleaseError, check_files, check_finite, check_source, is_taken, sha256_of
from .isolated_load import load_elsewhere, logits_without_the_package
from .options import ReleaseOptions
from .private_text import Private, secrets_of_environment
from .readme import CARD_NAME

_TOKENIZER, _TOKENIZER_SOURCE = "tokenizer.json", "tokenizer.model"
_LICENCE_FILES = ("LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE", "NOTICE.md", "NOTICE.txt")
_PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".svg", ".gif", ".webp")
_CLASSES: dict[str, Any] = {
    "AutoModelForCausalLM": GrinMoeForCausalLM,
    "AutoModelForSequenceClassification": GrinMoeForSequenceClassification,
    "AutoModel": GrinMoeModel,
}
_PROBE_TEXTS = ("Hello", "<|user|>\nHello<|end|>\n<|assistant|>\n", " two  spaces\n\ttab", "Zoë 😀", "")


@dataclass(frozen=True)
class ReleaseFile:
    """One file of a release, as it was when it was checked."""

    name: str
    path: Path
    size: int
    sha256: str


@dataclass
class Release:
    """An assembled and checked folder."""

    folder: Path
    is_adapter: bool
    card: ModelCard = field(init=False)
    files: list[ReleaseFile] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)


def make_release(model: str | os.PathLike, folder: Path, repo_id: str, options: ReleaseOptions) -> Release:
    """
    Assemble and check a release.

    Args:
        model: folder of a checkpoint, of a Trainer's checkpoint, or of a PEFT adapter. It is not changed.
        folder: empty; the release is made here.
        repo_id: where it will be published; the card says it.
        options: see there.

    Raises:
        ReleaseError: something must not be published, or is missing: what, and what to do.
        CheckpointError: the weights are broken, or not those of the config.
        TokenizerError: the tokenizer is not the model's.
        ValueError: the card's metadata, or the config.
        LoadElsewhereError: the release does not load by its own code.
    """
    source, is_adapter = _source_of(model)
    stamps = _stamps(source)
    release = Release(folder, is_adapter)
    if is_adapter:
        _assemble_adapter(source, release, options)
    else:
        _assemble_model(source, release, options)
    _write_card(source, release, repo_id, options)
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    present = (path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file())
    release.left_out = sorted(name for name in present if name not in (*names, FACTS_NAME))
    check_files(folder, names, _private(source, model), origin=source)
    release.files = _read(folder, names)
    if options.load_check:
        _check_by_loading(source, release)
    else:
        release.notes.append("not loaded for a check, as asked")
    # Whatever was checked before the files were hashed was checked of the same files.
    if _stamps(source) != stamps:
        raise ReleaseError(f"files in {source} changed while they were checked; push when nothing writes there")
    return release


def _source_of(model: str | os.PathLike) -> tuple[Path, bool]:
    """The model's folder, and whether it holds an adapter."""
    source = Path(model).expanduser()
    if not os.fspath(model) or not source.is_dir():
        raise ReleaseError(f"--model {model} is no folder; give that of a checkpoint or an adapter")
    check_source(source)
    is_adapter = (source / ADAPTER_CONFIG_NAME).is_file()
    weights = next((name for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME) if (source / name).is_file()), None)
    if is_adapter and weights:
        raise ReleaseError(
            f"{source} holds a model ({weights}) and an adapter ({ADAPTER_CONFIG_NAME}); put what you want to publish into "
            "a folder of its own"
        )
    if not is_adapter and not (source / CONFIG_NAME).is_file():
        raise ReleaseError(
            f"{source} holds neither {CONFIG_NAME} nor {ADAPTER_CONFIG_NAME}; give a checkpoint or an adapter"
        )
    return source, is_adapter


def _stamps(source: Path) -> dict[str, list[int]]:
    """
    What changes when something writes to a file that a release takes, or puts another one or a link in its place; the time
    of change tells that even when everything is put back.
    """
    stats = {path.name: (path.lstat(), path.stat()) for path in source.iterdir() if is_taken(path)}
    return {
        name: [value for stat in both for value in (stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)]
        for name, both in stats.items()
    }


# --- what goes in ------------------------------------------------------------------------------------------------------


def _assemble_model(source: Path, release: Release, options: ReleaseOptions) -> None:
    """Weights, config, code, generation config and tokenizer of a model."""
    try:
        config = GrinMoeConfig.from_pretrained(source)
    except (OSError, AttributeError, TypeError) as error:  # the last two: JSON that is no object
        raise ReleaseError(f"{source / CONFIG_NAME} cannot be read ({error}); save the model again") from error
    tensors = read_tensors(source)
    if tensors is None:
        raise CheckpointFileError(
            f"{source} holds no safetensors weights; save the model with save_pretrained (a sharded training state has to "
            "be gathered first: trainer.save_model)"
        )
    check_weights(tensors, config, source, head_keys=("score.",))
    # What is packed has no official layout.
    is_packed = getattr(config, "quantization_config", None) is not None
    if not is_packed and any(key.endswith(".experts.gate_up_proj") for key in tensors):
        raise ReleaseError(
            f"{source} has fused experts' weights, which other programs do not read; load the model and save it again "
            "with save_pretrained, which writes the official layout"
        )
    _link_weights(source, tensors, release.folder)
    config.architectures = [_CLASSES[_auto_class(tensors)].__name__]
    config.save_pretrained(release.folder)
    add_remote_code(release.folder)
    folder = _tokenizer_folder(source, options)
    if folder is None:
        raise ReleaseError(
            f"{source} holds no {_TOKENIZER}, without which nobody can use the model; save the tokenizer there "
            "(tokenizer.save_pretrained), or name its folder with --tokenizer"
        )
    tokenizer = _add_tokenizer(folder, config.vocab_size, release, options)
    ends = _as_set(config.eos_token_id)
    if ends and tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ends:
        release.notes.append(
            f"the tokenizer ends a text with {tokenizer.eos_token_id}, the config with {sorted(ends)}: answers may not end"
        )
    if _auto_class(tensors) == "AutoModelForCausalLM":
        _add_generation_config(source, config, tokenizer, release)


def _link_weights(source: Path, tensors: dict[str, StoredTensor], folder: Path) -> None:
    """Put the shards into the release without a copy: they may be as large as the disk."""
    copy_files([SAFE_WEIGHTS_INDEX_NAME], source, folder)
    for shard in sorted({tensor.file for tensor in tensors.values()}):
        if shard.parent != source:
            raise ReleaseError(
                f"{SAFE_WEIGHTS_INDEX_NAME} places tensors in {shard}, which is not a file of {source} itself; save the "
                "model again"
            )
        (folder / shard.name).symlink_to(shard.resolve())


def _auto_class(tensors: dict[str, StoredTensor]) -> str:
    if "score.weight" in tensors:
        return "AutoModelForSequenceClassification"
    return "AutoModelForCausalLM" if "lm_head.weight" in tensors else "AutoModel"


def _tokenizer_folder(source: Path, options: ReleaseOptions) -> Path | None:
    """Where the tokenizer is, None if there is none beside the weights and no folder was named."""
    if options.tokenizer is None:
        return source if (source / _TOKENIZER).is_file() else None
    folder = Path(options.tokenizer).expanduser()
    if folder.is_dir():
        check_source(folder)
    if not (folder / _TOKENIZER).is_file():
        raise ReleaseError(f"--tokenizer {options.tokenizer} holds no {_TOKENIZER}; give the folder of a tokenizer")
    return folder


def _add_tokenizer(folder: Path, vocab_size: int | None, release: Release, options: ReleaseOptions) -> Any:
    tokenizer = load_tokenizer(folder)
    check_tokenizer(tokenizer, vocab_size)
    if tokenizer.chat_template is None:
        release.notes.append("the tokenizer has no chat template: right for a base model, not for one that chats")
    elif not options.own_template and (difference := template_difference(tokenizer)):
        raise ReleaseError(
            f"the chat template of {folder} is not the family's: {difference}. Save the tokenizer with the template that "
            "the model was trained with; if that is this one, pass --own-template"
        )
    tokenizer.save_pretrained(release.folder)
    copy_files([_TOKENIZER_SOURCE], folder, release.folder)  # converters to other formats read it
    return tokenizer


def _add_generation_config(source: Path, config: GrinMoeConfig, tokenizer: Any, release: Release) -> None:
    end = tokenizer.get_vocab().get("<|end|>")
    if (source / GENERATION_CONFIG_NAME).is_file():
        try:
            generation = GenerationConfig.from_pretrained(source)
        except (OSError, TypeError, ValueError) as error:
            raise ReleaseError(f"{source / GENERATION_CONFIG_NAME} cannot be read ({error}); write it anew") from error
        shutil.copyfile(source / GENERATION_CONFIG_NAME, release.folder / GENERATION_CONFIG_NAME)
        ends = _as_set(generation.eos_token_id)
        if tokenizer.chat_template is not None and end is not None and end not in ends:
            release.notes.append(
                f"{GENERATION_CONFIG_NAME} ends an answer with {sorted(ends)}, a chat with <|end|> ({end}): it may go on"
            )
        return
    generation = GenerationConfig.from_model_config(config)
    ends = _as_set(config.eos_token_id) | ({end} if end is not None else set())
    generation.eos_token_id = sorted(ends) or None
    generation.save_pretrained(release.folder)
    release.notes.append(
        f"{GENERATION_CONFIG_NAME} was missing and is made from the config; answers end with {sorted(ends)}"
    )


def _assemble_adapter(source: Path, release: Release, options: ReleaseOptions) -> None:
    """An adapter's weights and config, which names its base model by its id on the Hub."""
    weights = source / ADAPTER_SAFE_WEIGHTS_NAME
    if not weights.is_file():
        raise CheckpointFileError(
            f"{source} holds no {ADAPTER_SAFE_WEIGHTS_NAME}; save the adapter with save_pretrained (no pickles)"
        )
    try:
        with safe_open(weights, framework="pt") as tensors:
            if not list(tensors.keys()):
                raise ReleaseError(f"{weights} holds no tensors; save the adapter again")
    except SafetensorError as error:
        raise CheckpointFileError(
            f"{weights} is truncated or not safetensors ({error}); save the adapter again"
        ) from error
    content = _adapter_config(source)
    base = options.card.base_model or content.get("base_model_name_or_path")
    if not isinstance(base, str) or Path(base).expanduser().is_dir() or not is_repo_id(base):
        raise ReleaseError(
            f"the adapter's base model is {base!r}, which is not a repository of the Hub; name the one that it was trained "
            "on with --base-model"
        )
    content["base_model_name_or_path"] = base
    (release.folder / ADAPTER_CONFIG_NAME).write_text(
        json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8"
    )
    (release.folder / ADAPTER_SAFE_WEIGHTS_NAME).symlink_to(weights.resolve())
    if folder := _tokenizer_folder(source, options):
        _add_tokenizer(folder, None, release, options)


def _adapter_config(source: Path) -> dict[str, Any]:
    return read_json_object(source / ADAPTER_CONFIG_NAME, ReleaseError, "save the adapter again")


def _write_card(source: Path, release: Release, repo_id: str, options: ReleaseOptions) -> None:
    """The card, the pictures that it shows, and licence texts."""
    parameters = None if release.is_adapter else _count_parameters(source)
    card = card_for(source, repo_id, overrides=options.card, parameters=parameters)
    # PEFT writes the base model into a tag too, a folder as it is. The Hub makes these tags itself, from base_model.
    card.data["tags"] = [tag for tag in card.data.get("tags") or [] if not tag.startswith(BASE_MODEL_TAG)] or None
    card.save(release.folder / CARD_NAME)
    release.card = card
    text = str(card)
    pictures = [path.name for path in source.iterdir() if path.suffix.lower() in _PICTURE_SUFFIXES]
    # As Markdown or HTML, and with what an address may not hold escaped.
    shown = [name for name in pictures if name in text or quote(name) in text]
    copy_files([*shown, *_LICENCE_FILES], source, release.folder)


def _count_parameters(source: Path) -> tuple[int, int]:
    """All parameters, and those that work on one token: K of the E experts."""
    config = GrinMoeConfig.from_pretrained(source)
    sizes = {key: math.prod(tensor.shape) for key, tensor in (read_tensors(source) or {}).items()}
    experts = sum(size for key, size in sizes.items() if ".experts." in key)
    idle = experts * (1 - config.num_experts_per_tok / config.num_local_experts)
    return sum(sizes.values()), round(sum(sizes.values()) - idle)


# --- checks ------------------------------------------------------------------------------------------------------------


def _check_by_loading(source: Path, release: Release) -> None:
    """Load the release as its users will, and compare with what this package makes of the source."""
    base = _local_base(source) if release.is_adapter else None
    if release.is_adapter and base is None:
        release.notes.append("not loaded for a check: its base model, with its code, is in no folder of this machine")
        return
    _check_memory(base or source)
    auto_class = _auto_class(read_tensors(base or source) or {})
    if base and _replaces_head(source, auto_class):
        release.notes.append("not loaded for a check: it puts another head on its base model")
        return
    input_ids, logits = _logits_here(source, base, auto_class)
    texts = _PROBE_TEXTS if (release.folder / _TOKENIZER).is_file() and not base else ()
    found = load_elsewhere(
        release.folder,
        input_ids,
        logits,
        auto_class=auto_class,
        texts=texts,
        base_model=str(base) if base else None,
        quiet=True,
    )
    if texts:
        tokenizer = load_tokenizer(release.folder)
        if found.token_ids != [tokenizer(text).input_ids for text in texts]:
            raise ReleaseError("AutoTokenizer gives other ids without this package; build the tokenizer again")
    release.notes.append("loaded in a process without this package: same logits" + (", same ids" if texts else ""))


def _replaces_head(adapter: Path, auto_class: str) -> bool:
    """Whether an adapter has a head that its base model lacks. The number of its labels is not recorded."""
    classifies = _adapter_config(adapter).get("task_type") == "SEQ_CLS"
    return classifies != (auto_class == "AutoModelForSequenceClassification")


def _logits_here(source: Path, base: Path | None, auto_class: str) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Compute with this package what the isolated process has to reproduce.

    Args:
        source: folder of the model, or of an adapter for the model in `base`.
        base: None for a model.
        auto_class: key of `_CLASSES`.

    Returns:
        Token ids (16,) int64; logits (1, 16, V), (1, labels) or hidden states (1, 16, H), in the checkpoint's dtype.

    Raises:
        ReleaseError: the logits are not finite, or the package peft is missing.
    """
    model = _CLASSES[auto_class].from_pretrained(base or source, dtype="auto")
    if base:
        try:
            from peft import PeftModel
        except ImportError as error:
            raise ReleaseError(
                "loading an adapter for a check needs the package peft; install it, or pass --no-load-check"
            ) from error
        model = PeftModel.from_pretrained(model, source)
    input_ids = torch.arange(16) * model.config.vocab_size // 16
    logits = logits_without_the_package(model, input_ids)
    if not torch.isfinite(logits).all():
        raise ReleaseError(f"{source} gives logits that are not finite (NaN or infinite); its weights are broken")
    return input_ids, logits


def _check_memory(weights: Path) -> None:
    needed = sum(file.stat().st_size for file in weights.glob("*.safetensors"))
    memory = physical_memory_bytes()
    if needed > 0.9 * memory:
        raise ReleaseError(
            f"loading the model for a check needs {needed / 2**30:.0f} GiB of memory, this machine has "
            f"{memory / 2**30:.0f}; pass --no-load-check to publish it without, or do it on a larger machine"
        )


def _local_base(source: Path) -> Path | None:
    """The folder of an adapter's base model, if it was trained on one that loads by its own code."""
    base = Path(_adapter_config(source).get("base_model_name_or_path") or "").expanduser().resolve()
    return base if (base / CONFIG_NAME).is_file() and (base / "modeling_grinmoe.py").is_file() else None


def _private(source: Path, model: str | os.PathLike) -> Private:
    """The secrets that are in use here, and where the model and the user live, as these could stand in a file."""
    secrets = secrets_of_environment()
    # A shorter one ("test" for a Hub of one's own) may stand in any text by chance.
    if (token := get_token()) and (len(token) >= 16 or re.fullmatch("hf_.{6,}", token)):
        secrets = {"the token in use": token, **secrets}
    given = Path(os.path.abspath(Path(model).expanduser()))
    paths = {str(path) for path in (source.resolve(), given, Path.home(), Path.cwd()) if len(path.parts) > 2}
    return Private(secrets, tuple(sorted(paths, key=len, reverse=True)))


def _read(folder: Path, names: list[str]) -> list[ReleaseFile]:
    """Hash every file and look at every weight, a file at a time: what is read twice is in memory the second time."""
    total = sum((folder / name).stat().st_size for name in names)
    console = Console(stderr=True)
    files = []
    for name in track(names, "reading", console=console, transient=True, disable=total < 10**9):
        path = folder / name
        files.append(ReleaseFile(name, path, path.stat().st_size, sha256_of(path)))
        if path.suffix == ".safetensors":
            check_finite(path)
    return files


def _as_set(ids: Any) -> set[int]:
    return set(ids) if isinstance(ids, (list, tuple)) else {ids} - {None}
