"""The scripts that a person runs by hand, at small size."""

from __future__ import annotations

import argparse
import importlib.util
import json

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
    arguments = argparse.Namespace(
        method=method, output=str(tmp_path), seq_length=32, batch_size=2, steps=2, lora_r=4, device="cpu", tiny=True
    )
    result = measure.run(arguments)
    assert len(result["step_seconds"]) == 2 and result["tokens_per_s"] > 0
    assert 0 < result["trained"] < result["parameters"]
    (written,) = tmp_path.glob(f"*-finetune-{method}-tiny-cpu.json")
    assert json.loads(written.read_text())["predicted_gib"] > 0
    assert "tokens/s" in written.with_suffix(".md").read_text()


@pytest.mark.gpu
def test_qlora_of_42b_takes_at_most_40_gb(tmp_path):
    """G11. `python scripts/finetune_42b.py --method qlora --output benchmarks/results` keeps the result."""
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU of 80 GB")
    arguments = argparse.Namespace(
        method="qlora",
        output=str(tmp_path),
        seq_length=2048,
        batch_size=1,
        steps=3,
        lora_r=16,
        device="cuda",
        tiny=False,
    )
    assert script("finetune_42b").run(arguments)["peak_gib"] * 2**30 <= 40e9


def test_without_a_gpu_the_measurement_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no GPU is visible"):
        script("finetune_42b").run(argparse.Namespace(device="cuda"))
