"""A small chat model with its tokenizer on disk, and data to train it on: what the training commands are run with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from grinmoe.tokenization import build_tokenizer
from tests.tiny import tiny_model

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


def words() -> list[str]:
    """What the chats say."""
    return [message["content"] for chat in chats() for message in chat["messages"]]


def chat_model_of(texts: list[str], vocab_size: int = 384, length: int = 64, seed: int = 0, **overrides):
    """A tiny model for texts of up to `length` tokens, and a tokenizer of the texts."""
    tokenizer = build_tokenizer(texts, vocab_size, model_max_length=length)
    ends = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    fields = {"vocab_size": len(tokenizer), "max_position_embeddings": length, "sliding_window": 31, **ends}
    return tiny_model(seed, **{**fields, **overrides}), tokenizer


def save_talking_model(folder: Path, *arguments, **overrides) -> None:
    """Save a [`chat_model_of`] of which texts are nonsense, but the same every time, and without single bytes."""
    model, tokenizer = chat_model_of(*arguments, initializer_range=0.2, **overrides)
    with torch.no_grad():
        # A run of single bytes that is no text is shown differently while it grows.
        model.lm_head.bias[3 : 3 + 256] = -1e4
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory) -> Path:
    """Folder of a small model and its tokenizer."""
    folder = tmp_path_factory.mktemp("chat-model")
    sizes = {"hidden_size": 64, "intermediate_size": 64}
    model, tokenizer = chat_model_of(words(), router_jitter_noise=0.1, initializer_range=0.1, **sizes)
    model.save_pretrained(folder)
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
