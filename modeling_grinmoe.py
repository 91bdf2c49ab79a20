"""GRIN-MoE in PyTorch: the decoder and its heads.

Shapes: B batch, S sequence, T = B * S tokens, H hidden size, E experts, K experts per token, L layers, V vocabulary.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GenericForSequenceClassification, GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs, maybe_install_capturing_hooks

from .attention_grinmoe import CACHE, GrinMoeAttention, GrinMoeRotaryEmbedding, packed_samples, take_cache
from .balance_grinmoe import BalanceWindow, router_z_loss
from .block_grinmoe import GrinMoeRouter, GrinMoeSparseMoeBlock
from .checkpoint_grinmoe import OfficialCheckpointMixin
from .configuration_grinmoe import GrinMoeConfig
from .dispatch_grinmoe import DEFAULT_EXPERTS
from .estimators_grinmoe import RoutingNoise
from .experts_grinmoe import GrinMoeExperts
from .generation_grinmoe import GrinMoeGenerationMixin
from .layout_grinmoe import register_weight_conversion
from .quantization_grinmoe import parameters_beyond_bytes
from .quantized_experts_grinmoe import QuantizedGrinMoeExperts
from .routing_grinmoe import load_balancing_loss, routing_seed

register_weight_conversion()


def norm_of(config: GrinMoeConfig) -> nn.Module:
    """The released model's norm is LayerNorm with bias, despite the eps's name."""
    norm = nn.RMSNorm if config.norm_type == "rms_norm" else nn.LayerNorm
    return norm(config.hidden_size, eps=config.rms_norm_eps)


class GrinMoeDecoderLayer(GradientCheckpointingLayer):
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
        return nn.functional.dropout(hidden_states, p=self.hidden_dropout, training=self.training)


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
        elif isinstance(module, QuantizedGrinMoeExperts):
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
        # The library greps the model's own file for the experts decorator; ours is applied in experts_grinmoe.py.
        # Without this every experts_implementation would silently run as "eager".
        return True

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        return super().get_correct_experts_implementation(requested_experts or DEFAULT_EXPERTS)

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
        self.window_config = config.get_text_config()
        self.gradient_checkpointing = False
        self.post_init()
        # The library installs these on first use, under a lock that torch.compile(fullgraph=True) cannot trace.
        maybe_install_capturing_hooks(self)

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
            position_ids: (B, S); by default the positions after what the cache holds, for every row alike. Where they begin
                again at 0 within a row, and no cache is given, samples are packed: they do not see each other, and the
                output has no cache.
            past_key_values: any Transformers cache; since Transformers 5.24 it may be called `cache`.
            routing_noise: one `RoutingNoise` per layer, to replay recorded draws in training.
            routing_seed: int from which the layers' draws in training follow; by default drawn from torch's generator
                and agreed on by the ranks that share a batch (docs/numerics.md).
            output_router_logits, output_selected_experts, output_hidden_states, output_attentions: what to record.

        Raises:
            ValueError: neither or both of the inputs, no token at all, or a cache in training with checkpointing.
        """
        cache = take_cache(past_key_values, kwargs)
        inputs_embeds = self._embedded(input_ids, inputs_embeds, cache)
        samples = None
        if position_ids is not None and cache is None:
            rows = position_ids.expand(inputs_embeds.shape[0], -1)
            has_borders = kwargs.get("cu_seq_lens_q") is not None
            samples = packed_samples(self.config, attention_mask, rows, use_cache, has_borders)
        if use_cache and cache is None and samples is None:
            cache = DynamicCache(config=self.config)
        if position_ids is None:
            past_length = cache.get_seq_length() if cache is not None else 0
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + past_length
            position_ids = position_ids.unsqueeze(0)
        self._refuse_regime_change(position_ids, cache)
        mask_positions = position_ids
        if samples is not None:
            attention_mask = None
            mask_positions, flash_borders = samples
            kwargs.update(flash_borders)
        causal_mask = self._causal_mask(inputs_embeds, attention_mask, mask_positions, cache)
        if self.training and kwargs.get("routing_seed") is None:
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
        """Under LongRoPE the cache is void once the text outgrows the short factors; `generate` then rebuilds it."""
        if self.rotary_emb.rope_type != "longrope" or torch.compiler.is_compiling():
            return
        if not isinstance(cache, Cache):  # none, or the paged cache of generate_batch, which has its own limit
            return
        length = int(position_ids.max()) + 1
        if cache.get_seq_length() > 0 and self.rotary_emb.changes_regime(length, position_ids.shape[-1]):
            raise ValueError(
                f"at {length} tokens LongRoPE changes the frequencies of all positions "
                f"(original_max_position_embeddings={self.rotary_emb.original_length}), and the cache holds the old ones; "
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

        Others as in [`GrinMoeModel`]. Example: see the model card.
        """
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        has_router_loss = self.config.router_aux_loss_coef > 0 or self.config.router_z_loss_coef > 0
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
            **kwargs,
        )
        losses_of_router = None
        if records_routing:
            losses_of_router = self._router_losses(outputs, attention_mask, labels, kwargs.get("num_items_in_batch"))
        logits = self.lm_head(_keep_positions(outputs.last_hidden_state, logits_to_keep))
        loss = aux_loss = z_loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.vocab_size, **kwargs)
        if losses_of_router is not None:
            aux_loss, z_loss, weighted = losses_of_router()
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
            **{CACHE: outputs.get(CACHE)},
        )

    def _router_losses(
        self,
        outputs: GrinMoeModelOutputWithPast,
        attention_mask: torch.Tensor | None,
        labels: torch.Tensor | None,
        num_items_in_batch: torch.Tensor | int | None,
    ) -> Callable[[], tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]]:
        """Start the router's losses; the result waits for what other ranks have to say.

        It gives the unscaled balance loss, the unscaled z-loss or None, and their sum weighted by the coefficients and by
        this micro-batch's share of the optimizer step. The Trainer adds up the losses of a step's micro-batches: the
        language loss is divided by the step's `num_items_in_batch` and adds up to a mean, and weighted by their share of
        those target tokens the router's losses do too, so that they do not grow with gradient accumulation.
        """
        config = self.config
        if attention_mask is not None:
            # With a cache the mask also covers what is cached; a prepared 4-D mask does not tell padding.
            sequence = outputs.last_hidden_state.shape[1]
            attention_mask = attention_mask[:, -sequence:] if attention_mask.dim() == 2 else None
        routing = outputs.router_logits, outputs.selected_experts, config.num_experts_per_tok
        step, share = {}, None
        if labels is not None and num_items_in_batch is not None:
            step = {"targets": (labels[..., 1:] != -100).sum(), "items": num_items_in_batch}
            share = step["targets"] / num_items_in_batch
        pending = None
        # Ranks evaluate and generate at their own pace: a collective there would wait for ever.
        if config.router_aux_loss_scope == "global" and self.training:
            ranks_per_batch = self._ranks_per_batch()
            pending = self.balance_window.start(*routing, attention_mask, **step, ranks_per_batch=ranks_per_batch)

        def finish():
            if pending is None:
                scope = "local" if config.router_aux_loss_scope == "global" else config.router_aux_loss_scope
                aux_loss, aux_share = load_balancing_loss(*routing, scope, attention_mask), share
            else:
                aux_loss, aux_share = pending.finish()
            weighted = config.router_aux_loss_coef * _times(aux_loss, aux_share)
            z_loss = None
            if config.router_z_loss_coef > 0:
                z_loss = router_z_loss(outputs.router_logits, attention_mask)
                weighted = weighted + config.router_z_loss_coef * _times(z_loss, share)
            return aux_loss, z_loss, weighted

        return finish


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


def _keep_positions(hidden_states: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    if isinstance(logits_to_keep, int):
        return hidden_states[:, slice(-logits_to_keep, None)]
    if logits_to_keep.dim() == 1:
        return hidden_states[:, logits_to_keep]
    if logits_to_keep.dtype == torch.bool:
        return hidden_states[logits_to_keep]
    return hidden_states.take_along_dim(logits_to_keep[..., None], dim=1)


def _times(loss: torch.Tensor, share: torch.Tensor | None) -> torch.Tensor:
    return loss if share is None else loss * share.to(loss.device)


# The names in the released config.json's auto_map and its file.
GRINMoEModel = GrinMoeModel
GRINMoEForCausalLM = GrinMoeForCausalLM
GRINMoEForSequenceClassification = GrinMoeForSequenceClassification

__all__ = [
    "GrinMoeForCausalLM",
    "GrinMoeForSequenceClassification",
    "GrinMoeModel",
    "GrinMoePreTrainedModel",
    "GRINMoEForCausalLM",
    "GRINMoEForSequenceClassification",
    "GRINMoEModel",
]
