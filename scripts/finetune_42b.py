"""Memory and speed of fine-tuning at the released size, with random weights: no checkpoint is needed.

    python -m scripts.finetune_42b                    # QLoRA, or LoRA in bfloat16 where bitsandbytes is not installed
    python -m scripts.finetune_42b --method qlora     # one GPU of 80 GB
    python -m scripts.finetune_42b --method lora      # one GPU of 140 GB; on a smaller one with fewer layers
    python -m scripts.finetune_42b --toy --device cpu --output /tmp/results   # tried at small size

A training step is forward, backward and AdamW on one row of --seq-length random tokens, with checkpointing. 4-bit weights
are quantised layer by layer as they are drawn, so that memory never holds the model in 16 bits. The measured peak stands
beside what `grinmoe plan` predicts. Writes a dated .json and .md after every step; a run that exceeds the memory says so.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import shlex
import statistics
import sys
import time
from pathlib import Path
from typing import Any

RELEASED_LAYERS = 32
# Of a GPU's memory, what weights in 16 bits may take; the rest is for adapters, their optimizer, activations and buffers.
WEIGHTS_SHARE = 0.75
WARMUP_STEPS = 2


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(
        prog="python -m scripts.finetune_42b",
        description="Measure peak memory and tokens/s of QLoRA or LoRA on 42B random weights.",
        epilog="example: python -m scripts.finetune_42b --method qlora",
    )
    options.add_argument("--method", choices=["qlora", "lora"], help="default: qlora if bitsandbytes is installed")
    options.add_argument("--output", default="benchmarks/results", metavar="DIR", help="default: benchmarks/results")
    options.add_argument("--layers", type=int, metavar="L", help="default: 32, for LoRA as many as fit")
    options.add_argument("--seq-length", type=int, default=2048, metavar="S", help="tokens of a row (default: 2048)")
    options.add_argument("--batch-size", type=int, default=1, metavar="B", help="rows of a step (default: 1)")
    options.add_argument("--steps", type=int, default=10, metavar="N", help="measured steps, after 2 (default: 10)")
    options.add_argument("--lora-r", type=int, default=16, metavar="R", help="rank (default: 16)")
    options.add_argument("--minutes", type=float, metavar="M", help="begin no step after so many")
    options.add_argument("--device", default="cuda")
    options.add_argument("--toy", action="store_true", help="a tiny model on the CPU, to try the script")
    return options


def main() -> None:
    try:
        run(parser().parse_args())
    except RuntimeError as error:
        raise SystemExit(f"finetune_42b: {error}") from error


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """
    Measure and write; returns what the .json holds.

    Raises:
        RuntimeError: out of memory, or no step was measured. What was measured is written all the same.
    """
    import torch

    from grinmoe.provenance import environment
    from grinmoe.training import peak_gib

    deadline = None if arguments.minutes is None else time.monotonic() + 60 * arguments.minutes
    if arguments.toy:
        arguments.device, arguments.seq_length, arguments.steps = "cpu", 32, min(arguments.steps, 2)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("finetune_42b: no GPU is visible; --toy tries the script on a CPU")
    if arguments.method is None:
        arguments.method = "lora" if importlib.util.find_spec("bitsandbytes") is None else "qlora"
    torch.manual_seed(0)
    result: dict[str, Any] = {
        "environment": environment(shlex.join(["python", "-m", "scripts.finetune_42b", *sys.argv[1:]])),
        "complete": False,
        "method": arguments.method,
        "layers": layers(arguments),
        "batch_size": arguments.batch_size,
        "seq_length": arguments.seq_length,
        "step_seconds": [],
    }
    started = time.perf_counter()
    try:
        model = build(result["layers"], arguments)
        result["parameters"] = model.get_base_model().num_parameters()
        result["trained"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
        result |= {"load_seconds": time.perf_counter() - started, "load_peak_gib": peak_gib()}
        write(result, arguments)
        for seconds in steps(model, arguments):
            if seconds is not None:
                result["step_seconds"].append(seconds)
                tokens = arguments.batch_size * arguments.seq_length
                result["tokens_per_s"] = tokens / statistics.median(result["step_seconds"])
            result["peak_gib"] = peak_gib()
            write(result, arguments)
            if deadline is not None and time.monotonic() > deadline:
                break
    except torch.OutOfMemoryError as error:
        result["failure"] = f"out of memory: {str(error).splitlines()[0]}"
        write(result, arguments)
        raise RuntimeError(result["failure"]) from error
    if not result["step_seconds"]:
        raise RuntimeError(f"no step was measured within --minutes {arguments.minutes:g}; give more")
    result["predicted_gib"] = predicted(model.get_base_model().config, arguments)
    result["complete"] = True
    print(write(result, arguments))
    return result


def layers(arguments: argparse.Namespace) -> int:
    """Of the model: as asked, or all of the released model's; for weights in 16 bits as many as the GPU has memory for."""
    import torch

    from grinmoe import GrinMoeConfig

    if arguments.layers is not None or arguments.toy:
        return arguments.layers or 2
    if arguments.method == "qlora" or arguments.device != "cuda":
        return RELEASED_LAYERS
    config = GrinMoeConfig()
    layer = config.num_local_experts * 3 * config.hidden_size * config.intermediate_size + 4 * config.hidden_size**2
    memory = torch.cuda.get_device_properties(0).total_memory
    embeddings = 2 * config.vocab_size * config.hidden_size
    return max(1, min(RELEASED_LAYERS, int((WEIGHTS_SHARE * memory / 2 - embeddings) / layer)))


