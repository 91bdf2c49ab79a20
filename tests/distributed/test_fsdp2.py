"""FSDP2 through the Trainer and Accelerate on gloo processes: sharded for real, equal to one process, resumed, exported.

All training runs once, in the fixture `jobs`: two ranks and, beside them, one (tests/distributed/sharded_jobs.py).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file

from grinmoe import CheckpointError, CheckpointFileError, GrinMoeForCausalLM
from grinmoe.distributed.__main__ import main
from grinmoe.distributed.sharded_checkpoint import export_sharded, is_sharded, is_whole
from tests import ROOT
from tests.distributed.fsdp_on_cpu import Gradients, greedy_routing, rows, trainer_for
from tests.distributed.sharded_jobs import logged_losses, model, one_rank, two_ranks, with_adapter
from tests.distributed.two_ranks import PROCESSES, run_on_two

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def jobs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("fsdp2")
    model().save_pretrained(folder / "start")
    one = PROCESSES.Process(target=one_rank, args=(str(folder),))
    one.start()
    run_on_two(two_ranks, folder, str(folder))
    one.join(timeout=600)
    assert one.exitcode == 0
    return folder


@pytest.fixture(scope="module")
def unsharded(tmp_path_factory) -> dict:
    """The same training on one process, without FSDP."""
    gradients = Gradients()
    with greedy_routing():
        trainer = trainer_for(model(), tmp_path_factory.mktemp("unsharded"), 4, [gradients], sharded=False)
        trainer.train()
    return {
        "losses": logged_losses(trainer),
        "gradients": gradients.first,
        "weights": {name: parameter.detach() for name, parameter in trainer.model.named_parameters()},
    }


def read(file: Path) -> dict:
    return torch.load(file, weights_only=False)


def assert_close(found: dict, expected: dict, rtol: float = 1e-4, atol: float = 1e-6) -> None:
    assert found.keys() == expected.keys() and found
    for name, tensor in found.items():
        torch.testing.assert_close(
            tensor, expected[name], rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )


def assert_equal_states(found, expected) -> None:
    """Nested dicts of tensors and numbers, to the bit."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert_equal_states(found[key], value)
    elif isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected)
    else:
        assert found == expected


# --- sharded, and equal to one process


def test_every_weight_is_sharded_over_the_ranks(jobs):
    result = read(jobs / "two" / "result.pt")
    assert all(result["kinds"].values()) and len(result["kinds"]) > 30
    experts = "model.layers.0.block_sparse_moe.experts.gate_up_proj"
    assert result["local"][experts] == (2, 48, 32), "half of the four experts"
    one = read(jobs / "one" / "result.pt")["local"]
    assert sum(map(elements, one.values())) == 2 * sum(map(elements, result["local"].values()))


