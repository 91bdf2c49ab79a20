"""`grinmoe upcycle`: a dense checkpoint becomes a GRIN-MoE whose experts are copies of its feed-forward.

Source: "Sparse Upcycling" (Komatsuzaki et al., arXiv:2212.05055); re-initialising a part of every copy is "Drop-Upcycling"
(Nakamura et al., arXiv:2502.19261), whose statistics are used here.

K equal experts with routing weights p_k give sum(p_k) FFN(x). SparseMixer's weight is 1 where the mask leaves one
candidate to a draw, so w2 is divided by K, and there the model computes what the dense one did. Where more are left (near
ties) a weight is smaller, and with it the output. `topk_renormalized` has weights that sum to 1, and w2 as it was.
"""

from __future__ import annotations

import functools
import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Phi3Config, PreTrainedConfig
from transformers.utils import CONFIG_NAME

from ..checkpoint_grinmoe import CheckpointError, add_remote_code, official_shapes
from ..configuration_grinmoe import GrinMoeConfig
from ..files import atomic_write_text, copy_files
from ..modeling_grinmoe import GrinMoeForCausalLM
from ..monitoring import kept_experts
from ..outputs import checkpoint_when_whole
from ..provenance import markdown_table
from ..routing_grinmoe import ESTIMATORS, mix_seed, routing_generator
from .compare import TOKENS_COMPARED, compare_logits, load_float32, random_tokens, require_equal, why_not_compared
from .configs import ConversionError, config_of_fields, fields_of_dense, load_foreign_config
from .export import COMPANIONS, check_new_checkpoint, local_folder, model_type_of
from .options import UpcycleOptions
from .shards import Entry, WeightSource, write_shards

_DENSE = (LlamaConfig.model_type, MistralConfig.model_type, Phi3Config.model_type)
_RECORD = "upcycle.json"
_PARTS = {"w1": "gate", "w3": "up", "w2": "down"}


def upcycle_checkpoint(options: UpcycleOptions) -> dict[str, Any]:
    """
    Make the checkpoint, shard by shard.

    Returns:
        What `upcycle.json` in the result says: options, bytes, and the comparison if one was made.

    Raises:
        ConversionError: no dense model of a known layout, or one with parts that this architecture has not.
        UnequalLogitsError: the result does not compute what the dense model does, where it should; it was not kept.
        CheckpointError: the source is broken or incomplete.
        ValueError: a wrong option (E, K, ...), or an output that is no new or empty folder.
    """
    possible = [name for name, spec in ESTIMATORS.items() if spec.equal_experts_sum is not None]
    if options.estimator not in possible:
        raise ValueError(
            f"--estimator {options.estimator!r} does not begin where the dense model is; choose one of {', '.join(possible)}"
        )
    target = check_new_checkpoint(options.output, options.max_shard_size)
    folder = local_folder(options.model)
    dense = _dense_config(folder)
    config = sparse_config(dense, options)
    source = WeightSource(folder)
    entries = _entries(source, dense, config, options)
    record: dict[str, Any] = {"source": options.model, "notes": []}
    record |= {name: getattr(options, name) for name in ("experts", "top_k", "noise", "reinit", "estimator", "seed")}
    with checkpoint_when_whole(target) as staging:
        config.architectures = ["GrinMoeForCausalLM"]
        config.save_pretrained(staging)
        add_remote_code(staging)
        copy_files(COMPANIONS, folder, staging)
        record["bytes"] = write_shards(entries, staging, options.max_shard_size)
        _compare(options, source, staging, config, entries, record)
        if dense.model_type == LlamaConfig.model_type and getattr(dense, "sliding_window", None) is not None:
            record["notes"].append(
                f"sliding_window={dense.sliding_window}: Llama's class ignores it, and the result has full attention"
            )
        atomic_write_text(staging / _RECORD, json.dumps(record, indent=2) + "\n")
    return record


def run_upcycle(options: UpcycleOptions) -> None:
    """`grinmoe upcycle`."""
    console = Console(soft_wrap=True, markup=False)
    record = upcycle_checkpoint(options)
    console.print(f"upcycled: {options.output} ({record['bytes'] / 1e9:.3g} GB)")
    if differences := record.get("logits"):
        rows = [[one["tokens"], f"{one['difference']:.2g}", f"{one['largest']:.3g}"] for one in differences]
        console.print(markdown_table(["tokens", "largest difference of logits", "largest logit"], rows))
        console.print(f"draws with one candidate: {record['single_candidate_share']:.1%}; equal where all have one")
    for note in record["notes"]:
        console.print(f"note: {note}")


# --- config ------------------------------------------------------------------------------------------------------------


