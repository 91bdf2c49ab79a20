"""Secrets and paths of this machine, found in text that would be published."""

from __future__ import annotations

import base64
import html
import os
import re
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from urllib.parse import unquote

from .secret_formats import FORMATS, SecretFormat

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
_ESCAPED = re.compile(r"\\[u/\"]")
_UNICODE_ESCAPE = re.compile(r"\\u([0-9a-fA-F]{4})")
_PERCENT = re.compile(r"%[0-9A-Fa-f]{2}")
_BASE64 = re.compile(r"[A-Za-z0-9+/_-]{24,}")
_NETRC = next(form for form in FORMATS if "netrc" in form.issuer)
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
        What is private in a text, also where it is written with JSON's, HTML's or an address's escapes, or in base64.

        Args:
            text: of a file.
            metadata: every absolute path counts, as in JSON; else only those that tell of a user or a machine. The block at
                the top of a Markdown file is metadata in any case.
        """
        front = _FRONT_MATTER.match(text)
        metadata_lines = text.count("\n", 0, front.end()) if front else 0
        lines: list[tuple[int, str]] = []  # and what is encoded in them
        for number, line in enumerate(text.split("\n"), 1):
            # A line feed written as two characters must not look like the letter before a path.
            plain = _ESCAPES.sub("  ", line) if metadata or number <= metadata_lines else line
            lines += ((number, reading) for reading in _readings(plain))
        named: set[tuple[int, bool]] = set()
        for (number, line), forms in zip(lines, _forms_in([line for _, line in lines])):
            found, path = self._secret(line, forms), self._path(line, metadata or number <= metadata_lines)
            if found and (number, True) not in named:
                named.add((number, True))
                yield Finding(number, *found)
            if path and (number, False) not in named:
                named.add((number, False))
                yield Finding(number, path, f"a path of this machine ({path}); remove it, or name a Hub repository")
        for match in _NETRC.pattern.finditer(text):
            if "\n" in match[0]:
                yield Finding(text.count("\n", 0, match.start()) + 1, match[0].split("\n")[0], _masked(_NETRC, ""))

    def in_bytes(self, content: bytes) -> Iterator[str]:
        """Names of the known secrets and paths that are in a file of any kind. Patterns would match by chance there."""
        yield from (name for name, secret in self.secrets.items() if secret.encode() in content)
        yield from (
            f"a path of this machine ({path})" for path in self.paths if re.search(_whole_path(path).encode(), content)
        )

    def _secret(self, line: str, forms: list[SecretFormat]) -> tuple[str, str] | None:
        for name, secret in self.secrets.items():
            if secret in line:
                return secret, _masked(name, secret)
        for form in forms:
            for match in form.pattern.finditer(line):
                # AKIAIOSFODNN7EXAMPLE has the form of a key: who means it as an example can write another.
                if form.issuer == "AWS" or not _is_stand_in(match.groupdict().get("value") or match[0]):
                    return match[0], _masked(form, match[0])
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


def _masked(kind: str | SecretFormat, secret: str) -> str:
    shown = secret[:_SHOWN_CHARACTERS] if len(secret) > 2 * _SHOWN_CHARACTERS else ""
    kind = f"a secret, by its form of {kind.issuer}" if isinstance(kind, SecretFormat) else kind
    return f"{kind} ({shown}...); remove it, and revoke it if others could see it"


def _forms_in(lines: list[str]) -> list[list[SecretFormat]]:
    """For each line the formats that may be in it. Looking for their hints is much faster than their expressions."""
    lowered = [line.lower() for line in lines]
    text = "\n".join(lowered)
    starts = [0, *accumulate(len(line) + 1 for line in lowered)]
    forms: list[list[SecretFormat]] = [[] for _ in lines]
    for form in FORMATS:
        numbers = set() if form.hints else set(range(len(lines)))
        for hint in form.hints:
            place = text.find(hint)
            while place >= 0:
                numbers.add(number := bisect_right(starts, place) - 1)
                place = text.find(hint, starts[number + 1])
        for number in numbers:
            forms[number].append(form)
    return forms


def _readings(line: str) -> Iterator[str]:
    """A line as it is, and as programs read what is escaped or encoded in it."""
    yield line
    if _ESCAPED.search(line):
        plain = _UNICODE_ESCAPE.sub(lambda match: chr(int(match[1], 16)), line)
        yield plain.replace("\\/", "/").replace('\\"', '"')
    if "&#" in line or "&amp;" in line:
        yield html.unescape(line)
    if _PERCENT.search(line):
        yield unquote(line)
    for match in _BASE64.finditer(line):
        encoded = match[0].replace("-", "+").replace("_", "/")
        decoded = (
            base64.b64decode(encoded + "=" * (-len(encoded) % 4), validate=False) if len(encoded) % 4 != 1 else b""
        )
        if decoded.isascii() and (text := decoded.decode("ascii")).replace("\n", "").isprintable():
            yield from text.split("\n")
