"""What a sharded launch is checked for: the recipes, the launch scripts, and settings that would train wrongly."""

from __future__ import annotations

import os
import shlex
import subprocess
from unittest import mock

import pytest
import torch
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin, ParallelismConfig
from accelerate.utils.launch import prepare_multi_gpu_env
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.distributed.fsdp.fully_sharded_data_parallel import StateDictType

from grinmoe import GrinMoeForCausalLM
from grinmoe.distributed import write_manifest
from grinmoe.distributed.__main__ import main
from grinmoe.distributed.sharding import check_gpus, check_launch, check_sharded, placement, shard_for, shard_model
from tests import ROOT
from tests.distributed.fsdp_on_cpu import trainer_for
from tests.distributed.sharded_jobs import model

RECIPES = sorted((ROOT / "recipes" / "accelerate").glob("*.yaml"))


def test_experts_are_cut_through_where_there_are_more_ranks_than_experts():
    experts = torch.empty(16, 12800, 4096, device="meta")
    assert placement(experts, 8).dim == placement(experts, 16).dim == 0
    assert placement(experts, 64).dim == 1
    assert placement(torch.empty(16, 4096, device="meta"), 64).dim == 1, "the router"
    assert placement(torch.empty(5, 3, device="meta"), 2).dim == 0, "what no number divides is padded"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_accelerate_reads_the_recipes_as_they_are_meant(recipe):
    arguments = launch_command_parser().parse_args(["--config_file", str(recipe), "train.py"])
    arguments, _, _ = _validate_launch_command(arguments)
    machines = 2 if "2x8" in recipe.stem else 1
    assert (arguments.num_processes, arguments.num_machines) == (8 * machines, machines)
    environment = prepare_multi_gpu_env(arguments)
    assert environment["ACCELERATE_MIXED_PRECISION"] == "bf16"
    with mock.patch.dict(os.environ, environment):
        plugin, parallel = FullyShardedDataParallelPlugin(), ParallelismConfig()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True and plugin.cpu_ram_efficient_loading
    assert plugin.state_dict_type == StateDictType.SHARDED_STATE_DICT
    assert plugin.transformer_cls_names_to_wrap == ["GrinMoeDecoderLayer"]
    assert isinstance(plugin.cpu_offload, CPUOffloadPolicy) == ("offload" in recipe.stem)
    assert not plugin.activation_checkpointing, "the model's own repeats the draws of dropout"
    expected = (2, 8) if machines == 2 else (1, 1)
    assert (parallel.dp_replicate_size, parallel.dp_shard_size) == expected


def test_there_is_a_recipe_for_each_way():
    names = ["fsdp2_2x8xh100_full", "fsdp2_8xh100_full", "fsdp2_8xh100_lora", "fsdp2_8xh100_offload"]
    assert [recipe.stem for recipe in RECIPES] == names


def test_a_recipe_for_more_gpus_than_there_are_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check_gpus(2)
    check_gpus(4, num_machines=2)
    with pytest.raises(
        ValueError, match=r"needs 8 GPUs on each machine .*, and 2 are visible here; .*--num_processes 2 "
    ):
        check_launch(ROOT / "recipes" / "accelerate" / "fsdp2_8xh100_full.yaml")
    with pytest.raises(ValueError, match="needs 8 GPUs on each machine .*--num_processes 4 "):
        check_launch(ROOT / "recipes" / "accelerate" / "fsdp2_2x8xh100_full.yaml")
    with pytest.raises(ValueError, match="no whole share"):
        check_gpus(3, num_machines=2)
    (tmp_path / "other.yaml").write_text(yaml.safe_dump({"learning_rate": 1}))
    with pytest.raises(ValueError, match="names no num_processes"):
        check_launch(tmp_path / "other.yaml")


