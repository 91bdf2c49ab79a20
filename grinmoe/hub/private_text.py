"""Secrets and paths of this machine, found in text that would be published."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

# Formats that the issuers document: a prefix and a length. What is only words (sk-learn-...) has no digit.
_SECRETS = {
    "a Hugging Face token": re.compile(r"(?<![A-Za-z0-9])(?:hf|api_org)_[A-Za-z0-9]{30,}"),
    "a key of an AI service": re.compile(
        r"(?<![A-Za-z0-9-])(?:sk-(?=[A-Za-z_-]*\d)[A-Za-z0-9_-]{20,}|AIza[A-Za-z0-9_-]{35}|r8_[A-Za-z0-9]{37})"
    ),
    "a GitHub or GitLab token": re.compile(
        r"(?<![A-Za-z0-9])(?:gh[pousr]_[A-Za-z0-9]{30,}|github_pat_[A-Za-z0-9_]{30,}|glpat-[A-Za-z0-9_-]{20,})"
    ),
    "an AWS key": re.compile(r"(?<![A-Za-z0-9])(?:AKIA|ASIA)[0-9A-Z]{16}(?![0-9A-Za-z])"),
    "a Slack token": re.compile(r"(?<![A-Za-z0-9])xox[abeprs]-[A-Za-z0-9-]{10,}"),
    "a Weights & Biases key": re.compile(
        r"wandb_v1_[A-Za-z0-9_]{30,}|wandb[ .]login[^\n]{0,40}?(?<![0-9a-f])[0-9a-f]{40}(?![0-9a-f])"
    ),
    "a PyPI or npm token": re.compile(r"(?<![A-Za-z0-9])(?:pypi-AgEI[A-Za-z0-9_-]{20,}|npm_[A-Za-z0-9]{36})"),
    "a private key": re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY(?: BLOCK)?-----"),
    "a token in a header": re.compile(r"(?i)\bauthorization\b\W{1,4}(?:bearer|basic|token)\s+[A-Za-z0-9._~+/=-]{16,}"),
    "a signed address": re.compile(r"[?&](?:X-Amz-Signature|X-Goog-Signature|Signature|sig)=[A-Za-z0-9%/+=_-]{20,}"),
    # A name that says so, and a value that is no word: letters and digits.
    "a key or password": re.compile(
        r"(?i)(?<![a-z])(?:[a-z0-9_-]{0,40}[_-])?(?:api[_-]?key|access[_-]?key|secret(?:[_-]?key)?|token|passwd|password|"
        r"passphrase|credentials?)\b[\"']?\s*[:=]\s*[\"']?"
        r"(?=[a-z/+_=-]*\d)(?=[\d/+_=-]*[a-z])[a-z0-9/+_=-]{16,}"
    ),
    "credentials in an address": re.compile(r"\b[a-z][a-z0-9+.-]{0,20}://[^/\s:@\"'<>{}$]+:[^/\s:@\"'<>{}$]+@[\w\[]"),
}
_STAND_INS = re.compile(r"(?i)example|your[_-]|placeholder|:(?:password|passwd|pass|token|secret)@")

# A user's name stands behind these; the stand-ins that documentation uses do not count.
_STAND_IN_USERS = r"(?!(?:user(?:name)?|you(?:r[_-]?name)?|me|name)(?![\w.-]))"
_HOMES = (
    rf"(?:/(?:storage|export|data))?/(?:home|Users)/{_STAND_IN_USERS}[\w.@+-]+(?:/[\w.@+-]+)*"
    # A long path under the name of a stand-in is more than an example.
    r"|/(?:home|Users)/[\w-]+/(?!\.cache)[\w.@+-]+(?:/[\w.@+-]+)+"
    rf"|(?<![A-Za-z])[A-Za-z]:(?:\\\\?|/)(?:Users|home)(?:\\\\?|/){_STAND_IN_USERS}[^\s\"'`\\/]+[^\s\"'`]*"
)
# In prose and in code examples /tmp/out, ~/.cache and /path/to are nobody's. /root/.cache is every container's.
_PATH_IN_PROSE = re.compile(
    rf"(?<![\w./~$}}>-])(?:{_HOMES}|/(?:mnt|scratch|gpfs|lustre|fsx|nfs|workspace|root)/(?!\.cache)[\w.@+-]+(?:/[\w.@+-]+)*)"
    r"|file:///[\w./@+-]+"
)
# Metadata has no business with any path: every absolute one is of this machine.
_PATH_IN_METADATA = re.compile(
    rf"(?<![\w./~$}}<>-])(?:{_HOMES}|/[\w.@+-]+(?:/[\w.@+-]+)+|[\"'\s]~/[\w.@+/-]+|[\"'](?:\.\.?/)+[\w.@+/-]+)"
    r"|(?<![A-Za-z])[A-Z]:(?:\\\\|/)[\w.-]+(?:\\\\|/)|file:///[\w./@+-]+"
)
_ENVIRONMENT = re.compile(r"(?i)(?:^|_)(?:key|token|secret|password|passwd|pat|credentials?)$")
_FRONT_MATTER = re.compile(r"\s*---\r?\n.*?\n---\s*?(?:\n|$)", re.DOTALL)
_ESCAPES = re.compile(r"(?<!\\)\\[nrt]")
_SHOWN_CHARACTERS = 6


@dataclass(frozen=True)
class Finding:
    """Something private in a text."""

    line: int  # from 1
    match: str  # as it stands there: not to be shown
    what: str  # may be shown


@dataclass(frozen=True)
class Private:
    """
    What must not be published, whatever it looks like; known patterns are looked for besides.

    Args:
        secrets: name -> value, such as "the token in use".
        paths: absolute paths of this machine.
    """

    secrets: dict[str, str] = field(default_factory=dict)
    paths: tuple[str, ...] = ()

    def in_text(self, text: str, metadata: bool = False) -> Iterator[Finding]:
        """
        What is private in a text.

        Args:
            text: of a file.
            metadata: every absolute path counts, as in JSON; else only those that tell of a user or a machine. The block at
                the top of a Markdown file is metadata in any case.
        """
        front = _FRONT_MATTER.match(text)
        metadata_lines = text.count("\n", 0, front.end()) if front else 0
        for number, line in enumerate(text.split("\n"), 1):
            is_metadata = metadata or number <= metadata_lines
            # A line feed written as two characters must not look like the letter before a path.
            line = _ESCAPES.sub("  ", line) if is_metadata else line
            if found := self._secret(line):
                yield Finding(number, *found)
            if path := self._path(line, is_metadata):
                yield Finding(number, path, f"a path of this machine ({path}); remove it, or name a Hub repository")

    def in_bytes(self, content: bytes) -> Iterator[str]:
        """Names of the known secrets and paths that are in a file of any kind. Patterns would match by chance there."""
        yield from (name for name, secret in self.secrets.items() if secret.encode() in content)
        yield from (
            f"a path of this machine ({path})" for path in self.paths if re.search(_whole_path(path).encode(), content)
        )

    def _secret(self, line: str) -> tuple[str, str] | None:
        for name, secret in self.secrets.items():
            if secret in line:
                return secret, _masked(name, secret)
        for kind, pattern in _SECRETS.items():
            for match in pattern.finditer(line):
                # AKIAIOSFODNN7EXAMPLE has the form of a key: who means it as an example can write another.
                if kind == "an AWS key" or not _is_stand_in(match[0]):
                    return match[0], _masked(kind, match[0])
        return None

    def _path(self, line: str, metadata: bool) -> str | None:
        for path in self.paths:
            if match := re.search(_whole_path(path), line):
                return match[0]
        match = (_PATH_IN_METADATA if metadata else _PATH_IN_PROSE).search(line)
        return match[0].strip(" \t\"'") if match else None


def secrets_of_environment() -> dict[str, str]:
    """Values of variables that are named like secrets, long and mixed enough not to stand in a text by chance."""
    return {
        f"the value of {name}": value
        for name, value in os.environ.items()
        if _ENVIRONMENT.search(name)
        and len(value) >= 16
        and re.search(r"\d", value)
        and re.search(r"[A-Za-z]", value)
        and not re.search(r"[\s/]", value)
    }


def _whole_path(path: str) -> str:
    """A path and what lies in it, but neither a part of a longer name nor of an address."""
    return rf"(?<![\w./-]){re.escape(path)}(?![\w-])[\w.@+/-]*"


def _is_stand_in(secret: str) -> bool:
    """hf_xxxxxxxxxxxxxxxx, password=your_password_1234 and the like, as documentation has them."""
    if _STAND_INS.search(secret):
        return True
    longest = max(re.findall(r"[A-Za-z0-9]+", secret), key=len, default="")
    return "PRIVATE KEY" not in secret and "://" not in secret and set(longest.lower()) <= {"x", "0"}


def _masked(kind: str, secret: str) -> str:
    shown = secret[:_SHOWN_CHARACTERS] if len(secret) > 2 * _SHOWN_CHARACTERS else ""
    return f"{kind} ({shown}...); remove it, and revoke it if others could see it"
