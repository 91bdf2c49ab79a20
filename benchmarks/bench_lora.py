"""Time and memory of LoRA on the fused experts, forward and backward, against PEFT's own `target_parameters`.

    python -m benchmarks lora
    python -m benchmarks lora --tokens 8192 --hidden-size 4096 --intermediate-size 6400   # what a GPU gets by default

One layer's experts with frozen weights, in float32 on a CPU and in bfloat16 on a GPU. Every arm has the same experts in
memory, factors of the same values and, in each round, the same input and the same even routing draw. Before an arm is timed,
its output and the gradients of the input, of the routing weights and of every factor are held against plain PEFT in float64.

Memory is counted where it arises, so that it means the same on every device: the bytes of all storages that a forward keeps
for its backward, parameters left out; and the largest storage that any operation makes.

Shapes: T tokens, H hidden size, I expert width, E experts, K = 2, r rank.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import ParamWrapper
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.bench_block import choose_experts
from benchmarks.block_arms import describe
from benchmarks.protocol import Report, Timing, best_device, interleave
from grinmoe import GrinMoeConfig
from grinmoe.adapters import ExpertLora, GrinMoeLoraConfig
from grinmoe.modeling_grinmoe import GrinMoeExperts
from grinmoe.provenance import markdown_table
from grinmoe.quantization_grinmoe import FUSED

TOP_K = 2
BASELINE = "PEFT target_parameters, grouped_mm"
# Wrapper, experts implementation, form of the adapter ("some" experts are a quarter of them).
ARMS: dict[str, tuple[type[ParamWrapper], str, dict[str, Any]]] = {
    BASELINE: (ParamWrapper, "grouped_mm", {}),
    "PEFT target_parameters, eager": (ParamWrapper, "eager", {}),
    "ExpertLora, grouped_mm": (ExpertLora, "grouped_mm", {}),
    "ExpertLora, eager (loop)": (ExpertLora, "eager", {}),
    "ExpertLora, grouped_mm, one shared A": (ExpertLora, "grouped_mm", {"shared_a": True}),
    "ExpertLora, grouped_mm, a quarter of the experts": (ExpertLora, "grouped_mm", {"experts": "some"}),
}
# Relative error in the maximum norm against float64.
GATE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class LoraSettings:
    """Sizes that are None are those of the device: a small layer on a CPU, the released model's on a GPU."""

    tokens: int | None = None
    hidden_size: int | None = None
    intermediate_size: int | None = None
    experts: int = 16
    r: int = 16
    warmup: int = 3
    rounds: int = 10
    minutes: float | None = None
    toy: bool = False

    def for_device(self, device: torch.device) -> LoraSettings:
        sizes = {"tokens": 1024, "hidden_size": 512, "intermediate_size": 800}
        if device.type == "cuda":
            sizes = {"tokens": 8192, "hidden_size": 4096, "intermediate_size": 6400}
        if self.toy:
            sizes = {"tokens": 32, "hidden_size": 32, "intermediate_size": 48}
            return replace(self, **sizes, experts=4, r=4, warmup=1, rounds=2)
        given = {name: value for name, value in asdict(self).items() if value is not None}
        return LoraSettings(**(sizes | given))


def build_base(options: LoraSettings, dtype: torch.dtype, device: torch.device) -> GrinMoeExperts:
    config = GrinMoeConfig(
        hidden_size=options.hidden_size,
        intermediate_size=options.intermediate_size,
        num_local_experts=options.experts,
        num_attention_heads=8,
        num_key_value_heads=8,
    )
    experts = GrinMoeExperts(config).to(device, dtype).requires_grad_(False)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.02)
    return experts


