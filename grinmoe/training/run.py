"""`grinmoe sft | dpo | pretrain`: one recipe, from data to a checkpoint that can be published.

What it stands on: Transformers' Trainer (supervised fine-tuning and pretraining), TRL's DPOTrainer, PEFT, Accelerate and
datasets. Everything that can be wrong is looked at before the weights are loaded. See docs/training.md.
"""

from __future__ import annotations

import contextlib
import importlib.util
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from rich.console import Console
from transformers import EarlyStoppingCallback, ProgressCallback, Trainer, TrainerCallback, set_seed
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from ..adapters import check_adapter, load_adapter, lora_config, quantization_config
from ..configuration_grinmoe import GrinMoeConfig
from ..data import PreparedData, RowCollator, load_data
from ..distributed import load_for_sharding, shard_for
from ..files import atomic_file, telling_disk_full
from ..modeling_grinmoe import GrinMoeForCausalLM
from ..monitoring import RoutingMonitor, plot_training
from ..tokenization import answer_ends, load_tokenizer
from .checkpoints import on_first_rank
from .inputs import data_digest, model_digest
from .paired_forwards import SameDrawsForReference, check_paired_forwards
from .progress import TrainingProgress, peak_gib
from .recipe import Recipe, launched_for_fsdp
from .result import save_trained
from .run_directory import COMPLETE, PICTURE_NAME, RUN_NAME, STOPPED, RunFolder
from .run_lock import locked_run
from .stop import StopAtSignal, StoppedBySignal
from .trainer import TokenMeanTrainer


@dataclass
class RunResult:
    """How a training ended.

    Attributes:
        status: "complete" or "stopped" (by a signal; the same command goes on).
        step: optimizer steps that are done.
        model: folder of the trained model or adapter; None where it was stopped.
        metrics: of the last evaluation, and the run's own: seconds, tokens_per_s, peak_gib.
    """

    status: str
    step: int
    model: Path | None
    metrics: dict[str, float]
    signal: str | None = None


def train(recipe: Recipe, command: str) -> RunResult:
    """
    Run a recipe: to its end, or until a signal.

    Started again with the same settings it goes on from the newest whole checkpoint of its folder.

    Args:
        recipe: from `read_recipe`.
        command: as typed, to be written down.

    Raises:
        ValueError: bad settings, data, model, tokenizer, adapter or folder, before any weight is loaded.
        ImportError: a package is not installed.
        CheckpointError: a checkpoint is there that no training can go on from exactly.
        DiskFullError: the disk is full; the same command goes on when there is room.
    """
    started = time.perf_counter()
    arguments = recipe.training
    check_installation(recipe)
    is_main = arguments.process_index == 0
    console = Console(highlight=False, soft_wrap=True, markup=False, quiet=not is_main)
    path = RunFolder.locate(recipe)
    interruption = StopAtSignal()
    with interruption.listening(), contextlib.ExitStack() as held:
        if note := on_first_rank(lambda: held.enter_context(locked_run(path, keep_if=RUN_NAME))):
            console.print(note)
        try:
            with interruption.raising():
                folder = on_first_rank(lambda: RunFolder.open(path, recipe, _batch_size(recipe), console.print))
                if folder.is_complete:
                    console.print(f"{folder.path} is complete already; give a new output_dir for another run")
                    return RunResult(COMPLETE, folder.record["step"], folder.result, folder.record["metrics"])
                prepared = _prepare(recipe, folder, console)
        except StoppedBySignal:
            console.print(
                f"Stopped by {interruption.received} before the first step of this start; nothing is lost, and the same "
                "command starts again"
            )
            return RunResult(STOPPED, 0, None, {}, interruption.received)
        # Before the callbacks that write logs into the folder: a kill in between would leave it without its run.json.
        prepared.trainer.callback_handler.callbacks.insert(0, _RecordStart(command, folder, prepared, console))
        interruption.run = folder.run
        interruption.train(prepared.trainer, folder.checkpoint, is_checked=True)
        with telling_disk_full(path):
            return _finish(recipe, folder, prepared, interruption, console, time.perf_counter() - started)


@dataclass
class _Prepared:
    trainer: Trainer
    monitor: RoutingMonitor | None
    data: PreparedData
    digests: dict[str, str | None]


