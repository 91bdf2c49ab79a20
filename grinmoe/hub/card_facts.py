"""What a training run knows about a checkpoint, kept as card.json beside it: the facts that a model card is made of."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from ..files import atomic_write_text

FACTS_NAME = "card.json"
RELATIONS = ("finetune", "adapter", "quantized", "merge")
_CHOICES = {
    "base_model_relation": (None, *RELATIONS),
    "library_name": ("transformers", "peft"),
    "pipeline_tag": ("text-generation", "text-classification"),
}

_Entry = TypeVar("_Entry")


@dataclass(frozen=True)
class Evaluation:
    """
    One measured value of this checkpoint. The Hub shows it beside the card (the `model-index` of its metadata).

    Args:
        dataset_name: for people, such as "GSM-8K".
        dataset_type: id of the dataset on the Hub, or a short name where it is not there.
        metric_name: for people, such as "accuracy".
        metric_type: id of the metric, such as "accuracy", "exact_match" or "perplexity".
        value: finite.
        task_type: as the Hub names tasks.
        dataset_config, dataset_split: where the dataset has several.
        shots: examples in the prompt; None where that has no meaning (perplexity).
    """

    dataset_name: str
    dataset_type: str
    metric_name: str
    metric_type: str
    value: float
    task_type: str = "text-generation"
    dataset_config: str | None = None
    dataset_split: str | None = None
    shots: int | None = None

    def __post_init__(self):
        for name in ("dataset_name", "dataset_type", "metric_name", "metric_type", "task_type"):
            _check_text(name, getattr(self, name), required=True)
        _check_text("dataset_config", self.dataset_config)
        _check_text("dataset_split", self.dataset_split)
        if self.dataset_type.startswith(("/", ".", "~")):
            raise ValueError(f"dataset_type={self.dataset_type!r} is a path on this machine; give the dataset's name")
        if not _is_number(self.value) or not math.isfinite(self.value):
            raise ValueError(f"value={self.value!r} is not a finite number; leave this evaluation out or repeat it")
        if self.shots is not None and (type(self.shots) is not int or self.shots < 0):
            raise ValueError(f"shots={self.shots!r} is not a number of examples; give 0 or more, or null")


@dataclass
class CardFacts:
    """
    What the card of a checkpoint says. Texts are Markdown; names and values in the tables are shown as they are.

    Args:
        title, summary: heading, and one or two sentences on what it is.
        base_model: id on the Hub of what it was made from (several for a merge), None for a model trained from scratch. A
            run from a local folder may keep that path here: making a card of it asks for the id.
        base_model_relation: one of `RELATIONS`; None lets the Hub infer it.
        license: the Hub's id, such as "mit"; "other" needs `license_name`.
        license_name, license_link: of a license that the Hub has no id for.
        language: codes such as "en".
        datasets: ids on the Hub of the training data; data that is not there is told in `data` alone.
        data: description of the training data, its license included.
        hyperparameters: of the training; scalars, and lists of them.
        procedure: how the training went, in prose.
        measurements: anything that was measured and is no evaluation: name -> text with its unit.
        evaluations: results of this checkpoint.
        architecture: sizes, name -> text. Left empty, `card_for` fills it from the folder's config.json.
        picture: name of an image file in the folder.
        library_name: "transformers", or "peft" for an adapter.
        pipeline_tag: "text-generation" or "text-classification".
        tags: besides those that every card of this architecture has.
    """

    title: str
    summary: str
    base_model: str | list[str] | None = None
    base_model_relation: str | None = None
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    language: list[str] = field(default_factory=list)
    datasets: list[str] = field(default_factory=list)
    data: str = ""
    hyperparameters: dict[str, Any] = field(default_factory=dict)
    procedure: str = ""
    measurements: dict[str, str] = field(default_factory=dict)
    evaluations: list[Evaluation] = field(default_factory=list)
    architecture: dict[str, str] = field(default_factory=dict)
    picture: str | None = None
    library_name: str = "transformers"
    pipeline_tag: str = "text-generation"
    tags: list[str] = field(default_factory=list)

    def validate(self) -> None:
        """
        Check what can be checked without a look at the folder or the Hub.

        Raises:
            ValueError: names the field, the value and the remedy.
        """
        _check_text("title", self.title, required=True)
        _check_text("summary", self.summary, required=True)
        for name in ("base_model_relation", "license", "license_name", "license_link", "picture"):
            _check_text(name, getattr(self, name))
        for name in ("data", "procedure"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{name}={getattr(self, name)!r} is not text; describe it in words")
        for name in ("language", "datasets", "tags"):
            _check_texts(name, getattr(self, name))
        (_check_texts if isinstance(self.base_model, list) else _check_text)("base_model", self.base_model)
        if self.license == "other" and not self.license_name:
            raise ValueError("license='other' needs a license_name; give one, and a license_link to its text")
        for name, choices in _CHOICES.items():
            if (value := getattr(self, name)) not in choices:
                raise ValueError(f"{name}={value!r} is unknown; choose of {', '.join(c for c in choices if c)}")
        if self.base_model_relation and not self.base_model:
            raise ValueError(
                f"base_model_relation={self.base_model_relation!r} has no base_model to relate to; name it"
            )
        if self.library_name == "peft" and not self.base_model:
            raise ValueError("library_name='peft' is an adapter's, which needs a base_model; name it")
        if self.picture is not None and Path(self.picture).name != self.picture:
            raise ValueError(
                f"picture={self.picture!r} is not a file name; put the picture into the folder and name it"
            )
        for name in ("measurements", "architecture"):
            for key, text in _table(name, getattr(self, name)):
                _check_text(f"{name}[{key!r}]", text, required=True)
        for key, entry in _table("hyperparameters", self.hyperparameters):
            for item in entry if isinstance(entry, list) else [entry]:
                _check_scalar(f"hyperparameters[{key!r}]={entry!r}", item)
        if not isinstance(self.evaluations, list) or not all(isinstance(e, Evaluation) for e in self.evaluations):
            raise ValueError(f"evaluations={self.evaluations!r} is not a list of Evaluation; make it one")

    @classmethod
    def read(cls, folder: str | os.PathLike) -> CardFacts:
        """
        Read card.json of a folder.

        Raises:
            ValueError: it is not JSON, or a field is unknown, missing or wrong.
            OSError: there is none.
        """
        path = Path(folder) / FACTS_NAME
        entry = _read_json(path)
        if isinstance(entry, dict) and isinstance(entry.get("evaluations"), list):
            evaluations = entry["evaluations"]
            entry["evaluations"] = [
                _build(Evaluation, e, f"{path}: evaluations[{i}]") for i, e in enumerate(evaluations)
            ]
        facts = _build(cls, entry, str(path))
        try:
            facts.validate()
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        return facts

    def write(self, folder: str | os.PathLike) -> Path:
        """
        Write card.json into a folder, whole or not at all.

        Returns:
            Its path.

        Raises:
            ValueError: a field is wrong.
        """
        self.validate()
        path = Path(folder) / FACTS_NAME
        atomic_write_text(path, json.dumps(asdict(self), indent=2, ensure_ascii=False, allow_nan=False) + "\n")
        return path


def read_evaluations(path: str | os.PathLike) -> list[Evaluation]:
    """
    Read results: a JSON list of objects with the fields of `Evaluation`, or the results file of lm-eval.

    Of lm-eval's file every metric of a task or group is taken, but for standard errors and for the tasks whose group is
    in the file with a value of its own (MMLU has 57).

    Raises:
        ValueError: it is not JSON or neither of the two, an entry is wrong, or lm-eval ran with `--limit`.
        OSError: there is no such file.
    """
    path = Path(path)
    content = _read_json(path)
    if isinstance(content, dict) and isinstance(content.get("results"), dict):
        evaluations = list(_of_harness(content, path))
    elif isinstance(content, list):
        evaluations = [_build(Evaluation, entry, f"{path}: entry {i}") for i, entry in enumerate(content)]
    else:
        raise ValueError(f"{path} is neither a list of evaluations nor a results file of lm-eval; give one of them")
    if not evaluations:
        raise ValueError(f"{path} has no evaluation in it; give a file with results")
    return evaluations


def _of_harness(content: dict[str, Any], path: Path) -> Iterator[Evaluation]:
    """Evaluations of lm-eval's file: {"results": {task: {"metric,filter": value}}, "n-shot": {task: k}, "configs": ...}."""
    if limit := _dict_in(content, "config").get("limit"):
        raise ValueError(f"{path} is of a run with limit={limit}, which measures nothing; run lm-eval without --limit")
    metrics = {
        task: {key: value for key, value in _dict_in(content["results"], task).items() if _is_metric(key, value)}
        for task in content["results"]
    }
    groups = _dict_in(content, "group_subtasks").items()
    covered = {task for group, tasks in groups if metrics.get(group) and isinstance(tasks, list) for task in tasks}
    for task, values in metrics.items():
        if task in covered:
            continue
        config = _dict_in(_dict_in(content, "configs"), task)
        dataset = config.get("dataset_path")
        # A dataset of the Hub has an owner; "json" and "csv" are loaders, and a folder is nobody else's.
        on_hub = isinstance(dataset, str) and dataset.count("/") == 1 and not Path(dataset).exists()
        shots = _dict_in(content, "n-shot").get(task)
        for key, value in values.items():
            entry = {
                "dataset_name": task,
                "dataset_type": dataset if on_hub else task,
                "metric_name": metric_name(key),
                "metric_type": key.split(",")[0],
                "value": value,
                "dataset_config": config.get("dataset_name") if on_hub else None,
                "dataset_split": config.get("test_split") or config.get("validation_split"),
                "shots": shots if type(shots) is int else None,
            }
            yield _build(Evaluation, entry, f"{path}: {task}, {key}")


