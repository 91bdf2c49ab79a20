"""What all Triton kernels here share: how they are launched, whether they are interpreted, and the sizes they take.

Imported only where Triton is. Under TRITON_INTERPRET=1 the kernels run on a CPU, for tests.
"""

from __future__ import annotations

from typing import Any

import torch
import triton

MAX_EXPERTS = 128
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def _probe():
    pass


def interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter. Triton decides that when a kernel is defined."""
    return not isinstance(_probe, triton.JITFunction)


def launch_kernel(
    kernel: Any,
    grid: tuple[int, ...],
    tensor: torch.Tensor,
    *arguments: torch.Tensor | float | None,
    enable_fp_fusion: bool = True,
    **constants: Any,
) -> None:
    """
    Launch a kernel on the device of its first argument, where all its tensors are. Every launch of this package is here.

    Triton itself launches on torch's current device, which is another one when a model is spread over several.

    Args:
        kernel: a function of `triton.jit`.
        grid: programs in each dimension.
        tensor, arguments: the kernel's arguments that are not compiled in.
        enable_fp_fusion: whether a product and the sum after it may be rounded once, as one instruction. Triton's own
            default is yes up to 3.9 and no from 3.10 on, so that every launch says it. Where decisions or draws are to
            equal the reference's, the answer is no.
        constants: the arguments that are compiled in, and Triton's options.
    """
    device = tensor.device
    # On a CPU (the interpreter) and for meta tensors (which only compile) there is none to choose.
    index = None if device.type in ("cpu", "meta") else device.index
    with torch.accelerator.device_index(index):
        kernel[grid](tensor, *arguments, enable_fp_fusion=enable_fp_fusion, **constants)
