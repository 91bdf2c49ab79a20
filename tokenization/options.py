"""Options of `grinmoe tokenizer build` and `verify` (see `grinmoe/options.py`)."""

import os
from dataclasses import dataclass
from typing import Annotated


@dataclass(frozen=True)
class BuildOptions:
    """Of what to make a tokenizer, and where."""

    source: Annotated[str | os.PathLike, "tokenizer.model, *.gguf or tokenizer.json", "FILE"]
    output: Annotated[
        str | os.PathLike,
        "new folder, or one with a tokenizer or model, where only the tokenizer is replaced; the source may lie in it",
        "DIR",
    ]
    model_max_length: Annotated[int, "tokens from which the tokenizer warns", "N"] = 4096

    def __post_init__(self):
        if self.model_max_length < 1:
            raise ValueError(f"--model-max-length {self.model_max_length} is no length; give 1 or more")


@dataclass(frozen=True)
class VerifyOptions:
    """Which tokenizer to hold against which vectors."""

    tokenizer: Annotated[str, "folder of a tokenizer or of a model", "DIR"]
    vectors: Annotated[str, "*.json, or *.inp with its *.out beside it", "FILE"]
    auto: Annotated[bool, "load with AutoTokenizer, as it is after `import grinmoe`"] = False
