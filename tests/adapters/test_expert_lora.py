"""LoRA on the fused experts, layer by layer: both forms of computing it against plain PEFT and a dense merge."""

from __future__ import annotations

import copy

import pytest
import torch
from peft.tuners.lora import ParamWrapper
from torch.utils._python_dispatch import TorchDispatchMode

from grinmoe.adapters.expert_lora import ExpertLora, GrinMoeLoraConfig
from grinmoe.adapters.low_rank_experts import uses_grouped_mm
from grinmoe.modeling_grinmoe import GrinMoeExperts
from tests.tolerances import FAST_PATH_BFLOAT16, FAST_PATH_FLOAT32

TOKENS, TOP_K, EXPERTS = 30, 2, 6
BOTH = ("gate_up_proj", "down_proj")
FORMS = {
    "all experts": {},
    "chosen experts": {"experts": [4, 0, 5]},
    "shared A": {"shared_a": True},
    "chosen experts with a shared A": {"experts": [1, 2], "shared_a": True},
}
IMPLEMENTATIONS = pytest.mark.parametrize("implementation", ["grouped_mm", "eager"])


@pytest.fixture
def build(tiny_config):
    """Factory of random experts under wrappers: plain PEFT's (`wrapper=ParamWrapper`) or ours."""

    def make(wrapper=ExpertLora, implementation="grouped_mm", names=BOTH, r=8, dtype=torch.float32, adapters=1, **form):
        torch.manual_seed(0)
        config = tiny_config(num_local_experts=EXPERTS)
        config._experts_implementation = implementation
        layer = GrinMoeExperts(config).requires_grad_(False)
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        layer = layer.to(dtype)
        options = {"r": r, "lora_alpha": 2 * r, "target_parameters": [f"experts.{name}" for name in names]}
        lora = GrinMoeLoraConfig(**options, **form)
        for name in names:
            layer = wrapper(layer, "default", parameter_name=name, config=lora, r=r, lora_alpha=2 * r)
        for extra in range(1, adapters):
            for nested in nested_wrappers(layer):
                nested.update_layer(f"extra{extra}", r, lora_alpha=r, config=lora)
                nested.set_adapter([*nested.active_adapters, f"extra{extra}"])
        for name, parameter in layer.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.float()  # as PEFT keeps them on a 16-bit base
                torch.nn.init.normal_(parameter, std=0.2)
        return layer

    return make


def nested_wrappers(layer) -> list:
    found = []
    while isinstance(layer, ParamWrapper):
        found.append(layer)
        layer = layer.base_layer
    return found


def spread(tokens=TOKENS, experts=EXPERTS) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.stack([torch.randperm(experts, generator=generator)[:TOP_K] for _ in range(tokens)])


def results(layer, selected, dtype=torch.float32) -> dict[str, torch.Tensor]:
    """Output, and gradients of the input, of the routing weights and of every trained factor."""
    torch.manual_seed(1)
    hidden_states = torch.randn(selected.shape[0], 32).to(dtype).requires_grad_()
    weights = torch.rand(selected.shape).to(dtype).requires_grad_()
    output = layer(hidden_states, selected, weights)
    upstream = torch.randn(output.shape).to(output.dtype)
    factors = {name: parameter for name, parameter in layer.named_parameters() if parameter.requires_grad}
    gradients = torch.autograd.grad((output * upstream).sum(), [hidden_states, weights, *factors.values()])
    return dict(zip(["output", "hidden_states", "weights", *factors], [output, *gradients]))


def assert_close(found: dict, expected: dict, bound: float = FAST_PATH_FLOAT32) -> None:
    assert found.keys() == expected.keys() and len(found) >= 3
    for name, tensor in found.items():
        assert tensor.dtype == expected[name].dtype and tensor.shape == expected[name].shape
        error = (tensor.double() - expected[name].double()).abs().max()
        assert error <= bound * expected[name].double().abs().max(), name


@pytest.fixture
def plain_like(build):
    """Plain PEFT's wrappers with the same factors as one of ours, which leave it by its state dict."""

    def make(layer, **options):
        plain = build(wrapper=ParamWrapper, **options)
        plain.load_state_dict(layer.state_dict())
        return plain

    return make


