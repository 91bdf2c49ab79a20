"""Generation by one captured step: the host launches a CUDA graph for each token, and reads nothing in between.

    decoder = CapturedDecoder(model, batch_size=8, max_length=1024, sampling=Sampling(temperature=0.7))
    output_ids = decoder.generate(input_ids, max_new_tokens=128, seed=0)

`generate` asks the device for every token: its stopping criteria, the inputs of the next step and the choice of a token are
launches of their own. Here model, choice and bookkeeping are one step on tensors that stay where they are: a static cache,
the tokens so far, and which rows have ended. Tokens are those of `generate`; a seed draws what `generate` draws after
`torch.manual_seed`.

Shapes: B rows, S prompt tokens, V vocabulary.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import nn
from transformers import LogitsProcessor, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
from transformers.cache_utils import Cache, StaticLayer

from ..generation_grinmoe import CACHE
from ..modeling_grinmoe import GrinMoeForCausalLM
from ..quantization_grinmoe import PackedExperts

Mode = Literal["eager", "graph", "compiled"]


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; the defaults are those of `generate(do_sample=True)`.

    Attributes:
        temperature: above 0.
        top_k: tokens that are kept; 0 for all.
        top_p: share of the probability that is kept, above 0 and up to 1.
    """

    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0

    def warpers(self) -> list[LogitsProcessor]:
        """Transformers' own, in `generate`'s order. They raise ValueError for values that they do not take."""
        found: list[LogitsProcessor] = []
        if self.temperature != 1.0:
            found.append(TemperatureLogitsWarper(self.temperature))
        if self.top_k != 0:
            found.append(TopKLogitsWarper(self.top_k))
        if self.top_p != 1.0:
            found.append(TopPLogitsWarper(self.top_p))
        return found


