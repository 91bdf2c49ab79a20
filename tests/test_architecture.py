"""The house: which way imports point, what the remote code may need, and what is where.

Every import counts, also one inside a function.
"""

from __future__ import annotations

import ast
import importlib
import os
import re
import sys
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import get_imports

import grinmoe
from grinmoe.checkpoint_grinmoe import CODE_FILES
from tests import ROOT

PACKAGE = ROOT / "grinmoe"
STANDARD_LIBRARY = set(sys.stdlib_module_names)

# Flat files, each with the others that it may import. The library's scan follows `from .sibling import x` and nothing else.
FLAT = {
    "routing": set(),
    "balance": {"routing"},
    "configuration": {"routing"},
    "generation": {"configuration"},
    "quantization": {"configuration"},
    "checkpoint": {"configuration", "generation", "quantization"},
    "modeling": {"balance", "checkpoint", "configuration", "generation", "quantization", "routing"},
}
# Left never imports right, and within a step nobody imports a neighbour.
STEPS = [
    {"flat", "files", "tokenization"},
    {"provenance", "outputs"},
    {"kernels", "data", "monitoring"},
    {"adapters", "distributed"},
    # Planning runs the step with adapters and sharding, on tensors without data.
    {"loading", "planning"},
    {"hub"},
    {"training", "conversion", "serving", "evaluation", "analysis"},
    {"demo"},
    {"research"},
]
STEP_OF = {name: number for number, step in enumerate(STEPS) for name in step}
ROOMS = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py") if path.parent.name != "tokenization")
FLAT_FILES = sorted(ROOT.glob("*_grinmoe.py"))
TOKENIZATION_FILES = sorted((ROOT / "tokenization").glob("*.py"))
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if not path.is_symlink() and path.parent.name != "tokenization")


