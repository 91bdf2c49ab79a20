"""Save a trained model or adapter in a folder of its own, with tokenizer and card, ready for `grinmoe push`."""

from __future__ import annotations

import contextlib
import math
import shutil
from pathlib import Path
from typing import Any

from ..distributed import export_sharded, is_sharded
from ..hub import CARD_NAME, CardFacts, Evaluation, card_for
from ..outputs import folder_when_whole
from .checkpoints import checkpoints
from .recipe import Recipe
from .run_directory import PICTURE_NAME

_ALGORITHM = {
    "sft": "supervised fine-tuning",
    "dpo": "direct preference optimisation",
    "pretrain": "training on text",
}
_METHOD = {
    "full": "all weights",
    "full-8bit": "all weights, AdamW in 8 bits",
    "lora": "low-rank adapters",
    "qlora": "low-rank adapters on a quantised base",
}


def save_trained(recipe: Recipe, trainer: Any, target: Path, metrics: dict[str, float]) -> Path:
    """
    Save what was trained to the folder `target` of the run's folder; on a sharded model a collective.

    The folder appears when it is complete; one of an earlier start is replaced.

    Returns:
        The folder.
    """
    run_folder, is_main = target.parent, trainer.args.should_save
    trainer.accelerator.wait_for_everyone()
    trainer.model.config.use_cache = True  # the Trainer had turned it off
    if "ref" in getattr(trainer.model, "peft_config", {}):
        trainer.model.delete_adapter("ref")  # TRL's copy of the adapter that a preference training began with
    source = _sharded_source(trainer, run_folder)
    # The other ranks give their weights and write nothing.
    with folder_when_whole(target) if is_main else contextlib.nullcontext(target) as partial:
        if source is None:
            trainer.save_model(str(partial))
        elif is_main:
            # Rather than gather all float32 weights on one rank a second time.
            export_sharded(source, partial)
            trainer.processing_class.save_pretrained(partial)
        if is_main:
            (partial / "training_args.bin").unlink(missing_ok=True)  # a pickle, of this machine
            (partial / CARD_NAME).unlink(missing_ok=True)  # of PEFT or TRL: ours says more
            _write_card(recipe, partial, run_folder, metrics, trainer)
    trainer.accelerator.wait_for_everyone()
    return target


def _sharded_source(trainer: Any, run_folder: Path) -> Path | None:
    """The sharded checkpoint of what the model now is, None where it is not sharded."""
    if not trainer.is_fsdp_enabled:
        return None
    best = trainer.state.best_model_checkpoint if trainer.args.load_best_model_at_end else None
    source = Path(best) if best is not None else next(reversed(checkpoints(run_folder)), None)
    if source is not None and is_sharded(source) and (best or source.name.endswith(f"-{trainer.state.global_step}")):
        return source
    trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    return None


def _write_card(recipe: Recipe, folder: Path, run_folder: Path, metrics: dict[str, float], trainer: Any) -> None:
    picture = None
    if (run_folder / PICTURE_NAME).is_file():
        picture = PICTURE_NAME
        shutil.copyfile(run_folder / picture, folder / picture)
    run, adapter = recipe.run, recipe.run.uses_adapter
    data = recipe.data.train_data
    on_hub = not Path(data).exists()
    facts = CardFacts(
        title=run_folder.resolve().name,
        summary=f"Made by `grinmoe {recipe.task}`: {_ALGORITHM[recipe.task]}, {_METHOD[run.method]}.",
        base_model=run.model,
        base_model_relation=None if run.model is None else "adapter" if adapter else "finetune",
        datasets=[data] if on_hub else [],
        data="" if on_hub else "A local file that is not published here.",
        hyperparameters=_hyperparameters(recipe, trainer),
        measurements=_measurements(metrics),
        evaluations=_evaluations(recipe, metrics),
        picture=picture,
        library_name="peft" if adapter else "transformers",
    )
    facts.write(folder)
    if run.model is not None and Path(run.model).exists():
        return  # a card names its base by the id on the Hub, which `grinmoe push --base-model` gives
    card_for(folder).save(folder / CARD_NAME)


def _hyperparameters(recipe: Recipe, trainer: Any) -> dict[str, Any]:
    run: Any = recipe.run
    arguments: Any = recipe.training
    chosen: dict[str, Any] = {
        "algorithm": _ALGORITHM[recipe.task],
        "trained": _METHOD[run.method],
        "optimizer steps": trainer.state.global_step,
        "samples in a step": arguments.per_device_train_batch_size
        * arguments.gradient_accumulation_steps
        * arguments.world_size,
        "longest row, in tokens": recipe.data.max_length,
        "learning rate": f"{arguments.learning_rate:g}, {arguments.lr_scheduler_type.value!s}",
        "optimizer": str(getattr(arguments.optim, "value", arguments.optim)),
        "weight decay": arguments.weight_decay,
        "seed": arguments.seed,
        "estimator of the router's gradient": trainer.model.config.router_estimator,
    }
    if run.uses_adapter and run.adapter is None:
        chosen["rank and alpha of the adapters"] = f"{run.lora_r}, {run.lora_alpha:g}"
        chosen["adapted experts"] = run.lora_experts + (", one A for all" if run.lora_shared_a else "")
    if run.method == "qlora":
        chosen["quantisation of the base"] = run.quantization
    if recipe.task == "dpo":
        chosen["beta"] = arguments.beta
    else:
        chosen["weight of the balance loss"] = trainer.model.config.router_aux_loss_coef
    return chosen


def _measurements(metrics: dict[str, float]) -> dict[str, str]:
    measured = {"peak memory": f"{metrics['peak_gib']:.2f} GiB"}
    if "tokens_per_s" in metrics:
        measured["speed"] = f"{metrics['tokens_per_s']:,.0f} tokens/s"
    if "eval_loss" in metrics:
        measured["held-out loss"] = f"{metrics['eval_loss']:.4f}"
    if "eval_rewards/accuracies" in metrics:
        measured["held-out reward accuracy"] = f"{metrics['eval_rewards/accuracies']:.3f}"
    return measured


def _evaluations(recipe: Recipe, metrics: dict[str, float]) -> list[Evaluation]:
    if recipe.task == "dpo" or "eval_loss" not in metrics:
        return []
    perplexity = math.exp(metrics["eval_loss"])
    if not math.isfinite(perplexity):
        return []
    data = recipe.data.eval_data or recipe.data.train_data
    name = "held-out data" if Path(data).exists() else data
    return [
        Evaluation(
            dataset_name=name,
            dataset_type=name,
            dataset_split="held-out",
            metric_name="perplexity of a target token",
            metric_type="perplexity",
            value=round(perplexity, 4),
        )
    ]