@IMPLEMENTATIONS
@pytest.mark.parametrize("form", FORMS)
def test_output_and_every_gradient_are_those_of_plain_peft(build, plain_like, implementation, form):
    layer = build(implementation=implementation, **FORMS[form])
    expected = results(plain_like(layer), spread())
    found = results(layer, spread())
    # What plain PEFT trains in E copies is trained once here: its gradients add up.
    for wrapper, prefix in zip(nested_wrappers(layer), ("", "base_layer.")):
        choice = wrapper.choices["default"]
        key_a, key_b = f"{prefix}lora_A.default.weight", f"{prefix}lora_B.default.weight"
        blocks = expected[key_a].unflatten(0, (EXPERTS, -1))[list(choice.experts)]
        expected[key_a] = blocks.sum(0) if choice.shared_a else blocks.flatten(0, 1)
        expected[key_b] = choice.contract("lora_B", expected[key_b], check=False)
    assert_close(found, expected)


@IMPLEMENTATIONS
@pytest.mark.parametrize("names", [("gate_up_proj",), ("down_proj",)])
def test_one_of_the_two_weights_can_be_adapted_alone(build, plain_like, implementation, names):
    layer = build(implementation=implementation, names=names)
    assert_close(results(layer, spread()), results(plain_like(layer, names=names), spread()))


@IMPLEMENTATIONS
@pytest.mark.parametrize("r", [1, 3, 16])
def test_any_rank_serves(build, plain_like, implementation, r):
    layer = build(implementation=implementation, r=r)
    assert_close(results(layer, spread()), results(plain_like(layer, r=r), spread()))


@IMPLEMENTATIONS
def test_active_adapters_add_up(build, plain_like, implementation):
    layer = build(implementation=implementation, adapters=2)
    found = results(layer, spread())
    assert sum("extra1" in name for name in found) == 4
    assert_close(found, results(plain_like(layer, adapters=2), spread()))


@IMPLEMENTATIONS
@pytest.mark.parametrize("form", FORMS)
def test_merged_weights_give_the_same(build, implementation, form):
    layer = build(implementation=implementation, **FORMS[form])
    expected = results(layer, spread())
    before = {name: parameter.clone() for name, parameter in layer.get_base_layer().named_parameters()}
    for wrapper in nested_wrappers(layer):
        delta = wrapper.get_delta_weight("default")
        wrapper.merge(safe_merge=True)
        merged = getattr(layer.get_base_layer(), wrapper.parameter_name)
        assert (merged - before[wrapper.parameter_name] - delta).abs().max() < 1e-6 * merged.abs().max()
        assert delta.abs().max() > 0.1
    dense = copy.deepcopy(layer.get_base_layer())
    for found in (results(layer.requires_grad_(False), spread()), results(dense, spread())):
        assert_close(found, {name: expected[name] for name in ("output", "hidden_states", "weights")})
    for wrapper in nested_wrappers(layer):
        wrapper.unmerge()
    for name, parameter in layer.get_base_layer().named_parameters():
        assert (parameter - before[name]).abs().max() < 1e-6


def test_a_merge_is_rounded_once(build):
    """In bfloat16 the merged weight is the nearest to the exact sum, which rounding the delta first would not give."""
    layer = build(dtype=torch.bfloat16, names=("down_proj",))
    base = layer.get_base_layer().down_proj.detach().clone()
    lora_a, lora_b = layer.factors(["default"], torch.float32)
    layer.merge()
    expected = (base.float() + lora_b @ lora_a).bfloat16()
    assert torch.equal(layer.get_base_layer().down_proj, expected)


def test_what_is_not_finite_is_not_merged(build):
    layer = build()
    layer.lora_B["default"].weight.data[0, 0] = torch.nan
    base = layer.get_base_layer().down_proj.detach().clone()
    with pytest.raises(ValueError, match="'default' holds NaN"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.get_base_layer().down_proj, base)


@IMPLEMENTATIONS
def test_choices_served_elsewhere_add_nothing(build, implementation):
    """Expert parallelism marks them with E: as if their weight were zero, and no gradient comes from them."""
    selected = spread()
    absent = torch.rand(selected.shape, generator=torch.Generator().manual_seed(0)) < 0.4
    layer = build(implementation=implementation)
    found = results(layer, torch.where(absent, EXPERTS, selected))
    torch.manual_seed(1)
    hidden_states = torch.randn(TOKENS, 32)
    weights = torch.rand(selected.shape)
    assert (found["weights"][absent] == 0).all() and absent.any()
    output = layer(hidden_states, selected, weights.masked_fill(absent, 0))
    assert (found["output"] - output).abs().max() <= FAST_PATH_FLOAT32 * output.abs().max()
    alone = results(layer, torch.full_like(selected, EXPERTS))
    for tensor in alone.values():
        assert (tensor == 0).all()


