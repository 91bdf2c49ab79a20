"""What the tests of releases, pushes and pulls share: small folders as people have them, and the command line."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import textwrap
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import grinmoe_cli
from grinmoe import GrinMoeConfig, GrinMoeForCausalLM
from grinmoe.hub.card import CardOverrides
from grinmoe.hub.publish import PushOptions, push
from grinmoe.hub.release import ReleaseOptions
from grinmoe.tokenization import build_tokenizer

REPO = "writer-user/model"
TEXT = ["The quick brown fox jumps over the lazy dog.", "two  spaces\tand 1234"] * 10
CARD = "---\nlicense: mit\n---\n\n# My model\n\nIt was trained on text.\n\n![Training](training.png)\n"
# A picture that holds nothing but its signature.
PICTURE = b"\x89PNG\r\n\x1a\n" + bytes(20)
SHARDS = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
INDEX = "model.safetensors.index.json"


def small_config(vocab_size: int = 320, **overrides) -> GrinMoeConfig:
    """A config whose ids are those of `small_tokenizer`."""
    fields = {
        "hidden_size": 32,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "num_local_experts": 4,
        "sliding_window": 15,
        "bos_token_id": 1,
        "eos_token_id": 309,
        "pad_token_id": 309,
    }
    return GrinMoeConfig(vocab_size=vocab_size, **{**fields, **overrides})


def small_tokenizer(vocab_size: int = 320):
    return build_tokenizer(TEXT, vocab_size)


def save_model(folder: Path, model_class=GrinMoeForCausalLM, max_shard_size: str = "90KB", **overrides) -> Path:
    """A checkpoint of three shards with tokenizer, card, licence and picture."""
    torch.manual_seed(0)
    model = model_class(small_config(**overrides))
    if hasattr(model, "generation_config") and model.generation_config is not None:
        model.generation_config.eos_token_id = [309, 316]  # the end of the text, and of an answer
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    small_tokenizer().save_pretrained(folder)
    (folder / "README.md").write_text(CARD)
    (folder / "LICENSE").write_text("MIT License\n")
    (folder / "training.png").write_bytes(PICTURE)
    return folder


def save_adapter(folder: Path, base: Path) -> Path:
    """A LoRA adapter for a model in the folder `base`, as PEFT saves it: its config and card name that folder."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    model = GrinMoeForCausalLM.from_pretrained(base)
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    get_peft_model(model, lora).save_pretrained(folder)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Every file, hidden ones too."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def edit_json(file: Path, **changes) -> None:
    """Set entries of a JSON file; None removes one."""
    content = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({name: value for name, value in content.items() if value is not None}, indent=2))


def edit_weights(file: Path, change=None, metadata: dict[str, str] | None = None) -> None:
    """Write a shard again, after `change` to its dict of tensors."""
    tensors = load_file(file)
    if change:
        change(tensors)
    save_file(tensors, file, metadata={"format": "pt", **(metadata or {})})


def truncated(weights: bytes) -> bytes:
    """A shard whose header is whole and whose last tensor is not."""
    return weights[: 8 + struct.unpack("<Q", weights[:8])[0] + 64]


def push_quick(folder: Path, repo: str = REPO, base_model: str | None = None, **options) -> str | None:
    """Push without the check that takes seconds."""
    release = ReleaseOptions(load_check=False, card=CardOverrides(base_model=base_model))
    return push(PushOptions(folder, repo, release=release, **options))


def run_cli(capsys, *arguments: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of one command."""
    capsys.readouterr()
    try:
        code = grinmoe_cli.main(list(arguments))
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def run_without_package(script: str, environment: dict[str, str], cwd: Path, *arguments: str) -> dict:
    """Run `script` in a fresh interpreter that cannot import this package; its last line of output is JSON."""
    prelude = "import sys\nsys.modules['grinmoe'] = None\n"
    completed = subprocess.run(
        # -P: not the current folder on sys.path.
        [sys.executable, "-P", "-c", prelude + textwrap.dedent(script), *arguments],
        cwd=cwd,
        env={**environment, "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert completed.returncode == 0, completed.stderr[-3000:]
    return json.loads(completed.stdout.strip().splitlines()[-1])
