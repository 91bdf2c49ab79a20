"""`grinmoe_quack` held to the reference loop: on a CPU with a stand-in for QuACK, on a GPU with QuACK itself."""

from __future__ import annotations

import copy
import importlib.util
import inspect
import subprocess
import sys

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from grinmoe import GrinMoeForCausalLM
from grinmoe.kernels import quack_experts
from grinmoe.modeling_grinmoe import GrinMoeExperts
from tests.kernels.quack_stand_in import StandIn, in_halves, in_turns
from tests.kernels.test_triton_experts import ROUTINGS, assert_close, build, distinct, results
from tests.tolerances import FAST_PATH_BFLOAT16, FAST_PATH_FLOAT32

needs_quack = pytest.mark.skipif(importlib.util.find_spec("quack") is None, reason="quack-kernels is not installed")


@pytest.fixture
def stand_in(monkeypatch) -> StandIn:
    """QuACK's place taken on a CPU, and float32 let in, in which a wrong formula is not hidden by rounding."""
    products = StandIn()
    monkeypatch.setattr(quack_experts, "quack", lambda: products)
    monkeypatch.setattr(quack_experts, "check_quack", lambda device: None)
    monkeypatch.setattr(quack_experts, "backward_tiles", lambda device: "tiles")
    monkeypatch.setattr(quack_experts, "DTYPES", (torch.float32, torch.bfloat16, torch.float16))
    return products


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_quack_equals_reference_loop(tiny_config, stand_in, routing, dtype):
    choices = ROUTINGS[routing]
    num_experts = {"top-3 of 33": 33, "not a multiple of a block": 16}.get(routing, 5)
    config = tiny_config(
        num_local_experts=num_experts, num_experts_per_tok=choices.shape[1], hidden_size=40, intermediate_size=24
    )
    found = results(build(config, "grinmoe_quack", dtype), choices, dtype)
    reference = build(config, "eager")
    if dtype != torch.float32:
        reference = reference.to(dtype).float()
    bound = FAST_PATH_FLOAT32 if dtype == torch.float32 else FAST_PATH_BFLOAT16
    for a, b in zip(found, results(reference, choices), strict=True):
        assert a.dtype == dtype and a.isfinite().all()
        assert (a.float() - b).abs().max() <= bound * b.abs().max()
    assert len(stand_in.calls) == 6


def test_quack_idle_expert_has_zero_weight_gradient(tiny_config, stand_in):
    *_, grad_gate_up, grad_down = results(build(tiny_config(), "grinmoe_quack"), torch.tensor([[1, 2], [2, 1]]))
    for gradient in (grad_gate_up, grad_down):
        assert (gradient[[0, 3]] == 0).all() and (gradient[[1, 2]] != 0).any(-1).all()


def test_quack_without_tokens_returns_empty_output_and_zero_gradients(tiny_config, stand_in):
    output, *gradients = results(build(tiny_config(), "grinmoe_quack"), torch.empty(0, 2, dtype=torch.int64))
    assert output.shape == (0, 32) and all((g == 0).all() for g in gradients)


def test_quack_without_gradient_stores_no_pre_activation(tiny_config, stand_in):
    experts, choices = build(tiny_config(), "grinmoe_quack"), distinct(20, 2, 4)
    hidden_states, weights = torch.randn(20, 32), torch.rand(20, 2)
    with torch.no_grad():
        found = experts(hidden_states, choices, weights)
    assert_close([found], [build(tiny_config(), "eager")(hidden_states, choices, weights)], FAST_PATH_FLOAT32)
    assert stand_in.calls[0][2]["store_preact"] is False


@pytest.mark.parametrize("frozen", [("gate_up_proj",), ("down_proj",), ("gate_up_proj", "down_proj")], ids=str)
def test_quack_frozen_experts_cost_no_product(tiny_config, stand_in, frozen):
    pair = []
    for implementation in ("eager", "grinmoe_quack"):
        experts = build(tiny_config(), implementation)
        for name in frozen:
            getattr(experts, name).requires_grad_(False)
        pair.append(results(experts, distinct(20, 2, 4)))
    assert_close(pair[1], pair[0], FAST_PATH_FLOAT32)
    assert len(stand_in.calls) == 6 - len(frozen)


