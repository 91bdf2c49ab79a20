"""What a training is to be: one YAML file and flags on top of it, checked before anything heavy is loaded.

    recipe = read_recipe("sft", ["--config", "recipes/sft_qlora.yaml", "--learning_rate", "1e-4"])

A key of the file is the name of a flag. Most are those of Transformers' TrainingArguments (and, for dpo, of TRL's
DPOConfig), so that what is known about these holds here; the others are `RunOptions` and `DataOptions`.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments
from transformers.hf_argparser import string_to_bool

from ..adapters import QUANTIZATIONS
from ..data import DataOptions
from ..distributed import check_gpus
from ..files import DTYPES, folder_or_repository
from ..planning import METHODS

TASKS = ("sft", "dpo", "pretrain")


@dataclass(frozen=True)
class RunOptions:
    """Model, method and run. (Each field is a key of a recipe and a flag.)"""

    model: str | None = field(
        default=None, metadata={"help": "Folder or Hub id of the model to train; not for a pretraining from scratch."}
    )
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit on the Hub."})
    model_config: str | None = field(
        default=None,
        metadata={"help": "pretrain: config.json, or its folder, of a model to initialise in place of `model`."},
    )
    tokenizer: str | None = field(default=None, metadata={"help": "Folder or Hub id (default: that of the model)."})
    config_overrides: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Fields of GrinMoeConfig to change, such as router_aux_loss_coef; JSON on the command line."},
    )
    method: str = field(default="full", metadata={"help": f"One of {', '.join(METHODS)}."})
    quantization: str = field(default="nf4", metadata={"help": f"Of qlora's base: {', '.join(QUANTIZATIONS)}."})
    dtype: str = field(
        default="auto",
        metadata={
            "help": "Of the weights: float32, bfloat16, float16, or auto: float32 where all of them are trained or there "
            "is no GPU, else bfloat16."
        },
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "eager, sdpa, flash_attention_2, ..."})
    experts_implementation: str | None = field(
        default=None, metadata={"help": "grinmoe (default), eager, grouped_mm, ..."}
    )
    adapter: str | None = field(default=None, metadata={"help": "lora, qlora: folder of an adapter to train on."})
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapters."})
    lora_alpha: float = field(default=32.0, metadata={"help": "Their scale is alpha / r."})
    lora_experts: str = field(default="all", metadata={"help": "all, none, or numbers such as 0,3,7 (in every layer)."})
    lora_shared_a: bool = field(default=False, metadata={"help": "One A for all experts of a weight."})
    lora_attention: bool = field(default=True, metadata={"help": "Adapt q, k, v and o too."})
    lora_router: bool = field(default=False, metadata={"help": "Adapt the router too."})
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "Stop after so many evaluations that do not improve on the best."}
    )
    resume: str = field(
        default="auto",
        metadata={
            "help": "auto: from the run's newest whole checkpoint if there is one; never: the folder must be new."
        },
    )
    watch_routers: bool = field(default=True, metadata={"help": "Log and draw what they do (docs/monitoring.md)."})

    def __post_init__(self):
        _check_choice("method", self.method, METHODS)
        _check_choice("quantization", self.quantization, QUANTIZATIONS)
        _check_choice("dtype", self.dtype, DTYPES)
        _check_choice("resume", self.resume, ("auto", "never"))
        overrides = self.config_overrides
        if isinstance(overrides, str):
            try:
                overrides = json.loads(overrides)
            except ValueError as error:
                raise ValueError(f"config_overrides={overrides!r} is not JSON ({error})") from error
        if self.config_overrides is not None and not isinstance(overrides, dict):
            raise ValueError(f'config_overrides={overrides!r} is not a mapping; write {{"field": value}}')
        object.__setattr__(self, "config_overrides", overrides)
        if isinstance(self.lora_experts, list):  # as YAML may have it
            object.__setattr__(self, "lora_experts", ",".join(map(str, self.lora_experts)))
        if self.early_stopping_patience is not None and self.early_stopping_patience < 1:
            raise ValueError(
                f"early_stopping_patience={self.early_stopping_patience} is below 1; leave it out for none"
            )
        for name in ("model", "tokenizer", "model_config", "adapter"):
            source = getattr(self, name)
            # model_config may be a file, an adapter is always a folder.
            if source is not None and not (name == "model_config" and Path(source).is_file()):
                object.__setattr__(self, name, folder_or_repository(source, name))
        if self.lora_r < 1:
            raise ValueError(f"lora_r={self.lora_r} is no rank; give 1 or more")
        if self.adapter is not None and not self.uses_adapter:
            raise ValueError(f"adapter={self.adapter!r} with method={self.method!r}; choose method lora or qlora")
        self.chosen_experts()

    @property
    def uses_adapter(self) -> bool:
        return self.method in ("lora", "qlora")

    def chosen_experts(self) -> str | list[int]:
        """`lora_experts` as "all", "none" or numbers."""
        if self.lora_experts in ("all", "none"):
            return self.lora_experts
        try:
            return sorted({int(part) for part in str(self.lora_experts).split(",")})
        except ValueError:
            raise ValueError(
                f"lora_experts={self.lora_experts!r} is neither all, none nor numbers such as 0,3,7"
            ) from None


@dataclass(frozen=True)
class Recipe:
    """A checked recipe. `training` is a TrainingArguments, for dpo a TRL DPOConfig."""

    task: str
    run: RunOptions
    data: DataOptions
    training: TrainingArguments

    @property
    def output_dir(self) -> Path:
        return Path(str(self.training.output_dir))

    @property
    def why_it_cannot_go_on(self) -> str | None:
        """Why a stopped run of this recipe cannot go on exactly; None if it can."""
        if self.training.save_only_model:
            return "no run goes on from its checkpoints, which have weights alone (save_only_model)"
        if getattr(self.training, "sync_ref_model", False):
            return "no run goes on from its checkpoints, which have no reference model (sync_ref_model)"
        return None

    def settings(self) -> dict[str, Any]:
        """All settings by the names of their flags; JSON types only."""
        settings: dict[str, Any] = {"task": self.task}
        for options in (self.run, self.data):
            settings |= dataclasses.asdict(options)
        # to_dict() leaves secrets out.
        training = self.training.to_dict()
        return settings | json.loads(json.dumps(training, default=str))


# What differs from TrainingArguments: a run of this command is to be watched, stopped and continued.
_DEFAULTS: dict[str, Any] = {
    "learning_rate": 2e-5,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.03,
    "logging_steps": 10,
    "save_strategy": "steps",
    "save_steps": 200,
    "save_total_limit": 2,
    "report_to": "none",
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    # One length of rows at a time wastes little on padding. (Pairs have no length that the Trainer knows.)
    "train_sampling_strategy": "group_by_length",
    "dataloader_pin_memory": torch.cuda.is_available(),
}
_MAY_BE_NESTED = frozenset(
    "config_overrides lora_experts report_to loss_type loss_weights lr_scheduler_kwargs optim_args optim_target_modules "
    "gradient_checkpointing_kwargs activation_checkpointing_kwargs accelerator_config fsdp_config include_for_metrics "
    "liger_kernel_config parallelism_config".split()
)
_RENAMED = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}
# What this command decides by itself.
_DECIDED = {
    "remove_unused_columns": False,
    "label_names": ["labels"],
    "prediction_loss_only": True,
    "resume_from_checkpoint": None,
    "enable_jit_checkpoint": False,
    # StopAtSignal restores it, with the patience of this start.
    "restore_callback_states_from_checkpoint": False,
}


_LIBRARY_DEFAULTS = {f.name: f.default for f in dataclasses.fields(TrainingArguments)}


def read_recipe(task: str, arguments: Iterable[str]) -> Recipe:
    """
    Args:
        task: one of `TASKS`.
        arguments: as on the command line: `--config FILE`, and `--key value` for what shall differ from the file.

    Raises:
        ValueError: no such file, not YAML, an unknown key or flag, a value of the wrong type, or settings that contradict
            each other; names them.
    """
    _check_choice("task", task, TASKS)
    config, flags = _split(list(arguments))
    values = {} if config is None else _read_yaml(Path(config))
    if values.pop("task", task) != task:
        raise ValueError(f"{config} is no recipe for {task}; it says so in its key 'task'")
    parser = _parser(task)
    known = {action.dest for action in parser._actions} - {"help"}
    if unknown := [key for key in values if key not in known]:
        raise ValueError(f"{config}: unknown key {_with_hints(unknown, known)}")
    defaults = _DEFAULTS | {"train_sampling_strategy": "random"} if task == "dpo" else _DEFAULTS
    parser.set_defaults(**{**defaults, **{key: _as_flag(value) for key, value in values.items()}})
    for action in parser._actions:
        action.required = action.required and action.dest not in values
    namespace, rest = parser.parse_known_args(flags)
    if rest:
        raise ValueError(f"unknown flag {_with_hints([flag.lstrip('-').split('=')[0] for flag in rest[:1]], known)}")
    return _build(task, vars(namespace))


def option_help(task: str) -> str:
    """All flags of a task, for people."""
    return _parser(task).format_help()


# Lowest value of a setting; below it the libraries fail late, or train nothing and say that they are done.
_LOWEST = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "dataloader_num_workers": 0,
    "max_grad_norm": 0,
    "save_total_limit": 1,
    "learning_rate": 0,
}
_ABOVE_ZERO = ("lora_alpha", "save_steps", "eval_steps", "logging_steps", "num_train_epochs", "beta")


def _check_values(task: str, values: dict[str, Any]) -> None:
    """What the libraries do not check, or only when the weights are there."""
    for name, lowest in _LOWEST.items():
        value = values.get(name)
        if value is None and name != "learning_rate":
            continue
        if not isinstance(value, int | float) or not lowest <= value < math.inf:  # nan too
            raise ValueError(f"{name}={value!r}; give a number from {lowest} up")
    for name in _ABOVE_ZERO:
        value = values.get(name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name}={value!r}; give a number above 0")
    if values.get("max_steps", -1) == 0:
        raise ValueError("max_steps=0 trains nothing; leave it out to train num_train_epochs")
    if values.get("push_to_hub"):
        raise ValueError(
            "push_to_hub sends the run's folder unchecked; train, then: grinmoe push --model OUTPUT_DIR/model (or "
            "OUTPUT_DIR/adapter) --repo NAME"
        )
    if values.get("use_liger_kernel"):
        raise ValueError("use_liger_kernel does nothing: Liger has no kernels for this model type; leave it out")
    if values.get("hub_token"):
        raise ValueError("hub_token would be written into the run's folder; use hf auth login, or HF_TOKEN")
    if task == "dpo" and values.get("train_sampling_strategy") == "group_by_length":
        raise ValueError(
            "train_sampling_strategy='group_by_length' is for rows of tokens, and pairs are text; leave it out"
        )
    if task == "dpo":
        _check_dpo(values)
    if task != "dpo" and values.get("metric_for_best_model") not in (None, "loss", "eval_loss"):
        raise ValueError(f"metric_for_best_model={values['metric_for_best_model']!r}; only the loss is measured here")
    if values.get("save_strategy") == "best" and values.get("metric_for_best_model") is None:
        raise ValueError("save_strategy='best' needs metric_for_best_model; give loss")
    for name, value in _DECIDED.items():
        if name == "restore_callback_states_from_checkpoint":
            continue  # asks for what is done anyway
        if values.get(name) not in (None, value, _LIBRARY_DEFAULTS[name]):
            raise ValueError(f"{name}={values[name]!r} is decided by this command; leave it out")


_READ_LABEL_SMOOTHING = frozenset(("robust", "exo_pair", "aot", "aot_unpaired"))


def _check_dpo(values: dict[str, Any]) -> None:
    """What TRL's DPOTrainer would ignore, or turn into an infinite loss."""
    if values.get("label_smoothing_factor"):
        raise ValueError(
            f"label_smoothing_factor={values['label_smoothing_factor']} smooths a loss of tokens, and dpo has none; give "
            "label_smoothing with loss_type robust"
        )
    kinds, smoothing = values["loss_type"], values["label_smoothing"]
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if smoothing and not _READ_LABEL_SMOOTHING & set(kinds):
        raise ValueError(
            f"label_smoothing={smoothing} is not read by loss_type {', '.join(kinds)}; choose one of "
            f"{', '.join(sorted(_READ_LABEL_SMOOTHING))}, or leave it out"
        )
    if not 0 <= smoothing < 0.5:
        raise ValueError(
            f"label_smoothing={smoothing} is the share of wrong labels; give a number from 0 up, below 0.5"
        )
    if values["truncation_mode"] != "keep_start":
        raise ValueError(
            f"truncation_mode={values['truncation_mode']!r}: this command cuts the end of what is too long; leave it out"
        )
    if values["sync_ref_model"] and values["method"] in ("lora", "qlora"):
        raise ValueError(
            f"sync_ref_model=True with method={values['method']!r}, whose reference is the base; leave it out, or train "
            "with method full"
        )


