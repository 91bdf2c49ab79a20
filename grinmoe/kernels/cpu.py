"""The experts on a CPU, `experts_implementation="grinmoe_cpu"`: one pass over the experts in each direction.

What belongs to an expert stays in one core's cache that way: `side_by_side` gives each thread whole experts, and
`cpu_products` chooses who multiplies. Only the input and the pre-activations are kept for the backward:
activations are computed again, and the routing weights' gradient is their inner product with their own gradient.

Shapes: T tokens, K experts per token, N = T * K choices sorted by expert, E experts, H hidden size, I expert width.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from ..modeling_grinmoe import group_by_expert
from ..quantization_grinmoe import in_forward_mode
from .autograd import autograd_function, is_transformed, takes_operator
from .cpu_products import Product, Products, by_torch, products_for
from .large_memory import empty_like_on_cpu
from .side_by_side import LEAST_FLOPS, side_by_side, workers_for

# Names that a config may give to x * sigmoid(x).
SILU = ("silu", "swish")
# That torch's grouped product takes.
GROUPED_MM_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def is_silu(module: nn.Module) -> bool:
    """Whether these experts' activation is x * sigmoid(x). The config is slow to ask, for every layer of every token."""
    return type(module.act_fn) is nn.SiLU or module.config.hidden_act in SILU


def cpu_experts_forward(
    module: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """
    The experts of `module`, for training and inference on a CPU. Contract of `GrinMoeExperts.forward`.

    Raises:
        ValueError: tensors on another device than the CPU, or an activation other than silu.
    """
    if hidden_states.device.type != "cpu":
        raise ValueError(
            f"experts_implementation='grinmoe_cpu' got tensors on {hidden_states.device}; choose 'grouped_mm' there"
        )
    if not is_silu(module):
        raise ValueError(
            f"experts_implementation='grinmoe_cpu' is for hidden_act='silu', not {module.config.hidden_act!r}; choose "
            "'grouped_mm'"
        )
    gate_up_proj, down_proj = module.gate_up_proj, module.down_proj
    dtype = hidden_states.dtype
    if torch.is_autocast_enabled("cpu"):
        # Weights are cast one expert at a time, inside: a copy of all of them would be kept for the backward.
        hidden_states = hidden_states.to(torch.get_autocast_dtype("cpu"))
    weights = top_k_weights.to(hidden_states.dtype)
    keep = None
    if module.training and module.dropout > 0:
        keep = module.keep_mask(hidden_states.new_empty((top_k_index.numel(), module.down_proj.shape[2])))
    differentiable = (hidden_states, weights, gate_up_proj, down_proj)
    trains = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in differentiable)
    if in_forward_mode():
        output = experts_reference(*differentiable, top_k_index, keep)
    elif takes_operator(hidden_states):
        output, _ = _experts(*differentiable, top_k_index, keep, trains or keep is not None)
    elif trains or keep is not None or is_transformed():
        output, _ = _function(*differentiable, top_k_index, keep)
    else:
        output, _ = experts_and_kept(*differentiable, top_k_index, None, trains=False)
    return output.to(dtype)


# Assigning again is harmless: this module may be imported under several names.
ALL_EXPERTS_FUNCTIONS.register("grinmoe_cpu", cpu_experts_forward)


