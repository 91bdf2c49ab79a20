"""The model against the reference code's outputs, gradients and greedy tokens, on every attention and experts path."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file

from grinmoe.checkpoint_grinmoe import official_state_dict
from grinmoe.routing_grinmoe import RoutingNoise
from tests.tolerances import GOLDEN, GOLDEN_DIGEST, GOLDEN_GRADIENT

ATTENTION = ["eager", "sdpa", "flex_attention"]
EXPERTS = ["eager", "grouped_mm", "batched_mm", "grinmoe_cpu", "grinmoe_triton"]
CASES = [
    *[(name, case) for name in ("golden-a", "golden-b", "golden-c") for case in ("plain", "leftpad", "leftpad_pos")],
    ("golden-c", "long"),
    ("golden-c", "long_leftpad"),
]
# Flex attention is compiled anew for each shape of mask, which takes up to 20 seconds; one window is enough for `make test`.
FORWARDS = [
    pytest.param(name, case, attention, marks=[pytest.mark.integration] * (attention == "flex_attention" and heavy))
    for name, case in CASES
    for attention in ATTENTION
    for heavy in [name != "golden-b"]
]


def use(model, attention: str, experts: str):
    model.set_attn_implementation(attention)
    model.set_experts_implementation(experts)
    assert model.config._attn_implementation == attention and model.config._experts_implementation == experts
    return model


def assert_close(found: torch.Tensor, expected: torch.Tensor, field: str) -> None:
    torch.testing.assert_close(found, expected, **GOLDEN[field], msg=lambda text: f"{field}: {text}")


class RecordedWeights:
    """Collects the routing weights of every layer, which the model does not return."""

    def __init__(self, model):
        self.layers: list[torch.Tensor] = []
        self.hooks = [
            layer.block_sparse_moe.gate.register_forward_hook(lambda _, __, output: self.layers.append(output[1]))
            for layer in model.model.layers
        ]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for hook in self.hooks:
            hook.remove()

    def stacked(self) -> torch.Tensor:
        return torch.stack([layer.detach() for layer in self.layers])


@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("name, case, attention", FORWARDS)
def test_forward_matches(goldens, golden_models, name, case, attention, experts):
    golden, model = goldens[name], use(golden_models[name], attention, experts)
    inputs = golden.model_inputs(case)
    mask = inputs.get("attention_mask")
    valid = torch.ones_like(inputs["input_ids"], dtype=torch.bool) if mask is None else mask.bool()
    with torch.no_grad(), RecordedWeights(model) as recorded:
        output = model(**inputs, output_router_logits=True, output_hidden_states=True)

    assert_close(output.logits[valid], golden[f"{case}.logits"][valid], "logits")
    assert_close(output.loss, golden[f"{case}.loss"], "loss")
    if f"{case}.router_logits" not in golden:
        return
    tokens = valid.reshape(-1)
    found = torch.stack(output.router_logits)[:, tokens]
    assert_close(found, golden[f"{case}.router_logits"][:, tokens], "router_logits")
    assert torch.equal(torch.stack(output.selected_experts)[:, tokens], golden[f"{case}.selected_experts"][:, tokens])
    assert_close(recorded.stacked()[:, tokens], golden[f"{case}.multipliers"][:, tokens], "multipliers")
    aux = f"{case}.aux_loss_unmasked" if mask is None else f"{case}.aux_loss_masked"
    assert_close(output.aux_loss, golden[aux], "aux_loss")
    if f"{case}.hidden_states" in golden:
        assert_close(torch.stack(output.hidden_states), golden[f"{case}.hidden_states"], "hidden_states")


def check_gradients(golden, case: str, model) -> None:
    gradients = official_state_dict({name: p.grad.cpu() for name, p in model.named_parameters()})
    prefix = f"{golden.variant}{case}.grad."
    listed = [key for key in golden.gradients if key.startswith(prefix)]
    for key in listed:
        expected = golden.gradients[key]
        bound = GOLDEN_GRADIENT["relative"] * expected.abs().max().item() + GOLDEN_GRADIENT["floor"]
        found = gradients[key.removeprefix(prefix)]
        assert (found - expected).abs().max() <= bound, key
    digest_name = f"{golden.variant}{case}.grad_digest"
    digests = golden.gradients[digest_name]
    for key, expected in zip(golden.digest_keys[digest_name], digests, strict=True):
        flat = gradients[key].double().reshape(-1)
        weights = torch.cos(0.37 * torch.arange(flat.numel(), dtype=torch.float64) + 0.11)
        found = torch.stack([flat.sum(), flat.norm(), flat @ weights])
        bound = GOLDEN_DIGEST["relative"] * expected[1].item() + GOLDEN_DIGEST["floor"]
        bounds = torch.tensor([bound * math.sqrt(flat.numel()), bound, bound], dtype=torch.float64)
        assert ((found - expected).abs() <= bounds).all(), f"{key}: {found} is not {expected}"
    assert listed or len(digests)


# attention, experts, device
GRADIENT_PATHS = [
    ("eager", "eager", "cpu"),
    ("sdpa", "grouped_mm", "cpu"),
    ("sdpa", "batched_mm", "cpu"),
    ("sdpa", "grinmoe_cpu", "cpu"),
    ("sdpa", "grinmoe_triton", "cpu"),
    ("flex_attention", "eager", "cpu"),
    ("flex_attention", "grouped_mm", "cpu"),
    pytest.param("flex_attention", "grouped_mm", "cuda", marks=pytest.mark.gpu),
]


@pytest.fixture
def flex_with_backward(monkeypatch, request):
    """On a CPU torch has no compiled backward of flex attention and refuses; uncompiled, its mathematics has one."""
    if request.node.callspec.params["device"] != "cpu":
        yield
        return
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda query, key, value: None)
    with torch.compiler.set_stance("force_eager"):
        yield


def on_device(tensors: dict[str, torch.Tensor], device: str) -> dict[str, torch.Tensor]:
    return {name: tensor.to(device) for name, tensor in tensors.items()}


@pytest.mark.parametrize("attention, experts, device", GRADIENT_PATHS)
@pytest.mark.parametrize(
    "name, case",
    [(name, case) for name in ("golden-a", "golden-b", "golden-c") for case in ("plain", "leftpad")]
    + [("golden-c", "long")],
)
def test_evaluation_gradients_match(goldens, flex_with_backward, name, case, attention, experts, device):
    golden = goldens[name]
    model = use(golden.load(), attention, experts).to(device)
    model(**on_device(golden.model_inputs(case), device)).loss.backward()
    check_gradients(golden, case, model)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("attention, experts, device", GRADIENT_PATHS)
@pytest.mark.parametrize("case", ["train", "train_leftpad"])
def test_training_replay_matches(goldens, flex_with_backward, case, attention, experts, device, checkpointing):
    """Loss and all gradients of a training step with the reference's recorded draws."""
    golden = goldens["golden-a"]
    field = recorded_training(golden, case)
    model = use(golden.load(), attention, experts).to(device).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    output = replay(model, golden, case, field, device)
    output.loss.backward()
    check_gradients(golden, case, model)


