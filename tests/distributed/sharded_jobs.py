"""The jobs of test_fsdp2.py: what two ranks, and one, do with FSDP2. They leave what they saw in a folder."""

from __future__ import annotations

import gc
import time
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from grinmoe.distributed import sharding
from grinmoe.distributed.sharding import load_for_sharding
from tests.distributed.fsdp_on_cpu import Gradients, fsdp_on_cpu, greedy_routing, rows, trainer_for, whole
from tests.tiny import tiny_model

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def model(**overrides):
    options = {
        "router_aux_loss_coef": 0.5,
        "router_aux_loss_scope": "global",
        "input_jitter_noise": 0.0,
        "pad_token_id": 95,
    }
    return tiny_model(**{**options, **overrides})


def with_adapter(seed: int):
    """LoRA on attention and router; on ranks other than 0 without memory, as after load_for_sharding."""
    with torch.device("meta" if dist.is_initialized() and dist.get_rank() else "cpu"):
        base = model().to(torch.bfloat16)
    torch.manual_seed(seed)
    adapter = LoraConfig(
        r=4, target_modules=["q_proj", "o_proj"], target_parameters=["gate.weight"], init_lora_weights=False
    )
    return get_peft_model(base, adapter)


def logged_losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


class States(TrainerCallback):
    """Writes weights and optimizer state, whole: at step 2, and what a resumed training begins with."""

    def __init__(self, folder: Path):
        self.folder = folder

    def _write(self, name: str, model, optimizer) -> None:
        state = {
            "model": get_model_state_dict(model, options=WHOLE),
            "optimizer": get_optimizer_state_dict(model, optimizer, options=WHOLE),
        }
        if dist.get_rank() == 0:
            torch.save(state, self.folder / name)

    def on_save(self, args, state, control, model=None, optimizer=None, **kwargs):
        if state.global_step == 2:
            self._write("saved.pt", model, optimizer)

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        if state.global_step:
            self._write("resumed.pt", model, optimizer)


def train_and_save(start: Path, folder: Path, batch: int, resume: Path | None = None, callbacks=()) -> None:
    """Four steps from the model at `start`, a checkpoint at the second; or what is left of them after `resume`."""
    folder.mkdir(exist_ok=True)
    trained = load_for_sharding(start)
    assert next(trained.parameters()).is_meta == (dist.get_rank() != 0), "one rank reads the weights"
    gradients = Gradients()
    trainer = trainer_for(
        trained, folder, batch, [gradients, States(folder), *callbacks], save_strategy="steps", save_steps=2
    )
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    result = {
        "losses": logged_losses(trainer),
        "gradients": gradients.first,
        "steps": trainer.state.global_step,
        "weights": get_model_state_dict(trainer.model, options=WHOLE),
        "kinds": {name: type(parameter) is DTensor for name, parameter in trainer.model.named_parameters()},
        "local": {name: tuple(p.to_local().shape) for name, p in trainer.model.named_parameters()},
        "evaluation": trainer.evaluate(rows(4)),
    }
    trainer.model.save_pretrained(folder / "full", is_main_process=dist.get_rank() == 0)
    if dist.get_rank() == 0:
        torch.save(result, folder / "result.pt")


def best_at_the_end(folder: Path) -> None:
    """Evaluated and saved at every step, and every step is better than the one before."""
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    trainer = trainer_for(model(), folder / "best", 2, load_best_model_at_end=True, learning_rate=1e-3, **options)
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    result = {"losses": losses, "best": trainer.state.best_model_checkpoint, "end": trainer.evaluate()["eval_loss"]}
    if dist.get_rank() == 0:
        torch.save(result, folder / "best.pt")


def mixed_precision(folder: Path) -> None:
    """bfloat16 with and without checkpointing: dtypes inside, gradients, and a loss that is not rounded."""
    results = []
    for checkpointing in (False, True):
        seen: dict[str, list[torch.dtype]] = {}
        trained = model(hidden_dropout=0.1)
        block = trained.model.layers[0].block_sparse_moe
        for name, module in {"router": block.gate, "attention": trained.model.layers[0].self_attn.q_proj}.items():
            module.register_forward_hook(remember(seen, name))
        block.experts.register_forward_hook(remember(seen, "experts"))
        gradients = Gradients()
        options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
        trainer = trainer_for(
            trained, folder / "bf16", 2, [gradients], bf16=True, max_steps=1, **(options if checkpointing else {})
        )
        # After FSDP's own hooks: what the Trainer gets.
        trainer.model.register_forward_hook(
            lambda module, inputs, output, seen=seen: seen.update(loss=output.loss.dtype)
        )
        trainer.train()
        masters = {parameter.dtype for parameter in trainer.model.parameters()}
        results.append(
            {"seen": seen, "gradients": gradients.first, "losses": logged_losses(trainer), "masters": masters}
        )
    if dist.get_rank() == 0:
        torch.save(results, folder / "bf16.pt")


