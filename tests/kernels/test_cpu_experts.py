"""`grinmoe_cpu` held to the reference loop: odd shapes, what it leaves out, and what it refuses."""

from __future__ import annotations

import copy

import pytest
import torch
from torch._subclasses import FakeTensor, FakeTensorMode

import grinmoe.kernels.cpu as cpu_experts
from grinmoe.kernels import side_by_side
from grinmoe.kernels.cpu_products import Products, by_onednn, by_torch
from grinmoe.modeling_grinmoe import GrinMoeExperts
from tests.tolerances import FAST_PATH_BFLOAT16, FAST_PATH_FLOAT32


def spread(num_experts: int, tokens: int = 40) -> torch.Tensor:
    """(T, 2) distinct experts."""
    return torch.stack([torch.randperm(num_experts)[:2] for _ in range(tokens)])


def build(config, implementation: str) -> GrinMoeExperts:
    config._experts_implementation = implementation
    torch.manual_seed(0)
    experts = GrinMoeExperts(config)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return experts


def results(experts, choices, dtype=torch.float32):
    """Output, and gradients of the input, of the weights and of whichever parameters train."""
    torch.manual_seed(1)
    hidden_states = torch.randn(choices.shape[0], experts.hidden_dim).to(dtype).requires_grad_()
    weights = torch.rand(choices.shape).to(dtype).requires_grad_()
    output = experts(hidden_states, choices, weights)
    upstream = torch.randn(output.shape).to(output.dtype)
    inputs = [hidden_states, weights, *(p for p in experts.parameters() if p.requires_grad)]
    return [output, *torch.autograd.grad((output * upstream).sum(), inputs)]


ONEDNN = Products(by_onednn, by_onednn, by_onednn)
MIXED = Products(by_torch, by_onednn, by_torch)


@pytest.fixture(params=["as it comes", "oneDNN", "both", "several threads", "several threads, oneDNN"])
def way(request, monkeypatch):
    """Every way to compute the experts, also those that sizes as small as a test's do not take by themselves."""
    if "oneDNN" in request.param:
        monkeypatch.setattr(cpu_experts, "products_for", lambda *_: ONEDNN)
    if request.param == "both":
        monkeypatch.setattr(cpu_experts, "products_for", lambda *_: MIXED)
    if "threads" in request.param:
        monkeypatch.setattr(cpu_experts, "LEAST_FLOPS", 0.0)
        monkeypatch.setattr(side_by_side, "LEAST_FLOPS", 0.0)
        monkeypatch.setattr(side_by_side, "MOST_IMBALANCE", 1e9)
    threads = torch.get_num_threads()
    torch.set_num_threads(3 if "threads" in request.param else threads)
    yield request.param
    torch.set_num_threads(threads)


def assert_like_the_loop(config, choices, prepare=lambda experts: None, **options):
    pair = []
    for implementation in ("eager", "grinmoe_cpu"):
        experts = build(copy.deepcopy(config), implementation)
        prepare(experts)
        pair.append(results(experts, choices, **options))
    bound = FAST_PATH_BFLOAT16 if options.get("dtype") == torch.bfloat16 else FAST_PATH_FLOAT32
    for expected, found in zip(*pair, strict=True):
        assert found.dtype == expected.dtype
        assert (found - expected).abs().max() <= bound * expected.abs().max()


@pytest.mark.parametrize("tokens, top_k", [(1, 1), (1, 4), (33, 3), (0, 2)])
def test_odd_shapes(tiny_config, way, tokens, top_k):
    choices = torch.stack([torch.randperm(5)[:top_k] for _ in range(tokens)] or [torch.empty(0, dtype=int)])
    config = tiny_config(num_local_experts=5, num_experts_per_tok=top_k, intermediate_size=7)
    if tokens == 0:
        output = build(config, "grinmoe_cpu")(torch.empty(0, 32), torch.empty(0, 2, dtype=int), torch.empty(0, 2))
        assert output.shape == (0, 32)
    else:
        assert_like_the_loop(config, choices)


def test_choices_served_elsewhere_add_nothing(tiny_config, way):
    """Expert parallelism marks them with the number of local experts."""
    choices = torch.tensor([[0, 4], [4, 4], [3, 1], [4, 2]])
    assert_like_the_loop(tiny_config(), choices)
    output = build(tiny_config(), "grinmoe_cpu")(torch.ones(4, 32), choices, torch.ones(4, 2))
    assert (output[1] == 0).all() and (output[0] != 0).any()


@pytest.mark.parametrize("frozen", [("gate_up_proj",), ("down_proj",), ("gate_up_proj", "down_proj")], ids=str)
def test_frozen_experts(tiny_config, way, frozen):
    def freeze(experts):
        for name in frozen:
            getattr(experts, name).requires_grad_(False)

    assert_like_the_loop(tiny_config(), spread(4), freeze)


