"""`grinmoe_triton` held to the reference loop, in Triton's interpreter: outputs and every gradient, at odd sizes."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import grinmoe.kernels.triton_experts as triton_experts
from grinmoe.kernels.permute_kernels import combine, place_rows, swiglu_backward
from grinmoe.modeling_grinmoe import GrinMoeExperts
from tests.tolerances import FAST_PATH_BFLOAT16, FAST_PATH_FLOAT32


def distinct(tokens: int, top_k: int, num_experts: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(tokens, num_experts, generator=generator).topk(top_k).indices


ROUTINGS = {
    "one token": distinct(1, 2, 5),
    "top-1": distinct(7, 1, 5),
    "top-3 of 33": distinct(40, 3, 33),
    "not a multiple of a block": distinct(301, 2, 16),
    "all tokens to one expert": torch.tensor([[3, 1]]).expand(70, -1),
    "idle experts": distinct(33, 2, 3) + 2,
    "served elsewhere": torch.tensor([[0, 5], [5, 5], [3, 1], [5, 2], [4, 0]]),
}


def build(config, implementation="grinmoe_triton", dtype=torch.float32) -> GrinMoeExperts:
    config = copy.deepcopy(config)
    config._experts_implementation = implementation
    torch.manual_seed(0)
    experts = GrinMoeExperts(config)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return experts.to(dtype)


def results(experts, choices, dtype=torch.float32) -> list[torch.Tensor]:
    """Output, and gradients of the input, of the weights and of whichever parameters train."""
    torch.manual_seed(1)
    hidden_states = torch.randn(choices.shape[0], experts.hidden_dim).to(dtype).requires_grad_()
    weights = torch.rand(choices.shape).to(dtype).requires_grad_()
    output = experts(hidden_states, choices, weights)
    inputs = [hidden_states, weights, *(p for p in experts.parameters() if p.requires_grad)]
    return [output, *torch.autograd.grad(output, inputs, torch.randn(output.shape).to(output.dtype))]


def assert_close(found, expected, bound):
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype and a.isfinite().all()
        assert (a - b).abs().max() <= bound * b.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_it_computes_what_the_loop_computes(tiny_config, routing, dtype):
    choices = ROUTINGS[routing]
    num_experts = {"top-3 of 33": 33, "not a multiple of a block": 16}.get(routing, 5)
    config = tiny_config(
        num_local_experts=num_experts, num_experts_per_tok=choices.shape[1], hidden_size=40, intermediate_size=24
    )
    found = results(build(config, dtype=dtype), choices, dtype)
    if dtype == torch.float32:
        assert_close(found, results(build(config, "eager"), choices), FAST_PATH_FLOAT32)
    else:
        # Against float32 with the same rounded weights: no worse than the loop is in bfloat16, and a little.
        exact = results(build(config, "eager").bfloat16().float(), choices)
        for a, b in zip(found, exact, strict=True):
            assert (a.float() - b).abs().max() <= FAST_PATH_BFLOAT16 * b.abs().max()


def test_few_tokens_without_a_gradient_go_to_the_kernels_for_decoding(tiny_config, monkeypatch):
    counted = []
    few = triton_experts.few_tokens_experts
    monkeypatch.setattr(triton_experts, "few_tokens_experts", lambda *a: counted.append(a[0].shape[0]) or few(*a))
    experts, reference = build(tiny_config()), build(tiny_config(), "eager")
    for tokens in (3, 90):
        choices, hidden_states = distinct(tokens, 2, 4), torch.randn(tokens, 32)
        weights = torch.rand(tokens, 2)
        assert experts(hidden_states, choices, weights).requires_grad
        with torch.no_grad():
            assert_close([experts(hidden_states, choices, weights)], [reference(hidden_states, choices, weights)], 1e-5)
    assert counted == [3]


def test_no_token_at_all(tiny_config):
    experts = build(tiny_config())
    output, *gradients = results(experts, torch.empty(0, 2, dtype=torch.int64))
    assert output.shape == (0, 32) and all((g == 0).all() for g in gradients)


@pytest.mark.parametrize("num_experts, tokens", [(5, 1), (16, 700), (128, 90)])
def test_rows_are_placed_by_a_stable_sort(num_experts, tokens):
    choices = torch.randint(0, num_experts + 1, (tokens, 2), generator=torch.Generator().manual_seed(0))
    order, row_of_choice, ends = place_rows(choices, num_experts)
    sorted_experts, expected = choices.flatten().sort(stable=True)
    assert torch.equal(order.long(), expected)
    assert torch.equal(row_of_choice[expected].long(), torch.arange(2 * tokens))
    assert torch.equal(ends.long(), (sorted_experts[None] <= torch.arange(num_experts)[:, None]).sum(1))


def test_what_no_product_wrote_is_not_read():
    """Rows of choices served elsewhere are uninitialised; here they are NaN."""
    choices = torch.tensor([[0, 2], [2, 2], [1, 0]])
    order, row_of_choice, ends = place_rows(choices, 2)
    rows = torch.where(torch.arange(6)[:, None] < ends[-1], torch.ones(6, 8), float("nan"))
    weights = torch.full((3, 2), 0.5)
    assert torch.equal(combine(rows, row_of_choice, ends, 2, weights)[:, 0], torch.tensor([0.5, 0.0, 1.0]))
    pre_activation, grad = rows.repeat(1, 2), rows
    grad_pre, weighted, grad_weights = swiglu_backward(grad, pre_activation, weights, order, ends)
    assert grad_weights.isfinite().all()
    assert (grad_weights[choices == 2] == 0).all() and (grad_weights[choices < 2] > 0).all()
    assert grad_pre[:3].isfinite().all() and weighted[:3].isfinite().all()


@pytest.mark.parametrize("frozen", [("gate_up_proj",), ("down_proj",), ("gate_up_proj", "down_proj")], ids=str)
def test_frozen_experts_cost_no_product(tiny_config, frozen, monkeypatch):
    products = []
    grouped_mm = torch.nn.functional.grouped_mm
    pair = []
    for implementation in ("eager", "grinmoe_triton"):
        experts = build(tiny_config(), implementation)
        for name in frozen:
            getattr(experts, name).requires_grad_(False)
        monkeypatch.setattr(
            torch.nn.functional, "grouped_mm", lambda *a, **k: products.append(a[0].shape) or grouped_mm(*a, **k)
        )
        pair.append(results(experts, distinct(20, 2, 4)))
    assert_close(pair[1], pair[0], FAST_PATH_FLOAT32)
    assert len(products) == 6 - len(frozen)


def test_autocast_computes_in_its_dtype(tiny_config):
    experts, choices = build(tiny_config()), distinct(20, 2, 4)
    expected = results(experts, choices)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = results(experts, choices)
    assert_close(found, expected, FAST_PATH_BFLOAT16)
    assert all((a - b).abs().max() > 0 for a, b in zip(found, expected))


def test_dropout_of_the_same_activations(tiny_config, monkeypatch):
    choices, pair = distinct(20, 2, 4), []
    keep = torch.empty(40, 24).bernoulli_(0.6, generator=torch.Generator().manual_seed(0)) / 0.6
    groups = iter(keep.split(choices.flatten().bincount(minlength=4).tolist()))
    for implementation, mask in (("eager", lambda a: next(groups)), ("grinmoe_triton", lambda a: keep)):
        experts = build(tiny_config(expert_dropout=0.4), implementation).train()
        monkeypatch.setattr(experts, "keep_mask", mask)
        pair.append(results(experts, choices))
    assert_close(pair[1], pair[0], FAST_PATH_FLOAT32)


def test_checkpointing_and_a_second_backward(tiny_config):
    experts, choices = build(tiny_config()), distinct(20, 2, 4)
    expected = results(experts, choices)
    torch.manual_seed(1)
    hidden_states, weights = torch.randn(20, 32, requires_grad=True), torch.rand(20, 2, requires_grad=True)
    output = checkpoint(experts, hidden_states, choices, weights, use_reentrant=False)
    inputs, upstream = [hidden_states, weights, *experts.parameters()], torch.randn(20, 32)
    for retain in (True, False):
        gradients = torch.autograd.grad(output, inputs, upstream, retain_graph=retain)
        for found, wanted in zip(gradients, expected[1:], strict=True):
            assert torch.equal(found, wanted)


def test_a_compiled_step(tiny_config):
    torch.compiler.reset()
    experts, choices = build(tiny_config()), distinct(20, 2, 4)
    expected = results(experts, choices)
    compiled = torch.compile(experts, backend="aot_eager", fullgraph=True)
    assert_close(results(compiled, choices), expected, FAST_PATH_FLOAT32)


def test_operators_keep_their_word():
    """Shapes and strides of the fakes, no aliases, and gradients as registered."""
    arguments = [torch.randn(6, 8), torch.rand(6, 2), torch.randn(4, 16, 8), torch.randn(4, 8, 8)]
    for tensor in arguments:
        tensor.requires_grad_()
    torch.library.opcheck(triton_experts._experts, (*arguments, distinct(6, 2, 4), None))


def test_only_input_and_pre_activation_are_kept(tiny_config):
    """Goal G4: unique storages saved for the backward, parameters excluded, at most 1.1 (T H + T K 2I) elements."""
    experts = build(tiny_config(hidden_size=128, intermediate_size=96))
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


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"hidden_act": "gelu"}, "hidden_act='silu', not 'gelu'"),
        ({"num_local_experts": 129}, "up to 128 experts, not 129"),
        ({"intermediate_size": 7}, "multiples of 4 in torch.float32, not hidden 32 and width 7"),
    ],
    ids=["activation", "experts", "alignment"],
)
def test_what_it_cannot_do_is_refused(tiny_config, fields, message):
    with pytest.raises(ValueError, match=message):
        build(tiny_config(**fields))(torch.ones(2, 32), torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1))


@pytest.mark.integration
@pytest.mark.parametrize(
    "prepare, error, message",
    [
        ("", "ValueError", "its kernels run on a GPU; choose 'grinmoe' there"),
        ("sys.modules['triton'] = None", "ImportError", "needs Triton"),
    ],
    ids=["a CPU", "no Triton"],
)
def test_where_it_cannot_run_it_says_what_to_choose(prepare, error, message):
    """In a process of its own: whether kernels are interpreted, and whether Triton is there, is decided at import."""
    script = f"""
import os, sys
os.environ.pop("TRITON_INTERPRET", None)
import importlib.util
{prepare}
if {bool(prepare)}:
    real = importlib.util.find_spec
    importlib.util.find_spec = lambda name, *rest: None if name == "triton" else real(name, *rest)
import torch
from grinmoe import GrinMoeConfig
from grinmoe.modeling_grinmoe import GrinMoeExperts
from grinmoe import GrinMoeForCausalLM
config = GrinMoeConfig(
    hidden_size=32, intermediate_size=24, num_local_experts=4, num_attention_heads=4, num_key_value_heads=4
)
config._experts_implementation = "grinmoe_triton"
try:
    GrinMoeExperts(config)(torch.ones(2, 32), torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1))
except Exception as problem:
    print(type(problem).__name__, problem)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.startswith(error) and message in done.stdout, done.stdout + done.stderr[-2000:]
