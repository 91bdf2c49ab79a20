"""Faster forms of routing and experts: one for CPUs, Triton kernels for GPUs, and the choice between them.

Importing this room registers them: the experts in Transformers' experts interface, the router in
`routing_grinmoe.ROUTERS`.
"""

from transformers.utils import is_triton_available

from ..routing_grinmoe import ROUTERS, FusedRouter
from . import quack_experts, triton_experts
from .dispatch import DEFAULT_EXPERTS, implementation_for
from .philox import counter_noise
from .quack_experts import check_quack
from .triton_experts import ALIGNMENT_BYTES

if is_triton_available():
    from . import triton_router
    from .small_batch_gemm import down_tiles, few_tokens_experts, gate_up_tiles
    from .small_batch_gemm import launch as launch_few_tokens
else:
    # Nothing of `grinmoe_triton` runs, and the error says what is missing.
    ROUTERS["grinmoe_triton"] = FusedRouter(*[lambda tensor, *_: triton_experts.check_triton(tensor.device)] * 2)

ROUTERS[quack_experts.NAME] = quack_experts.checked_router(ROUTERS["grinmoe_triton"])
