"""The experts on Hopper GPUs and newer by QuACK's products, `experts_implementation="grinmoe_quack"`.

QuACK (`pip install quack-kernels`) reads the rows of a product through an index, so that none are gathered, and computes
SwiGLU, its backward and the inner products for the routing weights in the products' epilogues. Its groups have any number
of rows; what it multiplies is padded to 256 of them. The rest is Triton's, as for `grinmoe_triton`, and so is what the
backward keeps: the input and the pre-activations. Those have gate and up columns in turns here, the order of QuACK's
epilogues; it reads and writes our `gate_up_proj`, gate first, by strides (`concat_layout`), and no weight is copied.

Shapes: T tokens, K experts per token, N = T * K rows sorted by expert, E experts, H hidden size, I expert width.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from types import ModuleType

import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.utils import is_triton_available

from ..quantization_grinmoe import in_forward_mode
from ..routing_grinmoe import FusedRouter
from .autograd import autograd_function, is_transformed
from .cpu import experts_reference
from .triton_experts import Kept, Products, backward_pass, forward_pass, unfit

if is_triton_available():
    from .permute_kernels import combine, place_rows

NAME = "grinmoe_quack"
DTYPES = (torch.bfloat16, torch.float16)


def quack_experts_forward(
    module: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """
    The experts of `module` by QuACK's products. Contract of `GrinMoeExperts.forward`; under autocast in its dtype.

    `torch.compile` breaks its graph here.

    Raises:
        ImportError: QuACK or Triton is not installed.
        ValueError: a device before sm_90, a dtype other than bfloat16 and float16, an activation other than silu, more than
            128 experts, or sizes that are not multiples of 16 bytes.
    """
    check_quack(hidden_states.device)
    input_dtype, device = hidden_states.dtype, hidden_states.device.type
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else module.gate_up_proj.dtype
    if dtype not in DTYPES:
        raise ValueError(
            f"experts_implementation={NAME!r} is for bfloat16 and float16, not {dtype}; choose 'grouped_mm'"
        )
    if reason := unfit(module, dtype):
        raise ValueError(f"experts_implementation={NAME!r} {reason}")
    differentiable = (hidden_states.to(dtype), top_k_weights, module.gate_up_proj, module.down_proj)
    keep = None
    if module.training and module.dropout > 0:
        keep = module.keep_mask(differentiable[0].new_empty((top_k_index.numel(), module.down_proj.shape[2])))
    trains = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in differentiable)
    if in_forward_mode():
        output = _reference(*differentiable, top_k_index, keep)
    elif trains or is_transformed():
        output, *_ = _function(*differentiable, top_k_index, keep)
    else:
        output, *_ = _without_gradient(*differentiable, top_k_index, keep)
    return output.to(input_dtype)


# Assigning again is harmless: this module may be imported under several names.
ALL_EXPERTS_FUNCTIONS.register(NAME, quack_experts_forward)


def check_quack(device: torch.device) -> None:
    """
    Raises:
        ImportError: QuACK or Triton is not installed.
        ValueError: `device` is not one that QuACK's grouped products run on.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (9, 0):
        raise ValueError(
            f"experts_implementation={NAME!r} got tensors on {device}, and its products need an NVIDIA GPU of compute "
            "capability 9.0 or newer; choose 'grinmoe'"
        )
    for module, package in (("quack", "quack-kernels"), ("triton", "triton")):
        if importlib.util.find_spec(module) is None:
            raise ImportError(
                f"experts_implementation={NAME!r} needs {package}: pip install {package}, or choose 'grinmoe'"
            )


def checked_router(router: FusedRouter) -> FusedRouter:
    """The router for these experts: Triton's, which refuses by our name what the experts would refuse after it."""

    def checked(function: Callable) -> Callable:
        def after_check(tensor, *arguments):
            check_quack(tensor.device)
            return function(tensor, *arguments)

        return after_check

    return FusedRouter(*map(checked, router))


def quack() -> ModuleType:
    """QuACK's products, imported when they are first needed: that takes seconds, and changes CuTe's classes."""
    return importlib.import_module("quack.gemm_interface")


# QuACK's tiles for a device, not its search: that compiles ten and more variants of each product at the first call, and may
# end differently in the next run.
TUNED = False


@functools.cache
def backward_tiles(device: torch.device):
    """Tiles for `gemm_dgated`, or None for QuACK's own.

    Those keep 500 registers on the stack with this epilogue on sm_90 (128 by 192, quack-kernels 0.6.5); these keep none.
    """
    if TUNED or torch.cuda.get_device_capability(device)[0] != 9:
        return None
    return quack().GemmConfig(
        tile_m=128, tile_n=128, pingpong=True, cluster_m=2, cluster_n=1, is_dynamic_persistent=False
    )


