"""Speed and memory of whole optimizer steps through Transformers' Trainer: a sparse model against its dense twin.

    python -m benchmarks train_step
    TRITON_INTERPRET=1 python -m benchmarks train_step --toy

Random tokens, AdamW, the released model's width on a GPU, few layers. Weights are float32, and on a GPU autocast computes
in bfloat16, as the Trainer's `bf16=True` does. The dense twin has the same attention, embedding and head, and in the place
of each block a SwiGLU MLP of K times an expert's width: as many active parameters. Routing is as it comes: sampled,
jittered, with the balance loss. No monitor is attached.

Arms take turns, each with a model and an optimizer of its own, so that only one is in memory; a turn's first steps are not
counted. The optimizer's part is told apart: it works on all parameters, of which the sparse model has more, and with
gradient accumulation its share falls.

MFU counts 6 operations for each active weight and token, and attention over the keys that are seen, at the rate that the
device was measured to multiply with.
"""

from __future__ import annotations

import gc
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from benchmarks.bench_layer import make_dense
from benchmarks.block_arms import DENSE, describe
from benchmarks.protocol import FEWEST_ROUNDS, Report, best_device, rates
from grinmoe import GrinMoeConfig, GrinMoeForCausalLM
from grinmoe.planning import Step, flops_per_token
from grinmoe.provenance import markdown_table


@dataclass(frozen=True)
class TrainStepSettings:
    """Sizes that are None are those of the device.

    Attributes:
        layers, batch, sequence: of the models, and of a step.
        turns, warmup, steps: each arm has so many turns, of so many uncounted and counted steps.
        minutes: after which no turn is begun.
    """

    layers: int = 2
    batch: int = 4
    sequence: int | None = None
    turns: int = 3
    warmup: int = 2
    steps: int = 7
    minutes: float | None = None
    toy: bool = False

    def for_device(self, device: torch.device) -> TrainStepSettings:
        if self.toy:
            return replace(self, layers=1, batch=1, sequence=32, turns=1, warmup=1, steps=FEWEST_ROUNDS)
        if device.type == "cuda":
            return replace(self, sequence=self.sequence or 4096)
        return replace(
            self, sequence=self.sequence or 256, turns=min(self.turns, 2), warmup=1, steps=min(self.steps, 5)
        )


@dataclass
class Measured:
    """Of one arm, over its turns: seconds of each step, of these seconds in the optimizer, and peak memory on a GPU."""

    parameters: int = 0
    seconds: list[float] = field(default_factory=list)
    optimizer_seconds: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    failure: str | None = None


class StepClock(TrainerCallback):
    """Enters the time of every step after `warmup` in `measured`, with the device idle at both ends."""

    def __init__(self, measured: Measured, warmup: int, device: torch.device):
        self.measured, self.warmup, self.device = measured, warmup, device
        self.begun = self.before_optimizer = 0.0

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def on_step_begin(self, args, state, control, **kwargs):
        self.begun = self._now()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.before_optimizer = self._now()

    def on_step_end(self, args, state, control, **kwargs):
        end = self._now()
        if state.global_step > self.warmup:
            self.measured.seconds.append(end - self.begun)
            self.measured.optimizer_seconds.append(end - self.before_optimizer)


def model_config(options: TrainStepSettings, device: torch.device) -> GrinMoeConfig:
    sizes: dict[str, Any] = {"router_aux_loss_coef": 0.001, "router_aux_loss_scope": "global"}
    if device.type != "cuda":
        sizes |= {"hidden_size": 512, "intermediate_size": 800, "num_attention_heads": 8, "vocab_size": 4096}
    if options.toy:
        sizes |= {"hidden_size": 64, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
        sizes |= {"vocab_size": 256, "num_local_experts": 8}
    if "vocab_size" in sizes:
        sizes |= {"eos_token_id": 1, "pad_token_id": 1}
    return GrinMoeConfig(num_hidden_layers=options.layers, use_cache=False, **sizes)


def build(implementation: str, config: GrinMoeConfig, device: torch.device) -> GrinMoeForCausalLM:
    """A model with float32 weights; `DENSE` is the twin, which has no router and no balance loss."""
    config = GrinMoeConfig.from_dict(config.to_dict())
    if implementation == DENSE:
        config.router_aux_loss_coef = 0.0
    torch.manual_seed(0)
    with device:
        model = GrinMoeForCausalLM(config)
        if implementation == DENSE:
            make_dense(model.model)
        else:
            model.set_experts_implementation(implementation)
    return model


def train(model: GrinMoeForCausalLM, options: TrainStepSettings, device: torch.device, measured: Measured) -> None:
    """One turn."""
    steps = options.warmup + options.steps
    generator = torch.Generator().manual_seed(1)
    shape = (steps * options.batch, options.sequence or 0)
    ids = torch.randint(model.config.vocab_size, shape, generator=generator)
    on_gpu = device.type == "cuda"
    with tempfile.TemporaryDirectory(prefix="grinmoe-bench-") as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=options.batch,
            learning_rate=1e-4,
            optim="adamw_torch_fused" if on_gpu else "adamw_torch",
            bf16=on_gpu,
            use_cpu=not on_gpu,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=on_gpu,
        )
        rows = [{"input_ids": row, "labels": row} for row in ids]
        clock = StepClock(measured, options.warmup, device)
        trainer = Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[clock])
        trainer.remove_callback(PrinterCallback)
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        trainer.train()
        if on_gpu:
            measured.peak_bytes = max(measured.peak_bytes or 0, torch.cuda.max_memory_allocated())


