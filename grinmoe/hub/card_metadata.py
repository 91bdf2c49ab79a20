"""Metadata of a model card: built from facts, and checked as far as possible without the Hub."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.utils import validate_repo_id

from .card_facts import RELATIONS, CardFacts, Evaluation

# The Hub makes such tags of base_model by itself.
BASE_MODEL_TAG = "base_model:"
# Facts that are metadata under the same name.
_SHARED_FIELDS = (
    *("license", "license_name", "license_link", "language", "library_name", "pipeline_tag"),
    *("base_model", "base_model_relation", "datasets"),
)


def data_of(card: ModelCard) -> ModelCardData:
    """The metadata, typed: the client declares less than it gives."""
    assert isinstance(card.data, ModelCardData)
    return card.data


def card_data(facts: CardFacts, tags: list[str], repo_id: str | None) -> ModelCardData:
    """
    Build the metadata of one checkpoint.

    Args:
        facts: what is known of it.
        tags: of every card of this architecture, put before its own.
        repo_id: names the model beside its results.
    """
    name = repo_id.split("/")[-1] if repo_id else " ".join(facts.title.split())
    shared: dict[str, Any] = {name: getattr(facts, name) or None for name in _SHARED_FIELDS}
    return ModelCardData(
        **shared,
        tags=[*tags, *facts.tags],
        model_name=name if facts.evaluations else None,
        eval_results=eval_results(facts.evaluations) or None,
    )


def eval_results(evaluations: Iterable[Evaluation]) -> list[EvalResult]:
    """
    Convert evaluations to the Hub's form, those on the same data together.

    That form has one name and one number of shots for all results on the same data. Where they differ, the name of the
    metric says it.

    Raises:
        ValueError: two values of the same metric on the same data.
    """
    groups: dict[tuple, list[Evaluation]] = defaultdict(list)
    for e in evaluations:
        groups[e.task_type, e.dataset_type, e.dataset_config, e.dataset_split].append(e)
    results = []
    for group in groups.values():
        one_name, one_shots = (len(set(values)) == 1 for values in zip(*((e.dataset_name, e.shots) for e in group)))
        names = set()
        for e in group:
            kind = [] if one_name else [e.dataset_name]
            kind += [] if one_shots or e.shots is None else [f"{e.shots}-shot"]
            name = f"{e.metric_name} ({', '.join(kind)})" if kind else e.metric_name
            if name in names:
                raise ValueError(
                    f"evaluations: two values of {name!r} on {e.dataset_type}; name them apart, or drop one"
                )
            names.add(name)
            results.append(
                EvalResult(
                    e.task_type,
                    e.dataset_type,
                    e.dataset_name,
                    e.metric_type,
                    metric_value=e.value,
                    dataset_config=e.dataset_config,
                    dataset_split=e.dataset_split,
                    dataset_args={"num_few_shot": e.shots} if one_shots and e.shots is not None else None,
                    metric_name=name,
                )
            )
    return results


def check_metadata(card: ModelCard) -> None:
    """
    Check a card's metadata without the Hub, on the text that the Hub would get.

    This checks the form of license ids and language codes, the ids of base models and datasets (which must not be paths of
    this machine), the relation to the base model, tags, results, and that the text gives the metadata back. Only the Hub
    (`card.validate()`) can say whether a license, a language or a repository exists.

    Raises:
        ValueError: with all that is wrong.
    """
    if problems := list(_problems(data_of(ModelCard(str(card))))):
        raise ValueError(f"the Hub would not take this card's metadata: {'; '.join(problems)}")
    block = REGEX_YAML_BLOCK.search(str(card))
    if block is None or yaml.safe_load(block.group(2)) != card.data.to_dict():
        raise ValueError("the card's metadata changes when it is written and read; take unusual characters out of it")


def _problems(data: ModelCardData) -> Iterator[str]:
    for value in as_list(data.license):
        if not isinstance(value, str) or not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", value):
            yield f"license: {value!r} is not an id of the Hub; ids are lower case, such as mit, apache-2.0 or other"
    for value in as_list(data.language):
        # YAML reads a bare `no`, which is Norwegian, as false.
        if not isinstance(value, str):
            yield f"language: {value!r} is not text; put the code in quotes"
        elif value not in ("code", "multilingual") and not re.fullmatch(r"[a-z]{2,3}(-[A-Za-z0-9]+)*", value):
            yield f"language: {value!r} is not a code; give one of two or three letters, such as en"
    for name in ("base_model", "datasets"):
        for value in as_list(data.get(name)):
            yield from _id_problems(name, value)
    if (relation := data.get("base_model_relation", "finetune")) not in RELATIONS:
        yield f"base_model_relation: {relation!r} is unknown; choose of {', '.join(RELATIONS)}"
    for name in ("library_name", "pipeline_tag"):
        if not isinstance(data.get(name, ""), str):
            yield f"{name}: {data[name]!r} is not text; correct it"
    for tag in data.tags or []:
        if not isinstance(tag, str):
            yield f"tags: {tag!r} is not text; put it in quotes"
        elif tag.startswith(BASE_MODEL_TAG):
            # PEFT writes "base_model:adapter:" and where it loaded the base from.
            yield from _id_problems("tags", tag.split(":")[-1])
    for result in data.eval_results or []:
        if isinstance(result.metric_value, float) and not math.isfinite(result.metric_value):
            yield f"{result.dataset_name}: {result.metric_value} is not a result; leave it out"


def _id_problems(name: str, value: Any) -> Iterator[str]:
    """What keeps a value from being the id of a Hub repository."""
    if not isinstance(value, str):
        yield f"{name}: {value!r} is not text; give the id of a Hub repository"
    elif value.startswith(("/", ".", "~")) or "\\" in value:
        yield f"{name}: {value!r} is a path on this machine; give the id of the Hub repository that it came from"
    elif not is_repo_id(value):
        yield f"{name}: {value!r} is not an id of a Hub repository; give one, such as owner/name, or leave it out"
    elif Path(value).is_dir():
        yield (
            f"{name}: {value!r} is a folder here; give the id of the Hub repository that it came from (if this is the id, "
            "run from where there is no such folder)"
        )


def is_repo_id(value: str) -> bool:
    """Whether a text has the form of a repository's id."""
    try:
        validate_repo_id(value)
    except HFValidationError:
        return False
    return True


def as_list(value: Any) -> list[Any]:
    """One value, several or none as a list."""
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]
