"""How far the result of a conversion is from its source: both are loaded, where memory has room for that, and compared."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from ..configuration_grinmoe import GrinMoeConfig
from ..files import physical_memory_bytes
from ..modeling_grinmoe import GrinMoeForCausalLM
from ..tokenization import load_tokenizer
from .configs import UnequalLogitsError

# Of texts that are compared; the released window and some more. Of a longer one, its last tokens at their positions.
_LONGEST_TEXT = 2304
TOKENS_COMPARED = 256
# Of the largest logit; and the share of positions that may be further off, where a near tie goes to another expert.
TOLERANCE, MAY_BE_OFF = 1e-3, 0.01


def text_lengths(config: GrinMoeConfig) -> list[int]:
    """
    Of a text within the window, and one beyond, where that is not too long to try; and around the length at which RoPE's
    frequencies change (LongRoPE: one less, the original length, one more; dynamic: the same of the longest position).
    """
    most, rope = config.max_position_embeddings, config.rope_parameters or {}
    window = config.visible_keys or most
    switch = {"longrope": rope.get("original_max_position_embeddings"), "dynamic": most}.get(rope["rope_type"])
    short, long = min(64, max(2, window // 2), (switch or most) - 1), min(window + 64, most)
    lengths = {short, long if long <= _LONGEST_TEXT else short}
    lengths |= {switch - 1, switch, switch + 1} if switch else set()
    return sorted(lengths - {0})


def _tokens_of(length: int) -> int:
    return length if length <= _LONGEST_TEXT else TOKENS_COMPARED


def why_not_compared(config: GrinMoeConfig, parameters: int, asked: bool) -> str | None:
    """A note, or None where memory has room."""
    if not asked:
        return "logits were not compared, as asked"
    # One model in float32, and the logits of all texts from both.
    needed = 4 * (parameters + 5 * sum(map(_tokens_of, text_lengths(config))) * config.vocab_size)
    if needed > physical_memory_bytes() / 2:
        return f"logits were not compared: that takes {needed / 1e9:.0f} GB, more than half of this machine's memory"
    return None


def require_equal(rows: list[dict[str, Any]]) -> None:
    """
    Check what `compare_logits` found.

    Raises:
        UnequalLogitsError: more is unexplained than rounding.
    """
    for one in rows:
        if one["positions_off"] > MAY_BE_OFF:
            raise UnequalLogitsError(
                f"on a text of {one['tokens']} tokens the logits differ by {one['unexplained']:.2g} of {one['largest']:.3g} "
                f"(at {one['positions_off']:.0%} of the positions by more than {TOLERANCE:g} of it): the result does not "
                "compute what its source does, and was not kept; please report it (--no-compare writes it all the same)"
            )


def random_tokens(config: GrinMoeConfig, lengths: Iterable[int]) -> list[torch.Tensor]:
    """A text (1, S) of random tokens for each length S, the same ones in every run."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(config.vocab_size, (1, length), generator=generator) for length in lengths]


def load_float32(folder: Path, model_class: Any = GrinMoeForCausalLM) -> Any:
    """A checkpoint's model for comparisons, in float32 and evaluation mode."""
    return model_class.from_pretrained(folder, dtype=torch.float32).eval()


def compare_logits(
    source: tuple[Any, Path],
    result: tuple[Any, Path],
    config: GrinMoeConfig,
    rounding: Callable[[Any], None] | None = None,
    explained: Callable[[Any], None] | None = None,
) -> list[dict[str, Any]]:
    """
    Largest difference of logits on random tokens, in float32, for each of `text_lengths`.

    Args:
        source, result: the class of a model, and the folder that it loads.
        config: of both, as ours.
        rounding: does to the source's weights what the result's dtype did to them.
        explained: takes out of the result's model what is known to make it differ.

    Returns:
        Rows of tokens, window, difference, largest; unexplained, the difference after both changes, and positions_off, the
        share of positions where that is above the tolerance.
    """
    lengths = text_lengths(config)
    texts = random_tokens(config, map(_tokens_of, lengths))
    positions = [
        torch.arange(length - text.shape[1], length).unsqueeze(0) for length, text in zip(lengths, texts, strict=True)
    ]
    expected, rounded = _logits(*source, texts, positions, rounding)
    gc.collect()  # the first model, before the second is loaded
    found, adjusted = _logits(*result, texts, positions, explained)
    rows = []
    for index, length in enumerate(lengths):
        largest = expected[index].abs().max().item()
        left = (rounded[index] - adjusted[index]).abs().amax(-1)  # (1, S)
        rows.append(
            {
                "tokens": length,
                "window": config.visible_keys or config.max_position_embeddings,
                "difference": (expected[index] - found[index]).abs().max().item(),
                "largest": largest,
                "unexplained": left.max().item(),
                "positions_off": 1 - (left <= TOLERANCE * largest).double().mean().item(),  # NaN is off
            }
        )
    return rows


def _logits(
    model_class: Any,
    folder: Path,
    texts: list[torch.Tensor],
    positions: list[torch.Tensor],
    change: Callable[[Any], None] | None,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """A model's logits (1, S, V) of each text, before and after a change of the model."""
    model = load_float32(folder, model_class)

    def logits() -> list[torch.Tensor]:
        return [model(text, position_ids=at, use_cache=False).logits for text, at in zip(texts, positions, strict=True)]

    with torch.no_grad():
        before = after = logits()
        if change is not None:
            change(model)
            after = logits()
    return before, after


def distribution_difference(folder: Path, config: GrinMoeConfig, change: Callable[[Any], None]) -> dict[str, Any]:
    """
    The model's outputs before and after `change(model)`, both by our own code in float32, on one text.

    Returns:
        tokens; text, what they are of; next_token_differs, the share of positions where the likeliest next token is
        another; kl, the mean divergence of the next token's distribution in nats.
    """
    model = load_float32(folder)
    ids, text = _tokens(folder, config)
    with torch.no_grad():
        own = model(ids, use_cache=False).logits[0].log_softmax(-1)
        change(model)
        other = model(ids, use_cache=False).logits[0].log_softmax(-1)
    return {
        "tokens": ids.shape[1],
        "text": text,
        "next_token_differs": (own.argmax(-1) != other.argmax(-1)).double().mean().item(),
        "kl": (own.exp() * (own - other)).sum(-1).mean().item(),
    }


def _tokens(folder: Path, config: GrinMoeConfig) -> tuple[torch.Tensor, str]:
    length = min(TOKENS_COMPARED, config.max_position_embeddings)
    # A checkpoint without a usable tokenizer is compared on random tokens.
    with contextlib.suppress(ValueError, OSError):
        from pydoc_data.topics import topics

        ids = load_tokenizer(folder)("\n\n".join(topics.values())[: 20 * length])["input_ids"][:length]
        return torch.tensor([ids]), "Python's documentation"
    return random_tokens(config, [length])[0], "random tokens"
