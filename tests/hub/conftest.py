"""Small model folders that the tests of releases, pushes and pulls start from."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.hub.release_folders import REPO, push_quick, run_cli, save_adapter, save_model


@pytest.fixture(scope="session")
def saved(tmp_path_factory) -> Path:
    """A model and an adapter for it; tests change copies."""
    root = tmp_path_factory.mktemp("saved")
    save_adapter(root / "adapter", save_model(root / "model"))
    return root


@pytest.fixture
def model(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved / "model", tmp_path / "model"))


@pytest.fixture
def adapter(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved / "adapter", tmp_path / "adapter"))


@pytest.fixture
def pushed(hub, model):
    """A repository with a model, tagged v1."""
    push_quick(model, tag="v1")
    hub.requests.clear()
    return hub


@pytest.fixture
def output(tmp_path) -> Path:
    (tmp_path / "pulled").mkdir()
    return tmp_path / "pulled" / "model"


@pytest.fixture
def refused(hub, output, capsys):
    """Run `grinmoe pull`, which must say one thing on standard error and make no folder."""

    def run(*arguments: str, repo: str = REPO, keeps: bool = False) -> str:
        code, _, error = run_cli(capsys, "pull", "--repo", repo, "--output", str(output), *arguments)
        said = [line for line in error.splitlines() if line.startswith("grinmoe pull: ")]
        assert code == 2 and len(said) == 1 and error.rstrip().endswith(said[0]), error
        assert not output.exists()
        assert bool(list(output.parent.iterdir())) == keeps, "what was fetched is kept only where it is of use"
        return said[0]

    return run
