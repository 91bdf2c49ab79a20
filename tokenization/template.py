"""The family's chat template, and what another template renders differently."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from typing import Any

import jinja2

# Conversations that tell templates apart: a system message (also empty), several turns, whitespace at the edges of a
# content, an unanswered question, an answer without a question.
_PROBES: tuple[tuple[tuple[str, str], ...], ...] = (
    (("system", "Be brief."), ("user", " Hi\n"), ("assistant", "\n Yo "), ("user", "And?")),
    (("system", ""), ("user", "2 < 3?"), ("assistant", "Yes, {{ 2 }}.")),
    (("user", "Hello"),),
    (("assistant", ""),),
)


def chat_template() -> str:
    """The family's chat template (Jinja): renders what the released one renders, and marks the assistant's text."""
    return (Path(__file__).parent / "chat_template.jinja").read_text(encoding="utf-8")


def answer_ends(tokenizer: Any) -> list[int]:
    """The ids that end an answer: the end of a text, and `<|end|>` where the tokenizer has it."""
    ends = {tokenizer.eos_token_id, tokenizer.get_vocab().get("<|end|>")} - {None}
    return sorted(ends)


def with_marks(template: Any) -> Any:
    """The template, or dict of templates by name, with the released one replaced by ours, which marks the answers."""
    if isinstance(template, dict):
        return {name: with_marks(text) for name, text in template.items()}
    released = (Path(__file__).parent / "released_chat_template.jinja").read_text(encoding="utf-8")
    return chat_template() if template is not None and template.strip() == released.strip() else template


def template_difference(tokenizer: Any) -> str | None:
    """
    How the tokenizer's chat template differs from the family's in what it makes of plain chats.

    What else it can do (tools, say) is not looked at.

    Args:
        tokenizer: with a chat template and the family's special tokens.

    Returns:
        None if all probe conversations render byte for byte alike; else a sentence with the first one that does not.
    """
    for probe, generate in itertools.product(_PROBES, (True, False)):
        messages = [{"role": role, "content": content} for role, content in probe]
        render = functools.partial(
            tokenizer.apply_chat_template, messages, tokenize=False, add_generation_prompt=generate
        )
        expected = render(chat_template=chat_template())
        try:
            rendered = render()
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            return f"it fails on {messages} ({error})"
        if rendered != expected:
            return f"it renders {messages} as {rendered!r}, the family's renders {expected!r}"
    return None
