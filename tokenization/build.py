"""Build a small tokenizer of the family: SentencePiece-like BPE with byte fallback, the family's special tokens.

The released tokenizer has 32,011 entries; this one is trained on any text in seconds and behaves alike: the same
normalisation (a leading space, spaces as "▁"), the same special tokens in the same order with the same whitespace rules,
the same chat template, and no beginning-of-sequence token.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, TokenizersBackend

# In the family's order, which the ids follow. The second value: whitespace right of the token belongs to it.
SPECIAL_TOKENS = (
    ("<|endoftext|>", False),
    ("<|assistant|>", True),
    ("<|placeholder1|>", True),
    ("<|placeholder2|>", True),
    ("<|placeholder3|>", True),
    ("<|placeholder4|>", True),
    ("<|system|>", True),
    ("<|end|>", True),
    ("<|placeholder5|>", True),
    ("<|placeholder6|>", True),
    ("<|user|>", True),
)
_FIRST_TOKENS = ("<unk>", "<s>", "</s>")
_BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
_SPACE = "▁"


def chat_template() -> str:
    """The family's chat template (Jinja), as released."""
    return (Path(__file__).parent / "chat_template.jinja").read_text(encoding="utf-8")


def build_tokenizer(
    texts: Iterable[str], vocab_size: int = 2048, model_max_length: int = 4096
) -> PreTrainedTokenizerFast:
    """
    Train a tokenizer on `texts`.

    Args:
        texts: plain text, without special tokens.
        vocab_size: all ids together: 259 for bytes and `<unk>`, `<s>`, `</s>`, 11 special tokens, the rest learned.
        model_max_length: the length from which the tokenizer warns.

    Returns:
        A tokenizer whose saved folder loads with `AutoTokenizer`, beside a `config.json` of model_type `grinmoe` too:
        its `tokenizer_class` is `TokenizersBackend`. (For this model type Transformers would otherwise build a Llama
        tokenizer, which drops the normaliser and gives other ids.)

    Raises:
        ValueError: `vocab_size` leaves no room for learned tokens, or there is no text.
    """
    fixed = len(_FIRST_TOKENS) + len(_BYTES)
    learned = vocab_size - len(SPECIAL_TOKENS)
    if learned <= fixed:
        raise ValueError(
            f"vocab_size={vocab_size} has no room for learned tokens beside {fixed} fixed and {len(SPECIAL_TOKENS)} "
            f"special ones; give more than {fixed + len(SPECIAL_TOKENS)}"
        )
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)])
    # Only while training: merges stay inside words, so that a small vocabulary is not spent on whole phrases.
    tokenizer.pre_tokenizer = pre_tokenizers.Split(_SPACE, behavior="merged_with_next")
    trainer = trainers.BpeTrainer(
        vocab_size=learned, special_tokens=[*_FIRST_TOKENS, *_BYTES], show_progress=False, limit_alphabet=256
    )
    texts = list(texts)
    if not any(texts):
        raise ValueError("there is no text to train a tokenizer on; give at least one non-empty string")
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.pre_tokenizer = None
    tokenizer = _without_special_bytes(tokenizer)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(_SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in ("<unk>", "<s>")])
    tokenizer.add_tokens([AddedToken("</s>", normalized=False, rstrip=True, special=False)])
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False, rstrip=rstrip, special=True) for token, rstrip in SPECIAL_TOKENS]
    )
    return TokenizersBackend(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        unk_token="<unk>",
        padding_side="left",
        model_max_length=model_max_length,
        clean_up_tokenization_spaces=False,
        chat_template=chat_template(),
    )


def _without_special_bytes(trained: Tokenizer) -> Tokenizer:
    """The trainer marks what it was given as special tokens; as such "<0x41>" in a text would become a byte."""
    content = json.loads(trained.to_str())
    content["added_tokens"] = []
    return Tokenizer.from_str(json.dumps(content))
