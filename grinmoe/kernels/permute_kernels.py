"""Triton kernels for what surrounds the experts' matrix products: where each choice goes, SwiGLU, the weighted sum.

Everything here is bound by memory. One choice of a token is one row; rows are sorted by expert, as grouped products want
them. Nothing waits for the device, and no float is added atomically: results repeat bit for bit.

Kernels that stream give their bytes, waves and masked share, computed: the released layer (H 4096, I 6400, E 16, K 2) in
bfloat16, registers as Triton 3.9 assigns them for sm_90, 132 multiprocessors.

Shapes: T tokens, K experts per token, N = T * K rows, E experts, H hidden size, I expert width, P programs.

Imported only where Triton is. Under TRITON_INTERPRET=1 the kernels run on a CPU, for tests.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launching import interpreted, launch_kernel

# Numbers of one tensor that a program holds at once: two accesses of 16 bytes for each of 128 threads in bfloat16.
_TILE = 2048
# Numbers that a program holds in registers: its one-hot matrix, or all programs' counts.
_MOST_NUMBERS = 8192


@triton.jit
def _count_rows_kernel(
    experts_ptr, counts_ptr, num_choices, SLOTS: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr
):
    """counts[p, e]: how many of the BLOCK * STEPS choices of program p are of expert e; E stands for "served elsewhere"."""
    program = tl.program_id(0)
    slots = tl.arange(0, SLOTS)
    counts = tl.zeros([SLOTS], dtype=tl.int32)
    for step in range(STEPS):
        choices = (program * STEPS + step) * BLOCK + tl.arange(0, BLOCK)
        inside = choices < num_choices
        experts = tl.load(experts_ptr + choices, mask=inside, other=0).to(tl.int32)
        one_hot = (experts[:, None] == slots[None, :]) & inside[:, None]
        counts += tl.sum(one_hot.to(tl.int32), axis=0)
    tl.store(counts_ptr + program * SLOTS + slots, counts)


@triton.jit
def _place_rows_kernel(
    experts_ptr,
    counts_ptr,
    order_ptr,
    row_of_choice_ptr,
    ends_ptr,
    num_choices,
    num_programs,
    NUM_EXPERTS: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    """A stable counting sort: row = start of the expert's group + its choices in earlier programs + those before it here."""
    program = tl.program_id(0)
    slots = tl.arange(0, SLOTS)
    programs = tl.arange(0, PROGRAMS)
    counts = tl.load(
        counts_ptr + programs[:, None] * SLOTS + slots[None, :], mask=(programs < num_programs)[:, None], other=0
    )
    totals = tl.sum(counts, axis=0)
    ends = tl.cumsum(totals, axis=0)
    following = ends - totals + tl.sum(tl.where((programs < program)[:, None], counts, 0), axis=0)
    if program == 0:
        tl.store(ends_ptr + slots, ends, mask=slots < NUM_EXPERTS)
    for step in range(STEPS):
        choices = (program * STEPS + step) * BLOCK + tl.arange(0, BLOCK)
        inside = choices < num_choices
        experts = tl.load(experts_ptr + choices, mask=inside, other=0).to(tl.int32)
        one_hot = ((experts[:, None] == slots[None, :]) & inside[:, None]).to(tl.int32)
        before = tl.cumsum(one_hot, axis=0) - one_hot
        rows = tl.sum(one_hot * (before + following[None, :]), axis=1)
        tl.store(order_ptr + rows, choices, mask=inside)
        tl.store(row_of_choice_ptr + choices, rows, mask=inside)
        following += tl.sum(one_hot, axis=0)


