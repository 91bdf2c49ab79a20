"""What must not be published: pickles, secrets, local paths, training state, broken weights, too large files."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open

from ..files import kind_of, leads_out
from .contents import is_sentencepiece, runs_code, texts_of_picture
from .private_text import Finding, Private

# Of huggingface_hub.constants.MAX_HTTP_DOWNLOAD_SIZE: larger files cannot be fetched by plain HTTP.
HUB_FILE_LIMIT_BYTES = 50 * 10**9
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
# What a release takes of a folder, or lets Transformers read there. Pictures count when the card shows them.
_TAKEN = re.compile(
    r"(config|generation_config|adapter_config|card|special_tokens_map|added_tokens|tokenizer_config|tokenizer|vocab)\.json"
    r"|tokenizer\.model|merges\.txt|vocab\.txt|chat_template\.(jinja|json)|additional_chat_templates|README\.md"
    r"|(LICENSE|NOTICE)(\.md|\.txt)?|[^/]*\.safetensors(\.index\.json)?"
)
_TEXT_LIMIT_BYTES = 100 * 2**20  # of everything but weights: these files are read whole
_SHOWN_PROBLEMS = 10


class ReleaseError(ValueError):
    """A folder that must not be published as it is: what is wrong in which file, and what to do."""


def check_source(folder: Path) -> None:
    """
    Look at what a release would take of a folder, before anything is opened.

    Weights may be links to other places, because only tensors of the config's names and shapes pass for weights. A snapshot
    in the Hub's cache consists of links, which are followed.

    Raises:
        ReleaseError: a link leads out of the folder, or nowhere; something is a FIFO, device or folder in place of a file;
            or a file is too large.
    """
    for path in sorted(filter(is_taken, folder.iterdir())):
        is_folder = path.name == "additional_chat_templates" and path.is_dir()
        for entry in (path, *(sorted(path.iterdir()) if is_folder and not leads_out(path, folder) else ())):
            _check_entry(entry, folder, is_folder and entry == path)


def is_taken(path: Path) -> bool:
    """Whether a release takes a file of this name, or Transformers reads it for one."""
    return _TAKEN.fullmatch(path.name) is not None


def _check_entry(entry: Path, folder: Path, is_folder: bool) -> None:
    if not entry.exists():
        raise ReleaseError(f"{entry} is a link that leads nowhere; put the file itself there, or remove the link")
    if entry.suffix != ".safetensors" and leads_out(entry, folder):
        raise ReleaseError(
            f"{entry} is a link to {entry.resolve()}, which is outside of {folder} and could be private; put the file "
            "itself there, or remove the link"
        )
    if not is_folder and not entry.is_file():
        raise ReleaseError(f"{entry} is {kind_of(entry)} and not a file; put the file itself there, or remove it")
    if entry.suffix != ".safetensors" and (size := entry.stat().st_size) > _TEXT_LIMIT_BYTES:
        raise ReleaseError(
            f"{entry} has {size / 2**20:.0f} MiB; a release takes files up to {_TEXT_LIMIT_BYTES / 2**20:.0f} MiB besides "
            "weights; make it smaller, or remove it"
        )


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
    if not name.isprintable():
        yield f"{name!r} has characters in its name that cannot be shown; rename it"
    if TRAINING_STATE.fullmatch(file.name):
        yield f"{name} is training state, which a release does not need; leave it out"
    elif kind := runs_code(file):
        yield f"{name} is {kind}, which can run code when it is loaded; convert it to safetensors or leave it out"
    elif (magic := _PICTURES.get(file.suffix.lower())) and not re.match(magic, _start(file), re.DOTALL):
        yield f"{name} is no picture, whatever it is; draw it again or leave it out"
    elif file.suffix == ".safetensors":
        metadata, keys = _metadata_and_keys(file)
        for finding in (*private.in_text(metadata, metadata=True), *private.in_text(keys)):
            yield f"the metadata of {name}: {finding.what}"
    elif file.suffix.lower() in _BINARY_SUFFIXES or file.name in _VOCABULARIES:
        yield from _binary_problems(file, name, private)
    else:
        yield from _text_problems(file, name, private, origin)


def _binary_problems(file: Path, name: str, private: Private) -> Iterator[str]:
    """In vocabularies anything may stand, so only what is known to be private counts there."""
    content = file.read_bytes()
    for what in private.in_bytes(content):
        yield f"{name}: {what}; remove it, and revoke it if it is secret and others could see it"
    if file.suffix.lower() in _PICTURES:
        for finding in private.in_text(texts_of_picture(content)):
            yield f"the metadata of {name}: {finding.what}"
    elif file.suffix == ".model" and not is_sentencepiece(content):
        yield f"{name} is not a SentencePiece model; take the tokenizer's own, or leave it out"
    elif file.suffix == ".json":
        for finding in private.in_text(_without_vocabulary(content), metadata=True):
            yield f"{name}: {finding.what}"


def _text_problems(file: Path, name: str, private: Private, origin: Path | None) -> Iterator[str]:
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:  # UTF-16 is UTF-8 with zeros in between
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


def _start(file: Path) -> bytes:
    with file.open("rb") as opened:
        return opened.read(16)


def _metadata_and_keys(file: Path) -> tuple[str, str]:
    """One entry a line, so that a pattern does not reach from one into the next."""
    with safe_open(file, framework="pt") as tensors:
        metadata = json.dumps(tensors.metadata() or {}, indent=0, ensure_ascii=False)
        return metadata, "\n".join(tensors.keys())


def _without_vocabulary(content: bytes) -> str:
    """A tokenizer's JSON but for its vocabulary and merges, one entry a line."""
    try:
        tokenizer = json.loads(content)
    except ValueError:
        return ""
    if not isinstance(tokenizer, dict) or not isinstance(model := tokenizer.get("model"), dict):
        return ""
    rest = {name: value for name, value in model.items() if name not in ("vocab", "merges")}
    return json.dumps({**tokenizer, "model": rest}, indent=0, ensure_ascii=False)


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
