"""The demo's text: questions and answers of the installed package `chatterbot-corpus`, as chat conversations."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..data import Message, held_out
from ..files import require_packages
from ..tokenization import encode_chat

# In these files an entry is a dialogue; everywhere else it is a question and one or more answers to it.
_DIALOGUES = ("conversations", "health")
# Entries with more lines than this are lists (trivia has one of 88), not talk.
_LONGEST_ENTRY = 30

Conversation = list[Message]


@dataclass(frozen=True)
class Corpus:
    """Conversations, split so that no question is in both parts."""

    train: list[Conversation]
    held_out: list[Conversation]


def load_corpus(held_out_share: float = 0.1) -> Corpus:
    """
    Read the English part of chatterbot-corpus.

    Args:
        held_out_share: share of questions kept for evaluation. A question's part is decided by a hash of its text, so
            it does not depend on order, seed or Python version.

    Raises:
        ImportError: the package is not installed.
    """
    require_packages("train", "chatterbot_corpus")
    import chatterbot_corpus

    folder = Path(chatterbot_corpus.__file__).parent / "data" / "english"
    seen: set[tuple[str, ...]] = set()
    corpus = Corpus([], [])
    for file in sorted(folder.glob("*.yml")):
        entries = yaml.safe_load(file.read_text(encoding="utf-8"))["conversations"]
        for entry in entries:
            lines = [str(line).strip() for line in entry if str(line).strip()]
            for conversation in _conversations(lines, dialogue=file.stem in _DIALOGUES):
                key = tuple(message["content"] for message in conversation)
                if key in seen:
                    continue
                seen.add(key)
                question = key[0].strip().lower()
                part = corpus.held_out if held_out(question, held_out_share) else corpus.train
                part.append(conversation)
    return corpus


def _conversations(lines: list[str], dialogue: bool) -> list[Conversation]:
    if not 2 <= len(lines) <= _LONGEST_ENTRY:
        return []
    if dialogue:
        turns = lines[: len(lines) // 2 * 2]
        return [[_message(i % 2, line) for i, line in enumerate(turns)]]
    return [[_message(0, lines[0]), _message(1, answer)] for answer in lines[1:]]


def _message(side: int, text: str) -> Message:
    return {"role": ("user", "assistant")[side], "content": text}


def texts(conversations: list[Conversation]) -> list[str]:
    """All messages' texts, for training a tokenizer."""
    return [message["content"] for conversation in conversations for message in conversation]


def preference_pairs(conversations: list[Conversation]) -> list[dict[str, Conversation]]:
    """
    A pair for every conversation: the true last answer is chosen, one to another question is drawn and rejected.

    Args:
        conversations: of one part, so that no answer wanders from one to the other.

    Returns:
        Rows of `prompt` (all messages but the last), `chosen` and `rejected` (one message each). A rejected text is no
        answer that the corpus gives to this prompt.
    """
    answers = [conversation[-1]["content"] for conversation in conversations]
    true_answers: dict[str, set[str]] = {}
    for conversation, answer in zip(conversations, answers, strict=True):
        true_answers.setdefault(_question(conversation), set()).add(answer)
    draw = random.Random(0)
    pairs = []
    for conversation in conversations:
        others = true_answers[_question(conversation)]
        if others.issuperset(answers):
            raise ValueError("all conversations ask the same question; pairs need answers to another one")
        while (rejected := draw.choice(answers)) in others:
            pass
        pairs.append({"prompt": conversation[:-1], "chosen": conversation[-1:], "rejected": [_message(1, rejected)]})
    return pairs


def _question(conversation: Conversation) -> str:
    return json.dumps(conversation[:-1])


def write_examples(folder: str | Path) -> dict[str, Path]:
    """
    Write the corpus as data for `grinmoe sft` and `grinmoe dpo`, the same bytes every time.

    Returns:
        The files by what they hold: `chat` and `chat-held-out` with rows of `messages`, `preference` and
        `preference-held-out` with rows of `prompt`, `chosen` and `rejected`.
    """
    corpus, folder = load_corpus(), Path(folder)
    rows: dict[str, list[Any]] = {}
    for suffix, part in (("", corpus.train), ("-held-out", corpus.held_out)):
        rows["chat" + suffix] = [{"messages": conversation} for conversation in part]
        rows["preference" + suffix] = preference_pairs(part)
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for name, part_rows in rows.items():
        files[name] = folder / f"{name}.jsonl"
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in part_rows]
        files[name].write_text("".join(lines), encoding="utf-8", newline="\n")
    return files


def encode(conversations: list[Conversation], tokenizer, length: int) -> list[dict[str, Any]]:
    """
    One row per conversation: rendered with the chat template, cut to `length` tokens.

    Conversations are not packed: they are short, and batches of rows of like length have little padding.
    Every token is a target: a model trained from scratch has to learn the questions' English as well.

    Args:
        conversations: messages with role and content.
        tokenizer: with a chat template.
        length: longest row, in tokens.

    Returns:
        Rows of `input_ids` and `labels`, to be padded by the collator, and `length`, to batch rows of like length.
    """
    rows: list[dict[str, Any]] = []
    for conversation in conversations:
        ids = encode_chat(tokenizer, conversation, max_tokens=length)
        rows.append({"input_ids": ids, "labels": ids, "length": len(ids)})
    return rows