def place_rows(selected_experts: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Sort the choices of all tokens by expert, without a wait for the device. Two launches.

    Args:
        selected_experts: (T, K) integer. Under expert parallelism, `num_experts` marks an expert that lives elsewhere.
        num_experts: E, at most 128.

    Returns:
        order (N,): the choice, a position in the flattened (T, K), of every row; rows of expert 0 first and in the order of
        the choices, those served elsewhere last. row_of_choice (N,): its inverse. ends (E,): where each expert's rows
        end. All int32.
    """
    num_choices, device = selected_experts.numel(), selected_experts.device
    slots = triton.next_power_of_2(num_experts + 1)
    block = _MOST_NUMBERS // slots
    # Batches of many lengths share one kernel: up to 64k choices of 16 experts take one step. (Steps are compiled in because
    # Triton 3.6's interpreter takes no argument as the end of a range.)
    most_programs = _MOST_NUMBERS // slots
    steps = max(1, triton.cdiv(num_choices, block * most_programs))
    programs = max(1, triton.cdiv(num_choices, block * steps))
    counts = torch.empty(programs, slots, dtype=torch.int32, device=device)
    order, row_of_choice = (torch.empty(num_choices, dtype=torch.int32, device=device) for _ in range(2))
    ends = torch.empty(num_experts, dtype=torch.int32, device=device)
    experts = selected_experts.contiguous()
    launch_kernel(_count_rows_kernel, (programs,), experts, counts, num_choices, SLOTS=slots, BLOCK=block, STEPS=steps)
    launch_kernel(
        _place_rows_kernel,
        (programs,),
        experts,
        counts,
        order,
        row_of_choice,
        ends,
        num_choices,
        programs,
        NUM_EXPERTS=num_experts,
        SLOTS=slots,
        BLOCK=block,
        STEPS=steps,
        PROGRAMS=most_programs,
    )
    return order, row_of_choice, ends


@triton.jit
def _zero_idle_experts_kernel(gradient_ptr, ends_ptr, SIZE: tl.constexpr, PROGRAMS: tl.constexpr, BLOCK: tl.constexpr):
    expert = tl.program_id(1)
    start = tl.load(ends_ptr + expert - 1, mask=expert > 0, other=0)
    if tl.load(ends_ptr + expert) == start:
        zeros = tl.zeros([BLOCK], dtype=gradient_ptr.dtype.element_ty)
        for first in range(0, SIZE, PROGRAMS * BLOCK):
            numbers = first + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
            tl.store(gradient_ptr + expert.to(tl.int64) * SIZE + numbers, zeros, mask=numbers < SIZE)


def zero_idle_experts(gradient: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """
    Fill the weight gradient of every expert without rows with zeros, in place and without a wait for the device.

    A grouped product may write nothing for an empty group, and leave what the memory held before. Programs of the others
    read two numbers and end: 64 times E of them, one launch.

    Args:
        gradient: (E, out, in), contiguous.
        ends: of `place_rows`.

    Returns:
        `gradient`.
    """
    num_experts, size = gradient.shape[0], gradient[0].numel()
    programs, block = (1, min(2**20, triton.next_power_of_2(size))) if interpreted() else (64, 4096)
    constants = {"SIZE": size, "PROGRAMS": programs, "BLOCK": block}
    launch_kernel(_zero_idle_experts_kernel, (programs, num_experts), gradient, ends, **constants)
    return gradient


@triton.jit
def _gather_rows_kernel(
    hidden_ptr,
    row_of_choice_ptr,
    ends_ptr,
    output_ptr,
    num_tokens,
    hidden,
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """
    Each token is read once and written K times; a gather by row reads it K times, too far apart for a cache.

    Released layer, 16k tokens: 0.40 GB (a gather by row: 0.54); 32768 programs of 2 tokens by 1024 columns, 15.5 waves of
    16 a multiprocessor; nothing masked.
    """
    blocks = tl.cdiv(hidden, COLUMNS)
    tokens = (tl.program_id(0) // blocks).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    columns = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    exists = tokens < num_tokens
    served = tl.load(ends_ptr + NUM_EXPERTS - 1)
    first_row = served
    for k in tl.static_range(TOP_K):
        row = tl.load(row_of_choice_ptr + tokens * TOP_K + k, mask=exists, other=2147483647)
        first_row = tl.minimum(first_row, row)
    inside = (columns < hidden) & (first_row < served)[:, None]
    values = tl.load(hidden_ptr + tokens[:, None] * hidden + columns, mask=inside, other=0.0)
    for k in tl.static_range(TOP_K):
        row = tl.load(row_of_choice_ptr + tokens * TOP_K + k, mask=exists, other=2147483647).to(tl.int64)
        inside = (columns < hidden) & (row < served)[:, None]
        tl.store(output_ptr + row[:, None] * hidden + columns, values, mask=inside)


def gather_rows(
    hidden_states: torch.Tensor, row_of_choice: torch.Tensor, ends: torch.Tensor, top_k: int
) -> torch.Tensor:
    """
    The row of each assignment's token, sorted by expert: `hidden_states[order // top_k]` without an index of tokens.

    Args:
        hidden_states: (T, H).
        row_of_choice, ends: of `place_rows`.
        top_k: K.

    Returns:
        (N, H) in the same dtype. Rows of choices served elsewhere, the last, are left uninitialised, and a token that has
        none here is not read.
    """
    num_tokens, hidden = hidden_states.shape
    output = hidden_states.new_empty(num_tokens * top_k, hidden)
    if output.numel():
        tokens, columns = _tile(hidden)
        launch_kernel(
            _gather_rows_kernel,
            (triton.cdiv(num_tokens, tokens) * triton.cdiv(hidden, columns),),
            hidden_states.contiguous(),
            row_of_choice,
            ends,
            output,
            num_tokens,
            hidden,
            NUM_EXPERTS=ends.numel(),
            TOP_K=top_k,
            TOKENS=tokens,
            COLUMNS=columns,
        )
    return output


@triton.jit
def _swiglu_kernel(
    pre_ptr,
    keep_ptr,
    ends_ptr,
    output_ptr,
    num_rows,
    width,
    NUM_EXPERTS: tl.constexpr,
    HAS_KEEP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """
    Columns are fastest in the grid, so that programs that run together read neighbouring memory.

    Released layer, 16k tokens: 1.26 GB; 102400 programs of 8 rows by 256 columns, 48.5 waves of 16 a multiprocessor;
    nothing masked.
    """
    blocks = tl.cdiv(width, COLUMNS)
    rows = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    columns = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    served = tl.load(ends_ptr + NUM_EXPERTS - 1)
    inside = (rows < tl.minimum(num_rows, served)) & (columns < width)
    gate = tl.load(pre_ptr + rows * 2 * width + columns, mask=inside, other=0.0)
    up = tl.load(pre_ptr + rows * 2 * width + width + columns, mask=inside, other=0.0).to(tl.float32)
    gate = gate.to(tl.float32)
    activation = gate * tl.sigmoid(gate) * up
    if HAS_KEEP:
        activation *= tl.load(keep_ptr + rows * width + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(output_ptr + rows * width + columns, activation.to(output_ptr.dtype.element_ty), mask=inside)


def swiglu(pre_activation: torch.Tensor, ends: torch.Tensor, keep: torch.Tensor | None = None) -> torch.Tensor:
    """
    silu(gate) * up * keep, computed in float32.

    Args:
        pre_activation: (N, 2I), gate first.
        ends: of `place_rows`. Rows of choices served elsewhere, the last, are neither read nor written.
        keep: (N, I) dropout, or None.

    Returns:
        (N, I) in the dtype of `pre_activation`.
    """
    num_rows, width = pre_activation.shape[0], pre_activation.shape[1] // 2
    output = pre_activation.new_empty(num_rows, width)
    if output.numel():
        rows, columns = _tile(width)
        launch_kernel(
            _swiglu_kernel,
            (triton.cdiv(num_rows, rows) * triton.cdiv(width, columns),),
            pre_activation,
            pre_activation if keep is None else keep,
            ends,
            output,
            num_rows,
            width,
            NUM_EXPERTS=ends.numel(),
            HAS_KEEP=keep is not None,
            ROWS=rows,
            COLUMNS=columns,
        )
    return output


@triton.jit
def _swiglu_backward_kernel(
    grad_ptr,
    pre_ptr,
    keep_ptr,
    weights_ptr,
    order_ptr,
    ends_ptr,
    grad_pre_ptr,
    weighted_ptr,
    grad_weights_ptr,
    num_rows,
    WIDTH: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    HAS_KEEP: tl.constexpr,
    WEIGHTED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """
    An iteration asks for all that it reads before it uses any of it. Each thread keeps its part of the sum over columns
    until the end, so that no iteration waits for another warp.

    Released layer, 16k tokens: 2.52 GB; 4096 programs of 8 rows, 256 columns at a time, 6.2 waves of 5 a multiprocessor;
    nothing masked; 6 loads of 16 bytes per thread and iteration.
    """
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = rows < num_rows
    served = exists & (rows < tl.load(ends_ptr + NUM_EXPERTS - 1))
    choices = tl.load(order_ptr + rows, mask=exists, other=0)
    weights = tl.load(weights_ptr + choices, mask=exists, other=0.0).to(tl.float32)[:, None]
    products = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for start in range(0, WIDTH, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)[None, :]
        inside = served[:, None] & (columns < WIDTH)
        narrow, wide = rows[:, None] * WIDTH + columns, rows[:, None] * 2 * WIDTH + columns
        gate = tl.load(pre_ptr + wide, mask=inside, other=0.0)
        up = tl.load(pre_ptr + wide + WIDTH, mask=inside, other=0.0)
        grad = tl.load(grad_ptr + narrow, mask=inside, other=0.0)
        if HAS_KEEP:
            keep = tl.load(keep_ptr + narrow, mask=inside, other=0.0).to(tl.float32)
        gate, up, grad = gate.to(tl.float32), up.to(tl.float32), grad.to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        activation = silu * up
        if HAS_KEEP:
            grad *= keep
        products += grad * activation
        if WEIGHTED:
            activation *= weights
            if HAS_KEEP:
                activation *= keep
            tl.store(weighted_ptr + narrow, activation.to(weighted_ptr.dtype.element_ty), mask=inside)
        grad *= weights
        # d silu / d gate = sigmoid + silu * (1 - sigmoid)
        grad_gate = grad * up * (sigmoid + silu * (1.0 - sigmoid))
        tl.store(grad_pre_ptr + wide, grad_gate.to(grad_pre_ptr.dtype.element_ty), mask=inside)
        tl.store(grad_pre_ptr + wide + WIDTH, (grad * silu).to(grad_pre_ptr.dtype.element_ty), mask=inside)
    grad_weights = tl.sum(products, axis=1)
    tl.store(grad_weights_ptr + choices, grad_weights.to(grad_weights_ptr.dtype.element_ty), mask=exists)


def swiglu_backward(
    grad_activation: torch.Tensor,
    pre_activation: torch.Tensor,
    weights: torch.Tensor,
    order: torch.Tensor,
    ends: torch.Tensor,
    keep: torch.Tensor | None = None,
    weighted: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """
    The way back through w * down(silu(gate) * up * keep), one launch.

    Args:
        grad_activation: (N, I), of down's input, not yet multiplied with the routing weight.
        pre_activation: (N, 2I).
        weights: (T, K) routing weights.
        order, ends: of `place_rows`.
        keep: (N, I) dropout, or None.
        weighted: whether the weighted activation is wanted (for down_proj's gradient).

    Returns:
        The pre-activation's gradient (N, 2I); w * activation (N, I) or None; the routing weights' gradient (T, K), the inner
        product of `grad_activation` and the activation, 0 for choices served elsewhere. In rows of those the first two are
        left uninitialised.
    """
    num_rows, width = grad_activation.shape
    grad_pre = torch.empty_like(pre_activation)
    weighted_activation = torch.empty_like(grad_activation) if weighted else None
    grad_weights = torch.empty_like(weights, memory_format=torch.contiguous_format)
    if num_rows:
        rows, columns = _tile(width)
        launch_kernel(
            _swiglu_backward_kernel,
            (triton.cdiv(num_rows, rows),),
            grad_activation,
            pre_activation,
            grad_activation if keep is None else keep,
            weights.contiguous(),
            order,
            ends,
            grad_pre,
            grad_pre if weighted_activation is None else weighted_activation,
            grad_weights,
            num_rows,
            WIDTH=width,
            NUM_EXPERTS=ends.numel(),
            HAS_KEEP=keep is not None,
            WEIGHTED=weighted,
            ROWS=rows,
            COLUMNS=columns,
        )
    return grad_pre, weighted_activation, grad_weights


@triton.jit
def _combine_kernel(
    rows_ptr,
    row_of_choice_ptr,
    ends_ptr,
    weights_ptr,
    output_ptr,
    num_tokens,
    hidden,
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """
    Released layer, 16k tokens: 0.40 GB; 32768 programs of 2 tokens by 1024 columns, 15.5 waves of 16 a multiprocessor;
    nothing masked.
    """
    blocks = tl.cdiv(hidden, COLUMNS)
    tokens = (tl.program_id(0) // blocks).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    columns = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    exists = tokens < num_tokens
    served = tl.load(ends_ptr + NUM_EXPERTS - 1)
    total = tl.zeros([TOKENS, COLUMNS], dtype=tl.float32)
    for k in tl.static_range(TOP_K):
        row = tl.load(row_of_choice_ptr + tokens * TOP_K + k, mask=exists, other=0).to(tl.int64)
        # Rows of choices served elsewhere were never written.
        inside = (exists & (row < served))[:, None] & (columns < hidden)
        values = tl.load(rows_ptr + row[:, None] * hidden + columns, mask=inside, other=0.0).to(tl.float32)
        if HAS_WEIGHTS:
            weight = tl.load(weights_ptr + tokens * TOP_K + k, mask=exists, other=0.0).to(tl.float32)
            values *= weight[:, None]
        total += values
    inside = exists[:, None] & (columns < hidden)
    tl.store(output_ptr + tokens[:, None] * hidden + columns, total.to(output_ptr.dtype.element_ty), mask=inside)


def combine(
    rows: torch.Tensor,
    row_of_choice: torch.Tensor,
    ends: torch.Tensor,
    top_k: int,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Sum the rows of each token's choices, times their weights: a gather, so that nothing is added atomically.

    Args:
        rows: (N, H), sorted by expert. Rows of choices served elsewhere, the last, are not read.
        row_of_choice, ends: of `place_rows`.
        top_k: K.
        weights: (T, K), or None for 1.

    Returns:
        (T, H) in the dtype of `rows`, summed in float32.
    """
    num_tokens, hidden = rows.shape[0] // top_k, rows.shape[1]
    output = rows.new_empty(num_tokens, hidden)
    if output.numel():
        tokens, columns = _tile(hidden)
        launch_kernel(
            _combine_kernel,
            (triton.cdiv(num_tokens, tokens) * triton.cdiv(hidden, columns),),
            rows,
            row_of_choice,
            ends,
            rows if weights is None else weights.contiguous(),
            output,
            num_tokens,
            hidden,
            NUM_EXPERTS=ends.numel(),
            TOP_K=top_k,
            HAS_WEIGHTS=weights is not None,
            TOKENS=tokens,
            COLUMNS=columns,
        )
    return output


def _tile(width: int) -> tuple[int, int]:
    """Rows and columns of a program's tile: of the powers of two between 64 and 1024 the columns that mask the least.

    In the interpreter, where a program costs more than its numbers, as many rows as there may be.
    """
    widest = min(1024, triton.next_power_of_2(width))
    powers = [2**k for k in range(11) if min(64, widest) <= 2**k <= widest]
    columns = min(powers, key=lambda power: (triton.cdiv(width, power) * power, -power))
    return (64 if interpreted() else _TILE // columns), columns
