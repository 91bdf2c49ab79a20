"""The metadata of a model card as the Hub wants it: made of facts, and checked as far as that goes without the Hub."""

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


def data_of(card: ModelCard) -> ModelCardData:
    """The metadata, typed: the client declares less than it gives."""
    assert isinstance(card.data, ModelCardData)
    return card.data


def card_data(facts: CardFacts, tags: list[str], repo_id: str | None) -> ModelCardData:
    """
    The metadata of one checkpoint.

    Args:
        facts: what is known of it.
        tags: of every card of this architecture, put before its own.
        repo_id: names the model beside its results.
    """
    name = repo_id.split("/")[-1] if repo_id else " ".join(facts.title.split())
    return ModelCardData(
        license=facts.license,
        license_name=facts.license_name,
        license_link=facts.license_link,
        language=facts.language or None,
        library_name=facts.library_name,
        pipeline_tag=facts.pipeline_tag,
        base_model=facts.base_model or None,
        base_model_relation=facts.base_model_relation,
        datasets=facts.datasets or None,
        tags=[*tags, *facts.tags],
        model_name=name if facts.evaluations else None,
        eval_results=eval_results(facts.evaluations) or None,
    )


def eval_results(evaluations: Iterable[Evaluation]) -> list[EvalResult]:
    """
    Evaluations in the Hub's form, those on the same data together.

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
                    task_type=e.task_type,
                    dataset_type=e.dataset_type,
                    dataset_name=e.dataset_name,
                    dataset_config=e.dataset_config,
                    dataset_split=e.dataset_split,
                    dataset_args={"num_few_shot": e.shots} if one_shots and e.shots is not None else None,
                    metric_type=e.metric_type,
                    metric_name=name,
                    metric_value=e.value,
                )
            )
    return results


def check_metadata(card: ModelCard) -> None:
    """
    Check a card's metadata as far as that goes without the Hub, on the text that it would be sent.

    Checked: form of license ids and language codes, ids of base models and datasets (which must not be paths of this
    machine), how the base model is related, tags, results, and that the text gives the metadata back. Not checked, and
    left to the Hub's own answer (`card.validate()`): whether a license, a language or a repository exists.

    Raises:
        ValueError: with all that is wrong.
    """
    data = data_of(ModelCard(str(card)))
    problems = [*_license_problems(data), *_language_problems(data.language)]
    for name in ("base_model", "datasets"):
        problems += [problem for value in as_list(data.get(name)) if (problem := _id_problem(name, value))]
    if data.get("base_model_relation", "finetune") not in RELATIONS:
        problems.append(
            f"base_model_relation: {data['base_model_relation']!r} is none; choose of {', '.join(RELATIONS)}"
        )
    for name in ("library_name", "pipeline_tag"):
        if not isinstance(data.get(name, ""), str):
            problems.append(f"{name}: {data[name]!r} is no text; correct it")
    problems += [problem for tag in data.tags or [] if (problem := _tag_problem(tag))]
    for result in data.eval_results or []:
        if isinstance(result.metric_value, float) and not math.isfinite(result.metric_value):
            problems.append(f"{result.dataset_name}: {result.metric_value} is no result; leave it out")
    if problems:
        raise ValueError(f"the Hub would not take this card's metadata: {'; '.join(problems)}")
    block = REGEX_YAML_BLOCK.search(str(card))
    if block is None or yaml.safe_load(block.group(2)) != card.data.to_dict():
        raise ValueError("the card's metadata changes when it is written and read; take unusual characters out of it")


def _license_problems(data: ModelCardData) -> Iterator[str]:
    for value in as_list(data.license):
        if not isinstance(value, str) or not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", value):
            yield f"license: {value!r} is no id of the Hub; they are lower case, such as mit or apache-2.0, or else other"


def _language_problems(language: Any) -> Iterator[str]:
    for value in as_list(language):
        # YAML reads a bare `no`, which is Norwegian, as false.
        if not isinstance(value, str):
            yield f"language: {value!r} is no text; put the code in quotes"
        elif value not in ("code", "multilingual") and not re.fullmatch(r"[a-z]{2,3}(-[A-Za-z0-9]+)*", value):
            yield f"language: {value!r} is no code; give one of two or three letters, such as en"


def _tag_problem(tag: Any) -> str | None:
    if not isinstance(tag, str):
        return f"tags: {tag!r} is no text; put it in quotes"
    # PEFT writes "base_model:adapter:" and where it loaded the base from.
    return _id_problem("tags", tag.split(":")[-1]) if tag.startswith(BASE_MODEL_TAG) else None


def _id_problem(name: str, value: Any) -> str | None:
    """What keeps a value from being the id of a Hub repository."""
    if not isinstance(value, str):
        return f"{name}: {value!r} is no text; give the id of a Hub repository"
    if value.startswith(("/", ".", "~")) or "\\" in value:
        return f"{name}: {value!r} is a path on this machine; give the id of the Hub repository that it came from"
    try:
        validate_repo_id(value)
    except HFValidationError:
        return f"{name}: {value!r} is no id of a Hub repository; give one, such as owner/name, or leave it out"
    if Path(value).is_dir():
        return (
            f"{name}: {value!r} is a folder here; give the id of the Hub repository that it came from (if this is the id, "
            "run from where there is no such folder)"
        )
    return None


def check_repo_id(repo_id: str) -> None:
    """
    Raises:
        ValueError: it cannot be the id of a repository.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"repo_id={repo_id!r} is no id of a Hub repository ({error}); give owner/name") from error


def as_list(value: Any) -> list[Any]:
    """What may be one or several, or nothing, as a list."""
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]
