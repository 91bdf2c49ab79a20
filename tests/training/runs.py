"""Short runs of `grinmoe sft` that are disturbed, and comparisons of how they end."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from grinmoe.training import run as training
from grinmoe.training.recipe import read_recipe

# Dropout, jitter, sampled routing, a shuffled order and two micro-batches a step: all of the state that there is.
RANDOM = {
    "config_overrides": '{"expert_dropout": 0.1, "hidden_dropout": 0.1, "router_aux_loss_coef": 0.01, '
    '"router_aux_loss_scope": "global"}',
    "gradient_accumulation_steps": 2,
    "save_total_limit": 3,
}


class At(TrainerCallback):
    """Does something once, at the n-th call of an event."""

    def __init__(self, event: str, count: int, action):
        self.left = count
        self.action = action
        setattr(self, event, self._called)

    def _called(self, *args, **kwargs):
        self.left -= 1
        if self.left == 0:
            self.action()


def run(flags: list[str], monkeypatch=None, disturbance: TrainerCallback | None = None) -> training.RunResult:
    if disturbance is not None:
        build = training.build_trainer

        def with_disturbance(*args):
            trainer, monitor = build(*args)
            trainer.add_callback(disturbance)
            return trainer, monitor

        monkeypatch.setattr(training, "build_trainer", with_disturbance)
    try:
        return training.train(read_recipe("sft", flags), "a test")
    finally:
        if monkeypatch is not None:
            monkeypatch.undo()


def assert_same_end(found: Path, expected: Path) -> None:
    """Weights, optimizer, scheduler and random state of the last checkpoint, and the model that was saved."""
    last, reference = found / "checkpoint-4", expected / "checkpoint-4"
    for file in [
        *reference.glob("*.safetensors"),
        *expected.glob("model/*.safetensors"),
        *expected.glob("adapter/*.sa*"),
    ]:
        tensors, others = load_file(file), load_file(found / file.relative_to(expected))
        assert tensors.keys() == others.keys() and tensors
        for name, tensor in tensors.items():
            assert torch.equal(tensor, others[name]), name
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        assert_equal(
            torch.load(last / name, weights_only=False), torch.load(reference / name, weights_only=False), name
        )


def assert_equal(found, expected, where: str) -> None:
    if isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected), where
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key in expected:
            assert_equal(found[key], expected[key], f"{where}/{key}")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), where
        for i, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_equal(one, other, f"{where}/{i}")
    elif hasattr(expected, "dtype"):
        assert (found == expected).all(), where
    else:
        assert found == expected, where


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def cut_off(source: Path, target: Path) -> Path:
    """A copy of a run that was killed before its result was written."""
    shutil.copytree(source, target)
    for name in ("model", "adapter"):
        shutil.rmtree(target / name, ignore_errors=True)
    record = json.loads((target / "run.json").read_text())
    (target / "run.json").write_text(json.dumps({**record, "status": "running"}))
    return target


def tree(folder: Path) -> list[str]:
    """Paths of all that is in a run directory, but the lock."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.name != "run.lock")
