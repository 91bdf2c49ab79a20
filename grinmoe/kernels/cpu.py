"""The experts on a CPU, `experts_implementation="grinmoe_cpu"`: one pass over the experts in each direction.

What belongs to an expert stays in the cache that way. Only the input and the pre-activations are kept for the backward:
activations are computed again, and the routing weights' gradient is their inner product with their own gradient.

Shapes: T tokens, K experts per token, N = T * K choices sorted by expert, E experts, H hidden size, I expert width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from ..modeling_grinmoe import group_by_expert
from ..quantization_grinmoe import in_forward_mode
from .autograd import autograd_function, is_transformed, takes_operator

# Names that a config may give to x * sigmoid(x).
SILU = ("silu", "swish")


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
    if module.config.hidden_act not in SILU:
        raise ValueError(
            f"experts_implementation='grinmoe_cpu' is for hidden_act='silu', not {module.config.hidden_act!r}; choose "
            "'grouped_mm'"
        )
    gate_up_proj, down_proj = module.gate_up_proj, module.down_proj
    dtype = hidden_states.dtype
    if torch.is_autocast_enabled("cpu"):
        # Nothing inside of an operator is cast by itself.
        autocast = torch.get_autocast_dtype("cpu")
        hidden_states, gate_up_proj, down_proj = (t.to(autocast) for t in (hidden_states, gate_up_proj, down_proj))
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
        output = _inference(*differentiable, top_k_index)
    return output.to(dtype)


# Assigning again is harmless: this module may be imported under several names.
ALL_EXPERTS_FUNCTIONS.register("grinmoe_cpu", cpu_experts_forward)


class _Group(NamedTuple):
    """The choices of one expert.

    Attributes:
        expert: its number.
        tokens: (n,) whose choices they are.
        rows: where they are among the sorted choices.
        padded: `rows`, and as many after them as make a length that products have often.
    """

    expert: int
    tokens: torch.Tensor
    rows: slice
    padded: slice

    def gathered(self, tensor: torch.Tensor) -> torch.Tensor:
        """(T, width) to (padded n, width): the tokens' rows, and zeros."""
        length, size = self.padded.stop - self.padded.start, self.tokens.numel()
        if length == size:
            return tensor[self.tokens]
        rows = tensor.new_empty(length, tensor.shape[1])
        torch.index_select(tensor, 0, self.tokens, out=rows[:size])
        rows[size:] = 0
        return rows


class _Groups:
    """
    The choices of all tokens, sorted by expert.

    oneDNN compiles a product for every shape that it meets, and keeps some hundreds. So lengths are rounded up to
    sixteenths of a power of two, of which few occur in training; 3 % of the rows fill up on average.

    Attributes:
        order: (N,) the choice at each place.
        sizes: how many each expert has.
        num_rows: N, and as many more as rounding up the last group can need.
    """

    def __init__(self, top_k_index: torch.Tensor, num_experts: int):
        self.order, self.sizes = group_by_expert(top_k_index, num_experts)
        self.num_rows = padded_rows(top_k_index.numel())
        self._tokens = self.order // top_k_index.shape[1]

    def __iter__(self) -> Iterator[_Group]:
        start = 0
        for expert, size in enumerate(self.sizes):
            if size:
                padded = slice(start, start + _rounded_up(size))
                yield _Group(expert, self._tokens[start : start + size], slice(start, start + size), padded)
            start += size

    def by_choice(self, rows: torch.Tensor) -> torch.Tensor:
        """(num_rows, ...) in the order of the groups to (N, ...) in the order of the choices."""
        rows = rows[: self.order.numel()]
        return torch.empty_like(rows).index_copy_(0, self.order, rows)

    def served_here(self) -> int:
        return sum(self.sizes)


def _rounding(size: int) -> int:
    return max(8, 2 ** (size.bit_length() - 5))


