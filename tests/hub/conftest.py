"""Small model folders that the tests of releases, pushes and pulls start from."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.hub.release_folders import save_adapter, save_model


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