class CapturedDecoder:
    """
    A step of generation for B rows of up to `max_length` tokens, prompt included. It serves any number of batches, in turn.

    Args:
        model: in evaluation mode, on one device, with attention "sdpa", or "eager" where `mode` is not "graph".
        batch_size: B.
        max_length: keys of the static cache.
        sampling: None takes the most probable token.
        mode: "graph" captures the step's kernels as they are in a CUDA graph. "compiled" has `torch.compile` write them
            first, for minutes at full size, and captures them where the device is CUDA. "eager" captures nothing and runs
            anywhere.
        eos_token_id: ids that end a row; None for none. By default those of `model.generation_config`.
        pad_token_id: what follows the end of a row; by default that of `model.generation_config`, else the first end.
        read_every: after how many tokens the host asks whether all rows have ended. Up to twice as many are computed for
            nothing; they are not returned.
        fused_qkv: compute queries, keys and values of a layer as one product. Their weights then lie in one storage, under
            the names that they have.
        backend: of `torch.compile`.

    Raises:
        ValueError: a model in training mode, on several devices, or of another class; attention, experts or frequencies
            that the mode cannot capture; a mode that the device does not have; sampling values out of range; with
            `fused_qkv` projections that something adapts, quantises or hooks.
    """

    def __init__(
        self,
        model: GrinMoeForCausalLM,
        batch_size: int,
        max_length: int,
        *,
        sampling: Sampling | None = None,
        mode: Mode = "graph",
        eos_token_id: int | Sequence[int] | Literal["default"] | None = "default",
        pad_token_id: int | None = None,
        read_every: int = 16,
        fused_qkv: bool = False,
        backend: str | Callable = "inductor",
    ):
        _check(model, mode)
        if read_every < 1:
            raise ValueError(f"read_every={read_every} must be at least 1")
        self.model, self.mode, self.read_every = model, mode, read_every
        self.batch_size, self.max_length = batch_size, max_length
        self.device = device = model.device
        ends = model.generation_config.eos_token_id if eos_token_id == "default" else eos_token_id
        ends = [] if ends is None else [ends] if isinstance(ends, int) else list(cast(Sequence[int], ends))
        if pad_token_id is None:
            pad_token_id = model.generation_config.pad_token_id
        self.pad_token_id = pad_token_id if pad_token_id is not None else (ends[0] if ends else 0)
        self.warpers = None if sampling is None else sampling.warpers()
        self.generator = None if sampling is None else torch.Generator(device)

        def numbers(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.ends = torch.tensor(ends, dtype=torch.int64, device=device)
        # As the model's own static cache: the window is left to the mask (`GrinMoeGenerationMixin`).
        layers = range(model.config.num_hidden_layers)
        self.cache = Cache(layers=[StaticLayer(max_cache_len=max_length) for _ in layers])
        self.output = numbers(batch_size, max_length)
        self.mask = numbers(batch_size, max_length)  # 1 for what has not come yet too: attention is causal
        self.token, self.position = numbers(batch_size, 1), numbers(batch_size, 1)
        self.column = numbers(1)  # of the output, where the next token goes
        self.finished = numbers(batch_size, dtype=torch.bool)
        vocabulary = model.config.vocab_size if sampling is not None else 0
        self.noise = numbers(batch_size, vocabulary, dtype=torch.float32)
        self.projections = _FusedProjections(model) if fused_qkv else contextlib.nullcontext()
        self.compute: Callable[[], None] = self._compute
        if mode == "compiled":
            self.compute = torch.compile(self._compute, fullgraph=True, dynamic=False, backend=backend)
        self.step: Callable[[], None] = self._step
        if device.type == "cuda" and mode != "eager":
            self.step = self._captured().replay
        self.addresses = _addresses(model)

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        max_new_tokens: int,
        seed: int | None = None,
    ) -> torch.Tensor:
        """
        The prompt and up to `max_new_tokens` more tokens of each row, as `generate` returns them.

        Args:
            input_ids: (B, S) int64.
            attention_mask: (B, S), 0 for padding on the left; None without padding.
            seed: of the draws; by default from torch's generator.

        Returns:
            (B, S + n) int64, n the length of the longest answer.

        Raises:
            ValueError: another batch size, more than `max_length` tokens, padding elsewhere, an answer that reaches a
                length at which LongRoPE or dynamic RoPE changes the frequencies of what is cached, or weights that have
                been exchanged or moved since the decoder was made. (They may change in place.)
        """
        if _addresses(self.model) != self.addresses:
            raise ValueError("the model's weights are no longer where they were captured; make a new CapturedDecoder")
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(input_ids)
        self._check_prompts(input_ids, mask, max_new_tokens)
        length = input_ids.shape[1]
        self._reset()
        self.output[:, :length] = input_ids
        self.mask[:, :length] = mask
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        self.position.copy_(positions[:, -1:])
        self.column.fill_(length)
        if self.generator is not None:
            self.generator.manual_seed(_random_seed() if seed is None else seed)
        given = {"attention_mask": mask, "position_ids": positions, CACHE: self.cache}
        logits = self.model(input_ids=input_ids, use_cache=True, logits_to_keep=1, **given).logits
        self._draw_noise()
        self._choose(logits[:, -1])
        new_tokens = 1
        flag = _LateFlag(self.device)
        while new_tokens < max_new_tokens:
            if self.ends.numel() and new_tokens % self.read_every == 0 and flag.exchange(self.finished.all()):
                break
            self.step()
            new_tokens += 1
        return self.output[:, : length + self._answer_length(length, new_tokens)].clone()

    def _check_prompts(self, input_ids: torch.Tensor, mask: torch.Tensor, max_new_tokens: int) -> None:
        if input_ids.shape[0] != self.batch_size or input_ids.shape[1] == 0 or mask.shape != input_ids.shape:
            raise ValueError(
                f"input_ids {tuple(input_ids.shape)} and attention_mask {tuple(mask.shape)}: give {self.batch_size} rows of "
                "one or more tokens, and a mask of the same shape"
            )
        if max_new_tokens < 1 or input_ids.shape[1] + max_new_tokens > self.max_length:
            raise ValueError(
                f"max_new_tokens={max_new_tokens} after {input_ids.shape[1]} tokens: give at least 1, and with the prompt "
                f"no more than max_length={self.max_length}"
            )
        if not (mask[:, -1] == 1).all() or (mask.diff(dim=1) < 0).any():
            raise ValueError("attention_mask has padding behind a token; pad prompts on the left")
        rotary, longest = self.model.model.rotary_emb, int(mask.sum(-1).max())
        for total in range(longest + 1, longest + max_new_tokens):  # the last token is never fed back
            if rotary.changes_regime(total, 1):
                raise ValueError(
                    f"at {total} tokens {rotary.label} changes the frequencies of all positions, which a captured step "
                    f"cannot follow; lower max_new_tokens={max_new_tokens}, or use the model's generate()"
                )

    def _reset(self) -> None:
        self.cache.reset()
        self.mask.fill_(1)
        for tensor in (self.token, self.position, self.column, self.finished):
            tensor.zero_()

    def _captured(self) -> torch.cuda.CUDAGraph:
        with torch.no_grad(), torch.cuda.device(self.device):
            # Kernels compile, libraries make their buffers and the cache its tensors before anything is captured.
            side, current = torch.cuda.Stream(), torch.cuda.current_stream()
            side.wait_stream(current)
            with torch.cuda.stream(side):
                for _ in range(3):
                    self._reset()
                    self._step()
                self._reset()
            current.wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            if self.generator is not None:
                graph.register_generator_state(self.generator)
            with torch.cuda.graph(graph):
                self._step()
        return graph

    def _step(self) -> None:
        # Outside of what is compiled, which knows no generator but torch's default one.
        self._draw_noise()
        with self.projections:
            self.compute()

    def _draw_noise(self) -> None:
        if self.generator is not None:
            self.noise.exponential_(generator=self.generator)

    def _compute(self) -> None:
        given = {"attention_mask": self.mask, "position_ids": self.position, CACHE: self.cache}
        self._choose(self.model(input_ids=self.token, use_cache=True, **given).logits[:, -1])

    def _choose(self, logits: torch.Tensor) -> None:
        """Take a token for each row by its logits (B, V), and write down what follows from it."""
        scores = logits.float()
        if self.warpers is not None:
            for warper in self.warpers:
                scores = warper(cast(Any, None), scores)
            # Exponential races: what torch.multinomial computes, without its checks, for which the host waits.
            scores = scores.softmax(dim=-1) / self.noise
        tokens = scores.argmax(dim=-1).masked_fill(self.finished, self.pad_token_id)
        self.finished.logical_or_((tokens[:, None] == self.ends).any(dim=-1))
        self.output.index_copy_(1, self.column, tokens[:, None])
        self.token.copy_(tokens[:, None])
        self.position.add_(1)
        self.column.add_(1)

    def _answer_length(self, start: int, new_tokens: int) -> int:
        """Of the longest row, its end included; `generate` stops there."""
        tokens = self.output[:, start : start + new_tokens]
        ended = (tokens[..., None] == self.ends).any(dim=-1).cummax(dim=1).values  # (B, new_tokens)
        return min(new_tokens, int((~ended.all(dim=0)).sum()) + 1)


