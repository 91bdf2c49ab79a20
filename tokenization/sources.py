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
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken

if TYPE_CHECKING:
    from gguf import GGUFReader

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
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass(frozen=True)
class Vocabulary:
    """
    What a tokenizer has learned.

    Args:
        pieces: the text of every id, from 0 on.
        merges: pairs of pieces, the first to be merged first.
        added: tokens that are found in a text before anything else is: control and user-defined ones of the source.
    """

    pieces: list[str]
    merges: list[tuple[str, str]]
    added: list[AddedToken] = field(default_factory=list)


def read_vocabulary(source: str | os.PathLike) -> Vocabulary:
    """
    Read pieces and merges from a file, and check that a tokenizer of the family can be made of them.

    Args:
        source: a SentencePiece model of type BPE (`*.model`), a GGUF file with the vocabulary of one (`*.gguf`), or a
            tokenizer.json of type BPE (`*.json`).

    Returns:
        Pieces, merges and added tokens. Entries at the end of a GGUF's vocabulary that only fill the embedding are dropped.

    Raises:
        ValueError: there is no such file, it is damaged, or its tokenizer is of another kind; says what to do.
        ImportError: the package that reads this format is not installed.
    """
    path = Path(source)
    readers = {".model": _read_sentencepiece, ".gguf": _read_gguf, ".json": _read_tokenizer_json}
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name the file in it (tokenizer.model, tokenizer.json or a *.gguf)")
    if not path.is_file():
        raise ValueError(f"there is no file {path}; give a tokenizer.model, a *.gguf or a tokenizer.json")
    if path.suffix.lower() not in readers:
        raise ValueError(
            f"{path} ends in {path.suffix!r}, which no format here has; give a tokenizer.model, a *.gguf or a "
            "tokenizer.json (rename the file if it is one)"
        )
    try:
        vocabulary = readers[path.suffix.lower()](path)
        _check(vocabulary)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return vocabulary


def vocabulary_of_json(content: dict[str, Any]) -> Vocabulary:
    """
    Pieces and merges of a tokenizer.json.

    Args:
        content: the parsed file.

    Raises:
        ValueError: it is not of type BPE, or its ids have gaps or are given twice.
    """
    model = content.get("model")
    kind = model.get("type") if isinstance(model, dict) else None
    if not isinstance(model, dict) or kind != "BPE":
        raise ValueError(f"its model is of type {kind!r}; only BPE can be taken: give the tokenizer.json of such a one")
    vocab, merges, added = model.get("vocab"), model.get("merges"), content.get("added_tokens") or []
    if not (isinstance(vocab, dict) and isinstance(merges, list) and isinstance(added, list)):
        raise ValueError("its vocab, merges or added_tokens are missing or no lists; take the original file again")
    if not all(isinstance(token, dict) and isinstance(token.get("content"), str) for token in added):
        raise ValueError("an entry of its added_tokens has no content; take the original file again")
    pieces = _by_id([*vocab.items(), *((token["content"], token.get("id")) for token in added)])
    tokens = [AddedToken(token["content"], **{flag: token.get(flag) is True for flag in _FLAGS}) for token in added]
    return Vocabulary(pieces, [_pair(merge) for merge in merges], tokens)


def _by_id(entries: list[tuple[str, Any]]) -> list[str]:
    found: dict[int, str] = {}
    for text, number in entries:
        if type(number) is not int or number < 0:
            raise ValueError(f"the id of {text!r} is {number!r}, not a whole number; take the original file again")
        if found.setdefault(number, text) != text:
            raise ValueError(f"id {number} is given to {found[number]!r} and to {text!r}; take the original file again")
    gap = next((number for number in range(len(found)) if number not in found), None)
    if gap is not None:
        # The library would count added tokens on without the gap, so that file and tokenizer had different ids.
        raise ValueError(f"no token has the id {gap}, but one has {max(found)}; give a file whose ids have no gap")
    return [found[number] for number in range(len(found))]


def _pair(merge: Any) -> tuple[str, str]:
    """A merge as tokenizer.json has it, ["a", "b"], or as older ones and GGUF have it, "a b"."""
    parts = merge.split(" ") if isinstance(merge, str) else merge
    if not (isinstance(parts, list) and len(parts) == 2 and all(isinstance(part, str) for part in parts)):
        raise ValueError(f"the merge {merge!r} is not a pair of pieces; take the original file again")
    return parts[0], parts[1]


def _read_tokenizer_json(path: Path) -> Vocabulary:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"it is not JSON ({error}); take the original file again") from error
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}, not the object that a tokenizer.json is")
    return vocabulary_of_json(content)


def _read_sentencepiece(path: Path) -> Vocabulary:
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError as error:
        raise ImportError(f"reading {path} needs sentencepiece: pip install 'grinmoe[tokenizer]'") from error
    content = path.read_bytes()
    if not content:  # the library takes it, and then writes to stderr with every call
        raise ValueError("the file is empty; download it again")
    try:
        processor = SentencePieceProcessor(model_proto=content)
    except RuntimeError as error:
        raise ValueError(f"it is not a SentencePiece model, or not a whole one; download it again ({error})") from error
    _check_sentencepiece(processor)
    numbers = range(processor.get_piece_size())
    pieces = [processor.id_to_piece(number) for number in numbers]
    scores = [processor.get_score(number) for number in numbers]
    types = [_sentencepiece_type(processor, number) for number in numbers]
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
    """Type and normalisation, by what the processor does: reading its settings would take protobuf."""
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


