"""The model card, a checkpoint's README.md on the Hub: made of what its training run knew, or of what its folder says.

The text is model_card.md with the facts of one checkpoint put in; the metadata is written by the Hub's own client.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from transformers import PreTrainedConfig

from ..provenance import markdown_table
from .card_facts import FACTS_NAME, CardFacts, Evaluation, read_evaluations
from .card_metadata import BASE_MODEL_TAG, as_list, card_data, check_metadata, check_repo_id, data_of, eval_results
from .options import CardOverrides
from .trainer_card import what_the_trainer_wrote

CARD_NAME = "README.md"
_TEMPLATE = Path(__file__).parents[1] / "model_card.md"
# Where the template is cut: the facts go in here, and this part is another for adapters and classifiers.
_CHECKPOINT, _LOAD, _END_OF_LOAD = "<!-- checkpoint -->", "<!-- load -->", "<!-- end of load -->"
_PLACE = "PATH_OR_ID"

# What a card tells of config.json, in this order.
_SIZES = {
    "num_hidden_layers": "layers",
    "num_local_experts": "experts in a layer",
    "num_experts_per_tok": "experts that work on a token",
    "hidden_size": "hidden size",
    "intermediate_size": "width of an expert",
    "num_attention_heads": "attention heads",
    "num_key_value_heads": "key and value heads",
    "vocab_size": "vocabulary",
    "max_position_embeddings": "longest text, in tokens",
    "router_estimator": "gradient of the router",
}

_MADE = {
    None: "Made from",
    "finetune": "Fine-tuned from",
    "adapter": "An adapter for",
    "quantized": "Quantized from",
    "merge": "Merged from",
}

# What PEFT and Transformers put into the client's template by themselves.
_FIELDS_OF_LIBRARIES = {"base_model", "library_name", "pipeline_tag", "tags"}
_LINES_OF_LIBRARIES = ("### Framework versions", "- PEFT ", "This is the model card of a 🤗 transformers model")

_LOAD_ADAPTER = """```python
import grinmoe  # registers the model
from peft import PeftModel
from transformers import {auto_class}, AutoTokenizer

base = {auto_class}.from_pretrained({base}, dtype="auto")
model = PeftModel.from_pretrained(base, {place})
tokenizer = AutoTokenizer.from_pretrained({base})
```

