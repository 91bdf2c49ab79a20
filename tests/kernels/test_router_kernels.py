"""The fused router held to the estimators, in Triton's interpreter: choices, weights, every gradient."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from grinmoe.kernels import triton_experts, triton_router
from grinmoe.kernels.philox import counter_jitter, counter_noise
from grinmoe.kernels.triton_router import fused_input_jitter, fused_route
from grinmoe.routing_grinmoe import ESTIMATORS, draw_routing_noise, route

SEED = 2**62 + 12345
# Weights: one rounding of the logits' dtype. Gradients: relative to the largest.
WEIGHTS = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}
GRADIENTS = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 5e-3}


def logits_of(tokens: int, experts: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(tokens, experts, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()


def assert_alike(logits, top_k, eps, training, estimator, noise=None, seed=None, stream=0):
    draws = noise
    if training and noise is None:
        draws = counter_noise(seed, stream, *logits.shape, top_k)
    expected = route(logits, top_k, eps, training, draws, estimator)
    found = fused_route(logits, top_k, eps, training, estimator, noise, seed, stream)
    assert torch.equal(found.selected_experts, expected.selected_experts)
    assert found.routing_weights.dtype == logits.dtype
    torch.testing.assert_close(found.routing_weights, expected.routing_weights, rtol=0, atol=WEIGHTS[logits.dtype])
    assert (found.expert_gradient_scale is None) == (expected.expert_gradient_scale is None)
    if expected.expert_gradient_scale is not None:
        assert torch.equal(found.expert_gradient_scale, expected.expert_gradient_scale)
    upstream = torch.randn(found.routing_weights.shape, generator=torch.Generator().manual_seed(1)).to(logits.dtype)
    wanted, got = (torch.autograd.grad(r.routing_weights, logits, upstream)[0] for r in (expected, found))
    assert (got - wanted).abs().max() <= GRADIENTS[logits.dtype] * wanted.abs().max() + 1e-7
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("estimator", [name for name, spec in ESTIMATORS.items() if spec.kernel])
@pytest.mark.parametrize("draws", ["given", "counter", "evaluation"])
def test_it_decides_as_the_reference(estimator, draws, dtype):
    logits = logits_of(67, 16, dtype)
    noise = draw_routing_noise(logits, 2, torch.Generator().manual_seed(2)) if draws == "given" else None
    assert_alike(logits, 2, 0.1, draws != "evaluation", estimator, noise, SEED, stream=3)


@pytest.mark.parametrize(
    "tokens, experts, top_k, eps",
    [
        (1, 5, 2, 0.01),
        pytest.param(130, 33, 3, 0.5, marks=pytest.mark.integration),
        pytest.param(20, 128, 2, 0.01, marks=pytest.mark.integration),
        (9, 4, 4, 1e9),
        (9, 3, 1, 0.0),
        (5, 1, 1, 0.01),
    ],
)
def test_odd_shapes_and_masks(tokens, experts, top_k, eps):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for estimator in ("sparsemixer_v2", "sparsemixer_togo"):
            assert_alike(logits_of(tokens, experts, dtype), top_k, eps, True, estimator, seed=5)
    assert_alike(logits_of(tokens, experts), top_k, eps, False, "sparsemixer_v2")


@pytest.mark.parametrize("tokens, top_k", [(1, 1), (1, 2), (16, 2), (17, 2)])
def test_given_noise_at_sizes_that_triton_specialises(tokens, top_k):
    """A size of 1, or a multiple of 16, is another type to a compiled kernel (test_kernels_compile.py compiles them)."""
    for estimator in ("sparsemixer_v2", "sparsemixer_togo"):
        logits = logits_of(tokens, 16)
        noise = draw_routing_noise(logits, top_k, torch.Generator().manual_seed(2))
        assert_alike(logits, top_k, 0.1, True, estimator, noise, stream=1)


def test_ties_zeros_and_closed_experts():
    """All-zero logits (0/0 is kept), equal ones (the first wins), and experts closed by -inf."""
    closed = torch.tensor([1.0, float("-inf"), 0.5, float("-inf")])
    rows = torch.stack([torch.zeros(4), torch.tensor([1.0, 2.0, 2.0, 1.0]), closed, -torch.ones(4)])
    for dtype in (torch.float32, torch.bfloat16):
        logits = rows.to(dtype).requires_grad_()
        for training in (True, False):
            found = assert_alike(logits, 2, 0.01, training, "sparsemixer_v2", seed=1)
            assert not ((found.selected_experts[2] == 1) | (found.selected_experts[2] == 3)).any()
    evaluated = fused_route(rows, 2, 0.01, False)
    assert evaluated.selected_experts[1].tolist() == [1, 2]
    torch.testing.assert_close(evaluated.routing_weights[0], torch.tensor([1 / 4, 1 / 3]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_nan_stays_in_its_row_and_chooses_an_expert_that_exists(training, dtype):
    """On a GPU nobody looks at the logits first, and an expert beyond the last would be read from foreign memory."""
    logits = logits_of(6, 5, dtype)
    with torch.no_grad():
        logits[1, 3], logits[2], logits[4, 0] = float("nan"), float("nan"), float("inf")
    found = fused_route(logits, 3, 0.1, training, seed=SEED)
    assert ((found.selected_experts >= 0) & (found.selected_experts < 5)).all()
    odd = torch.tensor([False, True, True, False, True, False])
    assert found.routing_weights[odd].isnan().any(1).all() and found.routing_weights[~odd].isfinite().all()
    (gradient,) = torch.autograd.grad(found.routing_weights.sum(), logits)
    assert gradient[~odd].isfinite().all() and gradient[odd].isnan().any(1).all()


@pytest.mark.parametrize("eps", [1e300, float("inf")])
def test_a_mask_as_wide_as_a_float_can_say_keeps_all(eps):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert_alike(logits_of(9, 5, dtype), 2, eps, True, "sparsemixer_v2", seed=5)


@pytest.mark.parametrize("seed", [0, 1, -1, 2**31, 2**32 + 1, 2**63 + 5, 2**64 - 1])
def test_every_seed_of_64_bits_is_one(seed):
    found = assert_alike(logits_of(20, 8), 2, 0.5, True, "sparsemixer_v2", seed=seed)
    signed = (seed + 2**63) % 2**64 - 2**63
    on_device = fused_route(logits_of(20, 8), 2, 0.5, True, seed=torch.tensor([signed]))
    assert torch.equal(on_device.routing_weights, found.routing_weights)


@pytest.mark.parametrize("training", [True, False])
def test_second_derivatives_are_refused(training):
    logits = logits_of(9, 4)
    weights = fused_route(logits, 2, 0.3, training, seed=SEED).routing_weights
    (gradient,) = torch.autograd.grad((weights**2).sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        gradient.sum().backward()


@pytest.mark.parametrize("training", [True, False])
def test_function_transforms_compute_the_reference_of_the_same_draws(training):
    logits = logits_of(6, 8).detach()

    def squares(logits):
        return (fused_route(logits, 2, 0.3, training, seed=SEED, stream=3).routing_weights ** 2).sum()

    leaf = logits.clone().requires_grad_()
    squares(leaf).backward()
    torch.testing.assert_close(torch.func.grad(squares)(logits), leaf.grad, rtol=1e-5, atol=1e-7)
    if training:
        with pytest.raises(NotImplementedError, match="must implement the jvp function"):
            torch.func.jvp(squares, (logits,), (logits,))
    else:
        forward = torch.func.jvp(squares, (logits,), (logits,))[1]
        torch.testing.assert_close(forward, (leaf.grad * logits).sum(), rtol=1e-5, atol=1e-7)


def test_jitter_under_forward_mode_keeps_the_tangent():
    hidden = torch.randn(3, 8)
    output, tangent = torch.func.jvp(lambda x: fused_input_jitter(x, 0.1, SEED, 2), (hidden,), (hidden,))
    torch.testing.assert_close(output, fused_input_jitter(hidden, 0.1, SEED, 2), rtol=0, atol=0)
    torch.testing.assert_close(tangent, output)


def test_every_bfloat16_gap_falls_on_the_reference_s_side_of_the_mask():
    """The mask compares in the logits' dtype: all values near a best logit of 1, and both signs."""
    second = torch.arange(-2.0, 1.0, 2**-8).bfloat16()
    logits = torch.stack([torch.ones_like(second), second], dim=1)
    for eps in (0.01, 0.1, 0.5):
        kept = fused_route(logits, 1, eps, False).routing_weights < 1
        assert torch.equal(kept, route(logits, 1, eps, False).routing_weights < 1)
        assert 0 < kept.sum() < kept.numel()


