"""`grinmoe evaluate`: scores of a checkpoint by lm-eval, the paper's beside them. Complete tasks are kept: it can go on."""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from rich.console import Console

from ..configuration_grinmoe import read_json_object
from ..files import atomic_write_text, folder_or_repository, left_by_atomic_file, require_packages
from ..hub import Evaluation, metric_name
from ..loading import base_of_model, load_for_use
from ..outputs import check_folder
from ..provenance import environment, markdown_table
from .options import EvaluateOptions
from .suite import PAPER_SUITE, SuiteTask, local_task

_SUITE = {task.name: task for task in PAPER_SUITE}
# Metrics of lm-eval that are shares, from 0 to 1.
_SHARES = frozenset(
    "acc acc_norm acc_bytes exact_match f1 mcc em pass@1 pass_at_1 math_verify inst_level_strict_acc".split()
)
# Tokens of an answer to tasks that name no other length; lm-eval's own default.
_LONGEST_ANSWER = 256


def find_tasks(names: Iterable[str], allow_code: bool) -> list[SuiteTask]:
    """
    Raises:
        ValueError: an unknown name, with the suite's; or one whose programs may not be run.
    """
    found: list[SuiteTask] = []
    for name in names:
        if name == "paper":
            found += [task for task in PAPER_SUITE if allow_code or not task.runs_code]
        elif name in _SUITE:
            found.append(_SUITE[name])
        elif name.endswith(".jsonl"):
            if not Path(name).is_file():
                raise ValueError(f"--tasks {name}: there is no such file")
            found.append(local_task(Path(name)))
        else:
            if name not in _index().all_tasks:
                raise ValueError(
                    f"--tasks {name} is unknown; give a name of the paper's suite ({', '.join(_SUITE)}; paper is all of "
                    "them), a task of lm-eval, or a .jsonl file"
                )
            found.append(SuiteTask(name, name, name, "", None, None))
    for task in found:
        if task.runs_code and not allow_code:
            raise ValueError(
                f"--tasks {task.name} runs programs that the model writes; pass --allow-code, best in a container"
            )
        # One name in the table, and one file of results.
        if task.file is not None and (task.name in _SUITE or sum(other.name == task.name for other in found) > 1):
            raise ValueError(f"--tasks: two tasks are called {task.name}; rename the file {task.name}.jsonl")
    return list({task.name: task for task in found}.values())


