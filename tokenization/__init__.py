"""Tokenizers of the GRIN-MoE family: the chat template and the building of a small tokenizer. Without torch."""

from .build import SPECIAL_TOKENS, build_tokenizer, chat_template

__all__ = ["SPECIAL_TOKENS", "build_tokenizer", "chat_template"]