def test_quack_dropout_multiplies_activations(tiny_config, stand_in, monkeypatch):
    choices, pair = distinct(20, 2, 4), []
    mask = torch.empty(40, 24).bernoulli_(0.6, generator=torch.Generator().manual_seed(0)) / 0.6
    groups = iter(mask.split(choices.flatten().bincount(minlength=4).tolist()))
    for implementation, drawn in (("eager", lambda a: next(groups)), ("grinmoe_quack", lambda a: mask)):
        experts = build(tiny_config(expert_dropout=0.4), implementation).train()
        monkeypatch.setattr(experts, "keep_mask", drawn)
        pair.append(results(experts, choices))
    assert_close(pair[1], pair[0], FAST_PATH_FLOAT32)
    assert {name for name, *_ in stand_in.calls} == {"gemm"}


def test_quack_autocast_keeps_no_copy_of_the_weights(tiny_config, stand_in):
    experts, choices = build(tiny_config(), "grinmoe_quack"), distinct(20, 2, 4)
    expected, kept = results(experts, choices), []
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor
        ):
            found = results(experts, choices)
    assert all(tensor.dtype == torch.float32 for tensor in found)
    assert_close(found, expected, FAST_PATH_BFLOAT16)
    assert all(operand.dtype == torch.bfloat16 for _, operands, _ in stand_in.calls[6:] for operand in operands)
    assert {tensor.data_ptr() for tensor in kept if tensor.dim() == 3} == {p.data_ptr() for p in experts.parameters()}


def test_quack_keeps_input_and_pre_activation_only(tiny_config, stand_in):
    """Goal G4: unique storages saved for the backward, parameters excluded, at most 1.1 (T H + T K 2I) elements."""
    experts = build(tiny_config(hidden_size=128, intermediate_size=96), "grinmoe_quack")
    parameters = {p.untyped_storage().data_ptr() for p in experts.parameters()}
    kept = {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in parameters:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    hidden_states = torch.randn(200, 128, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        experts(hidden_states, distinct(200, 2, 4), torch.rand(200, 2, requires_grad=True))
    minimum = 4 * (200 * 128 + 200 * 2 * 2 * 96)
    assert minimum <= sum(kept.values()) <= 1.1 * minimum


def test_quack_checkpointing_and_second_backward_repeat_bit_for_bit(tiny_config, stand_in):
    experts, choices = build(tiny_config(), "grinmoe_quack"), distinct(20, 2, 4)
    expected = results(experts, choices)
    torch.manual_seed(1)
    hidden_states, weights = torch.randn(20, 32, requires_grad=True), torch.rand(20, 2, requires_grad=True)
    output = checkpoint(experts, hidden_states, choices, weights, use_reentrant=False)
    inputs, upstream = [hidden_states, weights, *experts.parameters()], torch.randn(20, 32)
    for retain in (True, False):
        gradients = torch.autograd.grad(output, inputs, upstream, retain_graph=retain)
        for found, wanted in zip(gradients, expected[1:], strict=True):
            assert torch.equal(found, wanted)


def test_quack_second_derivative_equals_reference_loop(tiny_config, stand_in):
    pair, choices = [], distinct(6, 2, 4)
    for implementation in ("eager", "grinmoe_quack"):
        experts = build(tiny_config(), implementation)
        torch.manual_seed(1)
        hidden_states, weights = torch.randn(6, 32, requires_grad=True), torch.rand(6, 2, requires_grad=True)
        output = experts(hidden_states, choices, weights)
        (gradient,) = torch.autograd.grad(output.square().sum(), hidden_states, create_graph=True)
        inputs = [hidden_states, weights, *experts.parameters()]
        pair.append(torch.autograd.grad(gradient.square().sum(), inputs))
    assert_close(pair[1], pair[0], 10 * FAST_PATH_FLOAT32)


def test_quack_compiled_step_breaks_the_graph_and_is_right(tiny_config, stand_in):
    torch.compiler.reset()
    experts, choices = build(tiny_config(), "grinmoe_quack"), distinct(20, 2, 4)
    expected = results(experts, choices)
    assert_close(results(torch.compile(experts, backend="aot_eager"), choices), expected, FAST_PATH_FLOAT32)


def test_quack_model_trains_with_the_fused_router(tiny_config, stand_in):
    """The same draws as `grinmoe_triton`, and so the same loss and gradients."""
    pair = []
    for implementation in ("grinmoe_triton", "grinmoe_quack"):
        torch.manual_seed(0)
        model = GrinMoeForCausalLM(tiny_config()).train()
        model.set_experts_implementation(implementation)
        ids = torch.arange(12)[None]
        loss = model(ids, labels=ids, routing_seed=3).loss
        pair.append([loss, *torch.autograd.grad(loss, model.model.layers[0].block_sparse_moe.parameters())])
    assert_close(pair[1], pair[0], FAST_PATH_FLOAT32)


@pytest.mark.parametrize(
    "fields, dtype, message",
    [
        ({}, torch.float64, "'grinmoe_quack' is for bfloat16 and float16, not torch.float64"),
        ({"hidden_act": "gelu"}, torch.bfloat16, "'grinmoe_quack' is for hidden_act='silu', not 'gelu'"),
        ({"num_local_experts": 129}, torch.bfloat16, "up to 128 experts, not 129"),
        ({"intermediate_size": 12}, torch.bfloat16, "multiples of 8 in torch.bfloat16, not hidden 32 and width 12"),
    ],
    ids=["dtype", "activation", "experts", "alignment"],
)
def test_quack_unsupported_experts_are_refused(tiny_config, stand_in, fields, dtype, message):
    experts = build(tiny_config(**fields), "grinmoe_quack", dtype)
    with pytest.raises(ValueError, match=message):
        experts(torch.ones(2, 32, dtype=dtype), torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1, dtype=dtype))


@pytest.mark.parametrize("capability", [None, (8, 9)], ids=["a CPU", "sm_89"])
def test_quack_device_before_hopper_is_refused(tiny_config, monkeypatch, capability):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with pytest.raises(ValueError, match="experts_implementation='grinmoe_quack' got tensors on .* 9.0 or newer"):
        quack_experts.check_quack(torch.device("cpu" if capability is None else "cuda:0"))
    if capability is None:
        for training in (True, False):  # the router, which comes first, refuses by the same name
            model = GrinMoeForCausalLM(tiny_config()).train(training)
            model.set_experts_implementation("grinmoe_quack")
            with pytest.raises(ValueError, match="experts_implementation='grinmoe_quack' got tensors on cpu"):
                model(torch.arange(4)[None])


@pytest.mark.parametrize("missing, package", [("quack", "quack-kernels"), ("triton", "triton")])
def test_quack_missing_package_error_names_pip_install(monkeypatch, missing, package):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else name)
    with pytest.raises(ImportError, match=f"pip install {package}, or choose 'grinmoe'"):
        quack_experts.check_quack(torch.device("cuda:0"))


