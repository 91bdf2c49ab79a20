"""Options of `grinmoe export` and `grinmoe upcycle` (see `grinmoe/options.py`)."""

from dataclasses import dataclass
from typing import Annotated, Literal

from ..files import check_dtype
from ..options import Checkpoint, Dtype, NewFolder, ShardSize

Target = Literal["safetensors", "phimoe", "mixtral", "gguf"]


@dataclass(frozen=True)
class ExportOptions:
    """What to convert, and into what."""

    model: Checkpoint
    to: Annotated[Target, "what is written"]
    output: NewFolder
    dtype: Annotated[str, "auto (as it is), bfloat16, float16, float32; int8 for safetensors and gguf"] = "auto"
    max_shard_size: ShardSize = "5GB"
    compare: Annotated[bool, "do not load both and show how far their logits are apart"] = True
    converter: Annotated[str | None, "llama.cpp's folder (gguf; default: the script on the PATH)", "PATH"] = None


@dataclass(frozen=True)
class UpcycleOptions:
    """What to upcycle, and how. (`upcycle_checkpoint` checks the estimator.)"""

    model: Checkpoint
    experts: Annotated[int, "experts of a layer", "E"]
    top_k: Annotated[int, "experts of a token", "K"]
    output: NewFolder
    noise: Annotated[float, "added to every copy, in standard deviations of its matrix", "S"] = 0.0
    reinit: Annotated[float, "of every expert's neurons, begins anew", "SHARE"] = 0.0
    estimator: Annotated[str, "router_estimator of the result", "NAME"] = "sparsemixer_v2"
    seed: Annotated[int, "of router, noise and neurons", "N"] = 0
    dtype: Dtype = "auto"
    max_shard_size: ShardSize = "5GB"
    compare: Annotated[bool, "do not load both and compare their logits"] = True

    def __post_init__(self):
        for name in ("noise", "reinit"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"--{name} {getattr(self, name)} is not between 0 and 1")
        check_dtype(self.dtype)
