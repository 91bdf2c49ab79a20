"""The benchmarks at sizes where they measure nothing: gates that hold, reports that are whole, help that is instant."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from types import SimpleNamespace

import pytest
import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

import benchmarks.bench_block as bench_block
import benchmarks.bench_correctness as bench_correctness
import benchmarks.bench_decode as bench_decode
import benchmarks.bench_experts as bench_experts
import benchmarks.bench_fsdp as bench_fsdp
import benchmarks.bench_layer as bench_layer
import benchmarks.bench_load as bench_load
import benchmarks.bench_lora as bench_lora
import benchmarks.bench_router as bench_router
import benchmarks.bench_train_step as bench_train_step
import benchmarks.block_arms as block_arms
import benchmarks.figure as figure
import benchmarks.floors as floors
import benchmarks.goals as goals
import benchmarks.predictions as predictions
import benchmarks.profiling as profiling
import benchmarks.protocol as protocol
import benchmarks.suite as suite
from grinmoe import GrinMoeConfig, routing_grinmoe
from grinmoe.planning.memory_model import Step
from grinmoe.planning.roofline import flops_per_token
from tests import ROOT

pytestmark = pytest.mark.newest_only  # measures torch, kernels and this machine

TINY = bench_block.BlockSettings(tokens=32, hidden_size=64, intermediate_size=24, experts=8, warmup=1, rounds=3)


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(protocol, "RESULTS", tmp_path / "results")
    return tmp_path / "results"


COMMANDS = [
    "block",
    "correctness",
    "cpu",
    "decode",
    "experts",
    "fsdp",
    "gpu",
    "layer",
    "load",
    "lora",
    "router",
    "train_step",
]


@pytest.mark.parametrize("name", ["", *COMMANDS])
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
    assert set(facts["environment"]) >= {"date", "commit", "command", "cpu", "torch", "transformers", "triton"}
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


def test_arms_whose_router_or_memory_cannot_be_looked_at_are_not_timed_and_the_others_are(results, monkeypatch):
    def with_wrong_arms(size, device, toy):
        arms, left_out = block_arms.block_arms(size, device, toy)
        other, broken = (block_arms.router_of(arms[name]) for name in (block_arms.GROUPED, block_arms.PHIMOE_GROUPED))
        right = other.forward

        def refuse(*arguments):
            raise ValueError("no kernel for this device")

        def others(*arguments):
            logits, weights, selected, *rest = right(*arguments)
            return logits, weights, selected.flip(-1), *rest

        other.forward, broken.forward = others, refuse
        return arms, left_out

    right = bench_block.measure_memory

    def measure_memory(block, *arguments):
        if isinstance(block, block_arms.DenseMlp):
            raise RuntimeError("no hooks in compiled code")
        return right(block, *arguments)

    monkeypatch.setattr(bench_block, "block_arms", with_wrong_arms)
    monkeypatch.setattr(bench_block, "measure_memory", measure_memory)
    with pytest.raises(RuntimeError, match="does not choose what was intended"):
        bench_block.run(TINY)
    (file,) = results.glob("*.json")
    facts = json.loads(file.read_text())
    for load, case in facts["cases"].items():
        assert case["refused"] == {
            block_arms.PHIMOE_GROUPED: "ValueError: no kernel for this device",
            block_arms.GROUPED: "the router does not choose what was intended",
            block_arms.DENSE: "RuntimeError: no hooks in compiled code",
        }
        assert {block_arms.DEFAULT, block_arms.PHIMOE_EAGER} <= facts["arms"][load].keys()


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


def test_a_gpu_s_table_has_peak_memory_and_the_host_s_time():
    arm = {"seconds": [1.0] * 3, "forward_seconds": [0.5] * 3, "saved_bytes": 2**20, "peak_bytes": 2**30}
    arms = {"with host": arm | {"host_seconds": 2e-3}, "without warm-up": arm}
    case = bench_block.Case(32, skewed=False, arms={name: one | {"relative_error": 0.0} for name, one in arms.items()})
    header, _, *rows = bench_block.table(case, TINY, 1.0).splitlines()
    assert "| peak, GiB | host, ms | error |" in header
    assert [row.split(" | ")[-3:-1] for row in rows] == [["1.00", "2.00"], ["1.00", "nan"]]


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


def test_named_regions_are_no_launches():
    """torch.compile names what it calls, and the profiler shows the name on the device as well."""
    gpu = torch.autograd.DeviceType.CUDA
    kernel = SimpleNamespace(device_type=gpu, is_user_annotation=False)
    region = SimpleNamespace(device_type=gpu, is_user_annotation=True)
    operator = SimpleNamespace(device_type=torch.autograd.DeviceType.CPU, is_user_annotation=False)
    assert list(profiling.on_device([kernel, region, operator])) == [kernel]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        torch.ones(2).sum()
    assert not list(profiling.on_device(profiler.events()))  # the fields exist


@pytest.mark.gpu
def test_launches_are_those_of_the_device():
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    values = torch.ones(2**20, device="cuda")
    launches, longest = profiling.count_launches(lambda _: (values.mul(2), values.add(1)))
    assert launches == 2 and 0 < longest < 1e-3


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


def test_sections_that_grow_are_in_a_report_that_is_cut_off(results, capsys):
    report = protocol.Report("decode", {})
    report.update("batches", {"batch 1": 1}, {"batch 1": "## batch 1\n\none arm"})
    report.update("batches", {"batch 1": 2}, {"batch 1": "## batch 1\n\ntwo arms"})
    report.update("batches", {"batch 1": 2, "batch 8": 1}, {"batch 8": "## batch 8"})
    text = report.path.with_suffix(".md").read_text()
    assert "Cut off" in text and "one arm" not in text and text.index("two arms") < text.index("batch 8")
    assert capsys.readouterr().out == ""
    report.finish()
    assert capsys.readouterr().out.count("two arms") == 1


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


class SimulatedGpu:
    """A device with one queue beside a host, both with clocks of their own."""

    def __init__(self):
        self.now = self.free_at = 0.0

    def launch(self, device_seconds: float, host_seconds: float = 5e-6) -> None:
        self.now += host_seconds
        self.free_at = max(self.free_at, self.now) + device_seconds

    def synchronize(self) -> None:
        self.now = max(self.now, self.free_at)

    def event(self):
        gpu = self

        class Event:
            def record(self):
                self.at = max(gpu.free_at, gpu.now)

            def query(self) -> bool:
                return gpu.now >= self.at

            def synchronize(self):
                gpu.now = max(gpu.now, self.at)

            def elapsed_time(self, other) -> float:
                return 1e3 * (other.at - self.at)

        return Event()


@pytest.fixture
def gpu(monkeypatch) -> SimulatedGpu:
    device = SimulatedGpu()
    monkeypatch.setattr(protocol.time, "perf_counter", lambda: device.now)
    return device


def test_the_host_s_time_is_not_charged_to_short_kernels(gpu):
    """50 kernels of 3 us that the host needs 20 us each to launch take 150 us of the device, not a millisecond."""
    clock = protocol.DeviceClock(lambda: gpu.launch(250e-6), gpu.event, gpu.synchronize)
    assert clock.fill_seconds == pytest.approx(250e-6)

    def short_kernels():
        for _ in range(50):
            gpu.launch(3e-6, host_seconds=20e-6)

    host_seconds = clock.host_seconds(short_kernels)
    assert host_seconds == pytest.approx(1e-3)
    seconds, queued = clock.measure(short_kernels, host_seconds)
    assert seconds == pytest.approx(150e-6) and queued


def test_an_arm_that_waits_for_the_device_is_told_apart(gpu):
    clock = protocol.DeviceClock(lambda: gpu.launch(250e-6), gpu.event, gpu.synchronize)

    def waits():
        for _ in range(10):
            gpu.launch(3e-6, host_seconds=20e-6)
            gpu.synchronize()

    seconds, queued = clock.measure(waits, clock.host_seconds(waits))
    assert seconds > 180e-6 and not queued


def test_rounds_on_a_gpu_have_the_device_s_and_the_host_s_time(gpu, monkeypatch):
    clock = protocol.DeviceClock(lambda: gpu.launch(250e-6), gpu.event, gpu.synchronize)
    monkeypatch.setattr(protocol.DeviceClock, "of", lambda device: clock)
    arms = {"a": lambda _: gpu.launch(1e-3, 2e-4), "b": lambda _: gpu.launch(2e-3, 1e-4)}
    timings = protocol.interleave(arms, 2, 6, torch.device("cuda"))
    assert [len(timing.seconds) for timing in timings.values()] == [6, 6]
    assert timings["a"].host_ms == pytest.approx(0.2) and timings["a"].median_ms == pytest.approx(1.0)
    facts = timings["b"].facts()
    assert facts["seconds"] == pytest.approx([2e-3] * 6) and facts["queued"] == 1.0
    assert facts["host_seconds"] == pytest.approx(1e-4)


def test_quartiles_of_few_rounds_lie_within_them():
    assert protocol.Timing([1.0, 3.0]).quartiles_ms == (1500.0, 2500.0)


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


def test_experts_of_a_step_are_counted_without_kernels(monkeypatch):
    """A kernel that a device does not take refuses its arms, not the whole benchmark of decoding."""
    options = bench_decode.DecodeSettings(toy=True).for_device(torch.device("cpu"))
    models = bench_decode.build_pair(bench_decode.model_config(1, False, toy=True), torch.device("cpu"), torch.float32)
    prompts = bench_decode.draw_prompts(models[bench_decode.OURS].config, 2, options, torch.device("cpu"))

    def refuse(*arguments):
        raise ValueError("no kernel for this device")

    for name in ("grinmoe", "grinmoe_cpu", "grinmoe_triton", "grouped_mm", "batched_mm"):
        monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS, name, refuse)
    assert 1 <= bench_decode.experts_per_step(models, prompts, options) <= 4


def test_a_lora_report_is_written_whole(results):
    """Tiny; outputs and gradients of all arms are gated in it before anything is timed."""
    path = bench_lora.run(bench_lora.LoraSettings(toy=True))
    facts = json.loads(path.with_suffix(".json").read_text())
    assert "PEFT" in path.read_text()
    assert len(facts["arms"]) >= 2


@pytest.fixture
def other_last_bits(monkeypatch):
    """Probabilities a float32's last bit lower before they are rounded: as a GPU's exponential may give them."""
    exact = routing_grinmoe.masked_softmax

    def lower(logits, remaining, jitter_eps):
        probs, dropped = exact(logits, remaining, jitter_eps)
        in_float32 = torch.softmax(remaining.double().masked_fill(dropped, float("-inf")), dim=-1).float()
        return (in_float32 * (1 - 2**-23)).to(probs.dtype), dropped

    def route(*arguments):
        with monkeypatch.context() as patch:
            patch.setattr(routing_grinmoe, "masked_softmax", lower)
            return routing_grinmoe.route(*arguments)

    return route


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gates_of_the_router_forgive_the_last_bit_and_nothing_else(monkeypatch, other_last_bits, dtype):
    """Otherwise 69 of 32768 tokens in bfloat16, whose two best probabilities are next to each other, refuse the kernel."""
    torch.manual_seed(0)
    logits = torch.randn(32768, 16).to(dtype).requires_grad_()
    upstream = torch.randn(32768, 2).to(dtype)
    noise = bench_router.counter_noise(bench_router.SEED, 0, 32768, 16, 2)
    right, wrong = (other_last_bits(logits, 2, 0.01, True, noise) for _ in range(2))
    assert bench_router.gate_error(logits, upstream, right.routing_weights) <= bench_router.GATE[dtype]
    compared = bench_router.decided(logits, right.selected_experts)
    assert compared.float().mean() > 0.95 and bool(compared.all()) == (dtype == torch.float32)
    factors = torch.ones(32768, 2, dtype=dtype)
    factors[compared.nonzero()[0]] = 0.5
    error = bench_router.gate_error(logits, upstream, wrong.routing_weights * factors)
    assert error > bench_router.GATE[dtype]

    def fused(logits, top_k, jitter_eps, training, estimator, seed, stream):
        noise = bench_router.counter_noise(seed, stream, *logits.shape, top_k)
        return other_last_bits(logits, top_k, jitter_eps, training, noise, estimator)

    monkeypatch.setattr("grinmoe.kernels.triton_router.fused_route", fused)
    for estimator in ("sparsemixer_v2", "sparsemixer_v2_star"):
        error = bench_correctness.router_error(estimator, dtype, 1025, True, False, torch.device("cpu"))
        assert error <= bench_correctness.LIMIT[dtype]


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


@pytest.fixture
def plain_decode(monkeypatch):
    """Without the compiled arms, which take long to compile."""
    arms_for = bench_decode.arms_for
    monkeypatch.setattr(bench_decode, "arms_for", lambda *size: [arm for arm in arms_for(*size) if not arm.compiled])


@pytest.mark.integration
def test_decoding_runs_at_toy_size(results, plain_decode):
    path = bench_decode.run(bench_decode.DecodeSettings(toy=True))
    facts = json.loads(path.with_suffix(".json").read_text())
    assert facts["complete"] and {"batch 1", "batch 2"} == facts["batches"].keys()
    assert facts["refused"] == {} and "## batch 2" in path.read_text()
    assert [goal.name for goal in goals.gpu_decode(facts)] == [
        "G6 decode, batch 1, 1 layers, share of the floor",
        "decode over Transformers' phimoe, batch 1",
        "G6 decode, batch 2, 1 layers, share of the floor",
        "decode over Transformers' phimoe, batch 2",
    ]


@pytest.mark.integration
def test_an_arm_with_another_token_is_refused_and_the_others_are_timed(results, plain_decode, monkeypatch):
    whole = bench_decode.runner

    def with_one_other_token(models, arm, options):
        generate = whole(models, arm, options)

        def flipped(prompts):
            tokens = generate(prompts)
            if arm.implementation == "grinmoe_triton":
                tokens[1, 2] ^= 1
            return tokens

        return flipped

    monkeypatch.setattr(bench_decode, "runner", with_one_other_token)
    with pytest.raises(RuntimeError, match="grinmoe, grinmoe_triton: in float32 .* token 2 of row 1"):
        bench_decode.run(bench_decode.DecodeSettings(toy=True))
    (file,) = results.glob("*.json")
    facts = json.loads(file.read_text())
    kernels = ["grinmoe, grinmoe_triton, captured", "grinmoe, grinmoe_triton"]
    assert facts["complete"] and list(facts["refused"]) == kernels
    for batch in facts["batches"].values():
        assert list(batch["arms"]) == ["transformers phimoe, grouped_mm", "grinmoe, grinmoe"]
        assert all(len(arm["seconds"]) == 1 for arm in batch["arms"].values())


def test_decoding_on_a_gpu_begins_with_what_its_goal_is_about():
    """No arm of Transformers' eager loop. The captured step, which takes seconds, then the compiled one, at every batch."""
    arms = bench_decode.arms_for(torch.device("cuda"), toy=False)
    stages = bench_decode.stages(arms, bench_decode.DecodeSettings(), one_by_one=True)
    assert [(batch, arm.name) for batch, (arm,) in stages[:6]] == [
        (batch, f"grinmoe, grinmoe_triton, {form}")
        for form in ("captured", "static and compiled")
        for batch in (1, 8, 32)
    ]
    # What they are compared with comes before our other arms.
    assert {arm.name for _, (arm,) in stages[6:9]} == {"transformers phimoe, grouped_mm"}
    assert "transformers phimoe, eager" not in {arm.name for arm in arms}


