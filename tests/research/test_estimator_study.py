"""scripts/estimator_study.py: what it writes, and that its help is instant."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import pytest

from grinmoe.research.enumeration import LOSSES
from tests import ROOT

pytestmark = pytest.mark.newest_only  # pure torch

STUDY = ROOT / "scripts" / "estimator_study.py"


def test_the_studys_help_is_instant():
    """-S: without site-packages, so that an early import of torch would fail."""
    done = subprocess.run([sys.executable, "-S", str(STUDY), "--help"], capture_output=True, text=True, check=True)
    assert "example: python scripts/estimator_study.py" in done.stdout


def test_the_study_writes_numbers_tables_and_a_figure(tmp_path, capsys):
    specification = importlib.util.spec_from_file_location("estimator_study", STUDY)
    study = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(study)
    path = study.main(["--logits", "3", "--seed", "7", "--output", str(tmp_path)])
    assert sorted(file.suffix for file in tmp_path.iterdir()) == [".json", ".md", ".png"]
    facts = json.loads(path.with_suffix(".json").read_text())
    assert facts["environment"]["command"] == "python scripts/estimator_study.py --seed 7 --logits 3"
    assert len(facts["cells"]) == len(study.SETTINGS) * len(LOSSES) * len(study.ARMS)
    joint = [cell for cell in facts["cells"] if cell["arm"] == "joint" and cell["loss"] != "mlp"]
    assert all(cell["relative_error"] < 1e-12 for cell in joint)
    text = path.read_text()
    assert all(f"## {setting}" in text for setting in study.SETTINGS) and facts["environment"]["commit"] in text
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert path.name in capsys.readouterr().out
