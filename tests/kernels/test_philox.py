"""Draws from counters: the generator's published answers, and numbers that are what they are said to be."""

from __future__ import annotations

import pytest
import torch

from grinmoe.kernels.philox import counter_jitter, counter_noise, philox


@pytest.mark.parametrize(
    "seed, counter, words",
    [
        (0, (0, 0, 0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        (2**64 - 1, (2**32 - 1,) * 4, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            0x299F31D0A4093822,
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_the_answers_that_the_authors_published(seed, counter, words):
    assert [f"{int(word):08x}" for word in philox(seed, counter)] == words.split()


def test_a_draw_depends_on_its_own_counter_and_nothing_else():
    """More tokens, experts, or draws beside it change nothing; another layer or seed changes everything."""
    few, many = counter_noise(7, 3, 5, 4, 1), counter_noise(7, 3, 50, 16, 2)
    assert torch.equal(few.exponential[0], many.exponential[0, :5, :4])
    for seed, stream in ((8, 3), (7, 4), (7 + 2**32, 3)):
        other = counter_noise(seed, stream, 50, 16, 2)
        assert (other.exponential != many.exponential).all() and (other.uniform != many.uniform).all()


def test_a_seed_on_the_device_is_the_same_seed():
    seed = 2**62 + 12345
    for a, b in zip(counter_noise(seed, 1, 9, 4, 2), counter_noise(torch.tensor([seed]), 1, 9, 4, 2)):
        assert a is b is None or torch.equal(a, b)


def test_exponentials_and_uniforms_are_distributed_as_such():
    """Fixed counters, so no luck: largest distance between the empirical distribution and the true one."""
    noise = counter_noise(1, 0, 5000, 16, 2)
    assert noise.exponential.min() > 0 and noise.exponential.isfinite().all()
    assert noise.uniform.min() >= 0 and noise.uniform.max() < 1
    for values in (1 - torch.exp(-noise.exponential), noise.uniform):
        ordered = values.flatten().double().sort().values
        expected = (torch.arange(ordered.numel()) + 0.5) / ordered.numel()
        assert (ordered - expected).abs().max() < 1.6 / ordered.numel() ** 0.5


def test_the_jitter_is_uniform_in_every_column():
    factors = counter_jitter(1, 0, 4000, 1100, 0.01)
    assert factors.shape == (4000, 1100)
    assert 0.99 <= factors.min() < 0.9901 and 1.0099 < factors.max() <= 1.01
    assert (factors.mean(0) - 1).abs().max() < 5 * 0.01 / 3**0.5 / 4000**0.5
    # No two columns share their draws, halves of one word included.
    some = factors[:, ::37] - 1
    correlation = torch.corrcoef(some.T) - torch.eye(some.shape[1])
    assert correlation.abs().max() < 0.1
    assert (counter_jitter(1, 1, 40, 1100, 0.01) != factors[:40]).float().mean() > 0.99