def test_arms_on_a_gpu_warm_up_with_every_length_that_is_measured(monkeypatch):
    counts = []
    monkeypatch.setattr(
        bench_decode, "runner", lambda models, arm, options: lambda _: counts.append(options.new_tokens)
    )
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    options, arm = bench_decode.DecodeSettings(), bench_decode.Arm(bench_decode.OURS, "grinmoe")
    for device in ("cpu", "cuda"):
        prompts = SimpleNamespace(device=torch.device(device))
        bench_decode.warm_up({}, arm, bench_decode.runner({}, arm, options), prompts, options)
    assert counts == [8, 128]


@pytest.mark.integration
def test_every_kernel_is_right_in_the_interpreter(results):
    path = bench_correctness.run(bench_correctness.CorrectnessSettings(toy=True))
    facts = json.loads(path.with_suffix(".json").read_text())
    assert facts["complete"] and len(facts["checks"]) > 60
    (goal,) = goals.correctness(facts)
    assert goal.met and goal.name in predictions.PREDICTIONS


def test_a_kernel_that_is_wrong_is_refused_by_name_and_the_others_are_checked(results, monkeypatch):
    def raises():
        raise ValueError("no such kernel\nand more")

    wrong = [
        bench_correctness.Check("right", lambda: 1e-6, 2e-5),
        bench_correctness.Check("raises", raises, 2e-5),
        bench_correctness.Check("not a number", lambda: float("nan"), 2e-5),
        bench_correctness.Check("too far", lambda: 1e-3, 0.0),
        bench_correctness.Check("right too", lambda: 0.0, 0.0),
    ]
    monkeypatch.setattr(bench_correctness, "checks", lambda device, toy: iter(wrong))
    with pytest.raises(RuntimeError, match="^3 of 5 checks were refused: raises; not a number; too far$"):
        bench_correctness.run(bench_correctness.CorrectnessSettings(toy=True))
    (file,) = results.glob("*.json")
    facts = json.loads(file.read_text())
    assert facts["complete"] and facts["checks"]["raises"]["refused"] == "ValueError: no such kernel"
    assert "| too far | 1.0e-03 | exact |" in file.with_suffix(".md").read_text()
    assert [goal.met for goal in goals.correctness(facts)] == [False]


