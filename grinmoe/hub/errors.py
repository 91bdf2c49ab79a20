"""What the Hub refuses or cannot do, as one sentence with a remedy: shared by `push` and `pull`."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Literal

from huggingface_hub import get_session, get_token

# The client exports the base of its HTTP library's errors (httpx or httpx2, by its version) under this name only.
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

Doing = Literal["push", "pull"]

_AGAIN = {
    "push": "run the same command again: what has arrived is not sent again",
    "pull": "run the same command again: what has arrived is not fetched again",
}


# Longest wait for an answer, and for each piece of a transfer.
WAIT_S = 30.0
# A commit of many large files takes the Hub a while.
COMMIT_WAIT_S = 120.0
_LONGEST_LINE = 500


class HubError(OSError):
    """What the Hub refused or could not do, and what to do about it."""


@contextlib.contextmanager
def said_clearly(repo: str, doing: Doing, wait_s: float | None = None) -> Iterator[None]:
    """
    Around calls of the client only: its errors, and those of its HTTP library, as one sentence with a remedy.

    Args:
        repo: for the message.
        doing: for the message.
        wait_s: longest wait for an answer, and for each piece of a transfer; None: WAIT_S.

    Raises:
        HubError: for these. Errors of ours pass through.
    """
    try:
        with _not_waiting_forever(WAIT_S if wait_s is None else wait_s):
            yield
    except HubError:
        raise
    except OfflineModeIsEnabled as error:
        raise HubError(f"cannot {doing}: HF_HUB_OFFLINE is set, which forbids every request; unset it") from error
    # The client takes the Hub's JSON apart without looking at its types.
    except (json.JSONDecodeError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise HubError(
            f"{_nothing(doing)}what answered is not the Hub ({first_line(error)}); check HF_ENDPOINT, the proxy, the network"
        ) from error
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        cause = http_cause(error)
        if cause is not None:
            raise HubError(_explained(cause, repo, doing)) from error
        # The client's own, without a request behind it: an upload by Xet that broke off, a lost connection.
        if isinstance(error, (RuntimeError, ConnectionError, TimeoutError, LocalEntryNotFoundError)):
            raise HubError(
                f"{_nothing(doing)}the transfer failed ({first_line(error)}); check the network, then {_AGAIN[doing]}"
            ) from error
        raise


@contextlib.contextmanager
def _not_waiting_forever(wait_s: float) -> Iterator[None]:
    """The client sets no limit on how long a request may wait for the Hub; this one is for all that have none."""
    session = get_session()
    before = session.timeout
    if before.read is None:
        session.timeout = wait_s
    try:
        yield
    finally:
        session.timeout = before


def http_cause(error: BaseException | None) -> BaseException | None:
    """The HTTP error behind an error: the client wraps that of an upload in a RuntimeError, for one."""
    while error is not None and not isinstance(error, HTTPError):
        error = error.__cause__
    return error


def status_of(error: BaseException) -> int | None:
    """The status of the Hub's answer, None if there was no answer."""
    return error.response.status_code if isinstance(error, HfHubHTTPError) else None


def _explained(error: BaseException, repo: str, doing: Doing) -> str:
    status = status_of(error)
    if isinstance(error, RevisionNotFoundError):
        said = f"{repo} has no such revision; give a branch, tag or commit that is there"
    elif isinstance(error, EntryNotFoundError):
        said = f"{repo} was changed at the same moment; run the same command again"
    elif status in (remedies := _remedies(repo, doing)):
        said = remedies[status]
    elif status is not None and status >= 500:
        said = f"the Hub failed ({status}); {_AGAIN[doing]}"
    elif status is not None:
        said = f"the Hub refused ({status}); if what it says in brackets does not help, {_AGAIN[doing]}"
    else:
        said = f"the Hub cannot be reached or did not answer; check the network, then {_AGAIN[doing]}"
    kind = f"{type(error).__name__}: " if status is None else ""
    return f"{_nothing(doing)}{said} ({kind}{first_line(error)})"


def _remedies(repo: str, doing: Doing) -> dict[int | None, str]:
    """By status of the answer."""
    changed = f"{repo} was changed at the same moment; run the same command again"
    if get_token() is None:
        unauthorized = f"there is no repository {repo}, or it is not public; check the name, or log in (hf auth login)"
    else:
        unauthorized = (
            "the Hub does not accept the token; log in again (hf auth login), or set HF_TOKEN to one that is valid"
        )
    remedies: dict[int | None, str] = {
        401: unauthorized,
        404: f"there is no repository {repo} that the token may see; check the name",
        409: changed,
        412: changed,
        413: "a file is larger than the Hub takes; save the model with smaller shards (max_shard_size)",
        429: f"the Hub asks for fewer requests; wait some minutes, then {_AGAIN[doing]}",
    }
    if doing == "push":
        remedies[403] = (
            f"the token may not write to {repo}; use one with write access, or ask its owner (--create-pr proposes a "
            "change to another's repository)"
        )
    else:
        remedies[403] = f"the token may not read {repo}; ask for access on its page"
    return remedies


def _nothing(doing: Doing) -> str:
    return "nothing was published: " if doing == "push" else ""


def first_line(error: BaseException) -> str:
    """What the server said, or else the error."""
    server = getattr(error, "server_message", None)
    lines = (str(server) if server else str(error)).strip().splitlines()
    return printable(lines[0][:_LONGEST_LINE]) if lines else type(error).__name__


def printable(text: str) -> str:
    """Text of others for a terminal: escapes in place of characters that would control it, reorder a line or end it."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def check_repo(repo: str) -> None:
    """
    Raises:
        ValueError: it cannot be the name of a repository.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ValueError(f"--repo {repo!r} is no name of a repository; give NAME or OWNER/NAME ({error})") from error
