"""4-bit and 8-bit loading of the experts as well as the linears, by Transformers' own `BitsAndBytesConfig`.

Transformers quantises nn.Linear alone, and 96 % of a GRIN-MoE's weights are not in one. Here its two bitsandbytes
quantizers learn the experts: while a checkpoint is loaded, each fused weight is packed as soon as it is complete, so that
the model never exists in full precision. docs/quantization.md says how far results move.

This file does not import the model: `modeling_grinmoe.py` combines its experts with the packed forms below.

Shapes: E experts, H hidden size, I expert width, n tokens of an expert; a fused weight is (E, out, in).
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils.parametrize import is_parametrized
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers import initialization as init
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name, should_convert_module
from transformers.utils import is_bitsandbytes_available, logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from .configuration_grinmoe import check_pattern

logger = logging.get_logger(__name__)

MISSING = (
    "4-bit and 8-bit weights need bitsandbytes, which is not installed, or too old for this Transformers: "
    "pip install 'grinmoe[quant]', or without the package: pip install -U bitsandbytes accelerate"
)
CODES_ARE_FROZEN = (
    "quantised experts are integer codes, and what PEFT's own LoRA adds to them would be lost; use "
    "grinmoe.adapters.load_adapter(model, folder), or get_peft_model with grinmoe.adapters.lora_config(model)"
)
FUSED = ("gate_up_proj", "down_proj")
# Values that share a scale (absmax), and scales that share a nested one: bitsandbytes' own sizes.
BLOCK, NESTED_BLOCK = 64, 256

# Shape and dtype of tensors, by name.
Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]


class PackedExperts(nn.Module):
    """
    Experts whose fused weights are packed. They are frozen; gradients reach the input and what is added to the products.

    `gate_up_proj` and `down_proj` are Parameters of integers, their scales are buffers beside them, both per expert: what
    an expert needs is its own row of each. An expert is dequantised when tokens are sent to it, and again in the backward
    pass. This is a loop of its own: `experts_implementation` has no effect, because the others read whole dense weights.

    The model's classes of packed experts have two bases: one of the forms below, and a class of dense experts, whose `loop`
    the form uses and whose `packed_forms` lists them. `dense` makes one of `dense_form`.

    Args:
        packed: whether the Parameters have their packed shapes from the start, to load a quantised checkpoint; else they
            are dense until `pack` has been called.
    """

    dense_form: type[nn.Module]

    def __init__(self, config, quantization_config: BitsAndBytesConfig, packed: bool = False):
        super().__init__(config)
        self.quantization_config = quantization_config
        for key, (shape, dtype) in self.layout(config, quantization_config).items():
            if key not in FUSED:
                self.register_buffer(key, torch.zeros(shape, dtype=dtype))
            elif packed:
                setattr(self, key, nn.Parameter(torch.zeros(shape, dtype=dtype), requires_grad=False))
        self.requires_grad_(False)
        self.register_load_state_dict_pre_hook(_refuse_other_forms)

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
        """The contract of `GrinMoeExperts.forward`, whatever `experts_implementation` says.

        Raises:
            RuntimeError: under torch.compile; the loop needs the group sizes on the host.
            ValueError: something parametrises the codes.
        """
        if is_parametrized(self):
            raise ValueError(CODES_ARE_FROZEN)
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

    @staticmethod
    def check_wrapper(wrapper: Any) -> None:
        """Raise ValueError for a layer of PEFT around packed experts, unless it says that it leaves their codes alone."""
        base = wrapper.get_base_layer() if hasattr(wrapper, "get_base_layer") else None
        if isinstance(base, PackedExperts) and not getattr(wrapper, "leaves_codes_alone", False):
            raise ValueError(CODES_ARE_FROZEN)

    def linears(self, name: str) -> list[Callable[[torch.Tensor], torch.Tensor]]:
        """For each expert, (n, in) to (n, out). One without tokens is not dequantised. Computed, and returned, in the dtype
        of autocast, else in a 16-bit `bnb_4bit_compute_dtype`, else in that of the input."""
        return [functools.partial(self._product_or_nothing, name, expert) for expert in range(self.num_experts)]

    def _product_or_nothing(self, name: str, expert: int, group: torch.Tensor) -> torch.Tensor:
        group = group.to(self._compute_dtype(group))
        if group.shape[0] == 0:
            return group.new_zeros(0, dense_shape(self.config, name)[1])
        if in_forward_mode():
            return nn.functional.linear(group, self.dequantize(name, expert, group.dtype))
        return self.product(name, expert, group)

    def _compute_dtype(self, group: torch.Tensor) -> torch.dtype:
        device = group.device.type
        if torch.is_autocast_enabled(device):
            return torch.get_autocast_dtype(device)  # nothing inside of an autograd function is cast by itself
        return self.compute_dtype or group.dtype

    def pack(self, name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """Quantise a fused weight (E, out, in), one expert after the other, to the tensors that take its place here, by
        their names (see `install`). Raises ValueError for a weight of another shape."""
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

    def dense(self, dtype: torch.dtype) -> nn.Module:
        """Experts with the dequantised weights in fused Parameters, on the same device."""
        with torch.device("meta"):
            experts = self.dense_form(self.config)
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


class Packed4bitExperts(PackedExperts):
    """nf4 or fp4: 4-bit codes, and a scale (absmax) per 64 of them; with double quantisation that is 8-bit as well."""

    @property
    def compute_dtype(self) -> torch.dtype | None:
        dtype = self.quantization_config.bnb_4bit_compute_dtype
        return None if dtype == torch.float32 else dtype  # float32 is BitsAndBytesConfig's when nothing was asked for

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
        codes, state = import_bitsandbytes().functional.quantize_4bit(
            matrix.contiguous(), blocksize=BLOCK, compress_statistics=self.nested, quant_type=quant_type
        )
        rows, shared = {name: codes.flatten(), f"{name}_absmax": state.absmax}, {"quant_map": state.code}
        if self.nested:
            rows |= {f"{name}_nested_absmax": state.state2.absmax, f"{name}_nested_offset": state.offset}
            shared["nested_quant_map"] = state.state2.code
        return rows, shared

    def quant_state(self, name: str, expert: int, dtype: torch.dtype) -> Any:
        """What bitsandbytes' functions need beside an expert's codes: a view of the buffers."""
        new_state = import_bitsandbytes().functional.QuantState
        offset = state2 = None
        if self.nested:
            offset = getattr(self, f"{name}_nested_offset")[expert]
            nested_absmax = getattr(self, f"{name}_nested_absmax")[expert]
            state2 = new_state(nested_absmax, code=self.nested_quant_map, blocksize=NESTED_BLOCK, dtype=torch.float32)
        absmax, kind = getattr(self, f"{name}_absmax")[expert], self.quantization_config.bnb_4bit_quant_type
        shape = torch.Size(dense_shape(self.config, name)[1:])
        return new_state(absmax, shape, self.quant_map, BLOCK, kind, dtype, offset, state2)

    def dequantize(self, name, expert, dtype):
        codes = getattr(self, name)[expert].view(-1, 1)
        return import_bitsandbytes().functional.dequantize_4bit(codes, self.quant_state(name, expert, dtype))

    def product(self, name, expert, group):
        # Transposed: releases before 0.50 want it so, later ones take both.
        codes = getattr(self, name)[expert].view(-1, 1).t()
        return import_bitsandbytes().matmul_4bit(group, codes, quant_state=self.quant_state(name, expert, group.dtype))


class Packed8bitExperts(PackedExperts):
    """int8 by rows: weight = code * scale of the row. (LLM.int8, what the linears get, rounds the activations as well.)"""

    @staticmethod
    def layout(config, quantization_config: BitsAndBytesConfig) -> Layout:
        tensors: Layout = {}
        for name in FUSED:
            shape = dense_shape(config, name)
            tensors |= {name: (shape, torch.int8), f"{name}_scale": (shape[:2], torch.float32)}
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

    generate_vmap_rule = True

    @staticmethod
    def forward(group, codes, scale):
        return nn.functional.linear(group, dequantize_rows(codes, scale, group.dtype))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx, grad_output):
        codes, scale = ctx.saved_tensors
        return grad_output @ dequantize_rows(codes, scale, grad_output.dtype), None, None


def in_forward_mode() -> bool:
    """Whether a derivative is followed forward (`torch.func.jvp`, `torch.autograd.forward_ad`).

    Operators that autograd does not know lose it without an error, and the `jvp` of an autograd function that of an outer
    level: whoever uses them asks here first. (tests/model/test_function_transforms.py notices when the private name moves.)
    """
    return forward_ad._current_level >= 0


def import_bitsandbytes():
    """The package, imported when it is needed: it takes its time, and most users of a checkpoint do not have it."""
    try:
        import bitsandbytes
    except ImportError as error:
        raise ImportError(MISSING) from error
    return bitsandbytes


def check_block(name: str, in_features: int) -> None:
    """Raise ValueError unless blocks end where rows do. Else bitsandbytes 0.50 reads wrong scales on a CPU, silently."""
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


def _refuse_other_forms(module, state_dict, prefix, local_metadata, strict, missing, unexpected, error_msgs) -> None:
    """`load_state_dict` pre-hook: torch would cast other dtypes, and where it is not strict take codes without scales."""
    layout = {key: dtype for key, (_, dtype) in module.layout(module.config, module.quantization_config).items()}
    given = {key: state_dict[prefix + key] for key in layout if prefix + key in state_dict}
    same = {key: tensor.dtype for key, tensor in given.items()} == layout
    if same and "quant_map" in layout and not given["quant_map"].is_meta:
        kind = module.quantization_config.bnb_4bit_quant_type
        meaning = import_bitsandbytes().functional.get_4bit_type(kind, device=given["quant_map"].device)
        same = torch.equal(given["quant_map"], meaning)
    if given and not same:
        error_msgs.append(
            f"{prefix}: quantised experts have {', '.join(map(str, layout.items()))}, which are not there; load full "
            "precision by from_pretrained(..., quantization_config=...)"
        )
        for key in given:
            del state_dict[prefix + key]


def _take_4bit_linear(module, state_dict, prefix, local_metadata, strict, missing, unexpected, error_msgs) -> None:
    """`load_state_dict` pre-hook: bitsandbytes' own linears take the codes alone, and keep the scales that they had."""
    key = f"{prefix}weight"
    state = {name: state_dict.pop(name).clone() for name in list(state_dict) if name.startswith(f"{key}.")}
    codes, held = state_dict.get(key), module.weight
    if codes is None or codes.shape != held.shape:
        return  # torch reports it
    if state:
        taken = held.from_prequantized(codes.clone(), state, device=held.device, module=module)
        module.weight = state_dict[key] = taken
    else:
        error_msgs.append(f"{key} has no scales (absmax) there; give all that state_dict gave")
        del state_dict[key]