@pytest.mark.parametrize("kernel", ["combine", "gather_rows", "swiglu", "place_rows", "swiglu_backward"])
def test_a_check_sees_a_wrong_kernel(kernel, monkeypatch):
    import grinmoe.kernels.permute_kernels as kernels

    right = getattr(kernels, kernel)

    def a_little_wrong(*arguments, **options):
        result = right(*arguments, **options)
        (result[0] if isinstance(result, tuple) else result).view(-1)[:1].add_(1)
        return result

    error = bench_correctness.PERMUTE_ERRORS[kernel]
    arguments = bench_correctness.SMALL, 5, torch.float32, torch.device("cpu"), False
    assert error(*arguments) < 1e-6
    monkeypatch.setattr(kernels, kernel, a_little_wrong)
    assert not error(*arguments) < 1e-3


def test_an_error_that_is_not_a_number_is_seen():
    ones, nan, zeros = torch.ones(2), torch.tensor([1.0, float("nan")]), torch.zeros(2)
    assert bench_correctness.error_of([ones], [ones]) == 0.0
    assert bench_correctness.error_of([ones, nan], [ones, ones]) != bench_correctness.error_of([ones], [ones])
    assert bench_correctness.error_of([ones / 4], [zeros]) == 0.25
    assert bench_correctness.error_of([torch.empty(0)], [torch.empty(0)]) == 0.0


