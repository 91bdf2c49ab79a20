"""GRIN-MoE in PyTorch: attention, router, experts, sparse block, decoder and heads, in this order.

The experts here are the reference. Transformers' experts interface picks another form by `experts_implementation`, and
`import grinmoe` registers faster ones there (docs/performance.md); this file needs none of them.

Shapes: B batch, S sequence, T = B * S tokens, H hidden size, E experts, K experts per token, I expert width, L layers,
V vocabulary.
"""

from __future__ import annotations

import copy
import functools
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.integrations import use_experts_implementation
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GenericForSequenceClassification, GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, logging
from transformers.utils.generic import is_flash_attention_requested, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs, maybe_install_capturing_hooks

from .balance_grinmoe import BalanceWindow, PendingRouterLosses
from .checkpoint_grinmoe import OfficialCheckpointMixin, load_per_expert_weights, register_weight_conversion
from .configuration_grinmoe import GrinMoeConfig
from .generation_grinmoe import CACHE, GrinMoeGenerationMixin, take_cache
from .quantization_grinmoe import Packed4bitExperts, Packed8bitExperts, PackedExperts, parameters_beyond_bytes
from .routing_grinmoe import (
    ESTIMATORS,
    ROUTERS,
    FusedRouter,
    RoutingNoise,
    check_router_logits,
    mix_seed,
    route,
    routing_generator,
    routing_seed,
    scale_gradient,
    this_rank,
    within_capacity,
)

logger = logging.get_logger(__name__)

register_weight_conversion()


# Where the library notes that a model has its capturing hooks.
_HOOKED = "_output_capturing_hooks_installed"

# Samples continue where positions go up by 1. None does so to or from this one, not even from padding to padding.
_PADDING_POSITION = -2


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
    if attention_mask is None and not (needs_borders or use_cache):
        return None  # the library finds them
    if attention_mask is not None and attention_mask.dim() != 2:
        return None  # a prepared mask is taken as it is
    valid = torch.ones_like(position_ids) if attention_mask is None else attention_mask
    valid = valid.bool()
    if torch.compiler.is_compiling():  # nothing may depend on the values
        if needs_borders or use_cache:
            return None
    elif not ((position_ids[:, 1:] == 0) & valid[:, 1:] & valid[:, :-1]).any():
        return None
    mask_positions = torch.where(valid, position_ids, _PADDING_POSITION)
    return mask_positions, flash_borders(mask_positions) if needs_borders else {}


def flash_borders(mask_positions: torch.Tensor) -> dict[str, torch.Tensor | int]:
    """Flash attention's arguments for samples that begin wherever (B, S) positions do not go up by 1."""
    begins = torch.diff(mask_positions, prepend=mask_positions[:, :1] - 2) != 1
    borders = nn.functional.pad(begins.flatten().nonzero().flatten(), (0, 1), value=begins.numel()).to(torch.int32)
    longest = int(borders.diff().max())
    return {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders, "max_length_q": longest, "max_length_k": longest}


def padding_gaps(attention_mask: torch.Tensor | None, new_tokens: int, cache: Cache | None) -> torch.Tensor | None:
    """Which rows of a (B, past + S) mask have padding between tokens, (B, 1) bool; None without such a mask.

    PEFT's prompts put it before left-padded rows.

    Raises:
        ValueError: the mask has another length than cached and new tokens. The library would cut it off or hide tokens.
    """
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.dim() != 2:
        return None
    if not (isinstance(cache, Cache) and cache.is_compileable) and not torch.compiler.is_compiling():
        length = new_tokens + (cache.get_seq_length() if isinstance(cache, Cache) else 0)
        if attention_mask.shape[1] != length:
            raise ValueError(
                f"attention_mask has {attention_mask.shape[1]} columns, but there are {length} tokens, those in the cache "
                "included; give a column for each"
            )
    begins = nn.functional.pad(attention_mask.bool().int(), (1, 0)).diff() > 0
    return begins.sum(-1, keepdim=True) > 1


def _refuse_packing(attention_mask: torch.Tensor | None, position_ids: torch.Tensor) -> None:
    """Samples behind one cache, as PEFT's prefix is, would see each other."""
    begins_again = position_ids[..., 1:] <= position_ids[..., :-1]
    if begins_again.numel() == 0 or begins_again.is_meta:
        return
    if attention_mask is not None:
        if not isinstance(attention_mask, torch.Tensor) or attention_mask.dim() != 2:
            return  # a prepared mask is taken as it is
        valid = attention_mask[:, -position_ids.shape[-1] :].bool()  # padding has any position
        begins_again = begins_again & valid[:, 1:] & valid[:, :-1]
    if begins_again.any():
        raise ValueError(
            "position_ids begin again within a row (packed samples), and a cache is given, or a prefix of PEFT is one: the "
            "samples would see each other; do not pack them"
        )


