"""Arms of the block's benchmark: ours, Transformers', a dense MLP, and peers where they are installed.

T tokens, H hidden size, I width, E experts, K experts per token, N = T * K rows sorted by expert.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import types
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers import PhimoeConfig
from transformers.models.phimoe.modeling_phimoe import PhimoeSparseMoeBlock

from grinmoe import GrinMoeConfig
from grinmoe.kernels import check_quack
from grinmoe.kernels.triton_experts import Products, backward_pass, forward_pass
from grinmoe.modeling_grinmoe import GrinMoeSparseMoeBlock

PHIMOE_EAGER, PHIMOE_GROUPED = "transformers phimoe, eager", "transformers phimoe, grouped_mm"
REFERENCE, GROUPED = "grinmoe, eager (reference loop)", "grinmoe, grouped_mm"
DEFAULT, KERNELS, QUACK = "grinmoe (default)", "grinmoe, grinmoe_triton", "grinmoe, grinmoe_quack"
LOOP = "grinmoe_triton, products in a loop on {} stream(s)"
DENSE, DENSE_FUSED = "dense", "dense, SwiGLU compiled"
LIGER, SONIC = "Liger's fused MoE", "SonicMoE"


class BlockSize(NamedTuple):
    hidden_size: int
    intermediate_size: int
    experts: int
    top_k: int


class DenseMlp(nn.Module):
    """SwiGLU MLP, (..., H) to (..., H), gate and up in one product. `compiled`: SwiGLU by torch.compile."""

    def __init__(self, hidden_size: int, width: int, compiled: bool = False):
        super().__init__()
        self.gate_up_proj = nn.Linear(hidden_size, 2 * width, bias=False)
        self.down_proj = nn.Linear(width, hidden_size, bias=False)
        self.activation = torch.compile(_swiglu) if compiled else _swiglu

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.activation(self.gate_up_proj(hidden_states)))


def _swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return nn.functional.silu(gate) * up


def block_arms(size: BlockSize, device: torch.device, toy: bool = False) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """
    What is measured on `device`, as modules on the meta device (`share_weights` fills them).

    Args:
        toy: a GPU's arms on a CPU, with the kernels interpreted.

    Returns:
        The arms by name, and for each peer that is left out the reason.
    """
    on_gpu = device.type == "cuda"
    left_out: dict[str, str] = {}
    with torch.device("meta"):
        width = size.top_k * size.intermediate_size
        arms: dict[str, nn.Module] = {DENSE: DenseMlp(size.hidden_size, width)}
        if on_gpu:
            arms[DENSE_FUSED] = DenseMlp(size.hidden_size, width, compiled=True)
    for name, implementation in ((PHIMOE_EAGER, "eager"), (PHIMOE_GROUPED, "grouped_mm")):
        arms[name] = build_block(PhimoeConfig, PhimoeSparseMoeBlock, implementation, size)
    for name, implementation in ((REFERENCE, "eager"), (GROUPED, "grouped_mm"), (DEFAULT, "grinmoe")):
        arms[name] = _ours(implementation, size)
    if on_gpu or toy:
        arms[KERNELS] = _ours("grinmoe_triton", size)
        for streams in (1, 4) if on_gpu else (1,):
            arms[LOOP.format(streams)] = with_loop_products(_ours("grinmoe_triton", size), streams)
    for name, peer in ((QUACK, _quack), (LIGER, _liger), (SONIC, _sonic)) if on_gpu else ():
        try:
            arms[name] = peer(size)
        # Whatever a package of others' raises when it cannot be loaded here: import, download, version.
        except Exception as error:
            left_out[name] = describe(error)
    return arms, left_out


def build_block(config_class: type, block_class: type, implementation: str, size: BlockSize) -> nn.Module:
    config = config_class(
        hidden_size=size.hidden_size,
        intermediate_size=size.intermediate_size,
        num_local_experts=size.experts,
        num_experts_per_tok=size.top_k,
        num_attention_heads=8,
        num_key_value_heads=8,
        router_jitter_noise=1e-6,
        input_jitter_noise=0.0,
    )
    config._experts_implementation = implementation
    with torch.device("meta"):
        return block_class(config).train()


def _ours(implementation: str, size: BlockSize) -> nn.Module:
    return build_block(GrinMoeConfig, GrinMoeSparseMoeBlock, implementation, size)


def share_weights(blocks: dict[str, nn.Module], directions: torch.Tensor, size: BlockSize, std: float = 0.02) -> None:
    """The same random weights for all sparse blocks, in the same memory, and for all dense ones.

    `directions` (E, H): the routers' weight; its dtype and device are those of all.
    """

    def drawn(*shape: int) -> nn.Parameter:
        return nn.Parameter(torch.randn(*shape, dtype=directions.dtype, device=directions.device).mul_(std))

    hidden, width, (experts, top_k) = size.hidden_size, size.intermediate_size, size[2:]
    gate_up, down, router_weight = (
        drawn(experts, 2 * width, hidden),
        drawn(experts, hidden, width),
        nn.Parameter(directions),
    )
    dense_gate_up, dense_down = drawn(2 * top_k * width, hidden), drawn(hidden, top_k * width)
    for block in blocks.values():
        if isinstance(block, DenseMlp):
            block.gate_up_proj.weight, block.down_proj.weight = dense_gate_up, dense_down
            continue
        router_of(block).weight = router_weight
        of_block = block.get_submodule("experts")
        of_block.gate_up_proj, of_block.down_proj = gate_up, down


def router_of(block: nn.Module) -> nn.Module:
    return block.get_submodule("gate" if hasattr(block, "gate") else "router")


def describe(error: Exception) -> str:
    """An exception on one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def _quack(size: BlockSize) -> nn.Module:
    check_quack(torch.device("cuda", torch.cuda.current_device()))
    importlib.import_module("quack.gemm_interface")
    return _ours("grinmoe_quack", size)


