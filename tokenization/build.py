"""Build tokenizers of the family: SentencePiece-like BPE with byte fallback, the family's special tokens.

From a source, `grinmoe tokenizer build` makes the released tokenizer again: of a tokenizer.model, of a GGUF's vocabulary, or
of a tokenizer.json that another class has damaged. Of text, `build_tokenizer` trains a small one in seconds that behaves
alike. Both have the same normalisation (a leading space, spaces as "▁"), the same special tokens in the same order with the
same whitespace rules, the same chat template, and no beginning-of-sequence token.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, TokenizersBackend

from .loading import vocab_size_beside
from .options import BuildOptions
from .sources import BYTE_TOKENS, FIRST_TOKENS, SPECIAL_TOKENS, Vocabulary, read_vocabulary, vocabulary_of_json
from .template import chat_template

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_SPACE = "▁"
_FAMILY_TOKENS = [
    AddedToken(token, normalized=False, rstrip=rstrip, special=token != "</s>")
    for token, rstrip in (("<unk>", False), ("<s>", False), ("</s>", True), *SPECIAL_TOKENS)
]
# The first three are written. The others are of older versions of Transformers, which puts their tokens above those of the
# first: a previous tokenizer's must not stay beside a new one.
_WRITTEN = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
_OUTDATED = ("special_tokens_map.json", "added_tokens.json", "additional_chat_templates")
_WORKSPACE = ".tokenizer-"
# What a folder must hold one of, to be one that a tokenizer belongs in.
_TOKENIZER_OR_MODEL = {*_WRITTEN, *_OUTDATED, "tokenizer.model", "config.json"}


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
        As from `assemble_tokenizer`.

    Raises:
        ValueError: `vocab_size` leaves no room for learned tokens, or there is no text.
    """
    fixed = len(FIRST_TOKENS) + len(BYTE_TOKENS)
    learned = vocab_size - len(SPECIAL_TOKENS)
    if learned <= fixed:
        raise ValueError(
            f"vocab_size={vocab_size} has no room for learned tokens beside {fixed} fixed and {len(SPECIAL_TOKENS)} "
            f"special ones; give more than {fixed + len(SPECIAL_TOKENS)}"
        )
    texts = list(texts)
    if not any(texts):
        raise ValueError("there is no text to train a tokenizer on; give at least one non-empty string")
    tokenizer = Tokenizer(_model())
    tokenizer.normalizer = _normalizer()
    # Only while training: merges stay inside words, so that a small vocabulary is not spent on whole phrases.
    tokenizer.pre_tokenizer = pre_tokenizers.Split(_SPACE, behavior="merged_with_next")
    trainer = trainers.BpeTrainer(
        vocab_size=learned, special_tokens=[*FIRST_TOKENS, *BYTE_TOKENS], show_progress=False, limit_alphabet=256
    )
    tokenizer.train_from_iterator(texts, trainer)
    # The trainer marks what it was given as special tokens; as such "<0x41>" in a text would become a byte.
    content = {**json.loads(tokenizer.to_str()), "added_tokens": []}
    return assemble_tokenizer(vocabulary_of_json(content), model_max_length)


def assemble_tokenizer(vocabulary: Vocabulary, model_max_length: int = 4096) -> PreTrainedTokenizerFast:
    """
    Put the family's normaliser, decoder, special tokens and chat template on a vocabulary.

    Every piece keeps its id. Special tokens of the family that the vocabulary lacks follow at the end; those that it has
    get the family's flags, other added tokens keep their own.

    Returns:
        A tokenizer whose saved folder loads with `AutoTokenizer`, beside a `config.json` of model_type `grinmoe` too:
        its `tokenizer_class` is `TokenizersBackend`. (For this model type Transformers would otherwise build a Llama
        tokenizer, which drops the normaliser and gives other ids.)

    Raises:
        ValueError: a piece would get another id.
    """
    added = {token.content: token for token in (*vocabulary.added, *_FAMILY_TOKENS)}
    pieces = vocabulary.pieces
    learned = len(pieces)
    while pieces[learned - 1] in added:
        learned -= 1
    tokenizer = Tokenizer(_model({piece: number for number, piece in enumerate(pieces[:learned])}, vocabulary.merges))
    tokenizer.normalizer = _normalizer()
    without_first_space = decoders.Strip(content=" ", left=1, right=0)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), without_first_space]
    )
    # An added token gets the id of its piece, or else the next one: those behind the learned pieces in their order, then
    # what the vocabulary lacks.
    position = {piece: number for number, piece in enumerate(pieces)}
    for token in sorted(added.values(), key=lambda token: position.get(token.content, len(pieces))):
        (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([token])
    moved = [piece for piece in pieces if tokenizer.token_to_id(piece) != position[piece]]
    if moved:
        raise ValueError(
            f"{moved[0]!r} has id {position[moved[0]]} in the source and would get {tokenizer.token_to_id(moved[0])}: a "
            "token is empty or stands twice; take a source whose tokens all differ"
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


def _model(vocab: dict[str, int] | None = None, merges: list[tuple[str, str]] | None = None) -> models.BPE:
    return models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)


def _normalizer() -> normalizers.Normalizer:
    return normalizers.Sequence([normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)])


