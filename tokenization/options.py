"""Options of `grinmoe tokenizer build` and `verify`."""

import os
from dataclasses import dataclass
from typing import Annotated


@dataclass(frozen=True)
class BuildOptions:
    """Make a tokenizer folder of a tokenizer.model, a GGUF or a tokenizer.json.

    Take vocabulary and merges from a SentencePiece BPE model, a GGUF or a tokenizer.json (also one whose normaliser
    was lost when another class saved it), put the family's normalisation, special tokens and chat template on, and
    write a tokenizer that loads with TokenizersBackend and AutoTokenizer.

    example: grinmoe tokenizer build --source tokenizer.model --output tokenizer
    """

    source: Annotated[str | os.PathLike, "tokenizer.model, *.gguf or tokenizer.json", "FILE"]
    output: Annotated[
        str | os.PathLike, "new folder, or one with a tokenizer or model, where only the tokenizer is replaced", "DIR"
    ]
    model_max_length: Annotated[int, "tokens from which the tokenizer warns", "N"] = 4096

    def __post_init__(self):
        if self.model_max_length < 1:
            raise ValueError(f"--model-max-length {self.model_max_length} is no length; give 1 or more")


@dataclass(frozen=True)
class VerifyOptions:
    """Compare a tokenizer with strings and their ids.

    Compare what a tokenizer gives with vectors: a JSON object from string to ids, or llama.cpp's *.inp and *.out.
    Prints each difference with the place where it begins. Exit code 0 if all agree, 1 if not.

    example: grinmoe tokenizer verify --tokenizer tokenizer --vectors ids.json
    """

    tokenizer: Annotated[str, "folder of a tokenizer or of a model", "DIR"]
    vectors: Annotated[str, "*.json, or *.inp with its *.out beside it", "FILE"]
    auto: Annotated[bool, "load with AutoTokenizer, as it is after `import grinmoe`"] = False