def _build(task: str, values: dict[str, Any]) -> Recipe:
    def of(kind: type) -> dict[str, Any]:
        return {f.name: values[f.name] for f in dataclasses.fields(kind) if f.init and f.name in values}

    _check_values(task, values)
    run, data = RunOptions(**of(RunOptions)), DataOptions(**of(DataOptions))
    if not values.get("output_dir"):
        raise ValueError("output_dir is missing; give --output_dir, a folder for this run")
    if task == "pretrain":
        if (run.model is None) == (run.model_config is None):
            raise ValueError("pretrain needs either model (to go on with) or model_config (to start from scratch)")
    elif run.model is None:
        raise ValueError("model is missing; give --model, a folder or a Hub id")
    elif run.model_config is not None:
        raise ValueError(f"model_config={run.model_config!r} starts from scratch, which is for pretrain only")
    if run.model_config is not None and (run.method != "full" or run.tokenizer is None):
        raise ValueError("a pretraining from scratch needs method full and a tokenizer; give --tokenizer")
    _check_gpus(bool(values.get("use_cpu")))
    chosen = of(TrainingArguments) | _DECIDED
    _fit_method(run, chosen)
    if task != "dpo":
        return Recipe(task, run, data, TrainingArguments(**chosen))
    from trl import DPOConfig

    # The data part counts and drops by the same two rules; TRL cuts.
    options = of(_dpo_only()) | {"max_length": data.max_length, "truncation_mode": "keep_start"}
    return Recipe(task, run, data, DPOConfig(**chosen, **options))


