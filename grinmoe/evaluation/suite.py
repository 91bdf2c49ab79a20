"""The tasks of GRIN's Table 2 (arXiv:2409.12136), as lm-eval runs them, and tasks of local files.

Scores and shots are the paper's (`model_card.md` tells where each is from); its prompts are not published. Scores on
multiple choice such as 92.0 on ARC-C are those of a prompt that shows the options and asks for a letter, which lm-eval's own
tasks of these names are not; so they are made here of the same datasets.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data import read_rows

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
        file: the user's with the questions, and `questions` how many those are; None for tasks of lm-eval and the suite.
    """

    name: str
    label: str
    task: str | dict[str, Any]
    metric: str
    shots: int | None
    paper: float | None
    runs_code: bool = False
    longest_answer: int | None = None

    file: Path | None = None
    questions: int = 0

    def sha256(self) -> str | None:
        """Of the user's file; None for other tasks."""
        return None if self.file is None else hashlib.sha256(self.file.read_bytes()).hexdigest()

    def check_shots(self) -> None:
        """Raise ValueError if a user's file has too few questions for so many examples beside each."""
        if self.file is not None and self.shots and self.shots >= self.questions:
            raise ValueError(
                f"--shots {self.shots}: {self.name}.jsonl has {self.questions} questions, and the examples are others of "
                f"them; give {self.questions - 1} or less"
            )