def _packing(quantization_config: BitsAndBytesConfig) -> type[PackedExperts]:
    return Packed8bitExperts if quantization_config.load_in_8bit else Packed4bitExperts


def _packed_form(module: nn.Module, quantization_config: BitsAndBytesConfig) -> type[PackedExperts] | None:
    """The class that takes the place of these experts; None for any other module, and for packed experts."""
    if isinstance(module, PackedExperts):
        return None
    forms = getattr(type(module), "packed_forms", ())
    return next((form for form in forms if issubclass(form, _packing(quantization_config))), None)


def check_quantization_config(quantization_config: BitsAndBytesConfig) -> None:
    """
    Raises:
        ImportError: bitsandbytes is not installed.
        ValueError: neither 4 nor 8 bits, or a type or storage that the experts do not have.
    """
    if not is_bitsandbytes_available():
        raise ImportError(MISSING)
    if not (quantization_config.load_in_4bit or quantization_config.load_in_8bit):
        raise ValueError("quantization_config asks for neither load_in_4bit nor load_in_8bit; set one of them")
    if quantization_config.load_in_8bit:
        if quantization_config.llm_int8_has_fp16_weight:
            raise ValueError(
                "llm_int8_has_fp16_weight=True trains 16-bit weights beside the 8-bit ones, which the experts do not have; "
                "leave it out, and train what is added (LoRA)"
            )
        return
    if quantization_config.bnb_4bit_compute_dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(
            f"bnb_4bit_compute_dtype={quantization_config.bnb_4bit_compute_dtype} gives wrong products; choose "
            "torch.bfloat16, torch.float16, or torch.float32 for the dtype of the input"
        )
    if (kind := quantization_config.bnb_4bit_quant_type) not in ("nf4", "fp4"):
        raise ValueError(f"bnb_4bit_quant_type={kind!r}; choose 'nf4' (for weights), or 'fp4'")
    if (storage := quantization_config.bnb_4bit_quant_storage) != torch.uint8:
        raise ValueError(f"bnb_4bit_quant_storage={storage}: the experts are stored as torch.uint8; leave it out")


