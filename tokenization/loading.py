"""Load a tokenizer as its tokenizer.json says, and find out when another class has changed its ids.

Transformers chooses a tokenizer's class by name. For the released GRIN-MoE the name is LlamaTokenizer, which puts its own
rules in place of the normaliser in tokenizer.json: a word behind a special token gets other ids than the model was trained
on, without an error. `TokenizersBackend` takes the file as it is.
"""

from __future__ import annotations

import itertools
import os
import re
import reprlib
from collections.abc import Sequence
from typing import Any

from tokenizers import decoders
from transformers import PreTrainedConfig, TokenizersBackend

from .template import with_marks

# What a tokenizer may consist of, for who copies one.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
# What opens and closes messages, and what ends the text.
_ROLE_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
_END_OF_TEXT = "<|endoftext|>"
_HUB_ARGUMENTS = ("cache_dir", "force_download", "proxies", "token", "revision", "local_files_only", "subfolder")
# Characters.
LONGEST_ADDED_TOKEN = 512
_LONGEST_TEMPLATE = 2**20
_SPACE = "▁"
_BYTES_TO_TEXT = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
# Each of them comes out otherwise if a rule of the family is lost: the space in front, every further space, bytes for what
# is not in the vocabulary.
_PROBES = ("Hello", " Hello", "  two", "a\n\tb")


class TokenizerError(ValueError):
    """A tokenizer that cannot be used: unreadable, incomplete, or giving other ids than the model was trained on."""


def load_tokenizer(source: str | os.PathLike, *, check: bool = True, **kwargs: Any) -> TokenizersBackend:
    """
    The tokenizer of a checkpoint, always of the right class, and checked.

    Args:
        source: folder with a tokenizer.json, or id of a Hub repository.
        check: whether to refuse one that would give wrong ids.
        kwargs: as in `from_pretrained`: `revision`, `token`, `cache_dir`, `subfolder`, `local_files_only`, ...

    Returns:
        A TokenizersBackend. The released chat template is replaced by ours, which renders alike and marks the assistant's
        text, so that assistant-only loss works; any other template is kept.

    Raises:
        TokenizerError: (a ValueError) there is none or it cannot be read; its chat template, an added token or its
            model_max_length has another type or is far too long; a special token is missing; its ids exceed the
            vocabulary in config.json; its tokenizer.json was rewritten by another class.
    """
    name = os.fspath(source)
    try:
        tokenizer = TokenizersBackend.from_pretrained(source, **kwargs)
    except Exception as error:  # the tokenizers library raises nothing more particular for a file that is not its own
        remedy = (
            "put tokenizer.json and tokenizer_config.json there (grinmoe tokenizer build makes them from a tokenizer.model)"
            if os.path.isdir(source)
            else "check the name of the folder or Hub repository, that it holds a tokenizer.json, the network and the token"
        )
        raise TokenizerError(
            f"no tokenizer can be loaded from {name!r}; {remedy}. Transformers says: {error}"
        ) from error
    try:
        _check_settings(tokenizer)
        if not check:
            return tokenizer
        check_tokenizer(tokenizer, vocab_size_beside(source, **kwargs))
    except TokenizerError as error:
        raise TokenizerError(f"{name}: {error}") from error
    if "chat_template" not in kwargs:
        tokenizer.chat_template = with_marks(tokenizer.chat_template)
    return tokenizer


def _check_settings(tokenizer: Any) -> None:
    """What Transformers takes from the files without looking at it, and trips over when a text is encoded."""
    length, template = tokenizer.model_max_length, tokenizer.chat_template
    if not isinstance(length, int | float) or isinstance(length, bool) or length != length:
        raise TokenizerError(
            f"its model_max_length is {reprlib.repr(length)}, not a number; correct it in tokenizer_config.json"
        )
    templates = template if isinstance(template, dict) else {"chat_template": template}
    for name, text in templates.items():
        if text is not None and not isinstance(text, str):
            raise TokenizerError(f"its {name} is {reprlib.repr(text)}, not a Jinja template; correct or remove it")
        if text is not None and len(text) > _LONGEST_TEMPLATE:
            raise TokenizerError(
                f"its {name} has {len(text):,} characters, and at most {_LONGEST_TEMPLATE:,} are taken; shorten it"
            )
    for token in tokenizer.added_tokens_decoder.values():
        if len(token.content) > LONGEST_ADDED_TOKEN:
            raise TokenizerError(
                f"its added token {reprlib.repr(token.content)} has {len(token.content):,} characters, and at most "
                f"{LONGEST_ADDED_TOKEN} are taken; take the original files again"
            )


