"""Triton kernels for the experts of a few tokens, as in decoding: every needed expert is read once, and nothing is sorted.

What such a layer takes is the time to read its experts' weights. A launch for each of the two products, and between them
only the activations, N * I numbers. Each program owns some rows of a weight matrix, reads them from end to end, and
multiplies them with all tokens of that expert at once; the others' rows are masked, which costs no traffic. Nothing waits
for the device, sizes on the host are the shapes alone, and no float is added atomically: the two launches can be captured
in a CUDA graph, compile, and repeat bit for bit.

Why a padded tl.dot for one token too, and no multiplying and summing up: at batch 1 of the released size (2 experts of 3 *
6400 * 4096 weights, 315 MB in bfloat16) padding to the 16 rows that tl.dot asks for makes 5 GFLOP, 1 % of what an H100
multiplies in the 0.1 ms that reading takes at 3 TB/s. Loads of a dot go through shared memory, several steps ahead, so the
bytes in flight do not have to fit into registers.

Shapes: T tokens, K experts per token, N = T * K choices, E experts, H hidden size, I expert width.

Imported only where Triton is. Under TRITON_INTERPRET=1 the kernels run on a CPU, for tests.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .autograd import takes_operator
from .launching import interpreted, launch_kernel

# Beyond it an expert has several tokens on average, tiles grow with all of them, and grouped products are made for that.
MAX_CHOICES = 128


@triton.jit
def _expert_of_slot(
    selected_ptr, slot, num_choices, NUM_EXPERTS: tl.constexpr, CHOICES: tl.constexpr, SLOTS_ARE_CHOICES: tl.constexpr
):
    """The slot's expert, and whether the slot has work: of choices that share an expert only the first has."""
    index = tl.arange(0, CHOICES)
    selected = tl.load(selected_ptr + index, mask=index < num_choices, other=NUM_EXPERTS).to(tl.int32)
    if SLOTS_ARE_CHOICES:
        expert = tl.load(selected_ptr + slot).to(tl.int32)
        earlier = tl.sum(((selected == expert) & (index < slot)).to(tl.int32), axis=0)
        works = (earlier == 0) & (expert < NUM_EXPERTS)
    else:
        expert = slot
        works = tl.sum((selected == expert).to(tl.int32), axis=0) > 0
    return expert, works


@triton.jit
def _multiply(x, weight, total, WIDEN: tl.constexpr):
    if WIDEN:
        x, weight = x.to(tl.float32), weight.to(tl.float32)
    return tl.dot(x, weight, total, input_precision="ieee")


