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
import benchmarks.bench_layer as bench_layer
import benchmarks.bench_load as bench_load
import benchmarks.bench_lora as bench_lora
import benchmarks.bench_router as bench_router
import benchmarks.floors as floors
import benchmarks.protocol as protocol
import benchmarks.suite as suite

ROOT = Path(protocol.__file__).resolve().parents[1]
TINY = bench_block.BlockSettings(tokens=32, hidden_size=64, intermediate_size=24, experts=8, warmup=1, rounds=3)


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(protocol, "RESULTS", tmp_path / "results")
    return tmp_path / "results"


@pytest.mark.parametrize("arguments", [[], ["block"], ["load"], ["lora"], ["router"], ["layer"], ["gpu"]], ids=str)
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
    for load in ("even load, 32 tokens", "4:1 skewed load, 32 tokens"):
        assert f"## {load}" in path.read_text()
        assert set(facts["arms"][load]) == set(bench_block.arms(torch.device("cpu")))
        for arm in facts["arms"][load].values():
            assert len(arm["seconds"]) == TINY.rounds and arm["relative_error"] < bench_block.GATE[torch.float32]
    assert "times faster" in capsys.readouterr().out


def test_an_arm_that_computes_something_else_is_not_timed(results, monkeypatch):
    monkeypatch.setattr(bench_block, "GATE", {torch.float32: 1e-12})
    with pytest.raises(RuntimeError, match="nothing was timed"):
        bench_block.run(TINY)
    (report,) = results.glob("*.md")
    assert "Cut off" in report.read_text() and "step, ms" not in report.read_text()


def test_a_gpu_s_arms_run_at_toy_size_with_interpreted_kernels(results):
    path = bench_block.run(bench_block.BlockSettings(toy=True))
    assert path.name.endswith("-toy.md") and "times mean nothing" in path.read_text()
    facts = json.loads(path.with_suffix(".json").read_text())
    arms = facts["arms"]["even load, 40 tokens"]
    assert facts["complete"] and {bench_block.KERNELS, bench_block.LOOP.format(1), bench_block.DENSE} <= arms.keys()
    least = floors.kept_at_least(40, 64, 32, 2, 4)
    for name in (bench_block.KERNELS, bench_block.LOOP.format(1)):
        assert least <= arms[name]["saved_bytes"] <= 1.1 * least
    assert arms[bench_block.PHIMOE_GROUPED]["saved_bytes"] > 2 * least


@pytest.mark.parametrize(
    "tokens, forward_ms, step_ms", [(8192, 3.26, 9.79), (16384, 6.52, 19.57), (32768, 13.05, 39.14)]
)
def test_floors_of_the_released_block_at_790_tflops(tokens, forward_ms, step_ms):
    floor = floors.block_floor_seconds(tokens, 4096, 6400, 2, 790.0)
    assert 1e3 * floor["forward"] == pytest.approx(forward_ms, abs=0.01)
    assert 1e3 * floor["step"] == pytest.approx(step_ms, abs=0.02)
    assert floors.kept_at_least(tokens, 4096, 6400, 2, 2) / 2**30 == pytest.approx(0.0566 * tokens / 1024, rel=0.01)


def test_a_report_that_is_cut_off_holds_what_was_measured(results):
    report = protocol.Report("block", {"size": 1})
    report.add("first", {"seconds": [1.0]}, "## first")
    facts = json.loads(report.path.with_suffix(".json").read_text())
    assert facts["first"] == {"seconds": [1.0]} and facts["complete"] is False
    text = report.path.with_suffix(".md").read_text()
    assert "Cut off" in text and "## first" in text
    assert "Cut off" not in report.finish().read_text()


def test_a_deadline_ends_the_rounds_alike_for_all_arms():
    timings = protocol.interleave({"a": lambda _: None, "b": lambda _: None}, 2, 50, deadline=time.monotonic() - 1)
    assert [len(t.seconds) for t in timings.values()] == [protocol.FEWEST_ROUNDS] * 2


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


def test_router_and_layer_run_at_toy_size_with_interpreted_kernels(results):
    """The kernel's choices and gradients are gated in it; the layer's arms have the same attention."""
    for module, settings in ((bench_router, bench_router.RouterSettings), (bench_layer, bench_layer.LayerSettings)):
        path = module.run(settings(toy=True, warmup=1, rounds=3))
        facts = json.loads(path.with_suffix(".json").read_text())
        assert facts["complete"] and {"fused kernel", "grinmoe_triton"} & facts["arms"].keys()


def test_the_suite_s_goals_are_ratios_of_what_was_measured():
    times = {"dense": 9.0, "transformers phimoe, grouped_mm": 12.0, "transformers phimoe, eager": 30.0}
    times[bench_block.KERNELS] = 10.0
    arms = {name: {"seconds": [seconds] * 3, "saved_bytes": 2**20} for name, seconds in times.items()}
    router = {"fused kernel": {"seconds": [2e-5] * 3, "launches": 2}, "torch operators": {"seconds": [3e-4] * 3}}
    found = suite.goals({"block": {"arms": {"even load, 8 tokens": arms}}, "router": {"arms": router}})
    assert [row[-1] for row in found] == ["0.900", "1.200", "3.000", "1.0 MiB", "2 launches, 20 us, 15.0 times"]
