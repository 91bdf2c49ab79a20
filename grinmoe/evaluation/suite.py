"""The tasks of GRIN's Table 2 (arXiv:2409.12136), as lm-eval runs them, and tasks of local files.

Scores and shots are the paper's (`model_card.md` tells where each is from); its prompts are not published. Scores on
multiple choice such as 92.0 on ARC-C are those of a prompt that shows the options and asks for a letter, which lm-eval's own
tasks of these names are not; so they are made here of the same datasets.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Choice:
    """A question for people with lettered options; `answer` counts from 0."""

    question: str
    options: list[str]
    answer: int


@dataclass(frozen=True)
class SuiteTask:
    """
    A row of the table.

    Attributes:
        name: what the user types, and the row's name for lm-eval.
        label: as the paper has it.
        task: lm-eval's name of a task or group; or of a letter-choice task, its configuration.
        metric: lm-eval's key of the score.
        shots: examples in the prompt; None where the task brings its own.
        paper: score in percent.
        runs_code: whether generated programs are run.
        longest_answer: tokens; None for lm-eval's. Where a task names no length, that is 256, which cuts chains of thought.
    """

    name: str
    label: str
    task: str | dict[str, Any]
    metric: str
    shots: int | None
    paper: float | None
    runs_code: bool = False
    longest_answer: int | None = None

    @property
    def is_local(self) -> bool:
        """Whether its questions are in a file of the user's."""
        return isinstance(self.task, dict) and self.task["dataset_path"] == "json"

    def sha256(self) -> str | None:
        """Of the user's file; None for other tasks."""
        if not isinstance(self.task, dict) or not self.is_local:
            return None
        return hashlib.sha256(Path(self.task["dataset_kwargs"]["data_files"]["test"]).read_bytes()).hexdigest()

    def check_shots(self, shots: int | None) -> None:
        """Raise ValueError if a user's file has too few questions for that many examples beside each."""
        if not isinstance(self.task, dict) or not self.is_local or not shots:
            return
        questions = self.task["metadata"]["questions"]
        if shots >= questions:
            raise ValueError(
                f"--shots {shots}: {self.name}.jsonl has {questions} questions, and the examples are others of them; give "
                f"{questions - 1} or less"
            )


def letter_choice(
    name: str, choice_of: Callable[[dict], Choice], questions: int | None = None, **dataset: Any
) -> dict[str, Any]:
    """
    A task of lm-eval that shows lettered options and asks for the letter.

    Args:
        choice_of: a row of the dataset to its question.
        questions: how many it has, if that is known.
        dataset: fields of lm-eval's configuration that say where it is and what its splits are.
    """

    def text(doc: dict) -> str:
        choice = choice_of(doc)
        options = "".join(f"{letter}. {option}\n" for letter, option in zip(_LETTERS, choice.options))
        return f"{choice.question.strip()}\n{options}Answer:"

    return {
        "task": name,
        "output_type": "multiple_choice",
        "doc_to_text": text,
        "doc_to_choice": lambda doc: list(_LETTERS[: len(choice_of(doc).options)]),
        "doc_to_target": lambda doc: choice_of(doc).answer,
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0} | ({} if questions is None else {"questions": questions}),
        **dataset,
    }


def _of_arc(doc: dict) -> Choice:
    return Choice(doc["question"], doc["choices"]["text"], doc["choices"]["label"].index(doc["answerKey"]))


def _of_openbookqa(doc: dict) -> Choice:
    answer = doc["choices"]["label"].index(doc["answerKey"].strip())
    return Choice(doc["question_stem"], doc["choices"]["text"], answer)


def _of_piqa(doc: dict) -> Choice:
    return Choice(doc["goal"], [doc["sol1"], doc["sol2"]], int(doc["label"]))


def _of_siqa(doc: dict) -> Choice:
    options = [doc["answerA"], doc["answerB"], doc["answerC"]]
    return Choice(f"{doc['context']} {doc['question']}", options, int(doc["label"]) - 1)


def _of_hellaswag(doc: dict) -> Choice:
    return Choice(f"{doc['activity_label']}: {doc['ctx']}", doc["endings"], int(doc["label"]))


def _of_winogrande(doc: dict) -> Choice:
    return Choice(doc["sentence"], [doc["option1"], doc["option2"]], int(doc["answer"]) - 1)


_TRAIN_AND_TEST: dict[str, Any] = {"training_split": "train", "validation_split": "validation", "test_split": "test"}
_TRAIN_AND_VALIDATION: dict[str, Any] = {"training_split": "train", "validation_split": "validation"}


def _letters(
    name: str, choice_of: Callable[[dict], Choice], path: str, subset: str | None, tested: bool
) -> dict[str, Any]:
    splits = _TRAIN_AND_TEST if tested else _TRAIN_AND_VALIDATION
    return letter_choice(f"{name}_letters", choice_of, dataset_path=path, dataset_name=subset, **splits)