def test_a_recomputed_layer_draws_the_same():
    logits = logits_of(30, 8)

    def weigh(logits):
        return fused_route(fused_input_jitter(logits, 0.01, SEED, 2), 2, 0.3, True, seed=SEED, stream=2)[0]

    plain, recomputed = weigh(logits), checkpoint(weigh, logits, use_reentrant=False)
    assert torch.equal(plain, recomputed)
    for a, b in zip(*(torch.autograd.grad(w.square().sum(), logits) for w in (plain, recomputed))):
        assert torch.equal(a, b)


@pytest.mark.parametrize("seed", [None, torch.tensor([SEED])], ids=["drawn", "given"])
def test_a_compiled_router(seed):
    torch.compiler.reset()
    logits = logits_of(30, 8)
    compiled = torch.compile(
        lambda z: fused_route(fused_input_jitter(z, 0.01, seed), 2, 0.3, True, seed=seed),
        backend="aot_eager",
        fullgraph=True,
    )
    found = compiled(logits)
    if seed is None:
        assert not torch.equal(compiled(logits).routing_weights, found.routing_weights)
    else:
        expected = fused_route(fused_input_jitter(logits, 0.01, SEED), 2, 0.3, True, seed=SEED)
        assert torch.equal(found.routing_weights, expected.routing_weights)
        for a, b in zip(*(torch.autograd.grad(r.routing_weights.sum(), logits) for r in (found, expected))):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens, hidden", [(1, 7), (70, 1100)])