def remember(seen: dict, name: str):
    def hook(module, inputs, output):
        result = output[0] if isinstance(output, tuple) else output
        weight = module.down_proj if name == "experts" else module.weight
        seen[name] = [weight.dtype, inputs[0].dtype, result.dtype]

    return hook


def exact_adapters(folder: Path) -> None:
    """The same in float32, to compare gradients."""
    gradients = Gradients()
    trainer_for(with_adapter(1).float(), folder / "lora-exact", 2, [gradients], max_steps=1).train()
    if dist.get_rank() == 0:
        torch.save(gradients.first, folder / "lora-gradients.pt")


def adapters(folder: Path) -> None:
    """LoRA on attention and router, in bfloat16: dtypes, and a resumed training that ends like the straight one."""
    options = {"bf16": True, "save_strategy": "steps", "save_steps": 2}
    trainer = trainer_for(with_adapter(1), folder / "lora", 2, **options)
    trainer.train()
    again = trainer_for(with_adapter(2), folder / "lora-again", 2, **options)
    again.train(resume_from_checkpoint=str(folder / "lora" / "checkpoint-2"))
    result = {
        "losses": logged_losses(trainer),
        "again": logged_losses(again),
        "trained": {p.dtype for p in trainer.model.parameters() if p.requires_grad},
        "frozen": {p.dtype for p in trainer.model.parameters() if not p.requires_grad},
        "sharded": all(isinstance(p, DTensor) for p in trainer.model.parameters()),
        "weights": trained_weights(trainer.model),
        "weights again": trained_weights(again.model),
    }
    if dist.get_rank() == 0:
        torch.save(result, folder / "lora.pt")


def trained_weights(trained) -> dict[str, torch.Tensor]:
    return {name: whole(p.detach()) for name, p in trained.named_parameters() if p.requires_grad}


def hybrid(folder: Path) -> None:
    """Replicated over both ranks, on the two-dimensional mesh that hybrid sharding has; rank 1 begins without weights."""
    with torch.device("cpu" if dist.get_rank() == 0 else "meta"):
        trained = model()
    whole_weights: list[int] = []

    def observed(module, **options):
        whole_weights.append(elements_of_whole_weights())
        return fully_shard(module, **options)

    with mock.patch.object(sharding, "fully_shard", observed):
        mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
        sharding.shard_model(trained, mesh, param_dtype=None, from_rank_0=True)
    batch = torch.stack([row["input_ids"] for row in rows(4)])[2 * dist.get_rank() :][:2]
    trained.train()(input_ids=batch, labels=batch).loss.backward()
    gradients = {name: whole(parameter.grad) for name, parameter in trained.named_parameters()}
    if dist.get_rank() == 1:
        layer = sum(parameter.numel() for parameter in trained.model.layers[0].parameters())
        torch.save({"gradients": gradients, "whole": whole_weights, "layer": layer}, folder / "hybrid.pt")


def elements_of_whole_weights() -> int:
    """Of all parameters that are in memory and not sharded."""
    gc.collect()
    weights = [one for one in gc.get_objects() if type(one) is torch.nn.Parameter and not one.is_meta]
    return sum(weight.numel() for weight in weights)


def two_ranks(rank: int, folder: str) -> None:
    here = Path(folder)
    with greedy_routing():
        with fsdp_on_cpu():
            train_and_save(here / "start", here / "two", 2)
        signal(here / "two.done")
        with fsdp_on_cpu():
            best_at_the_end(here)
        with fsdp_on_cpu():
            mixed_precision(here)
        with fsdp_on_cpu():
            exact_adapters(here)
        with fsdp_on_cpu():
            adapters(here)
        hybrid(here)
        wait_for(here / "one.done")
        with fsdp_on_cpu():
            train_and_save(here / "start", here / "two-of-one", 2, resume=here / "one" / "checkpoint-2")


def one_rank(folder: str) -> None:
    torch.set_num_threads(1)
    here = Path(folder)
    dist.init_process_group("gloo", init_method=f"file://{here / 'store-of-one'}", rank=0, world_size=1)
    with greedy_routing():
        with fsdp_on_cpu():
            train_and_save(here / "start", here / "one", 4)
        signal(here / "one.done")
        wait_for(here / "two.done")
        with fsdp_on_cpu():
            train_and_save(here / "start", here / "one-of-two", 4, resume=here / "two" / "checkpoint-2")


def signal(file: Path) -> None:
    dist.barrier()
    file.touch()


def wait_for(file: Path) -> None:
    deadline = time.monotonic() + 600
    while not file.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{file.name} did not come")
        time.sleep(0.05)
