"""The routing function against the recorded cases of the released code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from grinmoe.routing_grinmoe import RoutingNoise, sparsemixer
from tests.tolerances import SPARSEMIXER

DATA = Path(__file__).parent / "data" / "sparsemixer"
CASES = json.loads((DATA / "sparsemixer.json").read_text())["cases"]


@pytest.fixture(scope="module")
def tensors():
    return load_file(DATA / "sparsemixer.safetensors")


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", CASES)
def test_weights_choices_and_gradients_match(tensors, name, mode):
    case = CASES[name]
    field = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
    scores = field["scores"].clone().requires_grad_()
    noise = RoutingNoise(torch.stack([field["exp1"], field["exp2"]]), torch.stack([field["u1"], field["u2"]]))
    weights, experts = sparsemixer(scores, 2, case["jitter_eps"], training=mode == "train", noise=noise)
    (weights * field["c"]).sum().backward()

    off_tie = torch.ones(scores.shape[0], dtype=torch.bool)
    off_tie[case.get("tie_rows", [])] = False
    tolerance = SPARSEMIXER[str(scores.dtype).removeprefix("torch.")]
    assert torch.equal(experts[off_tie], field[f"{mode}.selected_experts"][off_tie])
    torch.testing.assert_close(
        weights[off_tie], field[f"{mode}.multipliers"][off_tie], atol=tolerance["multipliers"], rtol=0
    )
    bound = tolerance["grad_scores"] * field["c"].abs().max().item()
    torch.testing.assert_close(scores.grad[off_tie], field[f"{mode}.grad_scores"][off_tie], atol=bound, rtol=0)
    assert weights.isfinite().all() and scores.grad.isfinite().all()
