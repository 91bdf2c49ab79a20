"""What all Triton kernels here share: whether they are interpreted, and the sizes they take.

Imported only where Triton is. Under TRITON_INTERPRET=1 the kernels run on a CPU, for tests.
"""

from __future__ import annotations

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