def _liger(size: BlockSize) -> nn.Module:
    if importlib.util.find_spec("liger_kernel") is None:
        raise ImportError("liger_kernel is not installed")
    from liger_kernel.ops import LigerFusedMoEFunction

    def forward(experts, hidden_states, top_k_index, top_k_weights):
        return LigerFusedMoEFunction.apply(
            hidden_states, experts.gate_up_proj, experts.down_proj, top_k_index.int(), top_k_weights
        )

    return _with_experts(_ours("grouped_mm", size), forward)


def _sonic(size: BlockSize) -> nn.Module:
    """By its name in Transformers' interface, and so with the reference router. Its kernel comes from the Hub."""
    from transformers.integrations.sonicmoe import load_sonicmoe_kernel

    load_sonicmoe_kernel()
    return _ours("sonicmoe", size)


def _with_experts(block: nn.Module, forward: Callable) -> nn.Module:
    """The block, with `forward` (experts, hidden_states, top_k_index, top_k_weights) in the place of its experts'."""
    experts = block.get_submodule("experts")
    experts.forward = types.MethodType(forward, experts)
    return block


def loop_products(streams: int) -> Products:
    """The grouped products as one product per expert, which needs the sizes on the host, on so many CUDA streams."""
    side = [torch.cuda.Stream() for _ in range(streams)] if streams > 1 else []

    def over_groups(ends: torch.Tensor, product) -> None:
        bounds = [0, *ends.tolist()]
        for stream in side:
            stream.wait_stream(torch.cuda.current_stream())
        for expert, (start, end) in enumerate(pairwise(bounds)):
            with torch.cuda.stream(side[expert % streams]) if side else contextlib.nullcontext():
                product(expert, slice(start, end))
        for stream in side:
            torch.cuda.current_stream().wait_stream(stream)

    def rows_by_weights(rows, weights, ends):
        output = rows.new_empty(rows.shape[0], weights.shape[1])
        over_groups(ends, lambda expert, group: torch.mm(rows[group], weights[expert].t(), out=output[group]))
        return output

    def rows_by_rows(left, right, ends):
        output = left.new_empty(ends.numel(), left.shape[1], right.shape[1])
        over_groups(ends, lambda expert, group: torch.mm(left[group].t(), right[group], out=output[expert]))
        return output

    return Products(rows_by_weights, rows_by_rows)


class _LoopExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_states, weights, gate_up_proj, down_proj, top_k_index, products):
        output, kept = forward_pass(hidden_states, weights, gate_up_proj, down_proj, top_k_index, products=products)
        ctx.save_for_backward(hidden_states, weights, gate_up_proj, down_proj, *kept)
        ctx.kept_type, ctx.products = type(kept), products
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        hidden_states, weights, gate_up_proj, down_proj, *kept = ctx.saved_tensors
        gradients = backward_pass(
            grad_output.contiguous(),
            hidden_states,
            weights,
            gate_up_proj,
            down_proj,
            keep=None,
            kept=ctx.kept_type(*kept),
            products=ctx.products,
        )
        return *gradients, None, None


def with_loop_products(block: nn.Module, streams: int) -> nn.Module:
    """A block with `grinmoe_triton` whose experts' products are a loop."""
    products = loop_products(streams)

    def forward(experts, hidden_states, top_k_index, top_k_weights):
        return _LoopExperts.apply(
            hidden_states, top_k_weights, experts.gate_up_proj, experts.down_proj, top_k_index, products
        )

    return _with_experts(block, forward)


__all__ = [
    "BlockSize",
    "DenseMlp",
    "block_arms",
    "build_block",
    "describe",
    "loop_products",
    "router_of",
    "share_weights",
    "with_loop_products",
]