This repository holds an adapter: small matrices beside the weights of the base model, which are loaded from their own place.
It needs the packages `grinmoe` and `peft`."""

_LOAD_CLASSIFIER = """```python
from transformers import AutoModelForSequenceClassification, AutoTokenizer

model = AutoModelForSequenceClassification.from_pretrained({place}, trust_remote_code=True, dtype="auto")
tokenizer = AutoTokenizer.from_pretrained({place}, trust_remote_code=True)
print(model(**tokenizer("Some text", return_tensors="pt")).logits)
```
"""


def _changes(said: CardOverrides) -> dict[str, Any]:
    """
    The fields of `CardFacts` that a user has said, with the results read from their file.

    Raises:
        ValueError: the license has no name, or the file cannot be used.
        OSError: there is no such file.
    """
    changes: dict[str, Any] = {}
    if said.license == "other" and not said.license_name:
        raise ValueError("license='other' needs a license_name; give one, and a license_link to its text")
    if said.license is not None:
        changes |= {"license": said.license, "license_name": None, "license_link": None}
    for name in ("license_name", "license_link", "base_model", "base_model_relation", "picture"):
        if (value := getattr(said, name)) is not None:
            changes[name] = value
    for name in ("datasets", "language"):
        if (values := getattr(said, name)) is not None:
            changes[name] = list(values)
    if said.evaluations is not None:
        changes["evaluations"] = read_evaluations(said.evaluations)
    return changes


def render_card(facts: CardFacts, repo_id: str | None = None) -> ModelCard:
    """
    The card of one checkpoint.

    Args:
        facts: what is known of it.
        repo_id: where it will be on the Hub, so that the example loads it from there.

    Returns:
        The card; `.save(path)` writes it.

    Raises:
        ValueError: a fact is wrong, or the Hub would not take the metadata (see `check_metadata`).
    """
    facts.validate()
    if repo_id is not None:
        check_repo_id(repo_id)
    template = _template()
    heading, rest = template.text.split(_CHECKPOINT)
    to_load, rest = rest.split(_LOAD)
    how_to_load, rest = rest.split(_END_OF_LOAD)
    # The template is cut before anything is put in: what somebody wrote about a checkpoint is never searched for marks.
    introduction = heading.strip().split("\n", 1)[1].strip()
    sections = list(_checkpoint_sections(facts))
    text = "".join(
        [
            f"\n# {' '.join(facts.title.split())}\n\n{facts.summary.strip()}\n\n{introduction}",
            "\n\n".join(["\n\n## This checkpoint", *sections]) if sections else "",
            to_load,
            _how_to_load(how_to_load.strip(), facts, repo_id),
            rest,
        ]
    )
    card = ModelCard(f"---\n{card_data(facts, data_of(template).tags or [], repo_id).to_yaml()}\n---\n{text}")
    check_metadata(card)
    return card


def card_for(
    folder: str | os.PathLike,
    repo_id: str | None = None,
    config: PreTrainedConfig | dict[str, Any] | None = None,
    overrides: CardOverrides | None = None,
    parameters: tuple[int, int] | None = None,
) -> ModelCard:
    """
    The card that publishing a model's folder would give it. Nothing is written.

    With card.json it is rendered from that, whatever README.md there is. Else a README.md that somebody wrote is kept, and
    only its metadata is completed. Else (there is none, it is empty, or PEFT's or Transformers' form with nothing filled in)
    it is rendered from config.json (of an adapter: adapter_config.json).

    Args:
        folder: of a checkpoint or an adapter.
        repo_id: where it will be on the Hub.
        config: of the model; None reads config.json.
        overrides: what the user says about it.
        parameters: all parameters, and those that work on one token.

    Raises:
        ValueError: a file cannot be used, README.md was edited beside card.json, the picture is not there, or the Hub would
            not take the metadata.
        OSError: there is no such folder, or a file cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}; give that of a checkpoint")
    if repo_id is not None:
        check_repo_id(repo_id)
    changes = _changes(overrides or CardOverrides())
    described = _config_of(folder, config)
    text = _text_of(folder / CARD_NAME)
    has_facts = (folder / FACTS_NAME).is_file()
    if not has_facts and not _is_blank(text) and what_the_trainer_wrote(text) is None:
        card = _completed(text, folder / CARD_NAME, changes, described, repo_id)
        picture = overrides.picture
    else:
        facts = replace(_facts_of(folder, described, repo_id, changes), **changes)
        architecture = dict(facts.architecture or _architecture(described))
        if has_facts and not _is_blank(text):
            _refuse_edited(text, folder, replace(CardFacts.read(folder), architecture=architecture))
        if parameters is not None:
            architecture["parameters"] = f"{parameters[0]:,}, of which {parameters[1]:,} work on a token"
        card = render_card(replace(facts, architecture=architecture), repo_id)
        picture = facts.picture
    if picture is not None and (Path(picture).name != picture or not (folder / picture).is_file()):
        raise ValueError(f"picture={picture!r} is no file in {folder}; put it there, or name another one")
    return card


# --- text --------------------------------------------------------------------------------------------------------------


def _template() -> ModelCard:
    return ModelCard(_TEMPLATE.read_text(encoding="utf-8"))


def _checkpoint_sections(facts: CardFacts) -> Iterator[str]:
    if facts.base_model:
        bases = ", ".join(f"[{name}](https://huggingface.co/{name})" for name in as_list(facts.base_model))
        yield f"{_MADE[facts.base_model_relation]} {bases}."
    if facts.architecture:
        yield "### Sizes\n\n" + _two_columns(facts.architecture)
    if facts.data.strip() or facts.datasets:
        ids = ", ".join(f"[{name}](https://huggingface.co/datasets/{name})" for name in facts.datasets)
        yield "### Training data\n\n" + "\n\n".join(part for part in (facts.data.strip(), ids) if part)
    if facts.hyperparameters:
        yield "### Hyperparameters\n\n" + _two_columns(facts.hyperparameters)
    if facts.procedure.strip():
        yield "### Training procedure\n\n" + facts.procedure.strip()
    if facts.measurements:
        yield "### Measurements\n\n" + _two_columns(facts.measurements)
    if facts.picture:
        yield f"![What happened during training]({quote(facts.picture)})"
    if facts.evaluations:
        yield "### Evaluation\n\n" + _evaluation_table(facts.evaluations)