@pytest.mark.integration
def test_experts_of_few_tokens_run_at_toy_size(results):
    path = bench_experts.run(bench_experts.ExpertsSettings(toy=True))
    facts = json.loads(path.with_suffix(".json").read_text())
    assert facts["complete"] and list(facts["cases"]) == ["1 tokens", "10 tokens"]
    for case in facts["cases"].values():
        assert case["arms"].keys() == {"grinmoe_triton", "batched_mm", "grouped_mm", "grinmoe"}
        assert case["bytes_read"] == case["experts_read"] * 4 * 3 * 64 * 32
    assert len(goals.experts(facts)) == 6
    (tiles,) = facts["tiles"].values()
    assert tiles["refused"] == {} and len(tiles["arms"]) == 1 + 4 + 3


@pytest.mark.integration
def test_fsdp_on_one_rank_runs_at_toy_size(results):
    path = bench_fsdp.run(bench_fsdp.FsdpSettings(toy=True))
    facts = json.loads(path.with_suffix(".json").read_text())
    plain, sharded = facts["arms"].values()
    assert facts["complete"] and plain["losses"] == pytest.approx(sharded["losses"], abs=1e-3)
    assert len(goals.fsdp(facts)) == 1 and not torch.distributed.is_initialized()


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
    assert dense[:4] == ("G1 block over dense, even load, 32768 tokens", "at least 0.97", f"{9 / kernels:.3g}", met)
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
    assert found[-1].measured == "213 (grinmoe, grinmoe_triton)" and found[-1].wanted == "at least 200"
    decode["settings"]["layers"] = 16
    (scaled,) = goals.gpu_decode(decode)
    assert scaled.value == pytest.approx(0.64) and scaled.wanted == "at least 0.6"
    refused = goals.router(
        {"settings": router["settings"], "arms": {}, "refused": {"fused kernel": "relative error 1"}}
    )
    assert [(goal.measured, goal.met) for goal in refused] == [("relative error 1", False)]


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

    def child(command, environment, seconds, look):
        assert environment["TRITON_INTERPRET"] == "1" and "--toy" in command and 0 < seconds <= 240
        name = command[3]
        report = protocol.Report(name, {"tokens": 8}, toy=True)
        if name == "block":
            for key, facts in measured_block(9.0).items():
                report.add(key, facts)
            return None
        report.finish()
        return int(name == "layer")

    parts = [suite.Part("block", 1), suite.Part("layer", 1), suite.Part("lora", 1, packages=("no_such_package",))]
    monkeypatch.setitem(suite.PARTS, "gpu", (*parts, suite.Part("router", 1)))
    monkeypatch.setattr(suite, "run_limited", child)
    with pytest.raises(RuntimeError, match="^layer failed"):
        suite.run(suite.SuiteSettings("gpu", minutes=4.0, toy=True))
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