def _dense_config(folder: Path) -> PreTrainedConfig:
    if not (folder / CONFIG_NAME).is_file():
        raise ConversionError(f"{folder} holds no {CONFIG_NAME}; give the folder of a dense checkpoint")
    model_type = model_type_of(folder)
    if model_type not in _DENSE:
        raise ConversionError(f"{folder} has model_type={model_type!r}; {', '.join(_DENSE)} can be upcycled")
    config = load_foreign_config(folder)
    if config.model_type != model_type:  # Transformers' Ministral
        raise ConversionError(
            f"layer_types={getattr(config, 'layer_types', None)}: Transformers loads this {model_type} as "
            f"{config.model_type}, whose layers have attention of their own; {', '.join(_DENSE)} can be upcycled"
        )
    return config


def sparse_config(dense: PreTrainedConfig, options: UpcycleOptions) -> GrinMoeConfig:
    """
    The config of the result.

    Raises:
        ConversionError: biases in the feed-forward, partial RoPE, quantised weights, or what `fields_of_dense` refuses.
    """
    if dense.model_type == LlamaConfig.model_type and dense.mlp_bias:  # the others ignore it
        raise ConversionError("mlp_bias=true: the experts of this architecture have no biases")
    if getattr(dense, "quantization_config", None) is not None:
        raise ConversionError("the checkpoint is quantised; give the one that it was made of")
    fields = fields_of_dense(dense) | {
        "num_local_experts": options.experts,
        "num_experts_per_tok": options.top_k,
        "router_estimator": options.estimator,
        "dtype": dense.dtype if options.dtype == "auto" else getattr(torch, options.dtype),
    }
    return config_of_fields(fields, dense.model_type)


# --- weights -----------------------------------------------------------------------------------------------------------


def _entries(
    source: WeightSource, dense: PreTrainedConfig, config: GrinMoeConfig, options: UpcycleOptions
) -> list[Entry]:
    shapes = official_shapes(config)
    if config.tie_word_embeddings and "lm_head.weight" not in source:
        del shapes["lm_head.weight"]
    entries = []
    for name, shape in shapes.items():
        layer = re.match(r"model\.layers\.(\d+)\.block_sparse_moe\.(gate|experts)\.(?:(\d+)\.(\w+)\.)?weight$", name)
        if layer is None:
            entries.append(_copied(source, dense, config, name, shape, options))
        elif layer[2] == "gate":
            entries.append(_router(source, config, name, shape, int(layer[1]), options))
        else:
            entries.append(_expert(source, dense, config, name, shape, layer, options))
    _refuse_other_tensors(source, dense, config)
    return entries


def _refuse_other_tensors(source: WeightSource, dense: PreTrainedConfig, config: GrinMoeConfig) -> None:
    """The dense model's class would ignore them too, but somebody trained them (norms of queries, biases)."""
    names = (re.sub(r"block_sparse_moe\.experts\.\d+\.", "mlp.", name) for name in official_shapes(config))
    names = (re.sub(r"w(\d)\.weight", lambda on_disk: f"{_PARTS[on_disk[0][:2]]}.weight", name) for name in names)
    known = {_place(dense, config, name)[0] for name in names} | {"lm_head.weight"}
    if others := sorted(name for name in source.shapes.keys() - known if not name.endswith("rotary_emb.inv_freq")):
        raise ConversionError(
            f"{source.folder} holds {len(others)} tensors that a {dense.model_type} of its config.json does not have, "
            f"{others[0]} for one; this architecture has no place for them"
        )


def _place(dense: PreTrainedConfig, config: GrinMoeConfig, name: str) -> tuple[str, tuple[slice, ...]]:
    """Key of the dense checkpoint, and the rows of it, that hold an official tensor. `mlp.gate` stands for w1, and so on."""
    if dense.model_type != Phi3Config.model_type:
        return re.sub(r"\.mlp\.(gate|up|down)\.", r".mlp.\1_proj.", name), ()
    width, head = config.intermediate_size, config.head_size
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    fused = {
        "self_attn.q_proj": ("self_attn.qkv_proj", 0, queries),
        "self_attn.k_proj": ("self_attn.qkv_proj", queries, keys),
        "self_attn.v_proj": ("self_attn.qkv_proj", queries + keys, keys),
        "mlp.gate": ("mlp.gate_up_proj", 0, width),
        "mlp.up": ("mlp.gate_up_proj", width, width),
        "mlp.down": ("mlp.down_proj", 0, None),
    }
    for part, (whole, start, length) in fused.items():
        if f".{part}." in name:
            rows = () if length is None else (slice(start, start + length),)
            return name.replace(f".{part}.", f".{whole}."), rows
    return name, ()


def _dense(source: WeightSource, dense: PreTrainedConfig, config: GrinMoeConfig, name: str, shape) -> Entry:
    """A tensor of the dense checkpoint in its own dtype; that it is there and fits is checked now."""
    key, rows = _place(dense, config, name)
    if key not in source:
        raise CheckpointError(f"{source.folder} lacks {key}; the checkpoint is incomplete, or not of its config")
    whole = source.shapes[key]
    found = (rows[0].stop - rows[0].start, *whole[1:]) if rows else whole
    if found != shape or (rows and rows[0].stop > whole[0]):
        raise CheckpointError(f"{source.folder} holds {key} with shape {whole}, which does not give {shape}")
    return Entry(name, shape, source.dtype(key), lambda: source.read(key, rows))