def build_arm(name: str, base: GrinMoeExperts, options: LoraSettings) -> ParamWrapper:
    """The arm's wrappers around experts that share their memory with `base`."""
    wrapper, implementation, form = ARMS[name]
    with torch.device("meta"):
        config = type(base.config).from_dict(base.config.to_dict())
        config._experts_implementation = implementation
        layer: nn.Module = GrinMoeExperts(config)
    for parameter in FUSED:
        setattr(layer, parameter, getattr(base, parameter))
    if form.get("experts") == "some":
        form = {**form, "experts": list(range(options.experts // 4))}
    lora = GrinMoeLoraConfig(r=options.r, target_parameters=[f"experts.{one}" for one in FUSED], **form)
    for parameter in FUSED:
        layer = wrapper(layer, "default", parameter_name=parameter, config=lora, r=options.r, lora_alpha=options.r)
    torch.manual_seed(1)
    for key, factor in layer.named_parameters():
        if "lora_" in key:
            factor.data = torch.randn(factor.shape).mul_(0.02).to(factor.device)  # float32, as PEFT keeps them
    return layer


def step(layer: nn.Module, inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor], upstream: torch.Tensor):
    """One forward and backward; the output, and by name the gradients of the input, the weights and the factors."""
    hidden_states, chosen, weights = inputs
    hidden_states, weights = hidden_states.detach().requires_grad_(), weights.detach().requires_grad_()
    output = layer(hidden_states, chosen, weights)
    output.backward(upstream)
    results = {"output": output.detach(), "hidden_states": hidden_states.grad, "weights": weights.grad}
    for name, parameter in layer.named_parameters():
        if parameter.requires_grad:
            results[name], parameter.grad = parameter.grad, None
    return results


def gate(layer: ParamWrapper, base: GrinMoeExperts, inputs, upstream, options: LoraSettings) -> float:
    """Largest relative error against plain PEFT in float64 with the same factors; raises if it is too large."""
    reference = build_arm("PEFT target_parameters, eager", base, options)
    reference.load_state_dict(
        {key: tensor for key, tensor in layer.state_dict().items() if "lora_" in key}, strict=False
    )
    reference = copy.deepcopy(reference).double()  # the base is shared
    inputs = tuple(one.double() if one.is_floating_point() else one for one in inputs)
    expected = step(reference, inputs, upstream.double())
    found = step(layer, tuple(one.to(upstream.dtype) if one.is_floating_point() else one for one in inputs), upstream)
    wrapper: Any = layer
    for prefix in ("", "base_layer."):
        if isinstance(layer, ExpertLora):
            choice = wrapper.choices["default"]
            key_a, key_b = f"{prefix}lora_A.default.weight", f"{prefix}lora_B.default.weight"
            blocks = expected[key_a].unflatten(0, (options.experts, -1))[list(choice.experts)]
            expected[key_a] = blocks.sum(0) if choice.shared_a else blocks.flatten(0, 1)
            expected[key_b] = choice.contract("lora_B", expected[key_b], check=False)
            wrapper = wrapper.base_layer
    assert found.keys() == expected.keys()
    return max(((found[key].double() - one).abs().max() / one.abs().max()).item() for key, one in expected.items())


class _Storages(TorchDispatchMode):
    """The largest storage that an operation makes, in bytes."""

    def __init__(self, known: set[int]):
        super().__init__()
        self.known, self.largest = known, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return result


def measure_memory(layer: nn.Module, inputs, upstream: torch.Tensor) -> dict[str, int]:
    """Bytes kept for the backward and the largest new storage; on a GPU also the peak beyond what was there."""
    known = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    kept: dict[int, int] = {}
    alive = []  # so that no address is used twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step(layer, inputs, upstream)
    alive.clear()
    with _Storages(known) as storages:
        step(layer, inputs, upstream)
    measured = {"kept_bytes": sum(kept.values()), "largest_bytes": storages.largest}
    if upstream.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(layer, inputs, upstream)
        measured["peak_bytes"] = torch.cuda.max_memory_allocated() - before
    return measured


def table(timings: dict[str, Timing], facts: dict[str, dict[str, Any]]) -> str:
    rows = []
    for name, timing in timings.items():
        low, high = timing.quartiles_ms
        one = facts[name]
        megabytes = [f"{one[key] / 1e6:.1f}" for key in ("kept_bytes", "largest_bytes", "peak_bytes") if key in one]
        ratio = f"{one['ratio_to_peft']:.2f}" if "ratio_to_peft" in one else "-"
        host = "-" if timing.host_ms is None else f"{timing.host_ms:.1f}"
        times = [f"{timing.median_ms:.1f}", f"{low:.1f} to {high:.1f}", host, ratio]
        rows.append([name, *times, *megabytes, f"{one['trained']:,}", f"{one['relative_error']:.1e}"])
    columns = [
        "arm",
        "median, ms",
        "quartiles, ms",
        "host, ms",
        "times faster than PEFT",
        "kept for backward, MB",
        "largest tensor, MB",
    ]
    peak = ["peak, MB"] if any("peak_bytes" in one for one in facts.values()) else []
    return markdown_table([*columns, *peak, "trained", "error"], rows)


def run(options: LoraSettings) -> Path:
    """
    Measure all arms, print the table, and return the path of the report.

    Raises:
        RuntimeError: an arm failed the gate or does not run here. The report is written all the same.
    """
    device = best_device()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    deadline = None if options.minutes is None else time.monotonic() + 60 * options.minutes
    options = options.for_device(device)
    report = Report("lora", asdict(options), options.toy)
    torch.manual_seed(0)
    base = build_base(options, dtype, device)
    inputs = []
    for _ in range(options.warmup + options.rounds):
        hidden_states = torch.randn(options.tokens, options.hidden_size).to(device, dtype)
        chosen = choose_experts(options.tokens, options.experts, skewed=False).to(device)
        inputs.append((hidden_states, chosen, torch.rand(chosen.shape).to(device, dtype)))
    upstream = torch.randn_like(inputs[0][0])
    layers = {name: build_arm(name, base, options) for name in ARMS}
    facts: dict[str, dict[str, Any]] = {}
    refused: dict[str, str] = {}
    for name, layer in list(layers.items()):
        try:
            error = gate(layer, base, inputs[0], upstream, options)
        # Of a product that this device does not take: the others are measured all the same.
        except Exception as raised:
            refused[name] = describe(raised)
        else:
            if not error <= GATE[dtype]:
                refused[name] = f"relative error {error:.2g} against float64"
        if name in refused:
            del layers[name]
            continue
        trained = sum(parameter.numel() for parameter in layer.parameters() if parameter.requires_grad)
        facts[name] = {"relative_error": error, "trained": trained, **measure_memory(layer, inputs[0], upstream)}

    def runner(layer: nn.Module) -> Callable[[int], object]:
        return lambda number: step(layer, inputs[number], upstream)

    timings = interleave(
        {name: runner(layer) for name, layer in layers.items()}, options.warmup, options.rounds, device, deadline
    )
    for name, timing in timings.items():
        facts[name] |= timing.facts()
        if BASELINE in timings:
            facts[name]["ratio_to_peft"] = timing.ratio_to(timings[BASELINE])
    result = table(timings, facts)
    stack_bytes = sum(parameter.numel() * parameter.element_size() for parameter in base.parameters())
    intro = (
        f"LoRA on one layer's experts, {str(dtype).removeprefix('torch.')}, forward and backward with frozen experts; "
        f"T {options.tokens}, H {options.hidden_size}, I {options.intermediate_size}, E {options.experts}, K {TOP_K}, "
        f"r {options.r}; the experts' weights are {stack_bytes / 1e6:.1f} MB. Arms interleaved, {options.warmup} warm-up "
        f"and {options.rounds} counted rounds, every round with a routing draw of its own; the ratio is the median over "
        "rounds. `kept for backward` counts storages once and leaves parameters out; `trained` counts parameters; `error` "
        "is the largest relative error of output and gradients against plain PEFT in float64."
    )
    reasons = "".join(f"\n\n{name} was not timed. {reason}" for name, reason in refused.items())
    report.add("expert_bytes", stack_bytes)
    report.add("refused", refused)
    report.add("arms", facts, f"{intro}\n\n{result}{reasons}")
    path = report.finish()
    if refused:
        raise RuntimeError("; ".join(f"{name}: {reason}" for name, reason in refused.items()))
    return path
