"""Memory and speed of fine-tuning at the released size, with random weights: no checkpoint is needed.

    python scripts/finetune_42b.py --method qlora --output benchmarks/results   # one GPU of 80 GB
    python scripts/finetune_42b.py --method lora --output benchmarks/results    # one GPU of 140 GB
    python scripts/finetune_42b.py --method qlora --tiny --device cpu --output /tmp/results   # tried at small size

A training step is forward, backward and AdamW on one row of --seq-length random tokens, with checkpointing. The measured
peak stands beside what `grinmoe plan` predicts. Writes a dated .json and .md; a run that exceeds the memory says so.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import statistics
import sys
import time
from pathlib import Path
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Measure peak memory and tokens/s of QLoRA or LoRA on 42B random weights.",
        epilog="example: python scripts/finetune_42b.py --method qlora --output benchmarks/results",
    )
    parser.add_argument("--method", choices=["qlora", "lora"], required=True)
    parser.add_argument("--output", required=True, metavar="DIR", help="for the result files")
    parser.add_argument("--seq-length", type=int, default=2048, metavar="S", help="tokens of a row (default: 2048)")
    parser.add_argument("--batch-size", type=int, default=1, metavar="B", help="rows of a step (default: 1)")
    parser.add_argument("--steps", type=int, default=10, metavar="N", help="measured steps, after 2 (default: 10)")
    parser.add_argument("--lora-r", type=int, default=16, metavar="R", help="rank (default: 16)")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try the script")
    run(parser.parse_args())


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure and write; returns what the .json holds."""
    import torch

    from grinmoe.provenance import environment
    from grinmoe.training import peak_gib

    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("finetune_42b: no GPU is visible; --tiny --device cpu tries the script")
    torch.manual_seed(0)
    started = time.perf_counter()
    model = build(arguments)
    load_seconds, load_peak = time.perf_counter() - started, peak_gib()
    seconds = train(model, arguments)
    tokens = arguments.batch_size * arguments.seq_length
    result = {
        "environment": environment(shlex.join(["python", *sys.argv])),
        "method": arguments.method,
        "parameters": model.get_base_model().num_parameters(),
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "batch_size": arguments.batch_size,
        "seq_length": arguments.seq_length,
        "load_seconds": load_seconds,
        "load_peak_gib": load_peak,
        "step_seconds": seconds,
        "tokens_per_s": tokens / statistics.median(seconds),
        "peak_gib": peak_gib(),
        "predicted_gib": predicted(model.get_base_model().config, arguments),
    }
    write(result, arguments)
    return result


def build(arguments: argparse.Namespace) -> Any:
    """The model with its adapters; the quantised one never exists whole in 16 bits."""
    import torch
    from peft import get_peft_model

    from grinmoe import GrinMoeConfig, GrinMoeForCausalLM
    from grinmoe.adapters import lora_config, quantization_config
    from grinmoe.planning import random_quantized_model

    config = GrinMoeConfig(max_position_embeddings=max(4096, arguments.seq_length))
    if arguments.tiny:
        config = GrinMoeConfig(
            vocab_size=512,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
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


def train(model: Any, arguments: argparse.Namespace) -> list[float]:
    """Seconds of each measured step."""
    import torch

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    shape = (arguments.batch_size, arguments.seq_length)
    seconds = []
    for step in range(arguments.steps + 2):
        ids = torch.randint(model.config.vocab_size, shape, device=arguments.device)
        synchronize(arguments.device)
        start = time.perf_counter()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        synchronize(arguments.device)
        if step >= 2:
            seconds.append(time.perf_counter() - start)
    return seconds


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


def write(result: dict[str, Any], arguments: argparse.Namespace) -> None:
    from grinmoe.files import atomic_write_text
    from grinmoe.provenance import markdown_table

    facts = result["environment"]
    folder = Path(arguments.output)
    folder.mkdir(parents=True, exist_ok=True)
    device = "gpu" if facts["gpu"] and arguments.device == "cuda" else "cpu"
    name = f"{datetime.date.today()}-finetune-{arguments.method}{'-tiny' if arguments.tiny else '-42b'}-{device}"
    atomic_write_text(folder / f"{name}.json", json.dumps(result, indent=1) + "\n")
    rows = [
        ["parameters, of them trained", f"{result['parameters']:,}, {result['trained']:,}"],
        ["rows x tokens of a step", f"{result['batch_size']} x {result['seq_length']}"],
        ["seconds to make the model, peak", f"{result['load_seconds']:.1f} s, {result['load_peak_gib']:.2f} GiB"],
        ["median step", f"{statistics.median(result['step_seconds']):.3f} s"],
        ["speed", f"{result['tokens_per_s']:,.0f} tokens/s"],
        ["peak memory", f"{result['peak_gib']:.2f} GiB ({result['peak_gib'] * 2**30 / 1e9:.1f} GB)"],
        ["`grinmoe plan` predicts, without allowance", f"{result['predicted_gib']:.2f} GiB"],
    ]
    text = f"""# {arguments.method} with random weights

{facts["date"]}, commit {facts["commit"]}, {facts["gpu"] or facts["cpu"]}, torch {facts["torch"]}, transformers
{facts["transformers"]}. Command: `{facts["command"]}`. On a CPU the peak is that of the whole process.

{markdown_table(["", "measured"], rows)}
"""
    atomic_write_text(folder / f"{name}.md", text)
    print(text)


if __name__ == "__main__":
    main()