@IMPLEMENTATIONS
@pytest.mark.parametrize("tokens", [0, 1])
def test_few_tokens(build, plain_like, implementation, tokens):
    """One token, as in decoding; and none. Factors of idle experts have zero gradients, not none, as data parallelism
    expects."""
    layer = build(implementation=implementation)
    if tokens == 0:
        empty = torch.empty(0, TOP_K)
        assert layer(torch.empty(0, 32), empty.long(), empty).shape == (0, 32)
    else:
        assert_close(results(layer, spread(1)), results(plain_like(layer), spread(1)))
        chosen = build(
            implementation=implementation, experts=[int(({*range(EXPERTS)} - {*spread(1)[0].tolist()}).pop())]
        )
        found = results(chosen, spread(1))
        assert len(found) == 7
        for name, tensor in found.items():
            assert "lora_" not in name or (tensor == 0).all()


@IMPLEMENTATIONS
def test_a_bfloat16_base_keeps_its_dtype_and_the_factors_theirs(build, plain_like, implementation):
    layer = build(implementation=implementation, dtype=torch.bfloat16)
    found = results(layer, spread(), torch.bfloat16)
    assert found["output"].dtype == torch.bfloat16 and found["lora_A.default.weight"].dtype == torch.float32
    exact = plain_like(layer.float())
    expected = results(exact, spread())
    for name, tensor in found.items():
        assert (tensor.float() - expected[name]).abs().max() <= FAST_PATH_BFLOAT16 * expected[name].abs().max(), name


@IMPLEMENTATIONS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_computes_in_its_dtype(build, implementation, dtype, monkeypatch):
    layer = build(implementation=implementation, dtype=dtype)
    seen = []
    original = layer.get_base_layer()._apply_gate
    monkeypatch.setattr(layer.get_base_layer(), "_apply_gate", lambda rows: seen.append(rows.dtype) or original(rows))
    with torch.autocast("cpu", torch.bfloat16):
        found = results(layer, spread())
    assert set(seen) == {torch.bfloat16} and found["output"].dtype == torch.float32
    expected = results(build(implementation="eager"), spread())
    assert_close(found, expected, FAST_PATH_BFLOAT16)


def test_grouped_products_are_used_where_the_rule_says(build, monkeypatch):
    calls = []
    original = torch.nn.functional.grouped_mm
    monkeypatch.setattr(
        torch.nn.functional, "grouped_mm", lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs)
    )
    results(build(implementation="eager"), spread())
    results(build(implementation="grinmoe_cpu"), spread())
    assert not calls
    results(build(implementation="grouped_mm"), spread())
    assert len(calls) == 6


def test_the_rule_for_grouped_products(tiny_config):
    def serves(dtype=torch.float32, implementation="grouped_mm", **sizes) -> bool:
        config = tiny_config(**sizes)
        config._experts_implementation = implementation
        return uses_grouped_mm(GrinMoeExperts(config).to(dtype), dtype)

    assert serves() and serves(torch.bfloat16) and serves(implementation="batched_mm")
    assert not serves(implementation="eager") and not serves(torch.float16) and not serves(torch.float64)
    assert not serves(intermediate_size=6), "rows of 24 bytes"
    assert serves(intermediate_size=12) and not serves(torch.bfloat16, intermediate_size=12)
    experts = GrinMoeExperts(tiny_config())
    experts.config._experts_implementation = "grouped_mm"
    assert not uses_grouped_mm(experts, torch.bfloat16), "the weights would have to be converted"
    experts.down_proj = torch.nn.Parameter(experts.down_proj.to(torch.int8), requires_grad=False)
    assert not uses_grouped_mm(experts, torch.float32), "quantised"


class LargestStorage(TorchDispatchMode):
    """The largest storage that an operation returns and that was not there before, in bytes."""

    def __init__(self, layer):
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in layer.parameters()}
        self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return result