def test_bfloat16(tiny_config):
    assert_like_the_loop(tiny_config(), spread(4), lambda experts: experts.bfloat16(), dtype=torch.bfloat16)


def test_autocast(tiny_config):
    """Products in bfloat16, master weights and their gradients in float32."""
    experts, choices = build(tiny_config(), "grinmoe_cpu"), spread(4)
    expected = results(experts, choices)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = results(experts, choices)
    for a, b in zip(expected, found, strict=True):
        assert b.dtype == torch.float32
        assert 0 < (a - b).abs().max() <= FAST_PATH_BFLOAT16 * a.abs().max()


def test_only_input_and_pre_activation_are_kept(tiny_config):
    """Goal G4: unique storages saved for the backward, parameters excluded, at most 1.1 (T H + T K 2I) elements."""
    config = tiny_config(hidden_size=128, intermediate_size=96)
    experts = build(config, "grinmoe_cpu")
    parameters = {p.untyped_storage().data_ptr() for p in experts.parameters()}
    kept = {}

    def keep(tensor):
        if tensor.is_floating_point() and tensor.untyped_storage().data_ptr() not in parameters:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    hidden_states = torch.randn(200, 128, requires_grad=True)
    weights = torch.rand(200, 2, requires_grad=True)
    choices = torch.stack([torch.randperm(4)[:2] for _ in range(200)])
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        experts(hidden_states, choices, weights)
    minimum = 4 * (200 * 128 + 200 * 2 * 2 * 96)
    assert minimum <= sum(kept.values()) <= 1.1 * minimum


def test_autocast_keeps_no_copy_of_the_weights(tiny_config):
    """A bfloat16 copy of all experts, kept for the backward, is 2.5 GB a layer at the released size."""
    experts = build(tiny_config(), "grinmoe_cpu")
    parameters = {parameter.untyped_storage().data_ptr() for parameter in experts.parameters()}
    kept = []

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in parameters:
            kept.append(tensor.numel())
        return tensor

    hidden_states, weights = torch.randn(2, 32, requires_grad=True), torch.rand(2, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        experts(hidden_states, spread(4, 2), weights)
    assert kept and max(kept) < experts.down_proj.numel()


@pytest.mark.parametrize("names", [("gate_up_proj",), ("down_proj",)], ids=str)
def test_experts_without_tokens_have_a_gradient_of_zero(tiny_config, way, names):
    """Also where their part of the new memory holds something else."""
    experts, choices = build(tiny_config(), "grinmoe_cpu"), torch.tensor([[0, 2], [2, 0]])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_experts, "empty_like_on_cpu", lambda weight: torch.full_like(weight, torch.nan))
        experts(torch.randn(2, 32), choices, torch.ones(2, 2)).sum().backward()
    for name in names:
        gradient = getattr(experts, name).grad
        assert gradient.isfinite().all() and (gradient[[1, 3]] == 0).all() and (gradient[[0, 2]] != 0).any()


@pytest.mark.parametrize("inference", [False, True])
def test_threads_compute_in_the_callers_mode(tiny_config, way, inference):
    """A new thread begins outside of inference mode, where an inference tensor cannot be written to."""
    experts, choices = build(tiny_config(), "grinmoe_cpu"), spread(4)
    with torch.inference_mode(inference), torch.set_grad_enabled(False):
        output = experts(torch.randn(40, 32), choices, torch.ones(40, 2))
    assert output.is_inference() == inference and output.isfinite().all()


def test_other_activations_and_devices_are_refused(tiny_config):
    experts = build(tiny_config(hidden_act="gelu"), "grinmoe_cpu")
    choices, weights = torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1)
    with pytest.raises(ValueError, match="hidden_act='silu', not 'gelu'"):
        experts(torch.ones(2, 32), choices, weights)
    with pytest.raises(ValueError, match="got tensors on meta"):
        experts(torch.ones(2, 32, device="meta"), choices, weights)


@pytest.mark.parametrize("sizes", [(9, 1, 40), (17, 31, 8), (1, 0, 0), (129, 3, 64)], ids=str)
def test_lengths_that_are_rounded_up(tiny_config, way, sizes):
    """The rows that fill a group up add nothing, and nothing is written over by them."""
    choices = torch.cat([torch.full((size, 1), expert) for expert, size in enumerate(sizes)])
    assert_like_the_loop(tiny_config(num_experts_per_tok=1), choices[torch.randperm(len(choices))])