class _RecordStart(TrainerCallback):
    """Writes down that a start trains when optimizer and scheduler are there: settings that they refuse leave nothing."""

    def __init__(self, command: str, folder: RunFolder, prepared: _Prepared, console: Console):
        self._command, self._folder, self._prepared, self._console = command, folder, prepared, console

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            report = self._prepared.data.report
            said = self._folder.start(self._command, asdict(report.train), report.summary(), self._prepared.digests)
            for sentence in said:
                self._console.print(sentence)


def _prepare(recipe: Recipe, folder: RunFolder, console: Console) -> _Prepared:
    """Everything before the first step."""
    arguments = recipe.training
    config, tokenizer = load_config(recipe), _load_tokenizer(recipe)
    _check_model(recipe, config, tokenizer)
    with arguments.main_process_first(local=False, desc="data"):
        data = load_data(recipe.task, recipe.data, tokenizer, config.vocab_size)

    def look() -> dict[str, str | None]:
        digests = {
            "data": data_digest(data, tokenizer),
            "model": model_digest(recipe.run.model or recipe.run.model_config) or vars(config).get("_commit_hash"),
            "adapter": model_digest(recipe.run.adapter),
        }
        folder.compare_inputs(asdict(data.report.train), digests)
        return digests

    digests = on_first_rank(look)
    _tell_start(console, recipe, folder, data)
    set_seed(arguments.seed)
    trainer, monitor = build_trainer(recipe, config, tokenizer, data)
    return _Prepared(trainer, monitor, data, digests)


def check_installation(recipe: Recipe) -> None:
    """
    Raise ImportError where a package that the recipe needs is missing; it names the package and how to get it."""
    run = recipe.run
    needed = {"peft": "train"} if run.uses_adapter else {}
    if recipe.task == "dpo":
        needed["trl"] = "train"
    if run.method == "full-8bit" and launched_for_fsdp():
        needed["torchao"] = ""
    elif run.method in ("qlora", "full-8bit"):
        needed["bitsandbytes"] = "quant"
    trackers = {name: "" for name in recipe.training.report_to or () if name in ("wandb", "trackio", "tensorboard")}
    for module, extra in {**needed, **trackers}.items():
        if importlib.util.find_spec(module) is None:
            package = f"'grinmoe[{extra}]'" if extra else module
            raise ImportError(f"{module} is not installed, which these settings need; pip install {package}")
    attention = run.attn_implementation or ""
    if (attention == "flash_attention_2" and not is_flash_attn_2_available()) or (
        attention == "flash_attention_3" and not is_flash_attn_3_available()
    ):
        raise ImportError(
            f"attn_implementation={attention!r}, and the package is not installed or there is no GPU for it; pip install "
            "'grinmoe[flash]', or choose 'sdpa'"
        )


def load_config(recipe: Recipe) -> GrinMoeConfig:
    """The model's config with the recipe's overrides."""
    run = recipe.run
    overrides: dict[str, Any] = dict(run.config_overrides or {})  # type: ignore[arg-type]  # no text any more
    known = {f.name for f in fields(GrinMoeConfig)} | set(GrinMoeConfig().to_dict())
    if unknown := sorted(overrides.keys() - known):
        raise ValueError(f"config_overrides: {', '.join(unknown)} is no field of GrinMoeConfig; see its docstring")
    unread = sorted(name for name, value in overrides.items() if value and name.startswith(("router_aux", "router_z")))
    if recipe.task == "dpo" and unread:
        raise ValueError(
            f"config_overrides: {', '.join(unread)} has no effect in dpo, where TRL computes the loss; give "
            "router_aux_loss_coef as a setting of its own for TRL's balance loss"
        )
    if recipe.task == "dpo" and recipe.training.disable_dropout:  # type: ignore[attr-defined]
        # TRL looks for dropout modules, and these are functions.
        overrides |= {"attention_dropout": 0.0, "hidden_dropout": 0.0, "expert_dropout": 0.0}
    source = str(run.model or run.model_config)
    config = GrinMoeConfig.from_pretrained(source, revision=run.revision or "main", **overrides)
    if config.model_type != GrinMoeConfig.model_type:
        raise ValueError(f"{source} is a model of type {config.model_type!r}, not {GrinMoeConfig.model_type!r}")
    return config


