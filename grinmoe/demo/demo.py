"""`grinmoe demo`: the main job from end to end, small enough for two CPU cores and four minutes.

Real text -> tokenizer -> a GRIN MoE trained from scratch with the Trainer -> perplexity -> a checkpoint with its code
-> loaded by a process without this package -> the same logits, and answers. One picture and a table show what happened.
"""

from __future__ import annotations

import contextlib
import json
import math
import resource
import shlex
import shutil
import sys
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import DataCollatorForSeq2Seq, ProgressCallback, Trainer, TrainingArguments, set_seed

from ..configuration_grinmoe import GrinMoeConfig, read_json_object
from ..files import require_packages
from ..hub import CARD_NAME, CardFacts, Evaluation, card_for, load_elsewhere, logits_without_the_package
from ..modeling_grinmoe import GrinMoeForCausalLM
from ..monitoring import RoutingMonitor, plot_training
from ..outputs import check_folder, check_replaceable, folder_when_whole
from ..tokenization import answer_ends, build_tokenizer
from ..training import TrainingProgress, peak_gib
from .chat_corpus import encode, load_corpus, texts
from .options import DemoOptions

# The first two questions are in the training text, the third is held out.
PROMPTS = ("What is a computer?", "I forgot my password.", "What are you?")
_PICTURE, _MODEL, _FACTS = "training.png", "model", "demo.json"


@dataclass(frozen=True)
class DemoSettings:
    """
    Sizes of the demo, chosen so that two cores train for about a minute and a half.

    The text is small (some 40,000 tokens): held-out perplexity is lowest after a third of the steps. The rest is for the
    answers, which are readable only when the model knows its text nearly by heart.
    """

    steps: int = 700
    seed: int = 0
    vocab_size: int = 1024
    row_length: int = 128
    batch_size: int = 32
    learning_rate: float = 5e-3
    hidden_size: int = 128
    intermediate_size: int = 192
    num_hidden_layers: int = 3
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    num_local_experts: int = 8
    num_experts_per_tok: int = 2
    router_aux_loss_coef: float = 0.01
    initializer_range: float = 0.05  # the released 0.02 is for a width of 4096 and trains a narrow model slowly
    max_shard_size: str = "2MB"
    max_new_tokens: int = 48

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"--steps {self.steps} trains nothing; give 1 or more")


@dataclass
class DemoResult:
    """What the demo measured; also the content of demo.json."""

    settings: dict[str, Any]
    parameters: int = 0
    active_parameters: int = 0
    train_rows: int = 0
    held_out_rows: int = 0
    perplexity_before: float = math.nan
    perplexity_after: float = math.nan
    perplexity_lowest: float = math.nan
    perplexity_lowest_step: int = 0
    tokens_per_s: float = math.nan
    balance_loss: float = math.nan
    max_over_mean_load: float = math.nan
    checkpoint_bytes: int = 0
    shards: int = 0
    logits_difference: float = math.nan
    answers: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    peak_gib: float = math.nan
    files: list[str] = field(default_factory=list)

    @contextlib.contextmanager
    def timed(self, stage: str):
        start = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start


