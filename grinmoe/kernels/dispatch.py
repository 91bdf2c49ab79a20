"""Which implementation of the experts serves where: `experts_implementation="grinmoe"`, the default.

| where | what |
|---|---|
| on a CPU, float32, hidden_act silu | `grinmoe_cpu` |
| on an NVIDIA GPU from sm_80 on with Triton, no gradient, up to 128 assignments (decoding) | `grinmoe_triton` |
| elsewhere, or experts that `grinmoe_triton` does not take: no gradient, no more assignments than experts | `batched_mm` |
| everything else, and an export | `grouped_mm` |

`grinmoe_triton` takes silu, up to 128 experts, and rows of whole 16 bytes. It reads each needed expert once, where
Transformers' `batched_mm` copies the weights of every assignment. For training it is to be asked for by name until a
committed measurement shows it ahead of Transformers' `grouped_mm` (docs/performance.md).

Shapes: T tokens, K experts per token, E experts, H hidden size.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from ..quantization_grinmoe import in_forward_mode
from .autocast import cast_experts
from .autograd import is_transformed
from .cpu import is_silu
from .triton_experts import HAS_TRITON, unfit

if HAS_TRITON:
    from .launching import DTYPES
    from .small_batch_gemm import MAX_CHOICES

DEFAULT_EXPERTS = "grinmoe"


def experts_forward(
    module: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The experts of `module` by what `implementation_for` names. Contract of `GrinMoeExperts.forward`."""
    name = implementation_for(module, hidden_states, top_k_index)
    if not name.startswith("grinmoe") and torch.is_autocast_enabled(hidden_states.device.type):
        return cast_experts(name, module, hidden_states, top_k_index, top_k_weights)
    return ALL_EXPERTS_FUNCTIONS[name](module, hidden_states, top_k_index, top_k_weights)


# torch 2.11 compiles `is_exporting()` to True everywhere. So it is called while code is traced, and not traced itself.
@torch.compiler.assume_constant_result
def is_exporting() -> bool:
    return torch.compiler.is_exporting()


def implementation_for(module: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor) -> str:
    """Name of the implementation for this input, in Transformers' interface. The one place where it is chosen."""
    if is_exporting():
        return "grouped_mm"  # an exported graph should not need operators of ours
    if _decodes_by_kernels(module, hidden_states, top_k_index):
        return "grinmoe_triton"
    if hidden_states.device.type == "cpu":
        in_float32 = hidden_states.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
        return "grinmoe_cpu" if in_float32 and is_silu(module) else "grouped_mm"
    # batched_mm copies the weights of every choice: no more than the layer's experts are.
    decodes = not torch.is_grad_enabled() and top_k_index.numel() <= module.num_experts
    return "batched_mm" if decodes else "grouped_mm"


def runs_kernels(device: torch.device) -> bool:
    """Whether the kernels for decoding are taken on `device` without being asked for."""
    # The tiles were chosen for the shared memory of these cards; AMD's have another amount of it.
    is_nvidia = device.type == "cuda" and torch.version.hip is None
    return is_nvidia and HAS_TRITON and torch.cuda.get_device_capability(device) >= (8, 0)


def _decodes_by_kernels(module: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor) -> bool:
    if torch.is_grad_enabled() or not runs_kernels(hidden_states.device) or top_k_index.numel() > MAX_CHOICES:
        return False
    if (module.training and module.dropout > 0) or in_forward_mode() or is_transformed():
        return False
    weights, device = (module.gate_up_proj, module.down_proj), hidden_states.device.type
    # A subclass of tensors knows its own products.
    if weights[0].dtype != weights[1].dtype or not all(type(w) in (nn.Parameter, torch.Tensor) for w in weights):
        return False
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weights[0].dtype
    return dtype in DTYPES and unfit(module, dtype) is None


# Assigning again is harmless: this module may be imported under several names.
ALL_EXPERTS_FUNCTIONS.register(DEFAULT_EXPERTS, experts_forward)
