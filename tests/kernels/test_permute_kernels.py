"""The kernels around the experts' products, each beside its definition in torch, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from grinmoe.kernels.permute_kernels import _tile, combine, gather_rows, place_rows, swiglu, swiglu_backward
from tests.tolerances import FAST_PATH_FLOAT32

# Computed in float32 and rounded once. The interpreter cuts off what does not fit into bfloat16's 8 bits.
ROUNDED_ONCE = {torch.float32: FAST_PATH_FLOAT32, torch.bfloat16: 2**-7}
DTYPES = pytest.mark.parametrize("dtype", ROUNDED_ONCE, ids=str)
# T, K, E and the width: one row, a row that is longer than a block, more rows than a block, E beside a power of two.
SIZES = pytest.mark.parametrize("sizes", [(1, 1, 5, 8), (3, 2, 4, 1100), (37, 3, 33, 20), (90, 2, 16, 24)], ids=str)


def drawn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def placed(tokens: int, top_k: int, num_experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`place_rows` of choices of which some are served elsewhere where there are several."""
    generator = torch.Generator().manual_seed(0)
    choices = torch.rand(tokens, num_experts + 1, generator=generator).topk(top_k).indices
    choices[0, 0] = 0
    return place_rows(choices, num_experts)


def poisoned(rows: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """As a grouped product leaves them: nothing is written after the last expert's rows, so anything may be there."""
    return rows.masked_fill(torch.arange(len(rows))[:, None] >= ends[-1], float("nan"))


def assert_close(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    assert found.dtype == dtype and found.shape == expected.shape
    assert (found.float() - expected).abs().max() <= ROUNDED_ONCE[dtype] * expected.abs().max()


def weighted_swiglu(pre_activation, keep, weights):
    """In float32: w * silu(gate) * up * keep, by row."""
    gate, up = pre_activation.chunk(2, dim=-1)
    activation = torch.nn.functional.silu(gate) * up
    return weights * (activation if keep is None else activation * keep)


@DTYPES
@SIZES
def test_gather_rows_equals_index_select(sizes, dtype):
    tokens, top_k, num_experts, hidden = sizes
    order, row_of_choice, ends = placed(tokens, top_k, num_experts)
    hidden_states, served = drawn(tokens, hidden, dtype=dtype), int(ends[-1])
    found = gather_rows(hidden_states, row_of_choice, ends, top_k)
    assert found.dtype == dtype and found.shape == (tokens * top_k, hidden)
    assert torch.equal(found[:served], hidden_states.index_select(0, order[:served] // top_k))


@pytest.fixture
def uninitialised_is_nan():
    """Fill what `torch.empty` returns with NaN."""
    before = torch.utils.deterministic.fill_uninitialized_memory, torch.are_deterministic_algorithms_enabled()
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    yield
    torch.utils.deterministic.fill_uninitialized_memory = before[0]
    torch.use_deterministic_algorithms(before[1])


@pytest.mark.usefixtures("uninitialised_is_nan")
def test_rows_of_non_local_experts_are_not_written():
    """One of four experts is here, for 2 of 8 assignments: the other rows cost no memory traffic."""
    choices = torch.tensor([[0, 1], [1, 1], [1, 0], [1, 1]])
    _, row_of_choice, ends = place_rows(choices, 1)
    rows = gather_rows(torch.ones(4, 16), row_of_choice, ends, 2)
    assert (rows[:2] == 1).all() and rows[2:].isnan().all()
    assert swiglu(torch.ones(8, 32), ends)[2:].isnan().all()


@pytest.mark.parametrize(
    "width, columns, masked",
    [(6400, 256, 0), (4096, 1024, 0), (14336, 1024, 0), (1100, 128, 52), (800, 64, 32), (24, 32, 8)],
    ids=str,
)
def test_tile_masks_few_columns(width, columns, masked):
    assert _tile(width)[1] == columns
    assert -width % columns == masked


@pytest.mark.parametrize("dropout", [False, True], ids=["all kept", "dropout"])
@DTYPES
@SIZES
def test_swiglu(sizes, dtype, dropout):
    tokens, top_k, num_experts, width = sizes
    _, _, ends = placed(tokens, top_k, num_experts)
    rows, served = tokens * top_k, int(ends[-1])
    pre_activation = drawn(rows, 2 * width, dtype=dtype)
    keep = (drawn(rows, width, seed=1) > 0).to(dtype) * 2 if dropout else None
    expected = weighted_swiglu(pre_activation.float(), None if keep is None else keep.float(), 1.0)
    assert_close(swiglu(pre_activation, ends, keep)[:served], expected[:served], dtype)


@pytest.mark.parametrize("dropout", [False, True], ids=["all kept", "dropout"])
@DTYPES
@SIZES
def test_swiglu_backward(sizes, dtype, dropout):
    """By autograd of the weighted activation: the upstream gradient is that of w * A, so that of w is <dA', A>."""
    tokens, top_k, num_experts, width = sizes
    order, _, ends = placed(tokens, top_k, num_experts)
    rows, served = tokens * top_k, int(ends[-1])
    pre_activation, grad = drawn(rows, 2 * width, dtype=dtype), drawn(rows, width, dtype=dtype, seed=1)
    weights = drawn(tokens, top_k, dtype=dtype, seed=2)
    keep = (drawn(rows, width, seed=3) > 0).to(dtype) * 2 if dropout else None
    leaves = [pre_activation.float().requires_grad_(), weights.float().requires_grad_()]
    by_row = leaves[1].reshape(-1)[order][:, None]
    activation = weighted_swiglu(leaves[0], None if keep is None else keep.float(), by_row)
    expected = torch.autograd.grad(activation[:served], leaves, grad[:served].float())
    found = swiglu_backward(poisoned(grad, ends), poisoned(pre_activation, ends), weights, order, ends, keep)
    assert_close(found[0][:served], expected[0][:served], dtype)
    assert found[1] is not None
    assert_close(found[1][:served], activation[:served], dtype)
    assert_close(found[2], expected[1], dtype)


def test_a_frozen_down_projection_needs_no_activation():
    order, _, ends = placed(9, 2, 4)
    arguments = drawn(18, 24), drawn(18, 48, seed=1), drawn(9, 2, seed=2), order, ends
    grad_pre, nothing, grad_weights = swiglu_backward(*arguments, weighted=False)
    expected = swiglu_backward(*arguments)
    served = int(ends[-1])
    assert nothing is None and torch.equal(grad_weights, expected[2])
    assert torch.equal(grad_pre[:served], expected[0][:served])


@pytest.mark.parametrize("weighted", [True, False], ids=["weighted", "plain"])
@DTYPES
@SIZES
def test_combine(sizes, dtype, weighted):
    tokens, top_k, num_experts, hidden = sizes
    _, row_of_choice, ends = placed(tokens, top_k, num_experts)
    rows = drawn(tokens * top_k, hidden, dtype=dtype)
    weights = drawn(tokens, top_k, dtype=dtype, seed=1) if weighted else None
    by_choice = poisoned(rows, ends).float().nan_to_num(0.0)[row_of_choice].view(tokens, top_k, hidden)
    expected = (by_choice * (1.0 if weights is None else weights.float()[..., None])).sum(1)
    assert_close(combine(poisoned(rows, ends), row_of_choice, ends, top_k, weights), expected, dtype)


def test_a_sum_of_many_small_parts_is_not_rounded_in_between():
    """1 and 64 times 2^-8 is 1.25; summed in bfloat16 it would stay 1."""
    choices = torch.arange(65)[None]
    _, row_of_choice, ends = place_rows(choices, 65)
    rows = torch.full((65, 8), 2.0**-8, dtype=torch.bfloat16)
    rows[0] = 1.0
    assert (combine(rows, row_of_choice, ends, 65) == 1.25).all()


@pytest.mark.parametrize(
    "num_experts, tokens, top_k",
    # One program, several of one step each, and as many as there may be with several steps.
    [(5, 1, 1), (5, 0, 2), (16, 1400, 1), (33, 301, 3), (128, 1100, 2)],
    ids=str,
)
def test_rows_are_placed_by_a_stable_sort(num_experts, tokens, top_k):
    choices = torch.randint(0, num_experts + 1, (tokens, top_k), generator=torch.Generator().manual_seed(0))
    order, row_of_choice, ends = place_rows(choices, num_experts)
    by_expert, expected = choices.flatten().sort(stable=True)
    assert torch.equal(order.long(), expected)
    assert torch.equal(row_of_choice[expected].long(), torch.arange(tokens * top_k))
    assert torch.equal(ends.long(), by_expert.bincount(minlength=num_experts + 1)[:-1].cumsum(0))
    assert {order.dtype, row_of_choice.dtype, ends.dtype} == {torch.int32}


def test_choices_need_not_be_contiguous():
    choices = torch.randint(0, 4, (2, 50), generator=torch.Generator().manual_seed(0)).t()
    assert not choices.is_contiguous()
    for found, expected in zip(place_rows(choices, 4), place_rows(choices.contiguous(), 4), strict=True):
        assert torch.equal(found, expected)
