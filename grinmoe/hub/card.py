"""Model card, the README.md of a checkpoint on the Hub, rendered from model_card.md with the facts of one checkpoint."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from huggingface_hub import ModelCard
from transformers.utils import ADAPTER_CONFIG_NAME

from ..configuration_grinmoe import read_json_object
from ..provenance import markdown_table
from .card_facts import FACTS_NAME, CardFacts, Evaluation, read_evaluations
from .card_metadata import as_list, card_data, check_metadata, data_of
from .errors import check_repo
from .options import CardOverrides
from .readme import CARD_NAME, completed, is_blank, library_of, pipeline_of, read_readme, what_the_trainer_wrote

_TEMPLATE = Path(__file__).parents[1] / "model_card.md"

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


def _changes(said: CardOverrides) -> dict[str, Any]:
    """
    The fields of `CardFacts` that a user has said, with the results read from their file.

    Raises:
        ValueError: the license has no name, or the file cannot be used.
        OSError: there is no such file.
    """
    if said.license == "other" and not said.license_name:
        raise ValueError("license='other' needs a license_name; give one, and a license_link to its text")
    values = {name: value for name, value in vars(said).items() if value is not None}
    changes = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    if said.license is not None:  # name and link of an earlier license go with it
        changes = {"license_name": None, "license_link": None, **changes}
    if said.evaluations is not None:
        changes["evaluations"] = read_evaluations(said.evaluations)
    return changes


def render_card(facts: CardFacts, repo_id: str | None = None) -> ModelCard:
    """
    Render the card of one checkpoint.

    Args:
        facts: what is known of it.
        repo_id: id that it will have on the Hub; the card's example loads the model from there.

    Returns:
        The card; `.save(path)` writes it.

    Raises:
        ValueError: a fact is wrong, or the Hub would not take the metadata (see `check_metadata`).
    """
    facts.validate()
    if repo_id is not None:
        check_repo(repo_id)
    # Jinja does not read these values as template source, so that a fact may hold any text.
    sections: dict[str, Any] = {
        "bases": as_list(facts.base_model),
        "sizes": _two_columns(facts.architecture),
        "data": facts.data.strip(),
        "datasets": facts.datasets,
        "hyperparameters": _two_columns(facts.hyperparameters),
        "procedure": facts.procedure.strip(),
        "measurements": _two_columns(facts.measurements),
        "picture": quote(facts.picture or ""),
        "evaluations": _evaluation_table(facts.evaluations),
    }
    card = ModelCard.from_template(
        card_data(facts, default_tags(), repo_id),
        template_path=str(_TEMPLATE),
        title=" ".join(facts.title.split()),
        summary=facts.summary.strip(),
        repo_id=repo_id,
        described=any(sections.values()),
        **sections,
    )
    card.text += "\n"  # Jinja takes the last line feed away
    check_metadata(card)
    return card


def card_for(
    folder: str | os.PathLike,
    repo_id: str | None = None,
    overrides: CardOverrides | None = None,
    parameters: tuple[int, int] | None = None,
) -> ModelCard:
    """
    Make the card that publishing a model's folder would give it. Nothing is written.

    If the folder holds card.json, the card is rendered from that. Otherwise a README.md that somebody wrote is kept, and
    only its metadata is completed. Otherwise (README.md is missing, empty, or an unfilled form of PEFT or Transformers) the
    card is rendered from config.json, or from adapter_config.json for an adapter.

    Args:
        folder: of a checkpoint or an adapter.
        repo_id: id that it will have on the Hub.
        overrides: what the user says about it.
        parameters: all parameters, and those that work on one token.

    Raises:
        ValueError: a file cannot be used, README.md was edited beside card.json, the picture is missing, or the Hub would
            not take the metadata.
        OSError: the folder does not exist, or a file cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}; give that of a checkpoint")
    if repo_id is not None:
        check_repo(repo_id)
    changes = _changes(overrides or CardOverrides())
    config_file = folder / "config.json"
    config = read_json_object(config_file, remedy="write it anew") if config_file.is_file() else {}
    text = read_readme(folder)
    has_facts = (folder / FACTS_NAME).is_file()
    if not has_facts and not is_blank(text) and what_the_trainer_wrote(text) is None:
        card = completed(text, folder, changes, config, repo_id, default_tags())
        picture = changes.get("picture")
    else:
        known = CardFacts.read(folder) if has_facts else _facts_of(folder, text, config, repo_id, changes)
        architecture = dict(known.architecture or _architecture(config))
        if has_facts and not is_blank(text):
            _refuse_edited(text, folder, replace(known, architecture=architecture))
        if parameters is not None:
            architecture["parameters"] = f"{parameters[0]:,}, of which {parameters[1]:,} work on a token"
        facts = replace(known, **{**changes, "architecture": architecture})
        card = render_card(facts, repo_id)
        picture = facts.picture
    if picture is not None and (Path(picture).name != picture or not (folder / picture).is_file()):
        raise ValueError(f"picture={picture!r} is not a file in {folder}; put it there, or name another one")
    return card


