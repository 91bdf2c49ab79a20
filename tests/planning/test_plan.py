"""`grinmoe plan`: its memory model against the allocations of real training steps, and its answers.

A step is measured by the allocations that torch's profiler records, kernels' own included, so nothing is sampled and
nothing is missed. CUDA's autocast differs from the CPU's in the norms and in sums: `cuda_autocast` makes a CPU follow its
rules.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh

from grinmoe import GrinMoeConfig, GrinMoeForCausalLM
from grinmoe.planning.memory_model import (
    Adapters,
    Precision,
    Step,
    adamw_8bit_bytes,
    parameters_of,
    resident_bytes,
)
from grinmoe.planning.memory_step import _peaks, predict
from grinmoe.planning.plan import PlanOptions, make_plan, print_plan, run_plan
from grinmoe.planning.roofline import communication_seconds, flops_per_token
from tests import ROOT

BFLOAT16, CUDA = Precision(autocast=False), Precision(autocast=True)


def config_of(**overrides) -> GrinMoeConfig:
    """Small, and with more activations than weights."""
    fields = {
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "num_local_experts": 4,
        "sliding_window": 511,
        "eos_token_id": 95,
    }
    return GrinMoeConfig(**{**fields, **overrides})


def measured_peak(function: Callable[[], None], folder: Path, left_out: tuple[str, ...] = ()) -> int:
    """Bytes by which CPU memory grows at most while `function` runs, without what the operators in `left_out` allocate."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    profiler.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    spans = [(e["ts"], e["ts"] + e["dur"]) for e in events if e.get("ph") == "X" and e["name"] in left_out]
    allocations = sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["args"]["Ev Idx"])
    total = peak = 0
    ignored = set()
    for event in allocations:
        size, address = event["args"]["Bytes"], event["args"]["Addr"]
        if size > 0 and any(start <= event["ts"] <= end for start, end in spans):
            ignored.add(address)
        elif size < 0 and address in ignored:
            ignored.remove(address)
        else:
            total += size
            peak = max(peak, total)
    return peak


class _SumInFloat32(torch.autograd.Function):
    """Over dimension 1. A CPU would copy its input to float32 first, a GPU adds as it reads."""

    @staticmethod
    def forward(ctx, tensor):
        ctx.length = tensor.shape[1]
        total = torch.zeros(tensor.shape[0], tensor.shape[2])
        for part in tensor.unbind(1):
            total += part
        return total

    @staticmethod
    def backward(ctx, gradient):
        return gradient.unsqueeze(1).expand(-1, ctx.length, -1).to(torch.bfloat16)


@pytest.fixture
def cuda_autocast(monkeypatch):
    """CPU autocast that computes norms and sums in float32, as CUDA's does."""
    layer_norm, total = F.layer_norm, torch.Tensor.sum

    def norm_in_float32(hidden, shape, weight=None, bias=None, eps=1e-5):
        if not torch.is_autocast_enabled("cpu"):
            return layer_norm(hidden, shape, weight, bias, eps)
        with torch.autocast("cpu", enabled=False):
            return layer_norm(hidden.float(), shape, weight.float(), bias.float(), eps)

    def sum_in_float32(tensor, *args, **kwargs):
        if torch.is_autocast_enabled("cpu") and tensor.dtype == torch.bfloat16 and tensor.dim() == 3:
            return _SumInFloat32.apply(tensor)
        return total(tensor, *args, **kwargs)

    monkeypatch.setattr(F, "layer_norm", norm_in_float32)
    monkeypatch.setattr(torch.Tensor, "sum", sum_in_float32)


