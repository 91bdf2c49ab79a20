"""Which implementation of the experts serves where: `experts_implementation="grinmoe"`, the default.

| where | what |
|---|---|
| on a CPU, float32, hidden_act silu | `grinmoe_cpu` |
| elsewhere, no gradient and no more choices than experts (decoding) | Transformers' `batched_mm` |
| everything else, and an export | Transformers' `grouped_mm` |

What is not ours is what Transformers itself would take. `grinmoe_triton`, the Triton kernels, is to be asked for by name
until a committed measurement shows it ahead (docs/performance.md).

Shapes: T tokens, K experts per token, E experts, H hidden size.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from .cpu import SILU

DEFAULT_EXPERTS = "grinmoe"


def experts_forward(
    module: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The experts of `module` by what `implementation_for` names. Contract of `GrinMoeExperts.forward`."""
    name = implementation_for(module, hidden_states, top_k_index)
    device = hidden_states.device.type
    if name != "grinmoe_cpu" and torch.is_autocast_enabled(device):
        # Grouped products are not reached by autocast: they would be done in the weights' own dtype.
        dtype = torch.get_autocast_dtype(device)
        output = ALL_EXPERTS_FUNCTIONS[name](_Cast(module, dtype), hidden_states.to(dtype), top_k_index, top_k_weights)
        return output.to(hidden_states.dtype)
    return ALL_EXPERTS_FUNCTIONS[name](module, hidden_states, top_k_index, top_k_weights)


def implementation_for(module: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor) -> str:
    """Name of the implementation for this input, in Transformers' interface. The one place where it is chosen."""
    if torch.compiler.is_exporting():
        return "grouped_mm"  # an exported graph should not need operators of ours
    if hidden_states.device.type == "cpu":
        in_float32 = hidden_states.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
        return "grinmoe_cpu" if in_float32 and module.config.hidden_act in SILU else "grouped_mm"
    # batched_mm copies the weights of every choice: no more than the layer's experts are.
    decodes = not torch.is_grad_enabled() and top_k_index.numel() <= module.num_experts
    return "batched_mm" if decodes else "grouped_mm"


class _Cast:
    """A module of experts as the library's functions read it, with its weights in another dtype."""

    def __init__(self, module: nn.Module, dtype: torch.dtype):
        self.module = module
        self.gate_up_proj = module.gate_up_proj.to(dtype)
        self.down_proj = module.down_proj.to(dtype)

    def __getattr__(self, name: str):
        return getattr(self.module, name)


# Assigning again is harmless: this module may be imported under several names.
ALL_EXPERTS_FUNCTIONS.register(DEFAULT_EXPERTS, experts_forward)
