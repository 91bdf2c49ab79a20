"""LoRA for fused experts in PEFT's format, and merging it into the weights."""

from .expert_lora import ExpertLora, GrinMoeLoraConfig
from .lora import AdapterError, base_of, check_adapter, load_adapter, lora_config, use_expert_lora
from .merge import merge_adapter, run_merge
from .options import MergeOptions
from .presets import QUANTIZATIONS, quantization_config