def generate_captured(
    model: GrinMoeForCausalLM,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    max_new_tokens: int,
    seed: int | None = None,
    **options: Any,
) -> torch.Tensor:
    """Generate once, by a [`CapturedDecoder`] of these `options`. Capturing takes its time: keep a decoder for several."""
    batch_size, length = input_ids.shape
    decoder = CapturedDecoder(model, batch_size, length + max_new_tokens, **options)
    return decoder.generate(input_ids, attention_mask, max_new_tokens=max_new_tokens, seed=seed)


class _FusedProjections:
    """A context in which each layer's queries, keys and values are one product, of weights that are views of one tensor."""

    def __init__(self, model: GrinMoeForCausalLM):
        self.attentions = [layer.self_attn for layer in model.model.layers]
        self.products: list[Callable[[torch.Tensor], tuple[torch.Tensor, ...]]] = []
        for attention in self.attentions:
            _check_projections(attention)
        for attention in self.attentions:
            linears = _projections(attention)
            widths = [linear.out_features for linear in linears]
            weight = _as_one([linear.weight for linear in linears])
            bias = None if linears[0].bias is None else _as_one([linear.bias for linear in linears])
            self.products.append(functools.partial(_product, widths, weight, bias))

    def __enter__(self) -> None:
        for attention, product in zip(self.attentions, self.products, strict=True):
            attention.project = product

    def __exit__(self, *error: object) -> None:
        for attention in self.attentions:
            del attention.project


def _projections(attention: nn.Module) -> list[nn.Linear]:
    return [cast(nn.Linear, getattr(attention, name)) for name in ("q_proj", "k_proj", "v_proj")]


