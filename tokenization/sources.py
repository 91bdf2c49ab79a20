"""Read what a tokenizer has learned from a file: a SentencePiece model, the vocabulary of a GGUF, or a tokenizer.json.

Taken are the pieces in the order of their ids and the merges in the order of their rank. How text is normalised and decoded,
and what the family's special tokens are like, is no matter of the source: `build.py` puts that on. So a tokenizer.json whose
normaliser another class has replaced is as good a source as the original.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

# What every tokenizer of the family has. The special tokens are in the order that their ids follow; the second value:
# whitespace right of the token belongs to it.
FIRST_TOKENS = ("<unk>", "<s>", "</s>")
BYTE_TOKENS = tuple(f"<0x{byte:02X}>" for byte in range(256))
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

# Types of a piece, as both SentencePiece and GGUF number them.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_PADDING = re.compile(r"\[PAD\d*\]")
_PROBE = "  ﬁ  x "
_GGUF_LISTS = {"tokens": str, "token_type": int, "scores": float, "merges": str}
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass(frozen=True)
class Vocabulary:
    """What a tokenizer has learned."""

    pieces: list[str]  # the text of every id, from 0 on
    merges: list[tuple[str, str]]  # the first to be merged first
    # Tokens that are found in a text before anything else is: control and user-defined ones of the source.
    added: list[AddedToken] = field(default_factory=list)


def read_vocabulary(source: str | os.PathLike) -> Vocabulary:
    """
    Read a SentencePiece model (`*.model`), a GGUF (`*.gguf`) or a tokenizer.json (`*.json`) of type BPE.

    Entries at the end of a GGUF's vocabulary that only fill the embedding are dropped.

    Raises:
        ValueError: there is no such file, it is damaged, or no tokenizer of the family can be made of it; says what to do.
        ImportError: the package that reads this format is not installed.
    """
    path = Path(source)
    readers = {".model": _read_sentencepiece, ".gguf": _read_gguf, ".json": _read_tokenizer_json}
    if not path.is_file():
        raise ValueError(f"there is no file {path}; give a tokenizer.model, *.gguf or tokenizer.json, not a folder")
    if path.suffix.lower() not in readers:
        raise ValueError(
            f"{path} ends in {path.suffix!r}, which no format here has; give a tokenizer.model, a *.gguf or a "
            "tokenizer.json (rename the file if it is one)"
        )
    try:
        vocabulary = readers[path.suffix.lower()](path)
        _check(vocabulary)
    except ImportError as error:
        raise ImportError(f"reading {path} needs {error.name}: pip install 'grinmoe[tokenizer]'") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return vocabulary


def vocabulary_of_json(content: Any) -> Vocabulary:
    """Read a parsed tokenizer.json; raises ValueError where it is not of type BPE, or its ids have gaps or stand twice."""
    model = content.get("model") if isinstance(content, dict) else None
    if not isinstance(model, dict) or model.get("type") != "BPE":
        raise ValueError("it has no model of type BPE; give the tokenizer.json of a tokenizer that has one")
    vocab: Any = model.get("vocab")
    added = content.get("added_tokens") or []
    merges = _pairs(vocab, model.get("merges"))
    if not isinstance(added, list) or not all(
        isinstance(token, dict) and isinstance(token.get("content"), str) and type(token.get("id")) is int
        for token in added
    ):
        raise ValueError("its added_tokens are no list of tokens with id and content; take the original file again")
    of_vocab = {(number, piece) for piece, number in vocab.items()}
    numbered = sorted(of_vocab | {(token["id"], token["content"]) for token in added})
    for place, (number, piece) in enumerate(numbered):
        # The library would count added tokens on without a gap, so that file and tokenizer had different ids.
        if number != place:
            raise ValueError(
                f"{piece!r} has the id {number} where {place} follows, and ids must neither leave a gap nor stand twice; "
                "take the original file again"
            )
    tokens = [AddedToken(token["content"], **{flag: token.get(flag) is True for flag in _FLAGS}) for token in added]
    return Vocabulary([piece for _, piece in numbered], merges, tokens)


def _pairs(vocab: Any, merges: Any) -> list[tuple[str, str]]:
    """Merges as tokenizer.json has them, ["a", "b"], or as older ones and GGUF have them, "a b"; all of known pieces."""
    content = {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": vocab, "merges": merges}}
    try:
        tokenizer = Tokenizer.from_str(json.dumps(content))
    except Exception as error:  # the library raises nothing more particular
        raise ValueError(f"its vocabulary and merges cannot be read ({error}); take the original file again") from error
    return [(left, right) for left, right in json.loads(tokenizer.to_str())["model"]["merges"]]


def _read_tokenizer_json(path: Path) -> Vocabulary:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is not JSON ({error}); take the original file again") from error
    return vocabulary_of_json(content)


def _read_sentencepiece(path: Path) -> Vocabulary:
    from sentencepiece import SentencePieceProcessor

    content = path.read_bytes()
    if not content:  # the library takes it, and then writes to stderr with every call
        raise ValueError("the file is empty; download it again")
    try:
        processor = SentencePieceProcessor(model_proto=content)
    except RuntimeError as error:
        raise ValueError(f"it is not a SentencePiece model, or not a whole one; download it again ({error})") from error
    _check_sentencepiece(processor)
    numbers = list(range(processor.get_piece_size()))
    pieces, scores = processor.id_to_piece(numbers), processor.get_score(numbers)
    tests = {
        _UNKNOWN: processor.is_unknown,
        _CONTROL: processor.is_control,
        _UNUSED: processor.is_unused,
        _BYTE: processor.is_byte,
    }
    types = [next((kind for kind, test in tests.items() if test(number)), _NORMAL) for number in numbers]
    merges = merges_by_score(pieces, scores, types)
    # The processor does not say which pieces are user-defined. But for the family's tokens they are refused: SentencePiece
    # does not set them apart in a text the way added tokens are, so the family's tokenizer could not give the same ids.
    known = {left + right for left, right in merges} | {token for token, _ in SPECIAL_TOKENS}
    for piece, kind in zip(pieces, types, strict=True):
        if kind == _NORMAL and len(piece) > 1 and piece not in known:
            raise ValueError(
                f"no merge makes its piece {piece!r}: that is a user-defined symbol, or the model's type is not bpe; take "
                "the tokenizer.json of the same model as source"
            )
    return Vocabulary(pieces, merges, _added(pieces, types))


def _check_sentencepiece(processor: Any) -> None:
    """Refuse other types and normalisations, by what the processor does: reading its settings would take protobuf."""
    try:
        processor.nbest_encode("x", nbest_size=2)
    except RuntimeError:
        pass  # BPE knows one segmentation
    else:
        raise ValueError(
            "its type is unigram (or its settings are cut off), and this family's is BPE; give a model trained with "
            "model_type=bpe, whole"
        )
    expected = "▁" + _PROBE.replace(" ", "▁")
    normalized = processor.normalize(_PROBE)
    if normalized != expected:
        raise ValueError(
            f"it normalises {_PROBE!r} to {normalized!r}, this family to {expected!r}; give a model trained with "
            "normalization_rule_name=identity, add_dummy_prefix and without remove_extra_whitespaces"
        )


def merges_by_score(pieces: Sequence[str], scores: Sequence[float], types: Sequence[int]) -> list[tuple[str, str]]:
    """
    The merges that a vocabulary with scores implies: SentencePiece joins the neighbours whose union has the highest score.

    Every way to cut a normal piece into two normal pieces is a merge, of the rank of the piece. Among equal scores (the
    runs of spaces of Llama's vocabulary) the ids of left and right part decide, as in the converter that made the released
    tokenizer.json; the one that Transformers has now (`generate_merges`) orders them by length.
    """
    normal = {piece: number for number, (piece, kind) in enumerate(zip(pieces, types, strict=True)) if kind == _NORMAL}
    cuts = [(piece[:place], piece[place:]) for piece in normal for place in range(1, len(piece))]
    merges = [(left, right) for left, right in cuts if left in normal and right in normal]
    return sorted(merges, key=lambda pair: (-scores[normal["".join(pair)]], normal[pair[0]], normal[pair[1]]))


def _added(pieces: Sequence[str], types: Sequence[int]) -> list[AddedToken]:
    return [
        AddedToken(piece, normalized=False, special=kind == _CONTROL)
        for piece, kind in zip(pieces, types, strict=True)
        if kind in (_CONTROL, _USER_DEFINED)
    ]


def _read_gguf(path: Path) -> Vocabulary:
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        fields = {name: reader.get_field(f"tokenizer.ggml.{name}") for name in ("model", *_GGUF_LISTS)}
        found = {name: field.contents() for name, field in fields.items() if field is not None}
    except (IndexError, KeyError, ValueError) as error:  # no UTF-8 is a ValueError too
        raise ValueError(f"it is not a GGUF file, or not a whole one; download it again ({error})") from error
    model, pieces, merges = found.get("model"), found.get("tokens") or [], found.get("merges")
    if model != "llama" or not pieces:
        raise ValueError(
            f"it holds no vocabulary of this family: its tokenizer.ggml.model is {model!r} in place of 'llama' "
            "(SentencePiece BPE), or it has no tokenizer.ggml.tokens; give a GGUF of the family, or of its vocabulary"
        )
    for name, kind in _GGUF_LISTS.items():
        values = found.get(name, [])
        is_list = isinstance(values, list) and all(isinstance(value, kind) for value in values)
        if not is_list or (values and name != "merges" and len(values) != len(pieces)):
            raise ValueError(
                f"its tokenizer.ggml.{name} is not a list of {kind.__name__}, or not of one for each of its {len(pieces)} "
                "tokens; download it again"
            )
    # Without types llama.cpp, too, takes all for normal.
    types, scores = found.get("token_type") or [_NORMAL] * len(pieces), found.get("scores")
    while pieces and (types[-1] == _UNUSED or _PADDING.fullmatch(pieces[-1])):
        pieces, types = pieces[:-1], types[:-1]  # they fill the embedding; no text gives them
    if merges is not None:
        vocab = {piece: number for number, piece in enumerate(pieces)}
        return Vocabulary(pieces, _pairs(vocab, merges), _added(pieces, types))
    if not scores or len({score for score, kind in zip(scores, types) if kind == _NORMAL}) == 1:
        # llama.cpp's converter writes equal scores where it has a tokenizer.json and no tokenizer.model.
        raise ValueError(
            "it has neither tokenizer.ggml.merges nor tokenizer.ggml.scores that differ, so no order of merges; take the "
            "tokenizer.json that it was made from"
        )
    return Vocabulary(pieces, merges_by_score(pieces, scores, types), _added(pieces, types))


def _check(vocabulary: Vocabulary) -> None:
    known = Counter(vocabulary.pieces)
    twice = [piece for piece, count in known.items() if count > 1]
    if twice:
        raise ValueError(f"it has the piece {twice[0]!r} {known[twice[0]]} times; take the original file again")
    missing = [token for token in (*FIRST_TOKENS, *BYTE_TOKENS) if token not in known]
    if missing:
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise ValueError(
            f"it lacks {shown}; tokenizers of this family have <unk>, <s>, </s> and all 256 bytes <0x00> to <0xFF>: give a "
            "SentencePiece BPE with byte fallback"
        )
