"""Compile every Triton kernel for a GPU that is not there, as at full size.

    TRITON_INTERPRET=0 python -m tests.kernels.compiled_kernels [90]

The launch functions run on meta tensors, which have shapes and alignment and no memory, with a driver that names a device
and has none; so each kernel is specialised as on the real one, down to machine code. Prints one JSON object per kernel:
its name, its registers, stack and shared memory, its widest access to global memory, and its fused multiplications.

Whether a kernel is right is for the interpreter to say, and whether it is fast for a GPU.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

# What the project is for: the released model's layer, 16k tokens.
TOKENS, TOP_K, HIDDEN, WIDTH, EXPERTS = 16384, 2, 4096, 6400, 16
# And one token, and one number more than a multiple of 16: Triton compiles an argument that is 1 in as a constant, which
# has no methods, and knows of others whether 16 divides them.
FEW = ((1, 1), (1, TOP_K), (17, TOP_K))


class NoDevice:
    """As much of a driver as compiling asks for."""

    def __init__(self, capability: int):
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_only(compiled: dict) -> None:
    """From here on a launch compiles its kernel, keeps it in `compiled`, and runs nothing."""
    run = JITFunction.run

    def warm_up(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        compiled.setdefault(self.fn.__name__, []).append(kernel)
        return kernel

    JITFunction.run = warm_up


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def launch_router() -> None:
    from grinmoe.kernels.triton_router import jitter, router_backward, router_forward

    selected, weights = empty(TOKENS, TOP_K, dtype=torch.int64), empty(TOKENS, TOP_K)
    seed = empty(1, dtype=torch.int64)
    for num_experts in (EXPERTS, 128):
        logits = empty(TOKENS, num_experts)
        for estimator in ("sparsemixer_v2", "sparsemixer_togo", "sparsemixer_joint")[: 1 if num_experts == 128 else 3]:
            router_forward(logits, None, None, None, 2**62 + 5, 3, TOP_K, 0.02, estimator, True)
            router_forward(logits, None, None, seed, 0, 3, TOP_K, 0.02, estimator, False)
            router_backward(logits, selected, weights, 0.02, estimator, True)
    for tokens, top_k in ((TOKENS, TOP_K), *FEW):
        logits, selected, weights = (
            empty(tokens, EXPERTS),
            empty(tokens, top_k, dtype=torch.int64),
            empty(tokens, top_k),
        )
        exponential, uniform = (empty(top_k, tokens, n, dtype=torch.float32) for n in (EXPERTS, 1))
        for estimator in ("sparsemixer_v2", "sparsemixer_togo"):
            router_forward(logits, exponential, uniform, None, 0, 3, top_k, 0.02, estimator, True)
            # Layer 1 and seed 1 are numbers like others.
            router_forward(logits, None, None, None, 1, 1, top_k, 0.02, estimator, True)
            router_backward(logits, selected, weights, 0.02, estimator, True)
        jitter(empty(tokens, HIDDEN), None, 1, 1, 0.01)
    jitter(empty(TOKENS, HIDDEN), None, 2**62 + 5, 3, 0.01)
    jitter(empty(TOKENS, HIDDEN), seed, 0, 3, 0.01)


def launch_experts() -> None:
    from grinmoe.kernels.permute_kernels import (
        combine,
        gather_rows,
        place_rows,
        swiglu,
        swiglu_backward,
        zero_idle_experts,
    )

    selected, weights = empty(TOKENS, TOP_K, dtype=torch.int64), empty(TOKENS, TOP_K)
    order, row_of_choice, ends = place_rows(selected, EXPERTS)
    place_rows(selected, 128)
    pre_activation = empty(TOKENS * TOP_K, 2 * WIDTH)
    activation = swiglu(pre_activation, ends)
    for keep in (None, activation):
        swiglu(pre_activation, ends, keep)
        swiglu_backward(activation, pre_activation, weights, order, ends, keep)
    combine(empty(TOKENS * TOP_K, HIDDEN), row_of_choice, ends, TOP_K, weights)
    combine(empty(TOKENS * TOP_K, HIDDEN), row_of_choice, ends, TOP_K)
    gather_rows(empty(TOKENS, HIDDEN), row_of_choice, ends, TOP_K)
    zero_idle_experts(empty(EXPERTS, 2 * WIDTH, HIDDEN), ends)
    for tokens, top_k in FEW:
        order, row_of_choice, ends = place_rows(empty(tokens, top_k, dtype=torch.int64), EXPERTS)
        weights, pre_activation = empty(tokens, top_k), empty(tokens * top_k, 2 * WIDTH)
        activation = swiglu(pre_activation, ends)
        swiglu_backward(activation, pre_activation, weights, order, ends)
        combine(empty(tokens * top_k, HIDDEN), row_of_choice, ends, top_k, weights)
        gather_rows(empty(tokens, HIDDEN), row_of_choice, ends, top_k)


def launch_decoding() -> None:
    from grinmoe.kernels.small_batch_gemm import down_tiles, gate_up_tiles, launch

    gate_up_proj, down_proj = empty(EXPERTS, 2 * WIDTH, HIDDEN), empty(EXPERTS, HIDDEN, WIDTH)
    for tokens, top_k in ((1, 1), *((tokens, TOP_K) for tokens in (1, 8, 32, 64)), (128, 1)):
        selected = empty(tokens, top_k, dtype=torch.int64)
        launch(empty(tokens, HIDDEN), selected, empty(tokens, top_k), gate_up_proj, down_proj)
    # What is to be measured; at batch 1 tiles are those of 8.
    for tokens in (8, 32):
        given = empty(tokens, HIDDEN), empty(tokens, TOP_K, dtype=torch.int64), empty(tokens, TOP_K)
        for first in gate_up_tiles(tokens)[1:]:
            launch(*given, gate_up_proj, down_proj, first=first)
        for second in down_tiles(tokens)[1:]:
            launch(*given, gate_up_proj, down_proj, second=second)


def machine_facts(kernel) -> dict:
    """
    Registers, bytes on the stack (what registers are spilled to), bytes of shared memory (those that a launch asks for too),
    the widest access to global memory in bits, whether products and sums were fused where they could be, and how many are.
    """
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile("wb", suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [folder / "cuobjdump", "--dump-resource-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED):(\d+)", said)}
    accesses = re.findall(r"(?:ld|st)\.global\S*?(?:\.v(\d))?\.b(\d+)", kernel.asm["ptx"])
    return {
        "registers": usage["REG"],
        "stack_bytes": usage["STACK"],
        "shared_bytes": max(usage["SHARED"], kernel.metadata.shared),
        "widest_access_bits": max(int(count or 1) * int(bits) for count, bits in accesses),
        "fp_fusion": kernel.metadata.enable_fp_fusion,
        "fused": len(re.findall(r"\bfma\.\S*f32", kernel.asm["ptx"])),
    }


def main(capability: int = 90) -> None:
    driver.set_active(NoDevice(capability))
    compiled: dict[str, list] = {}
    compile_only(compiled)
    launch_router()
    launch_experts()
    launch_decoding()
    for name, kernels in compiled.items():
        for kernel in kernels:
            print(json.dumps({"kernel": name, **machine_facts(kernel)}))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
