"""`grinmoe plan`: does a fine-tuning fit, what fills the memory of a GPU, which recipe, and what would fit instead.

    plan = make_plan(PlanOptions(model="microsoft/GRIN-MoE", method="qlora", gpus=1, gpu_memory_gib=80))
    plan.fits, plan.per_gpu_gib["total"], plan.recommended_recipe

From config.json alone: no weight is read and no GPU is needed. docs/planning.md has the terms and assumptions.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

from ..configuration_grinmoe import GrinMoeConfig
from ..files import folder_or_repository
from .memory_model import Adapters, Step, resident_bytes
from .memory_step import PARTS, predict
from .options import GPUS_PER_NODE, METHODS, RELEASED, PlanOptions
from .roofline import SpeedBound, speed_bound

GIB = 2**30
# Not measured: CUDA context and kernels, cuBLAS workspaces, NCCL's buffers, and what the allocator cannot hand out.
ALLOWANCE_GIB, ALLOWANCE_NCCL_GIB, FRAGMENTATION = 1.0, 1.0, 0.03


@dataclass(frozen=True)
class Alternative:
    """A change after which it fits, and the total that is predicted then."""

    change: str
    total_gib: float
    recipe: str
    launch_config: str | None


@dataclass(frozen=True)
class Plan:
    """
    The answer.

    Attributes:
        options: what was asked.
        fits: whether `per_gpu_gib["total"]` is at most the GPU's memory.
        per_gpu_gib: by part, at the moment of the peak; `allowance` is an assumption; `total` is their sum.
        host_gib: memory of the host for one GPU, with --cpu-offload.
        peak_phase: where in the step the peak is.
        headroom_gib: what is left; negative where it does not fit.
        recommended_recipe, launch_config: files for what was asked where it fits, else for the first alternative; None
            where nothing fits.
        tokens_per_s_bound: of all GPUs together. Nothing is faster, and real training is slower.
        speed: what the bound is made of.
        alternatives: what would fit, where it does not.
        notes: what was assumed, and is worth knowing here.
    """

    options: PlanOptions
    fits: bool
    per_gpu_gib: dict[str, float]
    host_gib: float
    peak_phase: str
    headroom_gib: float
    recommended_recipe: str | None
    launch_config: str | None
    tokens_per_s_bound: float
    speed: SpeedBound
    alternatives: tuple[Alternative, ...]
    notes: tuple[str, ...]

    def to_json(self) -> str:
        """All of it as one JSON object."""
        inputs = {name: value for name, value in asdict(self.options).items() if name not in ("json", "lora_targets")}
        inputs |= {"lora_attention": self.options.lora_attention, "lora_experts": self.options.lora_experts}
        content = {"inputs": inputs, **{k: v for k, v in vars(self).items() if k != "options"}}
        content["speed"] = {**asdict(self.speed), "limit": self.speed.limit}
        content["alternatives"] = [asdict(alternative) for alternative in self.alternatives]
        return json.dumps(content, indent=2)


def make_plan(options: PlanOptions) -> Plan:
    """
    Plan a fine-tuning.

    Raises:
        ValueError: the model is no GRIN-MoE, or the sequence is longer than it can take, or no weights fit the GPUs' number.
        FileNotFoundError: no config.json.
    """
    config, notes = read_config(options.model)
    check_against(options, config)
    step = step_of(options, config)
    parts, phase = _per_gpu_gib(options, step)
    fits = parts["total"] <= options.gpu_memory_gib
    alternatives = () if fits else tuple(_alternatives(options, config))
    recipe: tuple[str | None, str | None] = (None, None)
    if fits:
        recipe = recipe_for(options)
    elif alternatives:
        recipe = alternatives[0].recipe, alternatives[0].launch_config
    speed = speed_bound(step, options.gpus, options.tflops)
    return Plan(
        options=options,
        fits=fits,
        per_gpu_gib=parts,
        host_gib=sum(resident_bytes(step).values()) / GIB if options.cpu_offload else 0.0,
        peak_phase=phase,
        headroom_gib=options.gpu_memory_gib - parts["total"],
        recommended_recipe=recipe[0],
        launch_config=recipe[1],
        tokens_per_s_bound=speed.tokens_per_s,
        speed=speed,
        alternatives=alternatives,
        notes=(*notes, *_notes(options)),
    )


def read_config(model: str) -> tuple[GrinMoeConfig, list[str]]:
    """The config of a folder or Hub repository, and what there is to say about where it is from."""
    source = folder_or_repository(model, "--model")
    if Path(source).is_dir() and not Path(source, "config.json").is_file():
        raise FileNotFoundError(
            f"--model {model} has no config.json; give a checkpoint's folder or a repository of the Hub"
        )
    try:
        config = GrinMoeConfig.from_pretrained(source)
    except OSError as error:
        if model == RELEASED:
            return GrinMoeConfig(), [
                f"the Hub cannot be reached; {RELEASED} is taken to be what this package defaults to"
            ]
        raise ValueError(
            f"--model {model}: its config.json cannot be read ({' '.join(str(error).split())}); give a folder that has one, "
            "or the id of a repository that can be reached"
        ) from error
    if config.model_type != GrinMoeConfig.model_type:
        raise ValueError(f"--model {model} is of type {config.model_type!r}, not {GrinMoeConfig.model_type!r}")
    return config, []


def check_against(options: PlanOptions, config: GrinMoeConfig) -> None:
    """Raise ValueError for what the model cannot do: too long a sequence, or shards of nothing (`sharding.shard_model`)."""
    if options.seq_length > config.max_position_embeddings:
        raise ValueError(
            f"--seq-length {options.seq_length} is more than the model's max_position_embeddings="
            f"{config.max_position_embeddings}; give at most that"
        )
    shards = options.shards or 1
    sizes = (config.hidden_size, config.vocab_size, config.num_local_experts)
    if any(size % shards and math.ceil(size / shards) * (shards - 1) >= size for size in sizes):
        raise ValueError(
            f"--gpus {options.gpus}: the model's weights do not spread over {shards} GPUs, one would hold nothing of some; "
            "give a power of 2"
        )


def step_of(options: PlanOptions, config: GrinMoeConfig) -> Step:
    """The training step that the recipes run."""
    shards = options.shards
    return Step(
        config,
        options.method,
        options.batch_size,
        options.seq_length,
        shards=shards,
        replicas=options.gpus // (shards or 1),
        gradient_checkpointing=options.gradient_checkpointing,
        adapters=Adapters(options.lora_r, options.lora_attention, options.lora_experts, options.shared_a),
        masked=has_mask(options, config),
        accumulates=options.gradient_accumulation_steps > 1,
        cpu_offload=options.cpu_offload,
    )


def has_mask(options: PlanOptions, config: GrinMoeConfig) -> bool:
    """Rows of unequal length are padded, packed texts kept apart, and a window cuts off: each needs a mask."""
    beyond_window = config.visible_keys is not None and options.seq_length > config.visible_keys
    return options.batch_size > 1 or options.packing or beyond_window


def recipe_for(options: PlanOptions) -> tuple[str, str | None]:
    """The recipe, and Accelerate's launch configuration where it takes several GPUs that share the weights."""
    recipe = f"recipes/sft_{options.method.removesuffix('-8bit')}.yaml"
    if not options.sharded:
        return recipe, None
    name = "fsdp2_8xh100_lora" if options.method == "lora" else "fsdp2_8xh100_full"
    if options.cpu_offload:
        name = "fsdp2_8xh100_offload"
    elif options.gpus > GPUS_PER_NODE:
        name = "fsdp2_2x8xh100_full"
    return recipe, f"recipes/accelerate/{name}.yaml"


