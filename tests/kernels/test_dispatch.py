"""The default implementation of the experts: what it takes where, and that it computes what was asked for."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from grinmoe.kernels import dispatch
from grinmoe.kernels.dispatch import implementation_for
from grinmoe.kernels.small_batch_gemm import MAX_CHOICES
from grinmoe.modeling_grinmoe import GrinMoeExperts
from tests.tolerances import FAST_PATH_BFLOAT16, FAST_PATH_FLOAT32

CHOICES = torch.tensor([[0, 2], [1, 3], [2, 0], [3, 1], [0, 1]])


@pytest.fixture
def build(tiny_config):
    def make(implementation="grinmoe", dtype=torch.float32, **fields) -> GrinMoeExperts:
        torch.manual_seed(0)
        experts = GrinMoeExperts(tiny_config(**fields))
        experts.config._experts_implementation = implementation
        for parameter in experts.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        return experts.to(dtype)

    return make


def results(experts, dtype=torch.float32) -> list[torch.Tensor]:
    """Output, and gradients of the input, the weights and the parameters."""
    torch.manual_seed(1)
    hidden_states = torch.randn(5, experts.hidden_dim).to(dtype).requires_grad_()
    weights = torch.rand(5, 2).to(dtype).requires_grad_()
    output = experts(hidden_states, CHOICES, weights)
    return [output, *torch.autograd.grad(output.sum(), [hidden_states, weights, *experts.parameters()])]


def assert_close(found, expected, bound):
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        assert (a - b).abs().max() <= bound * b.abs().max()


def test_it_is_the_default_and_yields_to_what_is_asked_for(tiny_model):
    model = tiny_model()
    assert model.config._experts_implementation == "grinmoe"
    model.set_experts_implementation("eager")
    assert model.config._experts_implementation == "eager"


@pytest.mark.parametrize(
    "fields, dtype, expected",
    [
        ({}, torch.float32, "grinmoe_cpu"),
        ({"hidden_act": "gelu"}, torch.float32, "grouped_mm"),
        ({}, torch.bfloat16, "grouped_mm"),
    ],
    ids=["float32", "gelu", "bfloat16"],
)
def test_what_serves_on_a_cpu(build, fields, dtype, expected):
    experts = build(dtype=dtype, **fields)
    assert implementation_for(experts, torch.ones(5, 32, dtype=dtype), CHOICES) == expected
    bound = FAST_PATH_FLOAT32 if dtype == torch.float32 else FAST_PATH_BFLOAT16
    assert_close(results(experts, dtype), results(build("eager", dtype, **fields), dtype), bound)


def serves(experts: GrinMoeExperts, choices: torch.Tensor, device: str = "meta") -> str:
    hidden_states = torch.ones(len(choices), experts.hidden_dim, dtype=experts.down_proj.dtype, device=device)
    return implementation_for(experts, hidden_states, choices)


class Wrapped(torch.Tensor):
    """As quantisers' weights are, which know their own products."""


def assignments(tokens: int) -> torch.Tensor:
    return torch.tensor([[0, 2]]).expand(tokens, -1)


def test_without_kernels_for_it_batched_mm_decodes_on_another_device(build):
    """It then copies no more weights than the layer has."""
    experts = build()
    assert serves(experts, CHOICES) == "grouped_mm"
    with torch.no_grad():
        assert serves(experts, CHOICES) == "grouped_mm"
        assert serves(experts, CHOICES[:2]) == "batched_mm"
    assert serves(experts, CHOICES[:2]) == "grouped_mm"


@pytest.fixture
def kernels_anywhere(monkeypatch):
    """A CPU is taken for a GPU there; the kernels run in Triton's interpreter."""
    monkeypatch.setattr(dispatch, "runs_kernels", lambda device: True)


