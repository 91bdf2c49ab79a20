"""`grinmoe evaluate`: real questions from a local file through lm-eval, scores by hand, going on, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

import grinmoe_cli
from grinmoe import GrinMoeForCausalLM
from grinmoe.card_facts import read_evaluations
from grinmoe.data import load_corpus
from grinmoe.evaluation import EvaluateOptions, card_entries, evaluate, find_tasks, score_of
from grinmoe.evaluation_suite import PAPER_SUITE, SuiteTask, local_task
from grinmoe.tokenization import load_tokenizer

lm_eval = pytest.importorskip("lm_eval")


def questions(count: int) -> list[dict]:
    """Real questions of chatterbot-corpus with its answer among those of three others."""
    talks = [talk for talk in load_corpus().train if len(talk) == 2 and len(talk[1]["content"]) < 30]
    pairs = [(talk[0]["content"], talk[1]["content"]) for talk in talks[: 4 * count]]
    asked = []
    for number in range(count):
        options = [answer for _, answer in pairs[4 * number : 4 * number + 4]]
        place = number % 4
        asked.append({"question": pairs[4 * number + place][0], "choices": options, "answer": "ABCD"[place]})
    return asked


@pytest.fixture(scope="module")
def model_folder(chat_model, tmp_path_factory) -> Path:
    """The small chat model, for longer texts."""
    folder = tmp_path_factory.mktemp("model")
    GrinMoeForCausalLM.from_pretrained(chat_model, max_position_embeddings=512).save_pretrained(folder)
    load_tokenizer(chat_model).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def letters(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("questions") / "trivia.jsonl"
    path.write_text("".join(json.dumps(question) + "\n" for question in questions(6)))
    return path


@pytest.fixture(scope="module")
def finished(model_folder, letters, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("evaluation") / "out"
    evaluate(EvaluateOptions(str(model_folder), (str(letters),), str(output)), "grinmoe evaluate X")
    return output


def test_the_score_is_that_of_the_likeliest_letter(model_folder, letters, finished):
    model, tokenizer = GrinMoeForCausalLM.from_pretrained(model_folder), load_tokenizer(model_folder)
    right = []
    for question in map(json.loads, letters.read_text().splitlines()):
        options = "".join(f"{letter}. {text}\n" for letter, text in zip("ABCD", question["choices"]))
        prompt = f"{question['question']}\n{options}Answer:"
        likelihoods = []
        for letter in "ABCD":
            whole, context = (tokenizer(text)["input_ids"] for text in (f"{prompt} {letter}", prompt))
            with torch.no_grad():
                log_probs = model(torch.tensor([whole])).logits[0].log_softmax(-1)
            places = range(len(context), len(whole))
            likelihoods.append(sum(log_probs[place - 1, whole[place]].item() for place in places))
        right.append("ABCD"[max(range(4), key=likelihoods.__getitem__)] == question["answer"])
    (entry,) = read_evaluations(finished / "evaluations.json")
    assert entry.value == pytest.approx(100 * sum(right) / len(right), abs=0.01)
    assert entry.dataset_name == "trivia" and entry.metric_type == "acc" and entry.shots == 0
    assert "| trivia | 0 | acc | 6 |" in (finished / "evaluation.md").read_text()


def test_it_goes_on_where_it_was(model_folder, letters, finished, tmp_path, monkeypatch):
    """What is complete is not asked again, and a second task is asked alone."""
    other = tmp_path / "spelling.jsonl"
    other.write_text('{"prompt": "Say yes:", "answer": "yes"}\n{"prompt": "Say no:", "answer": "no"}\n')
    asked = []
    run = lm_eval.simple_evaluate
    monkeypatch.setattr(lm_eval, "simple_evaluate", lambda **options: asked.append(options["tasks"]) or run(**options))
    both = (str(letters), str(other))
    evaluate(EvaluateOptions(str(model_folder), both, str(finished)), "grinmoe evaluate X")
    assert [[task["task"] for task in tasks] for tasks in asked] == [["spelling"]]
    report = (finished / "evaluation.md").read_text()
    assert "| trivia |" in report and "| spelling | 0 | exact_match | 2 |" in report
    evaluate(EvaluateOptions(str(model_folder), both, str(finished)), "grinmoe evaluate X")
    assert len(asked) == 1


def test_a_limit_is_no_result(model_folder, letters, tmp_path):
    report = evaluate(EvaluateOptions(str(model_folder), (str(letters),), str(tmp_path / "out"), limit=2), "X")
    assert "these are no results" in report.read_text() and "| 2 |" in report.read_text()
    assert not (tmp_path / "out" / "evaluations.json").exists()


def test_other_settings_do_not_go_into_the_same_folder(model_folder, letters, finished):
    with pytest.raises(ValueError, match="another shots"):
        evaluate(EvaluateOptions(str(model_folder), (str(letters),), str(finished), shots=2), "X")


def test_other_questions_of_the_same_name_are_no_results_of_these(model_folder, finished, tmp_path):
    changed = tmp_path / "trivia.jsonl"
    changed.write_text('{"question": "a", "choices": ["x", "y"], "answer": 0}\n')
    with pytest.raises(ValueError, match="results of other questions called trivia"):
        evaluate(EvaluateOptions(str(model_folder), (str(changed),), str(finished)), "X")


def test_two_tasks_of_one_name_are_refused(tmp_path):
    (tmp_path / "other").mkdir()
    files = [tmp_path / "mine.jsonl", tmp_path / "other" / "mine.jsonl", tmp_path / "mmlu.jsonl"]
    for file in files:
        file.write_text('{"prompt": "a", "answer": "b"}\n')
    for names in (files[:2], files[2:]):
        with pytest.raises(ValueError, match="two tasks are called"):
            find_tasks(map(str, names), allow_code=False)


def test_what_is_no_share_is_no_percentage():
    """Perplexity, say; and what is no number is left out of a card."""
    task = SuiteTask("wikitext", "wikitext", "wikitext", "", None, None)
    said = {"results": {"wikitext": {"alias": "wikitext", "word_perplexity,none": 21.5}}, "n-samples": {}}
    assert score_of(task, said)["value"] == 21.5
    said["results"]["wikitext"]["word_perplexity,none"] = float("nan")
    assert card_entries([(task, score_of(task, said))]) == []


class TestSuite:
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

    def test_a_group_without_a_score_gets_the_mean_over_its_questions(self):
        anli = next(task for task in PAPER_SUITE if task.name == "anli")
        said = {
            "results": {"anli_r1": {"acc,none": 0.5}, "anli_r2": {"acc,none": 0.8}},
            "n-samples": {"anli_r1": {"effective": 10}, "anli_r2": {"effective": 30}},
            "n-shot": {"anli_r1": 7, "anli_r2": 7},
        }
        score = score_of(anli, said)
        assert score == {"value": pytest.approx(72.5), "metric": "acc,none", "shots": 7, "questions": 40}
        said["results"] = {"anli_r1": {"f1,none": 0.5}}
        with pytest.raises(ValueError, match="gives no acc,none for anli, but f1,none"):
            score_of(anli, said)


class TestBadInput:
    def run(self, capsys, *arguments) -> str:
        capsys.readouterr()
        assert grinmoe_cli.main(["evaluate", *map(str, arguments)]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert lines[-1].startswith("grinmoe evaluate: ")
        return lines[-1]

    def test_an_unknown_task(self, model_folder, tmp_path, capsys):
        said = self.run(capsys, "--model", model_folder, "--tasks", "arc_x", "--output", tmp_path / "out")
        assert "--tasks arc_x is unknown" in said and "arc_c" in said and not (tmp_path / "out").exists()

    def test_programs_are_not_run_unasked(self, model_folder, tmp_path, capsys):
        said = self.run(capsys, "--model", model_folder, "--tasks", "humaneval", "--output", tmp_path / "out")
        assert "--allow-code" in said and not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        "content, message",
        [
            (b"\xff\xfe", "is not UTF-8"),
            (b"", "has no questions"),
            (b"{", "line 1 is no JSON"),
            (b'{"prompt": "a", "answer": "b"}\n{"question": "a"}', "line 2 has neither"),
            (b'{"question": "a", "choices": ["x"], "answer": 0}', "has 1 choices"),
            (b'{"question": "a", "choices": ["x", "y"], "answer": "C"}', "answer='C'"),
            (b'{"question": "a", "choices": ["x", "y"], "answer": 0}\n{"prompt": "a", "answer": "b"}', "mixes lines"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_a_file_that_asks_nothing(self, model_folder, tmp_path, capsys, content, message):
        file = tmp_path / "questions.jsonl"
        file.write_bytes(content)
        said = self.run(capsys, "--model", model_folder, "--tasks", file, "--output", tmp_path / "out")
        assert message in said and not (tmp_path / "out").exists()

    def test_half_a_checkpoint(self, model_folder, letters, tmp_path, capsys):
        folder = tmp_path / "half"
        folder.mkdir()
        for file in Path(model_folder).iterdir():
            if file.suffix != ".safetensors":
                (folder / file.name).write_bytes(file.read_bytes())
        index = {"weight_map": {"model.norm.weight": "model-00001-of-00001.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        said = self.run(capsys, "--model", folder, "--tasks", letters, "--output", tmp_path / "out")
        assert "download that shard again" in said and not (tmp_path / "out").exists()

    def test_a_folder_with_something_else(self, model_folder, letters, tmp_path, capsys):
        (tmp_path / "notes.txt").write_text("mine")
        assert "holds something else" in self.run(
            capsys, "--model", model_folder, "--tasks", letters, "--output", tmp_path
        )


def test_answers_may_be_letters_or_places(tmp_path):
    file = tmp_path / "two.jsonl"
    file.write_text('{"question": "a", "choices": ["x", "y"], "answer": 1}\n')
    task = local_task(file)
    for answer in (1, "B", " b "):
        assert task["doc_to_target"]({"question": "a", "choices": ["x", "y"], "answer": answer}) == 1
