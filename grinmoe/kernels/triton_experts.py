"""The experts on a GPU, `experts_implementation="grinmoe_triton"`: grouped products, and Triton for what surrounds them.

For the backward the input and the pre-activations are kept, and nothing else of their size: rows are gathered again,
activations computed again, and the routing weights' gradient is the inner product of the activations with their own
gradient, so that the experts' output need not be there. Under autocast the weights are cast in the forward and again in
the backward, so that no copy of theirs is kept.

On NVIDIA GPUs of compute capability 9.x and 10.x (Hopper, Blackwell for data centres) in bfloat16 no step waits for the
device. Elsewhere, and in other dtypes, torch's grouped product copies the groups' ends to the host and loops over them:
results are the same, the host waits once for each product, and a CUDA graph cannot be captured.

Shapes: T tokens, K experts per token, N = T * K rows sorted by expert, E experts, H hidden size, I expert width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.utils import is_triton_available

from ..quantization_grinmoe import in_forward_mode
from .autograd import autograd_function, gradient_takes_operator, is_transformed, takes_operator
from .cpu import SILU, experts_reference

HAS_TRITON = is_triton_available()  # asked once: in compiled code the question warns
if HAS_TRITON:
    from .launching import MAX_EXPERTS, interpreted
    from .permute_kernels import combine, gather_rows, place_rows, swiglu, swiglu_backward, zero_idle_experts
    from .small_batch_gemm import MAX_CHOICES, few_tokens_experts

# What torch's grouped product asks of its operands' rows.
ALIGNMENT_BYTES = 16


def triton_experts_forward(
    module: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """
    The experts of `module` by Triton's kernels. Contract of `GrinMoeExperts.forward`; under autocast in its dtype.

    Without a gradient, few tokens go to the kernels for decoding, which read each needed expert once.

    Raises:
        ImportError: Triton is not installed.
        ValueError: tensors that are not on a GPU, an activation other than silu, more than 128 experts, or sizes that are
            no multiples of 16 bytes.
        RuntimeError: a CUDA graph is being captured where the products wait for the device.
    """
    check_triton(hidden_states.device)
    gate_up_proj, down_proj = module.gate_up_proj, module.down_proj
    dtype, device = hidden_states.dtype, hidden_states.device.type
    if torch.is_autocast_enabled(device):
        # Weights are cast to it where they are used: a copy made here would be kept for the backward.
        hidden_states = hidden_states.to(torch.get_autocast_dtype(device))
    else:
        hidden_states = hidden_states.to(gate_up_proj.dtype)
    if reason := unfit(module, hidden_states.dtype):
        raise ValueError(f"experts_implementation='grinmoe_triton' {reason}")
    keep = None
    if module.training and module.dropout > 0:
        keep = module.keep_mask(hidden_states.new_empty((top_k_index.numel(), module.down_proj.shape[2])))
    differentiable = (hidden_states, top_k_weights, gate_up_proj, down_proj)
    trains = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in differentiable)
    if in_forward_mode():
        return _reference(*differentiable, top_k_index, keep).to(dtype)
    few = top_k_index.numel() <= MAX_CHOICES and not is_transformed()
    if few and not trains and keep is None:
        projections = (projection.to(hidden_states.dtype) for projection in (gate_up_proj, down_proj))
        return few_tokens_experts(hidden_states, top_k_index, top_k_weights, *projections).to(dtype)
    function = _experts if takes_operator(hidden_states) else _function
    output, *_ = function(*differentiable, top_k_index, keep)
    return output.to(dtype)


# Assigning again is harmless: this module may be imported under several names.
ALL_EXPERTS_FUNCTIONS.register("grinmoe_triton", triton_experts_forward)


def check_triton(device: torch.device) -> None:
    """
    Raises:
        ImportError: Triton is not installed.
        ValueError: `device` is not one that the kernels run on.
    """
    if not HAS_TRITON:
        raise ImportError(
            "experts_implementation='grinmoe_triton' needs Triton, which CUDA builds of torch bring along: pip install "
            "triton, or choose 'grinmoe'"
        )
    if device.type not in ("cuda", "xpu") and not interpreted():
        raise ValueError(
            f"experts_implementation='grinmoe_triton' got tensors on {device}, and its kernels run on a GPU; choose "
            "'grinmoe' there"
        )


def unfit(module: nn.Module, dtype: torch.dtype) -> str | None:
    """Why these experts, computed in `dtype`, are not for the kernels, and what to choose; None if they are."""
    if module.config.hidden_act not in SILU:
        return f"is for hidden_act='silu', not {module.config.hidden_act!r}; choose 'grouped_mm'"
    if module.num_experts > MAX_EXPERTS:
        return f"is for up to {MAX_EXPERTS} experts, not {module.num_experts}; choose 'grouped_mm'"
    multiple = ALIGNMENT_BYTES // dtype.itemsize
    if module.hidden_dim % multiple or module.intermediate_dim % multiple:
        return (
            f"needs sizes that are multiples of {multiple} in {dtype}, not hidden {module.hidden_dim} and width "
            f"{module.intermediate_dim}; choose 'eager'"
        )
    return None


class Products(NamedTuple):
    """The matrix products of one direction, for rows that are sorted by expert and end at `ends` (E,) int32.

    Attributes:
        rows_by_weights: rows (N, in), weights (E, out, in), ends, to (N, out). Rows after the last end are not computed.
        rows_by_rows: left (N, out), right (N, in), ends, to (E, out, in): left^T right of every group. The results of empty
            groups may be left as the memory was.
    """

    rows_by_weights: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    rows_by_rows: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def _grouped_mm(left: torch.Tensor, right: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    _refuse_capture(left)
    return nn.functional.grouped_mm(left, right, offs=ends)


GROUPED_MM = Products(
    rows_by_weights=lambda rows, weights, ends: _grouped_mm(rows, weights.transpose(1, 2), ends),
    rows_by_rows=lambda left, right, ends: _grouped_mm(left.t(), right, ends),
)


def _refuse_capture(rows: torch.Tensor) -> None:
    """
    Raises:
        RuntimeError: a CUDA graph is being captured, and torch's grouped product of these rows copies to the host.
    """
    if not rows.is_cuda or not torch.cuda.is_current_stream_capturing():
        return
    # Nothing public tells which way torch takes. So it is in its CUDA source (GroupedBlas.cpp) from 2.11 to 2.13.
    major, minor = torch.cuda.get_device_capability(rows.device)
    if torch.version.hip is not None or rows.dtype != torch.bfloat16 or major not in (9, 10):
        raise RuntimeError(
            f"experts_implementation='grinmoe_triton' in {rows.dtype} on compute capability {major}.{minor} cannot be "
            "captured in a CUDA graph: torch's grouped product waits for the device there, and does not in bfloat16 on 9.x "
            "and 10.x; run without CUDA graphs, or choose 'batched_mm'"
        )


class Kept(NamedTuple):
    """What the forward leaves for the backward, beside its arguments: `place_rows`, and the pre-activations (N, 2I)."""

    pre_activation: torch.Tensor
    order: torch.Tensor
    row_of_choice: torch.Tensor
    ends: torch.Tensor


def forward_pass(
    hidden_states: torch.Tensor,
    weights: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    top_k_index: torch.Tensor,
    keep: torch.Tensor | None = None,
    products: Products = GROUPED_MM,
) -> tuple[torch.Tensor, Kept]:
    """Sum over choices of weight * down(silu(gate) * up * keep), (T, H); `keep` (N, I) is dropout, by sorted row.

    The dtype is that of `hidden_states`; projections in another one are cast to it.
    """
    top_k = top_k_index.shape[1]
    order, row_of_choice, ends = place_rows(top_k_index, gate_up_proj.shape[0])
    rows = gather_rows(hidden_states, row_of_choice, ends, top_k)
    pre_activation = products.rows_by_weights(rows, gate_up_proj.to(rows.dtype), ends)
    outputs = products.rows_by_weights(swiglu(pre_activation, ends, keep), down_proj.to(rows.dtype), ends)
    return combine(outputs, row_of_choice, ends, top_k, weights), Kept(pre_activation, order, row_of_choice, ends)


def backward_pass(
    grad_output: torch.Tensor,
    hidden_states: torch.Tensor,
    weights: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    keep: torch.Tensor | None,
    kept: Kept,
    gate_up_trains: bool = True,
    down_trains: bool = True,
    products: Products = GROUPED_MM,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Gradients of the input, the routing weights, gate_up_proj and down_proj; None for one that does not train.

    Each in the dtype of its own tensor. An expert without rows gets zeros, whatever the products write for it.
    """
    pre_activation, order, row_of_choice, ends = kept
    top_k, dtype = weights.shape[1], pre_activation.dtype
    grad_down = grad_gate_up = None
    upstream = gather_rows(grad_output, row_of_choice, ends, top_k)  # (N, H), not yet weighted
    grad_activation = products.rows_by_weights(upstream, down_proj.to(dtype).transpose(1, 2), ends)
    grad_pre, weighted, grad_weights = swiglu_backward(
        grad_activation, pre_activation, weights, order, ends, keep, weighted=down_trains
    )
    del grad_activation
    if down_trains:
        grad_down = zero_idle_experts(products.rows_by_rows(upstream, weighted, ends), ends).to(down_proj.dtype)
    del upstream, weighted
    if gate_up_trains:
        rows = gather_rows(hidden_states, row_of_choice, ends, top_k)
        grad_gate_up = zero_idle_experts(products.rows_by_rows(grad_pre, rows, ends), ends).to(gate_up_proj.dtype)
        del rows
    grad_rows = products.rows_by_weights(grad_pre, gate_up_proj.to(dtype).transpose(1, 2), ends)
    return combine(grad_rows, row_of_choice, ends, top_k), grad_weights, grad_gate_up, grad_down