def _rounded_up(size: int) -> int:
    step = _rounding(size)
    return -(-size // step) * step


def padded_rows(choices: int) -> int:
    """Rows of the pre-activations that are kept: those of the choices, and what the last group may be filled up with."""
    return choices + 8 + choices // 16  # at least `_rounding`, and the same expression for a symbolic size


def experts_and_kept(
    hidden_states: torch.Tensor,
    weights: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    top_k_index: torch.Tensor,
    keep: torch.Tensor | None,
    trains: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum over choices of weight * down(silu(gate) * up * keep), and the pre-activations (num_rows, 2I) if it trains.

    `keep` (N, I) is dropout, by sorted choice.
    """
    if not trains:
        return _inference(hidden_states, weights, gate_up_proj, down_proj, top_k_index), hidden_states.new_empty(0)
    groups = _Groups(top_k_index, gate_up_proj.shape[0])
    pre_activation = hidden_states.new_empty(groups.num_rows, gate_up_proj.shape[1])
    outputs = hidden_states.new_empty(groups.order.numel(), hidden_states.shape[1])
    for group in groups:
        gate_up = _linear(group.gathered(hidden_states), gate_up_proj[group.expert])
        pre_activation[group.rows] = gate_up[: group.tokens.numel()]
        activation = _activation(gate_up)
        if keep is not None:
            activation[: group.tokens.numel()] *= keep[group.rows]
        outputs[group.rows] = _linear(activation, down_proj[group.expert])[: group.tokens.numel()]
    # The last groups' padding reads them, and uninitialised memory may hold a NaN.
    pre_activation[groups.served_here() :] = 0
    outputs[groups.served_here() :] = 0  # served elsewhere (expert parallelism)
    return _combined(groups.by_choice(outputs), weights), pre_activation


def _inference(hidden_states, weights, gate_up_proj, down_proj, top_k_index) -> torch.Tensor:
    """The same without a trace of it, and without filling up: a token that is decoded costs its own experts only."""
    if len(hidden_states) == 1:
        return _one_token(hidden_states, weights, gate_up_proj, down_proj, top_k_index[0].tolist())
    order, sizes = group_by_expert(top_k_index, gate_up_proj.shape[0])
    rows = hidden_states[order // top_k_index.shape[1]]
    outputs = torch.empty_like(rows)
    start = 0
    for expert, size in enumerate(sizes):
        if size:
            group = slice(start, start + size)
            _linear_into(outputs[group], _activation(_linear(rows[group], gate_up_proj[expert])), down_proj[expert])
            start += size
    outputs[start:] = 0  # served elsewhere (expert parallelism)
    return _combined(torch.empty_like(outputs).index_copy_(0, order, outputs), weights)


def _one_token(hidden_states, weights, gate_up_proj, down_proj, experts: list[int]) -> torch.Tensor:
    """Nothing is to be sorted, gathered or put back."""
    num_experts = gate_up_proj.shape[0]
    outputs = [
        _linear(_activation(_linear(hidden_states, gate_up_proj[expert])), down_proj[expert])
        if expert < num_experts
        else torch.zeros_like(hidden_states)  # served elsewhere (expert parallelism)
        for expert in experts
    ]
    return weights @ torch.cat(outputs)


def _activation(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return nn.functional.silu(gate).mul_(up)


def _combined(outputs: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """(N, H) by choice and weights (T, K) to their weighted sums (T, H)."""
    return torch.bmm(weights.unsqueeze(1), outputs.view(*weights.shape, outputs.shape[-1])).squeeze(1)


_experts = torch.library.custom_op("grinmoe::cpu_experts", experts_and_kept, mutates_args=())


@_experts.register_fake
def _(hidden_states, weights, gate_up_proj, down_proj, top_k_index, keep, trains=True):
    rows = padded_rows(top_k_index.numel())
    pre_activation = hidden_states.new_empty((rows, gate_up_proj.shape[1]) if trains else 0)
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
    groups = _Groups(top_k_index, gate_up_proj.shape[0])
    row_weight = weights.new_zeros(groups.num_rows, 1)
    row_weight[: groups.order.numel()] = weights.reshape(-1, 1)[groups.order]
    grad_row_weight = weights.new_zeros(groups.order.numel())
    grad_rows = hidden_states.new_empty(groups.order.numel(), hidden_states.shape[1])
    grad_gate_up = torch.empty_like(gate_up_proj) if gate_up_trains else weights.new_empty(0)
    grad_down = torch.empty_like(down_proj) if down_trains else weights.new_empty(0)
    for group in groups:
        expert, size = group.expert, group.tokens.numel()
        upstream = group.gathered(grad_output)  # (padded n, H), zeros in the padding: so are the gradients there
        gate, up = pre_activation[group.padded].chunk(2, dim=-1)
        sigmoid = gate.sigmoid()
        silu = gate * sigmoid
        activation = silu * up
        grad_activation = _linear(upstream, down_proj[expert].t())  # (padded n, I), not yet weighted
        if keep is not None:
            activation[:size] *= keep[group.rows]
        grad_row_weight[group.rows] = torch.linalg.vecdot(grad_activation, activation)[:size]
        grad_activation *= row_weight[group.padded]
        if keep is not None:
            grad_activation[:size] *= keep[group.rows]
        if down_trains:
            _linear_into(grad_down[expert], (upstream * row_weight[group.padded]).t(), activation.t())
        grad_pre = torch.empty_like(pre_activation[group.padded])
        grad_gate_part, grad_up_part = grad_pre.chunk(2, dim=-1)
        torch.mul(grad_activation, silu, out=grad_up_part)
        # d silu / d gate = sigmoid + silu * (1 - sigmoid)
        torch.mul(grad_activation.mul_(up), sigmoid + silu * (1 - sigmoid), out=grad_gate_part)
        if gate_up_trains:
            _linear_into(grad_gate_up[expert], grad_pre.t(), group.gathered(hidden_states).t())
        grad_rows[group.rows] = _linear(grad_pre, gate_up_proj[expert].t())[:size]
    idle = [expert for expert, size in enumerate(groups.sizes) if size == 0]
    for gradient in (grad_gate_up, grad_down):
        if gradient.numel():
            gradient[idle] = 0
    grad_rows[groups.served_here() :] = 0
    grad_hidden = groups.by_choice(grad_rows).view(*weights.shape, hidden_states.shape[1]).sum(dim=1)
    return grad_hidden, groups.by_choice(grad_row_weight).view_as(weights), grad_gate_up, grad_down


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
        gate, up = (group @ gate_up_proj[expert].t()).chunk(2, dim=-1)
        activation = nn.functional.silu(gate) * up
        outputs.append((activation if dropout is None else activation * dropout) @ down_proj[expert].t())
    outputs.append(torch.zeros_like(elsewhere))
    by_choice = torch.cat(outputs)[order.argsort()]
    return (by_choice.view(*weights.shape, -1) * weights.unsqueeze(-1)).sum(dim=1)


def _gradients(grad_output, inputs, kept, needed):
    # The operator: `is_grads_batched` of torch.autograd.grad can loop over it.
    return _experts_backward(grad_output.contiguous(), *inputs, *kept, *needed[2:4])


_function = autograd_function(experts_and_kept, _gradients, experts_reference, trainable=4)


def _onednn_linear():
    """oneDNN's float32 product: (n, k) and (m, k) to (n, m), any strides; None where torch is built without it.

    The one use of a private torch operator in this project. torch.mm is MKL in float32, which on AMD processors takes
    twice the time of oneDNN, and no public function leads there. The operator is what torch's own compiler calls.
    """
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return None
    return lambda left, right: torch.ops.mkldnn._linear_pointwise(left, right, None, "none", [], "")


_float32_linear = _onednn_linear() or nn.functional.linear


def _linear(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """(n, k) and (m, k) to (n, m) = left @ right.T."""
    return _float32_linear(left, right) if left.dtype == torch.float32 else nn.functional.linear(left, right)


def _linear_into(result: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    if left.dtype == torch.float32:
        result.copy_(_float32_linear(left, right))
    else:
        torch.mm(left, right.t(), out=result)
