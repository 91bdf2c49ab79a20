"""A README.md that is already in a folder: somebody's own, a trainer's report, or a form that nobody has filled in."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from transformers.utils import ADAPTER_CONFIG_NAME

from ..configuration_grinmoe import read_json_object
from .card_metadata import BASE_MODEL_TAG, as_list, check_metadata, data_of, eval_results

CARD_NAME = "README.md"

# What PEFT and Transformers put into the client's template by themselves.
_FIELDS_OF_LIBRARIES = {"base_model", "library_name", "pipeline_tag", "tags"}
_LINES_OF_LIBRARIES = ("### Framework versions", "- PEFT ", "This is the model card of a 🤗 transformers model")

# The Trainer asks in a comment to take it away when the card has been completed; TRL's card says this of itself.
_TRAINER_MARKS = (
    "<!-- This model card has been generated automatically according to the information the Trainer had access to.",
    "It has been trained using [TRL](https://github.com/huggingface/trl)",
)
# These sections load the model by a name that may be missing, and cite the library.
_DROPPED_SECTIONS = ("Quick start", "Citations", "Citation")


def read_readme(folder: Path) -> str:
    """
    Read README.md with its line ends; a missing file is an empty text.

    Raises:
        ValueError: it is not UTF-8.
    """
    path = folder / CARD_NAME
    if not path.is_file():
        return ""
    try:
        # -sig: a byte-order mark would hide the metadata from clients before 2.0.
        with path.open(encoding="utf-8-sig", newline="") as file:
            return file.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}); convert it") from error


def is_blank(text: str) -> bool:
    """Whether a README.md has no text, or is the client's template as PEFT and Transformers leave it."""
    if "[More Information Needed]" not in text:
        return not text.strip()
    metadata, body = _split(text)
    form = {line.strip() for line in ModelCard.from_template(ModelCardData()).text.splitlines()}
    lines = {line.strip() for line in body.splitlines()} - form
    fields = set(re.findall(r"^([\w-]+):", metadata, flags=re.MULTILINE))
    return fields <= _FIELDS_OF_LIBRARIES and all(line.startswith(_LINES_OF_LIBRARIES) for line in lines)


def what_the_trainer_wrote(text: str) -> str | None:
    """
    The account of the training in a README.md that the Trainer or TRL generated.

    Returns:
        Markdown without the sections that say nothing, its headings of the fourth level; None for a card that was not
        generated.
    """
    if not any(mark in text for mark in _TRAINER_MARKS):
        return None
    body = re.sub(r"<!--.*?-->", "", _split(text)[1], flags=re.DOTALL)
    parts = []
    for number, (heading, lines) in enumerate(_sections(body)):
        said = "\n".join(line for line in lines if "](https://huggingface.co/None)" not in line).strip()
        if heading in _DROPPED_SECTIONS or said in ("", "More information needed"):
            continue
        # The first heading is the card's title.
        parts.append(said if number <= 1 else f"#### {heading}\n\n{said}")
    return "\n\n".join(parts)


def _sections(body: str) -> Iterator[tuple[str, list[str]]]:
    """Heading and lines of each section; the first has no heading. Lines of code blocks are not headings."""
    heading, is_code = "", False
    lines: list[str] = []
    for line in body.splitlines():
        is_code ^= line.startswith("```")
        match = None if is_code else re.match(r"#{1,4} +(.+)", line)
        if match:
            yield heading, lines
            heading, lines = match[1].strip(), []
        else:
            lines.append(line)
    yield heading, lines


def completed(
    text: str, folder: Path, changes: dict[str, Any], config: dict[str, Any], repo_id: str | None, tags: list[str]
) -> ModelCard:
    """
    Add the metadata that a README.md lacks, and what the user says, to a card that otherwise stays as it is.

    Args:
        text: of README.md.
        folder: where it lies, beside the model.
        changes: from `CardOverrides.changes`.
        config: content of config.json.
        repo_id: names the model beside its results.
        tags: for a card that has none.

    Raises:
        ValueError: the metadata cannot be read, or the Hub would not take it.
    """
    card, written = _parsed(text, folder / CARD_NAME)
    data = data_of(card)
    if "base_model" in changes:
        data.tags = [tag for tag in data.tags or [] if not str(tag).startswith(BASE_MODEL_TAG)]
    _fill_gaps(data, folder, config, tags)
    for name in changes.keys() - {"evaluations", "picture"}:
        data[name] = changes[name] or None
    if "evaluations" in changes:
        data.eval_results = eval_results(changes["evaluations"])
        data.model_name = data.model_name or (repo_id or "GRIN MoE").split("/")[-1]
    elif "model-index" in written:
        # The client's classes would put results together that differ in their arguments, so the YAML is kept.
        data.eval_results = data.model_name = None
        data["model-index"] = written["model-index"]
    picture = quote(changes.get("picture") or "")
    if picture and f"]({picture})" not in card.text:
        card.text = f"{card.text.rstrip()}\n\n![What happened during training]({picture})\n"
    check_metadata(card)
    return card


def _parsed(text: str, path: Path) -> tuple[ModelCard, dict[str, Any]]:
    """The card, and its metadata as YAML gives them."""
    block = REGEX_YAML_BLOCK.search(text)
    if text.lstrip().startswith("---") and not block:
        raise ValueError(f"the metadata at the top of {path} has no end; close it with a line of --- alone")
    try:
        card = ModelCard(text)
        written = yaml.safe_load(_split(text)[0]) or {}
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise ValueError(
            f"the metadata at the top of {path} cannot be read ({' '.join(str(error).split())}); correct the lines between "
            "the two ---, or remove the file"
        ) from error
    if isinstance(written.get("tags"), str):
        data_of(card).tags = [written["tags"]]  # clients before 2.0 take a text apart into letters
    return card, written


def _fill_gaps(data: ModelCardData, folder: Path, config: dict[str, Any], tags: list[str]) -> None:
    """Set the library, the base model of an adapter, the task and the tags where a card does not name them."""
    data.tags = data.tags or tags
    if library_of(folder) == "peft":
        data.library_name = "peft"
        adapter = folder / ADAPTER_CONFIG_NAME
        if not data.base_model:
            data.base_model = read_json_object(adapter, remedy="write it anew").get("base_model_name_or_path")
    data.library_name = data.library_name or "transformers"
    data.pipeline_tag = data.pipeline_tag or pipeline_of(config)


def _split(text: str) -> tuple[str, str]:
    """The YAML at the top of a card, and the text below it."""
    block = REGEX_YAML_BLOCK.search(text)
    return (block.group(2), text[block.end() :]) if block else ("", text)


def pipeline_of(config: dict[str, Any]) -> str:
    """The Hub's name for the task of a model with this config."""
    names = as_list(config.get("architectures"))
    return "text-classification" if any("SequenceClassification" in str(name) for name in names) else "text-generation"


def library_of(folder: Path) -> str:
    """The library that loads what is in a folder: "peft" for an adapter."""
    adapter = (folder / ADAPTER_CONFIG_NAME).is_file() and not (folder / "config.json").is_file()
    return "peft" if adapter else "transformers"
