"""Load a tokenizer as its tokenizer.json says, and find out when another class has changed its ids.

Transformers chooses a tokenizer's class by name. For the released GRIN-MoE the name is LlamaTokenizer, which puts its own
rules in place of the normaliser in tokenizer.json: a word behind a special token gets other ids than the model was trained
on, without an error. `TokenizersBackend` takes the file as it is.
"""

from __future__ import annotations

import os
from typing import Any

from transformers import PreTrainedConfig, TokenizersBackend

from .template import chat_template, marks_assistant, template_difference

# Without these a chat cannot be written: they open and close messages, and end the text.
CHAT_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>")
_HUB_ARGUMENTS = ("cache_dir", "force_download", "proxies", "token", "revision", "local_files_only", "subfolder")


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
        A TokenizersBackend. A chat template that renders like the family's but does not mark the assistant's text (the
        released one) is replaced by ours, so that assistant-only loss works; any other is kept.

    Raises:
        TokenizerError: (a ValueError) there is none or it cannot be read; a special token is missing; its ids exceed the
            vocabulary in config.json; its tokenizer.json was rewritten by another class.
    """
    name = os.fspath(source)
    try:
        tokenizer = TokenizersBackend.from_pretrained(source, **kwargs)
    except (OSError, KeyError, TypeError, ValueError) as error:
        remedy = (
            "put tokenizer.json and tokenizer_config.json there (grinmoe tokenizer build makes them from a tokenizer.model)"
            if os.path.isdir(source)
            else "check the name of the folder or Hub repository, the network and the token"
        )
        raise TokenizerError(
            f"no tokenizer can be loaded from {name!r}; {remedy}. Transformers says: {error}"
        ) from error
    if not check:
        return tokenizer
    try:
        check_tokenizer(tokenizer, _vocab_size_beside(source, kwargs))
    except TokenizerError as error:
        raise TokenizerError(f"{name}: {error}") from error
    if (
        not marks_assistant(tokenizer.chat_template)
        and _is_family(tokenizer)
        and template_difference(tokenizer) is None
    ):
        tokenizer.chat_template = chat_template()
    return tokenizer


def check_tokenizer(tokenizer: Any, vocab_size: int | None = None) -> None:
    """
    Hold a tokenizer against the model, and against its family's rules if it has the family's chat tokens.

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
    if _is_family(tokenizer):
        _check_chat_tokens(tokenizer, vocabulary)
        _check_behind_special_tokens(tokenizer, vocabulary)


def _is_family(tokenizer: Any) -> bool:
    """By what tells it apart: the token that opens an answer, in its vocabulary or in its template."""
    return "<|assistant|>" in tokenizer.get_vocab() or "<|assistant|>" in str(tokenizer.chat_template or "")


def _check_chat_tokens(tokenizer: Any, vocabulary: dict[str, int]) -> None:
    missing = [token for token in CHAT_TOKENS if token not in vocabulary]
    if missing:
        raise TokenizerError(
            f"the tokenizer lacks the special tokens {', '.join(missing)}, which its chats are written with; build it "
            "again from the model's tokenizer.model or tokenizer.json (grinmoe tokenizer build)"
        )
    for token in CHAT_TOKENS:
        ids = tokenizer(token, add_special_tokens=False).input_ids
        if ids != [vocabulary[token]]:
            raise TokenizerError(
                f"the tokenizer takes {token} apart, into {tokenizer.convert_ids_to_tokens(ids)}: it is in the vocabulary "
                "but not among the added tokens; build it again (grinmoe tokenizer build --source tokenizer.json)"
            )


def _check_behind_special_tokens(tokenizer: Any, vocabulary: dict[str, int]) -> None:
    """The silent trap: what follows a special token is normalised like the start of a text, or has other ids."""
    expected = [vocabulary["<|user|>"], *tokenizer("Hello", add_special_tokens=False).input_ids]
    ids = tokenizer("<|user|>\nHello", add_special_tokens=False).input_ids
    if ids == expected:
        return
    name = type(tokenizer).__name__
    what = f"'<|user|>\\nHello' becomes {ids} where the model was trained on {expected}"
    if name != TokenizersBackend.__name__:
        raise TokenizerError(
            f"the tokenizer is a {name}, which ignores the normaliser of its tokenizer.json: {what}. Load it with "
            "grinmoe.load_tokenizer, or with AutoTokenizer after `import grinmoe`; do not save this one, that would make "
            "it permanent"
        )
    raise TokenizerError(
        f"its tokenizer.json was rewritten by another tokenizer class (LlamaTokenizer does that on saving): {what}. Take "
        "the original file, or restore it: grinmoe tokenizer build --source tokenizer.json --output FOLDER"
    )


def _vocab_size_beside(source: str | os.PathLike, kwargs: dict[str, Any]) -> int | None:
    """From the config.json beside the tokenizer, if there is one."""
    where = {name: kwargs[name] for name in _HUB_ARGUMENTS if name in kwargs}
    try:
        config, _ = PreTrainedConfig.get_config_dict(source, **where)
    except (OSError, ValueError):  # a tokenizer without a model; a broken config is for the model's loader to name
        return None
    return config.get("vocab_size")
