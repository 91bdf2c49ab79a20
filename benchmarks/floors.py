"""The time that nothing can be faster than, and the memory that nothing can do without: arithmetic, not measurement.

T tokens, H hidden size, I expert width, E experts, K experts per token, L layers, S sequence.
"""

from __future__ import annotations

# A backward has twice its forward's products; attention's forms the scores once more, as it keeps none of them.
STEP_OVER_FORWARD, ATTENTION_STEP_OVER_FORWARD = 3.0, 3.5


def block_flops(tokens: int, hidden: int, width: int, top_k: int) -> float:
    """Multiplications and additions of a block's forward; a backward with weight gradients has twice as many."""
    return 2.0 * tokens * top_k * 3 * hidden * width


def block_floor_seconds(tokens: int, hidden: int, width: int, top_k: int, tflops: float) -> dict[str, float]:
    """Seconds of a block's products at `tflops` TFLOP/s: `forward`, and `step` with the backward."""
    forward = block_flops(tokens, hidden, width, top_k) / (tflops * 1e12)
    return {"forward": forward, "step": STEP_OVER_FORWARD * forward}


def layer_floor_seconds(config, tokens: int, sequence: int, tflops: float) -> dict[str, float]:
    """
    Seconds of a decoder layer's products at `tflops` TFLOP/s: `forward`, and `step` with the backward.

    Args:
        config: a `GrinMoeConfig`; attention counts the keys that its window lets a token see.
        tokens: T, in sequences of `sequence`.
    """
    hidden, queries = config.hidden_size, config.num_attention_heads * config.head_size
    keys_and_values = 2 * config.num_key_value_heads * config.head_size
    block = block_flops(tokens, hidden, config.intermediate_size, config.num_experts_per_tok)
    products = block + 2.0 * tokens * hidden * (2 * queries + keys_and_values)
    window = min(config.visible_keys or sequence, sequence)
    # The first `window` tokens see 1, 2, ... keys, the others all of the window.
    seen = (window * (window + 1) / 2 + (sequence - window) * window) / sequence
    attention = 2.0 * tokens * seen * 2 * queries  # scores and values
    rate = tflops * 1e12
    step = STEP_OVER_FORWARD * products + ATTENTION_STEP_OVER_FORWARD * attention
    return {"forward": (products + attention) / rate, "step": step / rate}


def kept_at_least(tokens: int, hidden: int, width: int, top_k: int, element_bytes: int) -> int:
    """Bytes that a backward needs of its forward: the input and the pre-activations. Goal G4 allows 1.1 times that."""
    return element_bytes * (tokens * hidden + tokens * top_k * 2 * width)


__all__ = ["block_floor_seconds", "block_flops", "kept_at_least", "layer_floor_seconds"]