def _check_gpus(use_cpu: bool) -> None:
    """Before TrainingArguments, which takes hold of this rank's GPU."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if launched_for_fsdp() or (ranks > 1 and not use_cpu and torch.cuda.is_available()):
        check_gpus(ranks, int(os.environ.get("GROUP_WORLD_SIZE", "1")))


def launched_for_fsdp() -> bool:
    """Whether `accelerate launch` has started this process for FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP") == "true"


def _fit_method(run: RunOptions, chosen: dict[str, Any]) -> None:
    for old, new in _RENAMED.items():
        # One name in recipes for all supported versions of Transformers; the newer ones warn of the old name.
        if new in chosen and chosen.get(old) is not None:
            chosen[new] = chosen.pop(old)
    if run.method == "full-8bit":
        # bitsandbytes' optimizer raises on sharded weights, torchao's does not.
        chosen["optim"] = "adamw_torch_8bit" if launched_for_fsdp() else "adamw_bnb_8bit"
    if launched_for_fsdp() and chosen.get("accelerator_config") is None:
        # By default the gradients of all weights stay whole until the last micro-batch of a step.
        chosen["accelerator_config"] = {"gradient_accumulation_kwargs": {"sync_each_batch": True}}
    if run.early_stopping_patience is not None or chosen.get("load_best_model_at_end"):
        if chosen.get("eval_strategy") in (None, "no"):
            raise ValueError("the best model is chosen by evaluations; give eval_strategy and eval_data or eval_share")
        chosen["load_best_model_at_end"] = True
        if chosen.get("save_total_limit") == 1:
            # With 1 the Trainer deletes all but the best at the end, also where a signal has brought it about.
            chosen["save_total_limit"] = 2


