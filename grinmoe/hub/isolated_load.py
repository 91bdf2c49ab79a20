"""Load a checkpoint in an isolated process, which cannot import this package, and compare: what its users will do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ..modeling_grinmoe import library_experts


@dataclass(frozen=True)
class Elsewhere:
    """What the checkpoint gave in the isolated process."""

    logits_difference: float  # largest absolute; NaN if one side is not finite
    answers: dict[str, str]  # by prompt
    token_ids: list[list[int]]  # of each text


class LoadElsewhereError(ValueError, RuntimeError):
    """The checkpoint does not load by its own code, or gives other logits than here."""


def logits_without_the_package(model: Any, input_ids: torch.Tensor) -> torch.Tensor:
    """
    What a model gives for (S,) token ids with the experts that a process without the package has.

    Other experts round otherwise, and the difference can be as large as that of a broken weight.

    Returns:
        (1, S, V) logits, (1, labels) or (1, S, H) hidden states of a headless model.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    implementation = base.config._experts_implementation
    base.set_experts_implementation(library_experts(base.config))
    try:
        with torch.inference_mode():
            output = model.eval()(input_ids[None])
    finally:
        base.set_experts_implementation(implementation)
    return output["logits"] if "logits" in output else output["last_hidden_state"]


def load_elsewhere(
    folder: Path,
    input_ids: torch.Tensor,
    logits: torch.Tensor,
    *,
    auto_class: str = "AutoModelForCausalLM",
    prompts: Sequence[str] = (),
    max_new_tokens: int = 0,
    texts: Sequence[str] = (),
    base_model: str | None = None,
    quiet: bool = False,
) -> Elsewhere:
    """
    Load `folder` in a fresh interpreter, with `trust_remote_code` and without this package.

    Args:
        folder: a checkpoint with its code, or an adapter.
        input_ids: (S,) int64.
        logits: (1, S, V), (1, labels) or (1, S, H): what the model gives here for them.
        auto_class: name of the Auto class that loads it.
        prompts: to be answered there, streamed to the terminal, up to `max_new_tokens` each.
        texts: to be tokenized there.
        base_model: folder or Hub id of the model under an adapter.
        quiet: print nothing there.

    Raises:
        LoadElsewhereError: it did not load, the code came from somewhere else, or the logits differ by more than 1e-5.
    """
    request = {
        "auto_class": auto_class,
        "prompts": list(prompts),
        "max_new_tokens": max_new_tokens,
        "texts": list(texts),
        "base_model": base_model,
    }
    answer = _run_isolated(folder, request, {"input_ids": input_ids, "logits": logits.contiguous()}, quiet)
    if not answer["model_module"].startswith("transformers_modules."):
        raise LoadElsewhereError(f"the model came from {answer['model_module']}, not from the code in the checkpoint")
    # Written so that NaN is an error as well.
    if not answer["logits_difference"] <= 1e-5:
        raise LoadElsewhereError(
            f"{folder.name} gives other logits without the package, by {answer['logits_difference']:g}"
        )
    return Elsewhere(answer["logits_difference"], answer["answers"], answer["token_ids"])


def _run_isolated(
    folder: Path, request: dict[str, Any], expected: dict[str, torch.Tensor], quiet: bool
) -> dict[str, Any]:
    """Run isolated_script.py on the checkpoint, and read its answer."""
    with tempfile.TemporaryDirectory(prefix="grinmoe-elsewhere-") as name:
        exchange = Path(name)
        save_file(expected, exchange / "expected.safetensors")
        (exchange / "request.json").write_text(json.dumps(request), encoding="utf-8")
        script = Path(__file__).with_name("isolated_script.py")
        # -P: not this folder on sys.path. A module cache of its own: the code can come from the checkpoint only.
        completed = subprocess.run(
            [sys.executable, "-P", str(script), str(folder.resolve()), str(exchange)],
            cwd=exchange,
            env={**os.environ, "HF_MODULES_CACHE": str(exchange / "modules"), "HF_HUB_OFFLINE": "1"},
            capture_output=quiet,
            text=True,
            stdin=subprocess.DEVNULL,
        )
        if completed.returncode:
            raise LoadElsewhereError(
                f"{folder.name} did not load without the package ({_why(completed)}); nobody else could load it either"
            )
        return json.loads((exchange / "answer.json").read_text(encoding="utf-8"))


def _why(completed: subprocess.CompletedProcess[str]) -> str:
    if completed.returncode < 0:
        return f"it was ended by signal {-completed.returncode}; memory may have run out"
    said = (completed.stderr or "").strip().splitlines()
    return said[-1] if said else f"exit code {completed.returncode}, see above"