class _Group(NamedTuple):
    """The choices of one expert.

    Attributes:
        expert: its number.
        tokens: (n,) whose choices they are.
        rows: where they are among the sorted choices.
        size: n.
        length: of the operands of their products, whose rows beyond n are zeros.
    """

    expert: int
    tokens: torch.Tensor
    rows: slice
    size: int
    length: int

    def gather(self, tensor: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:
        """(T, width) to (length, width) in `buffer`: the tokens' rows, and zeros."""
        torch.index_select(tensor, 0, self.tokens, out=buffer[: self.size])
        return self.filled_up(buffer)

    def filled_up(self, buffer: torch.Tensor) -> torch.Tensor:
        """The first `length` rows of `buffer`, after those of the tokens zeros."""
        if self.length > self.size:
            buffer[self.size : self.length] = 0
        return buffer[: self.length]


class _Groups:
    """
    The choices of all tokens, sorted by expert.

    Attributes:
        order: (N,) the choice at each place.
        sizes: how many each expert has.
        products: what is fastest for groups of such sizes.
        shape: (T, K).
        served_here: how many choices the E experts have; others are served elsewhere (expert parallelism).
        longest: the most rows that an operand of a product has.
    """

    def __init__(self, top_k_index: torch.Tensor, gate_up_proj: torch.Tensor, dtype: torch.dtype):
        self.order, self.sizes = group_by_expert(top_k_index, gate_up_proj.shape[0])
        self.shape = top_k_index.shape
        self.served_here = sum(self.sizes)
        self._tokens = self.order // top_k_index.shape[1]
        self._costs = [size for size in self.sizes if size]
        self._workers = workers_for(self._costs, _flops(self.served_here, gate_up_proj))
        rows, threads = self.served_here // max(1, len(self._costs)), torch.get_num_threads() // self._workers
        self.products = products_for(rows, gate_up_proj[0], dtype, threads)
        self.longest = self.products.length(max(self.sizes))

    def each(self, serve: Callable[[Iterator[_Group]], None]) -> None:
        """`serve` all groups, several threads at once where that pays. Its share of them is handed to each call."""
        places = itertools.accumulate(self.sizes, initial=0)
        groups = [
            _Group(expert, self._tokens[start : start + size], slice(start, start + size), size, length)
            for expert, (start, size) in enumerate(zip(places, self.sizes))
            if size
            for length in [self.products.length(size)]
        ]
        side_by_side(serve, groups, self._costs, self._workers)

    def summed(self, rows: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
        """(N, H) in the order of the groups to the sums (T, H) over each token's choices, times `weights` (T, K)."""
        rows[self.served_here :] = 0  # served elsewhere (expert parallelism)
        place = torch.empty_like(self.order)
        place[self.order] = torch.arange(self.order.numel(), device=place.device)
        return nn.functional.embedding_bag(place.view(self.shape), rows, mode="sum", per_sample_weights=weights)

    def by_choice(self, numbers: torch.Tensor) -> torch.Tensor:
        """(N,) in the order of the groups to (T, K)."""
        return torch.empty_like(numbers).index_copy_(0, self.order, numbers).view(self.shape)


def _flops(choices: int, gate_up_proj: torch.Tensor) -> float:
    """Of a forward pass, through the gate's, the up's and the down's matrix."""
    _, of_both, hidden = gate_up_proj.shape
    return 2.0 * choices * (of_both + of_both // 2) * hidden


def experts_and_kept(
    hidden_states: torch.Tensor,
    weights: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    top_k_index: torch.Tensor,
    keep: torch.Tensor | None,
    trains: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum over choices of weight * down(silu(gate) * up * keep), and the pre-activations (N, 2I) if it trains.

    `keep` (N, I) is dropout, by sorted choice.
    """
    if len(hidden_states) == 1 and not trains:
        output, pre_activation = (
            _one_token(hidden_states, weights, gate_up_proj, down_proj, top_k_index[0].tolist()),
            None,
        )
    elif _flops(top_k_index.numel(), gate_up_proj) < LEAST_FLOPS:
        output, pre_activation = _few_tokens(hidden_states, weights, gate_up_proj, down_proj, top_k_index, keep)
    else:
        output, pre_activation = _many_tokens(hidden_states, weights, gate_up_proj, down_proj, top_k_index, keep)
    # With a gradient and without, several tokens take the same way: trainers compare such forwards bit for bit.
    return output, pre_activation if trains else hidden_states.new_empty(0)


def _many_tokens(
    hidden_states, weights, gate_up_proj, down_proj, top_k_index, keep
) -> tuple[torch.Tensor, torch.Tensor]:
    groups = _Groups(top_k_index, gate_up_proj, hidden_states.dtype)
    multiply, (hidden, width) = groups.products.forward, down_proj.shape[1:]
    pre_activation = hidden_states.new_empty(len(groups.order), 2 * width)
    outputs = hidden_states.new_empty(len(groups.order), hidden)

    def serve(mine: Iterator[_Group]) -> None:
        rows = hidden_states.new_empty(groups.longest, hidden)
        activations = hidden_states.new_empty(groups.longest, width)
        for group in mine:
            gate_up = pre_activation[group.rows]
            multiply(group.gather(hidden_states, rows), gate_up_proj[group.expert].to(rows.dtype).t(), gate_up)
            activation = _activation(gate_up, activations[: group.size])
            if keep is not None:
                activation *= keep[group.rows]
            down_weight = down_proj[group.expert].to(rows.dtype)
            multiply(group.filled_up(activations), down_weight.t(), outputs[group.rows])

    groups.each(serve)
    return groups.summed(outputs, weights), pre_activation


def _few_tokens(
    hidden_states, weights, gate_up_proj, down_proj, top_k_index, keep
) -> tuple[torch.Tensor, torch.Tensor]:
    """Here every operation counts. What belongs to all choices stays in the cache anyway, and nothing is filled up."""
    num_experts, choices, threads = len(gate_up_proj), top_k_index.numel(), torch.get_num_threads()
    sorted_experts, order = top_k_index.reshape(-1).sort(stable=True)
    ends = torch.bincount(sorted_experts, minlength=num_experts)[:num_experts].cumsum(0, dtype=torch.int32)
    rows = hidden_states[order // top_k_index.shape[1]]
    multiply = products_for(choices // num_experts, gate_up_proj[0], rows.dtype, threads).forward
    if multiply is by_torch and _takes_grouped_mm(rows, gate_up_proj) and _takes_grouped_mm(rows, down_proj):
        multiplied = functools.partial(_grouped_mm, ends)
    else:
        multiplied = functools.partial(_one_by_one, multiply, ends.tolist())
    pre_activation = multiplied(rows, gate_up_proj)
    gate, up = pre_activation.chunk(2, dim=-1)
    activation = nn.functional.silu(gate).mul_(up)
    if keep is not None:
        activation *= keep
    outputs = multiplied(activation, down_proj)
    if int(ends[-1]) < choices:
        outputs[ends[-1] :] = 0  # served elsewhere (expert parallelism)
    by_choice = torch.empty_like(outputs).index_copy_(0, order, outputs)
    output = torch.bmm(weights.unsqueeze(1), by_choice.view(*weights.shape, rows.shape[1])).squeeze(1)
    return output, pre_activation


def _grouped_mm(ends: torch.Tensor, rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """(N, in), groups of rows that end at `ends` (E,), by their experts' weights (E, out, in), to (N, out)."""
    return nn.functional.grouped_mm(rows, weights.transpose(1, 2), offs=ends)


def _one_by_one(multiply: Product, ends: list[int], rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The same by a product for each expert that has any."""
    result = rows.new_empty(len(rows), weights.shape[1])
    for weight, (start, end) in zip(weights, itertools.pairwise([0, *ends])):
        if start < end:
            multiply(rows[start:end], weight.to(rows.dtype).t(), result[start:end])
    return result


def _takes_grouped_mm(rows: torch.Tensor, weights: torch.Tensor) -> bool:
    """Whether torch's grouped product does: it asks for one dtype, and for rows of whole multiples of 16 bytes."""
    if rows.dtype != weights.dtype or rows.dtype not in GROUPED_MM_DTYPES:
        return False
    return weights.is_contiguous() and weights.shape[2] * weights.itemsize % 16 == 0


def _one_token(hidden_states, weights, gate_up_proj, down_proj, experts: list[int]) -> torch.Tensor:
    """Nothing is to be sorted, gathered or put back."""
    multiply, dtype = (
        products_for(1, gate_up_proj[0], hidden_states.dtype, torch.get_num_threads()).forward,
        hidden_states.dtype,
    )
    gate_up = hidden_states.new_empty(1, gate_up_proj.shape[1])
    activation = hidden_states.new_empty(1, down_proj.shape[2])
    outputs = hidden_states.new_zeros(len(experts), hidden_states.shape[1])
    for output, expert in zip(outputs.split(1), experts):
        if expert < gate_up_proj.shape[0]:  # others are served elsewhere (expert parallelism)
            multiply(hidden_states, gate_up_proj[expert].to(dtype).t(), gate_up)
            multiply(_activation(gate_up, activation), down_proj[expert].to(dtype).t(), output)
    return weights @ outputs


_silu_into = torch.ops.aten.silu.out


def _activation(gate_up: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return _silu_into(gate, out=result).mul_(up)


_experts = torch.library.custom_op("grinmoe::cpu_experts", experts_and_kept, mutates_args=())


@_experts.register_fake
def _(hidden_states, weights, gate_up_proj, down_proj, top_k_index, keep, trains=True):
    pre_activation = hidden_states.new_empty((top_k_index.numel(), gate_up_proj.shape[1]) if trains else 0)
    return torch.empty_like(hidden_states), pre_activation


@torch.library.custom_op("grinmoe::cpu_experts_backward", mutates_args=())
def _experts_backward(
    grad_output: torch.Tensor,
    hidden_states: torch.Tensor,
    weights: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    top_k_index: torch.Tensor,
    keep: torch.Tensor | None,
    pre_activation: torch.Tensor,
    gate_up_trains: bool,
    down_trains: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of the input, the weights, gate_up_proj and down_proj; of what does not train, an empty tensor."""
    groups = _Groups(top_k_index, gate_up_proj, hidden_states.dtype)
    products, longest, (hidden, width) = groups.products, groups.longest, down_proj.shape[1:]
    row_weights = weights.reshape(-1, 1)[groups.order]
    grad_row_weights = weights.new_zeros(len(row_weights))
    grad_rows = hidden_states.new_empty(len(row_weights), hidden)
    grad_gate_up, grad_down = (
        empty_like_on_cpu(weight) if trains else weight.new_empty(0)
        for weight, trains in ((gate_up_proj, gate_up_trains), (down_proj, down_trains))
    )

    def serve(mine: Iterator[_Group]) -> None:
        rows = hidden_states.new_empty(longest, hidden)
        activations, silus, grad_activations = hidden_states.new_empty(3, longest, width)
        grad_pres = hidden_states.new_empty(longest, 2 * width)
        for group in mine:
            expert, size, row_weight = group.expert, group.size, row_weights[group.rows]
            gate, up = pre_activation[group.rows].chunk(2, dim=-1)
            activation, silu, grad_activation = activations[:size], silus[:size], grad_activations[:size]
            grad_gate, grad_up = grad_pres[:size].chunk(2, dim=-1)
            upstream = group.gather(grad_output, rows)  # (length, H), not yet weighted
            products.grad_input(upstream, down_proj[expert].to(rows.dtype), grad_activation)
            _silu_into(gate, out=silu)
            torch.mul(silu, up, out=activation)
            if keep is not None:
                activation *= keep[group.rows]
            grad_row_weights[group.rows] = torch.linalg.vecdot(grad_activation, activation)
            upstream[:size] *= row_weight
            if down_trains:
                _weight_gradient(products, upstream, group.filled_up(activations), grad_down[expert])
            grad_activation *= row_weight
            if keep is not None:
                grad_activation *= keep[group.rows]
            torch.mul(grad_activation, silu, out=grad_up)
            torch.ops.aten.silu_backward.grad_input(grad_activation.mul_(up), gate, grad_input=grad_gate)
            grad_pre = group.filled_up(grad_pres)
            products.grad_input(grad_pre, gate_up_proj[expert].to(rows.dtype), grad_rows[group.rows])
            if gate_up_trains:
                _weight_gradient(products, grad_pre, group.gather(hidden_states, rows), grad_gate_up[expert])

    groups.each(serve)
    idle = [expert for expert, size in enumerate(groups.sizes) if size == 0]
    for gradient in (grad_gate_up, grad_down):
        if gradient.numel():
            gradient[idle] = 0
    return groups.summed(grad_rows), groups.by_choice(grad_row_weights), grad_gate_up, grad_down


def _weight_gradient(products: Products, upstream: torch.Tensor, inputs: torch.Tensor, result: torch.Tensor) -> None:
    if result.dtype == inputs.dtype:
        products.grad_weight(upstream.t(), inputs, result)
    else:  # under autocast
        result.copy_(upstream.t() @ inputs)


@_experts_backward.register_fake
def _(
    grad_output,
    hidden_states,
    weights,
    gate_up_proj,
    down_proj,
    top_k_index,
    keep,
    pre_activation,
    gate_up_trains,
    down_trains,
):
    trained = (gate_up_proj, gate_up_trains), (down_proj, down_trains)
    gradients = [torch.empty_like(weight) if trains else weight.new_empty(0) for weight, trains in trained]
    return torch.empty_like(hidden_states), torch.empty_like(weights), *gradients


def _save(ctx, inputs, output) -> None:
    hidden_states, weights, gate_up_proj, down_proj, top_k_index, keep, _ = inputs
    ctx.save_for_backward(hidden_states, weights, gate_up_proj, down_proj, top_k_index, keep, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_output, _):
    if grad_output is None:
        return (None,) * 7
    gate_up_trains, down_trains = ctx.needs_input_grad[2:4]
    gradients = _experts_backward(grad_output.contiguous(), *ctx.saved_tensors, gate_up_trains, down_trains)
    needed = [gradient if need else None for gradient, need in zip(gradients, ctx.needs_input_grad)]
    return *needed, None, None, None


_experts.register_autograd(_backward, setup_context=_save)


def experts_reference(hidden_states, weights, gate_up_proj, down_proj, top_k_index, keep) -> torch.Tensor:
    """The same sum by differentiable operations, for forward mode and derivatives beyond the first."""
    order, sizes = group_by_expert(top_k_index, gate_up_proj.shape[0])
    rows = hidden_states[order // top_k_index.shape[1]]
    *groups, elsewhere = rows.split([*sizes, rows.shape[0] - sum(sizes)])
    kept = [None] * len(groups) if keep is None else keep.split([*sizes, elsewhere.shape[0]])[:-1]
    outputs = []
    for expert, (group, dropout) in enumerate(zip(groups, kept, strict=True)):
        gate, up = (group @ gate_up_proj[expert].to(group.dtype).t()).chunk(2, dim=-1)
        activation = nn.functional.silu(gate) * up
        outputs.append(
            (activation if dropout is None else activation * dropout) @ down_proj[expert].to(group.dtype).t()
        )
    outputs.append(torch.zeros_like(elsewhere))
    by_choice = torch.cat(outputs)[order.argsort()]
    return (by_choice.view(*weights.shape, by_choice.shape[1]) * weights.unsqueeze(-1)).sum(dim=1)


def _gradients(grad_output, inputs, kept, needed):
    # The operator: `is_grads_batched` of torch.autograd.grad can loop over it.
    return _experts_backward(grad_output.contiguous(), *inputs, *kept, *needed[2:4])


_function = autograd_function(experts_and_kept, _gradients, experts_reference, trainable=4)
