"""What the PhiMoE files of vLLM and SGLang import from their engines, in plain torch on one device.

With it their files build the model and load a checkpoint by their own code, on a CPU. Layers do what those of the engines do
on one GPU: attention over one text with the cache's window, products, experts by the file's own routing function, and a
logits processor that adds the bias that it is given, which is not the head's. Weights begin as NaN: what a checkpoint does
not give shows.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


def _missing(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.full(shape, torch.nan), requires_grad=False)


class Linear(nn.Module):
    """Parallel linears return (output, bias that was not added)."""

    def __init__(self, inputs: int, outputs: int, bias: bool = True, **_: Any):
        super().__init__()
        self.weight = _missing(outputs, inputs)
        self.bias = _missing(outputs) if bias else None

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, None]:
        return F.linear(hidden, self.weight, self.bias), None


class QKVLinear(Linear):
    def __init__(self, hidden: int, head_dim: int, heads: int, kv_heads: int, bias: bool = True, **_: Any):
        sizes = {"q": heads * head_dim, "k": kv_heads * head_dim, "v": kv_heads * head_dim}
        super().__init__(hidden, sum(sizes.values()), bias)
        starts = {"q": 0, "k": sizes["q"], "v": sizes["q"] + sizes["k"]}
        for parameter in self.parameters():
            parameter.weight_loader = lambda p, part, shard: p[starts[shard] :][: sizes[shard]].copy_(part)


class Embedding(nn.Module):
    def __init__(self, vocabulary: int, hidden: int, bias: bool = False, **_: Any):
        super().__init__()
        self.weight = _missing(vocabulary, hidden)
        self.bias = _missing(vocabulary) if bias else None

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return F.embedding(ids, self.weight)


class LogitsProcessor:
    def __init__(self, *_: Any):
        pass

    def __call__(self, *arguments: Any) -> torch.Tensor:
        """vLLM: (head, hidden, bias=None); SGLang: (ids, hidden, head, batch, bias=None)."""
        head, hidden = arguments[:2] if isinstance(arguments[0], Embedding) else (arguments[2], arguments[1])
        bias = arguments[4] if len(arguments) > 4 else arguments[2] if len(arguments) == 3 else None
        return F.linear(hidden, head.weight, bias)


def get_rope(head_dim: int, base: float | None = None, rope_parameters: dict | None = None, **_: Any) -> Any:
    theta = base or rope_parameters["rope_theta"]  # type: ignore[index]
    frequencies = theta ** -(torch.arange(0, head_dim, 2) / head_dim)

    def rotate(positions: torch.Tensor, *tensors: torch.Tensor) -> list[torch.Tensor]:
        angles = positions[:, None, None] * frequencies
        cos, sin = angles.cos(), angles.sin()
        result = []
        for tensor in tensors:
            a, b = tensor.view(len(positions), -1, head_dim).chunk(2, -1)
            result.append(torch.cat([a * cos - b * sin, b * cos + a * sin], -1).view(len(positions), -1))
        return result

    return rotate


class Attention(nn.Module):
    """One text at a time; `sliding_window` counts the keys that a token sees, itself included, as FlashAttention's W - 1 on
    the left does."""

    def __init__(self, heads: int, head_dim: int, scale: float, num_kv_heads: int, cache_config: Any = None, **_: Any):
        super().__init__()
        self.shapes, self.scale = ((heads, head_dim), (num_kv_heads, head_dim)), scale
        self.window = getattr(cache_config, "sliding_window", None)

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, _: Any = None) -> torch.Tensor:
        own, shared = self.shapes
        q, k, v = (tensor.view(-1, *shape).transpose(0, 1) for tensor, shape in ((q, own), (k, shared), (v, shared)))
        distance = torch.arange(q.shape[1])[:, None] - torch.arange(q.shape[1])
        seen = (distance >= 0) & (distance < (self.window or q.shape[1]))
        output = F.scaled_dot_product_attention(q, k, v, seen, scale=self.scale, enable_gqa=True)
        return output.transpose(0, 1).flatten(1)


class Experts(nn.Module):
    def __init__(self, num_experts: int, hidden_size: int, intermediate_size: int, top_k: int, **options: Any):
        super().__init__()
        self.w13_weight = _missing(num_experts, 2 * intermediate_size, hidden_size)
        self.w2_weight = _missing(num_experts, hidden_size, intermediate_size)
        self.top_k, self.options, self.runner_backend = top_k, options, None
        self.w13_weight.weight_loader = self.w2_weight.weight_loader = self.load

    @staticmethod
    def load(parameter: nn.Parameter, tensor: torch.Tensor, _: str, shard_id: str, expert_id: int) -> None:
        rows = parameter.shape[1] // 2
        place = {"w1": slice(0, rows), "w3": slice(rows, None), "w2": slice(None)}[shard_id]
        parameter[expert_id, place].copy_(tensor)

    @staticmethod
    def make_expert_params_mapping(num_experts: int, **names: str) -> list[tuple[str, str, int, str]]:
        shards = {"ckpt_gate_proj_name": "w1", "ckpt_down_proj_name": "w2", "ckpt_up_proj_name": "w3"}
        return [
            (f"experts.{'w2' if shard == 'w2' else 'w13'}_", f"experts.{expert}.{names[name]}.", expert, shard)
            for expert in range(num_experts)
            for name, shard in shards.items()
        ]

    def forward(self, hidden: torch.Tensor, routing: Any) -> torch.Tensor:
        if isinstance(routing, torch.Tensor):  # vLLM gives the logits
            routing = self.options["custom_routing_function"](hidden, routing, self.top_k, self.options["renormalize"])
        weights, chosen = routing
        output = torch.zeros_like(hidden)
        for slot in range(self.top_k):
            gate, up = torch.einsum("th,teh->te", hidden, self.w13_weight[chosen[:, slot]]).chunk(2, -1)
            inner = F.silu(gate) * up
            output += weights[:, slot, None] * torch.einsum("ti,thi->th", inner, self.w2_weight[chosen[:, slot]])
        return output


class TopK(nn.Module):
    def __init__(self, top_k: int, renormalize: bool, custom_routing_function: Any, **_: Any):
        super().__init__()
        self.route = lambda hidden, logits: custom_routing_function(hidden, logits, top_k, renormalize)

    def bind_runner_backend(self, _: Any) -> None:
        pass

    def forward(self, hidden: torch.Tensor, logits: torch.Tensor) -> Any:
        return self.route(hidden, logits)


def make_layers(count: int, make: Any, prefix: str) -> Any:
    """vLLM's `make` takes a prefix, SGLang's a number too."""
    numbers = [
        {"prefix": f"{prefix}.{number}"} | ({"idx": number} if make.__code__.co_argcount == 2 else {})
        for number in range(count)
    ]
    return 0, count, nn.ModuleList(make(**number) for number in numbers)


class WeightsLoader:
    """vLLM's AutoWeightsLoader, as far as this model needs it."""

    def __init__(self, model: nn.Module):
        self.model = model

    def load_weights(self, weights: Any, mapper: Any) -> None:
        parameters = dict(self.model.named_parameters())
        experts = Experts.make_expert_params_mapping(
            64, ckpt_gate_proj_name="w1", ckpt_down_proj_name="w2", ckpt_up_proj_name="w3"
        )
        for name, tensor in weights:
            for part, (replacement, shard) in mapper.orig_to_new_stacked.items():
                if part in name:
                    parameter = parameters[name.replace(part, replacement)]
                    parameter.weight_loader(parameter, tensor, shard)
                    break
            else:
                fused = next(((new, e, shard) for new, old, e, shard in experts if old in name), None)
                if fused is None:
                    parameters[name].data.copy_(tensor)
                else:
                    parameter = parameters[name.split("experts.")[0] + fused[0] + "weight"]
                    Experts.load(parameter, tensor, name, fused[2], fused[1])