def _parser(task: str) -> HfArgumentParser:
    kinds: list[Any] = [RunOptions, DataOptions, TrainingArguments]
    if task == "dpo":
        kinds.append(_dpo_only())
    parser = _Parser(kinds, prog=f"grinmoe {task}", allow_abbrev=False)
    for action in parser._actions:
        # Those without a default, which the library leaves out.
        if action.type is string_to_bool and action.nargs is None:
            action.nargs, action.const = "?", True
    return parser


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        """No page of usage before the one line that matters."""
        raise ValueError(f"{message} ({self.prog} --options lists all flags)")


def _dpo_only() -> type:
    """A dataclass of what DPOConfig has beyond TrainingArguments, since a flag may come from one dataclass only."""
    from trl import DPOConfig

    ours = {f.name for kind in (RunOptions, DataOptions, TrainingArguments) for f in dataclasses.fields(kind)}
    hints = get_type_hints(DPOConfig)
    added: list[Any] = []
    for f in dataclasses.fields(DPOConfig):
        if f.init and f.name not in ours:
            copied = field(default=f.default, default_factory=f.default_factory, metadata=f.metadata)
            added.append((f.name, hints[f.name], copied))
    return dataclasses.make_dataclass("DpoOptions", added)


def _split(arguments: list[str]) -> tuple[str | None, list[str]]:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config")
    try:
        found, rest = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise ValueError(f"{error}; give --config FILE") from None
    return found.config, rest


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"--config {path} is not there; recipes/ has some to start from") from None
    except IsADirectoryError:
        raise ValueError(f"--config {path} is a folder; give a file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--config {path} is not YAML ({error}); correct it") from error
    if not isinstance(content, dict):
        raise ValueError(f"--config {path} is no mapping of keys to values; see recipes/")
    for key, value in content.items():
        if not isinstance(key, str):
            raise ValueError(f"--config {path}: key {key!r} is no text; write a setting's name")
        if isinstance(value, list | dict) and key not in _MAY_BE_NESTED:
            raise ValueError(f"--config {path}: {key} is {value!r}; give one value")
        if value is False and key.endswith("_strategy"):
            content[key] = "no"  # what YAML makes of it
        if value is None and key == "report_to":
            content[key] = "none"
    return content


def _as_flag(value: Any) -> Any:
    """Numbers become text, which the flag's own type then reads and refuses like one of the command line.

    (YAML takes 1e-4 for text, and 3 for a number where a flag wants a float.)
    """
    return repr(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def _with_hints(names: list[str], known: Iterable[str]) -> str:
    parts = []
    for name in names:
        close = difflib.get_close_matches(name, list(known), n=1)
        parts.append(f"{name!r}" + (f" (did you mean {close[0]!r}?)" if close else ""))
    return ", ".join(parts)


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown; choose of {', '.join(choices)}")