def letter_choice(name: str, choice_of: Callable[[dict], Choice], **dataset: Any) -> dict[str, Any]:
    """
    A task of lm-eval that shows lettered options and asks for the letter.

    Args:
        choice_of: a row of the dataset to its question.
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
        "metadata": {"version": 1.0},
        **dataset,
    }


def _of_arc_or_openbookqa(doc: dict) -> Choice:
    question = doc["question_stem"] if "question_stem" in doc else doc["question"]
    return Choice(question, doc["choices"]["text"], doc["choices"]["label"].index(doc["answerKey"].strip()))


def _of_piqa(doc: dict) -> Choice:
    return Choice(doc["goal"], [doc["sol1"], doc["sol2"]], int(doc["label"]))


def _of_siqa(doc: dict) -> Choice:
    options = [doc["answerA"], doc["answerB"], doc["answerC"]]
    return Choice(f"{doc['context']} {doc['question']}", options, int(doc["label"]) - 1)


def _of_hellaswag(doc: dict) -> Choice:
    return Choice(f"{doc['activity_label']}: {doc['ctx']}", doc["endings"], int(doc["label"]))


def _of_winogrande(doc: dict) -> Choice:
    return Choice(doc["sentence"], [doc["option1"], doc["option2"]], int(doc["answer"]) - 1)


def _lettered(
    name: str,
    label: str,
    choice_of: Callable[[dict], Choice],
    path: str,
    subset: str | None,
    shots: int,
    paper: float,
    has_test: bool = False,
) -> SuiteTask:
    """A dataset of the Hub with train and validation splits; `has_test`: one with answers to test on, too."""
    splits = {"training_split": "train", "validation_split": "validation"} | (
        {"test_split": "test"} if has_test else {}
    )
    task = letter_choice(f"{name}_letters", choice_of, dataset_path=path, dataset_name=subset, **splits)
    return SuiteTask(name, label, task, "acc,none", shots, paper)


_ARC, _OPENBOOKQA, _WINOGRANDE = "allenai/ai2_arc", "allenai/openbookqa", "allenai/winogrande"
PAPER_SUITE = (
    SuiteTask("mmlu", "MMLU", "mmlu", "acc,none", 5, 79.4),
    _lettered("hellaswag", "HellaSwag", _of_hellaswag, "Rowan/hellaswag", None, 5, 83.7),
    SuiteTask("anli", "ANLI", "anli", "acc,none", 7, 60.6),
    SuiteTask("gsm8k", "GSM-8K", "gsm8k_cot", "exact_match,flexible-extract", 8, 90.4, longest_answer=512),
    SuiteTask("math", "MATH", "minerva_math", "math_verify,none", 0, 58.9, longest_answer=2048),
    SuiteTask("medqa", "MedQA", "medqa_4options", "acc,none", 2, 70.4),
    SuiteTask("agieval", "AGIEval", "agieval_en", "acc,none", 0, 48.2),
    SuiteTask("triviaqa", "TriviaQA", "triviaqa", "exact_match,remove_whitespace", 5, 73.9),
    _lettered("arc_c", "Arc-C", _of_arc_or_openbookqa, _ARC, "ARC-Challenge", 10, 92.0, has_test=True),
    _lettered("arc_e", "Arc-E", _of_arc_or_openbookqa, _ARC, "ARC-Easy", 10, 98.0, has_test=True),
    _lettered("piqa", "PIQA", _of_piqa, "baber/piqa", None, 5, 89.0),
    _lettered("siqa", "SociQA", _of_siqa, "lighteval/siqa", None, 5, 79.5),
    SuiteTask("bbh", "BigBench-Hard", "bbh_cot_fewshot", "exact_match,get-answer", None, 81.4),
    _lettered("winogrande", "WinoGrande", _of_winogrande, _WINOGRANDE, "winogrande_xl", 5, 81.4),
    _lettered("openbookqa", "OpenBookQA", _of_arc_or_openbookqa, _OPENBOOKQA, "main", 10, 89.8, has_test=True),
    SuiteTask("boolq", "BoolQ", "boolq", "acc,none", 2, 83.4),
    SuiteTask("commonsenseqa", "CommonSenseQA", "commonsense_qa", "acc,none", 10, 81.8),
    SuiteTask("truthfulqa", "TruthfulQA", "truthfulqa_mc2", "acc,none", None, 74.5),
    SuiteTask("humaneval", "HumanEval", "humaneval", "pass@1,create_test", 0, 74.4, runs_code=True),
    SuiteTask("mbpp", "MBPP", "mbpp", "pass_at_1,none", 3, 80.3, runs_code=True, longest_answer=512),
)


def local_task(path: Path) -> SuiteTask:
    """
    A task of a file of JSON lines, for use without the Hub. Every line has

    - `question`, `choices` (texts) and `answer` (a letter, or a place from 0): letters are asked for; or
    - `prompt` and `answer`: the answer is generated up to the end of the line, and compared without case and punctuation.

    Raises:
        ValueError: no UTF-8, no JSON, a line of neither kind, or an answer that is none of the choices. Says which line.
    """
    has_choices = [_has_choices(place, doc) for place, doc in read_rows(str(path), "test")]
    if not has_choices:
        raise ValueError(f"{path} has no questions in it")
    if len(set(has_choices)) > 1:
        raise ValueError(f"{path} mixes lines with choices and lines without; make two files of it")
    dataset = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(path)}}, "test_split": "test"}
    if has_choices[0]:
        task, metric = letter_choice(path.stem, _of_local, **dataset), "acc"
    else:
        metric = "exact_match"
        compared = {"metric": metric, "aggregation": "mean", "higher_is_better": True}
        task = {
            "task": path.stem,
            "output_type": "generate_until",
            "doc_to_text": "prompt",
            "doc_to_target": "answer",
            "generation_kwargs": {"until": ["\n"], "do_sample": False, "max_gen_toks": 64},
            "metric_list": [{**compared, "ignore_case": True, "ignore_punctuation": True}],
            "metadata": {"version": 1.0},
            **dataset,
        }
    questions = len(has_choices)
    return SuiteTask(path.stem, path.stem, task, f"{metric},none", None, None, file=path, questions=questions)


def _has_choices(place: str, doc: dict[str, Any]) -> bool:
    """Which kind of line `doc` is. Raises ValueError if it is of neither."""
    if isinstance(doc.get("prompt"), str) and isinstance(doc.get("answer"), str):
        return "choices" in doc
    choices = doc.get("choices")
    if not isinstance(choices, list) or not isinstance(doc.get("question"), str) or "answer" not in doc:
        raise ValueError(
            f"{place} has neither question, choices and answer nor prompt and answer; see docs/evaluation.md"
        )
    if not 2 <= len(choices) <= len(_LETTERS):
        raise ValueError(f"{place} has {len(choices)} choices; give 2 to {len(_LETTERS)}")
    if not 0 <= _place(doc["answer"]) < len(choices):
        raise ValueError(f"{place} has answer={doc['answer']!r}, which is none of its {len(choices)} choices")
    return True


def _place(answer: Any) -> int:
    if isinstance(answer, str) and len(answer.strip()) == 1:
        return _LETTERS.find(answer.strip().upper())
    return answer if type(answer) is int else -1


def _of_local(doc: dict) -> Choice:
    return Choice(doc["question"], doc["choices"], _place(doc["answer"]))
