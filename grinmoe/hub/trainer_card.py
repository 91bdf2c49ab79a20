"""What is worth keeping of a README.md that the Trainer or TRL wrote by itself."""

from __future__ import annotations

import re
from collections.abc import Iterator

from huggingface_hub.repocard import REGEX_YAML_BLOCK

# The Trainer asks in a comment to take it away when the card has been completed; TRL's card says this of itself.
_MARKS = (
    "<!-- This model card has been generated automatically according to the information the Trainer had access to.",
    "It has been trained using [TRL](https://github.com/huggingface/trl)",
)
_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
# They load the model by a name that may be none, and cite the library.
_DROPPED_SECTIONS = ("Quick start", "Citations", "Citation")
_EMPTY = "More information needed"


def what_the_trainer_wrote(text: str) -> str | None:
    """
    The account of the training in a generated card.

    Args:
        text: of a README.md.

    Returns:
        Markdown without what says nothing, its headings of the fourth level; None for a card that is not generated.
    """
    if not any(mark in text for mark in _MARKS):
        return None
    block = REGEX_YAML_BLOCK.search(text)
    body = _COMMENT.sub("", text[block.end() :] if block else text)
    parts = []
    for number, (heading, lines) in enumerate(_sections(body)):
        said = "\n".join(line for line in lines if "](https://huggingface.co/None)" not in line).strip()
        if heading in _DROPPED_SECTIONS or not said or said == _EMPTY:
            continue
        # The first heading is the card's title.
        parts.append(said if number <= 1 else f"#### {heading}\n\n{said}")
    return "\n\n".join(parts)


def _sections(body: str) -> Iterator[tuple[str, list[str]]]:
    """Heading and lines; the first without a heading. What looks like a heading in a code block is none."""
    heading, is_code = "", False
    lines: list[str] = []
    for line in body.splitlines():
        is_code ^= line.startswith("```")
        match = None if is_code else re.match(r"#{1,4} +(.+)", line)
        if match:
            yield heading, lines
            heading, lines = match[1].strip(), []
        else:
            lines.append(line)
    yield heading, lines
