"""SparseMixer-v2 as a function: properties that hold for every input, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from grinmoe.routing_grinmoe import RoutingNoise, draw_routing_noise, masked_softmax, sparsemixer


@pytest.fixture
def logits():
    return torch.randn(64, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("top_k", [1, 2, 3, 8])
def test_choices_are_distinct_for_every_k(logits, top_k, training):
    weights, experts = sparsemixer(logits, top_k, 0.3, training)
    assert weights.shape == experts.shape == (64, top_k) and experts.dtype == torch.int64
    assert all(len(set(row.tolist())) == top_k for row in experts)
    assert ((weights > 0) & (weights <= 1)).all()


def test_evaluation_takes_the_largest_logits_in_order(logits):
    _, experts = sparsemixer(logits, 3, 0.01, False)
    assert torch.equal(experts, logits.topk(3).indices)


def test_a_later_choice_masks_against_the_best_that_is_left():
    """Expert 0 towers over two close ones: alone under its own mask, and gone from the next."""
    logits = torch.tensor([[10.0, 1.0, 0.999, -3.0]])
    weights, experts = sparsemixer(logits, 2, 0.01, False)
    assert experts.tolist() == [[0, 1]]
    assert weights[0, 0] == 1.0
    assert weights[0, 1].item() == pytest.approx(torch.softmax(logits[0, 1:3], -1)[0].item(), abs=1e-6)


def test_the_mask_keeps_what_the_released_rule_keeps():
    logits = torch.tensor([[1.0, 0.981, 0.979, -1.0], [-1.0, -1.02, -1.0205, -2.0], [0.0, 0.0, 0.0, 0.0]])
    probs, dropped = masked_softmax(logits, logits, 0.01)
    assert dropped.tolist() == [[False, False, True, True], [False, False, True, True], [False] * 4]
    assert (probs[dropped] == 0).all()
    torch.testing.assert_close(probs.sum(-1), torch.ones(3))


def test_gradient_ignores_the_heun_factor_and_sums_to_zero(logits):
    noise = draw_routing_noise(logits, 2, torch.Generator().manual_seed(1))
    gradients = []
    for uniform in (0.0, 1.0):  # always scaled where not the argmax; never scaled
        leaf = logits.clone().requires_grad_()
        weights, _ = sparsemixer(leaf, 2, 0.5, True, noise._replace(uniform=torch.full_like(noise.uniform, uniform)))
        weights.sum().backward()
        gradients.append((weights.detach(), leaf.grad))
    (scaled, gradient), (full, same_gradient) = gradients
    assert torch.equal(gradient, same_gradient) and not torch.equal(scaled, full)
    ratio = scaled / full
    assert ((ratio == 1) | ((ratio - 0.3333).abs() < 1e-6)).all() and (ratio < 1).any()
    torch.testing.assert_close(gradient.sum(-1), torch.zeros(64), atol=1e-6, rtol=0)


def test_one_kept_expert_gives_no_gradient():
    leaf = torch.tensor([[5.0, 1.0, -2.0]], requires_grad=True)
    weights, _ = sparsemixer(leaf, 1, 0.01, True)
    weights.sum().backward()
    assert weights.item() == 1.0 and torch.equal(leaf.grad, torch.zeros(1, 3))


def test_draws_come_from_torchs_generator_and_repeat_with_it(logits):
    torch.manual_seed(5)
    first = sparsemixer(logits, 2, 0.5, True)
    second = sparsemixer(logits, 2, 0.5, True)
    torch.manual_seed(5)
    again = sparsemixer(logits, 2, 0.5, True)
    assert torch.equal(first[1], again[1]) and torch.equal(first[0], again[0])
    assert not torch.equal(first[1], second[1])
    torch.manual_seed(5)
    state = torch.get_rng_state()
    sparsemixer(logits, 2, 0.5, False)
    assert torch.equal(state, torch.get_rng_state()), "evaluation draws nothing"


def test_inputs_are_not_changed(logits):
    noise = draw_routing_noise(logits, 2)
    before = logits.clone(), *(tensor.clone() for tensor in noise[:2])
    sparsemixer(logits, 2, 0.1, True, noise)
    assert all(torch.equal(a, b) for a, b in zip(before, (logits, *noise[:2]), strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_weights_keep_the_dtype_of_the_logits(logits, dtype):
    for training in (False, True):
        leaf = logits.to(dtype).requires_grad_()
        weights, _ = sparsemixer(leaf, 2, 0.3, training)
        weights.sum().backward()
        assert weights.dtype == leaf.grad.dtype == dtype and leaf.grad.isfinite().all()


@pytest.mark.parametrize("training", [False, True])
def test_second_derivatives_are_refused(logits, training):
    """The backward is an estimate; its own derivative would be a number without a meaning."""
    leaf = logits.clone().requires_grad_()
    weights, _ = sparsemixer(leaf, 2, 0.3, training)
    (gradient,) = torch.autograd.grad((weights**2).sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_no_tokens_is_fine():
    weights, experts = sparsemixer(torch.empty(0, 4), 2, 0.1, True)
    assert weights.shape == experts.shape == (0, 2)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((torch.zeros(2, 4), 5, 0.1, False), "top_k=5 is not between 1 and the 4 experts"),
        ((torch.zeros(2, 4), 0, 0.1, False), "top_k=0"),
        ((torch.zeros(2, 4), 2, -0.1, False), "jitter_eps=-0.1 is negative"),
        ((torch.zeros(2, 4), 2, float("nan"), False), "jitter_eps=nan"),
        ((torch.zeros(4), 2, 0.1, False), "shape"),
        ((torch.zeros(2, 4, dtype=torch.int64), 2, 0.1, False), "dtype torch.int64"),
        ((torch.zeros(2, 4), 2, 0.1, True, RoutingNoise(torch.ones(1, 2, 4), torch.ones(2, 2, 1))), "exponential"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        sparsemixer(*arguments)