class GrinMoeRotaryEmbedding(nn.Module):
    """Cosines and sines of RoPE; LongRoPE switches all positions of a batch at once.

    LongRoPE (Phi-3.5-MoE): the length of the longest row decides for every position of the batch, and the reference
    decides twice. The long factors hold from `original_max_position_embeddings` tokens on, `long_mscale` only above it;
    at exactly that length the long factors go with `short_mscale`. With `longrope_switch="above_original"` (Phi-3) both
    hold only above it.
    """

    def __init__(self, config: GrinMoeConfig):
        super().__init__()
        self.config = config
        self.rope_type = config.rope_parameters["rope_type"]
        inv_freq, self.attention_scaling = self.rope_init(config)
        # _init_weights refills these by name after a load through the meta device.
        self.inv_freq = nn.Buffer(inv_freq, persistent=False)
        self.original_inv_freq = nn.Buffer(inv_freq.clone(), persistent=False)
        self.label = "LongRoPE" if self.rope_type == "longrope" else f"{self.rope_type} RoPE"
        # From this length on frequencies are others than those of shorter texts.
        self.first_long_length = config.max_position_embeddings + 1 if self.rope_type == "dynamic" else None
        if self.rope_type == "longrope":
            self.original_length = config.rope_parameters["original_max_position_embeddings"]
            self.first_long_length = self.original_length
            self.first_long_length += config.rope_parameters["longrope_switch"] == "above_original"
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
        return length >= self.first_long_length, length > self.original_length

    def changes_regime(self, length, new_tokens: int):
        """Whether the last `new_tokens` of `length`, a number or a tensor, change the frequencies of those before them."""
        if self.first_long_length is None:
            return False
        has_past = length > new_tokens
        if self.rope_type == "dynamic":  # with every token there
            return has_past & (length >= self.first_long_length)
        regimes = zip(self.longrope_regime(length - new_tokens), self.longrope_regime(length))
        (was_long, is_long), (was_scaled, is_scaled) = regimes
        return has_past & ((was_long != is_long) | (was_scaled != is_scaled))

    @torch.no_grad()
    def forward(self, hidden_states: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, S) positions to cos and sin (B, S, head), in the dtype of `hidden_states`."""
        inv_freq, scale = self.inv_freq, self.attention_scaling
        # Selected with tensors, not with `if`: no host sync, and it compiles.
        if self.rope_type == "longrope":
            long_factors, long_mscale = self.longrope_regime(position_ids.max() + 1)
            inv_freq = torch.where(long_factors, self.long_inv_freq, self.original_inv_freq)
            scale = torch.where(long_mscale, self.long_mscale, self.short_mscale)
        elif self.rope_type == "dynamic":
            # Transformers' dynamic_rope_update remembers the longest batch so far: there logits depend on earlier calls.
            length = position_ids.max() + 1
            stretched, _ = self.rope_init(self.config, position_ids.device, seq_len=length)
            inv_freq = torch.where(length > self.config.max_position_embeddings, stretched, self.original_inv_freq)
        with torch.autocast(device_type=hidden_states.device.type, enabled=False):
            angles = position_ids[..., None].float() * inv_freq.float()  # (B, S, head / 2)
            angles = torch.cat((angles, angles), dim=-1)
            return (angles.cos() * scale).to(hidden_states.dtype), (angles.sin() * scale).to(hidden_states.dtype)


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


class _Recorded(nn.Module):
    """A module whose outputs the library records, by a hook that does not pickle; [`GrinMoeModel`] installs it again."""

    def __getstate__(self) -> dict[str, Any]:
        library = maybe_install_capturing_hooks.__module__
        hooks = {key: hook for key, hook in self._forward_hooks.items() if hook.__module__ != library}
        return {**self.__dict__, "_forward_hooks": OrderedDict(hooks)}

    def __deepcopy__(self, memo: dict[int, Any]):
        # A copied layer keeps its hook: it may become a further layer of the same model.
        copied = memo[id(self)] = type(self).__new__(type(self))
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied


def trains_tokens(module: nn.Module) -> bool:
    """Whether PEFT's trainable tokens wrap this layer."""
    return hasattr(module, "token_adapter") or hasattr(module, "trainable_tokens_delta")


def refuse_trained_tokens(*layers: nn.Module) -> None:
    """PEFT's trainable tokens compute a linear layer without its bias."""
    if any(type(layer) is not nn.Linear and trains_tokens(layer) for layer in layers):
        raise ValueError(
            "trainable tokens of PEFT on a linear layer with a bias, which they would drop: name embed_tokens, or train the "
            "whole layer (modules_to_save=['lm_head'])"
        )