@pytest.mark.integration
def test_import_grinmoe_does_not_import_quack():
    script = "import sys, grinmoe.kernels; sys.exit('quack' in sys.modules or 'cutlass' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


def test_in_halves_inverts_in_turns():
    tensor = torch.arange(24).view(4, 6)
    assert in_turns(tensor, -1)[0].tolist() == [0, 3, 1, 4, 2, 5]
    for dim in (-1, -2):
        assert torch.equal(in_halves(in_turns(tensor, dim), dim), tensor)


@needs_quack
def test_calls_bind_to_the_signatures_of_the_installed_quack(tiny_config, stand_in):
    from quack import gemm_interface

    for routing in ("top-1", "idle experts"):
        config = tiny_config(num_local_experts=5, num_experts_per_tok=ROUTINGS[routing].shape[1], expert_dropout=0.5)
        for training in (True, False):
            results(build(config, "grinmoe_quack").train(training), ROUTINGS[routing])
    assert {name for name, *_ in stand_in.calls} == {"gemm", "gemm_gated", "gemm_dgated"}
    for name, operands, given in stand_in.calls:
        inspect.signature(getattr(gemm_interface, name)).bind(*operands, **given)


@needs_quack
@pytest.mark.parametrize("capability, tile_n", [((9, 0), 128), ((10, 0), None)], ids=["sm_90", "sm_100"])
def test_quack_tiles_of_the_backward_exist_in_the_installed_quack(monkeypatch, capability, tile_n):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    tiles = quack_experts.backward_tiles.__wrapped__(torch.device("cuda:0"))
    assert getattr(tiles, "tile_n", None) == tile_n