def everything_measured() -> dict[str, dict]:
    """Reports of all of a GPU's benchmarks at full size, with made-up numbers."""
    seconds = {"seconds": [1.0] * 3, "failure": None}
    experts = dict.fromkeys(("grinmoe_triton", "batched_mm", "grouped_mm"), seconds)
    decode = {name: {"seconds": [1.0]} for name in ("grinmoe, grinmoe_triton", "transformers phimoe, grouped_mm")}
    router = seconds | {"launches": 2, "longest_launch_seconds": 1e-6}
    block = measured_block(9.0)
    for arms in block["arms"].values():
        arms |= {block_arms.DENSE_FUSED: arms["dense"], block_arms.QUACK: arms[block_arms.KERNELS]}
    return {
        "correctness": {"checks": {"one": {"error": 0.0}}},
        "block": block,
        "router": {"settings": {"tokens": 32768}, "arms": {"fused kernel": router, "torch operators": seconds}},
        "experts": {
            "cases": {
                f"{tokens} tokens": {"arms": experts, "refused": {}, "floor_seconds": 0.5}
                for tokens in bench_experts.ExpertsSettings().tokens
            }
        },
        "layer": {"settings": {"tokens": 16384}, "arms": {"dense": seconds, "grinmoe_triton": seconds}},
        "decode": {
            "settings": {"layers": 32, "new_tokens": 128},
            "batches": {f"batch {batch}": {"floor_ms": 3.0, "arms": decode} for batch in (1, 8, 32)},
        },
        "lora": {"arms": {"ExpertLora, grouped_mm": {"ratio_to_peft": 1.5}}},
        "finetune": {"method": "qlora", "layers": 32, "peak_gib": 25.0, "tokens_per_s": 4000.0},
        "train_step": {"arms": {"dense": seconds, "grinmoe": seconds, "grinmoe_triton": seconds}},
        "fsdp": {"arms": {"autocast, no FSDP": {"seconds": [1.0]}, "FSDP2 on one rank": {"seconds": [1.0]}}},
    }


