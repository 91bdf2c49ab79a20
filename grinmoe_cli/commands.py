"""All commands: names, rooms, and what the faces of the rooms call their options and the functions that run them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Command:
    """
    One command. The docstring of its options holds its help, its description and an example.

    Attributes:
        name: as typed after `grinmoe`; "tokenizer build" is an action of the group `tokenizer`.
        room: folder of `grinmoe/` that has it.
        options: dataclass in the room's `options.py`, and a name of its face.
        run: function of the face. It takes the options; an int that it returns is the exit code, anything else is 0.
        is_recorded: `run` also takes `command`, the command line as typed, for the record beside its result.
        takes_settings: unknown flags are settings of a recipe, which the options get with the command's name as `task`.
    """

    name: str
    room: str
    options: str
    run: str
    is_recorded: bool = False
    takes_settings: bool = False


# What `add_parser` takes for a command whose actions are the commands.
GROUPS: dict[str, dict[str, Any]] = {
    "tokenizer": {
        "help": "build the family's tokenizer from a source, or verify one",
        "description": "Build a tokenizer of the family, or compare one with strings and their ids.",
        "epilog": "example: grinmoe tokenizer build --source tokenizer.model --output tokenizer",
    }
}
# What the descriptions of commands that take settings go on with.
SETTINGS = (
    "Settings come from a YAML file, and from flags, which win: --key value for every key that a file may have. Most are "
    "those of Transformers' TrainingArguments; --options lists all. SIGTERM and Ctrl-C end a run with a checkpoint; the "
    "same command goes on from it, and after any other end."
)
COMMANDS = (
    Command("demo", "demo", "DemoOptions", "run_demo"),
    Command("sft", "training", "SftOptions", "run_recipe", takes_settings=True),
    Command("dpo", "training", "DpoOptions", "run_recipe", takes_settings=True),
    Command("pretrain", "training", "PretrainOptions", "run_recipe", takes_settings=True),
    Command("merge", "adapters", "MergeOptions", "run_merge"),
    Command("upcycle", "conversion", "UpcycleOptions", "run_upcycle"),
    Command("plan", "planning", "PlanOptions", "run_plan"),
    Command("compare", "research", "CompareOptions", "run_compare", is_recorded=True),
    Command("generate", "serving", "GenerateOptions", "run_generate"),
    Command("serve", "serving", "ServeOptions", "run_serve"),
    Command("evaluate", "evaluation", "EvaluateOptions", "run_evaluate", is_recorded=True),
    Command("export", "conversion", "ExportOptions", "run_export"),
    Command("analyze", "analysis", "AnalyzeOptions", "run_analyze", is_recorded=True),
    Command("tokenizer build", "tokenization", "BuildOptions", "run_build"),
    Command("tokenizer verify", "tokenization", "VerifyOptions", "run_verify"),
    Command("push", "hub", "PushOptions", "push"),
    Command("pull", "hub", "PullOptions", "run_pull"),
)