def _per_gpu_gib(options: PlanOptions, step: Step) -> tuple[dict[str, float], str]:
    ledger = predict(step)
    parts = {part: ledger.peak.get(part, 0) / GIB for part in PARTS}
    fixed = ALLOWANCE_GIB + (ALLOWANCE_NCCL_GIB if options.gpus > 1 else 0.0)
    parts["allowance"] = fixed + FRAGMENTATION * ledger.peak_total / GIB
    parts["total"] = sum(parts.values())
    return parts, ledger.peak_phase


def _alternatives(options: PlanOptions, config: GrinMoeConfig) -> Iterator[Alternative]:
    """What fits, found with the same model; the smallest change first, and of each kind the least that does."""
    for kind in _changes(options):
        for change, changed in kind:
            try:
                check_against(changed, config)
            except ValueError:
                continue
            total = _per_gpu_gib(changed, step_of(changed, config))[0]["total"]
            if total <= options.gpu_memory_gib:
                yield Alternative(change, total, *recipe_for(changed))
                break


def _changes(options: PlanOptions) -> list[list[tuple[str, PlanOptions]]]:
    """By kind, changes in the order in which they are to be tried."""
    kinds: list[list[tuple[str, PlanOptions]]] = []
    if not options.gradient_checkpointing:
        kinds.append([("with gradient checkpointing", replace(options, gradient_checkpointing=True))])
    batches = [size for size in _halves(options.batch_size) if size < options.batch_size]
    kinds.append([(f"batch size {size}", replace(options, batch_size=size)) for size in batches])
    lengths = [size for size in _halves(options.seq_length) if 512 <= size < options.seq_length]
    kinds.append([(f"sequences of {size}", replace(options, seq_length=size, batch_size=1)) for size in lengths])
    more = [gpus for gpus in (2, 4, 8, 16, 32, 64) if gpus > options.gpus]
    if options.method != "qlora":
        kinds.append([(f"{gpus} GPUs", replace(options, gpus=gpus)) for gpus in more if gpus <= GPUS_PER_NODE])
        across = [gpus for gpus in (options.gpus, *more) if gpus > GPUS_PER_NODE and gpus > (options.shards or 1)]
        kinds.append(
            [
                (f"{gpus} GPUs, with --shard-across-nodes", replace(options, gpus=gpus, shard_across_nodes=True))
                for gpus in across
            ]
        )
        if options.sharded and not options.cpu_offload:
            kinds.append([("with --cpu-offload", replace(options, cpu_offload=True))])
    methods = METHODS[METHODS.index(options.method) + 1 :]
    other = replace(options, cpu_offload=False, shard_across_nodes=False)
    kinds += [[(f"--method {method}", replace(other, method=method))] for method in methods]
    return kinds