def test_every_prediction_is_of_something_that_is_measured():
    reports = everything_measured()
    assert reports.keys() == {part.name for part in suite.PARTS["gpu"]}
    names = {goal.name for goal in goals.goals_of(reports, "gpu")}
    names |= {goal.name for goal in goals.finetune(reports["finetune"] | {"method": "lora"})}
    assert predictions.PREDICTIONS.keys() <= names
    # And every goal with a number has its prediction, QuACK's but for the first.
    asked = {goal.name for goal in goals.goals_of(reports, "gpu") if goal.wanted != "-"}
    asked = {name for name in asked if "quack" not in name}
    small = {name for name in asked if name.startswith("G4") and "32768" not in name}
    assert asked - small <= predictions.PREDICTIONS.keys()


@pytest.mark.parametrize("name", [part.name for part in suite.PARTS["gpu"]])
def test_goals_of_a_report_that_was_cut_off_at_once(name):
    whole = everything_measured()[name]
    begun = {key: whole[key] for key in ("settings", "method", "layers") if key in whole}
    assert goals.goals_of({name: begun}, "gpu") == []


def test_predictions_in_the_documentation_are_those_that_the_suite_prints():
    assert predictions.table() in (ROOT / "docs" / "performance.md").read_text()


@pytest.mark.parametrize(
    "measured, said", [(0.849, "below"), (0.866, "yes"), (0.9, "yes"), (0.951, "above"), (None, "-")]
)
def test_a_measurement_is_held_against_its_prediction(measured, said):
    assert predictions.verdict(predictions.Prediction("a", 0.87, 0.94, ""), measured) == said