def recorded_training(golden, case: str) -> dict[str, torch.Tensor]:
    recorded = load_file(golden.folder / "train.safetensors")
    return {key.removeprefix(f"{case}."): value for key, value in recorded.items() if key.startswith(f"{case}.")}


def replay(model, golden, case: str, field: dict[str, torch.Tensor], device: str):
    """A training forward with the recorded draws, held against the recorded loss and routing."""
    field = on_device(field, device)
    noise = [
        RoutingNoise(torch.stack([exp1, exp2]), torch.stack([u1, u2]), jitter)
        for exp1, exp2, u1, u2, jitter in zip(*(field[f] for f in ("exp1", "exp2", "u1", "u2", "input_jitter")))
    ]
    inputs = on_device(golden.model_inputs(case), device)
    output = model(**inputs, routing_noise=noise, output_router_logits=True)
    tokens = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool().reshape(-1)
    assert_close(output.loss.detach(), field["loss"], "loss")
    assert torch.equal(torch.stack(output.selected_experts)[:, tokens], field["selected_experts"][:, tokens])
    found = torch.stack(output.router_logits).detach()[:, tokens]
    assert_close(found, field["router_logits"][:, tokens], "router_logits")
    return output


def greedy(model, golden, case: str, tokens: int = 20, **kwargs) -> torch.Tensor:
    inputs = golden.model_inputs(case, labels=False)
    kwargs |= {"max_new_tokens": tokens, "min_new_tokens": tokens}
    return model.generate(**inputs, do_sample=False, eos_token_id=None, pad_token_id=0, **kwargs)