@pytest.mark.parametrize("width", [48, 14, 7])
def test_forwards_with_and_without_gradients_are_equal_bit_by_bit(tiny_config, way, width):
    """Of any width: products are not the same to the last bit where their operands' addresses are aligned otherwise."""
    experts, choices = build(tiny_config(intermediate_size=width), "grinmoe_cpu"), spread(4, 61)
    hidden_states, weights = torch.randn(61, 32), torch.rand(61, 2)
    trained = experts(hidden_states, choices, weights)
    with torch.no_grad():
        assert torch.equal(experts(hidden_states, choices, weights), trained)


@pytest.mark.parametrize(
    "choices",
    [spread(4), torch.tensor([[2, 0]]), torch.tensor([[3]]), torch.tensor([[1, 4]]), torch.tensor([[4, 4]])],
    ids=["many", "one token", "top-1", "one elsewhere", "all elsewhere"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inference_gives_what_training_gives(tiny_config, way, choices, dtype):
    if dtype == torch.bfloat16 and way != "as it comes":
        pytest.skip("bfloat16 is torch's own product, whatever is faster in float32")
    experts = build(tiny_config(), "grinmoe_cpu").to(dtype)
    hidden_states, weights = torch.randn(len(choices), 32).to(dtype), torch.rand(choices.shape).to(dtype)
    trained = experts(hidden_states, choices, weights)
    with torch.no_grad():
        inferred = experts(hidden_states, choices, weights)
    assert trained.requires_grad and not inferred.requires_grad and inferred.dtype == dtype
    if len(choices) > 1:  # a preference loss compares a policy with its reference, and must begin at 0
        assert torch.equal(inferred, trained)
    bound = FAST_PATH_BFLOAT16 if dtype == torch.bfloat16 else FAST_PATH_FLOAT32
    assert (inferred - trained).abs().max() <= bound * trained.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [0, 5])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "every second"])
def test_inference_with_what_grouped_products_refuse(tiny_config, way, dtype, tokens, layout):
    """No tokens, float64, and weights of any strides."""
    if dtype != torch.float32 and way in ("oneDNN", "both", "several threads, oneDNN"):
        pytest.skip("oneDNN's product is for float32 alone")
    pair = []
    for implementation in ("eager", "grinmoe_cpu"):
        experts = build(tiny_config(), implementation).to(dtype).requires_grad_(False)
        for weight in experts.parameters():
            if layout == "transposed":
                weight.data = weight.data.transpose(1, 2).contiguous().transpose(1, 2)
            if layout == "every second":
                weight.data = weight.data.repeat_interleave(2, dim=2)[..., ::2]
        hidden_states = torch.linspace(-1, 1, tokens * 32, dtype=dtype).view(tokens, 32)
        weights = torch.ones(tokens, 2, dtype=dtype)
        pair.append(experts(hidden_states, torch.tensor([[0, 3], [1, 0], [2, 1], [3, 1], [0, 1]])[:tokens], weights))
    assert pair[1].dtype == dtype and pair[1].shape == (tokens, 32)
    bound = FAST_PATH_BFLOAT16 if dtype == torch.float16 else FAST_PATH_FLOAT32
    assert ((pair[1] - pair[0]).abs() <= bound * pair[0].abs().max().clamp(min=1e-6) if tokens else pair[1] == 0).all()


@pytest.mark.parametrize("train", [False, True])
def test_the_callers_default_device_is_not_followed(tiny_config, train):
    experts, choices = build(tiny_config(), "grinmoe_cpu"), spread(4)
    hidden_states, weights = torch.randn(40, 32), torch.rand(40, 2)
    with torch.set_grad_enabled(train):
        expected = experts(hidden_states, choices, weights)
        with torch.device("meta"):
            found = experts(hidden_states, choices, weights)
    assert torch.equal(found, expected)


def test_inference_without_values(tiny_config):
    """Under a fake mode nothing may depend on the choices: the operator is taken, which has shapes for it."""
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        output = build(tiny_config(), "grinmoe_cpu")(torch.ones(1, 32), torch.tensor([[0, 1]]), torch.ones(1, 2))
    assert isinstance(output, FakeTensor) and output.shape == (1, 32)


def test_a_compiled_step(tiny_config):
    """fullgraph: the operators are opaque to the compiler, whatever the sizes of the groups."""
    experts, choices = build(tiny_config(), "grinmoe_cpu"), spread(4)
    expected = results(experts, choices)
    found = results(torch.compile(experts, backend="aot_eager", fullgraph=True), choices)
    for a, b in zip(expected, found, strict=True):
        assert (a - b).abs().max() <= FAST_PATH_FLOAT32 * a.abs().max()


def test_operators_keep_their_word():
    """Shapes and strides of the fakes, no aliases, and gradients as registered."""
    arguments = [torch.randn(6, 8), torch.rand(6, 2), torch.randn(4, 10, 8), torch.randn(4, 8, 5)]
    for tensor in arguments:
        tensor.requires_grad_()
    torch.library.opcheck(cpu_experts._experts, (*arguments, spread(4, 6), None, True))
