"""`grinmoe evaluate`: real questions from a local file through lm-eval, scores by hand, going on, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import grinmoe_cli
from grinmoe import GrinMoeForCausalLM
from grinmoe.demo.chat_corpus import load_corpus
from grinmoe.evaluation.run import EvaluateOptions, card_entries, evaluate, find_tasks, score_of
from grinmoe.evaluation.run import _check_folder as check_begun
from grinmoe.evaluation.suite import PAPER_SUITE, SuiteTask, local_task
from grinmoe.hub.card_facts import read_evaluations
from grinmoe.tokenization import load_tokenizer
from tests.hub.release_folders import REPO, push_quick, run_cli, save_adapter

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


def test_scores_go_onto_the_hub_with_the_model(model_folder, finished, hub, capsys):
    """`--evaluations` of a push takes the file as it is; and a repository's scores are those of one commit of it."""
    code, _, error = run_cli(
        capsys,
        *("push", "--model", str(model_folder), "--repo", REPO, "--no-load-check", "--private"),
        *("--evaluations", str(finished / "evaluations.json")),
    )
    assert code == 0, error
    entry = read_evaluations(finished / "evaluations.json")[0]
    card = hub.files(REPO)["README.md"].decode()
    assert f"| trivia | acc | 0 | {entry.value:g} |" in card and "model-index:" in card


def test_scores_of_a_repository_are_those_of_one_commit(model_folder, letters, hub, tmp_path):
    push_quick(model_folder)
    options = EvaluateOptions(REPO, (str(letters),), str(tmp_path / "out"), limit=1)
    evaluate(options, "X")
    (commit, *_) = hub.commits(REPO)
    assert json.loads((tmp_path / "out" / "settings.json").read_text())["weights"] == commit.sha
    evaluate(options, "X")
    hub.add_commit(REPO, {"notes.md": b"changed"})
    with pytest.raises(ValueError, match="another weights, base_weights"):
        evaluate(options, "X")


def test_an_adapter_is_asked_with_its_base(model_folder, letters, finished, tmp_path):
    base = shutil.copytree(model_folder, tmp_path / "base")
    adapter = save_adapter(tmp_path / "adapter", base)
    options = EvaluateOptions(str(adapter), (str(letters),), str(tmp_path / "out"))
    report = evaluate(options, "X").read_text()
    assert "| trivia | 0 | acc | 6 |" in report
    GrinMoeForCausalLM.from_pretrained(base).save_pretrained(base)
    with pytest.raises(ValueError, match="another base_weights"):
        evaluate(options, "X")


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


def test_a_group_without_a_score_gets_the_mean_over_its_questions():
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

    @pytest.mark.integration
    def test_an_unknown_task(self, model_folder, tmp_path, capsys):
        said = self.run(capsys, "--model", model_folder, "--tasks", "arc_x", "--output", tmp_path / "out")
        assert "--tasks arc_x is unknown" in said and "arc_c" in said and not (tmp_path / "out").exists()

    def test_programs_are_not_run_unasked(self, model_folder, tmp_path, capsys):
        said = self.run(capsys, "--model", model_folder, "--tasks", "humaneval", "--output", tmp_path / "out")
        assert "--allow-code" in said and not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        "content, message",
        [
            (b"\xff\xfe", "not UTF-8"),
            (b"", "is empty"),
            (b"\n", "has no questions"),
            (b"{", "line 1: not JSON"),
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

    def test_more_examples_than_other_questions(self, model_folder, letters, tmp_path, capsys):
        arguments = ("--model", model_folder, "--tasks", letters, "--output", tmp_path / "out")
        said = self.run(capsys, *arguments, "--shots", 6)
        assert "trivia.jsonl has 6 questions" in said and "give 5 or less" in said and not (tmp_path / "out").exists()

    def test_a_chat_without_template(self, model_folder, letters, tmp_path, capsys):
        folder = shutil.copytree(model_folder, tmp_path / "model")
        (folder / "chat_template.jinja").unlink()
        said = self.run(capsys, "--model", folder, "--tasks", letters, "--output", tmp_path / "out", "--chat")
        assert "--chat needs a tokenizer with a chat template" in said and not (tmp_path / "out").exists()

    def test_answers_longer_than_the_model_s_text(self, model_folder, tmp_path, capsys):
        folder = tmp_path / "short"
        GrinMoeForCausalLM.from_pretrained(model_folder, max_position_embeddings=64).save_pretrained(folder)
        load_tokenizer(model_folder).save_pretrained(folder)
        file = tmp_path / "spelling.jsonl"
        file.write_text('{"prompt": "Say yes:", "answer": "yes"}\n')
        said = self.run(capsys, "--model", folder, "--tasks", file, "--output", tmp_path / "out")
        assert "--tasks spelling: answers of up to 64 tokens are asked for" in said and not (tmp_path / "out").exists()

    def test_half_a_checkpoint(self, model_folder, letters, tmp_path, capsys):
        folder = tmp_path / "half"
        folder.mkdir()
        for file in Path(model_folder).iterdir():
            if file.suffix != ".safetensors":
                (folder / file.name).write_bytes(file.read_bytes())
        index = {"metadata": {}, "weight_map": {"model.norm.weight": "model-00001-of-00001.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        said = self.run(capsys, "--model", folder, "--tasks", letters, "--output", tmp_path / "out")
        assert "download that shard again" in said and not (tmp_path / "out").exists()

    def test_a_folder_with_something_else(self, model_folder, letters, tmp_path, capsys):
        (tmp_path / "notes.txt").write_text("mine")
        assert "holds something else" in self.run(
            capsys, "--model", model_folder, "--tasks", letters, "--output", tmp_path
        )


def test_settings_of_a_start_that_answered_nothing_are_in_nobodys_way(tmp_path):
    (tmp_path / "tasks").mkdir()
    (tmp_path / "settings.json").write_text('{"limit": 3}')
    check_begun(tmp_path, {"limit": None})
    (tmp_path / "tasks" / "letters.json").write_text("{}")
    with pytest.raises(ValueError, match="holds an evaluation with another limit"):
        check_begun(tmp_path, {"limit": None})


def test_start_killed_before_its_settings_were_written_is_in_nobodys_way(tmp_path):
    (tmp_path / "tasks").mkdir()
    (tmp_path / ".settings-abcd_123.json").write_text("")
    check_begun(tmp_path, {})
    (tmp_path / "tasks" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="something else than an evaluation"):
        check_begun(tmp_path, {})


def test_answers_may_be_letters_or_places(tmp_path):
    file = tmp_path / "two.jsonl"
    file.write_text('{"question": "a", "choices": ["x", "y"], "answer": 1}\n')
    task = local_task(file)
    for answer in (1, "B", " b "):
        assert task.task["doc_to_target"]({"question": "a", "choices": ["x", "y"], "answer": answer}) == 1
