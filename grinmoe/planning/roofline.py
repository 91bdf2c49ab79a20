"""The roofline of a training step: its arithmetic at the chip's peak rate, its traffic at the links' rate.

H hidden size, I expert width, E experts, K experts per token, T tokens of a GPU's micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..configuration_grinmoe import GrinMoeConfig
from ..quantization_grinmoe import FUSED
from .memory_model import FLOAT32, Step, lora_targets, parameters_of
from .options import PEAK_TFLOPS

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
    Count the arithmetic of a training step per token, in floating-point operations.

    Each weight that a token meets costs 2 in the forward, 2 for the gradient of its input, and 2 for its own gradient
    where it is trained. Gradient checkpointing adds the layers' forward once more. Attention's products over the keys
    that a token sees on average are counted in the same way.
    """
    config = step.config
    recomputed = 2 if step.gradient_checkpointing else 0
    of_base = 6 if step.trains_all else 4
    layers = config.num_hidden_layers * _active_weights_of_layer(config)
    head = config.vocab_size * (config.hidden_size + config.lm_head_bias)
    of_adapters = 0 if step.trains_all else (6 + recomputed) * _active_adapter_weights(step)
    attention = (6 + recomputed) * _attention_products(step)
    return layers * (of_base + recomputed) + head * of_base + of_adapters + attention


def _active_weights_of_layer(config: GrinMoeConfig) -> int:
    """Weights of a layer that one token meets: attention, norms, the router, and K of the E experts."""
    hidden, queries = config.hidden_size, config.num_attention_heads * config.head_size
    keys_and_values = 2 * config.num_key_value_heads * config.head_size
    attention = hidden * (queries + keys_and_values) + queries * hidden
    if config.attention_bias:
        attention += queries + keys_and_values + hidden
    norms = 2 * hidden * (2 if config.norm_type == "layer_norm" else 1)  # a LayerNorm has a bias too
    router = config.num_local_experts * hidden
    experts = config.num_experts_per_tok * 3 * hidden * config.intermediate_size
    return attention + norms + router + experts


def _active_adapter_weights(step: Step) -> int:
    """Weights of LoRA's A and B that one token meets; each of its K experts takes an A, a shared one too."""
    targets = lora_targets(step.config, step.adapters).items()
    uses = {name: step.config.num_experts_per_tok if name in FUSED else 1 for name, _ in targets}
    per_layer = sum(uses[name] * (inputs + outputs) for name, (inputs, outputs) in targets)
    return step.config.num_hidden_layers * step.adapters.rank * per_layer


def _attention_products(step: Step) -> float:
    """Products of one token's scores and weighted values over the keys that it sees on average, in all layers."""
    config = step.config
    window = config.visible_keys or step.sequence
    full_rows = max(0, step.sequence - window)
    short = min(window, step.sequence)
    keys = (full_rows * window + short * (short + 1) / 2) / step.sequence
    return 2 * keys * config.num_attention_heads * config.head_size * config.num_hidden_layers


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