def model_of(step: Step) -> torch.nn.Module:
    """A model as the step's method trains it."""
    torch.manual_seed(0)
    model = GrinMoeForCausalLM(step.config)
    # As on a GPU: where it computes in bfloat16, a CPU's default takes it too.
    model.set_experts_implementation("grinmoe" if step.precision.autocast else "grouped_mm")
    if step.precision.compute == 2 and not (step.trains_all and step.precision.autocast):
        model.bfloat16()
    if step.method == "qlora":
        from transformers import BitsAndBytesConfig

        from grinmoe.quantization_grinmoe import quantize_model

        compute = torch.bfloat16 if step.precision.compute == 2 else torch.float32
        model = quantize_model(
            model,
            BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=compute,
            ),
        )
    if not step.trains_all:
        from peft import get_peft_model

        from grinmoe.adapters import lora_config

        adapters = step.adapters
        experts = "all" if adapters.experts else "none"
        options = {"attention": adapters.attention, "experts": experts, "shared_a": adapters.shared_a}
        model = get_peft_model(model, lora_config(step.config, r=adapters.rank, **options))
        model.enable_input_require_grads()
    if step.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def training_step(model, optimizer, step: Step) -> Callable[[], None]:
    ids = torch.randint(0, step.config.vocab_size, (step.batch, step.sequence))

    def run() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=step.precision.autocast):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def storages(model: torch.nn.Module) -> int:
    """Bytes of parameters, and of what their quantisation needs beside them."""
    tensors = [*model.parameters()]
    if any(parameter.dtype == torch.uint8 for parameter in tensors):
        tensors += [buffer for name, buffer in model.named_buffers() if "rotary" not in name]
        states = [parameter.quant_state for parameter in tensors if getattr(parameter, "quant_state", None)]
        tensors += [t for q in states for t in (q.absmax, q.code, q.offset, q.state2.absmax, q.state2.code)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def states(optimizer: torch.optim.Optimizer) -> int:
    return sum(value.nbytes for state in optimizer.state.values() for key, value in state.items() if key != "step")


def steps() -> dict[str, Step]:
    """Every method, with shapes in which other things are large: vocabulary, experts, layers, tokens."""
    many_experts = config_of(num_local_experts=16, num_experts_per_tok=4)
    plain = Step(config_of(), "full", 2, 192, gradient_checkpointing=False, precision=BFLOAT16)
    lora = replace(plain, method="lora", adapters=Adapters(rank=8))
    attention_only, experts_only = Adapters(8, experts=False), Adapters(8, attention=False)
    on_gpu = {"precision": CUDA, "gradient_checkpointing": True}
    return {
        "full": plain,
        "full, large vocabulary": replace(plain, config=config_of(vocab_size=2000)),
        "full, checkpointing": replace(plain, gradient_checkpointing=True),
        "full, six layers": replace(plain, config=config_of(num_hidden_layers=6), gradient_checkpointing=True),
        "full, many experts": replace(plain, config=many_experts),
        "full, autocast": replace(plain, precision=CUDA),
        "full, autocast, checkpointing": replace(plain, **on_gpu),
        "full, one long row": replace(plain, batch=1, sequence=500, gradient_checkpointing=True),
        "full, RMSNorm, wide heads": replace(plain, config=config_of(norm_type="rms_norm", head_dim=16)),
        "full, beyond the window": replace(plain, config=config_of(sliding_window=63), masked=True),
        "lora": lora,
        "lora, checkpointing": replace(lora, gradient_checkpointing=True),
        "lora on attention": replace(lora, adapters=attention_only, gradient_checkpointing=True),
        "lora on experts, autocast": replace(lora, adapters=experts_only, **on_gpu),
        "lora, autocast": replace(lora, **on_gpu),
        "lora, autocast, shared A": replace(lora, adapters=Adapters(8, shared_a=True), **on_gpu),
        "qlora": replace(lora, method="qlora"),
        "qlora on attention": replace(lora, method="qlora", adapters=attention_only, gradient_checkpointing=True),
        "qlora, autocast": replace(lora, method="qlora", **on_gpu),
    }


@pytest.mark.parametrize("name", steps())
def test_prediction_is_what_a_step_allocates(name, tmp_path, cuda_autocast):
    step = steps()[name]
    if step.method == "qlora":
        pytest.importorskip("bitsandbytes")
    model = model_of(step)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True)
    run = training_step(model, optimizer, step)
    run()  # the optimizer's states are made in the first step
    resident = resident_bytes(step)
    assert resident["weights"] == pytest.approx(storages(model), rel=1e-3)
    assert resident["gradients"] == sum(parameter.nbytes for parameter in trained)
    assert resident["optimizer"] == states(optimizer)
    # Of what comes and goes (activations, logits, gradients, temporaries), so the total is within less.
    transient = predict(step).peak_total - resident["weights"] - resident["optimizer"]
    assert transient == pytest.approx(measured_peak(run, tmp_path), rel=0.06)
    assert transient > 0.5 * (resident["weights"] + resident["optimizer"]), "activations matter here"