def test_the_jitter_is_the_reference_s_and_keeps_nothing(tokens, hidden, dtype):
    kept = []
    hidden_states = torch.randn(tokens, hidden).to(dtype).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        jittered = fused_input_jitter(hidden_states, 0.01, SEED, 2)
    factors = counter_jitter(SEED, 2, tokens, hidden, 0.01, dtype)
    assert torch.equal(jittered, hidden_states * factors) and jittered.dtype == dtype
    (gradient,) = torch.autograd.grad(jittered, hidden_states, torch.ones_like(jittered))
    assert torch.equal(gradient, factors) and sum(kept) <= 1


def test_eager_mode_calls_no_operator(monkeypatch):
    """An operator of torch.library takes the host several times as long as an autograd function."""

    def refuse(*_):
        raise AssertionError("an operator was called")

    for name in ("_router", "_router_backward", "_jitter"):
        monkeypatch.setattr(triton_router, name, refuse)
    logits, hidden_states = logits_of(9, 4), torch.randn(9, 8, requires_grad=True)
    for training in (True, False):
        fused_route(logits, 2, 0.01, training, seed=1).routing_weights.sum().backward()
    fused_input_jitter(hidden_states, 0.01, seed=1).sum().backward()
    assert logits.grad is not None and hidden_states.grad is not None
    with torch.no_grad():
        assert not fused_route(logits, 2, 0.01, False).routing_weights.requires_grad
        assert not fused_input_jitter(hidden_states, 0.01, seed=1).requires_grad


def test_a_batch_of_gradients_is_one_after_the_other():
    logits, hidden_states = logits_of(9, 4), torch.randn(9, 8, requires_grad=True)
    weights = fused_route(logits, 2, 0.3, True, seed=SEED).routing_weights
    jittered = fused_input_jitter(hidden_states, 0.1, SEED)
    for output, leaf in ((weights, logits), (jittered, hidden_states)):
        upstream = torch.randn(3, *output.shape)
        batched = torch.autograd.grad(output, leaf, upstream, retain_graph=True, is_grads_batched=True)[0]
        alone = [torch.autograd.grad(output, leaf, one, retain_graph=True)[0] for one in upstream]
        assert torch.equal(batched, torch.stack(alone))


