"""FSDP2 for GRIN-MoE: what is sharded how, and the way there through the Trainer and Accelerate.

    accelerate launch --config_file recipes/accelerate/fsdp2_8xh100_full.yaml train.py

    arguments = TrainingArguments(...)  # first: it starts the process group
    model = load_for_sharding("GRIN-MoE")
    trainer = Trainer(model, arguments, train_dataset=dataset)
    shard_for(trainer)
    trainer.train()

Accelerate alone would compute the router in bfloat16, reduce gradients and return the loss in bfloat16, and pad the
experts where there are more ranks than experts. `shard_model` wraps the model itself, with torch's public `fully_shard`;
Accelerate leaves a model that is sharded already as it is. docs/sharding.md says why, and which recipe is for what.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from transformers import AutoModelForCausalLM, TrainerCallback
from transformers.integrations import is_fsdp_enabled
from transformers.trainer import TRAINER_STATE_NAME

from ..configuration_grinmoe import GrinMoeConfig
from ..modeling_grinmoe import GrinMoeForCausalLM

LAYER = "GrinMoeDecoderLayer"
"""Class name of what is gathered and freed as one. By name: remote code and this package have different classes."""


def check_gpus(num_processes: int, num_machines: int = 1) -> None:
    """
    Refuse a launch for more GPUs than there are; call it before weights are loaded.

    Args:
        num_processes: of the whole job, one for each GPU.
        num_machines: that share them evenly.

    Raises:
        ValueError: the numbers do not divide, or this machine has fewer GPUs than its share.
    """
    if num_machines < 1 or num_processes < 1 or num_processes % num_machines:
        raise ValueError(
            f"num_processes={num_processes} is no whole share for each of num_machines={num_machines}; give one process "
            "for each GPU of all machines"
        )
    share, available = num_processes // num_machines, torch.cuda.device_count()
    if share > available:
        remedy = (
            f"pass --num_processes {available * num_machines} to accelerate launch, or choose a recipe for fewer GPUs"
            if available
            else "check the driver (nvidia-smi) and CUDA_VISIBLE_DEVICES"
        )
        raise ValueError(
            f"this needs {share} GPUs on each machine (num_processes={num_processes}, num_machines={num_machines}), and "
            f"{available} are visible here; {remedy}"
        )


def check_launch(config_file: str | os.PathLike) -> None:
    """`check_gpus` for an `accelerate launch` configuration (YAML). Raises ValueError."""
    content = yaml.safe_load(Path(config_file).read_text(encoding="utf-8"))
    if not isinstance(content, dict) or "num_processes" not in content:
        raise ValueError(f"{config_file} names no num_processes: not a configuration for accelerate launch")
    check_gpus(int(content["num_processes"]), int(content.get("num_machines", 1)))


def shard_model(
    model: nn.Module,
    mesh: DeviceMesh,
    *,
    param_dtype: torch.dtype | None = torch.bfloat16,
    reshard_after_forward: bool = True,
    offload_policy: OffloadPolicy | None = None,
    from_rank_0: bool = False,
) -> nn.Module:
    """
    Shard a GRIN-MoE model, or a PEFT model of one, in place with FSDP2; collective.

    Each layer, the embedding and the head are gathered for themselves; what is left (the last norm, a classification
    head) at the root. Each router is a group of its own that computes in float32. Gradients are reduced in float32. With
    a `param_dtype` trainable weights become float32 masters, whatever they were loaded in.

    Args:
        model: on any device; on ranks other than 0 its weights may be on the meta device if `from_rank_0`.
        mesh: 1-D to shard over, or 2-D (replicate, shard) for hybrid sharding.
        param_dtype: what everything but the routers computes in; None: as it is stored.
        reshard_after_forward: free a layer's gathered weights after its forward and gather them again for the backward.
        offload_policy: `CPUOffloadPolicy()` keeps shards, gradients and the optimizer's step on the host.
        from_rank_0: send rank 0's weights to all, one at a time; otherwise each rank's own are taken, which must be equal.

    Raises:
        ValueError: nothing to shard, sharded already, quantised weights, or a weight that leaves a rank without a part.
    """
    layers = [module for module in model.modules() if type(module).__name__ == LAYER]
    if isinstance(model, FSDPModule):
        raise ValueError("the model is sharded already; shard it once, before training")
    if not layers:
        raise ValueError(f"{type(model).__name__} has no {LAYER}: only GRIN-MoE models are sharded here")
    ranks = mesh.size(mesh.ndim - 1)
    _check_weights(model, ranks)
    if from_rank_0:
        _check_alike(model)
    options: dict[str, Any] = {
        "mesh": mesh,
        "shard_placement_fn": lambda parameter: placement(parameter, ranks),
        "offload_policy": offload_policy or OffloadPolicy(),
    }
    device = torch.device(mesh.device_type)
    for module, reshard, is_router in _groups(model, layers, reshard_after_forward):
        policy = MixedPrecisionPolicy(torch.float32 if is_router else param_dtype, reduce_dtype=torch.float32)
        # Group by group, so that no device ever holds the whole model.
        _move_weights(module, device, None if param_dtype is None else torch.float32, from_rank_0)
        fully_shard(module, reshard_after_forward=reshard, mp_policy=policy, **options)
    _move_buffers(model, device, from_rank_0)
    return model


def _groups(model: Any, layers: list[nn.Module], reshard: bool) -> Iterator[tuple[nn.Module, bool | None, bool]]:
    """What is gathered as one, inner modules first; whether it is freed after its forward; whether it is a router."""
    for layer in layers:
        # So small that it stays for the backward: gathering it again would cost more than its memory.
        yield layer.get_submodule("block_sparse_moe.gate"), False, True
        yield layer, reshard, False
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    # Tied weights must be in one group, and the root is one.
    if head is None or head.weight is not embedding.weight:
        yield embedding, reshard, False
        if head is not None:
            yield head, False, False  # its backward follows its forward at once
    yield model, None, False


def placement(parameter: torch.Tensor, ranks: int) -> Shard:
    """
    The dimension to shard over: the first that the ranks divide.

    16 experts over 64 ranks would be padded to 64 on dimension 0, four times the traffic; on dimension 1 every rank
    holds a part of every expert. torch shards dimensions other than the first only if they divide.
    """
    for dimension, size in enumerate(parameter.shape):
        if size % ranks == 0:
            return Shard(dimension)
    return Shard(0)


def _check_weights(model: nn.Module, ranks: int) -> None:
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            raise ValueError(
                f"{name} is quantised ({parameter.dtype}), which FSDP2 cannot gather; train quantised models on one GPU, or "
                "load the model in bfloat16 for LoRA"
            )
        if parameter.dim() == 0:
            raise ValueError(f"{name} is a scalar, which FSDP2 does not shard; give it the shape (1,)")
        # Accelerate tells a rank's parameters apart by where their shards lie, and an empty shard lies nowhere.
        if placement(parameter, ranks).dim == 0 and -(-parameter.shape[0] // ranks) * (ranks - 1) >= parameter.shape[0]:
            raise ValueError(
                f"{name} {tuple(parameter.shape)} does not spread over {ranks} ranks: one would hold nothing of it; shard "
                "over a number of ranks that divides one of its dimensions, a power of two"
            )


def _check_alike(model: nn.Module) -> None:
    mine = [(name, tuple(p.shape), str(p.dtype), p.requires_grad) for name, p in model.named_parameters()]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    for rank, other in enumerate(everyone):
        if other != everyone[0]:
            first = next((pair for pair in zip(everyone[0], other, strict=False) if pair[0] != pair[1]), "their number")
            raise ValueError(
                f"rank {rank} has built another model than rank 0, whose weights it is to get: {first} differ; load it in "
                "the same way on all ranks (load_for_sharding)"
            )


def _move_weights(module: nn.Module, device: torch.device, master: torch.dtype | None, from_rank_0: bool) -> None:
    """Put the weights that are not sharded yet on the device: rank 0's or the own, trainable ones in `master`."""
    moved: dict[nn.Parameter, nn.Parameter] = {}  # of this group only: what is in here is not freed
    for owner in module.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            if isinstance(parameter, DTensor):
                continue
            if parameter not in moved:
                dtype = master if master is not None and parameter.requires_grad else parameter.dtype
                if from_rank_0 and dist.get_rank() != 0:
                    value = torch.empty(parameter.shape, dtype=dtype, device=device)
                else:
                    value = parameter.detach().to(device, dtype)
                if from_rank_0:
                    dist.broadcast(value, src=0)
                moved[parameter] = nn.Parameter(value, requires_grad=parameter.requires_grad)
            setattr(owner, name, moved[parameter])  # one and the same for tied weights