def check_method(quantization_config: QuantizationConfigMixin | dict[str, Any] | None) -> None:
    """
    Raise ValueError for every quantisation method but that of this file; None is none.

    All others of Transformers pass over the fused experts, replace them by experts of their own, or leave weights that the
    experts' products do not take.

    Args:
        quantization_config: of `from_pretrained` or of a model's config; from config.json it is a dict.
    """
    if quantization_config is None:
        return
    if isinstance(quantization_config, dict):
        # Without a method, Transformers takes these for bitsandbytes'.
        unnamed = "bitsandbytes" if {"load_in_4bit", "load_in_8bit"} & quantization_config.keys() else None
        method = quantization_config.get("quant_method", unnamed)
    elif isinstance(quantization_config, QuantizationConfigMixin):
        method = quantization_config.quant_method
    else:
        raise ValueError(f"quantization_config={quantization_config!r}; give BitsAndBytesConfig(load_in_4bit=True)")
    method = getattr(method, "value", method)
    if method != "bitsandbytes":
        raise ValueError(
            f"quantization_config asks for {method}, which does not quantise the experts of this model: gate_up_proj and "
            "down_proj of every layer, 96 % of the released model's weights, would stay in full precision or not work; give "
            "a full-precision checkpoint and transformers.BitsAndBytesConfig(load_in_4bit=True) or (load_in_8bit=True)"
        )
    if isinstance(quantization_config, dict):
        try:
            quantization_config = BitsAndBytesConfig.from_dict(quantization_config)
        except (TypeError, AttributeError) as error:
            raise ValueError(
                f"quantization_config cannot be used ({error}); correct it, or take the original config.json again"
            ) from error
        for pattern in quantization_config.llm_int8_skip_modules or ():
            check_pattern("llm_int8_skip_modules", pattern)


