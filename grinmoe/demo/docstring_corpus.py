"""Real English text that every installation has: the documentation strings of Python and of the packages it runs on."""

from __future__ import annotations

import ast
import importlib.util
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..data import held_out

_SHORTEST = 120  # characters; below it is "See base class."
_CODE_OF_OTHERS = frozenset({"test", "tests", "idle_test", "site-packages"})


@dataclass(frozen=True)
class Document:
    """One text, and where it is from: the package, "python", or the stem of a user's file."""

    text: str
    domain: str

    def is_held_out(self, share: float) -> bool:
        return held_out(self.text, share)


def installed_documentation(packages: tuple[str, ...]) -> list[Document]:
    """
    The reference manual that comes with Python, and the documentation strings of its library and of `packages`.

    About 9 MB with torch and numpy, 16 MB with Transformers too. It is the text of the installed versions; each string
    occurs once.

    Raises:
        ImportError: a package is not installed.
    """
    import pydoc_data.topics

    texts: dict[str, str] = dict.fromkeys(pydoc_data.topics.topics.values(), "python")
    roots = [("python", Path(sysconfig.get_paths()["stdlib"]))]
    for package in packages:
        specification = importlib.util.find_spec(package)
        if specification is None or specification.origin is None:
            raise ImportError(f"{package} is not installed, whose documentation was to be read; pip install {package}")
        roots.append((package, Path(specification.origin).parent))
    for domain, root in roots:
        for text in _documentation_strings(root):
            texts.setdefault(text, domain)
    return [Document(text, domain) for text, domain in texts.items()]


def documents_of_file(path: Path) -> list[Document]:
    """
    A user's text file as documents, which are its paragraphs (separated by empty lines).

    Raises:
        ValueError: the file is not UTF-8, or has no text.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"--text {path} is not UTF-8 ({error.reason} at byte {error.start}); convert it") from error
    paragraphs = [paragraph.strip() for paragraph in text.split("\n\n")]
    documents = [Document(paragraph, path.stem) for paragraph in paragraphs if paragraph]
    if not documents:
        raise ValueError(f"--text {path} has no text in it")
    return documents


def _documentation_strings(root: Path) -> Iterator[str]:
    for path in sorted(root.rglob("*.py")):
        if _CODE_OF_OTHERS & set(path.relative_to(root).parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError, ValueError):  # templates, and files of other Python versions
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                text = ast.get_docstring(node)
                if text and len(text) >= _SHORTEST:
                    yield text
