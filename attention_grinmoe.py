"""Attention of GRIN-MoE: RoPE and LongRoPE, and grouped-query attention with biases and a sliding window.

Shapes: B batch, S sequence, H hidden size.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import is_flash_attention_requested

from .configuration_grinmoe import GrinMoeConfig

# What the installed Transformers calls a cache, as an argument and in outputs: `cache` since 5.24. Before, that name was
# for the paged cache of continuous batching, which goes straight to the attention function.
CACHE = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"


def take_cache(past_key_values: Cache | None, kwargs: dict[str, Any]) -> Cache | None:
    """The cache of a call that may have it by either name; takes the newer one out of `kwargs`."""
    cache = kwargs.pop(CACHE, None)
    if cache is not None and past_key_values is not None:
        raise ValueError("cache and past_key_values are two names of one argument; give one of them")
    return past_key_values if cache is None else cache


def packed_samples(
    config: GrinMoeConfig,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor,
    use_cache: bool | None,
    has_borders: bool,
) -> tuple[torch.Tensor, dict[str, torch.Tensor | int]] | None:
    """How to keep packed samples apart, or None where there are none or the library sees to it.

    The library finds packed samples by their positions, but only without a mask and without a cache, and for flash
    attention only in a batch of one row; anywhere else it lets samples see their predecessors without a word. So where
    positions begin again at 0 behind a token, the mask is built of positions alone, in which each token of padding is
    a sample of its own, and flash attention is told the borders.

    Args:
        config: of the model.
        attention_mask: (B, S) or prepared, or None.
        position_ids: (B, S).
        use_cache: whether a cache was asked for.
        has_borders: the caller has given flash attention's `cu_seq_lens`.

    Returns:
        (B, S) positions to build the mask from, and flash attention's arguments.
    """
    needs_borders = is_flash_attention_requested(config) and not has_borders
    if attention_mask is None:
        if not (needs_borders or use_cache):
            return None
        valid = torch.ones_like(position_ids, dtype=torch.bool)
    elif attention_mask.dim() == 2:
        valid = attention_mask.bool()
    else:
        return None
    if torch.compiler.is_compiling():  # nothing may depend on the values
        if needs_borders or use_cache:
            return None
    elif not ((position_ids[:, 1:] == 0) & valid[:, 1:] & valid[:, :-1]).any():
        return None
    mask_positions = torch.where(valid, position_ids, -2)  # no step of 1 leads to or from -2
    if not needs_borders:
        return mask_positions, {}
    begins = torch.diff(mask_positions, prepend=mask_positions[:, :1] - 2) != 1
    borders = nn.functional.pad(begins.flatten().nonzero().flatten(), (0, 1), value=begins.numel()).to(torch.int32)
    longest = int(borders.diff().max())
    return mask_positions, {
        "cu_seq_lens_q": borders,
        "cu_seq_lens_k": borders,
        "max_length_q": longest,
        "max_length_k": longest,
    }


class GrinMoeRotaryEmbedding(nn.Module):
    """Cosines and sines of RoPE; LongRoPE switches all positions of a batch at once.

    LongRoPE (Phi-3.5-MoE): the length of the longest row decides for every position of the batch, and the reference
    decides twice. The long factors hold from `original_max_position_embeddings` tokens on, `long_mscale` only above it;
    at exactly that length the long factors go with `short_mscale`.
    """

    def __init__(self, config: GrinMoeConfig):
        super().__init__()
        self.config = config
        self.rope_type = config.rope_parameters["rope_type"]
        # Read by dynamic_rope_update.
        self.max_seq_len_cached = self.original_max_seq_len = config.max_position_embeddings
        inv_freq, self.attention_scaling = self.rope_init(config)
        # _init_weights refills these by name after a load through the meta device.
        self.inv_freq = nn.Buffer(inv_freq, persistent=False)
        self.original_inv_freq = nn.Buffer(inv_freq.clone(), persistent=False)
        if self.rope_type == "longrope":
            self.original_length = config.rope_parameters["original_max_position_embeddings"]
            self.long_inv_freq = nn.Buffer(self.long_rope_init(config), persistent=False)
            self.short_mscale = config.rope_parameters.get("short_mscale") or self.attention_scaling
            self.long_mscale = config.rope_parameters.get("long_mscale") or self.attention_scaling

    def _apply(self, fn, recurse: bool = True):
        # Moved with the model, but kept in float32: after model.to(bfloat16) the frequencies would be off by up to 0.4 %,
        # whole turns at late positions, where loading in bfloat16 keeps them.
        exact = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, buffer in exact.items():
            moved = getattr(self, name)
            if moved.dtype != buffer.dtype:
                setattr(self, name, nn.Buffer(buffer.to(moved.device), persistent=False))
        return self

    @property
    def rope_init(self) -> Callable:
        return (
            self.compute_default_rope_parameters if self.rope_type == "default" else ROPE_INIT_FUNCTIONS[self.rope_type]
        )

    @staticmethod
    def compute_default_rope_parameters(config: GrinMoeConfig, *args, **kwargs) -> tuple[torch.Tensor, float]:
        """Inverse frequencies (head / 2,) and the scale of cos and sin (1) of plain RoPE."""
        exponents = torch.arange(0, config.head_size, 2, dtype=torch.float) / config.head_size
        return 1.0 / (config.rope_parameters["rope_theta"] ** exponents), 1.0

    @staticmethod
    def long_rope_init(config: GrinMoeConfig) -> torch.Tensor:
        """Inverse frequencies (head / 2,) of LongRoPE beyond the original length."""
        beyond = config.rope_parameters["original_max_position_embeddings"] + 1
        return ROPE_INIT_FUNCTIONS["longrope"](config, None, seq_len=beyond)[0]

    def longrope_regime(self, length):
        """Whether the long factors and the long mscale hold, for a batch whose longest row has `length` tokens."""
        return length >= self.original_length, length > self.original_length

    def changes_regime(self, length: int, new_tokens: int) -> bool:
        """Whether the last `new_tokens` of `length` change the frequencies of what came before them."""
        if self.rope_type != "longrope" or length == new_tokens:
            return False
        return self.longrope_regime(length - new_tokens) != self.longrope_regime(length)

    @torch.no_grad()
    def forward(self, hidden_states: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, S) positions to cos and sin (B, S, head), in the dtype of `hidden_states`."""
        if self.rope_type == "longrope":
            # Selected with tensors, not with `if`: no host sync, and it compiles.
            long_factors, long_mscale = self.longrope_regime(position_ids.max() + 1)
            inv_freq = torch.where(long_factors, self.long_inv_freq, self.original_inv_freq)
            scale = torch.where(long_mscale, self.long_mscale, self.short_mscale)
        else:
            inv_freq, scale = self.scaled_frequencies(hidden_states, position_ids)
        with torch.autocast(device_type=hidden_states.device.type, enabled=False):
            angles = position_ids[..., None].float() * inv_freq.float()  # (B, S, head / 2)
            angles = torch.cat((angles, angles), dim=-1)
            return (angles.cos() * scale).to(hidden_states.dtype), (angles.sin() * scale).to(hidden_states.dtype)

    @dynamic_rope_update
    def scaled_frequencies(self, hidden_states: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, float]:
        return self.inv_freq, self.attention_scaling


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def apply_rotary_pos_emb(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate query and key (B, heads, S, head) by cos and sin (B, S, head)."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return query * cos + rotate_half(query) * sin, key * cos + rotate_half(key) * sin


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Readable attention. Softmax in float32; returns (B, S, heads, head) and the probabilities."""
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    probs = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    probs = nn.functional.dropout(probs, p=dropout, training=module.training)
    return (probs @ value).transpose(1, 2).contiguous(), probs


class GrinMoeAttention(nn.Module):
    """Grouped-query attention with biases, RoPE and a sliding window of `visible_keys` keys."""

    def __init__(self, config: GrinMoeConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_size
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        hidden, bias = config.hidden_size, config.attention_bias
        self.q_proj = nn.Linear(hidden, config.num_attention_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden, config.num_key_value_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden, config.num_key_value_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, hidden, bias=bias)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, S, H) to the block's output (B, S, H) and, in eager, the probabilities (B, heads, S, keys)."""
        input_shape = hidden_states.shape[:-1]
        heads_shape = (*input_shape, -1, self.head_dim)
        query = self.q_proj(hidden_states).view(heads_shape).transpose(1, 2)
        key = self.k_proj(hidden_states).view(heads_shape).transpose(1, 2)
        value = self.v_proj(hidden_states).view(heads_shape).transpose(1, 2)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if past_key_values is not None:
            # kwargs: a paged cache (continuous batching, since 5.24) puts there what its attention function reads.
            key, value = past_key_values.update(key, value, self.layer_idx, kwargs=kwargs)
        attention_interface = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, probs = attention_interface(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.config.visible_keys,
            **kwargs,
        )
        return self.o_proj(output.reshape(*input_shape, -1).contiguous()), probs


__all__ = ["GrinMoeAttention", "GrinMoeRotaryEmbedding"]