def build_trainer(
    recipe: Recipe, config: GrinMoeConfig, tokenizer: Any, data: PreparedData
) -> tuple[Trainer, RoutingMonitor | None]:
    """Load the weights and put the trainer together."""
    arguments, run = recipe.training, recipe.run
    common: dict[str, Any] = {
        "args": arguments,
        "train_dataset": data.train,
        "eval_dataset": data.evaluation,
        "processing_class": tokenizer,
    }
    if recipe.task == "dpo":
        trainer = _dpo_trainer(recipe, config, common)
    else:
        model = load_model(recipe, config, to_be_sharded=launched_for_fsdp())
        if run.model_config is not None:
            model.generation_config.eos_token_id = answer_ends(tokenizer)
        if run.uses_adapter:
            model = _with_adapter(recipe, model)
        trainer = TokenMeanTrainer(model=model, data_collator=RowCollator(tokenizer.pad_token_id), **common)
    if run.early_stopping_patience is not None:
        trainer.add_callback(EarlyStoppingCallback(run.early_stopping_patience))
    if not arguments.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(TrainingProgress)
    shard_for(trainer)
    return trainer, RoutingMonitor().attach(trainer) if run.watch_routers else None


def load_model(recipe: Recipe, config: GrinMoeConfig, to_be_sharded: bool = False) -> GrinMoeForCausalLM:
    """The recipe's model: initialised from its config; loaded (to be sharded: on one rank); or quantised while it is."""
    run = recipe.run
    implementations = {
        name: value
        for name in ("attn_implementation", "experts_implementation")
        if (value := getattr(run, name)) is not None
    }
    dtype = weights_dtype(recipe)
    if run.model_config is not None:
        for name, value in implementations.items():
            setattr(config, f"_{name}", value)
        return GrinMoeForCausalLM(config).to(dtype)  # type: ignore[arg-type]  # torch wraps a method that types do not see
    options: dict[str, Any] = {"dtype": dtype, "revision": run.revision, **implementations}
    if run.method == "qlora":
        options["quantization_config"] = quantization_config(run.quantization, dtype)
    elif to_be_sharded:
        return load_for_sharding(str(run.model), config=config, **options)
    return GrinMoeForCausalLM.from_pretrained(run.model, config=config, **options)


def weights_dtype(recipe: Recipe) -> torch.dtype:
    """In which the weights are held: float32 where all of them are trained, so that small steps are not lost."""
    if recipe.run.dtype != "auto":
        return getattr(torch, recipe.run.dtype)
    frozen = recipe.run.uses_adapter and recipe.training.device.type != "cpu"
    return torch.bfloat16 if frozen else torch.float32


def _load_tokenizer(recipe: Recipe):
    source = str(recipe.run.tokenizer or recipe.run.model)
    revision = None if recipe.run.tokenizer else recipe.run.revision
    tokenizer = load_tokenizer(source, revision=revision)
    # Rows are cut to max_length after they have been tokenised: nothing to warn of.
    tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
    return tokenizer


def _check_model(recipe: Recipe, config: GrinMoeConfig, tokenizer: Any) -> None:
    """What config, tokenizer and adapter must have in common."""
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens and the model's vocab_size is {config.vocab_size}; give the "
            "model's own tokenizer"
        )
    length = recipe.data.max_length
    if length > config.max_position_embeddings:
        raise ValueError(
            f"max_length={length} is more than the model's max_position_embeddings={config.max_position_embeddings}; "
            "lower it"
        )
    arguments: Any = recipe.training
    if arguments.eval_strategy != "no" and recipe.data.eval_data is None and not recipe.data.eval_share:
        raise ValueError(f"eval_strategy={arguments.eval_strategy.value!r} has no data; give eval_data or eval_share")
    if arguments.label_smoothing_factor:  # dpo has refused it
        if config.router_aux_loss_coef or config.router_z_loss_coef:
            raise ValueError(
                "label_smoothing_factor replaces the model's loss, and with it the router's losses; set it to 0, or "
                "router_aux_loss_coef and router_z_loss_coef in config_overrides"
            )
        if arguments.torch_compile:
            raise ValueError(
                "label_smoothing_factor with torch_compile: the Trainer does not recognise a compiled language model, and "
                "would train it to repeat its input; leave one of them out"
            )
    if recipe.task == "dpo":
        check_paired_forwards(config, arguments)
    if recipe.run.uses_adapter:
        if recipe.run.adapter is not None:
            check_adapter(recipe.run.adapter, GrinMoeForCausalLM, config)
        else:
            _lora_config(recipe, config)


def _lora_config(recipe: Recipe, config: GrinMoeConfig):
    run = recipe.run
    return lora_config(
        config,
        r=run.lora_r,
        alpha=run.lora_alpha,
        experts=run.chosen_experts(),
        shared_a=run.lora_shared_a,
        attention=run.lora_attention,
        router=run.lora_router,
    )


