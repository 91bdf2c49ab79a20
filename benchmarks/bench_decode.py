"""Tokens per second of `generate`: ours against Transformers' phimoe, on the same weights in memory (goal G6 on a GPU).

    python -m benchmarks decode
    python -m benchmarks decode --layers 4 --batches 1
    TRITON_INTERPRET=1 python -m benchmarks decode --toy

Greedy, from prompts of 16 random tokens, 128 new ones. The time is that of a call of `generate` on the host's clock, prompt
included. Random weights; on a GPU the released size in bfloat16 with as many layers as memory allows, on a CPU a small model
in float32. Before anything is timed, every arm that is not compiled must give the reference loop's tokens in float32 at a
small size on the same device. An arm that gives another token is not timed, and neither is its compiled form. At full size
rounding in bfloat16 decides between near-equal tokens, and the share of equal ones is reported instead.

The floor is the time to read, at the measured copy rate, what a step must read: attention, router and head, the experts that
were really chosen (counted, a mean over layers and steps), and the keys and values.

Arms with a static cache compile, as `generate` does by itself on a GPU, and use CUDA graphs. Captured arms are
`grinmoe.serving`'s `CapturedDecoder`, one CUDA graph a token, of the kernels as they are or of what torch.compile makes of
them. Compiling and capturing, anew for every batch, are not in the time. On a GPU the arms run one by one, the most
important first, and the report is written after each; arms that no time is left for are left out.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import CompileConfig, PhimoeConfig, PhimoeForCausalLM

from benchmarks.block_arms import describe
from benchmarks.protocol import Report, best_device, rates
from grinmoe import GrinMoeConfig, GrinMoeForCausalLM
from grinmoe.modeling_grinmoe import GrinMoeRouter
from grinmoe.provenance import markdown_table
from grinmoe.serving import CapturedDecoder

PHIMOE, OURS = "transformers phimoe", "grinmoe"
PLAIN, STATIC, CAPTURED, CAPTURED_COMPILED = "plain", "static and compiled", "captured", "captured and compiled"
RELEASED_LAYERS = 32
# Of a GPU's memory; the rest is for caches, activations and what compiling and graphs take.
WEIGHTS_SHARE = 0.8

# Fields that both libraries' configs have, under these names.
SHARED_FIELDS = (
    *(
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
    ),
    *("num_local_experts", "num_experts_per_tok", "sliding_window", "max_position_embeddings", "rms_norm_eps"),
    *("attention_bias", "lm_head_bias", "router_jitter_noise", "rope_parameters", "eos_token_id", "pad_token_id"),
)


@dataclass(frozen=True)
class DecodeSettings:
    """Sizes that are None are those of the device.

    Attributes:
        layers: of the model.
        batches: rows that are generated at once.
        new_tokens, prompt_tokens: of every row.
        rounds: counted runs of each arm; on a GPU one, whose steps are many.
        minutes: after which no arm, and no further round, is begun.
    """

    layers: int | None = None
    batches: tuple[int, ...] = (1, 8, 32)
    new_tokens: int = 128
    prompt_tokens: int = 16
    rounds: int | None = None
    minutes: float | None = None
    toy: bool = False

    def for_device(self, device: torch.device) -> DecodeSettings:
        if self.toy:
            return replace(self, layers=1, batches=(1, 2), new_tokens=3, prompt_tokens=4, rounds=1)
        if device.type == "cuda":
            layers = self.layers or layers_that_fit(torch.cuda.get_device_properties(device).total_memory)
            return replace(self, layers=layers, rounds=self.rounds or 1)
        return replace(self, layers=self.layers or 4, rounds=self.rounds or 3)


@dataclass(frozen=True)
class Arm:
    """
    Attributes:
        library: PHIMOE or OURS.
        implementation: of the experts.
        form: of the step: PLAIN, STATIC (compiled, by `generate`), CAPTURED, or CAPTURED_COMPILED.
    """

    library: str
    implementation: str
    form: str = "plain"

    @property
    def name(self) -> str:
        return ", ".join([self.library, self.implementation, *([] if self.form == PLAIN else [self.form])])

    @property
    def compiled(self) -> bool:
        return self.form in (STATIC, CAPTURED_COMPILED)


REFERENCE = Arm(OURS, "eager")
UNCOMPILED = {STATIC: PLAIN, CAPTURED_COMPILED: CAPTURED}


def uncompiled(arm: Arm) -> Arm:
    """The arm with the same kernels that does not compile."""
    return replace(arm, form=UNCOMPILED.get(arm.form, arm.form))


def arms_for(device: torch.device, toy: bool) -> list[Arm]:
    """What is measured on `device`, on a GPU the most important first.

    Of phimoe's implementations `generate` itself exchanges grouped_mm for batched_mm when it decodes on a GPU, where its
    eager loop waits for the device in every layer and is left out.
    """
    theirs, default, kernels = Arm(PHIMOE, "grouped_mm"), Arm(OURS, "grinmoe"), Arm(OURS, "grinmoe_triton")
    if device.type == "cuda" or toy:
        # Capturing takes seconds and compiling a minute.
        captured, static, both = (replace(kernels, form=form) for form in (CAPTURED, STATIC, CAPTURED_COMPILED))
        return [captured, static, theirs, kernels, default, both, replace(theirs, form=STATIC)]
    return [Arm(PHIMOE, "eager"), theirs, Arm(PHIMOE, "batched_mm"), default]


def model_config(layers: int, released: bool, toy: bool = False) -> GrinMoeConfig:
    if released:
        return GrinMoeConfig(num_hidden_layers=layers)
    sizes: dict[str, Any] = {"hidden_size": 512, "intermediate_size": 800, "num_attention_heads": 8, "vocab_size": 4096}
    if toy:
        sizes = {"hidden_size": 64, "intermediate_size": 32, "num_attention_heads": 4, "vocab_size": 256}
    ends: dict[str, Any] = {"num_key_value_heads": 2, "eos_token_id": 1, "pad_token_id": 1}
    return GrinMoeConfig(num_hidden_layers=layers, **sizes, **ends)


def parameter_bytes(config: GrinMoeConfig, element_bytes: int) -> dict[str, int]:
    """Bytes of a layer's attention with router and norms, of one expert, and of the head."""
    hidden, queries = config.hidden_size, config.num_attention_heads * config.head_size
    keys_and_values = 2 * config.num_key_value_heads * config.head_size
    attention = (
        hidden * (2 * queries + keys_and_values) + hidden * (config.num_local_experts + 5) + queries + keys_and_values
    )
    expert = 3 * hidden * config.intermediate_size
    return {
        "attention": element_bytes * attention,
        "expert": element_bytes * expert,
        "head": element_bytes * config.vocab_size * (hidden + 1),
    }