def metric_name(key: str) -> str:
    """For people, of lm-eval's "metric,filter"."""
    metric, _, kind = key.partition(",")
    return metric if kind in ("", "none") else f"{metric} ({kind})"


def _is_metric(key: str, value: Any) -> bool:
    return "," in key and not key.split(",")[0].endswith("_stderr") and _is_number(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _dict_in(content: dict[str, Any], key: str) -> dict[str, Any]:
    """The object under a key, empty where there is none."""
    value = content.get(key)
    return value if isinstance(value, dict) else {}


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise ValueError(f"{path} is not JSON ({error}); correct it, or write it anew") from error


def _build(kind: type[_Entry], entry: Any, where: str) -> _Entry:
    """An object of a dataclass from a JSON object, with errors that say where."""
    if not isinstance(entry, dict):
        raise ValueError(f"{where} is {entry!r}, not a JSON object; give the fields of {kind.__name__}")
    known = [f.name for f in fields(kind)]  # type: ignore[arg-type]
    if unknown := sorted(entry.keys() - set(known)):
        raise ValueError(f"{where}: unknown {', '.join(unknown)}; take out, or choose of {', '.join(known)}")
    try:
        return kind(**entry)
    except TypeError as error:  # a field is missing: Python names it
        raise ValueError(f"{where}: {error}; add it") from error
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _check_text(name: str, value: Any, required: bool = False) -> None:
    if (value is not None or required) and not (isinstance(value, str) and value.strip()):
        raise ValueError(f"{name}={value!r} is not text; give one{'' if required else ', or null'}")


def _check_texts(name: str, value: Any) -> None:
    if not isinstance(value, list):
        raise ValueError(f"{name}={value!r} is not a list; give a list of texts, such as [{json.dumps(str(value))}]")
    for i, item in enumerate(value):
        _check_text(f"{name}[{i}]", item, required=True)


def _table(name: str, value: Any) -> Iterable[tuple[str, Any]]:
    if not isinstance(value, dict):
        raise ValueError(f"{name}={value!r} is not a table; give an object of names and values")
    for key in value:
        _check_text(f"a name in {name}", key, required=True)
    return value.items()


def _check_scalar(where: str, value: Any) -> None:
    if not isinstance(value, str | int | float | None):
        raise ValueError(f"{where} is neither a scalar nor a list of them; write it as text")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} is not finite; leave it out or write it as text")