def test_the_check_of_gpus_runs_before_a_launch(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(SystemExit) as stopped:
        main(["check", str(ROOT / "recipes" / "accelerate" / "fsdp2_8xh100_lora.yaml")])
    assert stopped.value.code == 1
    assert "error: this needs 8 GPUs" in (said := capsys.readouterr().err) and "check the driver" in said


def test_an_export_of_a_damaged_checkpoint_is_refused(tmp_path, capsys):
    folder = tmp_path / "checkpoint-2"
    (folder / "pytorch_model_fsdp_0").mkdir(parents=True)
    (part := folder / "pytorch_model_fsdp_0" / "__0_0.distcp").write_bytes(b"12")
    write_manifest(folder)
    part.write_bytes(b"13")
    with pytest.raises(SystemExit) as stopped:
        main(["export", "--checkpoint", str(folder), "--output", str(tmp_path / "model")])
    assert stopped.value.code == 1 and "__0_0.distcp has another SHA-256" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()


def run_script(name: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = ["bash", f"scripts/{name}", *arguments]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)


SCRIPTS = {  # with the words that choose the launch configuration, and the one they choose
    "finetune_8xh100.sh": (["lora"], "fsdp2_8xh100_lora"),
    "finetune_2x8xh100.slurm": ([], "fsdp2_2x8xh100_full"),
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_launch_scripts_say_what_they_would_start(script, tmp_path):
    (recipe := tmp_path / "my recipe.yaml").touch()
    words, configuration = SCRIPTS[script]
    done = run_script(script, "--dry-run", *words, "dpo", str(recipe), "--learning_rate", "1e-5")
    assert done.returncode == 0, done.stderr
    command = shlex.split(done.stdout)
    assert command[-5:] == ["dpo", "--config", str(recipe), "--learning_rate", "1e-5"]
    assert f"recipes/accelerate/{configuration}.yaml" in command
    assert ("srun" in command) == script.endswith("slurm") and "accelerate launch --config_file" in " ".join(command)


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_launch_scripts_refuse_what_cannot_start(script):
    words, _ = SCRIPTS[script]
    for arguments, message in {
        (): "error: usage: scripts/finetune",
        (*words, "sft", "none.yaml"): "error: there is no recipe none.yaml; choose one of: recipes/",
    }.items():
        done = run_script(script, *arguments)
        assert done.returncode == 1 and message in done.stderr
    assert (
        "no recipes/accelerate/fsdp2_8xh100_x.yaml; choose full"
        in run_script("finetune_8xh100.sh", *"x sft y".split()).stderr
    )
    assert "there is no task chat; choose sft" in run_script("finetune_8xh100.sh", *"full chat y".split()).stderr


def test_the_machine_is_asked_for_its_gpus_before_anything_is_launched(tmp_path):
    """With `python` and `accelerate` that only say that they were called, the first failing."""
    for name, code in {"python": 3, "accelerate": 0}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\necho called {name} $@\nexit {code}\n")
        (tmp_path / name).chmod(0o755)
    (recipe := tmp_path / "recipe.yaml").touch()
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = run_script("finetune_8xh100.sh", "full", "sft", str(recipe), PATH=path)
    assert done.returncode == 3 and "called accelerate" not in done.stdout
    assert "called python -m grinmoe.distributed check recipes/accelerate/fsdp2_8xh100_full.yaml" in done.stdout


def test_silent_data_parallelism_is_an_error(tmp_path, monkeypatch):
    """Accelerate does not shard on a CPU and does not say so."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="FSDP was asked for, and Accelerate runs NO instead on 1 processes"):
        trainer_for(model(), tmp_path, 2)
    with pytest.raises(ValueError, match="weights are not sharded, model.embed_tokens.weight first"):
        check_sharded(model())


def test_without_an_fsdp_configuration_nothing_happens(tmp_path):
    trainer = trainer_for(model(), tmp_path, 2, sharded=False)
    before = trainer.model
    shard_for(trainer)
    assert trainer.model is before and type(before) is GrinMoeForCausalLM


class Plugin:
    fsdp_version = 2
    activation_checkpointing = False


@pytest.mark.parametrize(
    "setting, message",
    [
        ({"fsdp_version": 1}, "fsdp_version=1; set fsdp_version: 2"),
        ({"activation_checkpointing": True}, "set it to false and gradient_checkpointing=True"),
    ],
)
def test_settings_that_would_train_wrongly_are_refused(tmp_path, setting, message):
    trainer = trainer_for(model(), tmp_path, 2, sharded=False)
    with mock.patch.object(
        trainer.accelerator.state, "fsdp_plugin", create=True, new=type("Other", (Plugin,), setting)
    ):
        with pytest.raises(ValueError, match=message):
            shard_for(trainer)


def test_an_optimizer_that_cannot_step_on_shards_is_refused(tmp_path):
    pytest.importorskip("bitsandbytes")
    trainer = trainer_for(model(), tmp_path, 2, sharded=False, optim="adamw_bnb_8bit")
    with mock.patch.object(trainer.accelerator.state, "fsdp_plugin", create=True, new=Plugin):
        with pytest.raises(
            ValueError, match="optim=.*bitsandbytes do not know sharded weights; choose adamw_torch_8bit"
        ):
            shard_for(trainer)


def test_an_optimizer_that_holds_the_unsharded_weights_is_refused(tmp_path):
    trainer = trainer_for(model(), tmp_path, 2, sharded=False)
    trainer.create_optimizer()
    with mock.patch.object(trainer.accelerator.state, "fsdp_plugin", create=True, new=Plugin):
        with pytest.raises(ValueError, match="holds the unsharded weights; call shard_for before train"):
            shard_for(trainer)


def test_what_cannot_be_sharded_is_refused_before_anything_moves():
    mesh = mock.Mock(ndim=1, **{"size.return_value": 3})
    with pytest.raises(ValueError, match="Linear has no GrinMoeDecoderLayer"):
        shard_model(torch.nn.Linear(2, 2), mesh)
    with pytest.raises(ValueError, match=r"gate.weight \(4, 32\) does not spread over 3 ranks"):
        shard_model(model(), mesh)
    quantised = model()
    experts = quantised.model.layers[0].block_sparse_moe.experts
    experts.down_proj = torch.nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match="down_proj is quantised .*train quantised models on one GPU"):
        shard_model(quantised, mock.Mock(ndim=1, **{"size.return_value": 2}))