def _halves(size: int) -> list[int]:
    sizes = []
    while size > 1:
        size //= 2
        sizes.append(size)
    return sizes


def _notes(options: PlanOptions) -> list[str]:
    notes = []
    if options.method == "full-8bit" and options.gpus > 1:
        notes.append(
            "bitsandbytes' 8-bit AdamW refuses FSDP2's shards: set optim: adamw_torch_8bit (torchao), of the same size"
        )
    if options.method == "qlora" and options.gpus > 1:
        notes.append("4-bit weights are not sharded: every GPU holds all of them, and adds its tokens")
    if options.sharded and options.gradient_accumulation_steps > 1 and options.method != "lora":
        notes.append(
            "with gradient accumulation every GPU keeps all gradients unsharded until the last micro-batch; "
            'accelerator_config: {"gradient_accumulation_kwargs": {"sync_each_batch": true}} avoids it, and then plan with 1'
        )
    if options.shard_across_nodes:
        notes.append("drop parallelism_config from the launch configuration: it shards within a node")
    if options.gpus > 16 and options.sharded:
        notes.append(
            f"the launch configuration is for 2 nodes; set num_machines and num_processes for {options.gpus} GPUs"
        )
    elif options.sharded and options.gpus < GPUS_PER_NODE:
        notes.append(
            f"the launch configuration is for 8 GPUs; pass --num_processes {options.gpus} to accelerate launch"
        )
    return notes


def print_plan(plan: Plan, console: Console | None = None) -> None:
    """Print the plan as tables."""
    from rich.console import Console
    from rich.table import Table

    console = console or Console(highlight=False, soft_wrap=True)
    options = plan.options
    table = Table(
        title=f"{options.method} on {options.gpus} GPU(s), {options.batch_size} x {options.seq_length} tokens each"
    )
    table.add_column("memory of one GPU, at the peak")
    table.add_column("GiB", justify="right")
    for part, gib in plan.per_gpu_gib.items():
        if part == "total":
            table.add_section()
        table.add_row("allowance (assumed)" if part == "allowance" else part, f"{gib:.2f}")
    console.print(table)
    verdict = "fits" if plan.fits else "does not fit"
    room = f"{plan.headroom_gib:.1f} GiB left" if plan.fits else f"{-plan.headroom_gib:.1f} GiB too much"
    console.print(f"{verdict} in {options.gpu_memory_gib:g} GiB: {room}. The peak is in: {plan.peak_phase}.")
    if options.cpu_offload:
        console.print(f"On the host: {plan.host_gib:.0f} GiB for each GPU.")
    if plan.alternatives:
        console.print("What would fit:")
        for alternative in plan.alternatives:
            console.print(f"  {alternative.change}: {alternative.total_gib:.1f} GiB")
    elif not plan.fits:
        console.print("No smaller batch, number of GPUs or method was found that fits.")
    if plan.recommended_recipe:
        launch = f", launched with {plan.launch_config}" if plan.launch_config else ""
        condition = "" if plan.fits else f" ({plan.alternatives[0].change})"
        console.print(f"Recipe{condition}: {plan.recommended_recipe}{launch}")
    console.print(
        f"At most {plan.tokens_per_s_bound:,.0f} tokens/s by {plan.speed.limit}, at {options.tflops:g} TFLOP/s a GPU: "
        "a bound, not a forecast."
    )
    for note in plan.notes:
        console.print(f"Note: {note}.")


def run_plan(options: PlanOptions) -> None:
    """Plan and print, as tables or as one JSON object."""
    from rich.console import Console

    with Console(stderr=True).status("Running the step on tensors without data"):
        plan = make_plan(options)
    if options.json:
        print(plan.to_json())
    else:
        print_plan(plan)
