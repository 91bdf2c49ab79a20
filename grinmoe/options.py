"""Options that several commands share, and how a room's `options.py` defines those of its commands.

A command's options are one dataclass. Its docstring has three parts, separated by empty lines: the command's help, its
description and an example. The command line makes a flag of every field `Annotated[type, help, metavar]`:

| field | flag |
|---|---|
| `int`, `float`, `str`, each also `\\| None` | `--field-name VALUE` |
| `tuple[str, ...]` | `--field-name VALUE VALUE ...` |
| `Literal["a", "b"]` | `--field-name {a,b}` |
| `bool` that is False by default | `--field-name` |
| `bool` that is True by default | `--no-field-name`, which the help describes |
| a dataclass | the flags of its fields; a help and a metavar are text and title of their group |

A field without a default is a required flag, and so is one marked `typing.Required`, whose default is for callers from
Python. A field that is not `Annotated` has no flag.

These modules import the standard library, this module and `files` alone: the command line reads them to parse a command
line, and importing `grinmoe`, which registers the model with Transformers, takes seconds.
"""

from typing import Annotated

Model = Annotated[str, "folder of a model or adapter, or a repository of the Hub", "DIR_OR_HUB_ID"]
Checkpoint = Annotated[str, "folder, or a repository of the Hub", "DIR_OR_HUB_ID"]
NewFolder = Annotated[str, "new or empty folder", "DIR"]
KeptFolder = Annotated[str, "new folder, or one to go on in", "DIR"]
Dtype = Annotated[str, "auto (the checkpoint's), bfloat16, float16, float32"]
Device = Annotated[
    str | None,
    "cpu, cuda, cuda:1, ...; auto spreads the layers over all accelerators (default: an accelerator if there is one)",
]
ShardSize = Annotated[int | str, "such as 500MB", "SIZE"]
