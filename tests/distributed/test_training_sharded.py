"""`grinmoe sft` on two processes that share the weights: from the recipe to the model in the released layout."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch.distributed.tensor import DTensor

from grinmoe import GrinMoeForCausalLM
from grinmoe.adapters.lora import load_adapter
from grinmoe.distributed import check_manifest
from grinmoe.training import recipe
from grinmoe.training import run as training
from grinmoe.training.run_directory import COMPLETE
from tests.distributed.fsdp_on_cpu import fsdp_on_cpu
from tests.distributed.two_ranks import run_on_two
from tests.small_chat import small_run


def sft(rank: int, flags: list[str], expected_start: str | None) -> None:
    build, seen = training.build_trainer, []

    def keep(*args):
        trainer, monitor = build(*args)
        seen.append(trainer)
        return trainer, monitor

    with fsdp_on_cpu(), mock.patch.object(recipe, "check_gpus"), mock.patch.object(training, "build_trainer", keep):
        result = training.train(recipe.read_recipe("sft", flags), "a test")
    assert result.status == COMPLETE
    (trainer,) = seen
    assert all(isinstance(parameter, DTensor) for parameter in trainer.model.parameters())
    assert trainer.accelerator.gradient_state.plugin_kwargs["sync_each_batch"], "no gradient stays whole"
    record = json.loads((result.model.parent / "run.json").read_text())
    assert record["starts"][-1]["from"] == expected_start


@pytest.mark.integration
@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_sharded_run_leaves_what_loads_anywhere_and_goes_on(tmp_path, chat_model, chat_data, method):
    output = tmp_path / "run"
    flags = small_run(chat_model, chat_data["sft"], output, method=method, gradient_accumulation_steps=2)
    run_on_two(sft, tmp_path, flags, None)
    first = weights(chat_model, output, method)
    assert any((output / "checkpoint-4").rglob("*.distcp")), "each rank wrote its part"
    # One rank's part of the last checkpoint is damaged.
    pattern = "pytorch_model_fsdp_0/__1_*.distcp" if method == "full" else "rng_state_1.pth"
    (part,) = (output / "checkpoint-4").glob(pattern)
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)
    shutil.rmtree(output / ("model" if method == "full" else "adapter"))
    (tmp_path / "store").unlink(missing_ok=True)
    for rank in range(2):
        Path(f"{tmp_path / 'store'}-{rank}").unlink()
    run_on_two(sft, tmp_path, flags, "checkpoint-2")
    for name, tensor in weights(chat_model, output, method).items():
        assert torch.equal(tensor, first[name]), name
    assert (output / "damaged-checkpoint-4" / pattern.partition("/")[0]).exists(), "kept"
    files = check_manifest(output / "checkpoint-4")["files"]
    assert {"rng_state_0.pth", "rng_state_1.pth", "pytorch_model_fsdp_0/.metadata"} <= files.keys(), "of both ranks"


def weights(base: Path, output: Path, method: str) -> dict[str, torch.Tensor]:
    """Of the result, as one process loads it; it differs from the base and has a card and a tokenizer."""
    original = GrinMoeForCausalLM.from_pretrained(base, dtype=torch.float32)
    reference = {name: tensor.clone() for name, tensor in original.state_dict().items()}
    if method == "full":
        folder = output / "model"
        model = GrinMoeForCausalLM.from_pretrained(folder, dtype=torch.float32)
        assert "AutoModelForCausalLM" in json.loads((folder / "config.json").read_text())["auto_map"]
    else:
        folder = output / "adapter"
        model = load_adapter(original, folder).merge_and_unload()
    assert {"card.json", "tokenizer.json"} <= {path.name for path in folder.iterdir()}
    found = model.state_dict()
    experts = "model.layers.1.block_sparse_moe.experts.down_proj"
    assert (found[experts] - reference[experts]).abs().max() > 1e-4
    return found