def _names(**named: Any) -> dict[str, Any]:
    return named


def _vllm() -> dict[str, dict[str, Any]]:
    layers = "vllm.model_executor.layers."
    group = types.SimpleNamespace(is_first_rank=True, is_last_rank=True)
    return {
        "vllm.compilation.decorators": _names(support_torch_compile=lambda cls: cls),
        "vllm.config": _names(CacheConfig=object, VllmConfig=object),
        "vllm.distributed": _names(get_pp_group=lambda: group, get_tensor_model_parallel_world_size=lambda: 1),
        layers + "attention": _names(Attention=Attention),
        layers + "fused_moe": _names(FusedMoEFactory=Experts, GateLinear=lambda a, b, **_: Linear(a, b, bias=False)),
        layers + "linear": _names(QKVParallelLinear=QKVLinear, RowParallelLinear=Linear),
        layers + "logits_processor": _names(LogitsProcessor=LogitsProcessor),
        layers + "quantization": _names(QuantizationConfig=object),
        layers + "rotary_embedding": _names(get_rope=get_rope),
        layers + "vocab_parallel_embedding": _names(ParallelLMHead=Embedding, VocabParallelEmbedding=Embedding),
        "vllm.sequence": _names(IntermediateTensors=dict),
        "vllm.model_executor.models.interfaces": _names(
            SupportsLoRA=type("SupportsLoRA", (), {}), SupportsPP=type("SupportsPP", (), {})
        ),
        "vllm.model_executor.models.utils": _names(
            AutoWeightsLoader=WeightsLoader,
            WeightsMapper=lambda **options: types.SimpleNamespace(**options),
            make_empty_intermediate_tensors_factory=lambda *_: None,
            make_layers=make_layers,
            maybe_prefix=lambda prefix, name: name,
        ),
    }