def elements(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


@pytest.mark.parametrize("job", ["one", "two"])
def test_losses_and_all_gradients_are_those_of_one_process(jobs, unsharded, job):
    """On the same global batch; the balance loss counts over all ranks, and only rank 0 has read the weights."""
    result = read(jobs / job / "result.pt")
    assert result["losses"] == pytest.approx(unsharded["losses"], rel=1e-5)
    assert_close(result["gradients"], unsharded["gradients"])
    assert_close(result["weights"], unsharded["weights"], atol=1e-4)


def test_hybrid_sharding_has_the_gradients_of_one_process(jobs, unsharded):
    """Without the Trainer, which divides by all target tokens: a mean over rows of one length is the same."""
    assert_close(read(jobs / "hybrid.pt")["gradients"], gradients_of_a_batch())


def test_no_rank_holds_more_than_one_group_of_whole_weights(jobs):
    """Before each group is sharded, on the rank that began without weights."""
    result = read(jobs / "hybrid.pt")
    assert len(result["whole"]) == 2 * 2 + 3, "routers, layers, embedding, head, root"
    assert 0 < max(result["whole"]) <= result["layer"]


def gradients_of_a_batch() -> dict[str, torch.Tensor]:
    trained = model().train()
    batch = torch.stack([row["input_ids"] for row in rows(4)])
    with greedy_routing():
        trained(input_ids=batch, labels=batch).loss.backward()
    return {name: parameter.grad for name, parameter in trained.named_parameters()}


def test_the_router_computes_in_float32_and_the_rest_in_bfloat16(jobs):
    for result in read(jobs / "bf16.pt"):
        assert result["seen"]["router"] == [torch.float32] * 3, "weight, input, logits"
        assert result["seen"]["attention"] == [torch.bfloat16] * 3
        assert result["seen"]["experts"] == [torch.bfloat16] * 3
        assert result["masters"] == {torch.float32}


def test_the_loss_of_a_bfloat16_training_is_not_rounded_to_bfloat16(jobs):
    assert {result["seen"]["loss"] for result in read(jobs / "bf16.pt")} == {torch.float32}


def test_checkpointing_repeats_the_forward_with_its_dropout(jobs):
    plain, checkpointed = read(jobs / "bf16.pt")
    assert plain["losses"] == checkpointed["losses"]
    assert_equal_states(checkpointed["gradients"], plain["gradients"])


# --- LoRA


def test_lora_shards_frozen_and_trained_weights(jobs, tmp_path):
    """Router, attention; the base in bfloat16 and the adapter's masters in float32, in one group."""
    result = read(jobs / "lora.pt")
    assert result["sharded"]
    assert result["trained"] == {torch.float32} and result["frozen"] == {torch.bfloat16}
    gradients = Gradients()
    with greedy_routing():
        trainer = trainer_for(with_adapter(1).float(), tmp_path, 4, [gradients], sharded=False, max_steps=1)
        trainer.train()
    assert result["losses"][0] == pytest.approx(logged_losses(trainer)[0], rel=3e-3), "bfloat16"
    assert_close(read(jobs / "lora-gradients.pt"), gradients.first)


def test_a_resumed_lora_training_ends_like_the_straight_one(jobs):
    result = read(jobs / "lora.pt")
    assert result["again"] == result["losses"]
    assert_equal_states(result["weights again"], result["weights"])


def test_an_exported_adapter_loads_in_plain_peft(jobs, tmp_path):
    result = read(jobs / "lora.pt")
    export_sharded(jobs / "lora" / "checkpoint-4", tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(model(), tmp_path / "adapter", is_trainable=True)
    trained = {name: p.detach().float() for name, p in loaded.named_parameters() if p.requires_grad}
    assert_equal_states(trained, result["weights"])


# --- checkpoints: other numbers of ranks, export


@pytest.mark.parametrize("saved, resumed", [("two", "one-of-two"), ("one", "two-of-one")])
def test_training_resumes_on_another_number_of_ranks(jobs, saved, resumed):
    """Weights and optimizer to the bit, and it ends where the uninterrupted training does."""
    before, after = read(jobs / saved / "saved.pt"), read(jobs / resumed / "resumed.pt")
    assert_equal_states(after["model"], before["model"])
    assert_equal_states(after["optimizer"], before["optimizer"])
    assert any(state["exp_avg"].abs().max() > 0 for state in after["optimizer"]["state"].values())
    straight, result = read(jobs / saved / "result.pt"), read(jobs / resumed / "result.pt")
    assert result["steps"] == 4
    assert result["losses"][2:] == pytest.approx(straight["losses"][2:], rel=1e-5)
    assert_close(result["weights"], straight["weights"], atol=1e-4)


def test_the_best_model_at_the_end_may_be_the_last(jobs):
    """Transformers looks for its folder too early when weights are sharded, and would load the one before."""
    result = read(jobs / "best.pt")
    assert result["losses"][1] < result["losses"][0]
    assert result["best"] == str(jobs / "best" / "checkpoint-2")
    assert result["end"] == pytest.approx(result["losses"][1])
    state = json.loads((jobs / "best" / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == result["best"]


def test_a_sharded_checkpoint_is_exported_in_the_official_layout(jobs, tmp_path, capsys):
    """By itself, without a process group: as what save_pretrained gathered on the ranks."""
    checkpoint = str(jobs / "two" / "checkpoint-4")
    main(["export", "--checkpoint", checkpoint, "--output", str(tmp_path), "--dtype", "float32"])
    assert "model.layers.1.block_sparse_moe.experts.3.w2.weight" in load_file(tmp_path / "model.safetensors")
    exported, gathered = (GrinMoeForCausalLM.from_pretrained(folder) for folder in (tmp_path, jobs / "two" / "full"))
    assert_equal_states(dict(exported.state_dict()), dict(gathered.state_dict()))
    assert_equal_states(dict(exported.state_dict()), read(jobs / "two" / "result.pt")["weights"])
    assert exported.config.auto_map["AutoModelForCausalLM"] == "modeling_grinmoe.GrinMoeForCausalLM"
    assert exported.config.architectures == ["GrinMoeForCausalLM"]
    assert (tmp_path / "modeling_grinmoe.py").is_file()


def test_the_exported_weights_are_bfloat16_unless_asked_otherwise(jobs, tmp_path):
    export_sharded(jobs / "two" / "checkpoint-4", tmp_path)
    assert {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    assert GrinMoeForCausalLM.from_pretrained(tmp_path).dtype == torch.bfloat16


def copy_of(checkpoint: Path, target: Path) -> Path:
    subprocess.run(["cp", "-r", str(checkpoint), str(target)], check=True)
    return target


@pytest.mark.parametrize("part", ["pytorch_model_fsdp_0/.metadata", "optimizer_0/.metadata", "trainer_state.json"])
def test_a_checkpoint_that_was_not_written_to_its_end_is_known(jobs, tmp_path, part):
    checkpoint = copy_of(jobs / "two" / "checkpoint-4", tmp_path / "checkpoint-4")
    assert is_whole(checkpoint) and is_sharded(checkpoint)
    (checkpoint / part).unlink()
    assert not is_whole(checkpoint) and is_sharded(checkpoint)


def test_export_says_what_is_wrong_with_a_checkpoint_and_leaves_the_output_alone(jobs, tmp_path):
    checkpoint, output = copy_of(jobs / "two" / "checkpoint-4", tmp_path / "checkpoint-4"), tmp_path / "output"
    model().save_pretrained(output)
    before = (output / "model.safetensors").read_bytes()
    model(hidden_size=64).config.save_pretrained(tmp_path / "wider")
    with pytest.raises(
        CheckpointError, match=r"model.embed_tokens.weight is \(96, 32\).* and \(96, 64\) by the config"
    ):
        export_sharded(checkpoint, output, tmp_path / "wider")
    model(num_hidden_layers=3).config.save_pretrained(tmp_path / "deeper")
    with pytest.raises(CheckpointError, match="the sharded weights lack model.layers.2"):
        export_sharded(checkpoint, output, tmp_path / "deeper")
    model(num_hidden_layers=1).config.save_pretrained(tmp_path / "flatter")
    with pytest.raises(CheckpointError, match="the sharded weights hold model.layers.1"):
        export_sharded(checkpoint, output, tmp_path / "flatter")
    (checkpoint / "config.json").unlink()
    with pytest.raises(CheckpointFileError, match="has no config.json; give config="):
        export_sharded(checkpoint, output)
    part = checkpoint / "pytorch_model_fsdp_0" / "__1_0.distcp"
    part.unlink()
    with pytest.raises(CheckpointFileError, match="cannot be read"):
        export_sharded(checkpoint, output, jobs / "start")
    (checkpoint / "pytorch_model_fsdp_0" / ".metadata").unlink()
    with pytest.raises(CheckpointFileError, match="stopped while it saved"):
        export_sharded(checkpoint, output, jobs / "start")
    with pytest.raises(CheckpointFileError, match="holds no sharded weights"):
        export_sharded(output, tmp_path / "other")
    assert (output / "model.safetensors").read_bytes() == before


# --- a killed rank


def launch(start: Path, folder: Path, ranks: int, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += ["-m", "tests.distributed.launched_job", str(start), str(folder), *arguments]
    return subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_a_killed_rank_ends_the_job_and_the_next_launch_goes_on(jobs, tmp_path):
    killed = launch(jobs / "start", tmp_path, 2, "--batch", "2", "--kill-at", "3")
    assert killed.returncode != 0
    assert "SIGKILL" in killed.stderr and "local_rank: 1" in killed.stderr, "which rank, and how"
    assert is_whole(tmp_path / "checkpoint-2") and not (tmp_path / "result.pt").exists()
    again = launch(jobs / "start", tmp_path, 2, "--batch", "2")
    assert again.returncode == 0, again.stderr
    result, straight = read(tmp_path / "result.pt"), read(jobs / "two" / "result.pt")
    assert result["losses"] == straight["losses"]
    assert_equal_states(result["weights"], straight["weights"])


@pytest.mark.slow
def test_four_ranks_train_in_two_replicas_of_two_shards(jobs, tmp_path):
    """pytest -m slow tests/distributed/test_fsdp2.py: as recipes/accelerate/fsdp2_2x8xh100_full.yaml, through Accelerate."""
    settings = {"DP_REPLICATE_SIZE": "2", "DP_SHARD_SIZE": "2"}
    environment = {f"PARALLELISM_CONFIG_{name}": value for name, value in settings.items()}
    done = launch(jobs / "start", tmp_path, 4, "--batch", "1", ACCELERATE_USE_PARALLELISM_CONFIG="true", **environment)
    assert done.returncode == 0, done.stderr
    result, straight = read(tmp_path / "result.pt"), read(jobs / "two" / "result.pt")
    assert result["local"] == straight["local"], "sharded over two of the four"
    assert_close(result["weights"], straight["weights"], atol=1e-4)
