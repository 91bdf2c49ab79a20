"""Options of `grinmoe analyze`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from ..files import Device, Dtype, Model, NewFolder, check_dtype


@dataclass(frozen=True)
class AnalyzeOptions:
    """Report how a checkpoint routes texts to its experts.

    Route texts and report what the routers do: load of the experts, similarity of domains, near ties, experts
    chosen together, and a sentence token by token. The folder gets report.html, which works offline, its pictures,
    and the data as JSON and Parquet; it appears when it is complete.

    example: grinmoe analyze --model demo-output/model --text talk.jsonl manual.txt --output routing
    """

    model: Model
    text: Annotated[
        tuple[str, ...],
        "texts in UTF-8, or task sets (.json, .jsonl, .parquet with text, messages, or prompt and completion); each file "
        "is a domain, named by its stem",
        "FILE",
    ]
    output: NewFolder
    sentence: Annotated[str | None, "to show token by token (default: the first one of the first text)", "TEXT"] = None
    max_tokens: Annotated[int, "of each domain, from its beginning", "N"] = 16384
    max_length: Annotated[int | None, "tokens of a row (default: 512, or the model's own limit if lower)", "N"] = None
    dtype: Dtype = "auto"
    device: Device = None

    def __post_init__(self):
        if not self.text:
            raise ValueError("--text names no file; give one or more")
        for flag, value, least in (("--max-tokens", self.max_tokens, 1), ("--max-length", self.max_length, 2)):
            if value is not None and value < least:
                raise ValueError(f"{flag} {value} is too little; give {least} or more")
        if self.sentence is not None and not self.sentence.strip():
            raise ValueError("--sentence is empty; give some text, or leave it out for the first one of the text")
        names = [Path(file).stem for file in self.text]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"--text: several files are named {name}, and domains go by that name; rename one")
        check_dtype(self.dtype)