def _move_buffers(model: nn.Module, device: torch.device, from_rank_0: bool) -> None:
    for owner in model.modules():
        for name, buffer in owner.named_buffers(recurse=False):
            if from_rank_0 and dist.get_rank() != 0:
                value = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)
            else:
                value = buffer.to(device)
            if from_rank_0:
                dist.broadcast(value, src=0)
            setattr(owner, name, value)


def load_for_sharding(source: str | os.PathLike, **kwargs: Any) -> GrinMoeForCausalLM:
    """
    `GrinMoeForCausalLM.from_pretrained`, which only rank 0 does; the others build the model without memory.

    So where the launch configuration says `fsdp_cpu_ram_efficient_loading: true` and the process group has been started
    (the TrainingArguments do it); elsewhere all ranks load. Transformers by itself lets all ranks load the whole model
    under that setting: 8 times 78 GiB of host memory.

    Args:
        source: folder or Hub id.
        kwargs: of from_pretrained. Of them config, revision, dtype, attn_implementation and experts_implementation count
            on the other ranks; quantised models are loaded by all ranks, and `shard_model` refuses them.
    """
    if not is_fsdp_enabled() or dist.get_rank() == 0 or kwargs.get("quantization_config") is not None:
        return GrinMoeForCausalLM.from_pretrained(source, **kwargs)
    config = kwargs.get("config") or GrinMoeConfig.from_pretrained(source, revision=kwargs.get("revision") or "main")
    options = {name: kwargs[name] for name in ("attn_implementation", "experts_implementation") if name in kwargs}
    dtype = kwargs.get("dtype", "auto")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=config.dtype if dtype == "auto" else dtype, **options)
    return model.eval()  # as from_pretrained leaves it


