"""Transformers' grouped products under autocast: in autocast's dtype, and without keeping what the weights were cast to.

Autocast does not reach grouped products. Weights that are cast before such a product are kept for its backward: bfloat16
copies of all experts, 2.5 GB a layer at the released size. Here the product casts, and casts again in the backward.

Shapes: T tokens, K experts per token, N = T * K rows sorted by expert, E experts, H hidden size, I expert width.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from ..quantization_grinmoe import in_forward_mode
from .autograd import is_transformed


def cast_experts(
    name: str, module: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The experts by Transformers' function of that name, in autocast's dtype. Contract of `GrinMoeExperts.forward`."""
    device = hidden_states.device.type
    dtype = torch.get_autocast_dtype(device)
    arguments = hidden_states.to(dtype), top_k_index, top_k_weights
    if name == "grouped_mm" and _casts_in_the_product(module, hidden_states.device, dtype):
        output = _grouped_experts(module, *arguments)
    else:
        output = ALL_EXPERTS_FUNCTIONS[name](_Cast(module, dtype), *arguments)
    return output.to(hidden_states.dtype)


def _casts_in_the_product(module: nn.Module, device: torch.device, dtype: torch.dtype) -> bool:
    if not torch.is_grad_enabled() or in_forward_mode() or is_transformed():
        return False
    # What would be kept must be there anyway: not a sum that an adapter makes of its weights in every forward.
    for weight in (module.gate_up_proj, module.down_proj):
        if not isinstance(weight, nn.Parameter) or weight.dtype == dtype:
            return False
    # Elsewhere Transformers has a loop in place of torch's product.
    if torch.compiler.is_compiling() and dtype != torch.bfloat16:
        return False
    return device.type == "cpu" or (device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0))


class _CastProduct(torch.autograd.Function):
    """Rows (N, in), sorted by expert, times their experts' weights (E, out, in), which are cast to the rows' dtype."""

    @staticmethod
    def forward(rows: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        return nn.functional.grouped_mm(rows, weight.to(rows.dtype).transpose(1, 2), offs=ends)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad_output: torch.Tensor):
        rows, weight, ends = ctx.saved_tensors
        grad_output = grad_output.contiguous()
        grad_rows = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_rows = nn.functional.grouped_mm(grad_output, weight.to(rows.dtype), offs=ends)
        if ctx.needs_input_grad[1]:
            grad_weight = nn.functional.grouped_mm(grad_output.t(), rows, offs=ends).to(weight.dtype)
        return grad_rows, grad_weight, None


def _grouped_experts(
    module: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """As Transformers' function `grouped_mm`, whose products keep the weights that they are given."""
    top_k = top_k_index.shape[1]
    experts, order = top_k_index.reshape(-1).sort(stable=True)
    numbers = torch.arange(int(module.num_experts), device=experts.device)
    ends = (experts[:, None] <= numbers).sum(dim=0, dtype=torch.int32)
    rows = hidden_states[order // top_k]
    # Products write no row of an expert that lives elsewhere, forward or backward. Transformers 5.17 does not tell whether
    # there are any.
    may_be_elsewhere = getattr(module, "_is_expert_parallel", True)
    elsewhere = (experts >= module.num_experts).unsqueeze(-1) if may_be_elsewhere else None

    def zeroed(tensor: torch.Tensor) -> torch.Tensor:
        return tensor if elsewhere is None else tensor.masked_fill(elsewhere, 0.0)

    gate_up = zeroed(_CastProduct.apply(zeroed(rows), module.gate_up_proj, ends))
    outputs = zeroed(_CastProduct.apply(module._apply_gate(gate_up), module.down_proj, ends))
    weighted = outputs * top_k_weights.reshape(-1)[order].unsqueeze(-1)
    places = torch.arange(order.numel(), device=order.device)
    by_assignment = weighted[torch.empty_like(order).scatter_(0, order, places)]
    return by_assignment.view(-1, top_k, hidden_states.shape[1]).sum(dim=1).to(hidden_states.dtype)


class _Cast:
    """A module of experts as the library's functions read it, with its weights in another dtype."""

    def __init__(self, module: nn.Module, dtype: torch.dtype):
        self.module = module
        self.gate_up_proj = module.gate_up_proj.to(dtype)
        self.down_proj = module.down_proj.to(dtype)

    def __getattr__(self, name: str):
        return getattr(self.module, name)
