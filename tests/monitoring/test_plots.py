"""The picture of a training is drawn for models of any size, and for what was not measured."""

from __future__ import annotations

import pytest
import torch

from grinmoe.monitoring.callback import RoutingMonitor
from grinmoe.monitoring.plots import plot_training
from grinmoe.monitoring.record import RoutingRecord

pytestmark = pytest.mark.newest_only  # draws numbers with matplotlib


def many_layers(records: int, measured: bool) -> RoutingMonitor:
    """As of 32 layers of 16 experts, made up."""
    monitor = RoutingMonitor()
    for index in range(records):
        sums = torch.rand(32, 5 + 32, dtype=torch.float64) * measured
        load = torch.randint(1, 9, (32, 16))
        gradient = torch.rand(32) * measured, torch.full((32,), float(measured))
        monitor.records.append(RoutingRecord(index + 1, index + 1, 1, 1.0, 9, load, sums, *gradient, 2))
    return monitor


@pytest.mark.parametrize("measured", [True, False])
def test_the_picture_takes_models_of_any_size(tmp_path, measured):
    plot_training(many_layers(7, measured), tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 20_000


def test_there_is_no_picture_of_nothing(tmp_path):
    with pytest.raises(ValueError, match="train first"):
        plot_training(RoutingMonitor(), tmp_path / "picture.png")