def check_tokenizer(tokenizer: Any, vocab_size: int | None = None) -> None:
    """
    Hold a tokenizer against the model, and against its family's rules if it has the family's pieces and chat tokens.

    Args:
        tokenizer: any tokenizer of Transformers.
        vocab_size: rows of the model's embedding; the tokenizer may have fewer ids, not more.

    Raises:
        TokenizerError: what is wrong, and what to do.
    """
    vocabulary = tokenizer.get_vocab()
    last, last_id = max(vocabulary.items(), key=lambda item: item[1], default=("", -1))
    if vocab_size is not None and last_id >= vocab_size:
        raise TokenizerError(
            f"the tokenizer gives ids up to {last_id} ({last!r}), the model's vocab_size is {vocab_size}; take the model's "
            "own tokenizer, or enlarge the model (resize_token_embeddings) and train it"
        )
    written = [token for token in _ROLE_TOKENS if token in str(tokenizer.chat_template or "")]
    has_family_pieces = "<0x0A>" in vocabulary and any(piece.startswith(_SPACE) for piece in vocabulary)
    is_family = has_family_pieces and any(token in vocabulary for token in _ROLE_TOKENS)
    _check_special_tokens(tokenizer, vocabulary, (*_ROLE_TOKENS, _END_OF_TEXT) if is_family else written)
    problem = _broken_rule(tokenizer, vocabulary) if is_family else None
    name = type(tokenizer).__name__
    if problem and name != TokenizersBackend.__name__:
        raise TokenizerError(
            f"the tokenizer is a {name}, which does not do what its tokenizer.json says: {problem}. Load it with "
            "grinmoe.load_tokenizer, or with AutoTokenizer after `import grinmoe`; do not save this one, that would make "
            "it permanent"
        )
    if problem:
        raise TokenizerError(
            f"its tokenizer.json is not the family's any more (another tokenizer class rewrites it on saving): {problem}. "
            "Take the original file, or restore it: grinmoe tokenizer build --source tokenizer.json --output FOLDER"
        )


def _check_special_tokens(tokenizer: Any, vocabulary: dict[str, int], required: Sequence[str]) -> None:
    missing = [token for token in required if token not in vocabulary]
    if missing:
        raise TokenizerError(
            f"the tokenizer lacks the special tokens {', '.join(missing)}, which its chats are written with; build it "
            "again from the model's tokenizer.model or tokenizer.json (grinmoe tokenizer build)"
        )
    for token in required:
        ids = tokenizer(token, add_special_tokens=False).input_ids
        if ids != [vocabulary[token]]:
            raise TokenizerError(
                f"the tokenizer takes {token} apart, into {tokenizer.convert_ids_to_tokens(ids)}: it is in the vocabulary "
                "but not among the added tokens; build it again (grinmoe tokenizer build --source tokenizer.json)"
            )
    # Fine-tuning may let the end of a message end the text.
    if _END_OF_TEXT in required and tokenizer.eos_token not in (_END_OF_TEXT, "<|end|>"):
        raise TokenizerError(
            f"the tokenizer's eos_token is {tokenizer.eos_token!r}, the family's is {_END_OF_TEXT!r}: chats would end with "
            "what the model was not trained on; correct eos_token in tokenizer_config.json"
        )


def _broken_rule(tokenizer: Any, vocabulary: dict[str, int]) -> str | None:
    """A clause that says what the tokenizer does otherwise than the family's tokenizer with any vocabulary, or None."""
    plain = tokenizer("Hello", add_special_tokens=False).input_ids
    if (ids := tokenizer("Hello").input_ids) != plain:
        return f"it puts tokens around a text ('Hello' becomes {tokenizer.convert_ids_to_tokens(ids)})"
    for before, probe in itertools.product(("", "<|user|>\n"), _PROBES):
        # Whitespace behind <|user|> belongs to it.
        wanted = _SPACE + (probe.lstrip() if before else probe).replace(" ", _SPACE)
        tokens = tokenizer.convert_ids_to_tokens(tokenizer(before + probe, add_special_tokens=False).input_ids)
        if _BYTES_TO_TEXT.decode(tokens[bool(before) :]) != wanted:
            return f"{before + probe!r} becomes {tokens}, where the model was trained on {wanted!r} in pieces"
    longest = max((piece for piece in vocabulary if re.fullmatch(_SPACE + "[a-z]{3,}", piece)), key=len, default=None)
    if longest and len(tokenizer(longest[1:], add_special_tokens=False).input_ids) >= len(longest):
        return f"it has no merges ({longest[1:]!r} is taken apart into letters)"
    return None


def vocab_size_beside(source: str | os.PathLike, **kwargs: Any) -> int | None:
    """vocab_size in the config.json beside a tokenizer, if there is one; arguments as of `load_tokenizer`."""
    where = {name: kwargs[name] for name in _HUB_ARGUMENTS if name in kwargs}
    try:
        config, _ = PreTrainedConfig.get_config_dict(source, **where)
    except (OSError, ValueError):  # a tokenizer without a model; a broken config is for the model's loader to name
        return None
    vocab_size = config.get("vocab_size")
    return vocab_size if isinstance(vocab_size, int) else None