def _with_adapter(recipe: Recipe, model: GrinMoeForCausalLM):
    if recipe.run.adapter is not None:
        return load_adapter(model, recipe.run.adapter, is_trainable=True)
    return get_peft_model(model, _lora_config(recipe, model.config))


def _dpo_trainer(recipe: Recipe, config: GrinMoeConfig, common: dict[str, Any]) -> Trainer:
    from .pair_trainer import PairTrainer

    arguments: Any = recipe.training
    if arguments.router_aux_loss_coef is None:
        # TRL's balance loss is Mixtral's, over one batch of one rank: not by default.
        arguments.router_aux_loss_coef = 0.0
    model: Any = load_model(recipe, config, to_be_sharded=launched_for_fsdp())
    reference, peft_config, kept = None, None, {}
    if recipe.run.adapter is not None:
        model = _with_adapter(recipe, model)
        kept = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    elif recipe.run.uses_adapter:
        peft_config = _lora_config(recipe, config)
    elif not arguments.precompute_ref_log_probs:
        reference = load_model(recipe, config)
    trainer: Any = PairTrainer(
        model=model, ref_model=reference, peft_config=peft_config, data_options=recipe.data, **common
    )
    # TRL rounds the adapters of a quantised model to bfloat16; here they are trained in float32.
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad and recipe.run.uses_adapter:
            parameter.data = kept[name] if name in kept else parameter.data.float()
    SameDrawsForReference().attach(trainer)
    return trainer


def _batch_size(recipe: Recipe) -> int:
    arguments = recipe.training
    return arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size


def _tell_start(console: Console, recipe: Recipe, folder: RunFolder, data: PreparedData) -> None:
    console.print(recipe.task, style="bold", end=" ")
    console.print(f"{recipe.run.method} of {recipe.run.model or recipe.run.model_config}")
    console.print(data.report.summary())
    if folder.checkpoint is not None:
        console.print(f"Going on from {folder.checkpoint}")


def _finish(
    recipe: Recipe,
    folder: RunFolder,
    prepared: _Prepared,
    interruption: StopAtSignal,
    console: Console,
    seconds: float,
) -> RunResult:
    trainer, monitor = prepared.trainer, prepared.monitor
    state = trainer.state
    metrics = {"seconds": round(seconds, 1), "peak_gib": round(peak_gib(), 3)}
    if monitor is not None and monitor.records:
        metrics["tokens_per_s"] = round(monitor.tokens / sum(record.seconds for record in monitor.records), 1)
    evaluation: dict[str, Any] = next((entry for entry in reversed(state.log_history) if "eval_loss" in entry), {})
    metrics |= {name: value for name, value in evaluation.items() if name.startswith("eval_")}
    is_unfinished = state.global_step < state.max_steps or interruption.evaluation_is_due
    if interruption.received is not None and is_unfinished:
        if state.is_world_process_zero:
            folder.end(STOPPED, state.log_history, step=state.global_step, metrics=metrics)
        console.print(
            f"Stopped by {interruption.received} after step {state.global_step} of {state.max_steps}; "
            f"{recipe.why_it_cannot_go_on or 'the same command goes on from there'}"
        )
        return RunResult(STOPPED, state.global_step, None, metrics, interruption.received)
    if state.is_world_process_zero and monitor is not None and monitor.records:
        with atomic_file(folder.path / PICTURE_NAME) as partial:
            plot_training(monitor, partial)
    final = save_trained(recipe, trainer, folder.result, metrics)
    if state.is_world_process_zero:
        folder.end(COMPLETE, state.log_history, step=state.global_step, metrics=metrics)
    console.print("Done", style="bold", end=": ")
    console.print(f"{final}{_told(metrics)}")
    return RunResult(COMPLETE, state.global_step, final, metrics)


def _told(metrics: dict[str, float]) -> str:
    parts = []
    if "eval_loss" in metrics:
        parts.append(f"held-out loss {metrics['eval_loss']:.4f}")
    if "eval_rewards/accuracies" in metrics:
        parts.append(f"reward accuracy {metrics['eval_rewards/accuracies']:.3f}")
    if "tokens_per_s" in metrics:
        parts.append(f"{metrics['tokens_per_s']:,.0f} tokens/s")
    parts.append(f"peak {metrics['peak_gib']:.2f} GiB")
    return f" ({', '.join(parts)})"
