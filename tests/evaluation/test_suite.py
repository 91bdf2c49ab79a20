"""The paper's suite: its rows as lm-eval has them, and every row run by a model that knows the answers.

The data are on the Hub, so rows are made up here in the form of each dataset. What is held: that each task is found and
built, its data is read as it is there, its shots are the paper's, and the score is under the name that the table looks for.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from grinmoe.evaluation import run as evaluation
from grinmoe.evaluation.run import EvaluateOptions, evaluate, find_tasks, score_of
from grinmoe.evaluation.suite import PAPER_SUITE, SuiteTask

lm_eval = pytest.importorskip("lm_eval")
datasets = pytest.importorskip("datasets")

from lm_eval.api.model import LM  # noqa: E402

from tests import ROOT  # noqa: E402

pytestmark = pytest.mark.newest_only  # lm-eval's tasks, without a model


class TestSuite:
    @pytest.mark.integration
    def test_its_tasks_are_lm_eval_s(self):
        found = find_tasks(["paper"], allow_code=True)
        assert [task.label for task in found] == [task.label for task in PAPER_SUITE] and len(found) == 20
        assert not any(task.runs_code for task in find_tasks(["paper"], allow_code=False))
        from lm_eval.tasks import TaskManager

        known = set(TaskManager().all_tasks)
        assert {task.task for task in PAPER_SUITE if isinstance(task.task, str)} <= known

    def test_letter_tasks_take_the_datasets_of_lm_eval_s_own(self):
        """Where lm-eval moves to another copy of a dataset, this fails."""
        root = Path(lm_eval.__file__).parent / "tasks"
        own = {
            "hellaswag": "hellaswag/hellaswag.yaml",
            "arc_e": "arc/arc_easy.yaml",
            "piqa": "piqa/piqa.yaml",
            "siqa": "siqa/siqa.yaml",
            "winogrande": "winogrande/default.yaml",
            "openbookqa": "openbookqa/openbookqa.yaml",
        }

        class Loader(yaml.SafeLoader):
            pass

        Loader.add_constructor("!function", lambda loader, node: node.value)
        for task in PAPER_SUITE:
            if task.name in own:
                theirs = yaml.load((root / own[task.name]).read_text(), Loader)
                for name in ("dataset_path", "dataset_name", "training_split", "validation_split"):
                    assert task.task.get(name) == theirs.get(name), (task.name, name)

    # A row of each dataset, as the Hub has it.
    ROWS = {
        "arc_c": {"question": "Q?", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "2"},
        "openbookqa": {"question_stem": "Q?", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "B "},
        "piqa": {"goal": "Q?", "sol1": "x", "sol2": "y", "label": 1},
        "siqa": {"context": "Q", "question": "?", "answerA": "x", "answerB": "y", "answerC": "z", "label": "2"},
        "hellaswag": {"activity_label": "Q", "ctx": "?", "endings": ["x", "y"], "label": "1"},
        "winogrande": {"sentence": "Q _?", "option1": "x", "option2": "y", "answer": "2"},
    }

    @pytest.mark.parametrize("name", ROWS)
    def test_rows_become_lettered_questions(self, name):
        task = next(task for task in PAPER_SUITE if task.name == name).task
        row = self.ROWS[name]
        text = task["doc_to_text"](row)
        assert "A. x\nB. y\n" in text and text.endswith("Answer:") and text.startswith("Q")
        assert task["doc_to_target"](row) == 1 and task["doc_to_choice"](row)[:2] == ["A", "B"]


# --- a model that knows ------------------------------------------------------------------------------------------------

_ASKED = "What is it"
_TWO = {"text": ["wrong", "right"], "label": ["A", "B"]}
_MC2 = {"choices": ["right", "wrong", "right"], "labels": [1, 0, 1]}
# The right answer is the second option, "right", or 4.
DATA: dict[str, dict[str, Any]] = {
    "cais/mmlu": {"question": _ASKED, "subject": "it", "choices": ["wrong", "right", "wrong", "wrong"], "answer": 1},
    "Rowan/hellaswag": {"activity_label": "It", "ctx": _ASKED, "endings": ["wrong", "right"], "label": "1"},
    "facebook/anli": {"premise": _ASKED, "hypothesis": "It is.", "label": 1},
    "openai/gsm8k": {"question": _ASKED, "answer": "It is 2 + 2.\n#### 4"},
    "EleutherAI/hendrycks_math": {"problem": _ASKED, "solution": "It is $\\boxed{4}$."},
    "GBaker/MedQA-USMLE-4-options-hf": {
        "sent1": _ASKED,
        "ending0": "wrong",
        "ending1": "right",
        "ending2": "wrong",
        "ending3": "wrong",
        "label": 1,
    },
    "hails/agieval-math": {"query": _ASKED, "answer": "4"},
    "hails/agieval": {"query": _ASKED, "choices": ["(A)wrong", "(B)right"], "gold": [1]},
    "mandarjoshi/trivia_qa": {"question": _ASKED, "answer": {"aliases": ["Right", "right one"], "value": "right"}},
    "allenai/ai2_arc": {"question": _ASKED, "choices": _TWO, "answerKey": "B"},
    "baber/piqa": {"goal": _ASKED, "sol1": "wrong", "sol2": "right", "label": 1},
    "lighteval/siqa": {
        "context": "It is here.",
        "question": _ASKED,
        "answerA": "wrong",
        "answerB": "right",
        "answerC": "wrong",
        "label": "2",
    },
    "SaylorTwift/bbh": {"input": _ASKED, "target": "right"},
    "allenai/winogrande": {"sentence": "It is _", "option1": "wrong", "option2": "right", "answer": "2"},
    "allenai/openbookqa": {"question_stem": _ASKED, "choices": _TWO, "answerKey": "B"},
    "aps/super_glue": {"passage": "It is.", "question": _ASKED, "label": 1},
    "tau/commonsense_qa": {
        "question": _ASKED,
        "choices": {"text": ["wrong", "right", "wrong", "wrong", "wrong"], "label": list("ABCDE")},
        "answerKey": "B",
    },
    "truthfulqa/truthful_qa": {"question": _ASKED, "mc1_targets": _TWO, "mc2_targets": _MC2},
    "openai/openai_humaneval": {
        "prompt": "def right():\n",
        "test": "def check(f):\n    assert f() == 4",
        "entry_point": "right",
    },
    "google-research-datasets/mbpp": {"text": _ASKED, "code": "", "test_list": ["assert right() == 4"] * 3},
}
_NUMBERED = ("question", "ctx", "premise", "problem", "sent1", "query", "goal", "input", "sentence", "question_stem")


def load_dataset(path: str, *_: Any, **__: Any) -> Any:
    """In place of the library's: 12 rows, told apart by a number, in every split that a task could ask for."""
    row = DATA[next(name for name in DATA if path.startswith(name))]
    rows = [
        {key: f"{value} {number}" if key in _NUMBERED else value for key, value in row.items()} for number in range(12)
    ]
    splits = ["train", "validation", "test", "dev"] + [
        f"{split}_r{n}" for split in ("train", "dev", "test") for n in "123"
    ]
    return datasets.DatasetDict(dict.fromkeys(splits, datasets.Dataset.from_list(rows)))


