"""What must not be published: pickles, secrets, local paths, training state, broken weights, too large files."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open

from .private_text import Finding, Private

# Of huggingface_hub.constants.MAX_HTTP_DOWNLOAD_SIZE: larger files cannot be fetched by plain HTTP.
HUB_FILE_LIMIT_BYTES = 50 * 10**9
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".dill", ".ckpt", ".joblib", ".npy", ".npz")
# What a Trainer leaves beside a checkpoint; none of it is needed to use the model.
TRAINING_STATE = re.compile(
    r"(optimizer|scheduler|scaler|training_args|rng_state(_\d+)?)\.(pt|pth|bin)|trainer_state\.json|zero_to_fp32\.py|latest"
)
_METADATA_SUFFIXES = (".json", ".yaml", ".yml")
# Not text, or vocabularies: they are of the training corpus, and anything may stand in that.
_BINARY_SUFFIXES = (".png", ".jpg", ".jpeg", ".gif", ".webp", ".model")
_PICTURES = {
    ".png": rb"\x89PNG",
    ".jpg": rb"\xff\xd8\xff",
    ".jpeg": rb"\xff\xd8\xff",
    ".gif": rb"GIF8",
    ".webp": rb"RIFF....WEBP",
}
_VOCABULARIES = ("tokenizer.json", "vocab.json", "merges.txt")
_SHOWN_PROBLEMS = 10


class ReleaseError(ValueError):
    """A folder that must not be published as it is: what is wrong in which file, and what to do."""


def check_files(folder: Path, names: Iterable[str], private: Private, origin: Path | None = None) -> None:
    """
    Look into every file that would be published.

    Args:
        folder: the assembled release.
        names: its files, relative to the folder.
        private: what must not be in any of them.
        origin: the folder that it was made of: line numbers are of the files there, which can be corrected.

    Raises:
        ReleaseError: what was found.
    """
    found = [problem for name in names for problem in _problems(folder / name, name, private, origin)]
    if found:
        more = f"; and {len(found) - _SHOWN_PROBLEMS} more" if len(found) > _SHOWN_PROBLEMS else ""
        raise ReleaseError("; ".join(found[:_SHOWN_PROBLEMS]) + more)


def _problems(file: Path, name: str, private: Private, origin: Path | None) -> Iterator[str]:
    size = file.stat().st_size
    if size > HUB_FILE_LIMIT_BYTES:
        yield (
            f"{name} has {size / 1e9:.1f} GB, the Hub takes files up to {HUB_FILE_LIMIT_BYTES / 1e9:.0f} GB; save the model "
            "with smaller shards (max_shard_size)"
        )
    if TRAINING_STATE.fullmatch(file.name):
        yield f"{name} is training state, which a release does not need; leave it out"
    elif is_pickle(file):
        yield f"{name} is a pickle, which can run code when it is loaded; convert it to safetensors or leave it out"
    elif (magic := _PICTURES.get(file.suffix.lower())) and not re.match(magic, _start(file), re.DOTALL):
        yield f"{name} is no picture, whatever it is; draw it again or leave it out"
    elif file.suffix == ".safetensors":
        for finding in private.in_text(_metadata(file), metadata=True):
            yield f"the metadata of {name}: {finding.what}"
    elif file.suffix.lower() in _BINARY_SUFFIXES or file.name in _VOCABULARIES:
        for what in private.in_bytes(file.read_bytes()):
            yield f"{name}: {what}; remove it, and revoke it if it is secret and others could see it"
    else:
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            yield f"{name} is not UTF-8 text; convert it"
            return
        for finding in private.in_text(text, metadata=file.suffix in _METADATA_SUFFIXES):
            yield f"{name}, line {_line_in(origin, name, finding)}: {finding.what}"


def _line_in(origin: Path | None, name: str, finding: Finding) -> int:
    """The line in the file that the user has: publishing may have put metadata above it, or sorted it."""
    source = origin / name if origin else None
    if source is None or not source.is_file():
        return finding.line
    lines = source.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((number for number, line in enumerate(lines, 1) if finding.match in line), finding.line)


def is_pickle(file: Path) -> bool:
    """By name, or by the first bytes: a pickle protocol, or the zip archive that torch.save writes."""
    if file.suffix.lower() in PICKLE_SUFFIXES:
        return True
    return re.match(rb"\x80[\x02-\x05]|PK\x03\x04", _start(file)) is not None


def _start(file: Path) -> bytes:
    with file.open("rb") as opened:
        return opened.read(16)


def _metadata(file: Path) -> str:
    """One entry a line, so that a pattern does not reach from one into the next."""
    with safe_open(file, framework="pt") as tensors:
        return json.dumps(tensors.metadata() or {}, indent=0, ensure_ascii=False)


def check_finite(weights: Path) -> None:
    """
    Read a file of safetensors, a tensor at a time.

    Raises:
        ReleaseError: NaN or infinite values, which no forward need show: an expert may be chosen by few tokens.
    """
    with safe_open(weights, framework="pt") as tensors:
        for key in list(tensors.keys()):
            tensor = tensors.get_tensor(key)
            # Float8 has no isfinite.
            values = tensor.float() if tensor.is_floating_point() and tensor.element_size() == 1 else tensor
            if wrong := int((~torch.isfinite(values)).sum()):
                raise ReleaseError(
                    f"{weights.name}: {key} has {wrong} values that are NaN or infinite; the training has diverged: publish "
                    "an earlier checkpoint"
                )


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
