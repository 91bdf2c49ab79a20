"""The model as lm-eval asks it: control tokens come from the chat template alone. Imports lm-eval."""

from __future__ import annotations

from typing import Any

import torch
from lm_eval.models.huggingface import HFLM

from ..tokenization import ChatStrings


class EvaluatedModel(HFLM):
    """
    lm-eval's model, which encodes `<|end|>` in a question, a choice or an answer as the letters that it is written with.

    lm-eval renders a chat to a string, joins it with other texts, and encodes the whole. The three methods that do so are
    public, and are all that is overridden. Stop sequences (`until`) are compared with decoded text, and may be control
    tokens.

    Args:
        options: as of HFLM, with a `tokenizer` of `grinmoe.load_tokenizer`.
    """

    def __init__(self, **options: Any):
        self._strings = ChatStrings(options["tokenizer"])
        super().__init__(**options)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Render a conversation, so that `tok_encode` can tell the template's control tokens."""
        render = super().apply_chat_template
        return self._strings.render(chat_history, lambda messages: render(list(messages), add_generation_prompt))

    def tok_encode(
        self,
        string: str,
        add_special_tokens: bool | None = None,
        left_truncate_len: int | None = None,
        **kwargs: Any,
    ) -> list[int]:
        """Encode a text, or one with a rendered conversation in it."""
        if add_special_tokens is None:
            # As HFLM has it: a text that begins with the token needs no second one.
            first = self.tokenizer.decode(self.prefix_token_id)
            add_special_tokens = not self._strings.unsigned(string).startswith(first)
        ids = self._strings.encode(string, add_special_tokens)
        return ids[-left_truncate_len:] if left_truncate_len else ids

    def tok_batch_encode(
        self, strings: list[str], padding_side: str = "left", left_truncate_len: int | None = None, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode texts to a padded batch: ids and attention mask."""
        ids = [self.tok_encode(string) for string in strings]
        batch = self.tokenizer.pad(
            {"input_ids": ids}, padding="longest", padding_side=padding_side, return_tensors="pt"
        )
        kept = slice(-left_truncate_len if left_truncate_len else None, None)
        return batch["input_ids"][:, kept], batch["attention_mask"][:, kept]
