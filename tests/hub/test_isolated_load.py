"""Loading a checkpoint in a process without the package, when that goes wrong. (Going well is in test_release.py.)"""

from __future__ import annotations

import subprocess

import pytest
import torch

from grinmoe import GrinMoeForCausalLM
from grinmoe.hub.isolated_load import LoadElsewhereError, load_elsewhere
from tests.hub.release_folders import save_model


@pytest.mark.integration
def test_other_logits_elsewhere_are_an_error(tmp_path):
    """As if the code in the checkpoint computed something else than the package."""
    folder = save_model(tmp_path / "model")
    input_ids = torch.arange(8)
    with torch.inference_mode():
        logits = GrinMoeForCausalLM.from_pretrained(folder).eval()(input_ids[None]).logits
    with pytest.raises(LoadElsewhereError, match="gives other logits without the package, by 0.001"):
        load_elsewhere(folder, input_ids, logits + 1e-3, quiet=True)


def test_a_process_that_was_killed(tmp_path, monkeypatch):
    killed = subprocess.CompletedProcess([], -9, "", "")
    monkeypatch.setattr("grinmoe.hub.isolated_load.subprocess.run", lambda *arguments, **options: killed)
    with pytest.raises(LoadElsewhereError, match="it was ended by signal 9; memory may have run out"):
        load_elsewhere(tmp_path, torch.arange(8), torch.zeros(1, 8, 8), quiet=True)