def bytes_read(
    config: GrinMoeConfig, element_bytes: int, batch: int, experts_read: float, cached_tokens: float
) -> float:
    """
    What one step must read.

    Args:
        experts_read: distinct experts of a layer that the batch's tokens chose.
        cached_tokens: keys that a row sees.
    """
    part = parameter_bytes(config, element_bytes)
    cache = element_bytes * 2 * config.num_key_value_heads * config.head_size * cached_tokens * batch
    return config.num_hidden_layers * (part["attention"] + experts_read * part["expert"] + cache) + part["head"]


def layers_that_fit(memory_bytes: int) -> int:
    config = GrinMoeConfig()
    part = parameter_bytes(config, 2)
    layer = part["attention"] + config.num_local_experts * part["expert"]
    return max(1, min(RELEASED_LAYERS, int((WEIGHTS_SHARE * memory_bytes - 2 * part["head"]) / layer)))


def build_pair(config: GrinMoeConfig, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Our model with random weights, and phimoe with the same in the same memory. In evaluation mode."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    torch.manual_seed(0)
    try:
        with device:
            ours = GrinMoeForCausalLM(config)
    finally:
        torch.set_default_dtype(previous)
    phimoe_config = PhimoeConfig(**{name: getattr(config, name) for name in SHARED_FIELDS}, dtype=dtype)
    with torch.device("meta"):
        phimoe = PhimoeForCausalLM(phimoe_config)
    for name, parameter in ours.named_parameters():
        phimoe_name = name.replace("block_sparse_moe.gate", "mlp.router").replace("block_sparse_moe", "mlp")
        owner, _, attribute = phimoe_name.rpartition(".")
        setattr(phimoe.get_submodule(owner), attribute, parameter)
    with device:
        phimoe.model.rotary_emb = type(phimoe.model.rotary_emb)(phimoe_config)
    assert not any(tensor.is_meta for tensor in phimoe.state_dict().values()), "phimoe has a weight that we have not"
    return {PHIMOE: phimoe.eval(), OURS: ours.eval()}


def runner(models: dict[str, Any], arm: Arm, options: DecodeSettings) -> Callable[[torch.Tensor], torch.Tensor]:
    """
    Generates from prompts (B, S); returns the new tokens (B, new_tokens) on the host, which waits for the device.

    Captured arms capture in their first call, for prompts of its shape.
    """
    model = models[arm.library]
    count = options.new_tokens
    decoders: list[CapturedDecoder] = []

    def captured(prompts: torch.Tensor) -> torch.Tensor:
        if not decoders:
            model.set_experts_implementation(arm.implementation)
            # On a CPU nothing can be captured: the same step, launched by the host.
            mode = "compiled" if arm.compiled else "graph" if prompts.is_cuda else "eager"
            lengths = prompts.shape[0], prompts.shape[1] + count
            decoders.append(CapturedDecoder(model, *lengths, mode=mode, eos_token_id=None, pad_token_id=0))
        return decoders[0].generate(prompts, max_new_tokens=count)[:, prompts.shape[1] :].cpu()

    def generate(prompts: torch.Tensor) -> torch.Tensor:
        model.set_experts_implementation(arm.implementation)
        kind: dict[str, Any] = {"cache_implementation": "static" if arm.compiled else None}
        if arm.compiled and prompts.device.type != "cuda":
            compiler: dict[str, Any] = {"backend": "aot_eager", "mode": None}
            kind["compile_config"] = CompileConfig(**compiler)
            kind["compile_config"]._compile_all_devices = True
        # An end-of-text token would end some arms' rows before others'.
        ends = {"eos_token_id": None, "pad_token_id": 0}
        mask = torch.ones_like(prompts)
        output = model.generate(prompts, attention_mask=mask, do_sample=False, max_new_tokens=count, **ends, **kind)
        return output[:, prompts.shape[1] :].cpu()

    return captured if arm.form in (CAPTURED, CAPTURED_COMPILED) else generate


def draw_prompts(config: GrinMoeConfig, batch: int, options: DecodeSettings, device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(batch)
    return torch.randint(2, config.vocab_size, (batch, options.prompt_tokens), generator=generator).to(device)


def gate(device: torch.device, options: DecodeSettings) -> dict[str, str]:
    """
    Generate with every arm that is not compiled, in float32 at a small size.

    Returns:
        By name the arms whose greedy tokens are not the reference loop's, or that do not run, and why.
    """
    config = model_config(2, released=False, toy=options.toy)
    models = build_pair(config, device, torch.float32)
    prompts = draw_prompts(config, min(8, max(options.batches)), options, device)
    small = replace(options, new_tokens=min(options.new_tokens, 16))
    expected = runner(models, REFERENCE, small)(prompts)
    refused = {}
    for arm in dict.fromkeys(uncompiled(arm) for arm in arms_for(device, options.toy)):
        try:
            found = runner(models, arm, small)(prompts)
        # Of a kernel that this device does not take: the others are measured all the same.
        except Exception as raised:
            refused[arm.name] = describe(raised)
            continue
        if not torch.equal(found, expected):
            row, step = (found != expected).nonzero()[0].tolist()
            share = (found == expected).float().mean().item()
            refused[arm.name] = (
                f"in float32 {share:.1%} of its tokens are the reference loop's; the first that is not is token {step} of "
                f"row {row}, {found[row, step]} and not {expected[row, step]}"
            )
    return refused


def experts_per_step(models: dict[str, Any], prompts: torch.Tensor, options: DecodeSettings) -> float:
    """Distinct experts that a layer's step reads: a mean over layers and the first 16 steps after the prompt."""
    counts: list[int] = []

    def count(module, inputs, output):
        if inputs[0].shape[0] == prompts.shape[0]:  # a step, not the prompt
            counts.append(output[2].unique().numel())

    hooks = [m.register_forward_hook(count) for m in models[OURS].modules() if isinstance(m, GrinMoeRouter)]
    # By the loop, which runs wherever torch does.
    runner(models, REFERENCE, replace(options, new_tokens=min(options.new_tokens, 17)))(prompts)
    for hook in hooks:
        hook.remove()
    return statistics.mean(counts)


def measure(
    models: dict[str, Any], arms: list[Arm], prompts: torch.Tensor, options: DecodeSettings, deadline: float | None
) -> dict[str, dict[str, Any]]:
    """Arms in turn: seconds of the rounds, and the tokens; of one that failed or was not begun, why it is left out."""
    found: dict[str, dict[str, Any]] = {}
    ready = {}
    for arm in arms:
        if is_late(deadline):
            found[arm.name] = {"left_out": "no time was left"}
            continue
        run = runner(models, arm, options)
        found[arm.name] = warm_up(models, arm, run, prompts, options)
        if "left_out" not in found[arm.name]:
            ready[arm.name] = run
    for number in range(options.rounds or 1):
        if number and is_late(deadline):
            break
        for name, generate in ready.items():
            started = time.perf_counter()
            found[name]["tokens"] = generate(prompts).tolist()
            found[name]["seconds"].append(time.perf_counter() - started)
    return found


def is_late(deadline: float | None) -> bool:
    return deadline is not None and time.monotonic() > deadline


def warm_up(
    models: dict[str, Any],
    arm: Arm,
    run: Callable[[torch.Tensor], torch.Tensor],
    prompts: torch.Tensor,
    options: DecodeSettings,
) -> dict[str, Any]:
    """A call that is not counted. On a GPU a whole one: it compiles and captures for what is measured, and cuDNN's attention
    plans anew for every number of keys, which takes it tens of milliseconds."""
    if arm.compiled:
        torch.compiler.reset()
    elif prompts.device.type != "cuda" and arm.form == PLAIN:
        run = runner(models, arm, replace(options, new_tokens=min(options.new_tokens, 8)))
    started = time.perf_counter()
    try:
        run(prompts)
    # What compilers, kernels and allocators raise; the other arms are measured all the same.
    except Exception as error:
        return {"left_out": describe(error)}
    finally:
        if prompts.device.type == "cuda":
            torch.cuda.empty_cache()
    return {"warm_up_seconds": time.perf_counter() - started, "seconds": []}


def table(
    found: dict[str, dict[str, Any]], batch: int, options: DecodeSettings, floor_tokens_per_s: float | None
) -> str:
    timed = {name: one for name, one in found.items() if one.get("seconds")}
    # The default where it was timed: what a user gets without asking.
    base_name = next((name for name in (Arm(OURS, "grinmoe").name, *timed) if name in timed), None)
    rows = []
    for name, one in found.items():
        if name not in timed or base_name is None:
            rows.append([name, one.get("left_out", "not timed"), "-", "-", "-", "-", "-"])
            continue
        base = timed[base_name]
        rate = batch * options.new_tokens / statistics.median(one["seconds"])
        equal = torch.tensor(one["tokens"]) == torch.tensor(base["tokens"])  # (B, new tokens)
        share = "-" if floor_tokens_per_s is None else f"{rate / floor_tokens_per_s:.1%}"
        spread = f"{min(one['seconds']):.2f} to {max(one['seconds']):.2f}"
        times = statistics.median(base["seconds"]) / statistics.median(one["seconds"])
        alike = int(equal.all(dim=0).long().cumprod(0).sum())
        rows.append(
            [name, f"{rate:.1f}", spread, f"{times:.2f}", share, f"{equal.float().mean().item():.1%}", str(alike)]
        )
    header = ["arm", "tokens/s", "seconds, least to most", f"times the rate of {base_name or '-'}"]
    header += ["of the floor's rate", "tokens equal to its", "steps before the first difference"]
    return markdown_table(header, rows)


def run(options: DecodeSettings) -> Path:
    """Measure all batches, print their tables as they come, and return the path of the report."""
    device = best_device()
    options = options.for_device(device)
    on_gpu = device.type == "cuda"
    deadline = None if options.minutes is None else time.monotonic() + 60 * options.minutes
    report = Report("decode", asdict(options), options.toy)
    best = rates(device)
    report.add("rates", best)
    refused = gate(device, options)
    report.add("refused", refused, "\n\n".join(f"{name} is not timed: {reason}." for name, reason in refused.items()))
    assert options.layers is not None
    config = model_config(options.layers, on_gpu, options.toy)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    models = build_pair(config, device, dtype)
    scaled = on_gpu and options.layers != RELEASED_LAYERS
    note = f" Scaled: the released model has {RELEASED_LAYERS} layers." if scaled else ""
    text = (
        f"{options.layers} layers, H {config.hidden_size}, I {config.intermediate_size}, E {config.num_local_experts}, "
        f"K {config.num_experts_per_tok}, vocabulary {config.vocab_size}, {str(dtype).removeprefix('torch.')}.{note} "
        f"Prompts of {options.prompt_tokens} tokens, {options.new_tokens} new ones, greedy. "
        f"Copy rate {best['tb_per_s']:.3g} TB/s. Arms that compile took their warm-up besides."
    )
    report.add("description", text, text)
    arms = [arm for arm in arms_for(device, options.toy) if uncompiled(arm).name not in refused]
    results: dict[str, Any] = {}
    for batch, stage in stages(arms, options, one_by_one=on_gpu or options.toy):
        prompts = draw_prompts(config, batch, options, device)
        one = results.setdefault(f"batch {batch}", {"arms": {}})
        if "floor_ms" not in one:
            one["experts_read"] = experts_per_step(models, prompts, options)
            cached = options.prompt_tokens + options.new_tokens / 2
            one["bytes_read"] = bytes_read(config, dtype.itemsize, batch, one["experts_read"], cached)
            one["floor_ms"] = 1e3 * one["bytes_read"] / (best["tb_per_s"] * 1e12)
        one["arms"] |= measure(models, stage, prompts, options, deadline)
        report.update("batches", results, {f"batch {batch}": section(batch, one, options, on_gpu)})
        for name in (arm.name for arm in stage):
            measured = one["arms"][name]
            print(f"batch {batch}, {name}: {measured.get('left_out') or measured['seconds']}", flush=True)
        gc.collect()
    path = report.finish()
    if refused:
        raise RuntimeError("; ".join(f"{name}: {reason}" for name, reason in refused.items()))
    return path


def stages(arms: list[Arm], options: DecodeSettings, one_by_one: bool) -> list[tuple[int, list[Arm]]]:
    """
    Batches and arms in the order of their importance.

    Args:
        arms: the most important first.
        one_by_one: one arm after the other, each with all batches; else the arms of a batch take turns.
    """
    if not one_by_one:
        # It copies the weights of every choice, which takes a CPU seconds a step when rows are many.
        few = [arm for arm in arms if arm.implementation != "batched_mm"]
        return [(batch, arms if batch == 1 else few) for batch in options.batches]
    # A trial of the code need not compile twice.
    first = options.batches[0]
    return [
        (batch, [arm])
        for arm in (arms if not options.toy else [arm for arm in arms if not arm.compiled or arm == arms[1]])
        for batch in options.batches
        if not (options.toy and arm.compiled and batch != first)
    ]


def section(batch: int, one: dict[str, Any], options: DecodeSettings, on_gpu: bool) -> str:
    """One batch for people."""
    floor = batch * 1e3 / one["floor_ms"]
    facts = (
        f"{one['experts_read']:.1f} experts read a layer, {one['bytes_read'] / 1e9:.3g} GB a step: at least "
        f"{one['floor_ms']:.3g} ms, {floor:.0f} tokens/s."
    )
    # A small model's weights stay in a CPU's cache, which the copy rate says nothing of.
    shown = table(one["arms"], batch, options, floor if on_gpu else None)
    return f"## batch {batch}\n\n" + (f"{facts}\n\n" if on_gpu else "") + shown


__all__ = ["DecodeSettings", "run"]