def _check_projections(attention: nn.Module) -> None:
    linears = _projections(attention)
    plain = all(type(linear) is nn.Linear and type(linear.weight) is nn.Parameter for linear in linears)
    if not plain or any(linear._forward_hooks or linear._forward_pre_hooks for linear in linears):
        kinds = sorted({type(linear).__name__ for linear in linears})
        raise ValueError(
            f"fused_qkv=True needs q_proj, k_proj and v_proj to be plain linear layers without hooks, not {kinds}: merge "
            "adapters, dequantise, or leave it out"
        )
    if len({linear.weight.dtype for linear in linears}) > 1:
        raise ValueError("fused_qkv=True needs q_proj, k_proj and v_proj in one dtype")


def _as_one(parameters: list[torch.Tensor]) -> torch.Tensor:
    """The parameters one below the other; they become views of it, so that nothing is there twice."""
    first, sizes = parameters[0].data, [len(parameter) for parameter in parameters]
    if _is_one(parameters):  # for another decoder of this model, which goes on reading them there
        return first.as_strided((sum(sizes), *first.shape[1:]), first.stride(), first.storage_offset())
    joint = torch.cat([parameter.data for parameter in parameters])
    for parameter, part in zip(parameters, joint.split(sizes), strict=True):
        parameter.data = part
    return joint


def _is_one(parameters: list[torch.Tensor]) -> bool:
    storages = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    ends = [parameter.data_ptr() + parameter.nbytes for parameter in parameters[:-1]]
    contiguous = all(parameter.is_contiguous() for parameter in parameters)
    return contiguous and len(storages) == 1 and ends == [parameter.data_ptr() for parameter in parameters[1:]]


def _product(
    widths: list[int], weight: torch.Tensor, bias: torch.Tensor | None, hidden_states: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    return nn.functional.linear(hidden_states, weight, bias).split(widths, dim=-1)


def _addresses(model: nn.Module) -> list[int]:
    return [parameter.data_ptr() for parameter in model.parameters()]


class _LateFlag:
    """A flag on the device, of which the host reads the value before last, so that it need not wait."""

    def __init__(self, device: torch.device):
        on_cuda = device.type == "cuda"
        self.value = torch.zeros((), dtype=torch.bool, pin_memory=on_cuda)
        self.copied = torch.cuda.Event() if on_cuda else None

    def exchange(self, flag: torch.Tensor) -> bool:
        """What was given the last time (at first False); begin to read `flag`."""
        if self.copied is not None:
            self.copied.synchronize()
        previous = bool(self.value)
        self.value.copy_(flag, non_blocking=True)
        if self.copied is not None:
            self.copied.record()
        return previous


def _random_seed() -> int:
    return int(torch.empty((), dtype=torch.int64).random_())


def _check(model: GrinMoeForCausalLM, mode: Mode) -> None:
    if not isinstance(model, GrinMoeForCausalLM):
        raise ValueError(f"a captured step is for GrinMoeForCausalLM, not {type(model).__name__}; merge adapters first")
    if model.training:
        raise ValueError("the model is in training mode, which draws experts; call model.eval()")
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) > 1:
        raise ValueError(f"the model lies on {sorted(map(str, devices))}, and a captured step runs on one device")
    if mode not in ("eager", "graph", "compiled"):
        raise ValueError(f"mode={mode!r}; choose 'eager', 'graph' or 'compiled'")
    # Before Transformers 5.24 the mask for "eager" copies a number to the device, which no graph can hold; compiled code
    # has it in a kernel.
    if model.config._attn_implementation not in (("sdpa",) if mode == "graph" else ("sdpa", "eager")):
        raise ValueError(
            f"attn_implementation={model.config._attn_implementation!r} does not go with a captured step; choose 'sdpa'"
        )
    if mode == "eager":
        return
    if mode == "graph" and model.device.type != "cuda":
        raise ValueError(f"mode='graph' needs CUDA, and the model is on {model.device}; choose 'eager' or 'compiled'")
    if any(isinstance(module, PackedExperts) for module in model.modules()):
        raise ValueError(f"mode={mode!r}: quantised experts loop on the host; choose mode='eager'")
    if model.config._experts_implementation == "eager":
        raise ValueError(f"mode={mode!r}: experts_implementation='eager' loops on the host; choose 'grinmoe'")
    rotary = model.model.rotary_emb
    if mode == "graph" and rotary.first_long_length is not None:
        raise ValueError(f"mode='graph': the check of {rotary.label}'s lengths waits for the host; choose 'compiled'")