class CodeMetric:
    """In place of `evaluate`'s code_eval, which is downloaded: the share of programs that pass."""

    def compute(self, references: list[str], predictions: list[list[str]], k: list[int]) -> tuple[dict, dict]:
        passed = []
        for test, programs in zip(references, predictions):
            try:
                exec(f"{programs[0]}\n{test}", {})
            except Exception:
                passed.append(False)
            else:
                passed.append(True)
        return {"pass@1": sum(passed) / len(passed)}, {}


class Knowing(LM):
    """Gives the right answers, or with `knows=False` none of them; keeps what it was asked."""

    def __init__(self, knows: bool):
        super().__init__()
        self.knows = knows
        self.prompts: list[str] = []
        self.longest: set[int | None] = set()

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        self.prompts += [request.args[0] for request in requests]
        right = [bool(re.search("right|yes|Neither|^ ?B$", request.args[1])) for request in requests]
        return [(-1.0 if good is self.knows else -60.0, False) for good in right]

    def generate_until(self, requests: list[Any]) -> list[str]:
        self.prompts += [request.args[0] for request in requests]
        self.longest |= {request.args[1].get("max_gen_toks") for request in requests}
        return [self._answer(request.args[0]) if self.knows else "nothing" for request in requests]

    def _answer(self, prompt: str) -> str:
        for sign, answer in {
            "Problem:": " Final Answer: The final answer is $4$. I hope it is correct.",
            "def right": "    return 4\n",
            "[BEGIN]": "def right():\n    return 4\n",
            "step by step": "So the answer is right.",
            "Answer:": " right",
            "A:": " It is 2 + 2. The answer is 4.",
        }.items():
            if sign in prompt:
                return answer
        return "4"

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        raise NotImplementedError