def on_gpu(experts: GrinMoeExperts, choices: torch.Tensor) -> str:
    return serves(experts, choices, device="cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_kernels_for_few_tokens_decode_on_a_gpu(build, kernels_anywhere, dtype):
    experts = build(dtype=dtype)
    assert on_gpu(experts, CHOICES) != "grinmoe_triton"
    with torch.no_grad():
        for tokens in (1, 5, MAX_CHOICES // 2):
            assert on_gpu(experts, assignments(tokens)) == "grinmoe_triton"
        assert on_gpu(experts, assignments(MAX_CHOICES // 2 + 1)) != "grinmoe_triton"


@pytest.mark.parametrize(
    "fields",
    [
        {"hidden_act": "gelu"},
        {"hidden_size": 36, "num_attention_heads": 6, "num_key_value_heads": 2},
        {"intermediate_size": 20},
        {"num_local_experts": 130},
    ],
    ids=str,
)
def test_experts_that_the_kernels_do_not_take_decode_as_before(build, kernels_anywhere, fields):
    experts = build(dtype=torch.bfloat16, **fields)
    with torch.no_grad():
        assert on_gpu(experts, CHOICES[:2]) != "grinmoe_triton"


def test_weights_of_another_kind_decode_as_before(build, kernels_anywhere):
    mixed, wrapped = build(), build()
    mixed.down_proj.data = mixed.down_proj.data.bfloat16()
    wrapped.down_proj = torch.nn.Parameter(wrapped.down_proj.data.as_subclass(Wrapped))
    with torch.no_grad():
        assert "grinmoe_triton" not in (on_gpu(mixed, CHOICES), on_gpu(wrapped, CHOICES))
        assert on_gpu(build(dtype=torch.float64), CHOICES[:2]) != "grinmoe_triton"


def test_dropout_and_derivatives_stay_with_grouped_products(build, kernels_anywhere):
    """Without a gradient too, a forward in training mode drops; and forward mode needs products that autograd knows."""
    experts, served = build(expert_dropout=0.5), []
    with torch.no_grad():
        assert on_gpu(experts.train(), CHOICES) != "grinmoe_triton"
        assert on_gpu(experts.eval(), CHOICES) == "grinmoe_triton"
        with torch.autograd.forward_ad.dual_level():
            assert on_gpu(experts, CHOICES) != "grinmoe_triton"
        torch.func.vmap(lambda x: served.append(on_gpu(experts, CHOICES)) or x)(torch.ones(2))
    assert served and "grinmoe_triton" not in served


def test_only_gpus_of_nvidia_run_the_kernels_by_default(monkeypatch):
    capabilities = {0: (8, 0), 1: (7, 5), 2: (9, 0)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capabilities[device.index])
    cards = [torch.device("cuda", number) for number in capabilities]
    assert [dispatch.runs_kernels(card) for card in cards] == [True, False, True]
    assert not any(dispatch.runs_kernels(torch.device(kind)) for kind in ("cpu", "xpu", "mps", "meta"))
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert not dispatch.runs_kernels(cards[0])
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(dispatch, "HAS_TRITON", False)
    assert not dispatch.runs_kernels(cards[0])


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "fullgraph"])
def test_the_default_decodes_by_the_kernels(build, kernels_anywhere, compiled):
    experts = build()
    hidden_states, weights = torch.randn(5, 32), torch.rand(5, 2)
    graphs = []

    def recorded(graph, inputs):
        graphs.append(graph.print_readable(print_output=False))
        return graph

    torch.compiler.reset()
    step = torch.compile(experts, backend=recorded, fullgraph=True) if compiled else experts
    with torch.no_grad():
        found = step(hidden_states, CHOICES, weights)
        assert_close([found], [build("eager")(hidden_states, CHOICES, weights)], FAST_PATH_FLOAT32)
    assert ["grinmoe.few_tokens_experts" in graph for graph in graphs] == [True] * compiled


def test_an_export_on_a_gpu_takes_grouped_products(build, kernels_anywhere):
    with torch.no_grad():
        program = torch.export.export(build(), (torch.randn(5, 32), CHOICES, torch.rand(5, 2)), strict=False)
    assert not any("grinmoe" in str(node.target) for node in program.graph.nodes)


def saved_bytes(experts: GrinMoeExperts) -> int:
    """What a forward under autocast keeps for the backward, parameters aside."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in experts.parameters()}
    found: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    hidden_states = torch.randn(5, experts.hidden_dim, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            kept = experts(hidden_states, CHOICES, torch.rand(5, 2, requires_grad=True))
    assert kept.requires_grad and found
    return sum(found.values())


@pytest.mark.parametrize("frozen", [False, True], ids=["trains", "frozen"])
def test_autocast_keeps_no_copy_of_the_weights(build, frozen):
    experts = build(num_local_experts=16).requires_grad_(not frozen)
    assert saved_bytes(experts) < 2 * experts.down_proj.numel()


def under_autocast(experts: GrinMoeExperts) -> list[torch.Tensor]:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return results(experts)


@pytest.mark.parametrize("fields", [{}, {"hidden_act": "gelu"}], ids=["silu", "gelu"])
def test_autocast_reaches_grouped_products(build, fields):
    """Transformers' own function would compute in the weights' float32."""
    found, expected = under_autocast(build(**fields)), results(build("eager", **fields))
    assert_close(found, expected, FAST_PATH_BFLOAT16)
    assert all((a - b).abs().max() > 0 for a, b in zip(found, expected))


def test_autocast_computes_what_transformers_function_computes_of_cast_weights(build):
    """Bit for bit, with an expert without tokens, dropout, and assignments to another rank's experts."""
    cast = build("grouped_mm", dtype=torch.bfloat16, num_local_experts=5, expert_dropout=0.5)
    found_of = build(num_local_experts=5, expert_dropout=0.5)
    for choices in (CHOICES, torch.tensor([[0, 5], [5, 5], [3, 1], [1, 0], [5, 2]])):
        found_of._is_expert_parallel = cast._is_expert_parallel = bool((choices == 5).any())
        torch.manual_seed(2)
        hidden_states, weights = torch.randn(5, 32).bfloat16(), torch.rand(5, 2).masked_fill(choices == 5, 0.0)
        results_of = []
        for experts in (found_of, cast):
            given = hidden_states.clone().requires_grad_(), weights.clone().requires_grad_()
            torch.manual_seed(3)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=experts is found_of):
                output = experts(given[0], choices, given[1])
            gradients = torch.autograd.grad(output.sum(), [*given, *experts.parameters()])
            results_of.append([output, *(gradient.bfloat16() for gradient in gradients)])
        assert all(map(torch.equal, *results_of))
        assert (results_of[0][3][4] == 0).all()


def test_autocast_without_a_gradient_gives_the_same(build):
    experts = build()
    with torch.no_grad():
        torch.manual_seed(1)
        hidden_states = torch.randn(5, 32)
        weights = torch.rand(5, 2)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = experts(hidden_states, CHOICES, weights)
    assert torch.equal(found, under_autocast(experts)[0])


def test_autocast_with_checkpointing_compiles_to_one_graph(build):
    """Checkpointing recomputes what autocast computed, and a compiled step holds both."""
    experts = build()

    def step(hidden_states, weights):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return checkpoint(experts, hidden_states, CHOICES, weights, use_reentrant=False)

    torch.compiler.reset()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    expected = under_autocast(experts)
    for function in (step, compiled):
        torch.manual_seed(1)
        given = torch.randn(5, 32).requires_grad_(), torch.rand(5, 2).requires_grad_()
        output = function(*given)
        found = [output, *torch.autograd.grad(output.sum(), [*given, *experts.parameters()])]
        assert_close(found, expected, FAST_PATH_BFLOAT16)


def test_autocast_under_function_transforms(build):
    """Per-sample gradients, and the derivative of a derivative."""
    experts = build()
    names, values = zip(*((name, p.detach()) for name, p in experts.named_parameters()))
    torch.manual_seed(1)
    hidden_states, weights = torch.randn(5, 32), torch.rand(5, 2)

    def loss(values, hidden_states):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = torch.func.functional_call(experts, dict(zip(names, values)), (hidden_states, CHOICES, weights))
        return output.square().sum()

    inputs = [torch.nn.Parameter(value.clone()) for value in values]
    outer = hidden_states.clone().requires_grad_()
    expected = torch.autograd.grad(loss(inputs, outer), inputs, create_graph=True)
    assert_close(torch.func.grad(loss)(values, hidden_states), expected, FAST_PATH_BFLOAT16)
    (second,) = torch.autograd.grad(expected[0].sum(), outer)
    inner = torch.func.grad(lambda h: torch.func.grad(loss)(values, h)[0].sum())(hidden_states)
    assert_close([second], [inner], FAST_PATH_BFLOAT16)


def test_an_export_holds_no_operator_of_ours(tiny_model):
    model = tiny_model().eval()
    program = torch.export.export(model, (), {"input_ids": torch.arange(6)[None], "use_cache": False}, strict=False)
    assert not any("grinmoe" in str(node.target) for node in program.graph.nodes)


class Asks(torch.nn.Module):
    def forward(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor + 1 if dispatch.is_exporting() else tensor * 3


@pytest.mark.parametrize("strict", [False, True])
def test_code_that_is_compiled_is_not_taken_for_an_export(strict):
    """torch 2.11 compiles `torch.compiler.is_exporting()` to True in both, and the default then never took our kernels."""
    ones = torch.ones(2)
    torch.compiler.reset()
    assert torch.equal(torch.compile(Asks(), backend="eager", fullgraph=True)(ones), 3 * ones)
    assert torch.equal(torch.export.export(Asks(), (ones,), strict=strict).module()(ones), 2 * ones)
    assert torch.equal(Asks()(ones), 3 * ones)
