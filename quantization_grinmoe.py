"""4-bit and 8-bit loading of the experts as well as the linears, by Transformers' own `BitsAndBytesConfig`.

Transformers quantises nn.Linear alone, and 96 % of a GRIN-MoE's weights are not in one. Here its two bitsandbytes
quantizers learn the experts: while a checkpoint is loaded, each fused weight is packed as soon as it is complete, so that
the model never exists in full precision. `quantized_experts_grinmoe.py` has what they become; docs/quantization.md says how
far results move.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name, should_convert_module
from transformers.utils import is_bitsandbytes_available
from transformers.utils.quantization_config import QuantizationConfigMixin

from .experts_grinmoe import GrinMoeExperts
from .quantized_experts_grinmoe import (
    FUSED,
    MISSING,
    GrinMoeExperts4bit,
    GrinMoeExperts8bit,
    Layout,
    QuantizedGrinMoeExperts,
    check_block,
    dense_shape,
)


def experts_class(quantization_config: BitsAndBytesConfig) -> type[QuantizedGrinMoeExperts]:
    return GrinMoeExperts8bit if quantization_config.load_in_8bit else GrinMoeExperts4bit


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
    if quantization_config.bnb_4bit_quant_type not in ("nf4", "fp4"):
        raise ValueError(
            f"bnb_4bit_quant_type={quantization_config.bnb_4bit_quant_type!r}; choose 'nf4' (for weights), or 'fp4'"
        )
    if quantization_config.bnb_4bit_quant_storage != torch.uint8:
        raise ValueError(
            f"bnb_4bit_quant_storage={quantization_config.bnb_4bit_quant_storage}: the experts are stored as torch.uint8; "
            "leave it out"
        )


def is_bitsandbytes(quantization_config: QuantizationConfigMixin | dict[str, Any]) -> bool:
    """Whether this, from a config or its JSON, is of the method that this file knows."""
    return isinstance(quantization_config, BitsAndBytesConfig) or (
        isinstance(quantization_config, dict) and quantization_config.get("quant_method") == "bitsandbytes"
    )


def packed_layout(config, quantization_config: BitsAndBytesConfig | dict[str, Any]) -> Layout:
    """Shape and dtype, by key, of the tensors that the experts have in a quantised checkpoint; but for those it skips."""
    if isinstance(quantization_config, dict):
        quantization_config = BitsAndBytesConfig.from_dict(quantization_config)
    tensors: Layout = {}
    for layer in range(config.num_hidden_layers):
        experts = f"model.layers.{layer}.block_sparse_moe.experts"
        if should_convert_module(experts, quantization_config.llm_int8_skip_modules):
            layout = experts_class(quantization_config).layout(config, quantization_config)
            tensors |= {f"{experts}.{key}": value for key, value in layout.items()}
    return tensors


def replace_experts(
    model: nn.Module,
    quantization_config: BitsAndBytesConfig,
    skip_modules: Sequence[str] | None = None,
    packed: bool = False,
) -> None:
    """
    Exchange all `GrinMoeExperts` of a model for quantised ones, in place. Nothing is quantised yet.

    Args:
        skip_modules: beginnings or ends of the names of modules that stay as they are.
        packed: as in [`QuantizedGrinMoeExperts`]; if not, the dense Parameters are kept until they are packed.
    """
    for name, module in list(model.named_modules()):
        if type(module) is not GrinMoeExperts or not should_convert_module(name, skip_modules):
            continue
        with torch.device("meta"):
            quantized = experts_class(quantization_config)(module.config, quantization_config, packed)
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
            if not isinstance(module, QuantizedGrinMoeExperts):
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
        super()._process_model_before_weight_loading(model, *args, **kwargs)
        for module in model.modules():
            # In evaluation on CPUs with AVX512-BF16, bitsandbytes' Linear4bit repacks itself for a kernel that rounds to
            # bfloat16, gives no gradients from then on, and fails for sizes that are no multiple of 64. This turns it off.
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
        replace_experts(model, self.quantization_config, self.modules_to_not_convert, packed=self.pre_quantized)

    @staticmethod
    def get_modules_to_not_convert(model, skip_modules=None, keep_in_fp32_modules=None, add_default_skips=False):
        # The library forgets the head (lm_head) where the user names other modules to skip.
        add_default_skips = add_default_skips or any(type(module) is GrinMoeExperts for module in model.modules())
        return HfQuantizer.get_modules_to_not_convert(model, skip_modules, keep_in_fp32_modules, add_default_skips)

    def param_needs_quantization(self, model, param_name: str, **kwargs) -> bool:
        module, name = get_module_from_name(model, param_name)
        if isinstance(module, QuantizedGrinMoeExperts):
            return name in FUSED
        return super().param_needs_quantization(model, param_name, **kwargs)

    def _process_model_after_weight_loading(self, model, **kwargs):
        for module in model.modules():
            if isinstance(module, QuantizedGrinMoeExperts):
                # Dense still where the checkpoint had none and the caller took the model as it is.
                module.pack_all()
        return super()._process_model_after_weight_loading(model, **kwargs)

    def param_element_size(self, model, param_name: str, param: torch.Tensor) -> float:
        module, _ = get_module_from_name(model, param_name)
        if isinstance(module, QuantizedGrinMoeExperts) and self.pre_quantized:
            return param.element_size()  # it has its packed shape
        return super().param_element_size(model, param_name, param)

    def get_quantize_ops(self):
        return QuantizeExperts(super().get_quantize_ops())

    def _dequantize(self, model, dtype=None):
        if isinstance(dtype, str):
            dtype = getattr(torch, dtype)  # saving leaves a string in the config, and the library passes it on
        dtype = dtype or model.dtype
        for name, module in list(model.named_modules()):
            if isinstance(module, QuantizedGrinMoeExperts):
                model.set_submodule(name, module.dense(dtype))
        linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        model.is_loaded_in_4bit = model.is_loaded_in_8bit = False
        model = super()._dequantize(model, dtype=dtype)
        for name, module in model.named_modules():
            if name in linears and module.bias is not None:
                # bitsandbytes' linears leave it in the dtype that they last computed in.
                module.bias.data = module.bias.data.to(module.weight.dtype)
        return model


class GrinMoeBnb4BitHfQuantizer(_ExpertsToo, Bnb4BitHfQuantizer):
    """Transformers' 4-bit quantizer, which knows the experts as well."""

    def _process_model_before_weight_loading(self, model, *args, **kwargs):
        super()._process_model_before_weight_loading(model, *args, **kwargs)
        if not any(isinstance(module, GrinMoeExperts) for module in model.modules()):
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
    modules = [module for module in model.modules() if isinstance(module, GrinMoeExperts4bit)]
    return sum(
        math.prod(dense_shape(module.config, name)) - getattr(module, name).numel()
        for module in modules
        for name in FUSED
    )


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
    Quantise a model that is already there, in place: its linears and its experts, as `from_pretrained` would have.

    Args:
        model: a GRIN-MoE in full precision, on the device it shall stay on.
        quantization_config: as for `from_pretrained`.

    Returns:
        The same model. It can be saved and dequantised like one that was loaded so.

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
            module, key = get_module_from_name(model, key)
            setattr(module, key, tensor)
    model.hf_quantizer = quantizer
    quantizer.postprocess_model(model)
    return model


__all__ = [
    "experts_are_quantized",
    "is_bitsandbytes",
    "packed_layout",
    "quantize_model",
    "replace_experts",
]