def check_agreement(asked: BitsAndBytesConfig | dict[str, Any], stored: BitsAndBytesConfig | dict[str, Any]) -> None:
    """Raise ValueError where a `quantization_config` asks for another form than a quantised checkpoint has."""
    wanted, found = (BitsAndBytesConfig.from_dict(one) if isinstance(one, dict) else one for one in (asked, stored))
    for field in ("load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", "llm_int8_skip_modules"):
        if getattr(wanted, field) and getattr(wanted, field) != getattr(found, field):
            raise ValueError(
                f"quantization_config asks for {field}={getattr(wanted, field)}, and the checkpoint is quantised with "
                f"{field}={getattr(found, field)}; leave it out, or give the checkpoint in full precision"
            )


def packed_layout(
    config, quantization_config: BitsAndBytesConfig | dict[str, Any], linears: dict[str, tuple[int, ...]] | None = None
) -> Layout:
    """
    Shape and dtype, by key, of the tensors that packed experts have in a quantised checkpoint; but for those it skips.

    And of bitsandbytes' `linears`, (out, in) by name, if they are given; `quant_state` is a text of any length.
    """
    if isinstance(quantization_config, dict):
        quantization_config = BitsAndBytesConfig.from_dict(quantization_config)
    nested, skipped = quantization_config.bnb_4bit_use_double_quant, quantization_config.llm_int8_skip_modules or ()
    tensors: Layout = {}
    for layer in range(config.num_hidden_layers):
        experts = f"model.layers.{layer}.block_sparse_moe.experts"
        if not is_skipped(experts, skipped):
            layout = _packing(quantization_config).layout(config, quantization_config)
            tensors |= {f"{experts}.{key}": value for key, value in layout.items()}
    for name, shape in (linears or {}).items():
        if is_skipped(name, skipped):
            continue
        if quantization_config.load_in_8bit:
            tensors |= {f"{name}.weight": (shape, torch.int8), f"{name}.SCB": (shape[:1], torch.float32)}
            continue
        blocks = math.ceil(math.prod(shape) / BLOCK)
        parts: Layout = {"": ((math.prod(shape) // 2, 1), torch.uint8), ".quant_map": ((16,), torch.float32)}
        parts[".absmax"] = ((blocks,), torch.uint8 if nested else torch.float32)
        parts[f".quant_state.bitsandbytes__{quantization_config.bnb_4bit_quant_type}"] = ((), torch.uint8)
        if nested:
            parts[".nested_absmax"] = ((math.ceil(blocks / NESTED_BLOCK),), torch.float32)
            parts[".nested_quant_map"] = ((256,), torch.float32)
        tensors |= {f"{name}.weight{part}": value for part, value in parts.items()}
    return tensors


def is_skipped(name: str, skip_modules: Iterable[str]) -> bool:
    """
    Whether an entry of `llm_int8_skip_modules` names a module, or one that it is in.

    Transformers compares a module's own name alone, so that "block_sparse_moe" keeps none of its experts.

    Args:
        name: as in a model with a head ("model.layers.0.block_sparse_moe.experts").
        skip_modules: beginnings, ends or regular expressions of names; also as a model without a head has them.
    """
    return any(
        name.endswith(entry)
        or f".{entry}." in f".{name}."
        # A beginning ends where a name does: layers.1 is not layers.11.
        or re.match(rf"(?:model\.)?(?:{entry})(?:(?<=\.)|(?=\.|$))", name)
        for entry in skip_modules
    )


def _full_names(model: nn.Module) -> dict[str, str]:
    """By its name, that of each module in a model with a head."""
    base = getattr(model, "base_model_prefix", None)
    prefix = f"{base}." if base and not hasattr(model, base) else ""
    return {name: prefix + name for name, _ in model.named_modules() if name}


def check_skip_modules(model: nn.Module, skip_modules: Iterable[str]) -> None:
    """Raise ValueError for an entry of `llm_int8_skip_modules` that names no module: it would skip nothing."""
    # A model without a head may be asked as one with it.
    names = {"lm_head", "score", *_full_names(model).values()}
    for entry in skip_modules:
        try:
            found = entry and any(is_skipped(name, [entry]) for name in names)
        except re.error:
            found = False
        if not found:
            raise ValueError(
                f"llm_int8_skip_modules has {entry!r}, which names no module of the model. Give the end of a name (experts, "
                "block_sparse_moe, q_proj), a whole one (model.layers.0.self_attn) or a regular expression "
                r"(model\.layers\.[01]); the experts of a layer are one module, whose weights are skipped together"
            )


def _has_packed_forms(module: nn.Module) -> bool:
    return hasattr(type(module), "packed_forms")


def replace_experts(
    model: nn.Module, quantization_config: BitsAndBytesConfig, skip: Sequence[str] | None = None, packed: bool = False
) -> None:
    """
    Exchange all dense experts of a model for packed ones, in place. Nothing is quantised yet.

    Args:
        skip: beginnings or ends of the names of modules that stay as they are.
        packed: as in [`PackedExperts`]; if not, the dense Parameters are kept until they are packed.
    """
    for name, module in list(model.named_modules()):
        form = _packed_form(module, quantization_config)
        if form is None or not should_convert_module(name, skip):
            continue
        with torch.device("meta"):
            quantized = form(module.config, quantization_config, packed)
        if not packed:
            quantized.install({key: getattr(module, key).requires_grad_(False) for key in FUSED})
        model.set_submodule(name, quantized.train(module.training))


class QuantizeExperts(ConversionOps):
    """The quantising step of Transformers' loader: a complete weight in, what is stored of it out."""

    def __init__(self, linears: ConversionOps):
        self.linears = linears  # the library's own step, for everything else

    @torch.no_grad()
    def convert(self, input_dict, *args, model: nn.Module, **kwargs):
        others: dict[str, Any] = {}
        result: dict[str, Any] = {}
        for key, weight in input_dict.items():
            module, name = get_module_from_name(model, key)
            if not isinstance(module, PackedExperts):
                others[key] = weight
                continue
            weight = weight[0] if isinstance(weight, list) else weight
            prefix = key.removesuffix(name)
            result |= {prefix + part: tensor for part, tensor in module.pack(name, weight).items()}
        return result | self.linears.convert(others, *args, model=model, **kwargs) if others else result


class _ExpertsToo(HfQuantizer):
    """What the two quantizers below have beyond the library's: the experts. Other models they treat as the library does."""

    def validate_environment(self, *args, **kwargs):
        check_quantization_config(self.quantization_config)
        super().validate_environment(*args, **kwargs)

    def _process_model_before_weight_loading(self, model, *args, **kwargs):
        if any(_has_packed_forms(module) for module in model.modules()):
            if not self.pre_quantized:
                check_skip_modules(model, self.quantization_config.llm_int8_skip_modules or ())
            if self.quantization_config.llm_int8_enable_fp32_cpu_offload and isinstance(kwargs.get("device_map"), dict):
                self._skip_offloaded(model, kwargs["device_map"])
        super()._process_model_before_weight_loading(model, *args, **kwargs)
        for module in model.modules():
            # In evaluation on CPUs with AVX512-BF16, bitsandbytes' Linear4bit repacks itself for a kernel that rounds to
            # bfloat16, gives no gradients from then on, and fails for sizes that are no multiple of 64. This turns it off.
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
                module.register_load_state_dict_pre_hook(_take_4bit_linear)
        replace_experts(model, self.quantization_config, self.modules_to_not_convert, packed=self.pre_quantized)

    def _skip_offloaded(self, model, device_map: dict[str, Any]) -> None:
        """Write down what the library keeps in full precision, so that a saved config says what its checkpoint holds."""
        names, skip_modules = _full_names(model), self.quantization_config.llm_int8_skip_modules or []
        kept = [names.get(name, name) for name, place in device_map.items() if str(place) in ("cpu", "disk")]
        if len(kept) == len(device_map) or (self.pre_quantized and not set(kept) <= set(skip_modules)):
            raise ValueError(
                "llm_int8_enable_fp32_cpu_offload=True keeps what device_map places on the CPU or the disk in full "
                "precision: here the whole model, or what the checkpoint has quantised; set it to False"
            )
        self.quantization_config = copy.copy(self.quantization_config)
        self.quantization_config.llm_int8_skip_modules = list(dict.fromkeys([*skip_modules, *kept]))

    @staticmethod
    def get_modules_to_not_convert(model, skip_modules=None, keep_in_fp32_modules=None, add_default_skips=False):
        if any(_has_packed_forms(module) for module in model.modules()):
            # The library forgets the head (lm_head) where the user names other modules to skip.
            add_default_skips = True
            skipped = [name for name, full in _full_names(model).items() if is_skipped(full, skip_modules or ())]
            skip_modules = [f"{re.escape(name)}$" for name in skipped]  # exactly these
        return HfQuantizer.get_modules_to_not_convert(model, skip_modules, keep_in_fp32_modules, add_default_skips)

    def param_needs_quantization(self, model, param_name: str, **kwargs) -> bool:
        module, name = get_module_from_name(model, param_name)
        if isinstance(module, PackedExperts):
            return name in FUSED
        return super().param_needs_quantization(model, param_name, **kwargs)

    def _process_model_after_weight_loading(self, model, **kwargs):
        for module in model.modules():
            if isinstance(module, PackedExperts):
                module.pack_all()  # dense still where the checkpoint had none and the caller took the model as it is
        return super()._process_model_after_weight_loading(model, **kwargs)

    def param_element_size(self, model, param_name: str, param: torch.Tensor) -> float:
        module, _ = get_module_from_name(model, param_name)
        if isinstance(module, PackedExperts) and self.pre_quantized:
            return param.element_size()  # it has its packed shape
        return super().param_element_size(model, param_name, param)

    def get_quantize_ops(self):
        return QuantizeExperts(super().get_quantize_ops())

    def _dequantize(self, model, dtype=None):
        if isinstance(dtype, str):
            dtype = getattr(torch, dtype)  # saving leaves a string in the config, and the library passes it on
        dtype = dtype or model.dtype
        for name, module in list(model.named_modules()):
            if isinstance(module, PackedExperts):
                model.set_submodule(name, module.dense(dtype))
        linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        model.is_loaded_in_4bit = model.is_loaded_in_8bit = False
        bitsandbytes = import_bitsandbytes().nn
        if any(isinstance(m, (bitsandbytes.Linear4bit, bitsandbytes.Linear8bitLt)) for m in model.modules()):
            model = super()._dequantize(model, dtype=dtype)  # which fails without any
        for name, module in model.named_modules():
            if name in linears and module.bias is not None:
                # bitsandbytes' linears leave it in the dtype that they last computed in.
                module.bias.data = module.bias.data.to(module.weight.dtype)
        return model


class GrinMoeBnb4BitHfQuantizer(_ExpertsToo, Bnb4BitHfQuantizer):
    """Transformers' 4-bit quantizer, which knows the experts as well."""

    def _process_model_before_weight_loading(self, model, *args, **kwargs):
        super()._process_model_before_weight_loading(model, *args, **kwargs)
        if not any(_has_packed_forms(module) for module in model.modules()):
            return
        for name, _ in model.named_parameters():
            module, _ = get_module_from_name(model, name)
            if isinstance(module, nn.Linear) and self.param_needs_quantization(model, name):
                check_block(name, module.in_features)


class GrinMoeBnb8BitHfQuantizer(_ExpertsToo, Bnb8BitHfQuantizer):
    """Transformers' 8-bit quantizer, which knows the experts as well."""


QUANTIZERS = {"bitsandbytes_4bit": GrinMoeBnb4BitHfQuantizer, "bitsandbytes_8bit": GrinMoeBnb8BitHfQuantizer}


def parameters_beyond_bytes(model: nn.Module) -> int:
    """How many weights of 4-bit experts are not counted by the bytes that they are packed in."""
    modules = [module for module in model.modules() if isinstance(module, Packed4bitExperts)]
    return sum(math.prod(dense_shape(m.config, name)) - getattr(m, name).numel() for m in modules for name in FUSED)


@contextlib.contextmanager
def experts_are_quantized() -> Iterator[None]:
    """
    While it lasts, `from_pretrained` finds the quantizers of this file under the library's names for its own.

    The library has no way to give a model its own quantizer for a method that exists (`register_quantizer` refuses the
    name), so its table is changed for the length of a load. A load of another model in another thread meanwhile gets the
    same: for a model without these experts they do what the library's do.
    """
    library = {name: AUTO_QUANTIZER_MAPPING[name] for name in QUANTIZERS}
    AUTO_QUANTIZER_MAPPING.update(QUANTIZERS)
    try:
        yield
    finally:
        AUTO_QUANTIZER_MAPPING.update(library)


def quantize_model(model: PreTrainedModel, quantization_config: BitsAndBytesConfig) -> PreTrainedModel:
    """
    Quantise a model that is already there, in place: its linears and its experts, as `from_pretrained` would have. The
    same model is returned, and can be saved and dequantised like one that was loaded so.

    Args:
        model: a GRIN-MoE in full precision, on the device it shall stay on.
        quantization_config: as for `from_pretrained`.

    Raises:
        ImportError: bitsandbytes is not installed.
        ValueError: the model is quantised already, carries adapters or has sizes that blocks do not fit, or a wrong
            `quantization_config`. The model is then as it was.
    """
    if not isinstance(quantization_config, BitsAndBytesConfig):
        raise ValueError(f"quantization_config={quantization_config!r}; give a transformers.BitsAndBytesConfig")
    if not isinstance(model, PreTrainedModel) or getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            f"{type(model).__name__} has adapters, or is no model of Transformers; quantise it before adapters are added"
        )
    if getattr(model, "hf_quantizer", None) is not None:
        raise ValueError("the model is quantised already; load it in full precision, or dequantise it first")
    method = "bitsandbytes_8bit" if quantization_config.load_in_8bit else "bitsandbytes_4bit"
    quantizer = QUANTIZERS[method](quantization_config, pre_quantized=False)
    quantizer.validate_environment(device_map=None)
    with torch.device("meta"):
        # What would be refused halfway is refused on a model without memory.
        rehearsal = type(model)(copy.deepcopy(model.config))
        QUANTIZERS[method](quantization_config, pre_quantized=False).preprocess_model(rehearsal, device_map=None)
    dense = dict(model.named_parameters())
    quantizer.preprocess_model(model, device_map=None)
    model.train(model.training)  # the new linears too: the 8-bit ones compute otherwise in training
    quantize = quantizer.get_quantize_ops()
    for name, _ in list(model.named_parameters()):
        weight = dense.pop(name)
        tensors = {name: weight}
        if quantizer.param_needs_quantization(model, name):
            tensors = quantize.convert({name: weight.detach()}, model=model, full_layer_name=name)
        for key, tensor in tensors.items():
            setattr(*get_module_from_name(model, key), tensor)
    model.hf_quantizer = quantizer
    quantizer.postprocess_model(model)
    return model