@contextmanager
def one_rank(folder: Path):
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), 1), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("method, precision", [("full", BFLOAT16), ("full", CUDA), ("lora", CUDA)])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_prediction_is_what_fsdp2_allocates(checkpointing, method, precision, cuda_autocast, tmp_path):
    from grinmoe.distributed import shard_model

    config = config_of(hidden_size=128, intermediate_size=256, num_hidden_layers=3)
    step = Step(config, method, 2, 96, shards=1, gradient_checkpointing=checkpointing, precision=precision)
    predicted = predict(step).peak_total
    with one_rank(tmp_path) as mesh:
        model = shard_model(model_of(step), mesh)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, fused=True)
        run = training_step(model, optimizer, step)
        run()
        resident = resident_bytes(step)
        assert resident["weights"] == sum(parameter.to_local().nbytes for parameter in model.parameters())
        transient = predicted - resident["weights"] - resident["optimizer"]
        assert transient == pytest.approx(measured_peak(run, tmp_path), rel=0.06)


def two_rank_step() -> Step:
    config = config_of(hidden_size=128, intermediate_size=256, num_hidden_layers=3)
    return Step(config, "full", 2, 96, shards=2, gradient_checkpointing=True, precision=BFLOAT16)


def _two_ranks(rank: int, folder: str, predicted: int) -> None:
    from grinmoe.distributed import shard_model

    step = two_rank_step()
    config = step.config
    torch.manual_seed(0)
    model = shard_model(GrinMoeForCausalLM(config).train(), init_device_mesh("cpu", (2,)))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    run = training_step(model, optimizer, step)
    run()
    own = Path(folder, f"rank-{rank}")
    own.mkdir()
    # gloo copies what it sends; NCCL does not. Its threads may let go of a tensor after the step has gone on, and then
    # one more of them is alive at the peak: the least of several steps is without that.
    collectives = ("c10d::_allgather_base_", "c10d::_reduce_scatter_base_")
    measured = min(measured_peak(run, own, collectives) for _ in range(5))
    resident = resident_bytes(step)
    assert resident["weights"] == sum(parameter.to_local().nbytes for parameter in model.parameters())
    transient = predicted - resident["weights"] - resident["optimizer"]
    assert transient == pytest.approx(measured, rel=0.1), (transient, measured)


@pytest.mark.integration
def test_prediction_is_what_fsdp2_allocates_on_each_of_two_ranks(tmp_path):
    from tests.distributed.two_ranks import run_on_two

    run_on_two(_two_ranks, tmp_path, str(tmp_path), predict(two_rank_step()).peak_total)


@pytest.mark.integration
def test_many_layers_are_predicted_from_few():
    for step in (
        replace(steps()["qlora, autocast"], config=config_of(num_hidden_layers=6)),
        steps()["full, six layers"],
    ):
        phases = _peaks(step, 6)
        resident = resident_bytes(step)
        transient = predict(step).peak_total - resident["weights"] - resident["optimizer"]
        assert transient == pytest.approx(max(peak.total() for peak in phases.values()), rel=1e-3)