@triton.jit
def _gate_up_kernel(
    hidden_ptr,
    selected_ptr,
    weight_ptr,
    activation_ptr,
    num_tokens,
    HIDDEN: tl.constexpr,
    WIDTH: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    CHOICES: tl.constexpr,
    SLOTS_ARE_CHOICES: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """activation[choice] = silu(gate) * up, for ROWS of I and all choices of the slot's expert."""
    num_choices = num_tokens * TOP_K
    expert, works = _expert_of_slot(
        selected_ptr, tl.program_id(1), num_choices, NUM_EXPERTS, CHOICES, SLOTS_ARE_CHOICES
    )
    if works:
        tokens = tl.arange(0, TOKENS)
        choice = tl.full([TOKENS], -1, dtype=tl.int32)
        for k in tl.static_range(TOP_K):
            selected = tl.load(selected_ptr + tokens * TOP_K + k, mask=tokens < num_tokens, other=NUM_EXPERTS)
            choice = tl.where(selected.to(tl.int32) == expert, tokens * TOP_K + k, choice)
        chosen = (choice >= 0)[:, None]
        rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        row_exists = (rows < WIDTH)[None, :]
        hidden = hidden_ptr + tokens.to(tl.int64)[:, None] * HIDDEN
        gate_weight = weight_ptr + expert.to(tl.int64) * 2 * WIDTH * HIDDEN + rows.to(tl.int64)[None, :] * HIDDEN
        up_weight = gate_weight + WIDTH * HIDDEN
        gate = tl.zeros([TOKENS, ROWS], dtype=tl.float32)
        up = tl.zeros([TOKENS, ROWS], dtype=tl.float32)
        for start in range(0, HIDDEN, COLUMNS):
            columns = start + tl.arange(0, COLUMNS)
            inside = columns < HIDDEN
            x = tl.load(hidden + columns[None, :], mask=chosen & inside[None, :], other=0.0)
            of_gate = tl.load(gate_weight + columns[:, None], mask=row_exists & inside[:, None], other=0.0)
            gate = _multiply(x, of_gate, gate, WIDEN)
            of_up = tl.load(up_weight + columns[:, None], mask=row_exists & inside[:, None], other=0.0)
            up = _multiply(x, of_up, up, WIDEN)
        activation = gate * tl.sigmoid(gate) * up
        target = activation_ptr + choice.to(tl.int64)[:, None] * WIDTH + rows[None, :]
        tl.store(target, activation.to(activation_ptr.dtype.element_ty), mask=chosen & row_exists)


@triton.jit
def _down_kernel(
    activation_ptr,
    selected_ptr,
    routing_ptr,
    weight_ptr,
    output_ptr,
    num_tokens,
    HIDDEN: tl.constexpr,
    WIDTH: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    CHOICES: tl.constexpr,
    SLOTS_ARE_CHOICES: tl.constexpr,
    SLOTS: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """output[token] = sum over its choices of routing weight * down(activation), for ROWS of H: all experts in turn."""
    tokens = tl.arange(0, TOKENS)
    exists = tokens < num_tokens
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_exists = (rows < HIDDEN)[None, :]
    total = tl.zeros([TOKENS, ROWS], dtype=tl.float32)
    for slot in range(0, SLOTS):
        expert, works = _expert_of_slot(selected_ptr, slot, num_tokens * TOP_K, NUM_EXPERTS, CHOICES, SLOTS_ARE_CHOICES)
        if works:
            choice = tl.full([TOKENS], -1, dtype=tl.int32)
            routing_weight = tl.zeros([TOKENS], dtype=tl.float32)
            for k in tl.static_range(TOP_K):
                selected = tl.load(selected_ptr + tokens * TOP_K + k, mask=exists, other=NUM_EXPERTS).to(tl.int32)
                weight = tl.load(routing_ptr + tokens * TOP_K + k, mask=exists, other=0.0).to(tl.float32)
                choice = tl.where(selected == expert, tokens * TOP_K + k, choice)
                routing_weight += tl.where(selected == expert, weight, 0.0)
            chosen = (choice >= 0)[:, None]
            activation = activation_ptr + choice.to(tl.int64)[:, None] * WIDTH
            down_weight = weight_ptr + expert.to(tl.int64) * HIDDEN * WIDTH + rows.to(tl.int64)[None, :] * WIDTH
            product = tl.zeros([TOKENS, ROWS], dtype=tl.float32)
            for start in range(0, WIDTH, COLUMNS):
                columns = start + tl.arange(0, COLUMNS)
                inside = columns < WIDTH
                x = tl.load(activation + columns[None, :], mask=chosen & inside[None, :], other=0.0)
                of_down = tl.load(down_weight + columns[:, None], mask=row_exists & inside[:, None], other=0.0)
                product = _multiply(x, of_down, product, WIDEN)
            total += product * routing_weight[:, None]
    target = output_ptr + tokens.to(tl.int64)[:, None] * HIDDEN + rows[None, :]
    tl.store(target, total.to(output_ptr.dtype.element_ty), mask=exists[:, None] & row_exists)


class Tile(NamedTuple):
    """What a program takes at once: all `tokens`, `rows` of a weight, `columns` of the dimension that is summed up.

    `stages`: how many steps of columns are under way, in shared memory.
    """

    tokens: int
    rows: int
    columns: int
    warps: int
    stages: int


def gate_up_tile(tokens: int, dtype: torch.dtype) -> Tile:
    """
    At batch 1 of the released size: 2 * 400 programs of 2 * 16 rows, 256 KB each, and 48 KB of shared memory, so four to
    an SM. 528 of 800 begin together, each with at least three steps of 8 KB of weights under way: 12.7 MB, where 3.35
    TB/s at 0.7 us of latency ask for 2.3 MB. The others follow one by one; the last to end are small.
    """
    return _tile(tokens, dtype, stages=5)


def down_tile(tokens: int, dtype: torch.dtype) -> Tile:
    """
    256 programs of 16 rows at every batch size: 200 KB for each expert in turn, summed up in registers, which saves the
    partial sums of a split over experts, their buffer and a third launch. All run at once, two to an SM, with at least
    six steps of 4 KB under way, 6.3 MB in all.
    """
    return _tile(tokens, dtype, stages=8)


def gate_up_tiles(tokens: int) -> list[Tile]:
    """Tiles of the first product to measure in 16 bits for up to 32 tokens, the one in use first."""
    return _tiles(tokens, gate_up_tile, [(16, 256, 4, 4), (32, 64, 4, 6), (32, 128, 8, 4), (64, 64, 4, 5)])


def down_tiles(tokens: int) -> list[Tile]:
    """Tiles of the second product to measure, as `gate_up_tiles`."""
    return _tiles(tokens, down_tile, [(16, 128, 4, 8), (16, 512, 8, 3), (32, 128, 4, 6)])


def _tiles(tokens: int, in_use: Callable[[int, torch.dtype], Tile], others: list[tuple[int, ...]]) -> list[Tile]:
    if tokens > 32:
        raise ValueError(f"tiles to measure are for up to 32 tokens, not {tokens}")
    first = in_use(tokens, torch.bfloat16)
    return [first, *(Tile(first.tokens, *sizes) for sizes in others)]


def _tile(tokens: int, dtype: torch.dtype, stages: int) -> Tile:
    padded = max(16, triton.next_power_of_2(tokens))
    if interpreted():
        return Tile(padded, rows=64, columns=256, warps=1, stages=1)
    if dtype == torch.float32:
        # Not for tensor cores: operands stand in registers.
        return Tile(padded, rows=16, columns=16, warps=4, stages=stages)
    if padded < 64:
        return Tile(padded, rows=16, columns=128, warps=2, stages=stages)
    # From 64 rows on a group of four warps multiplies, and tokens take the larger part of shared memory.
    return Tile(padded, rows=32, columns=4096 // padded, warps=4, stages=stages)


def few_tokens_experts(
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
) -> torch.Tensor:
    """
    Sum over a token's choices of weight * down(silu(gate) * up), for a few tokens and without gradients. Two launches.

    Args:
        hidden_states: (T, H), on a GPU, float32, bfloat16 or float16.
        top_k_index: (T, K) integer. Under expert parallelism E marks an expert that lives elsewhere: it adds nothing.
        top_k_weights: (T, K), any floating dtype.
        gate_up_proj: (E, 2I, H), gate first, in the dtype of `hidden_states`.
        down_proj: (E, H, I), the same.

    Returns:
        (T, H) in the dtype of `hidden_states`; products are summed up in float32, activations rounded to the dtype.

    Raises:
        ValueError: T * K exceeds MAX_CHOICES, dtypes differ, or a gradient is wanted.
    """
    if top_k_index.numel() > MAX_CHOICES:
        raise ValueError(
            f"few_tokens_experts is for up to {MAX_CHOICES} choices, not {top_k_index.numel()} (tokens times experts per "
            "token); use a grouped product"
        )
    dtypes = {hidden_states.dtype, gate_up_proj.dtype, down_proj.dtype}
    if len(dtypes) > 1:
        raise ValueError(
            f"few_tokens_experts got hidden_states in {hidden_states.dtype}, gate_up_proj in {gate_up_proj.dtype} and "
            f"down_proj in {down_proj.dtype}; give all in one dtype"
        )
    differentiable = (hidden_states, top_k_weights, gate_up_proj, down_proj)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in differentiable):
        raise ValueError("few_tokens_experts computes no gradients; call it under torch.no_grad()")
    # Calling an operator takes the host longer than both launches do. What has no values asks it for shapes.
    has_values = not takes_operator(hidden_states) and not hidden_states.is_meta
    function = launch if has_values else _few_tokens_experts
    return function(hidden_states, top_k_index, top_k_weights, gate_up_proj, down_proj)


@torch.library.custom_op("grinmoe::few_tokens_experts", mutates_args=())
def _few_tokens_experts(
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
) -> torch.Tensor:
    return launch(hidden_states, top_k_index, top_k_weights, gate_up_proj, down_proj)


@_few_tokens_experts.register_fake
def _(hidden_states, top_k_index, top_k_weights, gate_up_proj, down_proj):
    return torch.empty_like(hidden_states, memory_format=torch.contiguous_format)


def launch(
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    first: Tile | None = None,
    second: Tile | None = None,
) -> torch.Tensor:
    """As `few_tokens_experts`, unchecked, with the tiles of the two products if others than the usual are to be tried."""
    num_tokens, hidden = hidden_states.shape
    top_k, (num_experts, _, width) = top_k_index.shape[1], down_proj.shape
    output = torch.empty_like(hidden_states, memory_format=torch.contiguous_format)
    if not output.numel():
        return output
    num_choices = num_tokens * top_k
    activation = hidden_states.new_empty(num_choices, width)
    hidden_states, selected, routing = (t.contiguous() for t in (hidden_states, top_k_index, top_k_weights))
    gate_up_proj, down_proj = gate_up_proj.contiguous(), down_proj.contiguous()
    slots = min(num_choices, num_experts)
    shared = {
        "HIDDEN": hidden,
        "WIDTH": width,
        "NUM_EXPERTS": num_experts,
        "TOP_K": top_k,
        "CHOICES": triton.next_power_of_2(num_choices),
        "SLOTS_ARE_CHOICES": num_choices < num_experts,
        # The interpreter keeps bfloat16 in integers and would multiply those.
        "WIDEN": interpreted(),
    }
    tile = first or gate_up_tile(num_tokens, hidden_states.dtype)
    grid = triton.cdiv(width, tile.rows), slots
    arguments = hidden_states, selected, gate_up_proj, activation, num_tokens
    launch_kernel(_gate_up_kernel, grid, *arguments, **shared, **_options(tile))
    tile = second or down_tile(num_tokens, hidden_states.dtype)
    grid = (triton.cdiv(hidden, tile.rows),)
    arguments = activation, selected, routing, down_proj, output, num_tokens
    launch_kernel(_down_kernel, grid, *arguments, SLOTS=slots, **shared, **_options(tile))
    return output


def _options(tile: Tile) -> dict[str, int]:
    return {
        "TOKENS": tile.tokens,
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }
