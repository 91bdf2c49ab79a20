"""Quantised models of random weights, made without ever holding them in full precision: for measurements at full size.

    model = random_quantized_model(GrinMoeConfig(), BitsAndBytesConfig(load_in_4bit=True, ...), device="cuda")

The weights are drawn where the loader of Transformers would read them from a file, so this takes the way, and the memory,
of `from_pretrained` on a checkpoint.
"""

from __future__ import annotations

import torch
from transformers import BitsAndBytesConfig

from ..checkpoint_grinmoe import official_shapes
from ..configuration_grinmoe import GrinMoeConfig
from ..modeling_grinmoe import GrinMoeForCausalLM


class RandomWeight:
    """A tensor of a checkpoint that is drawn when it is read, as the loader reads the slices of safetensors.

    Matrices are normal with standard deviation `std`, the norms' weights 1, biases 0.
    """

    def __init__(
        self, key: str, shape: tuple[int, ...], std: float, seed: int, device: torch.device, dtype: torch.dtype
    ):
        self.key, self.shape, self.std, self.seed, self.device, self.dtype = key, shape, std, seed, device, dtype

    def __getitem__(self, index: object) -> torch.Tensor:
        if index is not Ellipsis:
            raise ValueError(f"{self.key} is drawn whole; index it with [...], not [{index!r}]")
        weight = torch.zeros(self.shape, device=self.device, dtype=self.dtype)
        if len(self.shape) == 1:
            return weight.fill_(1.0) if self.key.endswith("norm.weight") else weight
        return weight.normal_(0.0, self.std, generator=torch.Generator(self.device).manual_seed(self.seed))


def random_quantized_model(
    config: GrinMoeConfig,
    quantization_config: BitsAndBytesConfig,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> GrinMoeForCausalLM:
    """
    A model of any size with random weights, quantised layer by layer as they are drawn.

    Args:
        config: the model's; 42B parameters by default.
        quantization_config: 4 or 8 bits, as for `from_pretrained`.
        device: where it lives, and where the weights are drawn.
        dtype: of what is not quantised, and of the weights before.
        seed: int; the same weights for the same seed, device and dtype.

    Returns:
        The model in evaluation mode. Peak memory is that of the quantised model and a few times one fused weight (3.4 GB
        at most in the released size and bfloat16).

    Raises:
        ImportError: bitsandbytes is not installed.
        ValueError: a wrong `quantization_config`.
    """
    device = torch.device(device)
    weights = {
        key: RandomWeight(key, shape, config.initializer_range, seed + number, device, dtype)
        for number, (key, shape) in enumerate(official_shapes(config).items())
    }
    return GrinMoeForCausalLM.from_pretrained(
        None,
        config=config,
        state_dict=weights,
        quantization_config=quantization_config,
        dtype=dtype,
        device_map={"": device},
    )