PAPER_SUITE = (
    SuiteTask("mmlu", "MMLU", "mmlu", "acc,none", 5, 79.4),
    SuiteTask(
        "hellaswag",
        "HellaSwag",
        _letters("hellaswag", _of_hellaswag, "Rowan/hellaswag", None, False),
        "acc,none",
        5,
        83.7,
    ),
    SuiteTask("anli", "ANLI", "anli", "acc,none", 7, 60.6),
    SuiteTask("gsm8k", "GSM-8K", "gsm8k_cot", "exact_match,flexible-extract", 8, 90.4, longest_answer=512),
    SuiteTask("math", "MATH", "minerva_math", "math_verify,none", 0, 58.9, longest_answer=2048),
    SuiteTask("medqa", "MedQA", "medqa_4options", "acc,none", 2, 70.4),
    SuiteTask("agieval", "AGIEval", "agieval_en", "acc,none", 0, 48.2),
    SuiteTask("triviaqa", "TriviaQA", "triviaqa", "exact_match,remove_whitespace", 5, 73.9),
    SuiteTask(
        "arc_c", "Arc-C", _letters("arc_c", _of_arc, "allenai/ai2_arc", "ARC-Challenge", True), "acc,none", 10, 92.0
    ),
    SuiteTask("arc_e", "Arc-E", _letters("arc_e", _of_arc, "allenai/ai2_arc", "ARC-Easy", True), "acc,none", 10, 98.0),
    SuiteTask("piqa", "PIQA", _letters("piqa", _of_piqa, "baber/piqa", None, False), "acc,none", 5, 89.0),
    SuiteTask("siqa", "SociQA", _letters("siqa", _of_siqa, "lighteval/siqa", None, False), "acc,none", 5, 79.5),
    SuiteTask("bbh", "BigBench-Hard", "bbh_cot_fewshot", "exact_match,get-answer", None, 81.4),
    SuiteTask(
        "winogrande",
        "WinoGrande",
        _letters("winogrande", _of_winogrande, "allenai/winogrande", "winogrande_xl", False),
        "acc,none",
        5,
        81.4,
    ),
    SuiteTask(
        "openbookqa",
        "OpenBookQA",
        _letters("openbookqa", _of_openbookqa, "allenai/openbookqa", "main", True),
        "acc,none",
        10,
        89.8,
    ),
    SuiteTask("boolq", "BoolQ", "boolq", "acc,none", 2, 83.4),
    SuiteTask("commonsenseqa", "CommonSenseQA", "commonsense_qa", "acc,none", 10, 81.8),
    SuiteTask("truthfulqa", "TruthfulQA", "truthfulqa_mc2", "acc,none", None, 74.5),
    SuiteTask("humaneval", "HumanEval", "humaneval", "pass@1,create_test", 0, 74.4, runs_code=True),
    SuiteTask("mbpp", "MBPP", "mbpp", "pass_at_1,none", 3, 80.3, runs_code=True, longest_answer=512),
)


def local_task(path: Path) -> dict[str, Any]:
    """
    A task of a file of JSON lines, for use without the Hub. Every line has

    - `question`, `choices` (texts) and `answer` (a letter, or a place from 0): letters are asked for; or
    - `prompt` and `answer`: the answer is generated up to the end of the line, and compared without case and punctuation.

    Raises:
        ValueError: no UTF-8, no JSON, a line of neither kind, or an answer that is none of the choices. Says which line.
    """
    docs = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}); convert it") from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            docs.append(_checked(line, f"{path}, line {number}"))
    if not docs:
        raise ValueError(f"{path} has no questions in it")
    kinds = {"choices" in doc for doc in docs}
    if len(kinds) > 1:
        raise ValueError(f"{path} mixes lines with choices and lines without; make two files of it")
    dataset = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(path)}}, "test_split": "test"}
    if kinds.pop():
        return letter_choice(path.stem, _of_local, questions=len(docs), **dataset)
    return {
        "task": path.stem,
        "output_type": "generate_until",
        "doc_to_text": "prompt",
        "doc_to_target": "answer",
        "generation_kwargs": {"until": ["\n"], "do_sample": False, "max_gen_toks": 64},
        "metric_list": [
            {
                "metric": "exact_match",
                "aggregation": "mean",
                "higher_is_better": True,
                "ignore_case": True,
                "ignore_punctuation": True,
            }
        ],
        "metadata": {"version": 1.0, "questions": len(docs)},
        **dataset,
    }


def _checked(line: str, where: str) -> dict[str, Any]:
    try:
        doc = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is no JSON ({error.msg}); give one object a line") from error
    if isinstance(doc, dict) and isinstance(doc.get("prompt"), str) and isinstance(doc.get("answer"), str):
        return doc
    choices = doc.get("choices") if isinstance(doc, dict) else None
    if not isinstance(choices, list) or not isinstance(doc.get("question"), str) or "answer" not in doc:
        raise ValueError(
            f"{where} has neither question, choices and answer nor prompt and answer; see docs/evaluation.md"
        )
    if not 2 <= len(choices) <= len(_LETTERS):
        raise ValueError(f"{where} has {len(choices)} choices; give 2 to {len(_LETTERS)}")
    if not 0 <= _place(doc["answer"]) < len(choices):
        raise ValueError(f"{where} has answer={doc['answer']!r}, which is none of its {len(choices)} choices")
    return doc


def _place(answer: Any) -> int:
    if isinstance(answer, str) and len(answer.strip()) == 1:
        return _LETTERS.find(answer.strip().upper())
    return answer if type(answer) is int else -1


def _of_local(doc: dict) -> Choice:
    return Choice(doc["question"], doc["choices"], _place(doc["answer"]))