def rows_by_weights(rows: torch.Tensor, weights: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    return quack().gemm(rows, weights.mT, cu_seqlens_m=_bounds(ends), tuned=TUNED)


def rows_by_rows(left: torch.Tensor, right: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    return quack().gemm(left.t(), right, cu_seqlens_k=_bounds(ends), tuned=TUNED)


# For dropout, whose mask QuACK's epilogues do not take: its products, with Triton's kernels around them.
QUACK = Products(rows_by_weights, rows_by_rows)


def _bounds(ends: torch.Tensor) -> torch.Tensor:
    """Where each expert's rows begin and end, (E + 1,) int32."""
    return nn.functional.pad(ends, (1, 0))


def experts_and_kept(
    hidden_states: torch.Tensor,
    weights: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    top_k_index: torch.Tensor,
    keep: torch.Tensor | None,
    keeps: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The output, and `Kept` for the backward; without the pre-activation unless `keeps`."""
    hidden_states, top_k = hidden_states.contiguous(), top_k_index.shape[1]
    gate_up_proj, down_proj = (weight.to(hidden_states.dtype) for weight in (gate_up_proj, down_proj))
    if keep is not None:
        output, kept = forward_pass(hidden_states, weights, gate_up_proj, down_proj, top_k_index, keep, QUACK)
        return output, *kept
    order, row_of_choice, ends = place_rows(top_k_index, gate_up_proj.shape[0])
    bounds = _bounds(ends)
    pre_activation, activation = quack().gemm_gated(
        hidden_states,
        gate_up_proj.mT,
        activation="swiglu",
        cu_seqlens_m=bounds,
        A_idx=order // top_k,
        store_preact=keeps,
        concat_layout=("B",),
        tuned=TUNED,
    )
    outputs = quack().gemm(activation, down_proj.mT, cu_seqlens_m=bounds, tuned=TUNED)
    return combine(outputs, row_of_choice, ends, top_k, weights), pre_activation, order, row_of_choice, ends


def gradients(
    grad_output: torch.Tensor,
    inputs: tuple[torch.Tensor | None, ...],
    kept: tuple[torch.Tensor, ...],
    needed: tuple[bool, ...],
) -> tuple[torch.Tensor, ...]:
    """Of the input, the routing weights, gate_up_proj and down_proj; an empty tensor for a weight that does not train."""
    hidden_states, weights, gate_up_proj, down_proj, _, keep = inputs
    dtype, nothing, top_k = hidden_states.dtype, hidden_states.new_empty(0), weights.shape[1]
    grad_output, hidden_states = grad_output.to(dtype).contiguous(), hidden_states.contiguous()
    gate_up, down = gate_up_proj.to(dtype), down_proj.to(dtype)
    if keep is not None:
        arguments = grad_output, hidden_states, weights, gate_up, down, keep, Kept(*kept), *needed[2:4], QUACK
        *first, grad_gate_up, grad_down = backward_pass(*arguments)
        pairs = (grad_gate_up, gate_up_proj), (grad_down, down_proj)
        return *first, *(nothing if gradient is None else gradient.to(weight.dtype) for gradient, weight in pairs)
    pre_activation, order, row_of_choice, ends = kept
    tokens, bounds = order // top_k, _bounds(ends)
    grad_pre, weighted, inner_products = quack().gemm_dgated(
        grad_output,
        down,
        pre_activation,
        activation="swiglu",
        colvec_scale=weights.reshape(-1)[order].float(),
        colvec_reduce=True,
        cu_seqlens_m=bounds,
        A_idx=tokens,
        dynamic_scheduler=False,
        tuned=TUNED,
        config=backward_tiles(grad_output.device),
    )
    # Rows of non-local experts were not computed.
    local = (row_of_choice < ends[-1]).view_as(weights)
    grad_weights = torch.where(local, inner_products[row_of_choice].view_as(weights), 0.0).to(weights.dtype)
    grad_gate_up, grad_down = nothing, nothing.clone()
    of_groups = {"cu_seqlens_k": bounds, "A_idx": tokens, "tuned": TUNED}
    if needed[3]:
        grad_down = torch.empty_like(down_proj)
        quack().gemm(grad_output.t(), weighted, out=grad_down, **of_groups)
    if needed[2]:
        grad_gate_up = torch.empty_like(gate_up_proj)
        quack().gemm(hidden_states.t(), grad_pre, out=grad_gate_up.mT, concat_layout=("out",), **of_groups)
    grad_rows = quack().gemm(grad_pre, gate_up, cu_seqlens_m=bounds, concat_layout=("B",), tuned=TUNED)
    return combine(grad_rows, row_of_choice, ends, top_k), grad_weights, grad_gate_up, grad_down


def _reference(hidden_states, weights, gate_up_proj, down_proj, top_k_index, keep) -> torch.Tensor:
    gate_up_proj, down_proj = (weight.to(hidden_states.dtype) for weight in (gate_up_proj, down_proj))
    return experts_reference(hidden_states, weights, gate_up_proj, down_proj, top_k_index, keep)


def _on_device(function: Callable) -> Callable:
    """On the device of the first tensor, and not on torch's current one, as every launch of ours."""

    @functools.wraps(function)
    def on_device(tensor, *arguments):
        with torch.cuda.device_of(tensor):
            return function(tensor, *arguments)

    return on_device


_without_gradient = torch.compiler.disable(_on_device(functools.partial(experts_and_kept, keeps=False)))
_function = torch.compiler.disable(
    autograd_function(_on_device(experts_and_kept), _on_device(gradients), _reference, trainable=4)
)
