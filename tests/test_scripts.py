"""The scripts that a person runs by hand, at small size."""

from __future__ import annotations

import argparse
import importlib.util
import json
from types import SimpleNamespace

import pytest
import torch

from tests import ROOT

SCRIPTS = ROOT / "scripts"


def script(name: str):
    specification = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.mark.integration
def test_the_worked_example_runs_and_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    """Some documents and a part of an epoch: what is learned is little, what is written is all."""
    example = script("worked_example")
    arguments = argparse.Namespace(output=str(tmp_path), rows=60, epochs=0.1)
    result = example.run(arguments)
    assert set(result["steps"]) == {"pretrain", "sft", "dpo"}
    assert result["answer_loss"]["sft"] < result["answer_loss"]["pretrain"]
    report = (tmp_path / "report.md").read_text()
    assert "DPO: reward accuracy | 0.0 % |" in report and "grinmoe dpo --config" in report
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "report.json").read_text())["held_out_chats"] == result["held_out_chats"] > 100
    capsys.readouterr()
    again = example.run(arguments)
    assert capsys.readouterr().out.count("is complete already") == 3
    assert again["answer_loss"] == result["answer_loss"]


@pytest.mark.parametrize("method", ["qlora", "lora"])
def test_the_measurement_at_full_size_is_tried_small(tmp_path, method):
    measure = script("finetune_42b")
    options = [
        "--toy",
        "--method",
        method,
        "--output",
        str(tmp_path),
        "--batch-size",
        "2",
        "--steps",
        "2",
        "--lora-r",
        "4",
    ]
    result = measure.run(measure.parser().parse_args(options))
    assert len(result["step_seconds"]) == 2 and result["tokens_per_s"] > 0
    assert 0 < result["trained"] < result["parameters"]
    (written,) = tmp_path.glob(f"*-finetune-{method}-cpu-toy.json")
    facts = json.loads(written.read_text())
    assert facts["complete"] and facts["predicted_gib"] > 0 and facts["layers"] == 2
    text = written.with_suffix(".md").read_text()
    assert "tokens/s" in text and "times mean nothing" in text


def test_a_measurement_that_runs_out_of_memory_keeps_what_it_had(tmp_path, monkeypatch):
    measure = script("finetune_42b")

    def steps(model, arguments):
        yield 2.0
        raise torch.OutOfMemoryError("tried to allocate 3.00 GiB\nand more")

    monkeypatch.setattr(measure, "steps", steps)
    arguments = measure.parser().parse_args(["--toy", "--method", "lora", "--output", str(tmp_path)])
    with pytest.raises(RuntimeError, match="out of memory: tried to allocate 3.00 GiB$"):
        measure.run(arguments)
    (written,) = tmp_path.glob("*.json")
    facts = json.loads(written.read_text())
    assert facts["step_seconds"] == [2.0] and facts["failure"].startswith("out of memory") and not facts["complete"]


def test_a_measurement_ends_with_its_minutes(tmp_path, monkeypatch):
    measure = script("finetune_42b")
    monkeypatch.setattr(measure, "steps", lambda model, arguments: iter([None, 1.0, 1.0]))
    options = ["--toy", "--method", "lora", "--output", str(tmp_path), "--minutes"]
    with pytest.raises(RuntimeError, match="no step was measured within --minutes 0; give more"):
        measure.run(measure.parser().parse_args([*options, "0"]))
    assert len(measure.run(measure.parser().parse_args([*options, "60"]))["step_seconds"]) == 2


@pytest.mark.parametrize("installed, method", [(True, "qlora"), (False, "lora")])
def test_the_method_is_the_one_that_can_run_here(tmp_path, monkeypatch, installed, method):
    measure = script("finetune_42b")
    monkeypatch.setattr(measure.importlib.util, "find_spec", lambda name: installed or None)

    class Begun(Exception):
        pass

    def build(layers, arguments):
        raise Begun(arguments.method)

    monkeypatch.setattr(measure, "build", build)
    with pytest.raises(Begun, match=f"^{method}$"):
        measure.run(measure.parser().parse_args(["--toy", "--output", str(tmp_path)]))


@pytest.mark.parametrize("gigabytes, layers", [(150, 32), (85, 23), (48, 13)])
def test_weights_in_16_bits_have_as_many_layers_as_fit(monkeypatch, gigabytes, layers):
    """A quarter of the memory is left for everything else; all 32 layers take 84 GB."""
    measure = script("finetune_42b")
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=gigabytes * 10**9)
    )
    assert measure.layers(measure.parser().parse_args(["--method", "lora"])) == layers
    assert measure.layers(measure.parser().parse_args(["--method", "qlora"])) == 32
    assert measure.layers(measure.parser().parse_args(["--method", "lora", "--layers", "3"])) == 3


@pytest.mark.gpu
def test_qlora_of_42b_takes_at_most_40_gb(tmp_path):
    """G11. `python -m scripts.finetune_42b --method qlora` keeps the result."""
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU of 80 GB")
    measure = script("finetune_42b")
    options = ["--method", "qlora", "--output", str(tmp_path), "--steps", "3"]
    assert measure.run(measure.parser().parse_args(options))["peak_gib"] * 2**30 <= 40e9


def test_without_a_gpu_the_measurement_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    measure = script("finetune_42b")
    with pytest.raises(SystemExit, match="no GPU is visible"):
        measure.run(measure.parser().parse_args(["--method", "lora"]))