def take_turns(
    options: TrainStepSettings, config: GrinMoeConfig, device: torch.device, report: Report
) -> dict[str, Measured]:
    deadline = None if options.minutes is None else time.monotonic() + 60 * options.minutes
    names = [DENSE, "grinmoe", *(["grinmoe_triton"] if device.type == "cuda" or options.toy else [])]
    arms = {name: Measured() for name in names}
    for turn in range(options.turns):
        if turn and deadline is not None and time.monotonic() > deadline:
            break
        for name, measured in arms.items():
            if measured.failure:
                continue
            model = None
            try:
                model = build(name, config, device)
                measured.parameters = sum(parameter.numel() for parameter in model.parameters())
                train(model, options, device, measured)
            # What kernels and allocators raise; the other arms are measured all the same.
            except Exception as error:
                measured.failure = describe(error)
            model = None
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
            report.add("arms", {name: asdict(one) for name, one in arms.items() if one.seconds or one.failure})
    return arms


def table(arms: dict[str, Measured], tokens: int, flops: float, tflops: float | None) -> str:
    """Medians; `flops` of a token's step, and the device's rate, or None where MFU would mean nothing."""
    rows = []
    dense = arms[DENSE]
    for name, measured in arms.items():
        if measured.failure or len(measured.seconds) < 2:
            rows.append([name, f"{measured.parameters / 1e6:,.0f} M", measured.failure or "not run", *["-"] * 6])
            continue
        median = statistics.median(measured.seconds)
        low, _, high = statistics.quantiles(measured.seconds, n=4, method="inclusive")
        optimizer = statistics.median(measured.optimizer_seconds)
        ratio = statistics.median(dense.seconds) / median if dense.seconds else float("nan")
        rows.append(
            [
                name,
                f"{measured.parameters / 1e6:,.0f} M",
                f"{1e3 * median:.1f}",
                f"{1e3 * low:.1f} to {1e3 * high:.1f}",
                f"{1e3 * optimizer:.1f}",
                f"{tokens / median:,.0f}",
                f"{ratio:.3f}",
                "-" if tflops is None else f"{tokens * flops / median / (tflops * 1e12):.1%}",
                "-" if measured.peak_bytes is None else f"{measured.peak_bytes / 2**30:.1f}",
            ]
        )
    header = ["arm", "parameters", "step, ms", "quartiles, ms", "of it optimizer, ms", "tokens/s", "speed over dense"]
    return markdown_table([*header, "MFU", "peak, GiB"], rows)


def run(options: TrainStepSettings) -> Path:
    """
    Measure all arms, print the table, and return the path of the report.

    Raises:
        RuntimeError: an arm does not run here. The report is written all the same.
    """
    device = best_device()
    options = options.for_device(device)
    config = model_config(options, device)
    report = Report("train_step", asdict(options), options.toy)
    best = rates(device)
    report.add("rates", best)
    arms = take_turns(options, config, device, report)
    tokens = options.batch * (options.sequence or 0)
    flops = flops_per_token(Step(config, "full", options.batch, options.sequence or 0, gradient_checkpointing=False))
    on_gpu = device.type == "cuda"
    text = (
        f"{options.layers} layers, H {config.hidden_size}, I {config.intermediate_size}, E {config.num_local_experts}, K "
        f"{config.num_experts_per_tok}, vocabulary {config.vocab_size}; {options.batch} rows of {options.sequence} tokens a "
        f"step; float32 weights{', bfloat16 by autocast' if on_gpu else ''}; AdamW. {options.turns} turns of "
        f"{options.steps} counted steps. MFU is of the measured {best['tflops']:.3g} TFLOP/s, and given on a GPU alone."
    )
    report.add(
        "arms",
        {name: asdict(one) | {"tokens_per_step": tokens} for name, one in arms.items()},
        f"{text}\n\n{table(arms, tokens, flops, best['tflops'] if on_gpu else None)}",
    )
    path = report.finish()
    if failed := {name: one.failure for name, one in arms.items() if one.failure}:
        raise RuntimeError("; ".join(f"{name}: {reason}" for name, reason in failed.items()))
    return path


__all__ = ["TrainStepSettings", "run"]
