"""Options of `grinmoe export` and `grinmoe upcycle`."""

from dataclasses import dataclass
from typing import Annotated, Literal

from ..files import Checkpoint, Dtype, NewFolder, ShardSize, check_dtype

Target = Literal["safetensors", "phimoe", "mixtral", "gguf"]


@dataclass(frozen=True)
class ExportOptions:
    """Write a checkpoint for other programs, or of another model, dtype or shard size.

    Convert a checkpoint, shard by shard: to phimoe, which Transformers' own class, vLLM and SGLang load without
    code (a model with RMSNorm and top-k gating: to mixtral); to safetensors, a GRIN-MoE of another dtype or shard
    size, also from a phimoe (Phi-3.5-MoE, Phi-mini-MoE, Phi-tiny-MoE) or a Mixtral; or to gguf, by llama.cpp's
    converter. The folder appears when it is complete.

    example: grinmoe export --model demo-output/model --to phimoe --output demo-phimoe
    """

    model: Checkpoint
    to: Annotated[Target, "what is written"]
    output: NewFolder
    dtype: Annotated[str, "auto (as it is), bfloat16, float16, float32; int8 for safetensors and gguf"] = "auto"
    max_shard_size: ShardSize = "5GB"
    compare: Annotated[bool, "do not load both and show how far their logits are apart"] = True
    converter: Annotated[str | None, "llama.cpp's folder (gguf; default: the script on the PATH)", "PATH"] = None


@dataclass(frozen=True)
class UpcycleOptions:
    """Make a GRIN-MoE of a dense checkpoint, whose feed-forward every expert copies.

    The checkpoint has the layout of Llama, Mistral or Phi-3. Every expert copies its feed-forward, and the router is new.
    w2 is scaled so that at first the logits equal the dense model's wherever each draw has a single candidate. Train the
    result then (grinmoe pretrain, sft). Shard by shard; the folder appears when it is complete.

    example: grinmoe upcycle --model HuggingFaceTB/SmolLM2-360M --experts 8 --top-k 2 --output smol-moe
    """

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
        if self.experts < 1:
            raise ValueError(f"--experts {self.experts}: num_local_experts={self.experts} is not at least 1")
        if self.top_k < 1:
            raise ValueError(f"--top-k {self.top_k}: num_experts_per_tok={self.top_k} is not at least 1")
        if self.top_k > self.experts:
            raise ValueError(
                f"--top-k {self.top_k}: num_experts_per_tok={self.top_k} exceeds num_local_experts={self.experts}, --experts"
            )
        check_dtype(self.dtype)