def experts_and_kept(
    hidden_states: torch.Tensor,
    weights: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    top_k_index: torch.Tensor,
    keep: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    output, kept = forward_pass(hidden_states.contiguous(), weights, gate_up_proj, down_proj, top_k_index, keep)
    return output, *kept


_experts = torch.library.custom_op("grinmoe::triton_experts", experts_and_kept, mutates_args=())


@_experts.register_fake
def _(hidden_states, weights, gate_up_proj, down_proj, top_k_index, keep):
    def numbers(count):
        return torch.empty(count, dtype=torch.int32, device=hidden_states.device)

    choices, experts = top_k_index.numel(), gate_up_proj.shape[0]
    pre_activation = hidden_states.new_empty(choices, gate_up_proj.shape[1])
    output = torch.empty_like(hidden_states, memory_format=torch.contiguous_format)
    return output, pre_activation, numbers(choices), numbers(choices), numbers(experts)


def experts_backward(
    grad_output: torch.Tensor,
    hidden_states: torch.Tensor,
    weights: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    keep: torch.Tensor | None,
    pre_activation: torch.Tensor,
    order: torch.Tensor,
    row_of_choice: torch.Tensor,
    ends: torch.Tensor,
    gate_up_trains: bool,
    down_trains: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `backward_pass`; an operator returns tensors, so an empty one stands for None."""
    kept = Kept(pre_activation, order, row_of_choice, ends)
    *gradients, grad_gate_up, grad_down = backward_pass(
        grad_output.contiguous(),
        hidden_states.contiguous(),
        weights,
        gate_up_proj,
        down_proj,
        keep,
        kept,
        gate_up_trains,
        down_trains,
    )
    nothing = grad_output.new_empty(0)
    return *gradients, *(nothing.clone() if g is None else g for g in (grad_gate_up, grad_down))


_experts_backward = torch.library.custom_op("grinmoe::triton_experts_backward", experts_backward, mutates_args=())


@_experts_backward.register_fake
def _(
    grad_output,
    hidden_states,
    weights,
    gate_up_proj,
    down_proj,
    keep,
    pre_activation,
    order,
    row_of_choice,
    ends,
    gate_up_trains,
    down_trains,
):
    contiguous = torch.contiguous_format
    trained = (gate_up_proj, gate_up_trains), (down_proj, down_trains)
    gradients = [w.new_empty(w.shape) if trains else w.new_empty(0) for w, trains in trained]
    grad_hidden = torch.empty_like(hidden_states, memory_format=contiguous)
    return grad_hidden, torch.empty_like(weights, memory_format=contiguous), *gradients


def _save(ctx, inputs, output) -> None:
    hidden_states, weights, gate_up_proj, down_proj, _, keep = inputs
    _, *kept = output
    ctx.save_for_backward(hidden_states, weights, gate_up_proj, down_proj, keep, *kept)
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_output, *_):
    if grad_output is None:
        return (None,) * 6
    gradients = _experts_backward(grad_output, *ctx.saved_tensors, *ctx.needs_input_grad[2:4])
    needed = [gradient if need else None for gradient, need in zip(gradients, ctx.needs_input_grad)]
    return *needed, None, None


_experts.register_autograd(_backward, setup_context=_save)


def _gradients(grad_output, inputs, kept, needed):
    *tensors, _, keep = inputs
    function: Callable = _experts_backward if gradient_takes_operator(grad_output) else experts_backward
    return function(grad_output, *tensors, keep, *kept, *needed[2:4])


def _reference(hidden_states, weights, gate_up_proj, down_proj, top_k_index, keep) -> torch.Tensor:
    """`experts_reference` in the dtype of `hidden_states`, as `forward_pass`."""
    dtype = hidden_states.dtype
    projections = gate_up_proj.to(dtype), down_proj.to(dtype)
    return experts_reference(hidden_states, weights, *projections, top_k_index, keep).to(dtype)


_function = autograd_function(experts_and_kept, _gradients, _reference, trainable=4)
