"""`grinmoe_triton` held to the reference loop, in Triton's interpreter: outputs and every gradient, at odd sizes."""

from __future__ import annotations

import copy
import subprocess
import sys
from types import SimpleNamespace

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


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_autocast_keeps_no_copy_of_the_weights(tiny_config, trained):
    """The backward casts the parameters again: copies of all experts would be saved, 2.5 GB a layer at full size."""
    experts = build(tiny_config(hidden_size=64, intermediate_size=96)).requires_grad_(trained)
    parameters = {parameter.data_ptr() for parameter in experts.parameters()}
    saved = []

    def keep(tensor):
        saved.append((tensor.numel(), tensor.data_ptr()))
        return tensor

    hidden_states = torch.randn(5, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        output = experts(hidden_states, distinct(5, 2, 4), torch.rand(5, 2, requires_grad=True))
    large = [pointer for numel, pointer in saved if numel >= experts.down_proj.numel()]
    assert large and set(large) <= parameters
    output.sum().backward()
    for parameter in experts.parameters():
        assert (parameter.grad is not None) == trained
        assert not trained or parameter.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_autocast_of_parameters_in_either_dtype(tiny_config, dtype):
    """As FSDP's mixed precision gives them, too: a gradient comes in the dtype of its parameter."""
    experts, choices = build(tiny_config(), dtype=dtype), distinct(20, 2, 4)
    expected = results(build(tiny_config(), "eager", dtype).float(), choices)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = results(experts, choices)
        again = results(torch.compile(experts, backend="aot_eager", fullgraph=True), choices)
    assert [g.dtype for g in found] == [torch.float32] * 3 + [dtype] * 2
    for tensors in (found, again):
        for a, b in zip(tensors, expected, strict=True):
            assert (a.float() - b).abs().max() <= FAST_PATH_BFLOAT16 * b.abs().max()


def test_autocast_under_checkpointing_transforms_and_a_second_derivative(tiny_config):
    experts, choices = build(tiny_config()), distinct(20, 2, 4)
    hidden_states, weights = torch.randn(20, 32, requires_grad=True), torch.rand(20, 2)
    inputs = [hidden_states, *experts.parameters()]
    upstream = torch.randn(20, 32)

    def value(experts, hidden_states, **how):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return (experts(hidden_states, choices, weights) * upstream).sum()

    expected = torch.autograd.grad(value(experts, hidden_states), inputs)
    recomputed = checkpoint(value, experts, hidden_states, use_reentrant=False)
    for found, wanted in zip(torch.autograd.grad(recomputed, inputs), expected, strict=True):
        assert torch.equal(found, wanted)
    transformed = torch.func.grad(lambda hidden_states: value(experts, hidden_states))(hidden_states.detach())
    assert torch.equal(transformed, expected[0])

    def second(experts):
        inputs = [hidden_states, *experts.parameters()]
        first = torch.autograd.grad(value(experts, hidden_states), inputs, create_graph=True)
        return torch.autograd.grad(sum((gradient**2).sum() for gradient in first), inputs)

    for found, wanted in zip(second(experts), second(build(tiny_config(), "eager")), strict=True):
        assert found.dtype == torch.float32
        assert (found - wanted).abs().max() <= 3 * FAST_PATH_BFLOAT16 * wanted.abs().max()


@pytest.mark.parametrize("routing", ["idle experts", "all tokens to one expert", "all elsewhere"])
def test_idle_expert_over_poisoned_memory_gets_a_gradient_of_zero(routing):
    """torch's grouped product may leave the result of an empty group as the memory was (pytorch/pytorch issue 172439)."""
    choices = torch.full((4, 2), 5) if routing == "all elsewhere" else ROUTINGS[routing]

    def skips_empty_groups(left, right, ends):
        result = torch.full((len(ends), left.shape[1], right.shape[1]), float("nan"))
        for expert, (start, end) in enumerate(zip([0, *ends.tolist()], ends.tolist())):
            if end > start:
                result[expert] = left[start:end].t() @ right[start:end]
        return result

    products = triton_experts.GROUPED_MM._replace(rows_by_rows=skips_empty_groups)
    generator = torch.Generator().manual_seed(0)
    shapes = (len(choices), 16), choices.shape, (5, 24, 16), (5, 16, 12)
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    _, kept = triton_experts.forward_pass(*tensors, choices)
    found = triton_experts.backward_pass(tensors[0], *tensors, None, kept, products=products)
    wanted = triton_experts.backward_pass(tensors[0], *tensors, None, kept)
    idle = [expert for expert in range(5) if not (choices == expert).any()]
    for gradient, expected in zip(found[2:], wanted[2:], strict=True):
        assert (gradient[idle] == 0).all() and idle
        torch.testing.assert_close(gradient, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_idle_expert_on_a_gpu_gets_a_gradient_of_zero(tiny_config, dtype):
    experts = build(tiny_config(hidden_size=64, intermediate_size=48, num_local_experts=6), dtype=dtype).cuda()
    choices = (distinct(40, 2, 4) + 1).cuda()
    for _ in range(3):
        # The caching allocator hands these blocks out again, for the gradients.
        poison = [torch.full_like(parameter, float("nan")) for parameter in experts.parameters() for _ in range(4)]
        del poison
        hidden_states = torch.randn(40, 64, device="cuda", dtype=dtype)
        output = experts(hidden_states, choices, torch.rand(40, 2, device="cuda", dtype=dtype))
        for gradient in torch.autograd.grad(output.sum(), list(experts.parameters())):
            assert gradient.isfinite().all()
            assert (gradient[[0, 5]] == 0).all() and (gradient[1:5] != 0).any()


@pytest.mark.parametrize(
    "dtype, capability, waits",
    [
        (torch.bfloat16, (9, 0), False),
        (torch.bfloat16, (10, 3), False),
        (torch.bfloat16, (8, 0), True),
        (torch.bfloat16, (12, 0), True),
        (torch.float32, (9, 0), True),
        (torch.float16, (9, 0), True),
    ],
    ids=str,
)
def test_capture_where_the_product_waits_for_the_device_is_refused(monkeypatch, dtype, capability, waits):
    rows = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 1), dtype=dtype)
    asked, capturing = [], [False]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: asked.append(device) or capability)
    monkeypatch.setattr(torch.version, "hip", None)
    triton_experts._refuse_capture(rows)
    assert not asked
    capturing[0] = True
    if not waits:
        triton_experts._refuse_capture(rows)
    else:
        number = f"{capability[0]}.{capability[1]}"
        with pytest.raises(RuntimeError, match=f"in {dtype} on compute capability {number}.*choose 'batched_mm'"):
            triton_experts._refuse_capture(rows)
    assert asked == [rows.device]


