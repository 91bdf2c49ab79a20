"""Imports point one way: configuration, routing, kernels <- experts <- block, layout <- checkpoint <- modeling."""

from __future__ import annotations

import ast
import os
import sys
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import get_imports

from tests import ROOT

PACKAGE = ROOT / "grinmoe"

# What each flat file may import of the others. A new file must be entered here, on purpose.
ALLOWED_SIBLINGS = {
    "configuration_grinmoe": set(),
    "estimators_grinmoe": set(),
    "routing_grinmoe": {"estimators_grinmoe"},
    "balance_grinmoe": {"routing_grinmoe"},
    "counter_draws_grinmoe": {"estimators_grinmoe"},
    "router_kernels_grinmoe": set(),
    "triton_router_grinmoe": {
        "counter_draws_grinmoe",
        "estimators_grinmoe",
        "router_kernels_grinmoe",
        "routing_grinmoe",
    },
    "experts_kernels_grinmoe": set(),
    "decode_kernels_grinmoe": set(),
    "generation_grinmoe": {"attention_grinmoe"},
    "experts_grinmoe": {"configuration_grinmoe", "routing_grinmoe"},
    "cpu_experts_grinmoe": {"experts_grinmoe"},
    "triton_experts_grinmoe": {"cpu_experts_grinmoe", "decode_kernels_grinmoe", "experts_kernels_grinmoe"},
    "dispatch_grinmoe": {"cpu_experts_grinmoe", "triton_experts_grinmoe"},
    "block_grinmoe": {
        "configuration_grinmoe",
        "dispatch_grinmoe",
        "estimators_grinmoe",
        "experts_grinmoe",
        "routing_grinmoe",
        "triton_router_grinmoe",
    },
    "attention_grinmoe": {"configuration_grinmoe"},
    "layout_grinmoe": {"configuration_grinmoe", "experts_grinmoe"},
    "upload_grinmoe": {"layout_grinmoe"},
    "quantized_experts_grinmoe": {"experts_grinmoe"},
    "quantization_grinmoe": {"experts_grinmoe", "quantized_experts_grinmoe"},
    "checkpoint_grinmoe": {"configuration_grinmoe", "layout_grinmoe", "quantization_grinmoe", "upload_grinmoe"},
    "modeling_grinmoe": {
        "attention_grinmoe",
        "balance_grinmoe",
        "block_grinmoe",
        "checkpoint_grinmoe",
        "configuration_grinmoe",
        "dispatch_grinmoe",
        "estimators_grinmoe",
        "experts_grinmoe",
        "generation_grinmoe",
        "layout_grinmoe",
        "quantization_grinmoe",
        "quantized_experts_grinmoe",
        "routing_grinmoe",
    },
}
FLAT_FILES = sorted(ROOT.glob("*_grinmoe.py"))
TOKENIZATION_FILES = sorted((ROOT / "tokenization").glob("*.py"))
PACKAGE_FILES = sorted(path for path in PACKAGE.glob("*.py") if not path.is_symlink())
STANDARD_LIBRARY = set(sys.stdlib_module_names)


def imported_modules(path: Path, module_level_only: bool = False) -> set[str]:
    """Dotted names of what a file imports; relative imports start with dots."""
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    nodes = tree.body if module_level_only else list(ast.walk(tree))
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            source = "." * node.level + (node.module or "")
            # `from . import x` and `from .. import x` name the module in the list.
            found |= {source} if node.module else {source + alias.name for alias in node.names}
    return found


def top_level(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names if not name.startswith(".")}


def named(paths: list[Path]):
    return pytest.mark.parametrize("path", paths, ids=[path.stem for path in paths])


def test_every_flat_file_has_its_place():
    assert {path.stem for path in FLAT_FILES} <= ALLOWED_SIBLINGS.keys()


@named(FLAT_FILES)
def test_flat_files_import_only_what_lies_to_their_left(path):
    relative = {name for name in imported_modules(path) if name.startswith(".")}
    # The library's scan follows `from .sibling import x` and nothing else.
    assert relative <= {f".{name}" for name in ALLOWED_SIBLINGS[path.stem]}


@named(FLAT_FILES)
def test_flat_files_need_nothing_that_a_user_of_the_checkpoint_lacks(path):
    needs = top_level(imported_modules(path)) - STANDARD_LIBRARY
    allowed = {"torch", "transformers", "safetensors"}
    if path.stem in ("checkpoint_grinmoe", "upload_grinmoe"):
        allowed |= {"huggingface_hub"}  # Transformers cannot be installed without it
    if path.stem == "quantized_experts_grinmoe":
        allowed |= {"bitsandbytes"}  # tried in a function, for those who ask for it
    if path.stem in ("estimators_grinmoe", "routing_grinmoe", "balance_grinmoe"):
        allowed = {"torch"}
    if path.stem == "counter_draws_grinmoe":
        allowed = {"torch"}
    if path.stem.endswith("_kernels_grinmoe") or path.stem == "triton_router_grinmoe":
        allowed = {"torch", "triton"}  # imported where Triton is there
    assert needs <= allowed


@named(FLAT_FILES)
def test_the_hub_asks_for_nothing_that_is_optional(path):
    """Transformers looks through every flat file of a checkpoint, and refuses to load it where one of these is missing."""
    assert set(get_imports(path)) <= {"torch", "transformers", "safetensors", "huggingface_hub"} | STANDARD_LIBRARY


@named(TOKENIZATION_FILES)
def test_tokenization_knows_neither_torch_nor_the_model(path):
    names = imported_modules(path)
    assert not top_level(names) & {"torch", "accelerate", "grinmoe"}
    assert not any("_grinmoe" in name or name.startswith("..") for name in names)


@named(PACKAGE_FILES)
def test_the_package_imports_no_test_and_no_benchmark(path):
    assert not top_level(imported_modules(path)) & {"tests", "benchmarks", "scripts", "grinmoe_cli"}


@named(sorted((ROOT / "grinmoe_cli").glob("*.py")))
def test_the_command_line_starts_with_the_standard_library_alone(path):
    assert top_level(imported_modules(path, module_level_only=True)) <= STANDARD_LIBRARY | {"grinmoe_cli"}


def test_the_root_is_no_package():
    """With an __init__.py there, pytest and type checkers would import every flat file twice."""
    assert not (ROOT / "__init__.py").exists()


def test_the_package_links_to_every_flat_file():
    links = {path.name: os.readlink(path) for path in PACKAGE.iterdir() if path.is_symlink()}
    for path in FLAT_FILES:
        assert links.get(path.name) == f"../{path.name}", f"ln -s ../{path.name} grinmoe/{path.name}"
    assert links.get("tokenization") == "../tokenization"
    assert all((PACKAGE / name).exists() for name in links), "a link leads nowhere"
