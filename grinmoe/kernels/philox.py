"""Draws that follow from a counter: (seed, layer, token, draw, expert) to a number, the same on every device.

A kernel needs no state for them, and a recomputed layer draws what it drew before. The generator is Philox4x32-10 (Salmon
et al., "Parallel random numbers: as easy as 1, 2, 3", 2011), which Triton has as `tl.philox`; here it is in torch's int64,
as the reference that router_kernels.py is held to.

Shapes: T tokens, E experts, K draws per token, H hidden size.
"""

from __future__ import annotations

import torch

from ..routing_grinmoe import RoutingNoise

_LOW = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
# The input jitter is no draw of a token: its counters have this in the draw's place.
JITTER_DRAW = 0xFFFFFFFF
# A call serves eight columns of the jitter, a stripe apart: four words, 16 bits for each.
STRIPE = 128
STRIPES = 8

_Words = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def philox(seed: int | torch.Tensor, counter: tuple[torch.Tensor | int, ...]) -> _Words:
    """
    Ten rounds of Philox4x32.

    Args:
        seed: 64 bits, the key; an int, or an int64 tensor of one element.
        counter: four of 32 bits, int64 tensors (broadcast) or ints.

    Returns:
        Four words of 32 bits as int64 tensors.
    """
    key = [seed & _LOW, (seed >> 32) & _LOW]
    c0, c1, c2, c3 = torch.broadcast_tensors(*(torch.as_tensor(word) for word in counter))
    for _ in range(10):
        # int64 wraps, and the bits are those of the unsigned product.
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c2 = ((second >> 32) & _LOW) ^ c1 ^ key[0], ((first >> 32) & _LOW) ^ c3 ^ key[1]
        c1, c3 = second & _LOW, first & _LOW
        key = [(word + step) & _LOW for word, step in zip(key, _WEYL)]
    return c0, c1, c2, c3


def counter_noise(
    seed: int | torch.Tensor,
    stream: int,
    num_tokens: int,
    num_experts: int,
    top_k: int,
    device: torch.device | str = "cpu",
) -> RoutingNoise:
    """
    The draws of one routing decision.

    The counter is (token, expert, draw, stream), and the first word counts. Expert E, one past the last, has the uniform.

    Args:
        seed: see [`philox`].
        stream: the layer.

    Returns:
        Unit exponentials (K, T, E), in steps of 2^-23 of their probability, never 0 or infinite; uniforms (K, T, 1) in
        [0, 1), in steps of 2^-24. float32.
    """
    draws = torch.arange(top_k, device=device).view(-1, 1, 1)
    tokens = torch.arange(num_tokens, device=device).view(1, -1, 1)
    experts = torch.arange(num_experts + 1, device=device).view(1, 1, -1)
    words = philox(seed, (tokens, experts, draws, torch.full_like(draws, stream)))[0]
    exponential = -torch.log(((words[..., :-1] >> 9).float() + 0.5) * 2.0**-23)
    return RoutingNoise(exponential, (words[..., -1:] >> 8).float() * 2.0**-24)


def counter_jitter(
    seed: int | torch.Tensor,
    stream: int,
    num_tokens: int,
    hidden_size: int,
    jitter_eps: float,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """
    Factors of the input jitter, U(1 - eps, 1 + eps) in 2^16 steps, (T, H) in `dtype`.

    Columns come in chunks of 8 stripes of 128. The lanes of a chunk have the counters (token, 128 * chunk + lane,
    2^32 - 1, stream), and stripe s takes the low (s even) or high half of word s // 2.
    """
    chunks = -(-hidden_size // (STRIPE * STRIPES))
    tokens = torch.arange(num_tokens, device=device).view(-1, 1, 1)
    lanes = torch.arange(chunks * STRIPE, device=device).view(1, chunks, STRIPE)
    words = philox(seed, (tokens, lanes, torch.full_like(tokens, JITTER_DRAW), torch.full_like(tokens, stream)))
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    uniform = (torch.stack(halves, dim=2).float() + 0.5) * 2.0**-16  # (T, chunks, stripes, lanes)
    factors = 1.0 + jitter_eps * (2.0 * uniform - 1.0)
    return factors.view(num_tokens, -1)[:, :hidden_size].to(dtype)