def test_the_jitter_s_gradient_is_differentiable():
    hidden_states = torch.randn(9, 8, requires_grad=True)
    output = fused_input_jitter(hidden_states, 0.1, SEED)
    (gradient,) = torch.autograd.grad((output**2).sum(), hidden_states, create_graph=True)
    (second,) = torch.autograd.grad(gradient.sum(), hidden_states)
    torch.testing.assert_close(second, 2 * counter_jitter(SEED, 0, 9, 8, 0.1) ** 2)


def test_tensors_without_values_have_shapes():
    found = fused_route(torch.empty(9, 4, device="meta"), 2, 0.01, False)
    assert found.routing_weights.shape == (9, 2) and found.selected_experts.dtype == torch.int64
    assert fused_input_jitter(torch.empty(9, 8, device="meta"), 1, seed=1).shape == (9, 8)


def test_operators_keep_their_word():
    arguments = (logits_of(9, 4), None, None, torch.tensor([5]), 0, 1, 2, 0.2)
    torch.library.opcheck(triton_router._router, (*arguments, "sparsemixer_v2", True))
    torch.library.opcheck(triton_router._jitter, (torch.randn(9, 8, requires_grad=True), None, 5, 1, 0.01))


def test_no_token_at_all():
    logits = torch.empty(0, 4, requires_grad=True)
    found = fused_route(logits, 2, 0.01, True, seed=1)
    assert found.routing_weights.shape == (0, 2)
    assert torch.autograd.grad(found.routing_weights.sum(), logits)[0].shape == (0, 4)


@pytest.mark.parametrize(
    "logits, estimator, message",
    [
        (torch.zeros(2, 4), "topk", "estimator='topk' has no kernel"),
        (torch.zeros(2, 4), "sparsemixer_centred", "has no kernel"),
        (torch.zeros(2, 129), "sparsemixer_v2", "at most 128 experts"),
        (torch.zeros(2, 4).double(), "sparsemixer_v2", "float64"),
    ],
    ids=["topk", "centred", "experts", "dtype"],
)
def test_what_has_no_kernel_is_refused(logits, estimator, message):
    with pytest.raises(ValueError, match=message):
        fused_route(logits, 2, 0.01, True, estimator)


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"top_k": 5}, "top_k=5 is not between 1 and the 4 experts"),
        ({"jitter_eps": -0.1}, "jitter_eps=-0.1 is negative"),
        (
            {"noise": draw_routing_noise(torch.zeros(2, 4), 1)},
            "noise has exponential .1, 2, 4. and uniform .1, 2, 1.; they must be",
        ),
        ({"seed": torch.tensor([1, 2])}, "seed is a tensor of 2 torch.int64"),
        ({"seed": torch.tensor(1.0)}, "torch.float32"),
    ],
    ids=["top_k", "eps", "noise", "two seeds", "dtype of the seed"],
)
def test_what_the_kernel_would_read_wrongly_is_named(changed, message):
    arguments = {"top_k": 2, "jitter_eps": 0.01, "training": True, **changed}
    with pytest.raises(ValueError, match=message):
        fused_route(torch.zeros(2, 4), **arguments)
    if "seed" in changed:
        with pytest.raises(ValueError, match=message):
            fused_input_jitter(torch.zeros(2, 4), 0.01, **changed)


@pytest.mark.parametrize("hidden_states", [torch.zeros(2, 3, 4), torch.zeros(2, 4).double()], ids=["shape", "dtype"])
def test_the_jitter_takes_rows_of_its_dtypes_only(hidden_states):
    with pytest.raises(ValueError, match="hidden_states has shape"):
        fused_input_jitter(hidden_states, 0.01)


def test_without_the_interpreter_a_cpu_is_refused(monkeypatch):
    monkeypatch.setattr(triton_experts, "interpreted", lambda: False)
    with pytest.raises(ValueError, match="run on a GPU"):
        fused_route(torch.zeros(2, 4), 2, 0.01, False)
    with pytest.raises(ValueError, match="run on a GPU"):
        fused_input_jitter(torch.zeros(2, 4), 0.01)
