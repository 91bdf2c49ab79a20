"""Files of a repository as the Hub lists them: which of them belong to a checkpoint, and what they have to be."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from huggingface_hub.hf_api import ModelInfo

from .contents import PICKLE_SUFFIXES
from .errors import HubError, printable

# What a checkpoint may hold. Everything else is left out: programs act on many names (.git, conftest.py, Makefile).
_SUFFIXES = (".safetensors", ".json", ".jinja", ".model", ".txt", ".md", ".gguf")
_PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".gif", ".webp", ".svg")
# The names that Transformers and this project give to code that travels with a model. None of them hides another module.
_CODE = re.compile(r"[a-z]+_grinmoe\.py|(configuration|modeling|tokenization|processing)_[a-z0-9_]+\.py")
_TEXTS = re.compile(r"(LICEN[CS]E|NOTICE|COPYING|COPYRIGHT|AUTHORS|CITATION|README)([-_][\w-]+)?", re.IGNORECASE)
# These have such a suffix, and tell a build tool, a package manager or an assistant what to do in the folder.
_INSTRUCTIONS = re.compile(
    r"cmakelists\.txt|(package|composer|deno|project|launch|tasks|settings|devcontainer|[jt]sconfig)\.json"
    r"|(agents?|claude|claude\.local|gemini|qwen|skill|copilot-instructions)\.md|conanfile\.txt|llms(-full)?\.txt"
)
_UNSEEN = (
    "Cc",
    "Cf",
    "Cs",
    "Zl",
    "Zp",
)  # categories of Unicode: controls, what reorders text or has no width, line ends
_MOST_FILES = 10_000
_LONGEST_NAME_BYTES = 200  # the client makes longer names of it
_CHUNK_BYTES = 2**20


@dataclass(frozen=True)
class RemoteFile:
    """A file at a commit: `digest` is its SHA-256 or the id that git gives it, by its length."""

    name: str
    size: int
    digest: str

    def differs(self, file: Path, advance: Callable[[int], object] = lambda _: None) -> bool:
        """
        Compare a local file with this one: the size first, then the content, which is read once and in pieces.

        Args:
            file: a regular file.
            advance: called with the number of bytes after each piece.
        """
        if file.stat().st_size != self.size:
            return True
        is_git = len(self.digest) == 40
        digest = hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False) if is_git else hashlib.sha256()
        with file.open("rb") as opened:
            while piece := opened.read(_CHUNK_BYTES):
                digest.update(piece)
                advance(len(piece))
        return digest.hexdigest() != self.digest


@dataclass(frozen=True)
class Remote:
    """A repository at a commit: what is fetched of it, and what is left out."""

    repo: str
    commit: str
    files: dict[str, RemoteFile]
    pickles: list[str]
    others: list[str]

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files.values())


def belongs_to_a_checkpoint(name: str) -> bool:
    """
    Whether a file is of a kind that checkpoints consist of: weights, JSON, templates, vocabularies, text and pictures,
    in folders too; code at the top, by the names that Transformers gives it. Hidden files and folders never are.
    """
    path = PurePosixPath(name)
    if any(part.startswith(".") for part in path.parts) or _INSTRUCTIONS.fullmatch(path.name.lower()):
        return False
    if path.suffix == ".py":
        return len(path.parts) == 1 and _CODE.fullmatch(name) is not None
    return path.suffix.lower() in (*_SUFFIXES, *_PICTURE_SUFFIXES) or _TEXTS.fullmatch(path.name) is not None


def read_list(repo: str, info: ModelInfo) -> Remote:
    """
    Check a repository's list of files.

    Args:
        repo: for messages.
        info: the Hub's answer, with the metadata of files. Nothing in it is trusted.

    Raises:
        HubError: it is not an answer of the Hub: no commit, no list, wrong types, a file without a hash.
        ValueError: a name leads out of the folder, cannot be shown or written, or two names may be one on some disks.
    """
    if not isinstance(info.sha, str) or not re.fullmatch(r"[0-9a-f]{40}", info.sha):
        raise _not_the_hub(f"the commit of {repo} is {info.sha!r}")
    if not isinstance(info.siblings, list):
        raise _not_the_hub(f"{repo} has no list of files")
    names = [sibling.rfilename for sibling in info.siblings]
    for name in names:
        _check_name(name, repo)
    if len(set(names)) < len(names):
        raise _not_the_hub(f"{repo} lists a file twice")
    pickles = sorted(name for name in names if name.lower().endswith(PICKLE_SUFFIXES))
    wanted = {name for name in names if belongs_to_a_checkpoint(name)} - set(pickles)
    if len(wanted) > _MOST_FILES:
        raise ValueError(f"{repo} holds {len(wanted):,} files; a checkpoint has at most {_MOST_FILES:,}")
    _check_unique(sorted(wanted), repo)
    files = {s.rfilename: _remote_file(s, repo) for s in info.siblings if s.rfilename in wanted}
    return Remote(repo, info.sha, files, pickles, sorted({*names} - wanted - {*pickles}))


def _remote_file(sibling, repo: str) -> RemoteFile:
    name, size = sibling.rfilename, sibling.size
    # Of a large file git has a pointer, and the Hub tells the hash of what it points to.
    digest, pattern = (sibling.lfs.sha256, "[0-9a-f]{64}") if sibling.lfs else (sibling.blob_id, "[0-9a-f]{40}")
    if digest is None or size is None:
        raise HubError(
            f"the server does not tell the {'size' if digest else 'hash'} of {name}, so the download cannot be checked; "
            "use the Hub itself (unset HF_ENDPOINT), or a mirror that passes on its metadata"
        )
    is_size = isinstance(size, int) and not isinstance(size, bool) and 0 <= size < 2**50
    if not is_size or not isinstance(digest, str) or not re.fullmatch(pattern, digest):
        raise _not_the_hub(f"{name} of {repo} has the size {size!r} and the hash {digest!r}")
    if sibling.lfs and sibling.lfs.size != size:
        raise _not_the_hub(f"{name} of {repo} has two sizes, {size} and {sibling.lfs.size!r}")
    return RemoteFile(name, size, digest)


def _not_the_hub(what: str) -> HubError:
    return HubError(f"what answered is not the Hub: {printable(what)[:300]}; check HF_ENDPOINT, the proxy, the network")


def _check_name(name: str, repo: str) -> None:
    if not isinstance(name, str) or not name:
        raise _not_the_hub(f"{repo} lists a file named {name!r}")
    fault = None
    if name.startswith("/") or {"", ".", ".."} & set(name.split("/")) or re.match("[A-Za-z]:", name) or "\\" in name:
        fault = "which leads out of its folder"
    elif any(unicodedata.category(letter) in _UNSEEN for letter in name):
        fault = "which holds characters that control a terminal or cannot be seen"
    elif max(len(part.encode()) for part in name.split("/")) > _LONGEST_NAME_BYTES or len(name.encode()) > 1000:
        fault = "which is too long for a file system"
    if fault:
        raise ValueError(f"{repo} holds a file named {_shown(name)}, {fault}; do not use it")


def _check_unique(names: Iterable[str], repo: str) -> None:
    """Some file systems take names for the same that differ in case, or in how an accent is written."""
    seen: dict[str, tuple[str, bool]] = {}
    for name in names:
        path = PurePosixPath(name)
        for part, is_file in ((path, True), *((parent, False) for parent in path.parents if parent.name)):
            folded = unicodedata.normalize("NFC", str(part)).casefold()
            known = seen.setdefault(folded, (str(part), is_file))
            if known != (str(part), is_file):
                raise ValueError(
                    f"{repo} holds {_shown(known[0])} and {_shown(str(part))}, which are one file on many disks; ask its "
                    "owner to rename one of them"
                )


def _shown(name: str) -> str:
    return repr(name if len(name) <= 100 else f"{name[:100]}...")
