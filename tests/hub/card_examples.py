"""Facts, results and texts that the tests of the model card share."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from huggingface_hub import ModelCard

from grinmoe.hub.card_facts import CardFacts, Evaluation

BASE = "microsoft/GRIN-MoE"

GSM = Evaluation("GSM-8K", "openai/gsm8k", "exact match", "exact_match", 0.5, dataset_config="main", shots=8)


HARNESS = {
    "results": {
        "mmlu": {"alias": "mmlu", "acc,none": 0.79, "acc_stderr,none": 0.003},
        "mmlu_anatomy": {"alias": " - anatomy", "acc,none": 0.61, "acc_stderr,none": 0.04},
        "suite": {"alias": "suite", " ,none": " "},
        "gsm8k": {
            "name": "gsm8k",
            "sample_len": 1319,
            "exact_match,strict-match": 0.9,
            "exact_match_stderr,strict-match": "N/A",
            "exact_match,flexible-extract": 0.91,
        },
    },
    "group_subtasks": {"mmlu": ["mmlu_anatomy"], "suite": ["gsm8k"]},
    "configs": {"gsm8k": {"dataset_path": "openai/gsm8k", "dataset_name": "main", "test_split": "test"}},
    "n-shot": {"mmlu": 5, "gsm8k": 8},
    "config": {"limit": None},
}


HOSTILE = [
    "a | b",
    "two\nlines",
    "back\\slash \\| pipe",
    "key: value # no comment",
    "---",
    "<!-- load --> PATH_OR_ID <!-- checkpoint -->",
    "{{ 7 * 7 }} {# no comment #} {% raw %}",
    "größer als ½ 日本語 🏴‍☠️",
    "'quoted\" <s>",
    "no",
    "\u2028\x85\ttab",
]


def some_facts(**changes) -> CardFacts:
    return replace(
        CardFacts(
            title="A fine-tune",
            summary="It talks like a pirate.",
            base_model=BASE,
            base_model_relation="finetune",
            license="mit",
            language=["en"],
            datasets=["HuggingFaceH4/ultrachat_200k"],
            data="Chats, of which a tenth was held out.",
            hyperparameters={"learning rate": 2e-5, "steps": 300, "packing": False, "modules": ["q_proj", "v_proj"]},
            measurements={"throughput": "900 tokens/s"},
            evaluations=[GSM],
        ),
        **changes,
    )


def saved(card: ModelCard, folder: Path) -> ModelCard:
    """What the Hub's client reads from the file."""
    card.save(folder / "saved.md")
    return ModelCard.load(folder / "saved.md")


def written(path: Path, content) -> Path:
    path.write_text(json.dumps(content))
    return path
