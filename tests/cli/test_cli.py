"""The command line: instant help, one clear line for what the user can mend."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

import pytest
from safetensors import SafetensorError

import grinmoe_cli
from tests import ROOT


def run_main(*arguments: str) -> int:
    """Exit code, whether argparse raised it or a command returned it."""
    try:
        return grinmoe_cli.main(list(arguments))
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1


def test_version(capsys):
    assert run_main("--version") == 0
    assert capsys.readouterr().out.startswith("grinmoe ")


def test_without_a_command_the_help_is_shown(capsys):
    assert run_main() == 0
    assert "generate" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("generate", "--model", "m", "--prompt", "  "), "the prompt is empty"),
        (("generate", "--model", "m", "--prompt", "x", "--max-new-tokens", "0"), "--max-new-tokens 0"),
        (("generate", "--model", "m", "--prompt", "x", "--temperature", "-1"), "--temperature -1"),
        (("generate", "--model", "m", "--prompt", "x", "--dtype", "int3"), "--dtype 'int3'"),
        (("generate", "--model", "not/there/x", "--prompt", "x"), "there is no folder not/there/x"),
        (("generate", "--model", "./not-there", "--prompt", "x"), "there is no folder ./not-there"),
        (("generate", "--model", str(ROOT / "tests" / "nope"), "--prompt", "x"), "there is no folder"),
        (("demo", "--output", "d", "--steps", "0"), "--steps 0"),
        (("demo", "--output", str(ROOT)), "not empty"),
        (("demo", "--output", str(ROOT / "LICENSE")), "is a file"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_the_user_can_mend_is_one_line_and_exit_code_2(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_main(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith(f"grinmoe {arguments[0]}: ")
    assert len(error.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir()), "nothing is left behind"


def test_a_damaged_checkpoint_is_one_line_and_exit_code_2(goldens, tiny_tokenizer_folder, tmp_path, capsys):
    shutil.copytree(tiny_tokenizer_folder, tmp_path, dirs_exist_ok=True)
    for name in ("config.json", "model.safetensors.index.json"):
        shutil.copy(goldens["golden-a"].folder / name, tmp_path)
    assert run_main("generate", "--model", str(tmp_path), "--prompt", "x") == 2
    assert "which is not there; download that shard again" in capsys.readouterr().err


def test_command_on_a_full_disk_says_so_in_one_line(monkeypatch, capsys, tmp_path):
    import grinmoe.demo

    def full(*arguments, **options):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(grinmoe.demo, "run_demo", full)
    assert run_main("demo", "--output", str(tmp_path / "out")) == 2
    error = capsys.readouterr().err
    assert error.startswith("grinmoe demo: the disk is full: writing to ") and len(error.strip().splitlines()) == 1


def test_command_that_quantises_nothing_says_nothing_of_kernels_for_it(monkeypatch, caplog, tmp_path):
    """bitsandbytes warns when PEFT imports it, on CPUs with bfloat16 instructions."""
    assert run_main("generate", "--model", "./not-there", "--prompt", "x") == 2
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s.", "No module named 'kernels'")
    logger.warning("another warning")
    assert [record.message for record in caplog.records if record.name == logger.name] == ["another warning"]


@pytest.mark.parametrize("kind", ["FIFO", "device", "a link that leads nowhere"])
@pytest.mark.parametrize(
    "command",
    [
        "demo",
        "analyze --model m --text t.txt",
        "export --model m --to phimoe",
        "upcycle --model m --experts 4 --top-k 2",
        "merge --adapter a",
        "compare",
        "evaluate --model m --tasks t.jsonl",
        "tokenizer build --source s",
        "pull --repo a/b",
    ],
)
def test_output_that_is_not_a_folder_is_refused_by_every_command_and_stays(
    command, kind, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    out = Path("out")
    os.mkfifo(out) if kind == "FIFO" else out.symlink_to("/dev/null" if kind == "device" else "nowhere")
    for name in ("m", "a"):
        Path(name).mkdir()
        (Path(name) / "config.json").write_text("{}")
    Path("t.txt").write_text("text")
    Path("t.jsonl").write_text('{"question": "a", "choices": ["x", "y"], "answer": 1}')
    (Path("a") / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "base_model_name_or_path": "m"}')
    before = sorted(Path().rglob("*"))
    assert run_main(*command.split(), "--output", "out") == 2
    assert kind in capsys.readouterr().err
    assert sorted(Path().rglob("*")) == before and not out.is_dir()


def test_an_unknown_command_is_exit_code_2(capsys):
    assert run_main("dance") == 2
    assert "dance" in capsys.readouterr().err


def test_interrupting_before_a_command_runs_is_quiet(monkeypatch, capsys):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(grinmoe_cli, "build_parser", interrupted)
    assert run_main("demo") == 130
    assert capsys.readouterr().err == "\n"


def test_interrupting_is_quiet(monkeypatch, capsys):
    import grinmoe.demo

    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(grinmoe.demo, "run_demo", interrupted)
    assert run_main("demo", "--output", "x") == 130
    assert capsys.readouterr().err.strip() == ""


def test_a_defect_of_ours_keeps_its_traceback(monkeypatch):
    import grinmoe.demo

    def broken(*arguments, **options):
        raise RuntimeError("ours")

    monkeypatch.setattr(grinmoe.demo, "run_demo", broken)
    with pytest.raises(RuntimeError, match="ours"):
        run_main("demo", "--output", "x")
