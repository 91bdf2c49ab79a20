"""The kernels for a few tokens, in Triton's interpreter, held to the dense definition of the experts."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from grinmoe.kernels import small_batch_gemm
from grinmoe.kernels.small_batch_gemm import (
    MAX_CHOICES,
    Tile,
    down_tile,
    down_tiles,
    few_tokens_experts,
    gate_up_tile,
    gate_up_tiles,
    launch,
)
from tests.tolerances import FAST_PATH_BFLOAT16, FAST_PATH_FLOAT32

HIDDEN, WIDTH = 40, 24


def distinct(tokens: int, top_k: int, num_experts: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(tokens)
    return torch.rand(tokens, num_experts, generator=generator).topk(top_k).indices


# Choices and number of experts. Fewer choices than experts, and no fewer, are ways of their own.
ROUTINGS = {
    "one token": (distinct(1, 2, 16), 16),
    "one token, top-1": (distinct(1, 1, 4), 4),
    "top-3": (distinct(5, 3, 16), 16),
    "top-3 of 4": (distinct(5, 3, 4), 4),
    "eight tokens": (distinct(8, 2, 16), 16),
    "every expert has several": (distinct(8, 2, 5), 5),
    "more than sixteen tokens": (distinct(21, 2, 5), 5),
    "all tokens on one expert": (torch.full((7, 1), 3), 16),
    "all tokens on two of few": (torch.tensor([[3, 1]]).expand(7, -1), 4),
    "the same expert twice": (torch.tensor([[2, 2], [1, 3]]), 5),
    "the same expert twice, among few": (torch.tensor([[2, 2], [1, 3]]), 4),
    "some served elsewhere": (torch.tensor([[0, 5], [5, 5], [3, 1]]), 5),
    "some served elsewhere, of many": (torch.tensor([[16, 4], [16, 16], [4, 9]]), 16),
    "all served elsewhere": (torch.tensor([[4, 4]]), 4),
}


def arguments(
    choices: torch.Tensor,
    num_experts: int,
    hidden: int = HIDDEN,
    width: int = WIDTH,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    weights = torch.rand(choices.shape, generator=generator).to(dtype)
    gate_up_proj, down_proj = normal(num_experts, 2 * width, hidden), normal(num_experts, hidden, width)
    return normal(choices.shape[0], hidden), choices, weights, gate_up_proj, down_proj


def dense(hidden_states, choices, weights, gate_up_proj, down_proj):
    """In float64: every expert on every token, then the chosen ones; one that lives elsewhere gives 0."""
    hidden_states, weights, gate_up_proj, down_proj = (
        t.double() for t in (hidden_states, weights, gate_up_proj, down_proj)
    )
    gate, up = torch.einsum("th,eih->tei", hidden_states, gate_up_proj).chunk(2, dim=-1)
    outputs = torch.einsum("tei,ehi->teh", torch.nn.functional.silu(gate) * up, down_proj)
    outputs = torch.nn.functional.pad(outputs, (0, 0, 0, 1))
    chosen = outputs.gather(1, choices.unsqueeze(-1).expand(-1, -1, outputs.shape[-1]))
    return (chosen * weights.unsqueeze(-1)).sum(1)


def assert_close(found, expected, bound):
    assert found.shape == expected.shape and found.isfinite().all()
    assert (found.double() - expected).abs().max() <= bound * expected.abs().max()


@pytest.mark.parametrize(
    "dtype, bound",
    [
        (torch.float32, FAST_PATH_FLOAT32),
        (torch.bfloat16, FAST_PATH_BFLOAT16),
        (torch.float16, FAST_PATH_BFLOAT16),
    ],
    ids=str,
)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_it_computes_the_definition(routing, dtype, bound):
    given = arguments(*ROUTINGS[routing], dtype=dtype)
    found = few_tokens_experts(*given)
    assert found.dtype == dtype
    assert_close(found, dense(*given), bound)


@pytest.mark.parametrize("hidden, width", [(1, 1), (17, 33), (130, 5), (31, 259)])
def test_sizes_that_no_block_divides(hidden, width):
    given = arguments(distinct(3, 2, 5), 5, hidden, width)
    assert_close(few_tokens_experts(*given), dense(*given), FAST_PATH_FLOAT32)


def test_several_blocks_of_rows_and_columns():
    given = arguments(distinct(3, 2, 5), 5, hidden=70, width=50)
    tile = Tile(tokens=16, rows=32, columns=16, warps=1, stages=1)
    assert_close(launch(*given, first=tile, second=tile), dense(*given), FAST_PATH_FLOAT32)


@pytest.mark.parametrize("tokens", [1, 8, 32])
def test_tiles_to_measure_compute_the_same(tokens):
    given = arguments(distinct(tokens, 2, 16), 16, dtype=torch.bfloat16)
    assert gate_up_tiles(tokens)[0] == gate_up_tile(tokens, torch.bfloat16)
    assert down_tiles(tokens)[0] == down_tile(tokens, torch.bfloat16)
    for first in gate_up_tiles(tokens):
        assert_close(launch(*given, first=first), dense(*given), FAST_PATH_BFLOAT16)
    for second in down_tiles(tokens):
        assert_close(launch(*given, second=second), dense(*given), FAST_PATH_BFLOAT16)


def test_tiles_to_measure_are_for_few_tokens():
    with pytest.raises(ValueError, match="up to 32 tokens, not 33"):
        gate_up_tiles(33)


def test_what_was_not_computed_is_not_read(monkeypatch):
    """Activations of choices served elsewhere stay uninitialised; here they, and their routing weights, are NaN."""
    new_empty = torch.Tensor.new_empty

    def poisoned(tensor, *args, **kwargs):
        empty = new_empty(tensor, *args, **kwargs)
        return empty.fill_(float("nan")) if empty.is_floating_point() else empty

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    hidden_states, choices, weights, *projections = arguments(*ROUTINGS["some served elsewhere"])
    expected = dense(hidden_states, choices, weights, *projections)
    assert_close(
        launch(hidden_states, choices, weights.masked_fill(choices == 5, float("nan")), *projections),
        expected,
        FAST_PATH_FLOAT32,
    )


def test_routing_weights_may_be_more_exact_than_the_rest():
    hidden_states, choices, weights, *projections = arguments(distinct(2, 2, 5), 5, dtype=torch.bfloat16)
    given = hidden_states, choices, weights.float() / 3, *projections
    found = few_tokens_experts(*given)
    assert found.dtype == torch.bfloat16
    assert_close(found, dense(*given), FAST_PATH_BFLOAT16)


def test_views_are_read_as_they_are():
    hidden_states, choices, weights, gate_up_proj, down_proj = arguments(distinct(4, 2, 5), 5)
    expected = few_tokens_experts(hidden_states, choices, weights, gate_up_proj, down_proj)
    strided = (t.t().contiguous().t() for t in (hidden_states, choices, weights))
    stored_transposed = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (gate_up_proj, down_proj))
    assert torch.equal(few_tokens_experts(*strided, *stored_transposed), expected)


def test_it_repeats_bit_for_bit_and_changes_no_input():
    given = arguments(*ROUTINGS["eight tokens"])
    before = [tensor.clone() for tensor in given]
    assert torch.equal(few_tokens_experts(*given), few_tokens_experts(*given))
    assert all(map(torch.equal, given, before))


def test_no_token_at_all():
    assert few_tokens_experts(*arguments(torch.empty(0, 2, dtype=torch.int64), 4)).shape == (0, HIDDEN)


def test_a_compiled_step():
    torch.compiler.reset()
    compiled = torch.compile(few_tokens_experts, backend="aot_eager", fullgraph=True)
    given = arguments(*ROUTINGS["eight tokens"])
    with torch.no_grad():
        assert torch.equal(compiled(*given), few_tokens_experts(*given))


def test_only_compiled_code_and_what_has_no_values_call_the_operator(monkeypatch):
    """In eager mode its host costs more than both launches."""
    called = []
    operator = small_batch_gemm._few_tokens_experts
    monkeypatch.setattr(small_batch_gemm, "_few_tokens_experts", lambda *given: called.append(0) or operator(*given))
    given = arguments(*ROUTINGS["one token"])
    few_tokens_experts(*given)
    assert not called
    assert few_tokens_experts(*(tensor.to("meta") for tensor in given)).is_meta
    with FakeTensorMode() as mode:
        assert few_tokens_experts(*map(mode.from_tensor, given)).shape == (1, HIDDEN)
    assert len(called) == 2


def test_a_gradient_is_refused():
    hidden_states, *rest = arguments(*ROUTINGS["one token"])
    with pytest.raises(ValueError, match="no gradients"):
        few_tokens_experts(hidden_states.requires_grad_(), *rest)
    with torch.no_grad():
        few_tokens_experts(hidden_states, *rest)


def test_the_operator_keeps_its_word():
    """Shapes, dtypes and strides of the fake, and no aliases."""
    given = arguments(*ROUTINGS["one token"])
    torch.library.opcheck(torch.ops.grinmoe.few_tokens_experts.default, given)


def test_too_many_choices_are_refused():
    most = arguments(distinct(MAX_CHOICES // 2, 2, 4), 4, hidden=8, width=8)
    assert_close(few_tokens_experts(*most), dense(*most), FAST_PATH_FLOAT32)
    with pytest.raises(ValueError, match=f"up to {MAX_CHOICES} choices, not {MAX_CHOICES + 2}"):
        few_tokens_experts(*arguments(distinct(MAX_CHOICES // 2 + 1, 2, 4), 4, hidden=8, width=8))


def test_mixed_dtypes_are_refused():
    hidden_states, *rest = arguments(*ROUTINGS["one token"])
    with pytest.raises(ValueError, match="hidden_states in torch.bfloat16, gate_up_proj in torch.float32"):
        few_tokens_experts(hidden_states.bfloat16(), *rest)
