"""Options of `grinmoe merge`."""

from dataclasses import dataclass
from typing import Annotated, Literal

from ..files import NewFolder

Quantization = Literal["nf4", "fp4", "int8"]


@dataclass(frozen=True)
class MergeOptions:
    """Put an adapter into the weights of its base model.

    Merge a LoRA adapter into its base and save the result in the released layout, with code and tokenizer. The
    folder appears when it is complete; base and adapter stay as they are.

    example: grinmoe merge --adapter runs/sft/adapter --output merged
    """

    adapter: Annotated[str, "folder of a PEFT adapter", "DIR"]
    output: NewFolder
    base: Annotated[str | None, "base model (default: as the adapter says)", "DIR_OR_HUB_ID"] = None
    dtype: Annotated[str, "of the result: auto (the base's), bfloat16, float16, float32"] = "auto"
    quantized_base: Annotated[
        Quantization | None, "merge into the base as qlora saw it: quantised and back (default: into its own weights)"
    ] = None