def build(num_layers: int, arguments: argparse.Namespace) -> Any:
    """The model with its adapters; the quantised one never exists whole in 16 bits."""
    import torch
    from peft import get_peft_model

    from grinmoe import GrinMoeConfig, GrinMoeForCausalLM
    from grinmoe.adapters import lora_config, quantization_config
    from grinmoe.planning import random_quantized_model

    config = GrinMoeConfig(num_hidden_layers=num_layers, max_position_embeddings=max(4096, arguments.seq_length))
    if arguments.toy:
        config = GrinMoeConfig(
            vocab_size=512,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=num_layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=4,
            eos_token_id=0,
            pad_token_id=0,
        )
    dtype = torch.bfloat16
    if arguments.method == "qlora":
        model = random_quantized_model(config, quantization_config("nf4", dtype), arguments.device, dtype)
    else:
        previous = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device(arguments.device):
                model = GrinMoeForCausalLM(config)
        finally:
            torch.set_default_dtype(previous)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.config.use_cache = False
    return get_peft_model(model, lora_config(model, r=arguments.lora_r)).train()


def steps(model: Any, arguments: argparse.Namespace):
    """Train; yields the seconds of each measured step, and None for one before."""
    import torch

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    shape = (arguments.batch_size, arguments.seq_length)
    for step in range(arguments.steps + WARMUP_STEPS):
        ids = torch.randint(model.config.vocab_size, shape, device=arguments.device)
        synchronize(arguments.device)
        start = time.perf_counter()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        synchronize(arguments.device)
        yield time.perf_counter() - start if step >= WARMUP_STEPS else None


def synchronize(device: str) -> None:
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


def predicted(config: Any, arguments: argparse.Namespace) -> float:
    """What `grinmoe plan` says, without its allowance."""
    import tempfile

    from grinmoe.planning import PlanOptions, make_plan

    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        plan = make_plan(
            PlanOptions(
                model=folder,
                method=arguments.method,
                gpus=1,
                gpu_memory_gib=141.0,
                seq_length=arguments.seq_length,
                batch_size=arguments.batch_size,
                lora_r=arguments.lora_r,
            )
        )
    parts = json.loads(plan.to_json())["per_gpu_gib"]
    return parts["total"] - parts["allowance"]


def write(result: dict[str, Any], arguments: argparse.Namespace) -> str:
    """Write what is known of `result` so far; returns the Markdown."""
    from grinmoe.files import atomic_write_text
    from grinmoe.provenance import markdown_table

    facts = result["environment"]
    folder = Path(arguments.output)
    folder.mkdir(parents=True, exist_ok=True)
    device = "gpu" if facts["gpu"] and arguments.device == "cuda" else "cpu"
    size = "" if arguments.toy or result["layers"] != RELEASED_LAYERS else "-42b"
    name = f"{datetime.date.today()}-finetune-{arguments.method}{size}-{device}{'-toy' if arguments.toy else ''}"
    atomic_write_text(folder / f"{name}.json", json.dumps(result, indent=1) + "\n")
    rows = [
        ["layers", str(result["layers"])],
        ["rows x tokens of a step", f"{result['batch_size']} x {result['seq_length']}"],
    ]
    if "parameters" in result:
        rows += [
            ["parameters, of them trained", f"{result['parameters']:,}, {result['trained']:,}"],
            ["seconds to make the model, peak", f"{result['load_seconds']:.1f} s, {result['load_peak_gib']:.2f} GiB"],
        ]
    if result["step_seconds"]:
        rows += [
            ["median step", f"{statistics.median(result['step_seconds']):.3f} s of {len(result['step_seconds'])}"],
            ["speed", f"{result['tokens_per_s']:,.0f} tokens/s"],
        ]
    if "peak_gib" in result:
        rows.append(["peak memory", f"{result['peak_gib']:.2f} GiB ({result['peak_gib'] * 2**30 / 1e9:.1f} GB)"])
    if "predicted_gib" in result:
        rows.append(["`grinmoe plan` predicts, without allowance", f"{result['predicted_gib']:.2f} GiB"])
    state = "" if result["complete"] else "**Not complete: what follows was measured until then.**\n\n"
    if "failure" in result:
        state = f"**{result['failure']}**\n\n"
    if arguments.toy:
        state += "A trial of the code at toy size. Its times mean nothing.\n\n"
    text = f"""# {arguments.method} with random weights

{state}{facts["date"]}, commit {facts["commit"]}, {facts["gpu"] or facts["cpu"]}, torch {facts["torch"]}, transformers
{facts["transformers"]}. Command: `{facts["command"]}`. On a CPU the peak is that of the whole process.

{markdown_table(["", "measured"], rows)}
"""
    atomic_write_text(folder / f"{name}.md", text)
    return text


if __name__ == "__main__":
    main()
