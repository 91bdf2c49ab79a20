"""Fixtures shared by all tests: the golden data and tiny models. Everything is small; nothing is downloaded."""

from __future__ import annotations

import functools
import gc
import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

# Triton decides at a kernel's definition whether it is compiled or interpreted, so before the first import of ours.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from grinmoe import GrinMoeForCausalLM
from tests import tiny
from tests.fake_hub.server import hub  # noqa: F401
from tests.serving.served_model import served_folder  # noqa: F401
from tests.small_chat import chat_data, chat_model  # noqa: F401

DATA = Path(__file__).parent / "goldens" / "data"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fuzz-examples", type=int, metavar="N", help="random examples of each test in tests/fuzzing")


def pytest_collection_finish() -> None:
    """Leave what the imports made out of garbage collections, which Transformers runs after each shard: 0.5 s each."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # otherwise Triton reports at the end that its functions were leaked


@dataclass(frozen=True)
class Golden:
    """One golden checkpoint: its folder and the reference's inputs, outputs and gradients."""

    name: str
    folder: Path
    inputs: dict[str, torch.Tensor]
    expected: dict[str, torch.Tensor]
    gradients: dict[str, torch.Tensor]
    digest_keys: dict[str, list[str]]

    @property
    def variant(self) -> str:
        """golden-b holds several windows; `hub` is the released behaviour."""
        return "hub." if self.name == "golden-b" else ""

    def __getitem__(self, field: str) -> torch.Tensor:
        return self.expected[self.variant + field]

    def __contains__(self, field: str) -> bool:
        return self.variant + field in self.expected

    def model_inputs(self, case: str, labels: bool = True) -> dict[str, torch.Tensor]:
        """Arguments of the model's forward for a case of the data's README."""
        source = case.removeprefix("train_") if case != "train" else "plain"
        source = source.removesuffix("_pos")
        names = ["input_ids", "attention_mask"] + ["labels"] * labels
        if case.endswith("_pos"):
            names.append("position_ids")
        return {name: self.inputs[f"{source}.{name}"] for name in names if f"{source}.{name}" in self.inputs}

    def load(self, **kwargs) -> GrinMoeForCausalLM:
        return GrinMoeForCausalLM.from_pretrained(self.folder, dtype=torch.float32, **kwargs).eval()


def _load_golden(name: str) -> Golden:
    folder = DATA / name
    return Golden(
        name,
        folder,
        load_file(folder / "inputs.safetensors"),
        load_file(folder / "expected.safetensors"),
        load_file(folder / "gradients.safetensors"),
        json.loads((folder / "expected.json").read_text())["grad_digest_keys"],
    )


@pytest.fixture(scope="session")
def goldens() -> dict[str, Golden]:
    return {name: _load_golden(name) for name in ("golden-a", "golden-b", "golden-c")}


@pytest.fixture(scope="session")
def golden_models(goldens) -> dict[str, GrinMoeForCausalLM]:
    """One loaded model per golden checkpoint. Tests that change weights or mode load their own."""
    return {name: golden.load() for name, golden in goldens.items()}


@pytest.fixture
def tiny_config():
    """Factory of a config that trains in milliseconds and pads with its end token; keyword arguments override."""
    return functools.partial(tiny.tiny_config, pad_token_id=95)


@pytest.fixture
def tiny_model():
    """Factory of a randomly initialised tiny model in evaluation mode, the same for the same arguments."""

    def make(seed: int = 0, **overrides) -> GrinMoeForCausalLM:
        return tiny.tiny_model(seed, **{"pad_token_id": 95, **overrides}).eval()

    return make


@pytest.fixture(scope="session")
def tiny_tokenizer_folder(tmp_path_factory) -> Path:
    """A byte-level tokenizer of 320 ids that needs no training: enough to feed a golden model text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder
