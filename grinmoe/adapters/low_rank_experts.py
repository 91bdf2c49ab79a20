"""The fused experts with low-rank terms per group of tokens: a loop for any kind of base weights, or grouped products.

What [`ExpertLora`] of `expert_lora.py` computes, as functions of tensors. For expert e with factors A_e and B_e, both of its
products are x W_e^T + (x A_e^T) B_e^T.

Shapes: T tokens, K experts per token, N = T * K choices, E experts, H hidden size, I expert width, R rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..kernels import ALIGNMENT_BYTES
from ..modeling_grinmoe import GrinMoeExperts, group_by_expert
from ..quantization_grinmoe import FUSED

# Experts implementations that compute with grouped matrix products; the others are, or here become, a loop.
GROUPED = ("grinmoe", "grinmoe_triton", "grinmoe_quack", "grouped_mm", "batched_mm")

# A (E, R, in) and B (E, out, R).
Factors = tuple[torch.Tensor, torch.Tensor]


def uses_grouped_mm(experts: GrinMoeExperts, dtype: torch.dtype) -> bool:
    """
    Whether grouped matrix products serve, or the loop does. The one place where this is decided.

    They do if the experts implementation is one of `GROUPED` (the default is), all products can be done in `dtype`
    without a conversion of the experts' weights (so not on quantised ones), that dtype is bfloat16, or float32 on a CPU,
    H and I are multiples of 16 bytes, and a GPU is of compute capability 8.0 or newer.
    """
    weight = experts.gate_up_proj
    config: Any = experts.config  # given by the library's decorator
    if config._experts_implementation not in GROUPED:
        return False
    if any(getattr(experts, name).dtype != dtype or getattr(experts, name).dim() != 3 for name in FUSED):
        return False
    if dtype != torch.bfloat16 and not (dtype == torch.float32 and weight.device.type == "cpu"):
        return False
    if weight.is_cuda and torch.cuda.get_device_capability(weight.device) < (8, 0):
        return False
    multiple = ALIGNMENT_BYTES // dtype.itemsize
    return experts.hidden_dim % multiple == 0 and experts.intermediate_dim % multiple == 0


def compute_dtype(hidden_states: torch.Tensor) -> torch.dtype:
    """Grouped products are not cast by autocast; so both forms compute in its dtype by themselves."""
    device = hidden_states.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_states.dtype


def low_rank_experts(
    experts: GrinMoeExperts,
    factors: dict[str, Factors],
    adapted: dict[str, set[int]],
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """
    The experts with low-rank terms beside their products. Contract of `GrinMoeExperts.forward`, and:

    Args:
        factors: by fused weight, A (E, R, in) and B (E, out, R) in the dtype of `compute_dtype`; zeros for an expert that is
            not adapted.
        adapted: by fused weight, the experts that are.
    """
    dtype = compute_dtype(hidden_states)
    if uses_grouped_mm(experts, dtype):
        output, order = _grouped(experts, factors, hidden_states.to(dtype), top_k_index)
    else:
        output, order = _loop(experts, factors, adapted, hidden_states.to(dtype), top_k_index)
    weighted = output * top_k_weights.reshape(-1)[order].unsqueeze(-1)  # (N, H)
    per_choice = weighted[order.argsort()].view(*top_k_index.shape, experts.hidden_dim)
    return per_choice.sum(dim=1).to(hidden_states.dtype)


def _loop(
    experts: GrinMoeExperts,
    factors: dict[str, Factors],
    adapted: dict[str, set[int]],
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, H) outputs of the choices, sorted by expert, and their order. Serves any kind of base weights."""
    order, group_sizes = group_by_expert(top_k_index, experts.num_experts)
    served_elsewhere = order.numel() - sum(group_sizes)
    *groups, elsewhere = hidden_states[order // top_k_index.shape[1]].split([*group_sizes, served_elsewhere])
    gate_up = _adapted_products(experts, "gate_up_proj", factors, adapted, 2 * experts.intermediate_dim)
    down = _adapted_products(experts, "down_proj", factors, adapted, experts.hidden_dim)
    outputs = [down(e, experts._apply_gate(gate_up(e, group))) for e, group in enumerate(groups)]
    return torch.cat([*outputs, torch.zeros_like(elsewhere)]), order


def _adapted_products(
    experts: GrinMoeExperts,
    name: str,
    factors: dict[str, Factors],
    adapted: dict[str, set[int]],
    out_features: int,
) -> Callable[[int, torch.Tensor], torch.Tensor]:
    """A function of an expert and its rows (n, in), to (n, out_features)."""
    linears = experts.linears(name)
    if name in factors:
        # Contiguous, since the product would otherwise copy each B by itself.
        lora_a, lora_b = (factor.contiguous().unbind(0) for factor in factors[name])

    def product(expert: int, rows: torch.Tensor) -> torch.Tensor:
        # An idle expert is not dequantised; its factors stay in the graph, with zero gradients as in PEFT.
        output = linears[expert](rows) if rows.shape[0] else rows.new_zeros(0, out_features)
        if expert not in adapted.get(name, ()):
            return output
        low_rank = nn.functional.linear(nn.functional.linear(rows, lora_a[expert]), lora_b[expert])
        return output + low_rank

    return product


def _grouped(
    experts: GrinMoeExperts,
    factors: dict[str, Factors],
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same by grouped matrix products, without a wait for the device."""
    tokens, top_k = top_k_index.shape
    sorted_experts, order = top_k_index.reshape(-1).sort(stable=True)
    numbers = torch.arange(experts.num_experts, device=order.device)
    ends = torch.searchsorted(sorted_experts, numbers, right=True).to(torch.int32)
    # Rows after the last group come out undefined, and so do their gradients. Choices served elsewhere read a row of
    # zeros that is no token, so that their gradient goes nowhere.
    elsewhere = sorted_experts >= experts.num_experts
    padded = torch.cat([hidden_states, hidden_states.new_zeros(1, hidden_states.shape[1])])
    rows = padded[torch.where(elsewhere, tokens, order // top_k)]  # (N, H)
    multiple = ALIGNMENT_BYTES // hidden_states.element_size()

    def product(name: str, rows: torch.Tensor) -> torch.Tensor:
        output = nn.functional.grouped_mm(rows, getattr(experts, name).transpose(1, 2), offs=ends)
        if name not in factors:
            return output
        lora_a, lora_b = factors[name]
        padding = -lora_a.shape[1] % multiple  # ranks of zeros up to the alignment
        lora_a = nn.functional.pad(lora_a, (0, 0, 0, padding)).contiguous()
        lora_b = nn.functional.pad(lora_b, (0, padding)).contiguous()
        low_rank = nn.functional.grouped_mm(rows, lora_a.transpose(1, 2), offs=ends)
        return output + nn.functional.grouped_mm(low_rank, lora_b.transpose(1, 2), offs=ends)

    output = product("down_proj", experts._apply_gate(product("gate_up_proj", rows)))
    return output.masked_fill(elsewhere.unsqueeze(-1), 0.0), order
