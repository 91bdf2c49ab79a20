"""How fast a training step can be at most: its arithmetic at the chip's rate, its traffic at the links' rate. Bounds only.

H hidden size, I expert width, E experts, K experts per token, T tokens of a GPU's micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass

from .memory_model import FLOAT32, Step, lora_targets, parameters_of

# TFLOP/s of a bf16 matrix product of random data on one H200, and about what an H100 of 700 W does; the data sheet has 989.
PEAK_TFLOPS = 790.0
# GB/s that one GPU sends: NVLink 4, half of the 900 of the data sheet; one 400 Gbit/s adapter per GPU between nodes; PCIe 5.
NVLINK_GB_PER_S, NETWORK_GB_PER_S, PCIE_GB_PER_S = 450.0, 50.0, 64.0


@dataclass(frozen=True)
class SpeedBound:
    """
    Seconds that a step of one micro-batch takes at least, and what that means for all GPUs together.

    Attributes:
        compute_seconds: of the arithmetic.
        communication_seconds: of what is sent between GPUs, or to and from the host.
        tokens_per_s: of all GPUs, if the one hides behind the other entirely.
    """

    compute_seconds: float
    communication_seconds: float
    tokens_per_s: float

    @property
    def limit(self) -> str:
        return "compute" if self.compute_seconds >= self.communication_seconds else "communication"


def speed_bound(step: Step, gpus: int, tflops: float = PEAK_TFLOPS) -> SpeedBound:
    """The bound of a step on `gpus` GPUs, `tflops` TFLOP/s each; all micro-batches alike."""
    compute = step.tokens * flops_per_token(step) / (tflops * 1e12)
    communication = communication_seconds(step)
    return SpeedBound(compute, communication, gpus * step.tokens / max(compute, communication))


def flops_per_token(step: Step) -> float:
    """
    2 for each active weight in the forward, 2 for the gradient of its input, 2 for its own where it is trained; and the
    layers' forward once more under gradient checkpointing. Attention's products over the keys that a token sees on
    average are counted in the same way.
    """
    config = step.config
    share = config.num_experts_per_tok / config.num_local_experts
    layers = head = adapters = 0.0
    for parameter in parameters_of(step):
        fused = "_proj.lora" in parameter.name and parameter.name.split(".")[2] in ("gate_up_proj", "down_proj")
        weight = parameter.numel * (share if len(parameter.shape) == 3 or fused else 1)
        if ".lora_" in parameter.name:
            adapters += weight
        elif parameter.group.startswith("layers"):
            layers += weight
        elif parameter.group == "head":
            head += weight
    if step.adapters.shared_a and not step.trains_all:
        # Of a shared A every choice uses all.
        for name, (inputs, _) in lora_targets(config, step.adapters).items():
            if name in ("gate_up_proj", "down_proj"):
                whole = step.adapters.rank * inputs * config.num_hidden_layers
                adapters += whole * (config.num_experts_per_tok - share)
    window = config.visible_keys or step.sequence
    full_rows = max(0, step.sequence - window)
    short = min(window, step.sequence)
    keys = (full_rows * window + short * (short + 1) / 2) / step.sequence
    attention = 2 * keys * config.num_attention_heads * config.head_size * config.num_hidden_layers  # scores and values
    recomputed = 2 if step.gradient_checkpointing else 0
    of_base = 6 if step.trains_all else 4
    return layers * (of_base + recomputed) + adapters * (6 + recomputed) + head * of_base + attention * (6 + recomputed)


def communication_seconds(step: Step) -> float:
    """Of a step with one micro-batch: gathers and reductions of FSDP2, or the gradients' all-reduce of replicas."""
    parameters = parameters_of(step)
    seconds = 0.0
    trained = sum(parameter.numel for parameter in parameters if parameter.trained) * FLOAT32
    shards = step.shards or 1
    if step.shards is not None:
        whole = sum(parameter.numel for parameter in parameters) * step.precision.compute
        # The head stays from its forward to its backward; the rest is gathered twice.
        once = sum(p.numel for p in parameters if p.group in ("head", "norm")) * step.precision.compute
        sent = (shards - 1) / shards
        link = NETWORK_GB_PER_S if shards > 8 else NVLINK_GB_PER_S
        seconds += (2 * whole - once + trained) * sent / (link * 1e9)
    if step.replicas > 1:
        link = NETWORK_GB_PER_S if step.shards is not None or step.replicas > 8 else NVLINK_GB_PER_S
        seconds += 2 * trained / shards * (step.replicas - 1) / step.replicas / (link * 1e9)
    if step.cpu_offload:
        stored = sum(p.shard(step.shards) * (FLOAT32 if p.trained else step.precision.compute) for p in parameters)
        seconds += (2 * stored + trained / shards) / (PCIE_GB_PER_S * 1e9)
    return seconds
