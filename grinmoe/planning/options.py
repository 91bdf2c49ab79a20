"""Options of `grinmoe plan`."""

import math
from dataclasses import dataclass
from typing import Annotated, Literal, Required

from ..files import Checkpoint

RELEASED = "microsoft/GRIN-MoE"
METHODS = ("full", "full-8bit", "lora", "qlora")
GPUS_PER_NODE = 8
# TFLOP/s of a bf16 matrix product of random data on one H200, and about what an H100 of 700 W does; the data sheet has 989.
PEAK_TFLOPS = 790.0


@dataclass(frozen=True)
class PlanOptions:
    """Plan a fine-tuning: whether it fits into memory, which recipe is for it, and a bound on its speed.

    Predict from config.json what a fine-tuning takes of each GPU, whether it fits, which recipe is for it, and what
    would fit instead. No weights are read. Exit code 0 whether it fits or not.

    example: grinmoe plan --model microsoft/GRIN-MoE --method qlora --gpus 1 --gpu-memory-gib 80 --seq-length 2048
    --batch-size 1
    """

    model: Annotated[Checkpoint, Required] = RELEASED
    method: Annotated[str, "full, full-8bit, lora or qlora", "NAME", Required] = "qlora"
    gpus: Annotated[int, "of all nodes; beyond 8 in nodes of 8", "N", Required] = 1
    gpu_memory_gib: Annotated[float, "of one GPU", "X", Required] = 80.0
    seq_length: Annotated[int, "tokens of a row", "S", Required] = 2048
    batch_size: Annotated[int, "rows of one GPU's micro-batch", "B", Required] = 1
    gradient_accumulation_steps: Annotated[int, "micro-batches of an optimizer step", "N"] = 1
    gradient_checkpointing: Annotated[bool, "keep all activations"] = True
    cpu_offload: Annotated[bool, "weights and optimizer on the host (FSDP2)"] = False
    shard_across_nodes: Annotated[bool, "share weights among all GPUs, not within a node"] = False
    lora_r: Annotated[int, "rank", "R"] = 16
    lora_targets: Annotated[Literal["all", "attention", "experts"], "what is adapted"] = "all"
    shared_a: Annotated[bool, "one A for all experts of a layer"] = False
    packing: Annotated[bool, "rows hold several texts, so attention has a mask"] = False
    tflops: Annotated[float, "bf16 TFLOP/s of a GPU, for the bound on tokens/s", "X"] = PEAK_TFLOPS
    json: Annotated[bool, "print one JSON object"] = False

    def __post_init__(self) -> None:
        """Raises ValueError for what no training can have."""
        if self.method not in METHODS:
            raise ValueError(f"--method {self.method!r} is unknown; choose one of {', '.join(METHODS)}")
        for name in ("gpus", "seq_length", "batch_size", "gradient_accumulation_steps", "lora_r"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)} is too few; give 1 or more")
        for name in ("gpu_memory_gib", "tflops"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)} is not a positive number; give one")
        if self.gpus > GPUS_PER_NODE and self.gpus % GPUS_PER_NODE:
            raise ValueError(
                f"--gpus {self.gpus} is no number of whole nodes of {GPUS_PER_NODE}; give a multiple of it"
            )
        if self.lora_targets not in ("all", "attention", "experts"):
            raise ValueError(f"--lora-targets {self.lora_targets!r} is unknown; choose all, attention or experts")
        if self.cpu_offload and not self.sharded:
            raise ValueError(
                f"--cpu-offload with --method {self.method} on {self.gpus} GPU(s): only FSDP2 offloads, which all but qlora "
                "use on 2 GPUs or more; leave it out"
            )

    @property
    def lora_attention(self) -> bool:
        return self.lora_targets != "experts"

    @property
    def lora_experts(self) -> bool:
        return self.lora_targets != "attention"

    @property
    def sharded(self) -> bool:
        """By FSDP2. 4-bit weights cannot be: replicas there."""
        return self.gpus > 1 and self.method != "qlora"

    @property
    def shards(self) -> int | None:
        """GPUs that share one copy of the weights."""
        if not self.sharded:
            return None
        return self.gpus if self.shard_across_nodes else min(self.gpus, GPUS_PER_NODE)
