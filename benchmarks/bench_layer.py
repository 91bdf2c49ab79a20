"""Time of a decoder layer with attention at sequence 4096, sparse against dense (goal G2, the paper's 86.56 % on one GPU).

    python -m benchmarks layer
    TRITON_INTERPRET=1 python -m benchmarks layer --toy

One layer and the final norm, forward and backward with all weight gradients, routing as it comes: sampled, jittered. The
dense twin has the same attention and a SwiGLU MLP of K times an expert's width. Attention is sdpa, and flash attention where
that is installed. All sparse arms have the same weights. Before anything is timed, their outputs and gradients in evaluation
mode, where nothing is drawn, are held against the reference loop's; the experts themselves are held against more precision
by the block's benchmark.

Shapes: T tokens, S sequence, H hidden size.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from benchmarks.block_arms import DENSE, DenseMlp, describe
from benchmarks.floors import layer_floor_seconds
from benchmarks.protocol import Report, Timing, best_device, interleave, rates, relative_error
from grinmoe import GrinMoeConfig, GrinMoeModel
from grinmoe.provenance import markdown_table

REFERENCE = "eager"
# Relative error in the maximum norm. Both are in the same dtype, so that in bfloat16 two roundings meet.
GATE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class LayerSettings:
    """Sizes that are None are those of the device."""

    tokens: int | None = None
    sequence: int | None = None
    warmup: int = 5
    rounds: int = 20
    minutes: float | None = None
    toy: bool = False

    def for_device(self, device: torch.device) -> LayerSettings:
        tokens, sequence = (16384, 4096) if device.type == "cuda" else (1024, 512)
        if self.toy:
            return replace(self, tokens=64, sequence=32, warmup=1, rounds=3)
        return replace(
            self, tokens=self.tokens or tokens, sequence=self.sequence or min(sequence, self.tokens or tokens)
        )


class _DenseBlock(DenseMlp):
    """In the sparse block's place, with its arguments."""

    def forward(self, hidden_states, noise=None, routing_seed=None):
        return super().forward(hidden_states)


def make_dense(model: GrinMoeModel) -> GrinMoeModel:
    """Put a dense MLP of K times an expert's width, with its random weights, in the place of every layer's sparse block."""
    config = model.config
    for layer in model.layers:
        mlp = _DenseBlock(config.hidden_size, config.num_experts_per_tok * config.intermediate_size)
        for parameter in mlp.parameters():
            nn.init.normal_(parameter, std=config.initializer_range)
        layer.block_sparse_moe = mlp
    return model