@functools.cache
def _index(with_tasks: bool = True) -> Any:
    """lm-eval's index of its tasks, which takes seconds to make; or an empty one, for tasks that are not in it."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=with_tasks)


def evaluate(options: EvaluateOptions, command: str, console: Console | None = None) -> Path:
    """
    Run what is not there yet, and write the table.

    Returns:
        Path of the report. Beside it: evaluations.json for the model card (`grinmoe push --evaluations`), unless a limit
        was set; and what lm-eval said of every task.

    Raises:
        ImportError: no lm-eval.
        ValueError: unknown tasks, tasks that cannot be loaded (their data, say), a folder that holds something else or an
            evaluation of another model or settings, or a model that cannot be used (see [`load_for_use`]).
        OSError: there is no such model.
    """
    require_packages("eval", "lm_eval")
    console = console or Console(soft_wrap=True, markup=False)
    source = folder_or_repository(options.model, "--model")
    tasks = find_tasks(options.tasks, options.allow_code)
    if options.shots is not None:
        tasks = [replace(task, shots=options.shots) for task in tasks]
    output = check_folder(options.output)
    settings = _settings(options, source)
    _check_folder(output, settings)
    done = {task.name: _read(_file(output, task)) for task in tasks if _file(output, task).is_file()}
    for task in tasks:
        if task.name in done and done[task.name].get("questions_sha256") != task.sha256():
            raise ValueError(
                f"--output {output} holds results of other questions called {task.name}; give a new folder"
            )
    if left := [task for task in tasks if task.name not in done]:
        longest = _rehearse(left, options)
        model = _model(source, options, longest)
        (output / "tasks").mkdir(parents=True, exist_ok=True)
        atomic_write_text(output / "settings.json", json.dumps(settings, indent=2) + "\n")
        for number, task in enumerate(tasks, 1):
            if task.name not in done:
                console.print(f"{number}/{len(tasks)} {task.label}")
                done[task.name] = _run(model, task, options)
                atomic_write_text(_file(output, task), json.dumps(done[task.name], indent=1, default=str) + "\n")
    rows = [(task, score_of(task, done[task.name])) for task in tasks]
    return _write(output, rows, options, command)


def run_evaluate(options: EvaluateOptions, command: str) -> None:
    """`grinmoe evaluate`."""
    console = Console(soft_wrap=True, markup=False)
    report = evaluate(options, command, console)
    console.print(report.read_text(encoding="utf-8").split("## Measured on")[0].strip())
    console.print(f"written: {report}")


# --- running -----------------------------------------------------------------------------------------------------------


def _settings(options: EvaluateOptions, source: str) -> dict[str, Any]:
    """What makes results of two starts results of one evaluation."""
    shown = {name: getattr(options, name) for name in ("limit", "shots", "dtype", "chat")}
    base = base_of_model(source)
    return {"model": source, "weights": _stamp(source), "base": base, "base_weights": _stamp(base), **shown}


def _stamp(source: str) -> str | list[list[Any]]:
    """That of a folder's weights, or a repository's commit."""
    if not Path(source).is_dir():
        # The cache keeps a commit's files in a folder of its name.
        return Path(snapshot_download(source, allow_patterns="config.json")).name
    files = sorted(Path(source).glob("*.safetensors"))
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def _check_folder(output: Path, settings: dict[str, Any]) -> None:
    file = output / "settings.json"
    if not file.is_file():
        begun = _begun(output) if output.is_dir() else []
        if output.is_dir() and any(path not in begun for path in output.iterdir()):
            raise ValueError(f"--output {output} holds something else than an evaluation; give a new folder")
        return
    if not any((output / "tasks").glob("*.json")):
        return  # of a start that has answered nothing
    before = _read(file)
    if different := [name for name in settings if settings[name] != before.get(name)]:
        raise ValueError(
            f"--output {output} holds an evaluation with another {', '.join(different)}; give a new folder"
        )


def _begun(output: Path) -> list[Path]:
    """What a start has left that was killed before its settings were written."""
    tasks = output / "tasks"
    begun = [path for path in output.iterdir() if left_by_atomic_file(path, "settings.json")]
    return [*begun, tasks] if tasks.is_dir() and not any(tasks.iterdir()) else begun


def _rehearse(tasks: list[SuiteTask], options: EvaluateOptions) -> dict[str, int]:
    """
    Load every task and its data once, so that what is not to be had is said before the model is loaded and hours of
    questions are asked.

    Returns:
        Tokens of the longest answer that each task generates; 0 where answers are only compared.

    Raises:
        ValueError: some tasks cannot be loaded. Names all of them.
    """
    longest, failed = {}, {}
    for task in tasks:
        task.check_shots()
        try:
            loaded = _manager(task).load([task.task])
        # A task is somebody's code, which reaches for data and packages: anything can be raised.
        except Exception as error:
            failed[task.name] = " ".join(f"{type(error).__name__}: {error}".split())
            continue
        longest[task.name] = max(_answer_tokens(task, part.config) for part in loaded["tasks"].values())
    if failed:
        raise ValueError(
            f"--tasks: {len(failed)} of {len(tasks)} cannot be loaded; leave them out, or mend this: "
            + "; ".join(f"{name}: {message[:300]}" for name, message in failed.items())
        )
    return longest


def _manager(task: SuiteTask) -> Any:
    if task.runs_code:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"  # asked by the metric, which has no other switch
    return _index(isinstance(task.task, str))


def _answer_tokens(task: SuiteTask, config: Any) -> int:
    if config.output_type != "generate_until":
        return 0
    return task.longest_answer or (config.generation_kwargs or {}).get("max_gen_toks") or _LONGEST_ANSWER


def _model(source: str, options: EvaluateOptions, longest: dict[str, int]) -> Any:
    """
    Raises:
        ValueError: it has no chat template for `--chat`, or no room for an answer.
    """
    from .model import EvaluatedModel  # imports lm-eval

    model, tokenizer = load_for_use(source, options.dtype, options.device)
    if options.chat and not tokenizer.chat_template:
        raise ValueError("--chat needs a tokenizer with a chat template, and this checkpoint's has none; leave it out")
    room = model.config.max_position_embeddings
    if too_long := [name for name, tokens in longest.items() if tokens >= room]:
        raise ValueError(
            f"--tasks {' '.join(too_long)}: answers of up to {max(longest.values())} tokens are asked for, and this model "
            f"was made for {room} with the question; leave them out"
        )
    return EvaluatedModel(
        pretrained=model,
        tokenizer=tokenizer,
        batch_size=options.batch_size,
        max_length=room,
        # A prompt begins with no token of its own (docs/tokenization.md); lm-eval needs one before an empty context.
        prefix_token_id=tokenizer.eos_token_id,
    )


def _run(model: Any, task: SuiteTask, options: EvaluateOptions) -> dict[str, Any]:
    import lm_eval

    found = lm_eval.simple_evaluate(
        model=model,
        tasks=[task.task],
        task_manager=_manager(task),
        num_fewshot=task.shots,
        limit=options.limit,
        gen_kwargs=None if task.longest_answer is None else {"max_gen_toks": task.longest_answer},
        log_samples=False,
        bootstrap_iters=0,
        apply_chat_template=options.chat,
        confirm_run_unsafe_code=task.runs_code,
    )
    assert found is not None, "only ranks other than the first get nothing"
    kept = ("results", "groups", "n-shot", "n-samples", "higher_is_better", "versions", "group_subtasks")
    return {name: found[name] for name in kept if name in found} | {"questions_sha256": task.sha256()}


def score_of(task: SuiteTask, result: dict[str, Any]) -> dict[str, Any]:
    """
    A task's score, of what lm-eval said.

    Returns:
        value (in percent where the metric is a share), metric, shots, and the number of questions.

    Raises:
        ValueError: lm-eval has no such metric (any more); it says which it has.
    """
    metric, value = _metric_and_value(task, result)
    shots = {value for key, value in result.get("n-shot", {}).items() if type(value) is int}
    questions = sum(one["effective"] for one in result.get("n-samples", {}).values())
    return {
        "value": value * (100 if metric.split(",")[0] in _SHARES else 1),
        "metric": metric,
        "shots": shots.pop() if len(shots) == 1 else None,
        "questions": questions,
    }


def _metric_and_value(task: SuiteTask, result: dict[str, Any]) -> tuple[str, float]:
    """lm-eval's key of a task's score, the task's own or else the first that there is, and the score under it."""
    name = task.task["task"] if isinstance(task.task, dict) else task.task
    results = result["results"]
    # lm-eval averages a group itself; a tag (such as anli) has no score but those of its tasks.
    scores = result.get("groups", {}).get(name) or results.get(name)
    if scores is None or (task.metric and task.metric not in scores):
        return _mean_of_parts(task, result, [name] if name in results else list(results))
    metric = task.metric or next((key for key in _metrics(scores) if isinstance(scores[key], float)), "")
    if not metric:
        raise ValueError(f"lm-eval gives no score for {task.name}, but {', '.join(map(str, scores))}")
    return metric, float(scores[metric])