def imported_modules(path: Path) -> set[str]:
    """Dotted names of what a file imports; relative imports start with dots."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), filename=str(path))):
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
    return pytest.mark.parametrize("path", paths, ids=[str(path.relative_to(ROOT)) for path in paths])


def absolute(path: Path, name: str) -> str | None:
    """What `name`, as `path` imports it, is below `grinmoe`; None for other packages."""
    if not name.startswith("."):
        return name.removeprefix("grinmoe.") if name.startswith("grinmoe.") else None
    level = len(name) - len(name.lstrip("."))
    base = path.relative_to(PACKAGE).parts[:-1]
    return ".".join([*base[: len(base) - level + 1], name.lstrip(".")])


def place(module: str) -> str:
    """The name in `STEPS` of a module below `grinmoe`."""
    first = module.split(".")[0]
    return "flat" if first.endswith("_grinmoe") else first


@named(FLAT_FILES)
def test_flat_files_import_only_what_lies_to_their_left(path):
    relative = {name for name in imported_modules(path) if name.startswith(".")}
    assert relative <= {f".{name}_grinmoe" for name in FLAT[path.stem.removesuffix("_grinmoe")]}


@named(FLAT_FILES)
def test_flat_files_need_nothing_that_a_user_of_the_checkpoint_lacks(path):
    allowed = {"torch", "transformers", "safetensors", "huggingface_hub"} | STANDARD_LIBRARY
    if path.stem in ("routing_grinmoe", "balance_grinmoe"):
        allowed = {"torch"} | STANDARD_LIBRARY
    optional = {"bitsandbytes"} if path.stem == "quantization_grinmoe" else set()  # tried in a function
    assert top_level(imported_modules(path)) <= allowed | optional
    # Transformers refuses to load a checkpoint if one of these is missing.
    assert set(get_imports(path)) <= allowed


def test_the_root_holds_the_remote_code_and_is_not_a_package():
    assert [path.name for path in FLAT_FILES] == sorted(CODE_FILES)
    # With an __init__.py there, pytest and type checkers would import every flat file twice.
    assert not (ROOT / "__init__.py").exists()


def test_the_package_holds_links_rooms_and_five_modules():
    links = {path.name: os.readlink(path) for path in PACKAGE.iterdir() if path.is_symlink()}
    assert links == {
        **{name: f"../{name}" for name in CODE_FILES},
        "tokenization": "../tokenization",
        "model_card.md": "../model_card.md",
    }
    assert all((PACKAGE / name).exists() for name in links), "a link leads nowhere"
    modules = {path.name for path in PACKAGE.glob("*.py") if not path.is_symlink()}
    assert modules == {"__init__.py", "files.py", "loading.py", "outputs.py", "provenance.py"}
    assert set(ROOMS) == STEP_OF.keys() - {"flat", "files", "outputs", "provenance", "loading", "tokenization"}


@named(MODULES)
def test_rooms_import_only_what_lies_to_their_left_and_by_its_face(path):
    own = place(".".join(path.relative_to(PACKAGE).with_suffix("").parts))
    for name in imported_modules(path):
        module = absolute(path, name)
        if module is None or (target := place(module)) in (own, "__init__") or own == "__init__":
            continue
        assert target in STEP_OF, f"{name}: {target} is not in STEPS"
        assert STEP_OF[target] < STEP_OF[own], f"{own} imports {name}, which is not to its left"
        assert target not in ROOMS or module == target, (
            f"{name} is private to its room; import it from grinmoe.{target}"
        )


def test_modules_import_each_other_in_no_circle():
    imports = {}
    for path in MODULES:
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        found = {absolute(path, imported) for imported in imported_modules(path)}
        # `from . import module` inside a room, and rooms by their faces.
        imports[name] = {f"{m}.__init__" if m in ROOMS else m for m in found if m} - {name}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail, name))
        if name not in done:
            for other in imports.get(name, ()):
                visit(other, (*trail, name))
            done.add(name)

    for name in imports:
        visit(name, ())


@named(TOKENIZATION_FILES)
def test_tokenization_knows_neither_torch_nor_the_model(path):
    names = imported_modules(path)
    assert not top_level(names) & {"torch", "accelerate", "grinmoe"}
    assert not any("_grinmoe" in name or name.startswith("..") for name in names)


@named(MODULES)
def test_the_package_imports_no_test_and_no_benchmark(path):
    assert not top_level(imported_modules(path)) & {"tests", "benchmarks", "scripts", "grinmoe_cli"}


OUTSIDE = sorted(p for folder in ("grinmoe_cli", "scripts", "benchmarks") for p in (ROOT / folder).glob("*.py"))
# Benchmarks take kernels apart.
INSIDE_OF_KERNELS = {
    f"grinmoe.kernels.{name}"
    for name in ("cpu_products", "permute_kernels", "philox", "triton_experts", "triton_router")
}


@named(OUTSIDE)
def test_commands_scripts_and_benchmarks_import_rooms_by_their_faces(path):
    below = {name for name in imported_modules(path) if name.startswith("grinmoe.")}
    private = {n for n in below if n.count(".") > 1 and not n.startswith("grinmoe.tokenization.")}
    assert private <= (INSIDE_OF_KERNELS if path.parent.name == "benchmarks" else set())


TEST_FOLDERS = {path.name for path in (ROOT / "tests").iterdir() if (path / "__init__.py").exists()}


def test_tests_have_the_rooms_of_the_package():
    elsewhere = {"cli", "fake_hub", "fuzzing", "goldens", "model", "remote_code", "tokenization"}
    assert set(ROOMS) | elsewhere >= TEST_FOLDERS
    assert set(ROOMS) <= TEST_FOLDERS


DOCUMENTS = [ROOT / "README.md", ROOT / "model_card.md", *sorted((ROOT / "docs").glob("*.md"))]


@named(DOCUMENTS)
def test_documented_names_of_the_package_exist(path):
    """`grinmoe.room.name` in a document is a room or a module, and what it exports."""
    for name in set(re.findall(r"\bgrinmoe((?:\.[A-Za-z_]+)+)\b(?!\.py\b)", path.read_text(encoding="utf-8"))):
        module, rest = grinmoe, name.strip(".").split(".")
        for part in rest:
            if not hasattr(module, part):
                importlib.import_module(f"{module.__name__}.{part}")
            module = getattr(module, part)
