"""Generation with GRIN-MoE: Transformers' own, and what LongRoPE and dynamic RoPE ask of it.

Under LongRoPE (Phi-3.5-MoE) the length of the longest text in a batch decides the frequencies of every position, so the
keys in a cache are void once a text outgrows the short factors. `generate` then fills the cache again, once (dynamic RoPE:
at every token beyond `max_position_embeddings`); where that cannot be done the call is refused, because going on would give
other text without an error.
"""

from __future__ import annotations

import copy
import functools
import inspect
import math
from pathlib import Path
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache, StaticLayer
from transformers.generation import GenerationConfig, GenerationMixin
from transformers.masking_utils import create_causal_mask, create_masks_for_generate
from transformers.utils import CONFIG_NAME, logging

from .configuration_grinmoe import (
    TOKEN_IDS,
    check_fields,
    is_int,
    is_list_of,
    is_number,
    is_one_of,
    is_text,
    read_json_object,
)

logger = logging.get_logger(__name__)


# What the installed Transformers calls a cache, as an argument and in outputs: `cache` since 5.24. Before, that name was
# for the paged cache of continuous batching, which goes straight to the attention function.
CACHE = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"


# Fields of generation_config.json, in the form of the tables in configuration_grinmoe.py.
_OR_NULL = ", or null"
_NUMBERS: dict[str, tuple[float, float, str]] = {
    **dict.fromkeys(("num_beams", "num_return_sequences"), (1, 2**10, _OR_NULL)),
    "encoder_no_repeat_ngram_size": (0, 2**10, _OR_NULL),  # the library makes as many copies of the prompt
    **dict.fromkeys(
        "max_length max_new_tokens min_length min_new_tokens top_k no_repeat_ngram_size max_cache_len prefill_chunk_size "
        "num_assistant_tokens prompt_lookup_num_tokens max_matching_ngram_size assistant_early_exit".split(),
        (0, 2**31, _OR_NULL),
    ),
    **dict.fromkeys(
        "temperature top_p min_p top_h typical_p epsilon_cutoff eta_cutoff repetition_penalty length_penalty guidance_scale "
        "max_time assistant_confidence_threshold penalty_alpha encoder_repetition_penalty diversity_penalty".split(),
        (-1e9, 1e9, _OR_NULL),
    ),
}
_FORMS: dict[str, Any] = {
    **dict.fromkeys(
        "do_sample use_cache renormalize_logits remove_invalid_values token_healing output_attentions output_hidden_states "
        "output_scores output_logits return_dict_in_generate disable_compile".split(),
        (is_one_of(bool), "True, False or null"),
    ),
    **dict.fromkeys(
        "eos_token_id forced_eos_token_id decoder_start_token_id suppress_tokens begin_suppress_tokens".split(),
        TOKEN_IDS,
    ),
    "exponential_decay_length_penalty": (
        lambda value: value is None or (isinstance(value, list) and len(value) == 2 and all(map(is_number, value))),
        "a list of a length and a factor, or null",
    ),
    "is_assistant": (lambda value: value in (None, False), "left out: assisted generation sets it"),
    "bad_words_ids": (
        is_list_of(lambda one: isinstance(one, list) and all(map(is_int, one))),
        "a list of lists of ids",
    ),
    "early_stopping": (lambda value: value == "never" or is_one_of(bool)(value), "True, False, never or null"),
    "stop_strings": (lambda value: is_text(value) or is_list_of(is_text)(value), "a text, a list of texts or null"),
    **dict.fromkeys(("cache_implementation", "transformers_version"), (is_one_of(str), "a text or null")),
    **dict.fromkeys(("cache_config", "watermarking_config", "compile_config"), (is_one_of(dict), "an object or null")),
}


def check_generation_config(file: Path) -> None:
    """
    Check what `from_pretrained` will make a `GenerationConfig` of: `generation_config.json`, or config.json beside it.

    Raises:
        ValueError: not JSON (see `read_json_object`), or a field of the wrong type: the file, the field and its value.
    """
    file = file if file.is_file() else file.with_name(CONFIG_NAME)
    if not file.is_file():
        return
    content = read_json_object(file, remedy="correct it, or remove it")
    try:
        check_fields(content, _NUMBERS, _FORMS)
        GenerationConfig.from_dict(content)
    except Exception as error:
        raise ValueError(f"{file} cannot be used for generation ({error}); correct it, or remove it") from error