def _metrics(scores: dict[str, Any]) -> list[str]:
    """lm-eval's keys of metrics, such as "acc,none", without those of their standard errors."""
    return [key for key in scores if "," in key and "stderr" not in key]


def _mean_of_parts(task: SuiteTask, result: dict[str, Any], parts: list[str]) -> tuple[str, float]:
    """Mean of a metric over several tasks, weighted by their questions."""
    metrics = {key for part in parts for key in _metrics(result["results"][part])}
    metric = task.metric or min(metrics, default="")
    weights = {part: result["n-samples"][part]["effective"] for part in parts if metric in result["results"][part]}
    if not weights:
        raise ValueError(
            f"lm-eval gives no {task.metric} for {task.name}, but {', '.join(sorted(metrics)) or 'nothing'}"
        )
    total = sum(result["results"][part][metric] * weight for part, weight in weights.items())
    return metric, total / sum(weights.values())


# --- what is written ---------------------------------------------------------------------------------------------------


def _write(output: Path, rows: list[tuple[SuiteTask, dict[str, Any]]], options: EvaluateOptions, command: str) -> Path:
    header = ["task", "shots", "metric", "questions", "this checkpoint", "GRIN-MoE (paper)"]
    cells = [
        [
            task.label,
            "-" if score["shots"] is None else score["shots"],
            metric_name(score["metric"]),
            score["questions"],
            f"{score['value']:.1f}",
            "-" if task.paper is None else f"{task.paper:.1f}",
        ]
        for task, score in rows
    ]
    facts = environment(command)
    limited = (
        f"**Of every task {options.limit} questions at most were asked: these are no results.**\n\n"
        if options.limit
        else ""
    )
    text = (
        f"# Evaluation of {Path(options.model).name}\n\n{limited}{markdown_table(header, cells)}\n\n"
        "Shares in percent; other metrics (perplexity, ...) as lm-eval has them.\n\n## Measured on\n\n"
        f"{markdown_table(['', ''], [[key, value] for key, value in facts.items()])}\n"
    )
    atomic_write_text(output / "evaluation.md", text)
    if options.limit is None:
        entries = [asdict(entry) for entry in card_entries(rows)]
        atomic_write_text(output / "evaluations.json", json.dumps(entries, indent=2) + "\n")
    return output / "evaluation.md"


def card_entries(rows: Iterable[tuple[SuiteTask, dict[str, Any]]]) -> list[Evaluation]:
    """Scores as a model card has them, shares in percent; without those that are no number."""
    entries = []
    for task, score in rows:
        if not math.isfinite(score["value"]):
            continue
        config = task.task if isinstance(task.task, dict) else {}
        hub: dict[str, Any] = {}
        if "/" in str(config.get("dataset_path", "")):
            split = config.get("test_split") or config.get("validation_split")
            hub = {"dataset_config": config.get("dataset_name"), "dataset_split": split}
        entry = Evaluation(
            dataset_name=task.label,
            dataset_type=config["dataset_path"] if hub else task.name,
            metric_name=metric_name(score["metric"]),
            metric_type=score["metric"].split(",")[0],
            value=round(score["value"], 2),
            shots=score["shots"],
            **hub,
        )
        entries.append(entry)
    return entries


def _file(output: Path, task: SuiteTask) -> Path:
    return output / "tasks" / f"{task.name}.json"


def _read(file: Path) -> dict[str, Any]:
    return read_json_object(file, remedy="remove it to ask again")
