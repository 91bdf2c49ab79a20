"""What a training step is, for the memory model: method, shapes and precision, and the parameters with their states.

`memory_step.py` runs such a step on tensors without data. No constant is fitted. docs/planning.md lists the terms;
tests/planning/test_plan.py holds every method against the allocations that a real step makes.

All sizes are bytes on one GPU.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

import torch

from ..configuration_grinmoe import GrinMoeConfig
from ..modeling_grinmoe import GrinMoeForCausalLM
from ..quantization_grinmoe import BLOCK, NESTED_BLOCK

FLOAT32 = 4
# 8-bit AdamW of bitsandbytes, and of torchao, which FSDP2 takes: a float32 scale for each block of a state; smaller
# tensors keep float32 states.
OPTIMIZER_BLOCK, OPTIMIZER_8BIT_FROM = 256, 4096


@dataclass(frozen=True)
class Adapters:
    """LoRA terms: their rank, and where they are. `shared_a`: all experts of a layer share the A of a fused weight."""

    rank: int = 16
    attention: bool = True
    experts: bool = True
    shared_a: bool = False


@dataclass(frozen=True)
class Precision:
    """
    Bytes per element.

    Attributes:
        compute: of weights as they are used, and of what products make: 2 for bf16.
        autocast: the step runs under CUDA's autocast, as the Trainer's bf16=True does: norms and the sum over a token's
            experts come out in float32 there, and what goes into a product is cast.
    """

    compute: int = 2
    autocast: bool = True


@dataclass(frozen=True)
class Step:
    """
    One training step of one GPU.

    Attributes:
        method: one of `METHODS`.
        batch, sequence: of this GPU's micro-batch.
        shards: GPUs that share one copy of the weights by FSDP2; None: no FSDP2.
        replicas: copies of the model, or of its shards, that average their gradients.
        masked: attention gets a mask, because of padding, packing, or a sequence beyond the window.
        accumulates: gradients of earlier micro-batches are there already.
        cpu_offload: weights, gradients and optimizer states are on the host (FSDP2's CPUOffloadPolicy).
    """

    config: GrinMoeConfig
    method: str
    batch: int
    sequence: int
    shards: int | None = None
    replicas: int = 1
    gradient_checkpointing: bool = True
    adapters: Adapters = field(default_factory=Adapters)
    precision: Precision = field(default_factory=Precision)
    masked: bool = False
    accumulates: bool = False
    cpu_offload: bool = False

    @property
    def tokens(self) -> int:
        return self.batch * self.sequence

    @property
    def trains_all(self) -> bool:
        return self.method in ("full", "full-8bit")


@dataclass(frozen=True)
class Parameter:
    """A parameter, and the group of modules (embed, layers.N, norm, head) that FSDP2 gathers it with."""

    name: str
    shape: tuple[int, ...]
    group: str
    trained: bool
    quantised: bool = False

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def shard(self, shards: int | None) -> int:
        """Elements on one GPU. Cut is the first dimension that divides; else dimension 0, padded (`sharding.placement`)."""
        if shards is None:
            return self.numel
        if any(size % shards == 0 for size in self.shape):
            return self.numel // shards
        return math.ceil(self.shape[0] / shards) * (self.numel // self.shape[0])


def parameters_of(step: Step) -> list[Parameter]:
    """All parameters of a step's model."""
    base = _base_parameters(step.config, step.trains_all, step.method == "qlora")
    return base if step.trains_all else base + _adapter_parameters(step.config, step.adapters)


def _base_parameters(config: GrinMoeConfig, trained: bool, quantised: bool) -> list[Parameter]:
    """Read off a model on the meta device: no weight exists."""
    with torch.device("meta"):
        model = GrinMoeForCausalLM(config)
    parameters = []
    for name, tensor in model.named_parameters():
        path = name.removeprefix("model.").split(".")
        group = (
            f"layers.{path[1]}" if path[0] == "layers" else {"embed_tokens": "embed", "lm_head": "head"}.get(path[0])
        )
        # bitsandbytes takes linears of the layers, and quantization_grinmoe.py the experts; the router is neither.
        in_nf4 = quantised and path[0] == "layers" and tensor.dim() >= 2 and "gate" not in path
        parameters.append(Parameter(name, tuple(tensor.shape), group or "norm", trained, in_nf4))
    return parameters


def lora_targets(config: GrinMoeConfig, adapters: Adapters) -> dict[str, tuple[int, int]]:
    """(in, out) of every adapted weight of a layer; for a fused one, of one expert."""
    hidden, width = config.hidden_size, config.intermediate_size
    queries, keys = config.num_attention_heads * config.head_size, config.num_key_value_heads * config.head_size
    attention = {"q_proj": queries, "k_proj": keys, "v_proj": keys}
    targets = {name: (hidden, out) for name, out in attention.items()} | {"o_proj": (queries, hidden)}
    fused = {"gate_up_proj": (hidden, 2 * width), "down_proj": (width, hidden)}
    return (targets if adapters.attention else {}) | (fused if adapters.experts else {})


def _adapter_parameters(config: GrinMoeConfig, adapters: Adapters) -> list[Parameter]:
    """The matrices A (rank, in) and B (out, rank) of every LoRA term; those of a layer's experts in one tensor each."""
    parameters, rank = [], adapters.rank
    for layer in range(config.num_hidden_layers):
        for name, (inputs, outputs) in lora_targets(config, adapters).items():
            of_b = config.num_local_experts if name in ("gate_up_proj", "down_proj") else 1
            of_a = 1 if adapters.shared_a else of_b
            for factor, shape in (("lora_A", (of_a * rank, inputs)), ("lora_B", (outputs, of_b * rank))):
                parameters.append(Parameter(f"layers.{layer}.{name}.{factor}", shape, f"layers.{layer}", True))
    return parameters


def nf4_bytes(parameter: Parameter) -> int:
    """
    Of a weight in NF4 with double quantisation: 4 bits, 8 bits per 64 weights, 32 bits per 256 of those, 4.127 bits in all.

    Each expert's matrix is packed by itself, with an offset. The tables of the codes are stored once for a linear, and
    once for a layer's experts.
    """
    matrices = parameter.shape[0] if len(parameter.shape) == 3 else 1
    blocks = math.ceil(parameter.numel // matrices / BLOCK)
    matrix = math.ceil(parameter.numel // matrices / 2) + blocks + math.ceil(blocks / NESTED_BLOCK) * FLOAT32
    tables = 0 if parameter.name.endswith("down_proj") else (16 + 256) * FLOAT32
    return matrices * (matrix + FLOAT32) + tables


def adamw_8bit_bytes(numel: int) -> int:
    """Of the two 8-bit states of a parameter with their scales; float32 for small parameters."""
    if numel < OPTIMIZER_8BIT_FROM:
        return 2 * numel * FLOAT32
    return 2 * (numel + math.ceil(numel / OPTIMIZER_BLOCK) * FLOAT32)


def resident_bytes(step: Step) -> dict[str, int]:
    """What is there through the whole step, on one GPU or, with `cpu_offload`, on the host for it.

    Returns:
        weights, gradients (when all of them are there) and optimizer. Trained weights are float32 where the step
        computes in bf16 (masters of FSDP2, LoRA factors), gradients and AdamW's two states as the weights.
    """
    total: Counter[str] = Counter()
    for parameter in parameters_of(step):
        numel = parameter.shard(step.shards)
        if parameter.quantised:
            total["weights"] += nf4_bytes(parameter)
            continue
        element = trained_bytes(step) if parameter.trained else step.precision.compute
        total["weights"] += numel * element
        if parameter.trained:
            total["gradients"] += numel * element
            eight_bit = step.method == "full-8bit"
            total["optimizer"] += adamw_8bit_bytes(numel) if eight_bit else 2 * numel * element
    return dict(total)


def trained_bytes(step: Step) -> int:
    """Of an element of a trained weight: float32, but for a model that is trained in its compute precision as it is."""
    plain = step.trains_all and step.shards is None and not step.precision.autocast
    return step.precision.compute if plain else FLOAT32