def test_8bit_states_are_as_large_as_those_of_bitsandbytes():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    # Exceptions that a Trainer has made in this process, by parameters' addresses.
    bitsandbytes.optim.GlobalOptimManager.get_instance().initialize()
    for shape in ((100, 100), (64, 64), (10, 10)):
        parameter = torch.nn.Parameter(torch.randn(shape))
        optimizer = bitsandbytes.optim.AdamW8bit([parameter])
        parameter.grad = torch.randn(shape)
        optimizer.step()
        state = optimizer.state[parameter]
        made = sum(v.nbytes for k, v in state.items() if k.startswith(("state", "absmax")) and torch.is_tensor(v))
        assert adamw_8bit_bytes(parameter.numel()) == made


def test_parameters_are_those_of_the_model_and_of_its_adapters():
    step = Step(config_of(), "lora", 1, 8, adapters=Adapters(8))
    model = model_of(step)
    assert sum(p.numel for p in parameters_of(step)) == sum(p.numel() for p in model.parameters())


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_prediction_is_what_a_gpu_allocates(method):
    """pytest -m gpu tests/test_plan.py"""
    config = config_of(
        vocab_size=32064, hidden_size=1024, intermediate_size=1600, num_attention_heads=16, num_hidden_layers=4
    )
    step = Step(config, method, 1, 480)
    model = model_of(replace(step, method=method)).cuda()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    ids = torch.randint(0, config.vocab_size, (1, 480), device="cuda")
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        del loss
    assert predict(step).peak_total == pytest.approx(torch.cuda.max_memory_allocated(), rel=0.1)