def _two_columns(entries: dict[str, Any]) -> str:
    return markdown_table(["", ""], [[_cell(name), _cell(value)] for name, value in entries.items()])


def _evaluation_table(evaluations: list[Evaluation]) -> str:
    rows = []
    for e in evaluations:
        part = ", ".join(part for part in (e.dataset_config, e.dataset_split) if part)
        data = f"{e.dataset_name} ({part})" if part else e.dataset_name
        shots = "" if e.shots is None else e.shots
        rows.append([_cell(data), _cell(e.metric_name), shots, _cell(e.value)])
    return markdown_table(["data", "metric", "shots", "value"], rows)


def _cell(value: Any) -> str:
    """A value in a cell of a Markdown table: one line, and nothing in it that Markdown would read."""
    if isinstance(value, list):
        value = ", ".join(_plain(item) for item in value)
    return re.sub(r"([\\|`*<\[])", r"\\\1", " ".join(_plain(value).split()))


def _plain(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _how_to_load(template: str, facts: CardFacts, repo_id: str | None) -> str:
    place = _PLACE if repo_id is None else json.dumps(repo_id)
    classifies = facts.pipeline_tag == "text-classification"
    explained = template[template.index("```\n") + len("```\n") :]
    if facts.library_name == "peft":
        auto_class = "AutoModelForSequenceClassification" if classifies else "AutoModelForCausalLM"
        base = json.dumps(as_list(facts.base_model)[0], ensure_ascii=False)
        text = _LOAD_ADAPTER.format(auto_class=auto_class, base=base, place=place)
        return text if repo_id else f"{text}\n\n`{_PLACE}` is the folder of this file, or its id on the Hub."
    text = _LOAD_CLASSIFIER.format(place=place) + explained if classifies else template
    if repo_id is None:
        return text
    paragraphs = [part for part in text.split("\n\n") if not part.startswith(f"`{_PLACE}`")]
    return "\n\n".join(paragraphs).replace(_PLACE, place)


# --- a README.md that is there ----------------------------------------------------------------------------------------


def _is_blank(text: str) -> bool:
    """Whether nobody has written a line of it: no text, or the client's template as PEFT and Transformers leave it."""
    if "[More Information Needed]" not in text:
        return not text.strip()
    block = REGEX_YAML_BLOCK.search(text)
    body, metadata = (text[block.end() :], block.group(2)) if block else (text, "")
    form = {line.strip() for line in ModelCard.from_template(ModelCardData()).text.splitlines()}
    lines = {line.strip() for line in body.splitlines()} - form
    fields = set(re.findall(r"^([\w-]+):", metadata, flags=re.MULTILINE))
    return fields <= _FIELDS_OF_LIBRARIES and all(line.startswith(_LINES_OF_LIBRARIES) for line in lines)


def _refuse_edited(text: str, folder: Path, facts: CardFacts) -> None:
    """Raise ValueError if somebody has changed a README.md that was made of card.json: it would be lost."""
    try:
        made = str(render_card(facts))
    except ValueError:  # a local base model, say: there is no card of it yet
        return
    if text.replace("\r\n", "\n").strip() != made.strip():
        raise ValueError(
            f"{folder / CARD_NAME} is not what {FACTS_NAME} beside it makes: it was edited, or is of another version. "
            f"Remove {FACTS_NAME} to publish {CARD_NAME} as it is, or remove {CARD_NAME} to have it made anew"
        )


def _completed(
    text: str, path: Path, changes: dict[str, Any], config: dict[str, Any], repo_id: str | None
) -> ModelCard:
    """A README.md as it is, with metadata that it lacks and that the user gave."""
    if text.lstrip().startswith("---") and not REGEX_YAML_BLOCK.search(text):
        raise ValueError(f"the metadata at the top of {path} has no end; close it with a line of --- alone")
    try:
        block = REGEX_YAML_BLOCK.search(text)
        written = (yaml.safe_load(block.group(2)) if block else None) or {}
        card = ModelCard(text)
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise ValueError(
            f"the metadata at the top of {path} cannot be read ({' '.join(str(error).split())}); correct the lines between "
            "the two ---, or remove the file"
        ) from error
    data = data_of(card)
    if isinstance(written.get("tags"), str):
        data.tags = [written["tags"]]  # clients before 2.0 take a text apart into letters
    if "base_model" in changes:
        data.tags = [tag for tag in data.tags or [] if not str(tag).startswith(BASE_MODEL_TAG)]
    data.tags = data.tags or data_of(_template()).tags
    if _library_of(path.parent) == "peft":
        data.library_name = "peft"
        data.base_model = data.base_model or _read_object(path.parent / "adapter_config.json").get(
            "base_model_name_or_path"
        )
    data.library_name = data.library_name or "transformers"
    data.pipeline_tag = data.pipeline_tag or _pipeline_of(config)
    if (evaluations := changes.get("evaluations")) is not None:
        data.eval_results = eval_results(evaluations)
        data.model_name = data.model_name or (repo_id or "GRIN MoE").split("/")[-1]
    elif "model-index" in written:
        # As it was written: the client would put results together that differ in their arguments.
        data.eval_results = data.model_name = None
        data["model-index"] = written["model-index"]
    for name, value in changes.items():
        if name not in ("evaluations", "picture"):
            data[name] = value or None
    picture = changes.get("picture")
    if picture is not None and f"]({quote(picture)})" not in card.text:
        card.text = f"{card.text.rstrip()}\n\n![What happened during training]({quote(picture)})\n"
    check_metadata(card)
    return card


# --- what a folder says ------------------------------------------------------------------------------------------------


def _facts_of(folder: Path, config: dict[str, Any], repo_id: str | None, changes: dict[str, Any]) -> CardFacts:
    """The facts in card.json, or those that can be told without it."""
    if (folder / FACTS_NAME).is_file():
        return CardFacts.read(folder)
    title = repo_id.split("/")[-1] if repo_id else "GRIN MoE"
    procedure = what_the_trainer_wrote(_text_of(folder / CARD_NAME)) or ""
    recorded = "" if procedure else " How it was trained was not recorded with it."
    if _library_of(folder) == "peft":
        adapter = _read_object(folder / "adapter_config.json")
        base = changes.get("base_model") or adapter.get("base_model_name_or_path")
        return CardFacts(
            title=title,
            summary=f"An adapter for a model of the GRIN-MoE architecture.{recorded}",
            procedure=procedure,
            library_name="peft",
            base_model=base,
            base_model_relation="adapter",
            hyperparameters={
                name: adapter[name]
                for name in ("peft_type", "r", "lora_alpha", "lora_dropout", "target_modules")
                if name in adapter
            },
        )
    if not config:
        raise ValueError(f"{folder} has no config.json, so there is no model in it; give the folder of a checkpoint")
    return CardFacts(
        title=title,
        summary=f"A checkpoint of the GRIN-MoE architecture.{recorded}",
        procedure=procedure,
        pipeline_tag=_pipeline_of(config),
    )


def _config_of(folder: Path, config: PreTrainedConfig | dict[str, Any] | None) -> dict[str, Any]:
    if isinstance(config, PreTrainedConfig):
        return config.to_dict()
    if config is not None:
        return config
    path = folder / "config.json"
    return _read_object(path) if path.is_file() else {}


def _architecture(config: dict[str, Any]) -> dict[str, str]:
    sizes = {label: config[name] for name, label in _SIZES.items() if config.get(name) is not None}
    return {label: f"{size:,}" if isinstance(size, int) else str(size) for label, size in sizes.items()}


def _pipeline_of(config: dict[str, Any]) -> str:
    names = as_list(config.get("architectures"))
    return "text-classification" if any("SequenceClassification" in str(name) for name in names) else "text-generation"


def _library_of(folder: Path) -> str:
    adapter = (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file()
    return "peft" if adapter else "transformers"


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); write it anew") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is no JSON object; write it anew")
    return content


def _text_of(path: Path) -> str:
    """The text of README.md with its line ends, or nothing."""
    if not path.is_file():
        return ""
    try:
        # -sig: a byte-order mark would hide the metadata from clients before 2.0.
        with path.open(encoding="utf-8-sig", newline="") as file:
            return file.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}); convert it") from error


__all__ = [
    "CARD_NAME",
    "FACTS_NAME",
    "CardFacts",
    "CardOverrides",
    "Evaluation",
    "card_for",
    "check_metadata",
    "render_card",
]