def take_cache(past_key_values: Cache | None, kwargs: dict[str, Any]) -> Cache | None:
    """The cache of a call that may have it by either name, or by both; takes the other one out of `kwargs`.

    Of two caches one must be empty: it then starts with what the other holds. (PEFT's prefix methods exchange the cache of
    `generate` under one of its two names.)
    """
    # Before 5.24 a paged cache, which is not a `Cache`, stays where it is.
    cache = kwargs.pop("cache", None) if CACHE == "cache" or isinstance(kwargs.get("cache"), Cache) else None
    if cache is None or past_key_values is None or cache is past_key_values:
        return past_key_values if cache is None else cache
    empty, filled = sorted((cache, past_key_values), key=lambda one: one.get_seq_length() > 0)
    length = filled.get_seq_length()
    if empty.get_seq_length() > 0 or length == 0 or any(layer.keys.shape[2] != length for layer in filled.layers):
        raise ValueError("cache and past_key_values are two names of one argument; give one of them")
    for layer_idx, layer in enumerate(filled.layers):
        empty.update(layer.keys, layer.values, layer_idx)
    return empty


class _WithVisibleKeys:
    """A model as the manager of continuous batching must read it: the window of its config counts visible keys."""

    def __init__(self, model: Any):
        self.__dict__.update(_model=model, config=model.config.get_text_config(decoder=True))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._model, name, value)

    def __call__(self, *args, **kwargs):
        return self._model(*args, **kwargs)


