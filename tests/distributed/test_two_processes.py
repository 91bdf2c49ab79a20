"""Two gloo processes: FSDP2 saving and loading, tensor and expert parallel forwards, draws, and the global balance loss."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers.distributed import DistributedConfig

from grinmoe import GrinMoeForCausalLM
from grinmoe.balance_grinmoe import load_balancing_loss
from grinmoe.routing_grinmoe import RoutingNoise, draw_routing_noise
from tests.distributed.two_ranks import WORLD, run_on_two
from tests.tiny import tiny_model

pytestmark = pytest.mark.integration


def fsdp_save(rank: int, folder: str, gathered_by_caller: bool) -> None:
    model = tiny_model(router_aux_loss_coef=0.1)
    mesh = init_device_mesh("cpu", (WORLD,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    ids = torch.arange(16).view(2, 8) + rank
    output = model.train()(input_ids=ids, labels=ids)
    assert output.aux_loss is not None
    output.loss.backward()
    assert model.model.layers[0].block_sparse_moe.experts.down_proj.grad is not None
    state = None
    if gathered_by_caller:
        state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    model.save_pretrained(folder, is_main_process=rank == 0, state_dict=state, max_shard_size="20KB")


@pytest.mark.parametrize("gathered_by_caller", [True, False])
def test_fsdp2_saves_a_checkpoint_that_loads(tmp_path, gathered_by_caller):
    """Official keys, our code and our auto_map: not those of the class that FSDP2 made."""
    folder = tmp_path / "model"
    run_on_two(fsdp_save, tmp_path, str(folder), gathered_by_caller)
    expected = tiny_model().state_dict()
    again = GrinMoeForCausalLM.from_pretrained(folder)
    assert all(torch.equal(expected[name], tensor) for name, tensor in again.state_dict().items())
    keys = [key for shard in folder.glob("model-*.safetensors") for key in load_file(shard)]
    assert "model.layers.1.block_sparse_moe.experts.3.w2.weight" in keys
    assert again.config.architectures == ["GrinMoeForCausalLM"]
    assert again.config.auto_map["AutoModelForCausalLM"] == "modeling_grinmoe.GrinMoeForCausalLM"
    assert {file.name for file in folder.glob("*.py")} == {f.name for f in Path(folder).glob("*_grinmoe.py")}


def parallel_forward(rank: int, folder: str, options: dict, experts: str, expected_file: str) -> None:
    expected = load_file(expected_file)
    model = GrinMoeForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        distributed_config=DistributedConfig(**options),
        experts_implementation=experts,
    ).eval()
    ids = torch.arange(24).view(2, 12)
    output = model(input_ids=ids, labels=ids)
    torch.testing.assert_close(output.logits, expected["logits"], atol=1e-4, rtol=0)
    output.loss.backward()
    gradient = model.model.layers[0].block_sparse_moe.gate.weight.grad
    gradient = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
    torch.testing.assert_close(gradient, expected["gate_gradient"], atol=1e-4, rtol=1e-3)


# Its name before Transformers had ep_size.
EXPERT_PARALLEL = (
    {"ep_size": 2} if "ep_size" in DistributedConfig.__dataclass_fields__ else {"enable_expert_parallel": True}
)


@pytest.mark.parametrize("experts", ["grouped_mm", "grinmoe_cpu", "grinmoe_triton"])
@pytest.mark.parametrize("options", [{"tp_size": 2}, {"tp_size": 2, **EXPERT_PARALLEL}], ids=["tensor", "expert"])
def test_parallel_plans_give_the_same_model(tmp_path, options, experts):
    # With what the released model has not: attention's width is not the model's, norms have no bias.
    others = {"head_dim": 24, "norm_type": "rms_norm"} if experts == "grinmoe_cpu" else {}
    model = tiny_model(**others).eval()
    model.save_pretrained(tmp_path / "model")
    ids = torch.arange(24).view(2, 12)
    output = model(input_ids=ids, labels=ids)
    output.loss.backward()
    gradient = model.model.layers[0].block_sparse_moe.gate.weight.grad
    save_file({"logits": output.logits.detach(), "gate_gradient": gradient}, tmp_path / "expected.safetensors")
    run_on_two(
        parallel_forward, tmp_path, str(tmp_path / "model"), options, experts, str(tmp_path / "expected.safetensors")
    )


def uneven_routing() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(12, 4, generator=generator)
    # Each half of the batch, that is each rank, loads experts of its own.
    logits[:6] += torch.tensor([3.0, 3.0, 0.0, 0.0])
    logits[6:] += torch.tensor([0.0, 0.0, 3.0, 3.0])
    return logits, logits.topk(2).indices


def global_balance(rank: int) -> None:
    logits, choices = uneven_routing()
    whole = logits.clone().requires_grad_()
    expected = load_balancing_loss((whole,), (choices,), 2, "local")
    expected.backward()
    rows = slice(6 * rank, 6 * rank + 6)
    mine = logits[rows].clone().requires_grad_()
    found = load_balancing_loss((mine,), (choices[rows],), 2, "global")
    found.backward()
    local = load_balancing_loss((logits[rows],), (choices[rows],), 2, "local")
    # What data parallelism does with losses and gradients: the mean over ranks.
    mean = found.detach().clone()
    dist.all_reduce(mean)
    torch.testing.assert_close(mean / WORLD, expected.detach())
    torch.testing.assert_close(mine.grad / WORLD, whole.grad[rows])
    assert (local - found).abs() > 0.05, "the two scopes differ on this batch"


def test_global_balance_loss_is_that_of_the_whole_batch(tmp_path):
    run_on_two(global_balance, tmp_path)


def noise_of_rows(rows: int, sequence: int) -> list[RoutingNoise]:
    """The same draws for every row of a batch, one RoutingNoise per layer, so that batches can be cut by rows."""
    noises = []
    for layer in range(2):
        one = draw_routing_noise(torch.zeros(sequence, 4), 2, torch.Generator().manual_seed(layer))
        noises.append(
            RoutingNoise(
                one.exponential.repeat(1, rows, 1), one.uniform.repeat(1, rows, 1), torch.ones(rows * sequence, 32)
            )
        )
    return noises


def window_of_two() -> list[dict[str, torch.Tensor]]:
    """Two micro-batches of four rows, padded on the right to other lengths."""
    generator = torch.Generator().manual_seed(4)
    batches = []
    for lengths in ((10, 4, 7, 2), (3, 10, 10, 6)):
        ids = torch.randint(0, 90, (4, 10), generator=generator)
        mask = (torch.arange(10) < torch.tensor(lengths)[:, None]).long()
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)})
    return batches


def train_window(model: GrinMoeForCausalLM, rows: slice, ranks: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of one optimizer step, as the Trainer adds them up."""
    batches = window_of_two()
    items = sum((batch["labels"][:, 1:] != -100).sum() for batch in batches)
    total = torch.zeros(())
    for batch in batches:
        mine = {name: tensor[rows] for name, tensor in batch.items()}
        noise = noise_of_rows(len(mine["input_ids"]), 10)
        loss = model(**mine, num_items_in_batch=items, routing_noise=noise).loss * ranks
        loss.backward()
        total += loss.detach()
    return total, {name: parameter.grad for name, parameter in model.named_parameters()}


