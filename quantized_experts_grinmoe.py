"""The fused experts with 4-bit or 8-bit weights: what is stored, and how their products are computed.

Shapes: E experts, H hidden size, I expert width, n tokens of an expert; a fused weight is (E, out, in).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers import BitsAndBytesConfig
from transformers import initialization as init
from transformers.utils import logging

from .experts_grinmoe import GrinMoeExperts

logger = logging.get_logger(__name__)

MISSING = (
    "4-bit and 8-bit weights need bitsandbytes, which is not installed, or too old for this Transformers: "
    "pip install 'grinmoe[quant]', or without the package: pip install -U bitsandbytes accelerate"
)
FUSED = ("gate_up_proj", "down_proj")
# Values that share a scale (absmax), and scales that share a nested one: bitsandbytes' own sizes.
BLOCK, NESTED_BLOCK = 64, 256

# Shape and dtype of tensors, by name.
Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]


class QuantizedGrinMoeExperts(GrinMoeExperts):
    """
    Experts whose fused weights are packed. They are frozen; gradients reach the input and what is added to the products.

    `gate_up_proj` and `down_proj` are Parameters of integers, their scales are buffers beside them, both per expert: what
    an expert needs is its own row of each. An expert is dequantised when tokens are sent to it, and again in the backward
    pass. This is a loop of its own: `experts_implementation` has no effect, because the others read whole dense weights.

    Args:
        config: a `GrinMoeConfig`.
        quantization_config: a `BitsAndBytesConfig`.
        packed: whether the Parameters have their packed shapes from the start, to load a quantised checkpoint; else they
            are dense until `pack` has been called.
    """

    def __init__(self, config, quantization_config: BitsAndBytesConfig, packed: bool = False):
        super().__init__(config)
        self.quantization_config = quantization_config
        for key, (shape, dtype) in self.layout(config, quantization_config).items():
            if key not in FUSED:
                self.register_buffer(key, torch.zeros(shape, dtype=dtype))
            elif packed:
                setattr(self, key, nn.Parameter(torch.zeros(shape, dtype=dtype), requires_grad=False))
        self.requires_grad_(False)
        self.register_load_state_dict_pre_hook(_refuse_other_dtypes)

    @property
    def compute_dtype(self) -> torch.dtype | None:
        """What products are computed in; None for the dtype of the input."""
        return None

    @staticmethod
    def layout(config, quantization_config: BitsAndBytesConfig) -> Layout:
        """Every tensor of the state dict: the packed weights by their names, and the scales."""
        raise NotImplementedError

    def quantize(self, name: str, matrix: torch.Tensor) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """One expert's (out, in) to its rows of the tensors in `layout`, and to those that all experts share."""
        raise NotImplementedError

    def dequantize(self, name: str, expert: int, dtype: torch.dtype) -> torch.Tensor:
        """(out, in): the weight that an expert's products are computed with."""
        raise NotImplementedError

    def product(self, name: str, expert: int, group: torch.Tensor) -> torch.Tensor:
        """(n, in) to (n, out) for n > 0, in the dtype of `group`."""
        raise NotImplementedError

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """The contract of [`GrinMoeExperts.forward`], whatever `experts_implementation` says.

        Raises:
            RuntimeError: under torch.compile; the loop needs the group sizes on the host.
        """
        if torch.compiler.is_compiling():
            raise RuntimeError(
                "quantised experts loop over group sizes on the host and cannot be compiled; run the model without "
                "torch.compile, or compile model.dequantize()"
            )
        implementation = self.config._experts_implementation
        # Our default; the library's, and what generate makes of that; and the loop.
        if implementation not in ("grinmoe", "grouped_mm", "batched_mm", "eager", None):
            logger.warning_once(
                f"experts_implementation={implementation!r} has no effect on quantised experts: they have their own loop"
            )
        compute_dtype = self._compute_dtype(hidden_states)
        return self.loop(hidden_states.to(compute_dtype), top_k_index, top_k_weights).to(hidden_states.dtype)

    def linears(self, name: str) -> list[Callable[[torch.Tensor], torch.Tensor]]:
        """For each expert, (n, in) to (n, out). One without tokens is not dequantised. Computed, and returned, in the dtype
        of autocast, else in a 16-bit `bnb_4bit_compute_dtype`, else in that of the input."""
        return [functools.partial(self._product_or_nothing, name, expert) for expert in range(self.num_experts)]

    def _product_or_nothing(self, name: str, expert: int, group: torch.Tensor) -> torch.Tensor:
        group = group.to(self._compute_dtype(group))
        if group.shape[0] == 0:
            return group.new_zeros(0, dense_shape(self.config, name)[1])
        return self.product(name, expert, group)

    def _compute_dtype(self, group: torch.Tensor) -> torch.dtype:
        device = group.device.type
        if torch.is_autocast_enabled(device):
            # Nothing inside of an autograd function is cast by itself.
            return torch.get_autocast_dtype(device)
        return self.compute_dtype or group.dtype

    def pack(self, name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """
        Quantise a fused weight, one expert after the other.

        Args:
            name: "gate_up_proj" or "down_proj".
            weight: (E, out, in) float.

        Returns:
            By their names, the tensors that take its place in this module (see `install`).

        Raises:
            ValueError: a weight of another shape.
        """
        expected = dense_shape(self.config, name)
        if tuple(weight.shape) != expected:
            raise ValueError(f"{name} has shape {tuple(weight.shape)}, the config makes it {expected}")
        layout = self.layout(self.config, self.quantization_config)
        packed: dict[str, torch.Tensor] = {}
        for expert, matrix in enumerate(weight.detach()):
            rows, shared = self.quantize(name, matrix)
            for key, row in rows.items():
                if key not in packed:
                    packed[key] = torch.empty(layout[key][0], dtype=layout[key][1], device=weight.device)
                packed[key][expert] = row
        packed[name] = nn.Parameter(packed[name], requires_grad=False)
        return packed | shared

    @torch.no_grad()
    def pack_all(self) -> None:
        """Pack the weights that are still dense."""
        for name in FUSED:
            if getattr(self, name).is_floating_point():
                self.install(self.pack(name, getattr(self, name)))

    def install(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take tensors of `pack` in."""
        for key, tensor in tensors.items():
            setattr(self, key, tensor)

    def init_missing(self, std: float) -> None:
        """Initialise what no checkpoint gave: dense weights like new experts', packed ones and scales to zero."""
        for tensor in [*self.parameters(), *self.buffers()]:
            if tensor.dim() == 3 and tensor.is_floating_point():
                init.normal_(tensor, mean=0.0, std=std)
            else:
                init.zeros_(tensor)

    def dense(self, dtype: torch.dtype) -> GrinMoeExperts:
        """Experts with the dequantised weights in fused Parameters, on the same device."""
        with torch.device("meta"):
            experts = GrinMoeExperts(self.config)
        for name in FUSED:
            weight = torch.empty(dense_shape(self.config, name), dtype=dtype, device=getattr(self, name).device)
            for expert in range(self.num_experts):
                weight[expert] = self.dequantize(name, expert, dtype)
            setattr(experts, name, nn.Parameter(weight))
        return experts.train(self.training)

    def _apply(self, fn, recurse=True):
        # What every .to(), .half() and .cuda() of a module goes through: scales keep their dtype, as bitsandbytes' do.
        def moved(tensor: torch.Tensor) -> torch.Tensor:
            result = fn(tensor)
            return result if result.dtype == tensor.dtype else tensor.to(result.device)

        if recurse:
            for child in self.children():
                child._apply(fn)
        return super()._apply(moved, recurse=False)


class GrinMoeExperts4bit(QuantizedGrinMoeExperts):
    """nf4 or fp4: 4-bit codes, and a scale (absmax) per 64 of them; with double quantisation that is 8-bit as well."""

    @property
    def compute_dtype(self) -> torch.dtype | None:
        compute_dtype = self.quantization_config.bnb_4bit_compute_dtype
        # float32 is what BitsAndBytesConfig has when nothing was asked for.
        return None if compute_dtype == torch.float32 else compute_dtype

    @property
    def nested(self) -> bool:
        return self.quantization_config.bnb_4bit_use_double_quant

    @staticmethod
    def layout(config, quantization_config: BitsAndBytesConfig) -> Layout:
        nested = quantization_config.bnb_4bit_use_double_quant
        tensors: Layout = {"quant_map": ((16,), torch.float32)}
        if nested:
            tensors["nested_quant_map"] = ((256,), torch.float32)
        for name in FUSED:
            num_experts, rows, columns = dense_shape(config, name)
            check_block(f"the experts' {name}", columns)
            blocks = rows * columns // BLOCK
            tensors[name] = ((num_experts, rows * columns // 2), torch.uint8)
            tensors[f"{name}_absmax"] = ((num_experts, blocks), torch.uint8 if nested else torch.float32)
            if nested:
                nested_blocks = math.ceil(blocks / NESTED_BLOCK)
                tensors[f"{name}_nested_absmax"] = ((num_experts, nested_blocks), torch.float32)
                tensors[f"{name}_nested_offset"] = ((num_experts,), torch.float32)
        return tensors

    def quantize(self, name, matrix):
        quant_type = self.quantization_config.bnb_4bit_quant_type
        codes, state = _bitsandbytes().functional.quantize_4bit(
            matrix.contiguous(), blocksize=BLOCK, compress_statistics=self.nested, quant_type=quant_type
        )
        rows, shared = {name: codes.flatten(), f"{name}_absmax": state.absmax}, {"quant_map": state.code}
        if self.nested:
            rows |= {f"{name}_nested_absmax": state.state2.absmax, f"{name}_nested_offset": state.offset}
            shared["nested_quant_map"] = state.state2.code
        return rows, shared

    def quant_state(self, name: str, expert: int, dtype: torch.dtype) -> Any:
        """What bitsandbytes' functions need beside an expert's codes: a view of the buffers."""
        new_state = _bitsandbytes().functional.QuantState
        offset = state2 = None
        if self.nested:
            offset = getattr(self, f"{name}_nested_offset")[expert]
            state2 = new_state(
                absmax=getattr(self, f"{name}_nested_absmax")[expert],
                code=self.nested_quant_map,
                blocksize=NESTED_BLOCK,
                dtype=torch.float32,
            )
        return new_state(
            absmax=getattr(self, f"{name}_absmax")[expert],
            shape=torch.Size(dense_shape(self.config, name)[1:]),
            code=self.quant_map,
            blocksize=BLOCK,
            quant_type=self.quantization_config.bnb_4bit_quant_type,
            dtype=dtype,
            offset=offset,
            state2=state2,
        )

    def dequantize(self, name, expert, dtype):
        codes = getattr(self, name)[expert].view(-1, 1)
        return _bitsandbytes().functional.dequantize_4bit(codes, self.quant_state(name, expert, dtype))

    def product(self, name, expert, group):
        # Transposed: releases before 0.50 want it so, later ones take both.
        codes = getattr(self, name)[expert].view(-1, 1).t()
        return _bitsandbytes().matmul_4bit(group, codes, quant_state=self.quant_state(name, expert, group.dtype))


class GrinMoeExperts8bit(QuantizedGrinMoeExperts):
    """int8 by rows: weight = code * scale of the row. The weights alone are 8-bit, activations are as they come.

    (LLM.int8, what the linears get, also rounds activations to 8 bits, but for outliers.)
    """

    @staticmethod
    def layout(config, quantization_config: BitsAndBytesConfig) -> Layout:
        tensors: Layout = {}
        for name in FUSED:
            shape = dense_shape(config, name)
            tensors[name] = (shape, torch.int8)
            tensors[f"{name}_scale"] = (shape[:2], torch.float32)
        return tensors

    def quantize(self, name, matrix):
        codes, scale = quantize_rows(matrix)
        return {name: codes, f"{name}_scale": scale}, {}

    def dequantize(self, name, expert, dtype):
        return dequantize_rows(getattr(self, name)[expert], getattr(self, f"{name}_scale")[expert], dtype)

    def product(self, name, expert, group):
        return _Int8Linear.apply(group, getattr(self, name)[expert], getattr(self, f"{name}_scale")[expert])


def quantize_rows(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, in) to int8 codes of the same shape and float32 scales (out,): weight = code * scale."""
    matrix = matrix.float()
    scale = matrix.abs().amax(dim=1) / 127
    codes = (matrix / scale.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(1)).round().to(torch.int8)
    return codes, scale


def dequantize_rows(codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(out, in) int8 and (out,) float32 to (out, in)."""
    return (codes * scale.unsqueeze(1)).to(dtype)


class _Int8Linear(torch.autograd.Function):
    """(n, in) and int8 (out, in) to (n, out). Kept for the backward are the codes alone, which are there anyway."""

    @staticmethod
    def forward(ctx, group, codes, scale):
        ctx.save_for_backward(codes, scale)
        return nn.functional.linear(group, dequantize_rows(codes, scale, group.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        codes, scale = ctx.saved_tensors
        return grad_output @ dequantize_rows(codes, scale, grad_output.dtype), None, None


def _bitsandbytes():
    """The package, imported when it is needed: it takes its time, and most users of a checkpoint do not have it."""
    try:
        import bitsandbytes
    except ImportError as error:
        raise ImportError(MISSING) from error
    return bitsandbytes


def check_block(name: str, in_features: int) -> None:
    """Raise ValueError unless blocks end where rows do.

    For other sizes bitsandbytes 0.50 reads the scales of wrong blocks on a CPU, without an error.
    """
    if in_features % BLOCK:
        raise ValueError(
            f"{name} has rows of {in_features} weights, and 4-bit blocks have {BLOCK}; choose load_in_8bit=True, a model "
            f"whose hidden_size, intermediate_size and heads * head size are multiples of {BLOCK}, or name the module in "
            "llm_int8_skip_modules"
        )


def dense_shape(config, name: str) -> tuple[int, int, int]:
    """(E, out, in) of a fused weight."""
    num_experts, hidden, width = config.num_local_experts, config.hidden_size, config.intermediate_size
    return (num_experts, 2 * width, hidden) if name == "gate_up_proj" else (num_experts, hidden, width)


def _refuse_other_dtypes(module, state_dict, prefix, local_metadata, strict, missing, unexpected, error_msgs) -> None:
    """`load_state_dict` pre-hook: torch would cast a float weight to integers, where the shapes are the same."""
    for name in FUSED:
        weight = state_dict.get(prefix + name)
        if weight is not None and weight.dtype != getattr(module, name).dtype:
            error_msgs.append(
                f"{prefix}{name} is {weight.dtype} there, and quantised ({getattr(module, name).dtype}) here; load full "
                "precision by from_pretrained(..., quantization_config=...)"
            )
            del state_dict[prefix + name]


__all__ = ["GrinMoeExperts4bit", "GrinMoeExperts8bit", "QuantizedGrinMoeExperts"]
