"""What is measured of a forward pass, against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from grinmoe.monitoring.record import RankCounts, RoutingRecord, routing_sums


def test_the_figures_of_fixed_logits_are_those_worked_out_by_hand():
    """Two layers alike of three tokens and a fourth that is padding; eps 0.1 keeps what is within 20 % of the best."""
    logits = torch.tensor([[2.0, 1.9, 1.0, -1.0], [0.0, 0.0, 0.0, 0.0], [1.0, 3.0, 2.9, 2.8], [9.0, 0.0, 0.0, 0.0]])
    # The best two; two of equals; the third, then the best of what it left; padding.
    experts = torch.tensor([[0, 1], [3, 1], [3, 1], [2, 3]])
    weights = torch.tensor([[0.5, 0.5], [0.0, 0.5], [0.0, 0.0], [0.0, 0.0]])
    valid = torch.tensor([1.0, 1.0, 1.0, 0.0])
    sums = routing_sums(logits.expand(2, 4, 4), weights.expand(2, 4, 2), experts.expand(2, 4, 2), valid, 0.1)
    load = torch.tensor([[1, 3, 0, 2]] * 2)
    record = RoutingRecord(1, 1, 1, 2.0, 3, load, sums.double(), torch.zeros(2), torch.zeros(2), 2)
    probs = [[math.exp(z) / sum(map(math.exp, row)) for z in row] for row in logits[:3].tolist()]
    entropy = -sum(p * math.log(p) for row in probs for p in row) / 3
    balance = 4 * sum(count / 3 * sum(row[e] for row in probs) / 3 for e, count in enumerate((1, 3, 0, 2)))
    for layer in range(2):
        assert record.entropy[layer] == pytest.approx(entropy, rel=1e-6)
        assert record.kept_experts[layer] == pytest.approx((2 + 4 + 3) / 3, rel=1e-6)
        assert record.sampled_share[layer] == pytest.approx(1 / 6, rel=1e-6)
        assert record.dropped_share[layer] == pytest.approx(3 / 6, rel=1e-6)
        assert record.balance_loss[layer] == pytest.approx(balance, rel=1e-6)
        assert record.max_over_mean_load[layer] == 2.0
    assert record.tokens_per_s == 1.5


def test_a_closed_expert_is_no_error():
    """-inf closes an expert; only where fewer than K are left is there no choice."""
    counts = RankCounts(1, 4, torch.device("cpu"), 0)
    logits = torch.tensor([[1.0, 2.0, float("-inf"), 0.0], [1.0, float("-inf"), float("-inf"), float("-inf")]])
    weights, experts = torch.ones(2, 2), torch.tensor([[0, 1], [0, 1]])
    counts.add([(logits, weights, experts)], torch.ones(2), None)
    assert counts.impossible.tolist() == [1]
