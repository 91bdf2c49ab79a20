"""`grinmoe generate`: chat with a checkpoint, the answer streamed as it is made."""

from __future__ import annotations

import io
import sys
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TextStreamer

from ..loading import load_for_use
from ..tokenization import encode_chat, encode_text
from .options import ChatOptions, GenerateOptions


@dataclass
class Chat:
    """A loaded checkpoint and a conversation with it."""

    model: Any
    tokenizer: Any
    options: ChatOptions
    messages: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self):
        if self.options.system and not self.tokenizer.chat_template:
            raise ValueError(
                "--system needs a tokenizer with a chat template, and this checkpoint's has none; leave it out"
            )
        torch.manual_seed(self.options.seed)
        self.reset()

    def reset(self) -> None:
        """Forget the conversation, keep the system message."""
        self.messages = [{"role": "system", "content": self.options.system}] if self.options.system else []

    def answer(self, prompt: str) -> str:
        """
        Answer one message in the light of the conversation so far; prints while it generates.

        A conversation longer than the model's `max_position_embeddings` is not cut; the model warns about it (so the
        tokenizer need not).

        Raises:
            ValueError: the prompt is empty.
        """
        if not prompt.strip():
            raise ValueError("the prompt is empty; give some text")
        messages = [*self.messages, {"role": "user", "content": prompt}]
        inputs = self._encode(messages, prompt)
        with torch.inference_mode():
            sequence = self.model.generate(
                **inputs,
                **self._sampling(),
                max_new_tokens=self.options.max_new_tokens,
                streamer=TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True),
            )[0]
        text = self.tokenizer.decode(sequence[inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        self.messages = [*messages, {"role": "assistant", "content": text}]
        return text

    def _sampling(self) -> dict[str, Any]:
        if self.options.temperature is None:
            return {}
        if self.options.temperature == 0:
            return {"do_sample": False}
        return {"do_sample": True, "temperature": self.options.temperature}

    def _encode(self, messages: list[dict[str, str]], prompt: str) -> dict[str, torch.Tensor]:
        """The conversation in chat form; just the prompt where the tokenizer has no chat template."""
        ids = encode_chat(self.tokenizer, messages, True) if self.tokenizer.chat_template else None
        input_ids = torch.tensor(
            [encode_text(self.tokenizer, prompt) if ids is None else ids], device=self.model.device
        )
        return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}


def run_generate(options: GenerateOptions) -> None:
    """
    The command: one answer to the prompt, or without it a conversation read from standard input.

    Args:
        options: the model, the prompt and how to answer.

    Raises:
        ValueError: the prompt is empty, or the checkpoint cannot be used (see GrinMoeForCausalLM.from_pretrained).
        OSError: there is no such folder or repository.
    """
    prompt = options.prompt
    if prompt is not None and not prompt.strip():
        raise ValueError("the prompt is empty; give some text, or leave --prompt out for a conversation")
    chat = Chat(*load_for_use(options.model, options.dtype, options.device), options)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # An answer may hold letters that the terminal has not.
        sys.stdout.reconfigure(errors="backslashreplace")
    if prompt is not None:
        # What was typed and is no UTF-8 came as characters that no tokenizer takes.
        chat.answer(prompt.encode("utf-8", "surrogateescape").decode("utf-8", "replace"))
        return
    interactive = sys.stdin.isatty()
    if isinstance(sys.stdin, io.TextIOWrapper):
        # Bytes that are no text become "\ufffd"; by default they may become characters that no tokenizer takes.
        sys.stdin.reconfigure(errors="replace")
    if interactive:
        print("/reset forgets the conversation, /quit ends it.")
    while True:
        try:
            line = input("> " if interactive else "").strip()
        except EOFError:
            return
        if line == "/quit":
            return
        if line == "/reset":
            chat.reset()
        elif line:
            chat.answer(line)
