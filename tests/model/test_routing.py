"""SparseMixer-v2 as a function: properties that hold for every input, and what it refuses."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from grinmoe.routing_grinmoe import (
    ESTIMATORS,
    NonFiniteRouterLogitsError,
    RoutingNoise,
    draw_routing_noise,
    masked_softmax,
    route,
    sparsemixer,
)


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


def test_second_derivatives_in_evaluation_are_exact(logits):
    leaf = logits.double().requires_grad_()
    assert torch.autograd.gradgradcheck(lambda z: sparsemixer(z, 2, 0.3, False)[0], (leaf,), check_fwd_over_rev=True)


def test_second_derivatives_in_training_are_refused(logits):
    """The backward is an estimate; its own derivative would be a number without a meaning."""
    leaf = logits.clone().requires_grad_()
    weights, _ = sparsemixer(leaf, 2, 0.3, True)
    (gradient,) = torch.autograd.grad((weights**2).sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="its gradient is an estimate"):
        gradient.sum().backward()


def test_a_draw_of_zero_chooses_no_expert_that_is_closed_or_taken():
    """-log 0 lifts a logit to infinity, and -inf with it would be NaN, which argmax prefers."""
    logits = torch.tensor([[float("-inf"), 0.0, 1.0, float("-inf")]])
    noise = RoutingNoise(torch.zeros(2, 1, 4), torch.zeros(2, 1, 1))
    _, experts = sparsemixer(logits, 2, 1.0, True, noise)
    assert experts.tolist() == [[1, 2]]


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


# --- any input at all ---------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """What one routing decision is made from."""

    logits: torch.Tensor
    top_k: int
    jitter_eps: float
    training: bool
    estimator: str
    seed: int


def finite_numbers(dtype: torch.dtype) -> st.SearchStrategy[float]:
    """Ordinary logits, and those at the ends of what the dtype holds: zeros, subnormals, its largest numbers."""
    info = torch.finfo(dtype)
    least = info.smallest_normal * info.eps
    ends = [0.0, least, 3 * least, info.smallest_normal, 1.0, info.max / 2, info.max]
    return st.one_of(
        st.sampled_from([*ends, *(-end for end in ends)]),
        st.floats(-10, 10),
        st.floats(-info.max, info.max),
    )


@st.composite
def cases(draw, odd_numbers: tuple[float, ...] = ()) -> Case:
    """Any decision; with `odd_numbers` among the logits, which are finite otherwise."""
    num_experts = draw(st.integers(1, 12))
    top_k = draw(st.integers(1, num_experts))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    number = finite_numbers(dtype)
    if odd_numbers:
        number = st.one_of(number, st.sampled_from(odd_numbers))
    row = st.one_of(
        st.lists(number, min_size=num_experts, max_size=num_experts), number.map(lambda x: [x] * num_experts)
    )
    rows = draw(st.lists(row, min_size=1, max_size=3))
    eps = draw(st.one_of(st.sampled_from([0, 1e-6, 0.01, 0.1, 1, 1e6, 1e300, math.inf]), st.floats(0, 2)))
    return Case(
        torch.tensor(rows, dtype=torch.float64).to(dtype),
        top_k,
        eps,
        draw(st.booleans()),
        draw(st.sampled_from(list(ESTIMATORS))),
        draw(st.integers(0, 2**32 - 1)),
    )


def assert_sound(case: Case) -> torch.Tensor:
    """Route, and hold the result against what must be true of any. Returns the experts."""
    leaf = case.logits.clone().requires_grad_()
    generator = torch.Generator().manual_seed(case.seed)
    weights, experts, scale = route(
        leaf, case.top_k, case.jitter_eps, case.training, None, case.estimator, generator=generator
    )
    num_tokens, num_experts = case.logits.shape
    assert weights.shape == experts.shape == (num_tokens, case.top_k) and weights.dtype == case.logits.dtype
    assert ((weights >= 0) & (weights <= 1)).all(), "NaN is neither"
    assert ((experts >= 0) & (experts < num_experts)).all()
    assert all(len(set(row)) == case.top_k for row in experts.tolist())
    assert scale is None or ((scale >= 1) & scale.isfinite()).all()
    (weights * torch.linspace(-2, 2, case.top_k + 1, dtype=weights.dtype)[1:]).sum().backward()
    assert leaf.grad.isfinite().all()
    return experts


@settings(max_examples=250, deadline=None, derandomize=True)
@given(cases())
def test_finite_logits_always_give_a_sound_result(case):
    assert_sound(case)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(cases(), st.data())
def test_minus_infinity_closes_an_expert(case, data):
    """Up to E - K of them in each row, and no closed one is chosen."""
    num_experts = case.logits.shape[1]
    closed = torch.zeros(case.logits.shape, dtype=torch.bool)
    for row in closed:
        order = data.draw(st.permutations(range(num_experts)))
        row[order[: data.draw(st.integers(0, num_experts - case.top_k))]] = True
    experts = assert_sound(case._replace(logits=case.logits.masked_fill(closed, float("-inf"))))
    assert not closed.gather(1, experts).any()


@settings(max_examples=150, deadline=None, derandomize=True)
@given(cases(odd_numbers=(math.inf, -math.inf, math.nan)))
@example(Case(torch.tensor([[-math.inf, 1.0]]), 2, 0.01, True, "sparsemixer_v2", 0))
def test_logits_that_leave_no_choice_are_an_error_and_all_others_are_not(case):
    """NaN, +inf, or fewer finite ones than K."""
    logits = case.logits
    hopeless = logits.isnan().any() | (logits == math.inf).any() | (logits.isfinite().sum(-1) < case.top_k).any()
    if hopeless:
        with pytest.raises(NonFiniteRouterLogitsError):
            assert_sound(case)
    else:
        assert_sound(case)


def test_finite_logits_whose_sum_overflows_are_routed():
    logits = torch.full((2, 8), 3e38)
    logits[:, 5] = 3.3e38
    assert logits.sum().isinf()
    weights, experts = sparsemixer(logits, 2, 0.01, training=False)
    assert (experts[:, 0] == 5).all() and weights.isfinite().all()
