"""Speed and memory of training steps under FSDP2 on one rank, against the same steps without it.

    python -m benchmarks fsdp
    python -m benchmarks fsdp --toy

One rank shards nothing and sends nothing, so what FSDP2 adds here is its own work: casting the float32 masters to bfloat16
group by group, its hooks, and copying gradients. It also shows that `shard_model` runs with the kernels on this machine.
The arm without FSDP2 has float32 weights under autocast, as the Trainer's `bf16=True`. Random tokens, AdamW, few layers of
the released width on a GPU; arms take turns, each with a model and an optimizer of its own.
"""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from benchmarks.bench_train_step import TrainStepSettings, build, model_config
from benchmarks.block_arms import describe
from benchmarks.protocol import Report, best_device
from grinmoe.distributed import shard_model
from grinmoe.provenance import markdown_table

PLAIN, SHARDED = "autocast, no FSDP", "FSDP2 on one rank"
# Random weights predict nothing: both arms begin near the logarithm of the vocabulary's size.
LOSSES_APART = 0.1


@dataclass(frozen=True)
class FsdpSettings:
    """
    Attributes:
        layers, batch, sequence: of the model, and of a step; on a CPU a small model.
        turns, warmup, steps: each arm has so many turns, of so many uncounted and counted steps.
        minutes: after which no turn is begun.
        toy: tiny sizes, which measure nothing.
    """

    layers: int = 2
    batch: int = 4
    sequence: int = 4096
    turns: int = 2
    warmup: int = 2
    steps: int = 8
    minutes: float | None = None
    toy: bool = False


def run(options: FsdpSettings) -> Path:
    """
    Measure both arms, print the table, and return the path of the report.

    Raises:
        RuntimeError: an arm does not run here, or their first losses differ. The report is written all the same.
    """
    device = best_device()
    deadline = None if options.minutes is None else time.monotonic() + 60 * options.minutes
    sizes = TrainStepSettings(options.layers, options.batch, options.sequence)
    if options.toy:
        sizes = TrainStepSettings(layers=1, batch=1, sequence=32, toy=True)
        options = FsdpSettings(1, 1, 32, turns=1, warmup=1, steps=2, minutes=options.minutes, toy=True)
    elif device.type != "cuda":
        sizes = TrainStepSettings(options.layers, options.batch, min(options.sequence, 256))
    report = Report("fsdp", asdict(options) | {"sequence": sizes.sequence}, options.toy)
    arms: dict[str, dict[str, Any]] = {name: {"seconds": [], "losses": []} for name in (PLAIN, SHARDED)}
    with one_rank(device):
        for turn in range(options.turns):
            if turn and deadline is not None and time.monotonic() > deadline:
                break
            for name, arm in arms.items():
                if "failure" not in arm:
                    take_turn(name, arm, sizes, options, device)
                    report.update("arms", arms, {"arms": table(arms, sizes, device)})
    path = report.finish()
    wrong = {name: arm["failure"] for name, arm in arms.items() if "failure" in arm}
    first = [arm["losses"][0] for arm in arms.values() if arm["losses"]]
    if len(first) == 2 and not abs(first[0] - first[1]) <= LOSSES_APART:
        wrong[SHARDED] = f"its first loss is {first[1]:.4f}, and {first[0]:.4f} without FSDP2"
    if wrong:
        raise RuntimeError("; ".join(f"{name}: {reason}" for name, reason in wrong.items()))
    return path


@contextlib.contextmanager
def one_rank(device: torch.device):
    """A process group of this process alone, without a launcher and without a port."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(0)
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def take_turn(
    name: str, arm: dict[str, Any], sizes: TrainStepSettings, options: FsdpSettings, device: torch.device
) -> None:
    """Build the arm's model, train it, and enter seconds, losses, peak memory or a failure."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    try:
        arm["seconds"] += train(name, arm, sizes, options, device)
    # What kernels, FSDP2 and allocators raise; the other arm is measured all the same.
    except Exception as error:
        arm["failure"] = describe(error)
    gc.collect()
    if on_gpu:
        arm["peak_bytes"] = torch.cuda.max_memory_allocated()
        torch.cuda.empty_cache()


def train(
    name: str, arm: dict[str, Any], sizes: TrainStepSettings, options: FsdpSettings, device: torch.device
) -> list[float]:
    """Seconds of the counted steps; all losses are entered in `arm`."""
    on_gpu = device.type == "cuda"
    model = build("grinmoe_triton" if on_gpu else "grinmoe", model_config(sizes, device), device).train()
    autocast: Any = contextlib.nullcontext()
    if name == SHARDED:
        shard_model(model, init_device_mesh(device.type, (1,)), param_dtype=torch.bfloat16 if on_gpu else None)
    elif on_gpu:
        autocast = torch.autocast("cuda", dtype=torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=on_gpu)
    generator = torch.Generator().manual_seed(1)
    torch.manual_seed(2)  # the routing's draws
    seconds = []
    for step in range(options.warmup + options.steps):
        ids = torch.randint(model.config.vocab_size, (sizes.batch, sizes.sequence or 0), generator=generator).to(device)
        if on_gpu:
            torch.cuda.synchronize()
        started = time.perf_counter()
        with autocast:
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        arm["losses"].append(loss.item())  # waits for the device
        if on_gpu:
            torch.cuda.synchronize()
        if step >= options.warmup:
            seconds.append(time.perf_counter() - started)
    return seconds


def table(arms: dict[str, dict[str, Any]], sizes: TrainStepSettings, device: torch.device) -> str:
    tokens, rows = sizes.batch * (sizes.sequence or 0), []
    base = arms[PLAIN]["seconds"]
    for name, arm in arms.items():
        if len(arm["seconds"]) < 2:
            rows.append([name, arm.get("failure", "not run"), "-", "-", "-", "-", "-"])
            continue
        median = statistics.median(arm["seconds"])
        low, _, high = statistics.quantiles(arm["seconds"], n=4, method="inclusive")
        rows.append(
            [
                name,
                f"{1e3 * median:.1f}",
                f"{1e3 * low:.1f} to {1e3 * high:.1f}",
                f"{tokens / median:,.0f}",
                f"{statistics.median(base) / median:.3f}" if base else "-",
                f"{arm['peak_bytes'] / 2**30:.1f}" if "peak_bytes" in arm else "-",
                f"{arm['losses'][0]:.4f}",
            ]
        )
    text = (
        f"{sizes.layers} layers, {sizes.batch} rows of {sizes.sequence} tokens a step, AdamW, "
        f"{'grinmoe_triton' if device.type == 'cuda' else 'grinmoe'}. Wall-clock times, the device idle at both ends."
    )
    header = ["arm", "step, ms", "quartiles, ms", "tokens/s", f"speed over {PLAIN}", "peak, GiB", "first loss"]
    return f"{text}\n\n{markdown_table(header, rows)}"


__all__ = ["FsdpSettings", "run"]
