"""The benchmarks at sizes where they measure nothing: gates that hold, reports that are whole, help that is instant."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import subprocess
import sys
import time

import pytest
import torch

import benchmarks.bench_block as bench_block
import benchmarks.bench_decode as bench_decode
import benchmarks.bench_layer as bench_layer
import benchmarks.bench_load as bench_load
import benchmarks.bench_lora as bench_lora
import benchmarks.bench_router as bench_router
import benchmarks.bench_train_step as bench_train_step
import benchmarks.block_arms as block_arms
import benchmarks.figure as figure
import benchmarks.floors as floors
import benchmarks.goals as goals
import benchmarks.profiling as profiling
import benchmarks.protocol as protocol
import benchmarks.suite as suite
from grinmoe import GrinMoeConfig
from grinmoe.planning.memory_model import Step
from grinmoe.planning.roofline import flops_per_token
from tests import ROOT

pytestmark = pytest.mark.newest_only  # measures torch, kernels and this machine

TINY = bench_block.BlockSettings(tokens=32, hidden_size=64, intermediate_size=24, experts=8, warmup=1, rounds=3)


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(protocol, "RESULTS", tmp_path / "results")
    return tmp_path / "results"


@pytest.mark.parametrize("name", ["", "block", "load", "lora", "router", "layer", "decode", "train_step", "gpu", "cpu"])
def test_help_is_instant_and_shows_an_example(name):
    script = (
        "import sys, runpy; sys.argv = ['benchmarks', *sys.argv[1:], '--help']\n"
        "try: runpy.run_module('benchmarks', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'transformers'} & sys.modules.keys()"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", script, *filter(None, [name])],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
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
        assert set(facts["arms"][load]) == set(block_arms.block_arms(TINY.size, torch.device("cpu"))[0])
        assert facts["cases"][load]["refused"] == {}
        for arm in facts["arms"][load].values():
            assert len(arm["seconds"]) == TINY.rounds and arm["relative_error"] < bench_block.GATE[torch.float32]
    assert "times faster" in capsys.readouterr().out
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG") and path.stem + ".png" in path.read_text()


def test_where_every_arm_computes_something_else_nothing_is_timed(results, monkeypatch):
    monkeypatch.setattr(bench_block, "GATE", {torch.float32: 1e-12})
    with pytest.raises(RuntimeError, match="nothing was timed"):
        bench_block.run(TINY)
    (report,) = results.glob("*.md")
    assert "was not timed. relative error" in report.read_text() and "step, ms" not in report.read_text()


def test_arms_that_fail_are_not_timed_and_the_others_are(results, monkeypatch):
    def with_wrong_arms(size, device, toy):
        arms, left_out = block_arms.block_arms(size, device, toy)
        right = arms[block_arms.GROUPED].experts.forward

        def refuse(*arguments):
            raise ValueError("no kernel for this device\nand more")

        arms[block_arms.GROUPED].experts.forward = lambda *arguments: 1.01 * right(*arguments)
        arms[block_arms.PHIMOE_GROUPED].experts.forward = refuse
        return arms, left_out

    monkeypatch.setattr(bench_block, "block_arms", with_wrong_arms)
    with pytest.raises(RuntimeError, match=f"{block_arms.PHIMOE_GROUPED}: ValueError.*{block_arms.GROUPED}: relative"):
        bench_block.run(TINY)
    (file,) = results.glob("*.json")
    facts = json.loads(file.read_text())
    assert facts["complete"] and len(facts["cases"]) == 2
    for load, case in facts["cases"].items():
        reasons = case["refused"]
        assert reasons.keys() == {block_arms.GROUPED, block_arms.PHIMOE_GROUPED}
        assert reasons[block_arms.GROUPED].startswith("relative error 0.01 against float64")
        assert reasons[block_arms.PHIMOE_GROUPED] == "ValueError: no kernel for this device"
        assert not reasons.keys() & facts["arms"][load].keys() and block_arms.DEFAULT in facts["arms"][load]


@pytest.mark.integration
def test_a_gpu_s_arms_run_at_toy_size_with_interpreted_kernels(results):
    path = bench_block.run(bench_block.BlockSettings(toy=True))
    assert path.name.endswith("-toy.md") and "times mean nothing" in path.read_text()
    facts = json.loads(path.with_suffix(".json").read_text())
    arms = facts["arms"]["even load, 40 tokens"]
    loop = block_arms.LOOP.format(1)
    assert facts["complete"] and {block_arms.KERNELS, loop, block_arms.DENSE} <= arms.keys()
    least = floors.kept_at_least(40, 64, 32, 2, 4)
    for name in (block_arms.KERNELS, loop):
        assert least <= arms[name]["saved_bytes"] <= 1.1 * least
    assert arms[block_arms.PHIMOE_GROUPED]["saved_bytes"] > 2 * least
    case = facts["cases"]["even load, 40 tokens"]
    assert case["kept_at_least_bytes"] == least
    for name in (block_arms.KERNELS, block_arms.PHIMOE_GROUPED):
        assert sum(case["profile"][name].values()) == pytest.approx(sum(case["kernels"][name].values()))
        assert case["profile"][name][profiling.PRODUCTS] > 0


def test_arms_share_their_weights():
    """The same memory, so that no arm has luck with its values, and memory is that of one block."""
    arms, _ = block_arms.block_arms(TINY.size, torch.device("cpu"), toy=True)
    block_arms.share_weights(arms, torch.eye(8, 64), TINY.size)
    storages = {
        kind: {
            tuple(sorted(parameter.data_ptr() for parameter in block.parameters()))
            for block in arms.values()
            if isinstance(block, block_arms.DenseMlp) == kind
        }
        for kind in (True, False)
    }
    assert [len(found) for found in storages.values()] == [1, 1]
    assert not any(p.is_meta or not p.any() for block in arms.values() for p in block.parameters())


def test_kernels_are_grouped_by_what_they_do():
    kernels = {
        "nvjet_tst_256x128_64x4_2x1_v_bz_coopA_NNT": 8.0,
        "void cutlass::device_kernel<at::cuda::detail::enable_3x_kernel_for_sm9x<GemmUniversal<GroupProblemShape>>>": 4.0,
        "_router_backward_kernel": 2.0,
        "_swiglu_backward_kernel": 1.0,
        "void at::native::vectorized_gather_kernel<16, int>": 0.5,
        "Memset (Device)": 0.25,
    }
    found = profiling.grouped(kernels, step_seconds=16.0)
    assert list(found.values()) == [12.0, 2.0, 1.5, 0.25, 0.25]
    assert profiling.IDLE not in profiling.grouped(kernels)


@pytest.mark.parametrize(
    "tokens, forward_ms, step_ms", [(8192, 3.26, 9.79), (16384, 6.52, 19.57), (32768, 13.05, 39.14)]
)
def test_floors_of_the_released_block_at_790_tflops(tokens, forward_ms, step_ms):
    floor = floors.block_floor_seconds(tokens, 4096, 6400, 2, 790.0)
    assert 1e3 * floor["forward"] == pytest.approx(forward_ms, abs=0.01)
    assert 1e3 * floor["step"] == pytest.approx(step_ms, abs=0.02)
    assert floors.kept_at_least(tokens, 4096, 6400, 2, 2) / 2**30 == pytest.approx(0.0566 * tokens / 1024, rel=0.01)


@pytest.mark.parametrize("tokens, forward_ms, step_ms", [(8192, 4.4, 13.3), (16384, 8.8, 26.6), (32768, 17.6, 53.2)])
def test_floors_of_the_released_layer_at_790_tflops(tokens, forward_ms, step_ms):
    floor = floors.layer_floor_seconds(GrinMoeConfig(), tokens, 4096, 790.0)
    assert 1e3 * floor["forward"] == pytest.approx(forward_ms, rel=0.01)
    assert 1e3 * floor["step"] == pytest.approx(step_ms, rel=0.01)


def test_a_layer_s_floor_counts_what_plan_counts():
    """6 operations per active weight and key. Plan leaves out the scores that are formed again."""
    config = GrinMoeConfig(num_hidden_layers=1, vocab_size=64, eos_token_id=1, pad_token_id=1)
    step = Step(config, "full", 1, 4096, gradient_checkpointing=False)
    found = floors.layer_floor_seconds(config, 4096, 4096, 1e-12)
    again = (floors.ATTENTION_STEP_OVER_FORWARD - floors.STEP_OVER_FORWARD) * 4096 * 4 * 1536.3 * 4096
    assert found["step"] - again == pytest.approx(4096 * flops_per_token(step), rel=2e-3)


def test_a_report_that_is_cut_off_holds_what_was_measured(results):
    report = protocol.Report("block", {"size": 1})
    report.add("first", {"seconds": [1.0]}, "## first")
    facts = json.loads(report.path.with_suffix(".json").read_text())
    assert facts["first"] == {"seconds": [1.0]} and facts["complete"] is False
    text = report.path.with_suffix(".md").read_text()
    assert "Cut off" in text and "## first" in text
    assert "Cut off" not in report.finish().read_text()


def test_a_block_s_report_that_is_cut_off_holds_the_first_load(results, monkeypatch):
    class Killed(BaseException):
        pass

    whole = bench_block.measure

    def cut_off(case, *arguments):
        if case.skewed:
            raise Killed
        whole(case, *arguments)

    monkeypatch.setattr(bench_block, "measure", cut_off)
    with pytest.raises(Killed):
        bench_block.run(TINY)
    (file,) = results.glob("*.json")
    facts = json.loads(file.read_text())
    assert facts["complete"] is False and list(facts["arms"]) == ["even load, 32 tokens"]
    assert len(facts["arms"]["even load, 32 tokens"][block_arms.DENSE]["seconds"]) == TINY.rounds
    text = file.with_suffix(".md").read_text()
    assert "Cut off" in text and "## even load, 32 tokens" in text and "skewed" not in text


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
        for _ in range(3000):  # until the thread has looked
            if peak.above["own"] > 0.9 * 64 * 2**20:
                break
            time.sleep(0.01)
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
    path = bench_lora.run(bench_lora.LoraSettings(toy=True))
    facts = json.loads(path.with_suffix(".json").read_text())
    assert "PEFT" in path.read_text()
    assert len(facts["arms"]) >= 2


def test_router_and_layer_run_at_toy_size_with_interpreted_kernels(results):
    """The kernel's choices and gradients are gated in it; the layer's arms have the same attention."""
    for module, settings in ((bench_router, bench_router.RouterSettings), (bench_layer, bench_layer.LayerSettings)):
        path = module.run(settings(toy=True, warmup=1, rounds=3))
        facts = json.loads(path.with_suffix(".json").read_text())
        assert facts["complete"] and {"fused kernel", "grinmoe_triton"} & facts["arms"].keys()


def test_a_layer_s_arm_that_computes_something_else_is_not_timed(results, monkeypatch):
    monkeypatch.setattr(bench_layer, "GATE", {torch.float32: 1e-12})
    with pytest.raises(RuntimeError, match="against the reference loop"):
        bench_layer.run(bench_layer.LayerSettings(toy=True))
    (file,) = results.glob("*.json")
    assert list(json.loads(file.read_text())["arms"]) == ["dense"]


@pytest.mark.integration
def test_whole_steps_run_at_toy_size(results):
    path = bench_train_step.run(bench_train_step.TrainStepSettings(toy=True))
    facts = json.loads(path.with_suffix(".json").read_text())
    assert facts["complete"] and list(facts["arms"]) == ["dense", "grinmoe", "grinmoe_triton"]
    dense, *sparse = facts["arms"].values()
    for arm in (dense, *sparse):
        assert len(arm["seconds"]) == facts["settings"]["steps"] and arm["failure"] is None
        assert all(0 < part < whole for part, whole in zip(arm["optimizer_seconds"], arm["seconds"], strict=True))
    # Six idle experts of eight, and a router: 3 * 64 * 32 weights each, and 8 * 64.
    assert [arm["parameters"] - dense["parameters"] for arm in sparse] == [6 * 3 * 64 * 32 + 8 * 64] * 2


@pytest.mark.integration
def test_decoding_runs_at_toy_size(results, monkeypatch):
    """Without the compiled arms, which take long to compile."""
    arms_for = bench_decode.arms_for
    monkeypatch.setattr(bench_decode, "arms_for", lambda *size: [arm for arm in arms_for(*size) if not arm.compiled])
    path = bench_decode.run(bench_decode.DecodeSettings(toy=True))
    facts = json.loads(path.with_suffix(".json").read_text())
    assert facts["complete"] and {"batch 1", "batch 2"} == facts["batches"].keys()
    assert len(goals.gpu_decode(facts)) == 2


def measured_block(kernels: float) -> dict:
    """A block's facts as a GPU gives them: one arm's step takes `kernels` seconds."""
    times = {"dense": 9.0, block_arms.PHIMOE_GROUPED: 12.0, block_arms.PHIMOE_EAGER: 30.0, block_arms.KERNELS: kernels}
    facts: dict = {"arms": {}, "cases": {}}
    for tokens in (2048, 8192, 16384, 32768):
        name = f"even load, {tokens} tokens"
        facts["arms"][name] = {
            arm: {"seconds": [1e-3 * seconds] * 3, "saved_bytes": 100, "peak_bytes": 1}
            for arm, seconds in times.items()
        }
        facts["arms"][name][block_arms.PHIMOE_GROUPED]["saved_bytes"] = 240
        groups = {profiling.PRODUCTS: 7e-3, profiling.GLUE: 2e-3, profiling.IDLE: 1e-3}
        facts["cases"][name] = {
            "tokens": tokens,
            "skewed": False,
            "refused": {},
            "kept_at_least_bytes": 95,
            "floor_seconds": {"step": 8e-3},
            "profile": {block_arms.KERNELS: groups},
        }
    return facts


@pytest.mark.parametrize("kernels, met", [(9.2, True), (10.1, False)])
def test_goals_of_a_gpu_are_ratios_of_what_was_measured(kernels, met):
    found = {goal.name: goal for goal in goals.goals_of({"block": measured_block(kernels)}, "gpu")}
    dense = found["G1 block over dense, even load, 32768 tokens"]
    assert dense == ("G1 block over dense, even load, 32768 tokens", "at least 0.97", f"{9 / kernels:.3g}", met)
    assert found["G1 block over dense, even load, 8192 tokens"].met is not False or not met
    assert found["G3 over Transformers' grouped_mm, even load, 16384 tokens"].met is True
    assert found["G3 over Transformers' eager, even load, 8192 tokens"].met == (kernels <= 10)
    assert found["G3 over Transformers' eager, even load, 2048 tokens"].met is None
    assert found["G4 kept over the least, even load, 32768 tokens"].met is True
    assert found["G4 kept over Transformers' grouped_mm, even load, 32768 tokens"].met is True


def test_a_kernel_that_was_refused_meets_no_goal():
    facts = measured_block(9.0)
    name = "even load, 8192 tokens"
    del facts["arms"][name][block_arms.KERNELS]
    facts["cases"][name]["refused"][block_arms.KERNELS] = "relative error 1"
    missed = [goal for goal in goals.goals_of({"block": facts}, "gpu") if name in goal.name]
    assert [(goal.measured, goal.met) for goal in missed] == [("relative error 1", False)]


def test_goals_of_router_and_decoding():
    router = {
        "settings": {"tokens": 32768},
        "arms": {
            "fused kernel": {"seconds": [2e-5] * 3, "launches": 2, "longest_launch_seconds": 16e-6},
            "torch operators": {"seconds": [3e-4] * 3},
        },
    }
    decode = {
        "settings": {"layers": 32, "new_tokens": 128},
        "batches": {"batch 1": {"floor_ms": 3.0, "arms": {"grinmoe, grinmoe_triton": {"seconds": [0.5, 0.6, 0.7]}}}},
    }
    found = goals.goals_of({"router": router, "decode": decode}, "gpu")
    assert [goal.met for goal in found] == [True, True, False, True]
    assert found[-1].measured == "213" and found[-1].wanted == "at least 200"
    decode["settings"]["layers"] = 16
    (scaled,) = goals.gpu_decode(decode)
    assert scaled.measured == "0.64" and scaled.wanted == "at least 0.6"


def test_goals_of_a_cpu():
    block = {"arms": {"even load, 8 tokens": {}}}
    for name, seconds in ((block_arms.DEFAULT, 1.0), (block_arms.PHIMOE_EAGER, 5.0), (block_arms.PHIMOE_GROUPED, 0.9)):
        block["arms"]["even load, 8 tokens"][name] = {"seconds": [seconds] * 3}
    decode = {"batches": {"batch 1": {"arms": {}}}}
    for name, seconds in (("grinmoe, grinmoe", 1.0), ("transformers phimoe, eager", 3.0)):
        decode["batches"]["batch 1"]["arms"][name] = {"seconds": [seconds] * 3}
    one = {"load_own_bytes": 104, "load_s": 0.9, "save_own_bytes": 5, "largest_shard_bytes": 10}
    load = {"checkpoint_bytes": 100, "arms": {"grinmoe": [one], "transformers phimoe": [one | {"load_s": 1.0}]}}
    found = goals.goals_of({"block": block, "decode": decode, "load": load}, "cpu")
    assert [(goal.measured, goal.met) for goal in found] == [
        ("5", True),
        ("0.9", False),
        ("3", True),
        ("1.04", True),
        ("0.9", False),
        ("0.5", True),
    ]


def test_a_picture_has_the_goals_or_says_why_there_is_none(tmp_path, monkeypatch):
    name, markdown = figure.draw_block(tmp_path / "block.png", measured_block(9.5))
    assert name == "block.png" and "(block.png)" in markdown and (tmp_path / name).stat().st_size > 10_000
    assert figure.draw_block(tmp_path / "none.png", {})[0] is None
    monkeypatch.setattr(figure.importlib.util, "find_spec", lambda package: None)
    assert figure.draw_block(tmp_path / "none.png", measured_block(9.5))[1] == "No figure: matplotlib is not installed."


def test_the_suite_goes_on_after_a_part_that_fails(results, monkeypatch):
    """Killed, failed or missing parts are named, and the goals come from what the others, and the killed one, wrote."""

    def child(command, environment, seconds):
        assert environment["TRITON_INTERPRET"] == "1" and "--toy" in command and 0 < seconds <= 120
        name = command[3]
        report = protocol.Report(name, {"tokens": 8}, toy=True)
        if name == "block":
            for key, facts in measured_block(9.0).items():
                report.add(key, facts)
            return None
        report.finish()
        return int(name == "layer")

    parts = [suite.Part("block", 1), suite.Part("layer", 1), suite.Part("lora", 1, package="no_such_package")]
    monkeypatch.setitem(suite.PARTS, "gpu", (*parts, suite.Part("router", 1)))
    monkeypatch.setattr(suite, "run_limited", child)
    with pytest.raises(RuntimeError, match="^layer failed"):
        suite.run(suite.SuiteSettings("gpu", minutes=2.0, toy=True))
    (file,) = results.glob("*-suite-*.json")
    facts = json.loads(file.read_text())
    outcomes = {name: outcome.split()[0] for name, outcome in facts["outcomes"].items()}
    assert outcomes == {"block": "stopped", "layer": "failed", "lora": "left", "router": "done"}
    assert any(goal["name"].startswith("G1") for goal in facts["goals"])
    assert "times mean nothing" in file.with_suffix(".md").read_text()


@pytest.mark.integration
def test_a_part_that_takes_too_long_is_killed_with_its_children(tmp_path):
    """The child holds a lock of the file that its parent opened, so the lock is free when the child is gone."""
    script = (
        "import fcntl, pathlib, subprocess, time; file = open('lock', 'w'); fcntl.flock(file, fcntl.LOCK_EX); "
        "subprocess.Popen(['sleep', '3600'], pass_fds=[file.fileno()]); pathlib.Path('started').touch(); time.sleep(3600)"
    )
    command = [sys.executable, "-S", "-c", f"import os; os.chdir({str(tmp_path)!r}); {script}"]
    seconds = 1.0
    while not (tmp_path / "started").exists():  # it may take longer on a busy machine
        assert suite.run_limited(command, dict(os.environ), seconds=seconds) is None
        seconds *= 2
    with open(tmp_path / "lock") as file:
        for _ in range(600):
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            time.sleep(0.1)
        else:
            pytest.fail("the child is still there")


def test_a_part_that_fails_gives_its_exit_code():
    assert suite.run_limited([sys.executable, "-S", "-c", "raise SystemExit(3)"], dict(os.environ), seconds=600.0) == 3


def test_without_a_gpu_its_benchmarks_are_refused():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ValueError, match="no GPU is visible"):
        suite.run(suite.SuiteSettings("gpu"))
