"""Tokenizers of the GRIN-MoE family: chat template, loading, building and verifying. Without torch."""

from .build import SPECIAL_TOKENS, build_tokenizer, run_build
from .chat import (
    ChatStrings,
    check_unicode,
    control_token_in,
    control_tokens,
    encode_chat,
    encode_chat_with_mask,
    encode_text,
    encode_with_offsets,
)
from .loading import TOKENIZER_FILES, TokenizerError, check_tokenizer, load_tokenizer
from .options import BuildOptions, VerifyOptions
from .template import answer_ends, chat_template, template_difference
from .verify import run_verify