def shard_for(trainer: Any) -> None:
    """
    Shard a Trainer's model by the settings of the launch configuration; call it once, before `trainer.train()`.

    What the Accelerate configuration says is done: mixed precision, offloading, hybrid sharding
    (`parallelism_config`), `fsdp_reshard_after_forward`, `fsdp_cpu_ram_efficient_loading`. Without FSDP in it nothing
    happens. Works for the Trainer and those of TRL. A callback completes the checkpoints: the model's config beside the
    sharded weights, and the best checkpoint, of which the Trainer overlooks the newest.

    Raises:
        ValueError: FSDP was asked for and Accelerate does not use it (on a CPU it does not, without a word), FSDP1, FSDP's
            own activation checkpointing, an optimizer of bitsandbytes, or one that holds the weights already.
    """
    state = trainer.accelerator.state
    plugin = getattr(state, "fsdp_plugin", None)
    if plugin is None:
        if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true" or getattr(trainer.args, "fsdp", None):
            raise ValueError(
                f"FSDP was asked for, and Accelerate runs {state.distributed_type.value} instead on "
                f"{trainer.accelerator.num_processes} processes ({trainer.accelerator.device.type}); FSDP2 needs GPUs and a "
                "launcher (accelerate launch, torchrun, also for one GPU): launch it there, or without an FSDP configuration"
            )
        return
    _check_settings(trainer, plugin)
    policy = plugin.mixed_precision_policy
    trainer.model_wrapped = trainer.model = shard_model(
        trainer.model,
        _mesh(trainer.accelerator),
        param_dtype=None if policy is None else policy.param_dtype,
        reshard_after_forward=plugin.reshard_after_forward,
        offload_policy=plugin.cpu_offload,
        from_rank_0=plugin.cpu_ram_efficient_loading,
    )
    check_sharded(trainer.model)
    # Nothing is left to wrap, and Accelerate would look for the layers by their old class.
    plugin.auto_wrap_policy = None
    trainer.add_callback(CompleteShardedCheckpoints())


def _check_settings(trainer: Any, plugin: Any) -> None:
    if plugin.fsdp_version != 2:
        raise ValueError(f"fsdp_version={plugin.fsdp_version}; set fsdp_version: 2, as in recipes/accelerate/")
    if plugin.activation_checkpointing:
        raise ValueError(
            "fsdp_activation_checkpointing: true recomputes dropout with other draws than the forward's and renames the "
            "layers; set it to false and gradient_checkpointing=True in the training arguments"
        )
    optimizer_class, _ = trainer.get_optimizer_cls_and_kwargs(trainer.args, trainer.model)
    if optimizer_class.__module__.startswith("bitsandbytes"):
        raise ValueError(
            f"optim={trainer.args.optim}: the optimizers of bitsandbytes do not know sharded weights; choose "
            "adamw_torch_8bit (needs torchao) or adamw_torch_fused"
        )
    if trainer.optimizer is not None:
        raise ValueError(
            "the Trainer has an optimizer already, which holds the unsharded weights; call shard_for before train"
        )


def _mesh(accelerator: Any) -> DeviceMesh:
    mesh = accelerator.torch_device_mesh
    if mesh is None:
        return init_device_mesh(accelerator.device.type, (accelerator.num_processes,), mesh_dim_names=("shard",))
    return mesh[tuple(accelerator.parallelism_config.fsdp_dim_names)]


def check_sharded(model: nn.Module) -> None:
    """
    Raise ValueError unless every weight is sharded: after `trainer.train()` has begun, or after `shard_for`.

    Data parallelism that was meant to be sharded trains well and needs as much memory as one GPU.
    """
    whole = [name for name, parameter in model.named_parameters() if not isinstance(parameter, DTensor)]
    if whole:
        raise ValueError(
            f"{len(whole)} weights are not sharded, {whole[0]} first: every rank holds all of them. Launch with an FSDP2 "
            "configuration (recipes/accelerate/) on GPUs, and call shard_for(trainer) before trainer.train()"
        )


class CompleteShardedCheckpoints(TrainerCallback):
    """Adds what sharded checkpoints of the Trainer lack: the config to export them with, and which is the best."""

    def on_save(self, args, state, control, model=None, **kwargs):
        folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
        if state.best_global_step == state.global_step:
            # The Trainer looks for the folder before sharded weights are written to it, and keeps an older one.
            state.best_model_checkpoint = str(folder)
        if state.is_world_process_zero:
            model.config.save_pretrained(folder)
            if hasattr(model, "peft_config"):
                model.peft_config[model.active_adapter].save_pretrained(folder)
            state.save_to_json(str(folder / TRAINER_STATE_NAME))