def _sglang() -> dict[str, dict[str, Any]]:
    layers = "sglang.srt.layers."
    return {
        layers + "dp_attention": _names(reject_attn_tp_shard_with_tp_reduce=lambda *_, **__: None),
        layers + "linear": _names(QKVParallelLinear=QKVLinear, ReplicatedLinear=Linear, RowParallelLinear=Linear),
        layers + "logits_processor": _names(LogitsProcessor=LogitsProcessor, LogitsProcessorOutput=object),
        layers + "moe.fused_moe_triton": _names(FusedMoE=Experts),
        layers + "moe.topk": _names(TopK=TopK),
        layers + "pooler": _names(Pooler=lambda **_: None, PoolingType=types.SimpleNamespace(LAST=0)),
        layers + "quantization.base_config": _names(QuantizationConfig=object),
        layers + "radix_attention": _names(RadixAttention=Attention),
        layers + "rotary_embedding": _names(get_rope=get_rope),
        layers + "vocab_parallel_embedding": _names(
            DEFAULT_VOCAB_PADDING_SIZE=64, ParallelLMHead=Embedding, VocabParallelEmbedding=Embedding
        ),
        "sglang.srt.model_executor.forward_batch_info": _names(ForwardBatch=object),
        "sglang.srt.model_loader.weight_utils": _names(
            default_weight_loader=lambda parameter, tensor: parameter.copy_(tensor),
            maybe_remap_kv_scale_name=lambda name, _: name,
        ),
        "sglang.srt.runtime_context": _names(get_parallel=lambda: types.SimpleNamespace(attn_tp_size=1)),
        "sglang.srt.utils": _names(
            add_prefix=lambda name, prefix: f"{prefix}.{name}" if prefix else name,
            make_layers=lambda *arguments, **options: make_layers(*arguments, **options)[2],
        ),
    }


@contextlib.contextmanager
def engine_module(engine: str, file: Path) -> Iterator[types.ModuleType]:
    """The file, imported as its engine's with the layers above in place of the engine's."""
    before = dict(sys.modules)
    name = {"vllm": "vllm.model_executor.models.phimoe", "sglang": "sglang.srt.models.phimoe"}[engine]
    try:
        for module, content in {"vllm": _vllm, "sglang": _sglang}[engine]().items():
            sys.modules[module] = types.ModuleType(module)
            vars(sys.modules[module]).update(content)
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        yield module
    finally:
        for name in sys.modules.keys() - before.keys():
            del sys.modules[name]


def engine_logits(engine: str, module: types.ModuleType, config: Any, weights: dict, ids: torch.Tensor) -> torch.Tensor:
    """Of one text, by the engine's file: built, loaded and run by its own code."""
    positions = torch.arange(len(ids))
    with torch.no_grad():
        if engine == "vllm":
            cache = types.SimpleNamespace(sliding_window=config.sliding_window)
            models = types.SimpleNamespace(hf_config=config)
            settings = types.SimpleNamespace(model_config=models, cache_config=cache, quant_config=None)
            model = module.PhiMoEForCausalLM(vllm_config=settings)
        else:
            model = module.PhiMoEForCausalLM(config)
        for norm in (part for part in model.modules() if isinstance(part, nn.LayerNorm)):
            norm.weight.data.fill_(torch.nan)
            norm.bias.data.fill_(torch.nan)
        model.load_weights(weights.items())
        unset = [name for name, parameter in model.named_parameters() if parameter.isnan().any()]
        assert not unset, f"the checkpoint does not give {unset}"
        if engine == "vllm":
            return model.compute_logits(model(ids, positions))
        return model(ids, positions, None)