def run_build(options: BuildOptions) -> None:
    """
    The command `grinmoe tokenizer build`: read a source, write the family's tokenizer, say so in one line.

    Raises:
        ValueError: source or output cannot be used (see `read_vocabulary`, `write_tokenizer`), or the model in the output
            folder has fewer ids.
        ImportError: the package that reads the source is not installed.
    """
    source, output = options.source, options.output
    folder = _checked_output(output)  # before the work
    vocabulary = read_vocabulary(source)
    tokenizer = assemble_tokenizer(vocabulary, options.model_max_length)
    vocab_size = vocab_size_beside(folder) if folder.is_dir() else None
    if vocab_size is not None and len(tokenizer) > vocab_size:
        raise ValueError(
            f"{source} has {len(tokenizer)} tokens, the model in --output {folder} has a vocab_size of {vocab_size}; take "
            "the source of the model's own tokenizer, or give a new folder"
        )
    removed = write_tokenizer(tokenizer, output)
    new = range(len(vocabulary.pieces), len(tokenizer))
    what = (
        f"added {len(new)} special tokens, ids {new[0]} to {new[-1]}" if new else "all special tokens as in the source"
    )
    outdated = f"; removed the outdated {' and '.join(removed)}" if removed else ""
    print(f"{output}: {len(tokenizer)} tokens, {len(vocabulary.merges)} merges; {what}{outdated}")


def write_tokenizer(tokenizer: PreTrainedTokenizerFast, output: str | os.PathLike) -> list[str]:
    """
    Save a tokenizer: written in a private folder first, then moved, so that no file is ever half-written.

    The output is a new or empty folder, or one with a tokenizer or a model. Of its files only the tokenizer's are replaced;
    what a previous one has left and would change the new one is removed. After an error everything is as it was. A killed
    process leaves the old tokenizer, the new one, or none that loads; the next call puts the new one there.

    Returns:
        Names of the files that were removed.

    Raises:
        ValueError: `output` is not a folder, or one with other things in it.
    """
    folder = _checked_output(output)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # On the file system of its final place: there moving is a rename.
    place = folder if folder.exists() else folder.parent
    with tempfile.TemporaryDirectory(prefix=_WORKSPACE, dir=place) as name, _locked(Path(name)):
        new, old = Path(name) / "new", Path(name) / "old"
        tokenizer.save_pretrained(new)
        _write_through(*new.iterdir(), new)
        removed = []
        if place == folder:
            old.mkdir()
            removed = _move_in(new, folder, old)
        else:
            new.rename(folder)
        _write_through(place)
    for left in _left_by_killed(place):
        shutil.rmtree(left, ignore_errors=True)
    return removed


def _move_in(new: Path, folder: Path, old: Path) -> list[str]:
    """Put the new files in place of the old ones, or leave all as it was. Returns the names of the outdated ones."""
    removed = [name for name in _OUTDATED if os.path.lexists(folder / name)]
    # Without tokenizer.json nothing loads: so it leaves first and comes last, and a killed process leaves no mixture.
    leaving = [name for name in (*_WRITTEN, *removed) if os.path.lexists(folder / name)]
    entering = sorted((path.name for path in new.iterdir()), key=lambda name: name == _WRITTEN[0])
    with contextlib.ExitStack() as undo:
        moves = [(folder / name, old / name) for name in leaving] + [(new / name, folder / name) for name in entering]
        for source, target in moves:
            source.rename(target)
            undo.callback(target.rename, source)
        undo.pop_all()
    return removed


def _write_through(*paths: Path) -> None:
    """What is renamed then survives a loss of power."""
    for path in paths if os.name == "posix" else ():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def _locked(workspace: Path) -> Iterator[None]:
    """Hold a lock on a folder, which ends with the process, however that ends."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(workspace, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _left_by_killed(place: Path) -> Iterator[Path]:
    """Workspaces that killed builds of this user have left: they hold nothing else, and nobody has their lock."""
    for path in place.glob(f"{_WORKSPACE}????????") if fcntl is not None else ():
        with contextlib.suppress(OSError):
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                files = {name for part in ("new", "old") if (path / part).is_dir() for name in os.listdir(path / part)}
                is_ours = {*os.listdir(path)} <= {"new", "old"} and files <= {*_WRITTEN, *_OUTDATED}
                if is_ours and os.fstat(descriptor).st_uid == os.geteuid():
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    yield path
            finally:
                os.close(descriptor)


def _checked_output(output: str | os.PathLike) -> Path:
    folder = Path(output)
    if not os.fspath(output):
        raise ValueError("--output is empty; give a folder ('.' is the current one)")
    if not folder.exists() and not folder.is_symlink():
        return folder
    if not folder.is_dir():
        raise ValueError(
            f"--output {folder} is not a folder but a file, FIFO, device or a link that leads nowhere; give a folder"
        )
    present = {path.name for path in folder.iterdir()} - {path.name for path in _left_by_killed(folder)}
    if present and not present & _TOKENIZER_OR_MODEL:
        raise ValueError(
            f"--output {folder} is not empty and holds neither a tokenizer nor a model's config.json; give a new folder"
        )
    for path in (folder / name for name in (*_WRITTEN, *_OUTDATED) if os.path.lexists(folder / name)):
        may_be_folder = path.name == "additional_chat_templates" and path.is_dir()
        if not (path.is_symlink() or path.is_file() or may_be_folder):
            kind = "a folder" if path.is_dir() else "something that is not a file"
            raise ValueError(f"--output {folder} has {kind} named {path.name}; move it away, or give a new folder")
    return folder
