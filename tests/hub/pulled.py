"""What the tests of pulls look at: what the Hub has, what was fetched of it, and what an interrupted pull keeps."""

from __future__ import annotations

from pathlib import Path

from tests.hub.release_folders import REPO


def whole(hub, revision: str = "main") -> dict[str, bytes]:
    """What a pull makes of the repository: .gitattributes is git's."""
    return {name: content for name, content in hub.files(REPO, revision).items() if name != ".gitattributes"}


def kept(output: Path) -> Path:
    """The folder where an interrupted pull goes on."""
    (workspace,) = output.parent.glob(f".{output.name}-*")
    return workspace / "new"


def fetched(hub) -> list[str]:
    """Names of the files whose contents were asked for."""
    return sorted({path.split("/")[-1].split("?")[0] for path in hub.paths("GET", "/resolve/")})