@pytest.fixture(scope="module")
def released(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("released")
    GrinMoeConfig().save_pretrained(folder)
    return str(folder)


def test_qlora_of_the_released_model_takes_less_than_40_gb(released):
    plan = make_plan(PlanOptions(model=released, method="qlora", gpus=1, gpu_memory_gib=80, seq_length=2048))
    assert plan.fits
    assert 20 < plan.per_gpu_gib["total"] < 40e9 / 2**30
    assert plan.recommended_recipe == "recipes/sft_qlora.yaml"
    assert plan.launch_config is None


@pytest.mark.integration
def test_full_fine_tuning_does_not_fit_8_gpus_of_80_gib_and_what_does_is_said(released):
    plan = make_plan(PlanOptions(model=released, method="full", gpus=8, gpu_memory_gib=80))
    # 41.87e9 weights with gradients and two moments, 16 bytes each, over 8 GPUs.
    assert not plan.fits
    assert plan.per_gpu_gib["weights"] + plan.per_gpu_gib["optimizer"] > 12 * 41.8e9 / 8 / 2**30
    changes = [alternative.change for alternative in plan.alternatives]
    assert "--method full-8bit" in changes and "16 GPUs, with --shard-across-nodes" in changes
    assert all(alternative.total_gib <= 80 for alternative in plan.alternatives)
    assert make_plan(PlanOptions(model=released, method="full-8bit", gpus=8)).fits


@pytest.mark.integration
def test_the_parts_add_up_and_json_has_them(released, capsys):
    run_plan(PlanOptions(model=released, method="lora", gpus=8, batch_size=2, json=True))
    content = json.loads(capsys.readouterr().out)
    parts = content["per_gpu_gib"]
    assert parts["total"] == pytest.approx(sum(gib for part, gib in parts.items() if part != "total"))
    assert {"weights", "gradients", "optimizer", "activations", "communication"} < parts.keys()
    assert content["fits"] is True
    assert content["recommended_recipe"] == "recipes/sft_lora.yaml"
    assert content["launch_config"] == "recipes/accelerate/fsdp2_8xh100_lora.yaml"
    assert content["tokens_per_s_bound"] > 0
    assert content["inputs"]["gpus"] == 8


@pytest.mark.integration
def test_the_table_says_what_is_assumed_and_what_would_fit(released, capsys):
    print_plan(make_plan(PlanOptions(model=released, method="lora", gpus=1)))
    printed = capsys.readouterr().out
    assert "allowance (assumed)" in printed
    assert "does not fit" in printed and "--method qlora" in printed
    assert "a bound, not a forecast" in printed


@pytest.mark.integration
def test_more_memory_for_more_tokens_and_less_with_checkpointing_or_more_gpus(released):
    def total(**options) -> float:
        options = {"method": "lora", "gpu_memory_gib": 1000, **options}  # so much that it looks for no alternatives
        return make_plan(PlanOptions(model=released, **options)).per_gpu_gib["total"]

    assert total(batch_size=4) > total(batch_size=1)
    assert total(gradient_checkpointing=False) > total()
    assert total(gpus=2) > total(gpus=8)
    assert total(lora_r=64) > total(lora_r=16)
    # All gradients stay unsharded through the micro-batches.
    once = total(method="full-8bit", gpus=8)
    assert total(method="full-8bit", gpus=8, gradient_accumulation_steps=2) > once + 41e9 * 4 / 2**30 / 2


def test_arithmetic_of_the_bound_is_6_per_active_weight_and_4_where_they_are_frozen():
    config = config_of(num_hidden_layers=1, vocab_size=10)
    step = Step(config, "full", 1, 1, gradient_checkpointing=False)
    attention = 64 * 64 * 2 + 64 * 16 * 2 + 64 * 2 + 16 * 2  # q, o, k, v and their biases
    experts = 2 * 3 * 64 * 128
    weights = attention + experts + 4 * 64 + 4 * 64 + 64 * 10 + 10  # the router, two norms, the head
    scores = 2 * 64  # one key
    assert flops_per_token(step) == 6 * (weights + scores)
    frozen = replace(step, method="lora", adapters=Adapters(4, experts=False))
    adapters = 4 * ((64 + 64) * 2 + (64 + 16) * 2)
    assert flops_per_token(frozen) == 4 * weights + 6 * (adapters + scores)


def test_communication_of_the_bound():
    step = Step(config_of(), "full", 1, 8, shards=8)
    numel = sum(p.numel for p in parameters_of(step))
    assert communication_seconds(replace(step, shards=None)) == 0
    most = (2 * 2 + 4) * numel * 7 / 8 / 450e9
    assert 0.9 * most < communication_seconds(step) <= most


@pytest.mark.parametrize(
    "options, message",
    [
        ({"gpus": 0}, "--gpus 0"),
        ({"gpus": 12}, "whole nodes of 8"),
        ({"gpu_memory_gib": -1.0}, "--gpu-memory-gib -1.0"),
        ({"seq_length": 0}, "--seq-length 0"),
        ({"batch_size": 0}, "--batch-size 0"),
        ({"method": "sgd"}, "--method 'sgd'"),
        ({"cpu_offload": True}, "--cpu-offload"),
        ({"lora_targets": "router"}, "--lora-targets 'router'"),
        ({"seq_length": 4097}, "max_position_embeddings=4096"),
        ({"method": "full", "gpus": 7}, "do not spread over 7 GPUs"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(options, message, released):
    with pytest.raises(ValueError, match=message):
        make_plan(PlanOptions(model=released, **options))


def test_a_folder_without_a_config_or_of_another_model_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no config.json"):
        make_plan(PlanOptions(model=str(tmp_path)))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match="llama"):
        make_plan(PlanOptions(model=str(tmp_path)))


@pytest.mark.integration
def test_the_released_model_needs_no_network(monkeypatch):
    def unreachable(*args, **kwargs):
        raise OSError("offline")

    monkeypatch.setattr(GrinMoeConfig, "from_pretrained", unreachable)
    assert "cannot be reached" in make_plan(PlanOptions()).notes[0]
    with pytest.raises(ValueError, match="nobody/nothing"):
        make_plan(PlanOptions(model="nobody/nothing"))


@pytest.mark.integration
def test_recipes_that_are_recommended_exist(released):
    root = ROOT
    for options in ({"method": "full", "gpus": 16, "shard_across_nodes": True}, {"method": "lora", "gpus": 8}, {}):
        plan = make_plan(PlanOptions(model=released, **options))
        for file in filter(None, (plan.recommended_recipe, plan.launch_config)):
            assert (root / file).is_file(), file
