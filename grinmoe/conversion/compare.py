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

# Of texts that are compared; the released window and some more.
_LONGEST_TEXT = 2304
TOKENS_COMPARED = 256


def text_lengths(config: GrinMoeConfig) -> list[int]:
    """Of a text within the window (and LongRoPE's short factors), and one beyond, where that is not too long to try."""
    most = config.max_position_embeddings
    window = config.visible_keys or most
    original = (config.rope_parameters or {}).get("original_max_position_embeddings", most)
    short, long = min(64, max(2, window // 2), original - 1), min(window + 64, most)
    return sorted({short, long if long <= _LONGEST_TEXT else short})


def why_not_compared(config: GrinMoeConfig, parameters: int, asked: bool) -> str | None:
    """A note, or None where memory has room."""
    if not asked:
        return "logits were not compared, as asked"
    # One model in float32, and the logits of all texts from both.
    needed = 4 * (parameters + 3 * sum(text_lengths(config)) * config.vocab_size)
    if needed > physical_memory_bytes() / 2:
        return f"logits were not compared: that takes {needed / 1e9:.0f} GB, more than half of this machine's memory"
    return None


def warn_of_difference(record: dict[str, Any]) -> None:
    """A note where models that should be equal are not."""
    for one in record["logits"]:
        if not one["difference"] <= 1e-3 * one["largest"]:
            record["notes"].append(
                f"on a text of {one['tokens']} tokens the logits differ by {one['difference']:.2g} of {one['largest']:.3g}: "
                "the result does not compute what its source does"
            )


def random_tokens(config: GrinMoeConfig, lengths: Iterable[int]) -> list[torch.Tensor]:
    """A text (1, S) of random tokens for each length S, the same ones in every run."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(config.vocab_size, (1, length), generator=generator) for length in lengths]


def load_float32(folder: Path, model_class: Any = GrinMoeForCausalLM) -> Any:
    """A checkpoint's model for comparisons, in float32 and evaluation mode."""
    return model_class.from_pretrained(folder, dtype=torch.float32).eval()


def compare_logits(source: tuple[Any, Path], result: tuple[Any, Path], config: GrinMoeConfig) -> list[dict[str, Any]]:
    """
    Largest difference of logits on random tokens, in float32: of a text that fits into the window, and of a longer one.

    Args:
        source, result: the class of a model, and the folder that it loads.
        config: of both, as ours.
    """
    window = config.visible_keys or config.max_position_embeddings
    texts = random_tokens(config, text_lengths(config))
    expected, found = _logits(*source, texts), _logits(*result, texts)
    return [
        {
            "tokens": text.shape[1],
            "window": window,
            "difference": (a - b).abs().max().item(),
            "largest": a.abs().max().item(),
        }
        for text, a, b in zip(texts, expected, found, strict=True)
    ]


def _logits(model_class: Any, folder: Path, texts: list[torch.Tensor]) -> list[torch.Tensor]:
    model = load_float32(folder, model_class)
    with torch.no_grad():
        logits = [model(text, use_cache=False).logits for text in texts]
    del model
    gc.collect()
    return logits


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