def run_demo(options: DemoOptions) -> DemoResult:
    """
    Run the demo.

    Args:
        options: where it goes (a folder of an earlier demo is replaced when this one is complete) and how long it trains.

    Returns:
        What was measured. `output` then holds `model/`, `training.png` and `demo.json`.

    Raises:
        ValueError: `output` holds something else, or `steps` is not positive.
        ImportError: a package that training needs is not installed.
        LoadElsewhereError: the checkpoint did not load elsewhere, or gave other logits.
    """
    steps = DemoSettings.steps if options.steps is None else options.steps
    settings = DemoSettings(steps=steps, seed=options.seed)
    target = _checked_target(options.output)
    require_packages("train", "accelerate", "chatterbot_corpus", "matplotlib")
    console = Console(highlight=False, soft_wrap=True)
    result = DemoResult(asdict(settings))
    with folder_when_whole(target) as workspace:
        with result.timed("total"):
            _run_stages(settings, workspace, result, console)
        result.peak_gib = max(peak_gib(), peak_gib(resource.RUSAGE_CHILDREN))
        result.files = sorted({*_files_below(workspace), _FACTS})
        # JSON has no NaN, which stands for what was not measured.
        facts = {name: None if value != value else value for name, value in asdict(result).items()}
        (workspace / _FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    _print_summary(result, Path(options.output), console)
    return result


def _run_stages(settings: DemoSettings, workspace: Path, result: DemoResult, console: Console) -> None:
    set_seed(settings.seed)
    console.print("[bold]1/5[/bold] Reading chatterbot-corpus and training a tokenizer on it")
    with result.timed("data"):
        corpus = load_corpus()
        tokenizer = build_tokenizer(texts(corpus.train), settings.vocab_size, model_max_length=settings.row_length * 2)
        train_rows = encode(corpus.train, tokenizer, settings.row_length)
        held_out = encode(corpus.held_out, tokenizer, settings.row_length)
    result.train_rows, result.held_out_rows = len(train_rows), len(held_out)

    model = GrinMoeForCausalLM(demo_config(settings, tokenizer))
    model.generation_config.eos_token_id = answer_ends(tokenizer)
    result.parameters, result.active_parameters = count_parameters(model)
    console.print(
        f"[bold]2/5[/bold] Training {settings.num_hidden_layers} layers of {settings.num_local_experts} experts, top-"
        f"{settings.num_experts_per_tok}, with SparseMixer-v2: {result.parameters / 1e6:.1f} M parameters, "
        f"{result.active_parameters / 1e6:.1f} M active"
    )
    monitor = _train(settings, model, tokenizer, train_rows, held_out, workspace, result)

    folder = workspace / _MODEL
    console.print("[bold]3/5[/bold] Saving shards, code and tokenizer")
    with result.timed("save"):
        model.save_pretrained(folder, max_shard_size=settings.max_shard_size)
        tokenizer.save_pretrained(folder)
        shards = list(folder.glob("*.safetensors"))
        result.shards, result.checkpoint_bytes = len(shards), sum(shard.stat().st_size for shard in shards)
    console.print("[bold]4/5[/bold] Loading it in a process without this package; its last question is held out")
    with result.timed("load elsewhere"):
        _load_elsewhere(model, torch.tensor(held_out[0]["input_ids"]), folder, settings, result)
    console.print("[bold]5/5[/bold] Drawing the picture and writing the model card")
    with result.timed("picture"):
        plot_training(monitor, workspace / _PICTURE)
        shutil.copyfile(workspace / _PICTURE, folder / _PICTURE)
        _write_card(folder, result)


def demo_config(settings: DemoSettings, tokenizer) -> GrinMoeConfig:
    """The demo's model: sizes have the same names in the settings and in the config."""
    names = {f.name for f in fields(GrinMoeConfig)}
    sizes = {name: value for name, value in asdict(settings).items() if name in names}
    sizes |= {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 2 * settings.row_length,
        "sliding_window": settings.row_length - 1,
    }
    tokens = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return GrinMoeConfig(**sizes, **tokens, router_aux_loss_scope="global")


def count_parameters(model: GrinMoeForCausalLM) -> tuple[int, int]:
    """All parameters, and those that work on one token: K of the E experts."""
    total = model.num_parameters()
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    idle = 1 - model.config.num_experts_per_tok / model.config.num_local_experts
    return total, round(total - experts * idle)


def _train(settings, model, tokenizer, train_rows, held_out, workspace: Path, result: DemoResult) -> RoutingMonitor:
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(workspace / "trainer"),
            max_steps=settings.steps,
            per_device_train_batch_size=settings.batch_size,
            per_device_eval_batch_size=settings.batch_size,
            learning_rate=settings.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, settings.steps // 20),
            weight_decay=0.01,
            logging_steps=max(1, settings.steps // 60),
            eval_strategy="steps",
            eval_steps=max(1, settings.steps // 16),
            save_strategy="no",
            report_to="none",
            seed=settings.seed,
            # Rows are short and of many lengths: without this more than half of a batch is padding.
            train_sampling_strategy="group_by_length",
            dataloader_pin_memory=False,
        ),
        train_dataset=train_rows,
        eval_dataset=held_out,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
    )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(TrainingProgress)
    monitor = RoutingMonitor().attach(trainer)
    with result.timed("evaluate"):
        result.perplexity_before = math.exp(trainer.evaluate()["eval_loss"])
    with result.timed("train"):
        trainer.train()
    with result.timed("evaluate"):
        result.perplexity_after = math.exp(trainer.evaluate()["eval_loss"])
    result.perplexity_lowest_step, lowest_loss = min(monitor.eval_loss, key=lambda step_and_loss: step_and_loss[1])
    result.perplexity_lowest = math.exp(lowest_loss)
    result.tokens_per_s = monitor.tokens / result.seconds["train"]
    result.balance_loss = float(monitor.records[-1].balance_loss.mean())
    load = monitor.final_load()
    result.max_over_mean_load = float((load.max(dim=1).values / load.mean(dim=1)).max())
    model.config.use_cache = True  # the Trainer had turned it off
    shutil.rmtree(workspace / "trainer", ignore_errors=True)
    return monitor


def _write_card(folder: Path, result: DemoResult) -> None:
    """card.json and README.md, after everything else: the card shows the picture and what was measured elsewhere."""
    settings = result.settings
    facts = CardFacts(
        title="GRIN MoE demo",
        summary="A demonstration, trained from scratch by `grinmoe demo`: it shows the training, not knowledge.",
        license="mit",
        language=["en"],
        data=f"The English part of [chatterbot-corpus](https://github.com/gunthercox/chatterbot-corpus) (BSD license): "
        f"questions and answers and short dialogues, {result.train_rows} conversations. {result.held_out_rows} more, with "
        "questions of their own, were held out.",
        hyperparameters={
            "estimator of the router's gradient": "SparseMixer-v2",
            "weight of the balance loss": settings["router_aux_loss_coef"],
            "optimizer steps": settings["steps"],
            "conversations in a batch": settings["batch_size"],
            "longest conversation, in tokens": settings["row_length"],
            "optimizer": "AdamW, weight decay 0.01",
            "learning rate": f"{settings['learning_rate']}, cosine, 5 % of the steps to warm up",
            "seed": settings["seed"],
        },
        measurements={
            "parameters": f"{result.parameters:,}, of which {result.active_parameters:,} work on a token",
            "held-out perplexity, untrained": f"{result.perplexity_before:,.0f}",
            "held-out perplexity, lowest": f"{result.perplexity_lowest:.1f} at step {result.perplexity_lowest_step}",
            "balance loss": f"{result.balance_loss:.3f} (even load: {settings['num_experts_per_tok']})",
            "busiest expert": f"{result.max_over_mean_load:.2f} x the mean load of its layer",
            "logits in a process without the package": f"differ by {result.logits_difference:.2g} at most",
        },
        evaluations=[
            Evaluation(
                dataset_name="chatterbot-corpus, English, held-out questions",
                dataset_type="chatterbot-corpus",
                dataset_config="english",
                dataset_split="held-out",
                metric_name="perplexity of a token",
                metric_type="perplexity",
                value=round(result.perplexity_after, 3),
            )
        ],
        picture=_PICTURE,
    )
    facts.write(folder)
    card_for(folder).save(folder / CARD_NAME)


def _load_elsewhere(model, ids: torch.Tensor, folder: Path, settings: DemoSettings, result: DemoResult) -> None:
    logits = logits_without_the_package(model.to("cpu"), ids)
    found = load_elsewhere(folder, ids, logits, prompts=PROMPTS, max_new_tokens=settings.max_new_tokens)
    result.logits_difference, result.answers = found.logits_difference, found.answers


def _checked_target(output: str) -> Path:
    """The absolute path. Raises ValueError unless it is new, empty or exactly what an earlier demo wrote."""
    target = check_folder(output)
    check_replaceable(target)
    present = _files_below(target)
    if not present:
        return target
    written: Any = None
    if _FACTS in present:
        with contextlib.suppress(ValueError):
            written = read_json_object(target / _FACTS).get("files")
    if not isinstance(written, list) or (others := sorted(set(present) - set(map(str, written)))):
        example = present[0] if not isinstance(written, list) else others[0]
        raise ValueError(
            f"--output {output} is not empty, and {example} in it is not what an earlier demo wrote; give a new folder"
        )
    return target


def _files_below(folder: Path) -> list[str]:
    return sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()
    )