class GrinMoeGenerationMixin(GenerationMixin):
    """`generate` and its kin, for a class with a decoder (`model`) that owns a `GrinMoeRotaryEmbedding`."""

    config: Any
    model: Any

    def prepare_inputs_for_generation(
        self,
        input_ids,
        past_key_values=None,
        attention_mask=None,
        inputs_embeds=None,
        position_ids=None,
        is_first_iteration=False,
        cache=None,
        **kwargs,
    ):
        """As in Transformers; LongRoPE recomputes the cache when the sequence outgrows the short factors."""
        cache = take_cache(past_key_values, {"cache": cache})
        if is_first_iteration and input_ids.shape[1] > self.config.max_position_embeddings:
            logger.warning_once(
                f"The prompt has {input_ids.shape[1]} tokens, more than max_position_embeddings="
                f"{self.config.max_position_embeddings}. Nothing is cut off: the model runs on positions that it was not "
                "trained for, and the text will be worse. Shorten the prompt to avoid that."
            )
        # A prompt given as embeddings is not in input_ids and cannot be computed again; forward then says so.
        if inputs_embeds is None and self._changes_regime(input_ids, cache, attention_mask, position_ids):
            # What is cached was computed under the other regime, in every layer. All of it is computed again, once.
            if isinstance(cache, DynamicCache):
                # In place, for whoever holds it; before Transformers 5.23 reset() leaves a dynamic cache its length.
                cache.__init__(config=self.config, offloading=cache.offloading)
            else:
                cache.reset()
            kwargs["next_sequence_length"] = None
        inputs = super().prepare_inputs_for_generation(
            input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            position_ids=position_ids,
            is_first_iteration=is_first_iteration,
            **{CACHE: cache},
            **kwargs,
        )
        # By both names: PEFT's prompt methods wrap this function and read, or exchange, `past_key_values`.
        return inputs if cache is None else {**inputs, "past_key_values": cache}

    def _changes_regime(
        self,
        input_ids: torch.Tensor,
        cache: Cache | None,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
    ) -> bool:
        rotary = self.model.rotary_emb
        total = input_ids.shape[1]
        if rotary.first_long_length is None or cache is None:
            return False
        cached = int(cache.get_seq_length())
        if total <= cached or (attention_mask is not None and attention_mask.shape[1] > total):
            return False  # input_ids are a chunk of the text, which is not to be computed again; forward then refuses
        # The largest position decides for the batch. Unless they are given, positions count tokens, not padding.
        if position_ids is not None:
            longest = int(position_ids.max()) + 1
        else:
            longest = total if attention_mask is None else int(attention_mask[:, :total].sum(-1).max())
        return cached > 0 and rotary.changes_regime(longest, total - cached)

    @staticmethod
    def create_masks_for_generate(config, *args, **kwargs):
        """As in Transformers, which asks here for a static cache's masks; the window counts visible keys."""
        return create_masks_for_generate(config.get_text_config(decoder=True), *args, **kwargs)

    def _prepare_static_cache(self, cache_implementation, *args, **kwargs):
        """As in Transformers, but every layer keeps all keys, and the window is left to the mask.

        The library's static layers for a window count their length in a Python int, one for each layer. These are inputs of
        a compiled step, and a CUDA graph would be recorded anew for every token.
        """
        cache = super()._prepare_static_cache(cache_implementation, *args, **kwargs)
        if "offloaded" not in cache_implementation:
            cache.layers = [StaticLayer(max_cache_len=self._previous_max_cache_length) for _ in cache.layers]
        return cache

    @functools.wraps(GenerationMixin.generate)
    def generate(self, inputs=None, generation_config=None, *args, **kwargs):
        if (cache := take_cache(kwargs.pop("past_key_values", None), kwargs)) is not None:
            kwargs[CACHE] = cache
        options = copy.deepcopy(generation_config or self.generation_config)
        options.update(**kwargs)
        speculates = options.prompt_lookup_num_tokens or options.assistant_early_exit is not None
        speculates = speculates or kwargs.get("assistant_model") is not None
        prompts = (inputs, kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
        prompt_length = max((prompt.shape[1] for prompt in prompts if prompt is not None), default=1)
        mask = kwargs.get("attention_mask")
        length = prompt_length if mask is None else max(prompt_length, mask.shape[1])  # with what is in the cache
        new_tokens = options.max_new_tokens
        if new_tokens is None:  # 20 are the library's default
            new_tokens = 20 if options.max_length is None else max(0, options.max_length - length)
        if (first_long := self.model.rotary_emb.first_long_length) is not None:
            if speculates:  # candidates decide the regime of the whole text, also those that are then rejected
                self._refuse_to_reach_long_lengths("speculative decoding", length, new_tokens)
            elif length > prompt_length and cache is not None and 0 < cache.get_seq_length() < first_long:
                what = "a cache with new tokens alone (give all tokens)"  # what is cached could not be computed again
                self._refuse_to_reach_long_lengths(what, length, new_tokens)
        # PEFT puts its own function there for prompt tuning, prefix tuning and their kin, whose virtual tokens are in the
        # cache and not in input_ids. Where Transformers tells new tokens by the cache's length, some would be lost.
        if getattr(self.prepare_inputs_for_generation, "__self__", self) is not self:
            for wrong, what in (
                (speculates, "speculative decoding"),
                (options.prefill_chunk_size is not None, "prefill_chunk_size"),
                ("static" in (options.cache_implementation or ""), "a static cache"),
                (cache is not None, "a cache that is passed in"),
                (
                    mask is not None
                    and not mask.all()
                    and self.config.visible_keys is not None
                    # Virtual tokens come before the padding, which the window counts.
                    and self.config.visible_keys < length + new_tokens + self._virtual_tokens(),
                    f"padding of rows that grow beyond the window of {self.config.visible_keys} keys",
                ),
            ):
                if wrong:
                    raise ValueError(f"{what} does not go with PEFT's virtual tokens; leave it out")
        return super().generate(inputs, generation_config, *args, **kwargs)

    def _virtual_tokens(self) -> int:
        return self.prepare_inputs_for_generation.__self__.active_peft_config.num_virtual_tokens

    def init_continuous_batching(self, *args, **kwargs):
        """As in Transformers; the paged cache keeps `visible_keys` keys of each request.

        The manager's `add_request` raises ValueError where a request could reach the length at which LongRoPE or dynamic
        RoPE changes frequencies. That holds for a whole batch and for what is cached, which a paged cache that is shared by
        requests of all lengths cannot follow.
        """
        manager = super().init_continuous_batching(*args, **kwargs)
        manager.model = _WithVisibleKeys(self)
        add_request = type(manager).add_request

        @functools.wraps(add_request)
        def add_checked(input_ids, request_id=None, max_new_tokens=None, *args, **kwargs):
            new_tokens = manager.generation_config.max_new_tokens if max_new_tokens is None else max_new_tokens
            self._refuse_to_reach_long_lengths("continuous batching", len(input_ids), new_tokens)
            return add_request(manager, input_ids, request_id, max_new_tokens, *args, **kwargs)

        if self.model.rotary_emb.first_long_length is not None:
            manager.add_request = add_checked
        return manager

    def generate_batch(self, inputs, generation_config=None, **kwargs):
        """As in Transformers (continuous batching); raises as `init_continuous_batching` says, before anything runs."""
        if self.model.rotary_emb.first_long_length is not None and inputs:
            new_tokens = kwargs.get("max_new_tokens") or (generation_config or self.generation_config).max_new_tokens
            self._refuse_to_reach_long_lengths("continuous batching", max(map(len, inputs)), new_tokens)
        return super().generate_batch(inputs, generation_config, **kwargs)

    def _refuse_to_reach_long_lengths(self, what: str, prompt_length: int, new_tokens: int | None) -> None:
        """With `new_tokens` None nothing limits the answer: the default of continuous batching."""
        first_long_length = self.model.rotary_emb.first_long_length
        longest = math.inf if new_tokens is None else prompt_length + new_tokens
        # The last new token is never fed back.
        if longest - 1 >= first_long_length:
            raise ValueError(
                f"{what} with {self.model.rotary_emb.label} serves up to {first_long_length} tokens per request, prompt and "
                f"new tokens together; these could reach {longest}. Lower max_new_tokens, or use plain generate()"
            )