def test_every_product_asks_whether_a_graph_is_captured(tiny_config, monkeypatch):
    def refuse(rows):
        raise RuntimeError("captured")

    hidden_states, choices, weights = torch.randn(6, 32, requires_grad=True), distinct(6, 2, 4), torch.rand(6, 2)
    output = build(tiny_config())(hidden_states, choices, weights)
    monkeypatch.setattr(triton_experts, "_refuse_capture", refuse)
    with pytest.raises(RuntimeError, match="captured"):
        output.sum().backward()
    with pytest.raises(RuntimeError, match="captured"):
        build(tiny_config())(hidden_states, choices, weights)
    # The kernels for few tokens wait for nothing.
    with torch.no_grad():
        build(tiny_config())(hidden_states, choices, weights)


@pytest.mark.gpu
def test_training_step_in_a_graph_computes_or_says_why_not(tiny_config):
    dtype = torch.bfloat16
    experts = build(tiny_config(hidden_size=64, intermediate_size=48), dtype=dtype).cuda()
    hidden_states = torch.randn(200, 64, device="cuda", dtype=dtype, requires_grad=True)
    choices, weights = distinct(200, 2, 4).cuda(), torch.rand(200, 2, device="cuda", dtype=dtype)
    leaves = [hidden_states, *experts.parameters()]

    def step():
        return torch.autograd.grad(experts(hidden_states, choices, weights).sum(), leaves)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        expected = step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    if torch.cuda.get_device_capability()[0] in (9, 10):
        with torch.cuda.graph(graph):
            found = step()
        graph.replay()
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b)
    else:
        with pytest.raises(RuntimeError, match="on compute capability"), torch.cuda.graph(graph):
            step()


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
