"""card.json beside a checkpoint, and results read from files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from grinmoe.hub.card import render_card
from grinmoe.hub.card_facts import FACTS_NAME, CardFacts, Evaluation, read_evaluations
from tests.hub.card_examples import GSM, HARNESS, some_facts, written


def test_facts_come_back_from_their_file(tmp_path):
    facts = some_facts(license="other", license_name="L: ünï", license_link="LICENSE", picture="p.png", tags=["t"])
    assert facts.write(tmp_path) == tmp_path / "card.json"
    assert CardFacts.read(tmp_path) == facts
    assert [path.name for path in tmp_path.iterdir()] == ["card.json"]


def test_an_interrupted_write_leaves_the_earlier_facts(tmp_path, monkeypatch):
    some_facts().write(tmp_path)

    def broken(self, target):
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "replace", broken)
    with pytest.raises(OSError, match="No space left"):
        some_facts(title="another").write(tmp_path)
    assert CardFacts.read(tmp_path).title == "A fine-tune"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"colour": "red"}, "unknown colour; take out, or choose of title, summary"),
        ({"title": None}, "title=None is not text; give one"),
        ({"summary": " "}, "summary=' ' is not text"),
        ({"language": "en"}, r"language='en' is not a list; give a list of texts, such as \[\"en\"\]"),
        ({"tags": [1]}, r"tags\[0\]=1 is not text"),
        ({"data": None}, "data=None is not text; describe"),
        ({"hyperparameters": {"learning rate": float("nan")}}, r"hyperparameters\['learning rate'\]=nan is not finite"),
        ({"hyperparameters": {"x": [1, float("inf")]}}, r"hyperparameters\['x'\]=\[1, inf\] is not finite"),
        ({"hyperparameters": {"x": {"y": 1}}}, "is neither a scalar nor a list of them; write it as text"),
        ({"hyperparameters": []}, "hyperparameters=.* is not a table"),
        ({"measurements": {"speed": 3}}, r"measurements\['speed'\]=3 is not text"),
        ({"evaluations": {}}, "evaluations={} is not a list"),
        ({"evaluations": [3]}, r"evaluations\[0\] is 3, not a JSON object"),
        (
            {"evaluations": [{"dataset_name": "x"}]},
            r"evaluations\[0\]: .* missing .* 'dataset_type', 'metric_name', .*; add it",
        ),
        ({"base_model": 7}, "base_model=7 is not text"),
        ({"base_model_relation": "child"}, "base_model_relation='child' is unknown; choose of finetune, adapter"),
        ({"base_model": None}, "base_model_relation='finetune' has no base_model"),
        ({"base_model": None, "base_model_relation": None, "library_name": "peft"}, "needs a base_model; name it"),
        ({"library_name": "keras"}, "library_name='keras' is unknown; choose of transformers, peft"),
        ({"pipeline_tag": "x"}, "pipeline_tag='x' is unknown"),
        ({"license": "other"}, "license='other' needs a license_name"),
        ({"picture": "../secret.png"}, "picture='../secret.png' is not a file name"),
    ],
)
def test_wrong_facts_are_named_with_a_remedy(tmp_path, change, message):
    some_facts().write(tmp_path)
    path = tmp_path / FACTS_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message) as error:
        CardFacts.read(tmp_path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("content", ["{", "\xff", "[1]"], ids=repr)
def test_a_file_that_holds_no_facts_is_named(tmp_path, content):
    (tmp_path / FACTS_NAME).write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=f"{FACTS_NAME} is"):
        CardFacts.read(tmp_path)


def test_wrong_facts_are_not_written(tmp_path):
    with pytest.raises(ValueError, match="hyperparameters"):
        some_facts(hyperparameters={"loss": float("nan")}).write(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"value": float("nan")}, "value=nan is not a finite number"),
        ({"value": "0.5"}, "value='0.5' is not a finite number"),
        ({"value": True}, "value=True is not a finite number"),
        ({"shots": -1}, "shots=-1 is not a number of examples"),
        ({"shots": 1.0}, "shots=1.0 is not a number of examples"),
        ({"dataset_name": ""}, "dataset_name='' is not text"),
        ({"dataset_type": "/home/me/secret.jsonl"}, "is a path on this machine"),
        ({"dataset_split": 3}, "dataset_split=3 is not text"),
    ],
)
def test_wrong_evaluations_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(GSM, **change)


# --- results from a file ---------------------------------------------------------------------------------------------


def test_results_are_read_from_a_list(tmp_path):
    entry = {
        "dataset_name": "A",
        "dataset_type": "a",
        "metric_name": "acc",
        "metric_type": "acc",
        "value": 1,
        "shots": 0,
    }
    assert read_evaluations(written(tmp_path / "r.json", [entry])) == [Evaluation("A", "a", "acc", "acc", 1, shots=0)]


def test_results_are_read_from_the_file_of_lm_eval(tmp_path):
    """Groups in place of their tasks, but tasks of a group that has no value itself; no standard errors, no counts."""
    mmlu, strict, flexible = read_evaluations(written(tmp_path / "results.json", HARNESS))
    assert mmlu == Evaluation("mmlu", "mmlu", "acc", "acc", 0.79, shots=5)
    assert strict == Evaluation(
        "gsm8k",
        "openai/gsm8k",
        "exact_match (strict-match)",
        "exact_match",
        0.9,
        dataset_config="main",
        dataset_split="test",
        shots=8,
    )
    assert (flexible.metric_name, flexible.value) == ("exact_match (flexible-extract)", 0.91)
    render_card(some_facts(evaluations=[mmlu, strict, flexible]))


@pytest.mark.parametrize("dataset", ["json", "/data/private/task", "data/task"])
def test_a_task_on_data_of_one_s_own_is_told_by_its_name_alone(tmp_path, monkeypatch, dataset):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "task").mkdir(parents=True)
    content = HARNESS | {"configs": {"gsm8k": {"dataset_path": dataset, "dataset_name": "main"}}}
    result = read_evaluations(written(tmp_path / "results.json", content))[1]
    assert (result.dataset_type, result.dataset_config) == ("gsm8k", None)


@pytest.mark.parametrize(
    "content, message",
    [
        (HARNESS | {"config": {"limit": 10}}, "of a run with limit=10"),
        (HARNESS | {"results": {"x": {"acc,none": float("nan")}}}, "x, acc,none: value=nan is not a finite number"),
        ({"results": {}}, "has no evaluation in it"),
        ([], "has no evaluation in it"),
        ({"scores": [1]}, "neither a list of evaluations nor a results file"),
        ([{"value": 1}], "entry 0: .* missing .* 'dataset_name', .*; add it"),
        ([{**json.loads("{}"), "task": "x"}], "entry 0: unknown task"),
    ],
)
def test_wrong_result_files_are_refused(tmp_path, content, message):
    path = written(tmp_path / "results.json", content)
    with pytest.raises(ValueError, match=message) as error:
        read_evaluations(path)
    assert str(path) in str(error.value)