def window_on_two_ranks(rank: int, estimator: str, checkpointing: bool) -> None:
    options = {
        "router_aux_loss_coef": 0.5,
        "router_aux_loss_scope": "global",
        "router_jitter_noise": 0.3,
        "router_estimator": estimator,
    }
    whole = tiny_model(**options).train()
    with mock.patch("torch.distributed.is_initialized", return_value=False):
        expected_loss, expected = train_window(whole, slice(0, 4), ranks=1)
    model = tiny_model(**options).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    with mock.patch("torch.distributed.all_reduce", wraps=dist.all_reduce) as collective:
        # Ranks of different sizes: three rows here, one there.
        loss, gradients = train_window(model, slice(0, 3) if rank == 0 else slice(3, 4), ranks=WORLD)
    assert [call.args[0].shape for call in collective.call_args_list] == [(2, 6)] * 2, "one for each micro-batch"
    assert all(call.kwargs["async_op"] for call in collective.call_args_list)
    dist.all_reduce(loss)
    torch.testing.assert_close(loss / WORLD, expected_loss, rtol=1e-5, atol=0)
    for name, gradient in gradients.items():
        dist.all_reduce(gradient)
        torch.testing.assert_close(gradient / WORLD, expected[name], rtol=2e-4, atol=2e-6, msg=name)