def default_tags() -> list[str]:
    """The tags of every card of this architecture: those of the template."""
    return data_of(ModelCard.load(_TEMPLATE)).tags or []


def _two_columns(entries: dict[str, Any]) -> str:
    rows = [[_cell(name), _cell(value)] for name, value in entries.items()]
    return markdown_table(["", ""], rows) if rows else ""


def _evaluation_table(evaluations: list[Evaluation]) -> str:
    rows = []
    for e in evaluations:
        part = ", ".join(part for part in (e.dataset_config, e.dataset_split) if part)
        data = f"{e.dataset_name} ({part})" if part else e.dataset_name
        shots = "" if e.shots is None else e.shots
        rows.append([_cell(data), _cell(e.metric_name), shots, _cell(e.value)])
    return markdown_table(["data", "metric", "shots", "value"], rows) if rows else ""


def _cell(value: Any) -> str:
    """A value as one line of a Markdown table's cell, with the characters escaped that Markdown would interpret."""
    if isinstance(value, list):
        value = ", ".join(_plain(item) for item in value)
    return re.sub(r"([\\|`*<\[])", r"\\\1", " ".join(_plain(value).split()))


def _plain(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _refuse_edited(text: str, folder: Path, facts: CardFacts) -> None:
    """Raise ValueError if somebody edited a README.md that was rendered from card.json: the edit would be lost."""
    try:
        made = str(render_card(facts))
    except ValueError:  # for example a local base model: such facts make no card yet
        return
    if text.replace("\r\n", "\n").strip() != made.strip():
        raise ValueError(
            f"{folder / CARD_NAME} is not what {FACTS_NAME} beside it makes: it was edited, or is of another version. "
            f"Remove {FACTS_NAME} to publish {CARD_NAME} as it is, or remove {CARD_NAME} to have it made anew"
        )


def _facts_of(
    folder: Path, readme: str, config: dict[str, Any], repo_id: str | None, changes: dict[str, Any]
) -> CardFacts:
    """The facts that a folder without card.json tells."""
    is_adapter = library_of(folder) == "peft"
    if not is_adapter and not config:
        raise ValueError(f"{folder} has no config.json, so there is no model in it; give the folder of a checkpoint")
    procedure = what_the_trainer_wrote(readme) or ""
    kind = "An adapter for a model" if is_adapter else "A checkpoint"
    recorded = "" if procedure else " How it was trained was not recorded with it."
    facts = CardFacts(
        title=repo_id.split("/")[-1] if repo_id else "GRIN MoE",
        summary=f"{kind} of the GRIN-MoE architecture.{recorded}",
        procedure=procedure,
    )
    if not is_adapter:
        return replace(facts, pipeline_tag=pipeline_of(config))
    adapter = read_json_object(folder / ADAPTER_CONFIG_NAME, remedy="write it anew")
    told = ("peft_type", "r", "lora_alpha", "lora_dropout", "target_modules")
    return replace(
        facts,
        library_name="peft",
        base_model=changes.get("base_model") or adapter.get("base_model_name_or_path"),
        base_model_relation="adapter",
        hyperparameters={name: adapter[name] for name in told if name in adapter},
    )


def _architecture(config: dict[str, Any]) -> dict[str, str]:
    sizes = {label: config[name] for name, label in _SIZES.items() if config.get(name) is not None}
    return {label: f"{size:,}" if isinstance(size, int) else str(size) for label, size in sizes.items()}