@needs_quack
def test_stand_in_equals_the_references_of_the_installed_quack():
    """QuACK ships its semantics in torch; its backward reference knows no scale, which is applied here."""
    from quack.gemm_interface import gemm_dgated_ref, gemm_gated_ref, gemm_ref

    torch.manual_seed(0)
    A, B, down = torch.randn(7, 16), torch.randn(3, 24, 16), torch.randn(3, 16, 12)
    bounds, A_idx = torch.tensor([0, 4, 4, 9], dtype=torch.int32), torch.randint(0, 7, (9,), dtype=torch.int32)
    by_row = {"cu_seqlens_m": bounds, "A_idx": A_idx}
    stand_in = StandIn()
    pre_activation, activation = stand_in.gemm_gated(A, B.mT, activation="swiglu", concat_layout=("B",), **by_row)
    expected = gemm_gated_ref(A, B.mT, activation="swiglu", concat_layout=("B",), **by_row)
    torch.testing.assert_close((pre_activation, activation), expected)
    ones = torch.ones(9)
    found = stand_in.gemm_dgated(
        A, down, pre_activation, activation="swiglu", colvec_scale=ones, colvec_reduce=True, **by_row
    )
    torch.testing.assert_close(found[:2], gemm_dgated_ref(A, down, pre_activation, activation="swiglu", **by_row))
    torch.testing.assert_close(found[2], (gemm_ref(A, down, **by_row) * activation).sum(1))
    torch.testing.assert_close(
        stand_in.gemm(pre_activation, B, cu_seqlens_m=bounds, concat_layout=("B",)),
        gemm_ref(pre_activation, B, cu_seqlens_m=bounds, concat_layout=("B",)),
    )
    # QuACK's kernel splits the output's strided dimension, columns here; its reference knows rows only, so split here.
    out, by_column = torch.empty(3, 24, 16).mT, {"cu_seqlens_k": bounds, "A_idx": A_idx}
    stand_in.gemm(A.t(), pre_activation, out=out, concat_layout=("out",), **by_column)
    torch.testing.assert_close(out, in_halves(gemm_ref(A.t(), pre_activation, **by_column), -1))
    assert (out[1] == 0).all()


@pytest.mark.gpu
@needs_quack
@pytest.mark.parametrize("dropout", [0.0, 0.5], ids=["all kept", "dropout"])
@pytest.mark.parametrize("autocast", [False, True], ids=["bfloat16", "autocast"])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_quack_on_a_gpu_equals_reference_loop(tiny_config, routing, autocast, dropout):
    """Outputs and every gradient; the same mask for the loop, which asks for it expert by expert."""
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs compute capability 9.0")
    choices = ROUTINGS[routing].cuda()
    num_experts = {"top-3 of 33": 33, "not a multiple of a block": 16}.get(routing, 5)
    config = tiny_config(
        num_local_experts=num_experts,
        num_experts_per_tok=choices.shape[1],
        hidden_size=128,
        intermediate_size=192,
        expert_dropout=dropout,
    )
    dtype = torch.float32 if autocast else torch.bfloat16
    experts = build(config, "grinmoe_quack").to("cuda", dtype).train()
    reference = build(copy.deepcopy(config), "eager").to(dtype).float().cuda().train()
    mask = (torch.rand(choices.numel(), 192, device="cuda") >= dropout).float() / (1 - dropout)
    counts = choices.flatten().bincount(minlength=num_experts)[:num_experts].tolist()
    groups = iter(mask[: sum(counts)].split(counts))
    experts.keep_mask = lambda activation: mask.to(activation.dtype)
    reference.keep_mask = lambda activation: next(groups)
    torch.manual_seed(1)
    hidden_states, upstream = torch.randn(2, len(choices), 128, device="cuda").to(dtype)
    weights = torch.rand(choices.shape, device="cuda").to(dtype)

    def of(module: GrinMoeExperts, cast: torch.dtype) -> list[torch.Tensor]:
        inputs = [tensor.to(cast).requires_grad_() for tensor in (hidden_states, weights)]
        output = module(inputs[0], choices, inputs[1])
        return [output, *torch.autograd.grad(output, [*inputs, *module.parameters()], upstream.to(output.dtype))]

    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        found = of(experts, dtype)
    for a, b in zip(found, of(reference, torch.float32), strict=True):
        assert a.dtype == dtype and a.isfinite().all()
        assert (a.float() - b).abs().max() <= FAST_PATH_BFLOAT16 * b.abs().max()
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        assert all(map(torch.equal, found, of(experts, dtype)))  # bit for bit