def _sentencepiece_type(processor: Any, number: int) -> int:
    if processor.is_unknown(number):
        return _UNKNOWN
    if processor.is_control(number):
        return _CONTROL
    if processor.is_unused(number):
        return _UNUSED
    return _BYTE if processor.is_byte(number) else _NORMAL


def merges_by_score(pieces: Sequence[str], scores: Sequence[float], types: Sequence[int]) -> list[tuple[str, str]]:
    """
    The merges that a vocabulary with scores implies: SentencePiece joins the neighbours whose union has the highest score.

    Every way to cut a piece in two pieces is a merge, of the rank of the piece. Among equal scores (the runs of spaces of
    Llama's vocabulary) the ids of left and right part decide, as in the converter that made the released tokenizer.json.

    Args:
        pieces, scores, types: text, score and type (1: normal) of every id.

    Returns:
        Pairs of pieces, the first to be merged first. Control, byte and unused pieces take no part.
    """
    normal = {piece: number for number, (piece, kind) in enumerate(zip(pieces, types, strict=True)) if kind == _NORMAL}
    found = []
    for piece, number in normal.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in normal and right in normal:
                found.append((-scores[number], normal[left], normal[right]))
    return [(pieces[left], pieces[right]) for _, left, right in sorted(found)]


def _added(pieces: Sequence[str], types: Sequence[int]) -> list[AddedToken]:
    return [
        AddedToken(piece, normalized=False, special=kind == _CONTROL)
        for piece, kind in zip(pieces, types, strict=True)
        if kind in (_CONTROL, _USER_DEFINED)
    ]


def _read_gguf(path: Path) -> Vocabulary:
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ImportError(f"reading {path} needs gguf: pip install 'grinmoe[tokenizer]'") from error
    try:
        reader = GGUFReader(path)
    except (IndexError, KeyError, ValueError) as error:
        raise ValueError(f"it is not a GGUF file, or not a whole one; download it again ({error})") from error
    model_field = reader.get_field("tokenizer.ggml.model")
    pieces = _gguf_list(reader, "tokens", str)
    if model_field is None or not pieces:
        raise ValueError("it holds no vocabulary (tokenizer.ggml.tokens); give the GGUF of a model, or of a vocabulary")
    model = model_field.contents()
    if model != "llama":
        raise ValueError(
            f"its tokenizer.ggml.model is {model!r}, this family's is 'llama' (SentencePiece BPE); give a GGUF of the family"
        )
    # Without types llama.cpp, too, takes all for normal.
    types = _gguf_list(reader, "token_type", int) or [_NORMAL] * len(pieces)
    scores, merges = _gguf_list(reader, "scores", float), _gguf_list(reader, "merges", str)
    for name, values in (("token_type", types), ("scores", scores)):
        if values is not None and len(values) != len(pieces):
            raise ValueError(
                f"its tokenizer.ggml.{name} has {len(values)} entries for {len(pieces)} tokens; download it again"
            )
    while pieces and (types[-1] == _UNUSED or _PADDING.fullmatch(pieces[-1])):
        # To the end of the embedding; no text gives these.
        pieces, types = pieces[:-1], types[:-1]
    if merges is not None:
        return Vocabulary(pieces, [_pair(merge) for merge in merges], _added(pieces, types))
    if scores is None:
        raise ValueError("it has neither tokenizer.ggml.merges nor tokenizer.ggml.scores; give a GGUF with one of them")
    ranks = {score for score, kind in zip(scores, types) if kind == _NORMAL}
    if len(ranks) == 1:
        # llama.cpp's converter writes so where it has a tokenizer.json and no tokenizer.model.
        raise ValueError(
            f"all its scores are {ranks.pop()}: no order of merges; take the tokenizer.json that it was made from"
        )
    return Vocabulary(pieces, merges_by_score(pieces, scores, types), _added(pieces, types))


def _gguf_list(reader: GGUFReader, name: str, kind: type) -> list | None:
    """The array tokenizer.ggml.`name`; None if the file has none."""
    entry = reader.get_field(f"tokenizer.ggml.{name}")
    if entry is None:
        return None
    try:
        values = entry.contents()
    except (IndexError, ValueError) as error:  # cut off, or no UTF-8
        raise ValueError(f"its tokenizer.ggml.{name} cannot be read ({error}); download it again") from error
    if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
        raise ValueError(
            f"its tokenizer.ggml.{name} is not a list of {kind.__name__}; give a GGUF that llama.cpp loads"
        )
    return values


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
    for left, right in vocabulary.merges:
        absent = next((piece for piece in (left, right, left + right) if piece not in known), None)
        if absent is not None:
            raise ValueError(
                f"its merge of {left!r} and {right!r} needs {absent!r}, which is not in the vocabulary; take the original "
                "file again"
            )