@pytest.mark.parametrize(
    "attention, experts",
    [
        ("eager", "eager"),
        ("sdpa", "grouped_mm"),
        ("sdpa", "grinmoe_cpu"),
        pytest.param("sdpa", "grinmoe_triton", marks=pytest.mark.slow),  # interpreted on a CPU: see the next test
        ("flex_attention", "grouped_mm"),
    ],
)
@pytest.mark.parametrize("use_cache", [True, False], ids=["cached", "recomputed"])
@pytest.mark.parametrize("case", ["generate", "generate_leftpad"])
@pytest.mark.parametrize("name", ["golden-a", "golden-b", "golden-c"])
def test_greedy_generation_matches(goldens, golden_models, name, case, use_cache, attention, experts):
    golden, model = goldens[name], use(golden_models[name], attention, experts)
    # torch 2.13's C++ code for flex attention on a CPU does not compile once lengths vary; its eager form is exact.
    with torch.compiler.set_stance("force_eager" if attention == "flex_attention" else "default"):
        sequences = greedy(model, golden, case, use_cache=use_cache)
    assert torch.equal(sequences, golden[f"{case}.sequences"])


@pytest.mark.parametrize("case", ["generate", "generate_leftpad"])
@pytest.mark.parametrize("name", ["golden-a", "golden-b", "golden-c"])
def test_generation_by_triton_begins_so(goldens, golden_models, name, case):
    """A prompt and two single tokens: both of its paths."""
    golden, model = goldens[name], use(golden_models[name], "sdpa", "grinmoe_triton")
    sequences = greedy(model, golden, case, tokens=3)
    prompt = golden.model_inputs(case, labels=False)["input_ids"].shape[1]
    assert torch.equal(sequences, golden[f"{case}.sequences"][:, : prompt + 3])


@pytest.mark.parametrize("cache", ["static", "offloaded", "offloaded_static"])
@pytest.mark.parametrize("case", ["generate", "generate_leftpad"])
@pytest.mark.parametrize("name", ["golden-a", "golden-b", "golden-c"])
def test_every_cache_generates_the_same(goldens, golden_models, name, case, cache):
    """golden-b: the window is shorter than the text; golden-c: the cache is rebuilt at LongRoPE's switch."""
    if cache.startswith("offloaded") and not torch.cuda.is_available():
        pytest.skip("offloaded caches copy between an accelerator and the host")
    golden, model = goldens[name], use(golden_models[name], "sdpa", "grouped_mm")
    assert torch.equal(greedy(model, golden, case, cache_implementation=cache), golden[f"{case}.sequences"])


@pytest.mark.parametrize("variant", ["narrow", "nowindow"])
def test_other_windows_are_told_apart(goldens, golden_models, variant):
    """The data can tell the released window from W keys and from none: the test above cannot pass by chance."""
    golden, model = goldens["golden-b"], use(golden_models["golden-b"], "sdpa", "grouped_mm")
    with torch.no_grad():
        logits = model(**golden.model_inputs("plain")).logits
    assert (logits - golden.expected[f"{variant}.plain.logits"]).abs().max() > 1.0