@pytest.mark.parametrize(
    "estimator, checkpointing", [("sparsemixer_v2", False), ("sparsemixer_v2", True), ("sparsemixer_joint", False)]
)
def test_a_step_on_two_ranks_is_that_of_the_whole_batch(tmp_path, estimator, checkpointing):
    """Losses and all gradients, with padding, uneven ranks and two micro-batches; recomputation counts nothing twice."""
    run_on_two(window_on_two_ranks, tmp_path, estimator, checkpointing)


def selected_on_all_ranks(model: GrinMoeForCausalLM, ids: torch.Tensor) -> list[torch.Tensor]:
    output = model(input_ids=ids, labels=ids, output_router_logits=True)
    output.loss.backward()
    mine = torch.stack(output.selected_experts)
    everyone = [torch.empty_like(mine) for _ in range(WORLD)]
    dist.all_gather(everyone, mine)
    return everyone


def draws_in_a_parallel_group(rank: int, folder: str, options: dict) -> None:
    model = GrinMoeForCausalLM.from_pretrained(
        folder, dtype=torch.float32, distributed_config=DistributedConfig(**options)
    ).train()
    torch.manual_seed(100 + rank)
    ids = torch.arange(24).view(2, 12)
    first, second = (selected_on_all_ranks(model, ids) for _ in range(2))
    assert torch.equal(*first) and torch.equal(*second), "ranks that share a batch route alike"
    assert not torch.equal(first[0], second[0]), "and every forward anew"


@pytest.mark.parametrize("options", [{"tp_size": 2}, {"tp_size": 2, **EXPERT_PARALLEL}], ids=["tensor", "expert"])
def test_ranks_that_share_a_batch_draw_alike_however_they_are_seeded(tmp_path, options):
    tiny_model(router_jitter_noise=0.5).save_pretrained(tmp_path / "model")
    run_on_two(draws_in_a_parallel_group, tmp_path, str(tmp_path / "model"), options)


def dropout_in_a_parallel_group(rank: int, folder: str, options: dict) -> None:
    model = GrinMoeForCausalLM.from_pretrained(
        folder, dtype=torch.float32, distributed_config=DistributedConfig(**options)
    ).train()
    torch.manual_seed(1)  # the same on both ranks, as dropout of shared activations needs it
    hidden = model.model(torch.arange(24).view(2, 12)).last_hidden_state.detach()
    everyone = [torch.empty_like(hidden) for _ in range(WORLD)]
    dist.all_gather(everyone, hidden)
    torch.testing.assert_close(*everyone, atol=1e-5, rtol=0)
    assert model.config.expert_dropout == model.config.hidden_dropout == 0.3


@pytest.mark.parametrize("options", [{"tp_size": 2}, {"tp_size": 2, **EXPERT_PARALLEL}], ids=["tensor", "expert"])
def test_dropout_of_experts_does_not_set_ranks_apart(tmp_path, options):
    """Each rank drops activations of its own; what follows, dropout of the shared ones included, stays the same."""
    tiny_model(expert_dropout=0.3, hidden_dropout=0.3).save_pretrained(tmp_path / "model")
    run_on_two(dropout_in_a_parallel_group, tmp_path, str(tmp_path / "model"), options)


def draws_of_data_parallel_ranks(rank: int) -> None:
    model = tiny_model(router_jitter_noise=0.5).train()
    ids = torch.arange(24).view(2, 12)
    runs = []
    for seed in (7, 7, 8):
        torch.manual_seed(seed)  # the same on both ranks, as the Trainer does it
        runs.append(selected_on_all_ranks(model, ids))
    first, again, other = runs
    assert not torch.equal(*first), "data-parallel ranks draw differently"
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)), "and repeat with the seed"
    assert not torch.equal(first[rank], other[rank])


def test_data_parallel_ranks_draw_differently_although_seeded_alike(tmp_path):
    run_on_two(draws_of_data_parallel_ranks, tmp_path)