def layer_config(options: LayerSettings, device: torch.device) -> GrinMoeConfig:
    sizes: dict[str, Any] = (
        {} if device.type == "cuda" else {"hidden_size": 512, "intermediate_size": 800, "num_attention_heads": 8}
    )
    if options.toy:
        sizes = {"hidden_size": 64, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    return GrinMoeConfig(num_hidden_layers=1, vocab_size=256, eos_token_id=1, pad_token_id=1, **sizes)


def build_arms(options: LayerSettings, device: torch.device, dtype: torch.dtype) -> dict[str, GrinMoeModel]:
    """Models of one layer in training mode, by name; flash attention's names end in it."""
    config = layer_config(options, device)
    kinds = [DENSE, REFERENCE, "grinmoe", *(["grinmoe_triton"] if device.type == "cuda" or options.toy else [])]
    attentions = ["sdpa"]
    if device.type == "cuda" and is_flash_attn_3_available():
        attentions.append("flash_attention_3")
    elif device.type == "cuda" and is_flash_attn_2_available():
        attentions.append("flash_attention_2")
    torch.manual_seed(0)
    weights: dict[bool, dict[str, torch.Tensor]] = {}
    models = {}
    for attention in attentions:
        for kind in kinds:
            if kind == REFERENCE and attention != "sdpa":
                continue
            with device:
                model = GrinMoeModel(GrinMoeConfig.from_dict(config.to_dict()))
                if kind == DENSE:
                    make_dense(model)
                else:
                    model.set_experts_implementation(kind)
            model.to(device, dtype).train()  # type: ignore[arg-type]  # a decorator hides the signature
            model.set_attn_implementation(attention)
            model.load_state_dict(weights.setdefault(kind == DENSE, model.state_dict()), assign=True)
            models[kind if attention == "sdpa" else f"{kind}, {attention}"] = model
    return models


def step(model: nn.Module, embedded: torch.Tensor, upstream: torch.Tensor) -> list[torch.Tensor]:
    """One forward and backward. Returns the output and the gradients of the input and of every parameter that has one."""
    leaf = embedded.detach().requires_grad_()
    output = model(inputs_embeds=leaf, use_cache=False).last_hidden_state
    output.backward(upstream)
    trained = [parameter for parameter in model.parameters() if parameter.grad is not None]
    results = [output.detach(), leaf.grad, *(parameter.grad for parameter in trained)]
    for parameter in trained:
        parameter.grad = None
    return results


def gate(models: dict[str, GrinMoeModel], embedded: torch.Tensor, upstream: torch.Tensor) -> tuple[dict, dict]:
    """Error of each arm that may be timed (None: nothing to compare with), and why the others may not."""
    errors: dict[str, float | None] = {}
    refused: dict[str, str] = {}
    expected = step(models[REFERENCE].eval(), embedded, upstream)
    for name, model in models.items():
        try:
            found = step(model.eval(), embedded, upstream)
        # Of a kernel or an attention that this device does not take: the others are measured all the same.
        except Exception as raised:
            refused[name] = describe(raised)
            continue
        # Another attention rounds otherwise, and then some tokens choose other experts.
        comparable = name in ("grinmoe", "grinmoe_triton", REFERENCE)
        errors[name] = relative_error(found, expected) if comparable else None
        if (errors[name] or 0.0) > GATE[embedded.dtype]:
            refused[name] = f"relative error {errors.pop(name):.2g} against the reference loop"
        model.train()
    models[REFERENCE].train()
    return errors, refused


def run(options: LayerSettings) -> Path:
    """
    Measure all arms, print the table, and return the path of the report.

    Raises:
        RuntimeError: an arm failed the gate. The report is written all the same.
    """
    device = best_device()
    deadline = None if options.minutes is None else time.monotonic() + 60 * options.minutes
    options = options.for_device(device)
    tokens, sequence = options.tokens or 0, options.sequence or 0
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    report = Report("layer", asdict(options), options.toy)
    best = rates(device)
    report.add("rates", best)
    models = build_arms(options, device, dtype)
    config = next(iter(models.values())).config
    torch.manual_seed(1)
    embedded = torch.randn(tokens // sequence, sequence, config.hidden_size, device=device).to(dtype)
    upstream = torch.randn_like(embedded)
    errors, refused = gate(models, embedded, upstream)
    timed = {name: model for name, model in models.items() if name in errors and name != REFERENCE}

    def forward_of(model: nn.Module) -> Callable[[int], object]:
        return lambda number: model(inputs_embeds=embedded, use_cache=False)

    def step_of(model: nn.Module) -> Callable[[int], object]:
        return lambda number: step(model, embedded, upstream)

    arms = {f"{name}, forward": forward_of(model) for name, model in timed.items()}
    arms |= {name: step_of(model) for name, model in timed.items()}
    timings = interleave(arms, options.warmup, options.rounds, device, deadline)
    floor = layer_floor_seconds(config, tokens, sequence, best["tflops"])
    facts: dict[str, dict[str, Any]] = {
        name: timings[name].facts()
        | {"forward_seconds": timings[f"{name}, forward"].seconds, "relative_error": errors[name]}
        for name in timed
    }
    text = (
        f"{tokens} tokens in sequences of {sequence}, H {config.hidden_size}, I {config.intermediate_size}, E "
        f"{config.num_local_experts}, {str(dtype).removeprefix('torch.')}, sdpa where not said otherwise. Floor: "
        f"{1e3 * floor['forward']:.2f} ms forward, {1e3 * floor['step']:.2f} ms step, at the measured "
        f"{best['tflops']:.3g} TFLOP/s. `host`: until Python has launched the step, on a GPU. `error`: against the "
        "reference loop in evaluation mode."
    )
    reasons = [f"{name} was not timed. {reason}" for name, reason in refused.items()]
    report.add("floor_seconds", floor)
    report.add("arms", facts, "\n\n".join([text, table(facts, floor["step"]), *reasons]))
    path = report.finish()
    if refused:
        raise RuntimeError("; ".join(f"{name}: {reason}" for name, reason in refused.items()))
    return path


def table(facts: dict[str, dict[str, Any]], floor_seconds: float) -> str:
    rows = []
    for name, arm in facts.items():
        timing, forward = Timing(arm["seconds"]), Timing(arm["forward_seconds"])
        low, high = timing.quartiles_ms
        # Each attention against the dense layer that has the same.
        base = facts.get(", ".join([DENSE, *name.split(", ")[1:]]))
        ratios = ["-", "-"]
        if base is not None:
            pairs = (forward, base["forward_seconds"]), (timing, base["seconds"])
            ratios = [f"{own.ratio_to(Timing(others)):.3f}" for own, others in pairs]
        host = f"{1e3 * arm['host_seconds']:.2f}" if "host_seconds" in arm else "-"
        times = [f"{forward.median_ms:.2f}", f"{timing.median_ms:.2f}", f"{low:.2f} to {high:.2f}", host]
        error = "-" if arm["relative_error"] is None else f"{arm['relative_error']:.1e}"
        rows.append([name, *times, *ratios, f"{floor_seconds / (1e-3 * timing.median_ms):.0%}", error])
    header = [
        "arm",
        "forward, ms",
        "step, ms",
        "quartiles, ms",
        "host, ms",
        "speed over dense, forward",
        "speed over dense, step",
        "of the floor",
        "error",
    ]
    return markdown_table(header, rows)


__all__ = ["LayerSettings", "make_dense", "run"]