def in_unit_tests(name: str) -> tuple[pytest.MarkDecorator, ...]:
    """`make test` runs one task that needs neither lm-eval's index, which takes ten seconds, nor its harness of programs."""
    return () if name == "arc_c" else (pytest.mark.integration,)


@pytest.fixture
def score_by(monkeypatch, tmp_path):
    """Evaluate a model of lm-eval, in place of a checkpoint's, on made-up data; `room`: the longest text that it takes."""
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("evaluate.load", lambda name: CodeMetric())

    def score(model: LM, task: SuiteTask, room: int = 10**6) -> dict[str, Any]:
        checkpoint = (
            SimpleNamespace(config=SimpleNamespace(max_position_embeddings=room)),
            SimpleNamespace(eos_token_id=0),
        )
        monkeypatch.setattr(evaluation, "load_for_use", lambda *arguments: checkpoint)
        monkeypatch.setattr("grinmoe.evaluation.model.EvaluatedModel", lambda **options: model)
        output = tmp_path / f"out-{room}"
        evaluate(EvaluateOptions(str(tmp_path), (task.name,), str(output), allow_code=True), "X")
        return score_of(task, json.loads((output / "tasks" / f"{task.name}.json").read_text()))

    return score


@pytest.mark.parametrize(
    "task", [pytest.param(task, id=task.name, marks=in_unit_tests(task.name)) for task in PAPER_SUITE]
)
def test_who_knows_all_answers_has_all_points(task, score_by):
    """And the shots are those of the paper; TruthfulQA's of lm-eval are in its prompt, BBH's three in its own files."""
    model = Knowing(True)
    score = score_by(model, task)
    assert score["value"] == pytest.approx(100) and score["questions"] >= 12
    assert score["shots"] == {"truthfulqa": 0, "bbh": 3}.get(task.name, task.shots)
    assert score["metric"] == task.metric and len(model.prompts) >= 12
    # lm-eval passes its default length on as none.
    if longest := max((tokens or 256 for tokens in model.longest), default=0):
        with pytest.raises(ValueError, match=f"{task.name}: answers of up to {longest} tokens are asked for"):
            score_by(model, task, room=longest)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=in_unit_tests(name))
        for name in "anli gsm8k math agieval triviaqa arc_c truthfulqa humaneval mbpp".split()
    ],
)
def test_who_knows_none_has_none(name, score_by):
    (task,) = find_tasks([name], allow_code=True)
    assert score_by(Knowing(False), task)["value"] == pytest.approx(0, abs=1e-6)


def test_the_model_card_has_the_same_numbers():
    """Labels, shots and scores; TruthfulQA's ten shots are not lm-eval's, which allows none beside its own six."""
    text = (ROOT / "model_card.md").read_text()
    table = dict(re.findall(r"^\| ([^|]+) \| (\d+[^|]*\| [\d.]+) \|$", text, re.M))
    for task in PAPER_SUITE:
        shots, score = table[task.label].split("|")
        assert float(score) == task.paper
        assert int(shots.split(",")[0]) == {"truthfulqa": 10, "bbh": 3}.get(task.name, task.shots)


def test_what_cannot_be_loaded_is_said_at_once(monkeypatch, tmp_path):
    """Of all tasks, before a model is loaded: there is none in the folder."""

    def unreachable(path: str, *_: Any, **__: Any) -> None:
        raise ConnectionError(f"Couldn't reach {path} on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    options = EvaluateOptions(str(tmp_path), ("arc_c", "openbookqa"), str(tmp_path / "out"))
    with pytest.raises(
        ValueError, match=r"2 of 2 cannot be loaded.*arc_c: ConnectionError: .*ai2_arc.*openbookqa: Conn"
    ):
        evaluate(options, "X")