class GrinMoeAttention(_Recorded):
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
        if self.config.attention_bias:
            refuse_trained_tokens(self.q_proj, self.k_proj, self.v_proj, self.o_proj)
        input_shape = hidden_states.shape[:-1]
        heads_shape = (*input_shape, -1, self.head_dim)
        query, key, value = (x.view(heads_shape).transpose(1, 2) for x in self.project(hidden_states))
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

    def project(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(B, S, H) to queries (B, S, heads * head), keys and values (B, S, kv_heads * head)."""
        return self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)


def fused_router(config: GrinMoeConfig) -> FusedRouter | None:
    """The router that belongs to the experts implementation in use, or None for the reference."""
    return ROUTERS.get(config._experts_implementation)


class GrinMoeRouter(_Recorded):
    """The gate: (T, H) to router logits, routing weights and selected experts.

    Not an nn.Linear: tools that adapt or quantise every linear layer expect one tensor from it.
    """

    def __init__(self, config: GrinMoeConfig, layer_idx: int | None = None):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.num_experts = config.num_local_experts  # read by the library's expert parallelism
        self.top_k = config.num_experts_per_tok
        self.jitter_eps = config.router_jitter_noise
        self.estimator = config.router_estimator
        self.capacity_factor = config.router_capacity_factor
        self.weight = nn.Parameter(torch.empty(self.num_experts, config.hidden_size))

    def forward(
        self,
        hidden_states: torch.Tensor,
        noise: RoutingNoise | None = None,
        generator: torch.Generator | None = None,
        routing_seed: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """
        Draws in training are `noise`, or come from `generator`, or from torch's default one. A fused router, which goes with
        some experts implementations, draws them from `routing_seed` by counting (`grinmoe.kernels`).

        Returns:
            router_logits (T, E); routing_weights (T, K), 0 for a choice beyond an expert's capacity; selected_experts
            (T, K), what was chosen, dropped or not; the scale of the experts' own gradient (T, K), or None; and the
            selected experts once more, to be recorded.
        """
        router_logits = nn.functional.linear(hidden_states, self.weight)  # (T, E)
        options = (router_logits, self.top_k, self.jitter_eps, self.training)
        fused = fused_router(self.config)
        if fused is not None and ESTIMATORS[self.estimator].kernel:
            check_router_logits(router_logits, self.top_k, self.layer_idx)
            routing = fused.route(*options, self.estimator, noise, routing_seed, self.layer_idx or 0)
        else:
            routing = route(*options, noise, self.estimator, generator=generator, layer=self.layer_idx)
        routing_weights, selected_experts, expert_gradient_scale = routing
        if self.training and self.capacity_factor is not None:
            fits = within_capacity(selected_experts, self.num_experts, self.capacity_factor)
            routing_weights = routing_weights.masked_fill(~fits, 0.0)
        # Expert parallelism of Transformers before 5.24 rewrites the third output to experts of this rank, and leaves
        # what follows alone.
        return router_logits, routing_weights, selected_experts, expert_gradient_scale, selected_experts


# They do not call `_apply_gate`.
_WITHOUT_DROPOUT = ("sonicmoe", "deepgemm_megamoe")


@use_experts_implementation
class GrinMoeExperts(nn.Module):
    """E SwiGLU experts. Every token is served by all of its K experts: nothing is dropped."""

    packed_forms: tuple[type[PackedExperts], ...]  # what takes their place in 4 or 8 bits

    def __init__(self, config):
        super().__init__()
        self.num_experts = config.num_local_experts
        self.hidden_dim = config.hidden_size
        self.intermediate_dim = config.intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * self.intermediate_dim, self.hidden_dim))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, self.hidden_dim, self.intermediate_dim))
        self.act_fn = ACT2FN[config.hidden_act]
        self.dropout = config.expert_dropout
        self.dropout_generator: torch.Generator | None = None
        self.register_load_state_dict_pre_hook(load_per_expert_weights)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """
        Reference loop: sort by expert, one SwiGLU per expert, weight, sum. This is `experts_implementation="eager"`.

        The loop needs the group sizes on the host, so it does not compile.

        Args:
            hidden_states: (T, H).
            top_k_index: (T, K) expert of each choice. Under expert parallelism, E marks one that lives elsewhere.
            top_k_weights: (T, K) weight of each choice.

        Returns:
            (T, H), in the dtype of `hidden_states`.
        """
        if torch.compiler.is_compiling():
            raise RuntimeError(
                "experts_implementation='eager' loops over group sizes on the host and cannot be compiled; use "
                "model.set_experts_implementation('grouped_mm')"
            )
        return self.loop(hidden_states, top_k_index, top_k_weights)

    def loop(self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        """The reference loop itself, which `experts_implementation` does not exchange. Contract of `forward`."""
        top_k = top_k_index.shape[-1]
        order, group_sizes = group_by_expert(top_k_index, self.num_experts)
        served_elsewhere = order.numel() - sum(group_sizes)
        *groups, elsewhere = hidden_states[order // top_k].split([*group_sizes, served_elsewhere])
        outputs = [
            down(self._apply_gate(gate_up(group)))
            for group, gate_up, down in zip(groups, self.linears("gate_up_proj"), self.linears("down_proj"))
        ]
        outputs.append(torch.zeros_like(elsewhere))
        weighted = torch.cat(outputs) * top_k_weights.reshape(-1)[order].unsqueeze(-1)  # (T * K, H)
        per_choice = weighted[order.argsort()].view(-1, top_k, self.hidden_dim)
        return per_choice.sum(dim=1).to(hidden_states.dtype)

    def linears(self, name: str) -> list[Callable[[torch.Tensor], torch.Tensor]]:
        """For each expert, the product with its part of a fused weight: (n, in) to (n, out).

        The loops read the weights here and nowhere else, so that they may be kept in another form. They are unbound once
        instead of indexed per expert: the backward of `W[e]` fills a zero tensor as large as all experts for each of them.

        Args:
            name: "gate_up_proj" (H to 2I) or "down_proj" (I to H).
        """
        return [functools.partial(nn.functional.linear, weight=weight) for weight in getattr(self, name).unbind(0)]

    def seed_dropout(self, routing_seed: int, layer_idx: int, device: torch.device) -> None:
        """Draw the next forward's dropout from a generator of its own, not from torch's default one.

        Under expert parallelism every rank drops other activations and another number of them; from the default
        generator, what the ranks draw after that would differ too.

        Raises:
            ValueError: the experts implementation has no place for dropout.
        """
        if self.dropout == 0:
            return
        implementation = self.config._experts_implementation
        if implementation in _WITHOUT_DROPOUT:
            raise ValueError(
                f"expert_dropout={self.dropout} with experts_implementation={implementation!r}, which computes the "
                "activation inside of its kernel and would drop nothing; choose 'grouped_mm', or expert_dropout=0"
            )
        self.dropout_generator = routing_generator(mix_seed(routing_seed, 1 + this_rank()), layer_idx, device)

    def keep_mask(self, activation: torch.Tensor) -> torch.Tensor:
        """What dropout multiplies activations of this shape with: 0, or 1 / (1 - p)."""
        keep = torch.empty_like(activation).bernoulli_(1 - self.dropout, generator=self.dropout_generator)
        return keep.div_(1 - self.dropout)

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        """(n, 2I) to (n, I): SwiGLU, and dropout. The library's experts functions call it by this name."""
        gate, up = gate_up.chunk(2, dim=-1)
        activation = self.act_fn(gate) * up
        # Quantisers borrow this method for modules of their own, which have an act_fn and no dropout.
        drops = isinstance(self, GrinMoeExperts) and self.training and self.dropout > 0
        return activation * self.keep_mask(activation) if drops else activation


def library_experts(config: GrinMoeConfig) -> str:
    """The implementation that runs without the package: Transformers' `grouped_mm`, which needs rows of whole 16 bytes."""
    return "eager" if config.hidden_size % 8 or config.intermediate_size % 8 else "grouped_mm"


class GrinMoeExperts4bit(Packed4bitExperts, GrinMoeExperts):
    """The experts with 4-bit weights."""


class GrinMoeExperts8bit(Packed8bitExperts, GrinMoeExperts):
    """The experts with 8-bit weights."""


GrinMoeExperts.packed_forms = (GrinMoeExperts4bit, GrinMoeExperts8bit)
PackedExperts.dense_form = GrinMoeExperts


def group_by_expert(top_k_index: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, list[int]]:
    """
    Sort the choices of all tokens by expert.

    Args:
        top_k_index: (T, K). Under expert parallelism, `num_experts` marks an expert that lives elsewhere.
        num_experts: E.

    Returns:
        order (T * K,): positions in the flattened `top_k_index`, those of expert 0 first, those served elsewhere last;
        and how many there are of each of the E experts, on the host.
    """
    sorted_experts, order = top_k_index.reshape(-1).sort(stable=True)
    return order, torch.bincount(sorted_experts, minlength=num_experts)[:num_experts].tolist()


class GrinMoeSparseMoeBlock(nn.Module):
    """Route every token to K experts and sum their weighted outputs.

    No token is dropped, unless the config sets `router_capacity_factor` to compare with recipes that do.
    """

    def __init__(self, config: GrinMoeConfig, layer_idx: int | None = None):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.input_jitter_noise = config.input_jitter_noise
        self.expert_dropout = config.expert_dropout
        self.gate = GrinMoeRouter(config, layer_idx)
        self.experts = GrinMoeExperts(config)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "experts":
            PackedExperts.check_wrapper(value)
        super().__setattr__(name, value)

    def forward(
        self, hidden_states: torch.Tensor, noise: RoutingNoise | None = None, routing_seed: int | None = None
    ) -> torch.Tensor:
        """(B, S, H) to (B, S, H).

        In training `noise` replays recorded draws; else they come from this layer's stream of `routing_seed`, or from
        torch's default generator where there is none.
        """
        shape = hidden_states.shape
        hidden_states = hidden_states.reshape(-1, shape[-1])  # (T, H)
        generator = None
        if self.training:
            if routing_seed is not None:
                generator = routing_generator(routing_seed, self.layer_idx, hidden_states.device)
                if self.expert_dropout > 0:
                    for experts in self._own_experts():
                        experts.seed_dropout(routing_seed, self.layer_idx, hidden_states.device)
            hidden_states = self._jittered(hidden_states, noise, generator, routing_seed)
        _, routing_weights, selected_experts, expert_gradient_scale, _ = self.gate(
            hidden_states, noise, generator, routing_seed
        )
        if expert_gradient_scale is None:
            output = self.experts(hidden_states, selected_experts, routing_weights)
        else:
            output = self._scaled_gradient_output(
                hidden_states, selected_experts, routing_weights, expert_gradient_scale
            )
        return output.reshape(shape)

    def _own_experts(self) -> list[GrinMoeExperts]:
        """The experts inside of what wraps them (PEFT's layers, copies); other libraries' experts have no dropout."""
        if own := [module for module in self.experts.modules() if isinstance(module, GrinMoeExperts)]:
            return own
        raise ValueError(
            f"expert_dropout={self.expert_dropout}, and the experts are {type(self.experts).__name__}, which drop nothing; "
            "set it to 0"
        )

    def _jittered(
        self,
        hidden_states: torch.Tensor,
        noise: RoutingNoise | None,
        generator: torch.Generator | None,
        routing_seed: int | None,
    ) -> torch.Tensor:
        # Once, seen by the router and the experts but not by the residual stream, and never in place.
        if noise is not None and noise.input_jitter is not None:
            return hidden_states * noise.input_jitter.reshape(hidden_states.shape).to(hidden_states.dtype)
        if self.input_jitter_noise == 0:
            return hidden_states
        fused = fused_router(self.config)
        if fused is not None:
            return fused.input_jitter(hidden_states, self.input_jitter_noise, routing_seed, self.layer_idx or 0)
        low, high = 1.0 - self.input_jitter_noise, 1.0 + self.input_jitter_noise
        return hidden_states * torch.empty_like(hidden_states).uniform_(low, high, generator=generator)

    def _scaled_gradient_output(
        self,
        hidden_states: torch.Tensor,
        selected_experts: torch.Tensor,
        routing_weights: torch.Tensor,
        expert_gradient_scale: torch.Tensor,
    ) -> torch.Tensor:
        """The experts' output, where only their own gradient is scaled, choice by choice.

        Each choice becomes a token of its own, so that any experts implementation serves. What the weights get is
        scaled back.
        """
        top_k = selected_experts.shape[1]
        routing_weights = scale_gradient(routing_weights, 1 / expert_gradient_scale)
        per_choice = self.experts(
            hidden_states.repeat_interleave(top_k, dim=0),
            selected_experts.reshape(-1, 1),
            routing_weights.reshape(-1, 1),
        )  # (T * K, H)
        per_choice = scale_gradient(per_choice, expert_gradient_scale.reshape(-1, 1))
        return per_choice.view(-1, top_k, hidden_states.shape[1]).sum(dim=1)


def norm_of(config: GrinMoeConfig) -> nn.Module:
    """The released model's norm is LayerNorm with bias, despite the eps's name."""
    norm = nn.RMSNorm if config.norm_type == "rms_norm" else nn.LayerNorm
    return norm(config.hidden_size, eps=config.rms_norm_eps)


class GrinMoeDecoderLayer(_Recorded, GradientCheckpointingLayer):
    """Pre-norm attention and sparse block."""

    def __init__(self, config: GrinMoeConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.hidden_dropout = config.hidden_dropout
        self.self_attn = GrinMoeAttention(config, layer_idx)
        self.block_sparse_moe = GrinMoeSparseMoeBlock(config, layer_idx)
        self.input_layernorm = norm_of(config)
        self.post_attention_layernorm = norm_of(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        routing_noise: Sequence[RoutingNoise] | None = None,
        routing_seed: int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        attention_output, _ = self.self_attn(
            self.input_layernorm(hidden_states),
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            **kwargs,
        )
        hidden_states = hidden_states + self._dropout(attention_output)
        moe_output = self.block_sparse_moe(
            self.post_attention_layernorm(hidden_states),
            noise=None if routing_noise is None else routing_noise[self.layer_idx],
            routing_seed=routing_seed,
        )
        return hidden_states + self._dropout(moe_output)

    def _dropout(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(hidden_states, p=self.hidden_dropout) if self.training else hidden_states


@dataclass
class GrinMoeModelOutputWithPast(MoeModelOutputWithPast):
    """Output of [`GrinMoeModel`].

    Beyond Transformers' fields: `selected_experts`, one (T, K) int64 per layer, with `output_router_logits=True`.
    """

    selected_experts: tuple[torch.Tensor, ...] | None = None


@dataclass
class GrinMoeCausalLMOutputWithPast(MoeCausalLMOutputWithPast):
    """Output of [`GrinMoeForCausalLM`].

    Beyond Transformers' fields: `selected_experts`, one (T, K) int64 per layer, with `output_router_logits=True`; and
    `z_loss`, the unscaled router z-loss, where `router_z_loss_coef` is not 0 and the balance loss is computed.
    """

    selected_experts: tuple[torch.Tensor, ...] | None = None
    z_loss: torch.Tensor | None = None


def _require_gradient(module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
    output.requires_grad_(True)


class GrinMoePreTrainedModel(OfficialCheckpointMixin, PreTrainedModel):
    """What all GRIN-MoE models share: capabilities, initialisation, gradient checkpointing."""

    config_class = GrinMoeConfig
    config: GrinMoeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    # Reentrant checkpointing runs the layers without a graph: what they record for the balance loss has no gradient.
    _supports_reentrant_checkpointing = False
    _no_split_modules = ["GrinMoeDecoderLayer"]
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {
        "router_logits": OutputRecorder(GrinMoeRouter, index=0),
        "selected_experts": OutputRecorder(GrinMoeRouter, index=4),
        "hidden_states": GrinMoeDecoderLayer,
        "attentions": GrinMoeAttention,
    }

    def __init__(self, config: GrinMoeConfig, *args, **kwargs):
        config.check()  # fields may have been assigned since it was built
        super().__init__(config, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, GrinMoeRouter):
            init.normal_(module.weight, mean=0.0, std=std)
        elif isinstance(module, PackedExperts):
            module.init_missing(std)
        elif isinstance(module, GrinMoeExperts):
            init.normal_(module.gate_up_proj, mean=0.0, std=std)
            init.normal_(module.down_proj, mean=0.0, std=std)
        elif isinstance(module, GrinMoeRotaryEmbedding) and module.rope_type == "longrope":
            init.copy_(module.long_inv_freq, module.long_rope_init(module.config))

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """As in Transformers; of quantised weights all are counted, however they are packed. None of them trains."""
        counted = super().num_parameters(only_trainable, exclude_embeddings)
        return counted if only_trainable else counted + parameters_beyond_bytes(self)

    def _ranks_per_batch(self) -> int:
        """How many consecutive ranks share a batch: the tensor-parallel group's size, 1 without one."""
        # The library writes it to the config that all parts of a model share; `tp_size` is known to the outermost only.
        distributed_config = self.config.__dict__.get("distributed_config")
        return 1 if distributed_config is None else max(1, distributed_config.tp_size)

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # The library looks for the experts' decorator in the source file of `cls`, and after `fully_shard` that is torch's.
        return True

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        if requested_experts is None and "grinmoe" in ALL_EXPERTS_FUNCTIONS:
            requested_experts = "grinmoe"
        elif requested_experts is None and library_experts(self.config) == "eager":
            requested_experts = "eager"
        if (requested_experts or "").startswith("grinmoe") and requested_experts not in ALL_EXPERTS_FUNCTIONS:
            raise ImportError(
                f"experts_implementation={requested_experts!r} belongs to the package grinmoe, which this process has not "
                "imported: pip install grinmoe, and import grinmoe before the model is loaded; or leave it out for "
                "Transformers' own"
            )
        return super().get_correct_experts_implementation(requested_experts)

    def enable_input_require_grads(self) -> None:
        """As in Transformers, by a hook that pickles."""
        hook = self.get_input_embeddings().register_forward_hook(_require_gradient)
        self._require_grads_hooks, self._require_grads_hook = [hook], hook

    def _set_gradient_checkpointing(self, enable: bool = True, gradient_checkpointing_func=None, **kwargs) -> None:
        # The one place that every way of enabling checkpointing goes through, on all supported versions.
        if enable and gradient_checkpointing_func is not None and not self._supports_reentrant_checkpointing:
            options = getattr(gradient_checkpointing_func, "keywords", {})
            if options.get("use_reentrant"):
                raise ValueError(
                    "use_reentrant=True: reentrant checkpointing drops the gradient of the balance loss without an "
                    'error; pass gradient_checkpointing_kwargs={"use_reentrant": False}'
                )
            # torch's own default is True, and callers that do not choose (PEFT's k-bit preparation) get it.
            gradient_checkpointing_func = functools.partial(gradient_checkpointing_func, use_reentrant=False)
        if gradient_checkpointing_func is not None:
            kwargs["gradient_checkpointing_func"] = gradient_checkpointing_func
        super()._set_gradient_checkpointing(enable=enable, **kwargs)


class GrinMoeModel(GrinMoePreTrainedModel):
    """The decoder: token ids to final-normed hidden states."""

    _keys_to_ignore_on_load_unexpected = [r"^lm_head\.", r"^score\."]

    def __init__(self, config: GrinMoeConfig):
        super().__init__(config)
        # No padding_idx: the released pad token is also the end-of-text token, whose embedding must train.
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([GrinMoeDecoderLayer(config, idx) for idx in range(config.num_hidden_layers)])
        self.norm = norm_of(config)
        self.rotary_emb = GrinMoeRotaryEmbedding(config)
        # The config as the library's mask and cache code must read it: sliding_window counts visible keys.
        self.window_config = config.get_text_config(decoder=True)
        self.gradient_checkpointing = False
        self.post_init()
        # The library installs these on first use, under a lock that torch.compile(fullgraph=True) cannot trace.
        maybe_install_capturing_hooks(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({name: value for name, value in state.items() if name != _HOOKED})
        self.window_config = self.config.get_text_config(decoder=True)  # a copied view is of no copied config
        maybe_install_capturing_hooks(self)

    def __deepcopy__(self, memo: dict[int, Any]):
        copied = _Recorded.__deepcopy__(self, memo)  # with the hooks, so that none are to be installed
        copied.window_config = copied.config.get_text_config(decoder=True)
        return copied

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> GrinMoeModelOutputWithPast:
        """
        Args:
            input_ids: (B, S) int64, or `inputs_embeds` (B, S, H).
            attention_mask: (B, past + S), 1 for tokens and 0 for padding; or a prepared 4-D mask.
            position_ids: (B, S); by default the positions after what the cache holds, for every row alike; padding between
                tokens (`attention_mask` 1, 0, 1) takes none. Where they begin
                again at 0 within a row, and no cache is given, samples are packed: they do not see each other, and the
                output has no cache.
            past_key_values: any Transformers cache; since Transformers 5.24 it may be called `cache`.
            routing_noise: one `RoutingNoise` per layer, to replay recorded draws in training.
            routing_seed: int from which the layers' draws in training follow; by default drawn from torch's generator
                and agreed on by the ranks that share a batch (docs/numerics.md).
            output_router_logits, output_selected_experts, output_hidden_states, output_attentions: what to record.

        Raises:
            ValueError: neither or both of the inputs, no token at all, a mask of another length, or a cache in training with
                checkpointing.
        """
        cache = take_cache(past_key_values, kwargs)
        inputs_embeds = self._embedded(input_ids, inputs_embeds, cache)
        samples, gaps = None, padding_gaps(attention_mask, inputs_embeds.shape[1], cache)
        if position_ids is not None and cache is None:
            rows = position_ids.expand(inputs_embeds.shape[0], -1)
            has_borders = kwargs.get("cu_seq_lens_q") is not None
            samples = packed_samples(self.config, attention_mask, rows, use_cache, has_borders)
        elif position_ids is not None and not torch.compiler.is_compiling():
            _refuse_packing(attention_mask, position_ids)
        if use_cache and cache is None and samples is None:
            cache = DynamicCache(config=self.window_config)
        if position_ids is None:
            past_length = cache.get_seq_length() if cache is not None else 0
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + past_length
            position_ids = position_ids.unsqueeze(0)
            if (
                gaps is not None
            ):  # padding at one end moves a row as a whole, but between tokens it would move them apart
                counts = attention_mask.long().cumsum(-1)[:, past_length : past_length + inputs_embeds.shape[1]]
                position_ids = torch.where(gaps, (counts - 1).clamp(min=0), position_ids)
        self._refuse_regime_change(position_ids, cache)
        mask_positions = position_ids
        if samples is not None:
            attention_mask = None
            mask_positions, flash_arguments = samples
            kwargs.update(flash_arguments)
        causal_mask = self._causal_mask(inputs_embeds, attention_mask, mask_positions, cache)
        if self.training and kwargs.get("routing_seed") is None:
            if not torch.is_grad_enabled() and kwargs.get("routing_noise") is None:
                self._warn_of_draws()
            kwargs["routing_seed"] = routing_seed(inputs_embeds.device, self._ranks_per_batch())
        hidden_states = inputs_embeds
        position_embeddings = self.rotary_emb(hidden_states, position_ids)
        for decoder_layer in self.layers[: self.config.num_hidden_layers]:
            hidden_states = decoder_layer(
                hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=causal_mask,
                position_ids=position_ids,
                past_key_values=cache,
                use_cache=use_cache,
                **kwargs,
            )
        return GrinMoeModelOutputWithPast(last_hidden_state=self.norm(hidden_states), **{CACHE: cache})

    def _warn_of_draws(self) -> None:
        """Without gradients a forward generates, evaluates or is compared with another, and draws are rarely wanted."""
        draws = ESTIMATORS[self.config.router_estimator].draws or self.config.input_jitter_noise > 0
        if draws and not torch.compiler.is_compiling():
            logger.warning_once(
                "A GRIN-MoE in training mode samples its experts without gradients too, so this forward differs from every "
                "other. To generate or evaluate, call model.eval(). A trainer that compares forwards compares two routings: "
                "grinmoe.training.SameDrawsForReference pairs them for TRL's DPO and KTO, docs/training.md names the others."
            )

    def _embedded(
        self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None, cache: Cache | None
    ) -> torch.Tensor:
        """(B, S, H), and the checks of what came in."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if inputs_embeds.shape[1] == 0:
            raise ValueError(
                f"the input has no tokens (shape {tuple(inputs_embeds.shape[:2])}): an empty prompt; give at least one "
                "token, for instance the beginning-of-sequence token"
            )
        if cache is not None and self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            raise ValueError(
                "a cache with gradient checkpointing: recomputed layers would write to it twice; pass no cache in training"
            )
        return inputs_embeds

    def _causal_mask(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor,
        cache: Cache | None,
    ):
        """As the attention implementation wants it, None included."""
        create_mask = create_causal_mask if self.config.sliding_window is None else create_sliding_window_causal_mask
        return create_mask(
            config=self.window_config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{CACHE: cache},
        )

    def _refuse_regime_change(self, position_ids: torch.Tensor, cache: Cache | None) -> None:
        """The cache is void where RoPE's frequencies change with the length; `generate` then rebuilds it."""
        rotary = self.rotary_emb
        # Not for the paged cache of continuous batching, where each request has been checked.
        if rotary.first_long_length is None or not isinstance(cache, Cache):
            return
        new_tokens, cached = position_ids.shape[-1], cache.get_seq_length()
        if torch.compiler.is_compiling():
            if isinstance(cached, torch.Tensor) or cached > 0:
                changes = rotary.changes_regime(position_ids.max() + 1, new_tokens)
                changes = changes & (cached > 0) if isinstance(cached, torch.Tensor) else changes
                torch._assert_async(
                    ~changes, f"{rotary.label} changes the frequencies of what is cached; drop the cache"
                )
            return
        length = int(position_ids.max()) + 1
        if cached > 0 and rotary.changes_regime(length, new_tokens):
            raise ValueError(
                f"at {length} tokens {rotary.label} changes the frequencies of all positions (first at "
                f"{rotary.first_long_length}), and the cache holds the old ones; "
                "drop the cache and pass the whole sequence at once (generate does that by itself, for input_ids "
                "and without prefill_chunk_size)"
            )


class GrinMoeForCausalLM(GrinMoePreTrainedModel, GrinMoeGenerationMixin):
    """GRIN-MoE with its language head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: GrinMoeConfig):
        super().__init__(config)
        self.model = GrinMoeModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.lm_head_bias)
        self.balance_window = BalanceWindow()
        self.post_init()

    def _get_name(self) -> str:
        # The Trainer's label smoothing asks whether this is a language model's; `fully_shard` gives the class another name.
        return GrinMoeForCausalLM.__name__

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> GrinMoeCausalLMOutputWithPast:
        """
        Args:
            labels: (B, S), -100 where no loss is wanted; shifted inside. The loss is the mean cross entropy, or its sum
                over `num_items_in_batch` where the Trainer gives it.
            output_router_logits: return router_logits, selected_experts and the unscaled aux_loss (and z_loss); with
                `labels` the loss then includes them, times their coefficients. In training it does so in any case.
            logits_to_keep: the last n positions (0: all), or positions (n,) or (B, n), or a (B, S) bool mask.

        Raises:
            ValueError: router losses are asked for, and the Trainer computes the loss without the model (label smoothing).

        Others as in [`GrinMoeModel`]. Example: see the model card.
        """
        has_router_loss = self.config.router_aux_loss_coef > 0 or self.config.router_z_loss_coef > 0
        if has_router_loss and self.training and labels is None and not output_router_logits:
            self._refuse_loss_elsewhere(kwargs)
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        records_routing = output_router_logits or (self.training and labels is not None and has_router_loss)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_router_logits=records_routing,
            output_selected_experts=records_routing,
            return_dict=True,  # whatever the config says of what a caller gets
            **kwargs,
        )
        router_losses = None
        if records_routing:
            num_items_in_batch = kwargs.get("num_items_in_batch")
            router_losses = self._start_router_losses(outputs, attention_mask, labels, num_items_in_batch)
        if not isinstance(self.lm_head, nn.Linear):
            self._check_head()
        logits = self.lm_head(_keep_positions(outputs.last_hidden_state, logits_to_keep))
        loss = aux_loss = z_loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.vocab_size, **kwargs)
        if router_losses is not None:
            aux_loss, z_loss, weighted = router_losses.finish()
            loss = None if loss is None else loss + weighted.to(loss.device)
        return GrinMoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            z_loss=z_loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits if output_router_logits else None,
            selected_experts=outputs.selected_experts if output_router_logits else None,
            # A cache that PEFT's prefix brings along to each call is not for `generate` to go on with.
            **{CACHE: None if use_cache is False else outputs.get(CACHE)},
        )

    def _refuse_loss_elsewhere(self, kwargs: dict[str, Any]) -> None:
        """The Trainer tells the size of a step to a model whose labels it has taken out, to compute the loss itself."""
        if kwargs.get("num_items_in_batch") is not None:
            raise ValueError(
                f"router_aux_loss_coef={self.config.router_aux_loss_coef}, router_z_loss_coef="
                f"{self.config.router_z_loss_coef}: the Trainer's label_smoothing_factor and compute_loss_func take the "
                "labels out of the batch, and the router's losses, which the model adds to its own, would be left out; set "
                "both to 0 (a compute_loss_func may add outputs.aux_loss, which output_router_logits=True computes)"
            )

    def _check_head(self) -> None:
        """PEFT's trainable tokens compute the head without its bias, and one that is tied as if it were not."""
        if self.config.lm_head_bias:
            refuse_trained_tokens(self.lm_head)
        elif self.config.tie_word_embeddings and trains_tokens(self.lm_head) > trains_tokens(self.model.embed_tokens):
            raise ValueError("trainable tokens of PEFT on lm_head, which is tied to embed_tokens: name embed_tokens")

    def _start_router_losses(
        self,
        outputs: GrinMoeModelOutputWithPast,
        attention_mask: torch.Tensor | None,
        labels: torch.Tensor | None,
        num_items_in_batch: torch.Tensor | int | None,
    ) -> PendingRouterLosses:
        """Send this rank's counts on their way, so that the language head runs while they travel."""
        config = self.config
        if attention_mask is not None:
            # With a cache the mask also covers what is cached; a prepared 4-D mask does not tell padding.
            sequence = outputs.last_hidden_state.shape[1]
            attention_mask = attention_mask[:, -sequence:] if attention_mask.dim() == 2 else None
        routing = outputs.router_logits, outputs.selected_experts, config.num_experts_per_tok, attention_mask
        step, share = {}, None
        if labels is not None and num_items_in_batch is not None:
            step = {"targets": (labels[..., 1:] != -100).sum(), "items": num_items_in_batch}
            share = step["targets"] / num_items_in_batch
        scope, balance = config.router_aux_loss_scope, None
        if scope == "global" and self.training:
            balance = self.balance_window.start(*routing, **step, ranks_per_batch=self._ranks_per_batch())
        elif scope == "global":
            # Ranks evaluate and generate at their own pace: a collective there would wait for ever.
            scope = "local"
        return PendingRouterLosses(
            *routing, scope, config.router_aux_loss_coef, config.router_z_loss_coef, share, balance
        )


# A class where all annotations of this file are text: Transformers' own tests look there for the output's fields.
GrinMoeForCausalLM.forward.__annotations__["return"] = GrinMoeCausalLMOutputWithPast


class GrinMoeForSequenceClassification(GenericForSequenceClassification, GrinMoePreTrainedModel):
    """GRIN-MoE with a classification head on the last token that is not padding. It trains without a balance loss."""

    _keys_to_ignore_on_load_unexpected = [r"^lm_head\."]
    _supports_reentrant_checkpointing = True  # it has no balance loss

    def __init__(self, config: GrinMoeConfig):
        # Not the generic one: it builds the base model through AutoModel, which refuses remote code.
        super(GenericForSequenceClassification, self).__init__(config)
        self.num_labels = config.num_labels
        self.model = GrinMoeModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,  # the library's own lacks this name, which PEFT's prefix tuning looks for
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ):
        """As in Transformers, which reads the class of `inputs_embeds` from the last position, and says so."""
        has_router_loss = self.config.router_aux_loss_coef > 0 or self.config.router_z_loss_coef > 0
        if has_router_loss and self.training and labels is not None:
            logger.warning_once("a classifier trains on its labels alone: the coefficients of router losses do nothing")
        kwargs[CACHE] = take_cache(past_key_values, kwargs)
        inputs = (input_ids, attention_mask, position_ids)
        output = super().forward(*inputs, inputs_embeds=inputs_embeds, labels=labels, use_cache=use_cache, **kwargs)
        if labels is None or num_items_in_batch is None:
            return output
        # The library's loss is the mean of these rows, and the Trainer adds up those of a step: each has its share of it.
        # (A regression counts every number, also one of -100.)
        counted = labels.numel() if labels.is_floating_point() else (labels != -100).sum()
        share = counted / num_items_in_batch
        if isinstance(output, tuple):
            return output[0] * share, *output[1:]
        output.loss = output.loss * share
        return output


def _keep_positions(hidden_states: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    if isinstance(logits_to_keep, int):
        return hidden_states[:, slice(-logits_to_keep, None)]
    if logits_to_keep.dim() == 1:
        return hidden_states[:, logits_to_keep]
    if logits_to_keep.dtype == torch.bool:
        return hidden_states[logits_to_keep]
    return hidden_states.take_along_dim(logits_to_keep[..., None], dim=1)


# The name in the released config.json's auto_map.
GRINMoEForCausalLM = GrinMoeForCausalLM