@IMPLEMENTATIONS
@pytest.mark.parametrize("form", FORMS)
def test_nothing_as_large_as_the_experts_is_made(build, plain_like, implementation, form):
    layer = build(implementation=implementation, r=2, **FORMS[form])
    selected = spread(8)
    stack_bytes = 4 * layer.get_base_layer().down_proj.numel()
    sizes = {}
    for name, candidate in (("ours", layer), ("plain PEFT", plain_like(layer, r=2))):
        with LargestStorage(candidate) as mode:
            results(candidate, selected)
        sizes[name] = mode.largest
    assert sizes["plain PEFT"] >= stack_bytes, "what is measured here cannot see the delta"
    assert sizes["ours"] < stack_bytes / 2


class TestRefusals:
    def test_an_expert_that_is_not_there(self, build):
        with pytest.raises(ValueError, match=r"experts=\[2, 6\]: the model's experts are 0 to 5"):
            build(experts=[2, 6])

    def test_offloaded_experts(self, build):
        layer = build()
        layer.get_base_layer().to("meta")
        with pytest.raises(ValueError, match="gate_up_proj is offloaded"):
            layer(torch.randn(3, 32), spread(3), torch.rand(3, TOP_K))

    def test_hooks_that_would_not_run(self, build):
        layer = build()
        layer.get_base_layer().register_forward_hook(lambda *_: None)
        with pytest.raises(ValueError, match="register them on the sparse block"):
            layer(torch.randn(3, 32), spread(3), torch.rand(3, TOP_K))

    def test_a_plain_wrapper_in_between(self, build):
        layer = build(wrapper=ParamWrapper, names=("gate_up_proj",))
        config = GrinMoeLoraConfig(r=2, target_parameters=["experts.down_proj"])
        layer = ExpertLora(layer, "default", parameter_name="down_proj", config=config, r=2, lora_alpha=2)
        with pytest.raises(ValueError, match="call use_expert_lora"):
            layer(torch.randn(3, 32), spread(3), torch.rand(3, TOP_K))

    def test_adapters_by_row(self, build):
        with pytest.raises(ValueError, match="mixed adapter batches"):
            build()(torch.randn(3, 32), spread(3), torch.rand(3, TOP_K), adapter_names=["default"] * 3)

    def test_merging_into_quantised_weights(self, build):
        layer = build()
        base = layer.get_base_layer()
        base.down_proj = torch.nn.Parameter(base.down_proj.to(torch.int8), requires_grad=False)
        with pytest.raises(ValueError, match="down_proj is quantised"):
            layer.merge()

    @pytest.mark.parametrize(
        "change, message",
        [
            (lambda full: full[0].add_(1), "the experts' A differ"),
            (lambda full: full[1].add_(1), "experts other than"),
        ],
    )
    def test_factors_that_a_compact_form_would_lose(self, build, change, message):
        layer = build(experts=[1, 2], shared_a=True)
        state_dict = layer.state_dict()
        change([state_dict["lora_A.default.weight"][8:16], state_dict["lora_B.default.weight"][:, 0]])
        with pytest.raises(RuntimeError, match=message):
            layer.load_state_dict(state_dict, strict=False)


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
def test_grouped_products_on_a_gpu(build, form):
    """bfloat16 on CUDA against float32 on the CPU: `pytest -m gpu tests/test_expert_lora.py`."""
    layer = build(implementation="grouped_mm", dtype=torch.bfloat16, **FORMS[form])
    expected = results(copy.deepcopy(layer).float(), spread())
    layer = layer.cuda()
    assert uses_grouped_mm(layer.get_base_layer(), torch.bfloat16)
    torch.manual_seed(1)
    hidden_states = torch.randn(TOKENS, 32).bfloat16().cuda().requires_grad_()
    weights = torch.rand(TOKENS, TOP_K).bfloat16().cuda().requires_grad_()
    output = layer(hidden_states, spread().cuda(), weights)
    output.backward(torch.randn(output.shape).bfloat16().cuda())
    found = {"output": output, "hidden_states": hidden_states.grad, "weights": weights.grad}
    found |= {name: parameter.grad for name, parameter in layer.named_parameters() if parameter.requires_grad}
    for name, tensor in found.items():
        error = (tensor.detach().float().cpu() - expected[name]).abs().max()
        assert error <= FAST_PATH_BFLOAT16 * expected[name].abs().max(), name