def _wanted(own: torch.dtype, options: UpcycleOptions) -> torch.dtype:
    return own if options.dtype == "auto" else getattr(torch, options.dtype)


def _copied(source, dense, config, name: str, shape, options: UpcycleOptions) -> Entry:
    original = _dense(source, dense, config, name, shape)
    dtype = _wanted(original.dtype, options)
    return Entry(name, shape, dtype, lambda: original.make().to(dtype))


def _router(source, config, name: str, shape, layer: int, options: UpcycleOptions) -> Entry:
    dtype = _wanted(source.dtype("model.embed_tokens.weight"), options)
    generator = routing_generator(options.seed, layer, "cpu")

    def make() -> torch.Tensor:
        return torch.randn(shape, generator=generator).mul_(config.initializer_range).to(dtype)

    return Entry(name, shape, dtype, make)


def _scale_of_down(options: UpcycleOptions) -> float:
    """With it K equal experts give what one feed-forward gave."""
    sum_of_weights = ESTIMATORS[options.estimator].equal_experts_sum
    assert sum_of_weights is not None, "upcycle_checkpoint has refused other estimators"
    return 1 / sum_of_weights(options.top_k)


def _expert(source, dense, config, name: str, shape, match: re.Match, options: UpcycleOptions) -> Entry:
    layer, expert, on_disk = int(match[1]), int(match[3]), match[4]
    part = _PARTS[on_disk]
    original = _dense(source, dense, config, f"model.layers.{layer}.mlp.{part}.weight", shape)
    dtype = _wanted(original.dtype, options)
    scale = _scale_of_down(options) if on_disk == "w2" else 1.0
    stream = mix_seed(options.seed, 1 + layer * config.num_local_experts + expert)

    def make() -> torch.Tensor:
        matrix = original.make().float()
        mean, std = matrix.mean(), matrix.std()
        numbers = routing_generator(stream, ("w1", "w3", "w2").index(on_disk), "cpu")
        if options.noise:
            matrix = matrix + options.noise * std * torch.randn(shape, generator=numbers)
        if options.reinit:
            # The same neurons in all three matrices of an expert.
            order = torch.randperm(config.intermediate_size, generator=routing_generator(stream, 3, "cpu"))
            neurons = order[: round(options.reinit * config.intermediate_size)]
            fresh = mean + std * torch.randn(shape, generator=numbers)
            dim = 1 if on_disk == "w2" else 0
            matrix = matrix.index_copy(dim, neurons, fresh.index_select(dim, neurons))
        return (matrix * scale).to(dtype)

    return Entry(name, shape, dtype, make)


# --- how far from the dense model --------------------------------------------------------------------------------------


def _compare(options, source: WeightSource, staging: Path, config: GrinMoeConfig, entries: list[Entry], record) -> None:
    parameters = sum(math.prod(entry.shape) for entry in entries)
    copies = not (options.noise or options.reinit)
    if note := why_not_compared(config, parameters, options.compare):
        record["notes"].append(note)
    else:
        compared = (AutoModelForCausalLM, source.folder), (GrinMoeForCausalLM, staging)
        rounding = functools.partial(_round_as_copies, source=source, options=options)
        record["logits"] = compare_logits(*compared, config, rounding, _without_a_mask)
        if copies:
            require_equal(record["logits"])
        record["single_candidate_share"] = single_candidate_share(staging, config)
    if not copies:
        record["notes"].append("experts are no exact copies, so the model begins near the dense one, not at it")


def _round_as_copies(model: Any, source: WeightSource, options: UpcycleOptions) -> None:
    """Round a dense model's weights as those of the result are, w2 after its division."""
    for name, parameter in model.named_parameters():
        dtype = _wanted(source.dtype(name) if name in source else parameter.dtype, options)
        scale = _scale_of_down(options) if name.endswith(".mlp.down_proj.weight") else 1.0
        parameter.copy_((parameter * scale).to(dtype).float() / scale)


def _without_a_mask(model: Any) -> None:
    """One candidate for every draw: there the experts' weights are those that `_scale_of_down` assumes."""
    for layer in model.model.layers:
        layer.block_sparse_moe.gate.jitter_eps = 0.0


def single_candidate_share(folder: Path, config: GrinMoeConfig) -> float:
    """Of all draws on a random text, those whose mask leaves one expert; 1 for a gating without a mask."""
    if config.router_estimator == "topk_renormalized":
        return 1.0
    (text,) = random_tokens(config, [min(TOKENS_COMPARED, config.max_position_embeddings)])
    with torch.no_grad():
        output = load_float32(folder)(text, use_cache=False, output_router_logits=True)
    kept = kept_experts(
        torch.stack(output.router_logits), torch.stack(output.selected_experts), config.router_jitter_noise
    )
    return (kept == 1).double().mean().item()
