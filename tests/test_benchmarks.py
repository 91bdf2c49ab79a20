"""The benchmarks at sizes where they measure nothing: gates that hold, reports that are whole, help that is instant."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import benchmarks.bench_block as bench_block
import benchmarks.bench_load as bench_load
import benchmarks.bench_lora as bench_lora
import benchmarks.protocol as protocol

ROOT = Path(protocol.__file__).resolve().parents[1]
TINY = bench_block.BlockSettings(tokens=32, hidden_size=64, intermediate_size=24, experts=8, warmup=1, rounds=3)


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(protocol, "RESULTS", tmp_path / "results")
    return tmp_path / "results"


@pytest.mark.parametrize("arguments", [[], ["block"], ["load"], ["lora"]], ids=["all", "block", "load", "lora"])
def test_help_is_instant_and_shows_an_example(arguments):
    script = (
        "import sys, runpy; sys.argv = ['benchmarks', *sys.argv[1:], '--help']\n"
        "try: runpy.run_module('benchmarks', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'transformers'} & sys.modules.keys()"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", script, *arguments], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "example: python -m benchmarks" in done.stdout


@pytest.mark.parametrize("skewed, shares", [(False, [1] * 8), (True, [4, 4, 1, 1, 1, 1, 1, 1])])
def test_the_load_is_what_the_report_says(skewed, shares):
    torch.manual_seed(0)
    chosen = bench_block.choose_experts(20_000, 8, skewed)
    first = torch.bincount(chosen[:, 0], minlength=8).float() / 20_000
    torch.testing.assert_close(first, torch.tensor(shares).float() / sum(shares), atol=0.01, rtol=0)
    assert (chosen[:, 0] != chosen[:, 1]).all()


def test_a_block_report_is_written_whole(results, capsys):
    path = bench_block.run(TINY)
    assert path.parent == results and path.name.endswith("-block-cpu.md")
    facts = json.loads(path.with_suffix(".json").read_text())
    assert set(facts["environment"]) >= {"date", "commit", "command", "cpu", "torch", "transformers"}
    for load in ("even load", "4:1 skewed load"):
        assert f"## {load}" in path.read_text() and set(facts["arms"][load]) == set(bench_block.ARMS)
        for arm in facts["arms"][load].values():
            assert len(arm["seconds"]) == TINY.rounds and arm["relative_error"] < bench_block.GATE
    assert "times faster" in capsys.readouterr().out


def test_an_arm_that_computes_something_else_is_not_timed(results, monkeypatch):
    monkeypatch.setattr(bench_block, "GATE", 1e-12)
    with pytest.raises(RuntimeError, match="nothing was timed"):
        bench_block.run(TINY)
    assert not results.exists()


def test_ratios_are_taken_round_by_round():
    """A machine that becomes slower slows all arms: the ratio stays."""
    fast, slow = protocol.Timing([1.0, 10.0, 100.0]), protocol.Timing([3.0, 30.0, 300.0])
    assert fast.ratio_to(slow) == pytest.approx(3.0)


def test_peak_memory_sees_what_was_held_for_a_moment():
    with bench_load._PeakMemory() as peak:
        block = torch.ones(64 * 2**20, dtype=torch.uint8)
        time.sleep(0.05)
        del block
    assert 0.9 * 64 * 2**20 < peak.above["own"] < 3 * 64 * 2**20


@pytest.mark.slow
def test_loading_and_saving_stay_within_their_limits(results):
    """Two layers, 0.5 GB: own memory at most 1.05 of the checkpoint, saving at most 1.1 of the largest shard."""
    path = bench_load.run(bench_load.LoadSettings(layers=2, rounds=1))
    facts = json.loads(path.with_suffix(".json").read_text())
    ours = facts["arms"]["grinmoe"][0]
    assert ours["load_own_bytes"] <= 1.05 * facts["checkpoint_bytes"]
    assert ours["save_own_bytes"] <= 1.1 * ours["largest_shard_bytes"]


def test_a_lora_report_is_written_whole(results):
    """Tiny; outputs and gradients of all arms are gated in it before anything is timed."""
    settings = bench_lora.LoraSettings(
        tokens=32, hidden_size=32, intermediate_size=48, experts=4, r=4, warmup=1, rounds=2
    )
    path = bench_lora.run(settings)
    facts = json.loads(path.with_suffix(".json").read_text())
    assert "PEFT" in path.read_text()
    assert len(facts["arms"]) >= 2