def test_the_suite_shows_predictions_beside_measurements():
    shown = suite.table(goals.goals_of({"block": measured_block(9.0)}, "gpu"), toy=False)
    name = "G1 block over dense, even load, 16384 tokens"
    prediction = predictions.PREDICTIONS[name]
    assert f"| {name} | at least 0.95 | {prediction.text} | 1 | yes | above |" in shown


def test_three_commands_of_a_gpu_fit_into_their_time():
    """Each of at most ten minutes with a reserve, and 25 together."""
    minutes = [suite.SuiteSettings("gpu", part=number).usual_minutes for number in (1, 2, 3)]
    assert max(minutes) <= 9 and sum(minutes) <= 25
    assert {part.name for part in suite.PARTS["gpu"]} >= {"correctness", "decode", "finetune", "fsdp"}
    decode = next(part for part in suite.PARTS["gpu"] if part.name == "decode")
    assert decode.minutes == 4.0


def test_minutes_are_shared_and_starting_is_not():
    parts = (suite.Part("a", 3.0), suite.Part("b", 1.0))
    assert suite.share_of(parts, 4.0 + 2 * suite.START_MINUTES) == pytest.approx(3.0)
    # The first took longer: the rest is the second's.
    assert suite.share_of(parts[1:], 0.5 + suite.START_MINUTES) == pytest.approx(0.5)


@pytest.mark.parametrize(
    "options, message", [({"part": 4}, "--part 4: give 1 to 3"), ({"only": ("blocks",)}, "--only blocks: ch")]
)
def test_parts_that_do_not_exist_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        suite.run(suite.SuiteSettings("gpu", toy=True, **options))


def test_results_are_packed_whenever_one_was_written(results, tmp_path):
    results.mkdir()
    (results / "2020-01-01-block-gpu.json").write_text("{}")
    os.utime(results / "2020-01-01-block-gpu.json", (0, 0))
    began, path = time.time() - 10, tmp_path / "out" / "results.tar.gz"
    archive = suite.Archive(str(path), began)
    archive.update()
    assert not path.exists()
    for name in ("2026-01-01-block-gpu.json", "2026-01-01-block-gpu.partial.md"):
        (results / name).write_text("{}")
    archive.update()
    with tarfile.open(path) as packed:
        assert packed.getnames() == ["results/2026-01-01-block-gpu.json"]
    written = path.stat().st_mtime_ns
    archive.update()
    assert path.stat().st_mtime_ns == written
    (results / "2026-01-01-decode-gpu.json").write_text("{}")
    archive.update()
    with tarfile.open(path) as packed:
        assert len(packed.getnames()) == 2
    assert [file.name for file in path.parent.iterdir()] == ["results.tar.gz"]


def test_results_of_a_part_that_is_killed_are_packed(results, tmp_path, monkeypatch):
    """The archive is written while the part runs, not when it has ended."""
    seen = []
    path = tmp_path / "results.tar.gz"

    def child(command, environment, seconds, look):
        protocol.Report(command[3], {"tokens": 96}, toy=True).add("first", 1)
        look()
        with tarfile.open(path) as packed:
            seen.extend(packed.getnames())
        return None

    monkeypatch.setattr(suite, "run_limited", child)
    suite.run(suite.SuiteSettings("gpu", only=("router",), archive=str(path), toy=True))
    assert any(name.endswith("-router-cpu-toy.json") for name in seen)
    with tarfile.open(path) as packed:
        assert any("-suite-router-cpu-toy.md" in name for name in packed.getnames())


