"""What is in a file, told by its bytes: formats that can run code, text inside pictures, SentencePiece models."""

from __future__ import annotations

import os
import pickletools
import re
import stat
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

# Formats that are pickles, or hold them, or hold programs. By name: each of these is written by a well-known program.
PICKLE_SUFFIXES = (
    *(".bin", ".pt", ".pth", ".pkl", ".pickle", ".dill", ".ckpt", ".joblib", ".npy", ".npz", ".sav", ".pdparams"),
    *(".h5", ".hdf5", ".keras", ".mar", ".nemo", ".ptl", ".torchscript", ".pt2", ".pte", ".whl", ".msgpack"),
)
_START_BYTES = 2**26  # longer than any file of a checkpoint except the weights
_MOST_TEXT_BYTES = 2**20
_SIGNATURES = {
    "a pickle": rb"\x80[\x00-\x0f]",
    "a zip archive, as torch.save and Keras write it": rb"PK(\x03\x04|\x05\x06|\x07\x08)",
    "a NumPy array, which can hold a pickle": rb"\x93NUMPY",
    "an HDF5 file, which can hold code": rb"(?:.{512}|.{1024}|.{2048})?\x89HDF\r\n\x1a\n",
    "a tar archive": rb".{257}ustar",
    "a compressed file": (
        rb"\x1f\x8b|BZh[1-9]1AY&SY|\xfd7zXZ\x00|\x28\xb5\x2f\xfd|\x04\x22\x4d\x18|7z\xbc\xaf\x27\x1c|Rar!\x1a\x07"
    ),
    "a program": rb"\x7fELF|MZ[^\n]{0,62}\x00|\xfe\xed\xfa[\xce\xcf]|[\xce\xcf]\xfa\xed\xfe|\xca\xfe\xba\xbe",
}
# Opcodes of a pickle that name something to call, and those that call it when the pickle is loaded.
_CALLABLES = {"GLOBAL", "STACK_GLOBAL", "INST"}
_CALLS = {"REDUCE", "BUILD", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX"}
_DOTTED_NAME = re.compile(r"[\w.]+ [\w.]+")


def runs_code(file: Path) -> str | None:
    """
    Tell what a file is, if loading or opening it can run code.

    The name counts first, then the bytes: pickles of every protocol, archives, NumPy and HDF5 files, programs. Safetensors
    are told by their header, whose length may look like the start of a pickle.

    Args:
        file: a regular file. Anything else is not opened.

    Returns:
        Such as "a pickle"; None for other files.

    Raises:
        OSError: `file` cannot be read.
    """
    if file.suffix.lower() in PICKLE_SUFFIXES:
        return "a pickle"
    # A FIFO or a device would block.
    descriptor = os.open(file, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    with os.fdopen(descriptor, "rb") as opened:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return None
        start = opened.read(_START_BYTES)
        if file.suffix == ".safetensors" and _has_header(start, os.fstat(descriptor).st_size):
            return None
        for kind, signature in _SIGNATURES.items():
            if re.match(signature, start, re.DOTALL):
                return kind
        if _calls_something(start):
            return "a pickle"
        # Archives are read from their end: anything may stand before them.
        return "a zip archive behind something else" if zipfile.is_zipfile(opened) else None


def _has_header(start: bytes, size: int) -> bool:
    """Whether a file begins as safetensors do: the length of a JSON object, and that."""
    return len(start) > 8 and start[8:9] == b"{" and struct.unpack("<Q", start[:8])[0] <= size - 8


def _calls_something(start: bytes) -> bool:
    """
    Whether these bytes, unpickled, would call something: protocols 0 and 1 are plain text without a signature.

    The stack is followed, because the first words of a text are often opcodes too.
    """
    stack: list[Any] = []
    has_callable = False
    try:
        for opcode, argument, _ in pickletools.genops(start):
            if opcode.name in _CALLABLES:
                has_callable = has_callable or argument is None or bool(_DOTTED_NAME.fullmatch(argument))
            needed = opcode.stack_before
            if pickletools.markobject in needed:
                while stack.pop() is not pickletools.markobject:
                    pass
                needed = needed[: needed.index(pickletools.markobject)]
            if pickletools.markobject in [stack.pop() for _ in needed]:
                return False
            if opcode.name in _CALLS and has_callable:
                return True
            stack += opcode.stack_after
    # An empty stack, or whatever genops raises: the bytes are not a pickle up to there.
    except Exception:
        return False
    return False


def texts_of_picture(content: bytes) -> str:
    """
    Text inside a picture, a piece a line: compressed text of a PNG, and whatever can be read in any picture, as letters of
    one byte or two. Metadata, comments and what stands behind the picture's end are such text.
    """
    pieces = [match[0].decode("latin-1") for match in re.finditer(rb"[\x20-\x7e]{12,}", content)]
    pieces += [match[0][::2].decode("latin-1") for match in re.finditer(rb"(?:[\x20-\x7e]\x00){12,}", content)]
    if content.startswith(b"\x89PNG"):
        place = 8
        while place + 8 <= len(content):
            length, kind = struct.unpack(">I4s", content[place : place + 8])
            if kind in (b"zTXt", b"iTXt"):
                pieces += _compressed_text(content[place + 8 : place + 8 + length])
            place += length + 12
    return "\n".join(pieces)


def _compressed_text(chunk: bytes) -> list[str]:
    """Behind the keyword, and in iTXt a language and a translation, there is zlib's data: tried from each zero on."""
    texts = []
    for match in list(re.finditer(rb"\x00", chunk))[:8]:
        for start in (match.end(), match.end() + 1):
            try:
                text = zlib.decompressobj().decompress(chunk[start:], _MOST_TEXT_BYTES)
            except zlib.error:
                continue
            texts += text.decode("utf-8", errors="replace").split("\n")
    return texts


def is_sentencepiece(content: bytes) -> bool:
    """Whether these bytes are a message of SentencePiece: pieces first, and every field has a length that fits."""
    place, fields = 0, []
    while place < len(content):
        numbers = []
        for _ in range(2):  # the field, then its length
            value, shift = 0, 0
            while place < len(content) and shift < 64:
                byte = content[place]
                place, value, shift = place + 1, value | (byte & 0x7F) << shift, shift + 7
                if byte < 0x80:
                    break
            else:
                return False
            numbers.append(value)
        if numbers[0] & 7 != 2:
            return False
        fields.append(numbers[0] >> 3)
        place += numbers[1]
    return place == len(content) and fields[:1] == [1]
