"""The soak of the server, short."""

from __future__ import annotations

import pytest

from benchmarks import bench_soak, protocol


@pytest.mark.slow
@pytest.mark.parametrize("one_at_a_time", [False, True], ids=["batch", "one at a time"])
def test_soak_leaves_no_error_and_nothing_open(tmp_path, monkeypatch, one_at_a_time):
    """`python -m benchmarks soak` runs ten minutes of it."""
    monkeypatch.setattr(protocol, "RESULTS", tmp_path)
    settings = bench_soak.SoakSettings(minutes=0.5, streams=8 if one_at_a_time else 32, one_at_a_time=one_at_a_time)
    assert "None." in bench_soak.run(settings).read_text()
