"""Tokenizers of the GRIN-MoE family: chat template, loading, building and verifying. Without torch."""

from .build import SPECIAL_TOKENS, build_tokenizer
from .loading import TOKENIZER_FILES, TokenizerError, check_tokenizer, load_tokenizer
from .template import answer_ends, chat_template, template_difference

__all__ = [
    "SPECIAL_TOKENS",
    "TOKENIZER_FILES",
    "TokenizerError",
    "answer_ends",
    "build_tokenizer",
    "chat_template",
    "check_tokenizer",
    "load_tokenizer",
    "template_difference",
]
