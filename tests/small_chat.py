"""A small chat model with its tokenizer on disk, and data to train it on: what the training commands are run with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from grinmoe import GrinMoeConfig, GrinMoeForCausalLM
from grinmoe.tokenization import build_tokenizer

COLOURS = ("red", "green", "blue", "white", "black", "yellow", "brown", "pink")
THINGS = ("stone", "house", "river", "cloud", "bird")


def chats() -> list[dict]:
    """Forty questions and answers."""
    return [
        {
            "messages": [
                {"role": "user", "content": f"What is a {colour} {thing}?"},
                {"role": "assistant", "content": f"It is a {thing} that is {colour}."},
            ]
        }
        for colour in COLOURS
        for thing in THINGS
    ]


def preferences() -> list[dict]:
    """The same questions, with the next one's answer as the rejected one."""
    rows = [chat["messages"] for chat in chats()]
    return [
        {"prompt": row[:1], "chosen": row[1:], "rejected": rows[(i + 1) % len(rows)][1:]} for i, row in enumerate(rows)
    ]


def texts() -> list[dict]:
    return [{"text": " ".join(message["content"] for message in chat["messages"])} for chat in chats()]


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory) -> Path:
    """Folder of a small model and its tokenizer."""
    folder = tmp_path_factory.mktemp("chat-model")
    words = [message["content"] for chat in chats() for message in chat["messages"]]
    tokenizer = build_tokenizer(words, 384, model_max_length=64)
    torch.manual_seed(0)
    config = GrinMoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        max_position_embeddings=64,
        sliding_window=31,
        router_jitter_noise=0.1,
        initializer_range=0.1,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    GrinMoeForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def chat_data(tmp_path_factory) -> dict[str, Path]:
    """Files for each task."""
    folder = tmp_path_factory.mktemp("chat-data")
    rows = {"sft": chats(), "dpo": preferences(), "pretrain": texts()}
    return {task: write_rows(folder / f"{task}.jsonl", content) for task, content in rows.items()}


def small_run(base: Path, data: Path, output: Path, **settings) -> list[str]:
    """Flags of a run of some steps that evaluates and saves after every second one."""
    given = {
        "model": base,
        "train_data": data,
        "output_dir": output,
        "eval_share": 0.2,
        "max_length": 48,
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_steps": 2,
        "disable_tqdm": True,
        "use_cpu": True,
        "lora_r": 4,
        "train_sampling_strategy": "random",
        **settings,
    }
    return [text for key, value in given.items() if value is not None for text in (f"--{key}", str(value))]