def _print_summary(result: DemoResult, output: Path, console: Console) -> None:
    settings = result.settings
    table = Table(show_header=False, title="GRIN MoE demo", title_justify="left", title_style="bold")
    table.add_row("parameters", f"{result.parameters:,}, of which {result.active_parameters:,} work on a token")
    table.add_row("training", f"{settings['steps']} steps, {result.tokens_per_s:,.0f} tokens/s")
    table.add_row("held-out perplexity", f"{result.perplexity_before:,.0f} before, {result.perplexity_after:.1f} after")
    table.add_row("its lowest", f"{result.perplexity_lowest:.1f} at step {result.perplexity_lowest_step}")
    table.add_row("balance loss", f"{result.balance_loss:.3f} (even load: {settings['num_experts_per_tok']})")
    table.add_row("busiest expert", f"{result.max_over_mean_load:.2f} x the mean load of its layer")
    table.add_row("checkpoint", f"{result.shards} shards, {result.checkpoint_bytes / 1e6:.1f} MB")
    same = "equal" if result.logits_difference == 0 else f"within {result.logits_difference:.1g}"
    table.add_row("logits, loaded elsewhere", same)
    table.add_section()
    for stage, seconds in result.seconds.items():
        table.add_row(f"time, {stage}", f"{seconds:.1f} s")
    table.add_row("peak memory", f"{result.peak_gib:.2f} GiB in the larger of two processes")
    console.print(table)
    console.print(f"picture   {output / _PICTURE}", markup=False)
    console.print(f"chat      {_own_command()} generate --model {shlex.quote(str(output / _MODEL))}", markup=False)


def _own_command() -> str:
    """How to call this program from where the user is; `make` runs it without its folder on the PATH."""
    if shutil.which("grinmoe"):
        return "grinmoe"
    # Not resolved: a virtual environment's interpreter is a link to another one.
    interpreter = Path(sys.executable)
    here = Path.cwd()
    shown = interpreter.relative_to(here) if interpreter.is_relative_to(here) else interpreter
    return f"{shlex.quote(str(shown))} -m grinmoe_cli"