def test_a_part_is_looked_at_while_it_runs(monkeypatch):
    monkeypatch.setattr(suite, "POLL_SECONDS", 0.05)
    looks = []
    command = [sys.executable, "-S", "-c", "import time; time.sleep(0.5)"]
    assert suite.run_limited(command, dict(os.environ), 600.0, lambda: looks.append(1)) == 0
    assert looks


BARE = ("torch", "triton", "transformers", "accelerate", "peft", "safetensors", "numpy")


def installed_with(*packages: str) -> set[str]:
    """Names of these distributions and of all that they require."""
    found, ahead = set(), list(packages)
    while ahead:
        name = re.sub(r"[-_.]+", "-", re.split(r"[^\w.-]", ahead.pop())[0]).lower()
        if name in found:
            continue
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            requirements = importlib.metadata.requires(name) or []
            found.add(name)
            ahead += [one for one in requirements if "extra ==" not in one]
    return found


@pytest.fixture(scope="module")
def bare_environment(tmp_path_factory) -> dict[str, str]:
    """Variables of a process in which only `BARE` can be imported, with what those need; not rich and typer either."""
    allowed = installed_with(*BARE)
    hidden = {"rich", "typer"}
    for module, owners in importlib.metadata.packages_distributions().items():
        if not {re.sub(r"[-_.]+", "-", owner).lower() for owner in owners} & allowed:
            hidden.add(module)
    hidden -= {"grinmoe", "grinmoe_cli"}
    folder = tmp_path_factory.mktemp("bare")
    (folder / "sitecustomize.py").write_text(
        "import importlib.machinery, sys\n"
        f"HIDDEN = {sorted(hidden)!r}\n"
        "class Finder(importlib.machinery.PathFinder):\n"
        "    @classmethod\n"
        "    def find_spec(cls, name, path=None, target=None):\n"
        "        return None if name.partition('.')[0] in HIDDEN else super().find_spec(name, path, target)\n"
        "sys.meta_path[:] = [Finder if f is importlib.machinery.PathFinder else f for f in sys.meta_path]\n"
    )
    return {**os.environ, "PYTHONPATH": str(folder), "HF_HUB_OFFLINE": "1", "TRITON_INTERPRET": "1"}


def test_the_bare_environment_is_bare(bare_environment):
    names = ["rich", "typer", "datasets", "trl", "matplotlib", "bitsandbytes", "pytest", *BARE]
    script = f"import importlib.util as u; print([n for n in {names} if u.find_spec(n)])"
    done = subprocess.run(
        [sys.executable, "-c", script], env=bare_environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str(list(BARE))


@pytest.mark.integration
def test_a_gpu_s_benchmarks_need_torch_triton_and_transformers_alone(bare_environment, tmp_path):
    """All of them, as small as possible, in a copy of the checkout that writes its own results."""
    checkout = tmp_path / "checkout"
    left_out = shutil.ignore_patterns("results", "__pycache__")
    for folder in ("benchmarks", "grinmoe", "scripts"):
        shutil.copytree(ROOT / folder, checkout / folder, ignore=left_out)
    archive = tmp_path / "results.tar.gz"
    command = [sys.executable, "-m", "benchmarks", "gpu", "--toy", "--archive", str(archive)]
    done = subprocess.run(command, cwd=checkout, env=bare_environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    outcomes = dict(re.findall(r"^\| (\w+) \| (.*) \|$", done.stdout, re.MULTILINE))
    for part in suite.PARTS["gpu"]:
        assert outcomes[part.name].startswith("done in"), outcomes
    with tarfile.open(archive) as packed:
        assert len(packed.getnames()) == 2 * len(suite.PARTS["gpu"]) + 2


def test_make_bench_gpu_needs_no_environment_of_ours():
    # Under `make test` make would also print the folder that it enters.
    command = ["make", "-n", "--no-print-directory", "bench-gpu", "PYTHON=some-python"]
    recipe = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert recipe.split() == ["some-python", "-m", "benchmarks", "gpu"]
