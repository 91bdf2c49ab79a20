"""LoRA for GRIN-MoE in PEFT's format: which weights to adapt, loading an adapter, and models that plain PEFT has made.

    model = get_peft_model(model, lora_config(model, r=16))   # then Trainer(model, ...) or SFTTrainer(model, ...)
    model.save_pretrained("adapter")                          # files of plain PEFT
    model = load_adapter(base, "adapter")

How the experts are adapted is told in `expert_lora.py`, and how to merge in `merge.py`.
"""

from __future__ import annotations

import copy
import os
import re
import warnings
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import ParamWrapper
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from torch import nn

from ..checkpoint_grinmoe import FLOATS, CheckpointFileError, read_header
from ..configuration_grinmoe import (
    check_fields,
    check_pattern,
    is_dict_of,
    is_int,
    is_list_of,
    is_number,
    is_one_of,
    is_text,
    read_json_object,
)
from ..modeling_grinmoe import GrinMoeExperts
from ..quantization_grinmoe import FUSED, PackedExperts
from .expert_lora import ExpertLora, GrinMoeLoraConfig

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ROUTER = "gate.weight"

# Fields of adapter_config.json, in the form of the tables in configuration_grinmoe.py.
_NUMBERS: dict[str, tuple[float, float, str]] = {
    "r": (1, 2**14, ""),
    "lora_alpha": (-1e9, 1e9, ""),
    "lora_dropout": (0.0, 1.0, ""),
    "qalora_group_size": (1, 2**20, ""),
}
_OBJECTS = (
    "runtime_config loftq_config eva_config corda_config lora_ga_config velora_config monteclora_config arrow_config"
)
_FORMS: dict[str, Any] = {
    **dict.fromkeys(
        "inference_mode fan_in_fan_out use_rslora use_dora use_qalora lora_bias shared_a ensure_weight_tying".split(),
        (lambda value: isinstance(value, bool), "True or False"),
    ),
    **dict.fromkeys(
        "base_model_name_or_path revision peft_version task_type".split(), (is_one_of(str), "a text or null")
    ),
    "bias": (lambda value: value in ("none", "all", "lora_only"), "none, all or lora_only"),
    "init_lora_weights": (lambda value: isinstance(value, (bool, str)), "True, False or the name of an initialisation"),
    **dict.fromkeys(
        ("target_modules", "exclude_modules", "layers_pattern"),
        (lambda value: is_text(value) or is_list_of(is_text)(value), "a pattern, a list of texts or null"),
    ),
    **dict.fromkeys(("modules_to_save", "target_parameters"), (is_list_of(is_text), "a list of texts or null")),
    "layers_to_transform": (
        lambda value: is_int(value) or is_list_of(is_int)(value),
        "a layer, a list of them or null",
    ),
    "experts": (
        lambda value: value == "all" or (value is not None and is_list_of(is_int)(value)),
        "all, or a list of experts",
    ),
    "rank_pattern": (is_dict_of(is_text, lambda value: is_int(value, 1, 2**14)), "a map of names to ranks up to 16384"),
    "alpha_pattern": (is_dict_of(is_text, lambda value: is_number(value, -1e9, 1e9)), "a map of names to numbers"),
    "trainable_token_indices": (
        lambda value: is_list_of(is_int)(value) or is_dict_of(is_text, is_list_of(is_int))(value),
        "a list of ids, a map of names to such lists or null",
    ),
    "alora_invocation_tokens": (is_list_of(is_int), "a list of ids or null"),
    "megatron_config": (lambda value: value is None, "null: PEFT imports the module that is named beside it"),
    "auto_mapping": (is_one_of(dict), "an object or null"),
    **dict.fromkeys((*_OBJECTS.split(), "kasa_config", "use_bdlora"), (is_one_of(dict), "an object or null")),
}


class AdapterError(ValueError):
    """An adapter that cannot be used: not there, incomplete, or made for another base."""


def lora_config(
    model: Any,
    r: int = 16,
    alpha: float | None = None,
    *,
    experts: str | list[int] = "all",
    shared_a: bool = False,
    attention: bool = True,
    router: bool = False,
    task_type: str = "CAUSAL_LM",
    **options: Any,
) -> GrinMoeLoraConfig:
    """
    The PEFT configuration of LoRA on a GRIN-MoE, for `get_peft_model` and the `peft_config` of TRL's trainers.

    Args:
        model: the model, or its config.
        r: rank; of each expert where experts are adapted.
        alpha: the low-rank term is scaled by alpha / r; 2 r by default.
        experts: "all", "none", or indices of the experts to adapt in every layer.
        shared_a: one A per layer and fused weight, for all of its experts.
        attention: adapt the q, k, v and o projections.
        router: adapt the gates.
        task_type: as PEFT names it; "SEQ_CLS" for a classifier.
        options: further fields of PEFT's `LoraConfig`. `layers_to_transform` holds for experts and router too, unlike in
            PEFT.

    Raises:
        ValueError: nothing is adapted, an expert that the model does not have, r below 1, shared_a without experts, a
            model whose experts are not of this package, an option that PEFT would not apply to them or to the head, or
            `modules_to_save` that holds quantised experts.
    """
    if experts == "none":
        if shared_a:
            raise ValueError("shared_a=True with experts='none': there is no A to share; leave one of them out")
        if not (attention or router):
            raise ValueError("nothing to adapt: experts='none', attention=False, router=False; choose at least one")
    elif isinstance(model, nn.Module) and not any(isinstance(module, GrinMoeExperts) for module in model.modules()):
        raise ValueError(
            f"{type(model).__name__} has no GrinMoeExperts of this package; import grinmoe before the model is loaded"
        )
    for entry in options.get("modules_to_save") or ():
        for name, module in model.named_modules() if isinstance(model, nn.Module) else ():
            if name.endswith(entry) and any(isinstance(part, PackedExperts) for part in module.modules()):
                raise ValueError(
                    f"modules_to_save={options['modules_to_save']}: {entry!r} holds quantised experts, whose codes cannot "
                    "be trained; adapt them by LoRA (experts='all'), or load the base in full precision"
                )
    config: Any = model.config if isinstance(model, nn.Module) else model
    if not isinstance(experts, str):
        outside = [expert for expert in experts if not 0 <= expert < config.num_local_experts]
        if outside:
            raise ValueError(f"experts={outside}: the model's experts are 0 to {config.num_local_experts - 1}")
    parameters = [] if experts == "none" else [f"experts.{name}" for name in FUSED]
    if router:
        parameters.append(ROUTER)
    _check_options(config, parameters, options)
    layers = options.get("layers_to_transform")
    if layers is not None:
        layers = [layers] if isinstance(layers, int) else layers
        parameters = [f"layers.{layer}.block_sparse_moe.{name}" for layer in layers for name in parameters]
        if not attention:  # PEFT looks for modules then
            options = {name: value for name, value in options.items() if not name.startswith("layers_")}
    return GrinMoeLoraConfig(
        r=r,
        lora_alpha=2 * r if alpha is None else alpha,  # type: ignore[arg-type]
        target_modules=list(ATTENTION) if attention else None,
        target_parameters=parameters or None,
        task_type=task_type,
        experts="all" if experts == "none" else experts,
        shared_a=shared_a,
        **options,
    )


def _check_options(config: Any, parameters: list[str], options: dict[str, Any]) -> None:
    """Options that PEFT ignores for parameters, or under which it drops something of the head."""
    modules = {name.rpartition(".")[0] for name in parameters}  # experts, gate
    for option in ("rank_pattern", "alpha_pattern"):
        for key in options.get(option) or {}:
            if key.rpartition(".")[2] in modules:
                raise ValueError(
                    f"{option}={options[option]} names a module, and PEFT goes by the names of its weights: write "
                    f"{', '.join(f'{name!r}' for name in parameters if name.startswith(key.rpartition('.')[2]))}"
                )
    excluded = options.get("exclude_modules") or []
    for module in modules:
        key = f"model.layers.0.block_sparse_moe.{module}"
        if (
            re.fullmatch(excluded, key)
            if isinstance(excluded, str)
            else any(f".{key}".endswith(f".{e}") for e in excluded)
        ):
            raise ValueError(
                f"exclude_modules={excluded!r} names the {module}, which PEFT would adapt all the same; use experts='none', "
                "router=False or layers_to_transform"
            )
    tokens = options.get("trainable_token_indices")
    names = {name.rpartition(".")[2] for name in tokens} if isinstance(tokens, dict) else {"embed_tokens"}
    on_head = "lm_head" in names or config.tie_word_embeddings
    if tokens and on_head and config.lm_head_bias:
        raise ValueError(
            f"trainable_token_indices={tokens} on the language head, whose bias PEFT would drop; train the whole head "
            "(modules_to_save=['lm_head'])"
        )
    if tokens and "lm_head" in names and config.tie_word_embeddings and "embed_tokens" not in names:
        raise ValueError(
            f"trainable_token_indices={tokens}: the head is tied to embed_tokens, and merging would change both; name "
            "embed_tokens"
        )


def use_expert_lora(peft_model: nn.Module) -> nn.Module:
    """
    Let a model that plain PEFT adapted (`LoraConfig(target_parameters=...)`) compute by [`ExpertLora`]; in place.

    Weights, adapters and what is trained stay as they are.

    Returns:
        The same model.

    Raises:
        ValueError: no fused weight of it is adapted.
    """
    found = False
    for module in peft_model.modules():
        if not isinstance(module, ParamWrapper) or not isinstance(module.get_base_layer(), GrinMoeExperts):
            continue
        found = True
        if not isinstance(module, ExpertLora):
            ExpertLora.adopt(module)
    if not found:
        raise ValueError(
            "no fused experts are adapted in this model; target_parameters=['experts.gate_up_proj', 'experts.down_proj'] "
            "adapts them"
        )
    return peft_model


def read_lora_config(folder: str | os.PathLike) -> GrinMoeLoraConfig:
    """
    The configuration in an adapter's folder.

    Raises:
        AdapterError: there is none, it is damaged or has a field of the wrong type, or the adapter is not LoRA.
    """
    file = Path(folder) / CONFIG_NAME
    if not file.is_file():
        raise AdapterError(f"{folder} holds no {CONFIG_NAME}; give the folder of a PEFT adapter")
    content = read_json_object(file, AdapterError, "copy the adapter again")
    kind = content.get("peft_type")
    if kind != "LORA":
        raise AdapterError(f"{file} is of peft_type {str(kind)[:80]!r}; only LORA adapters are supported here")
    # The two fields that plain PEFT does not know are kept from it, so that it can warn of others.
    form: dict[str, Any] = {name: content.pop(name) for name in ("experts", "shared_a") if name in content}
    try:
        check_fields({**content, **form}, _NUMBERS, _FORMS)
        for name in ("target_modules", "exclude_modules", "layers_pattern", "rank_pattern", "alpha_pattern"):
            value = content.get(name) or ()
            for pattern in [value] if isinstance(value, str) else () if name.endswith("modules") else value:
                check_pattern(name, pattern)
        plain = LoraConfig.from_peft_type(**content)
        return GrinMoeLoraConfig(**{field.name: getattr(plain, field.name) for field in fields(plain)}, **form)
    except Exception as error:  # PEFT's own, of every kind, for what its classes cannot take
        raise AdapterError(f"{file} cannot be used: {str(error)[:500]}") from error


def base_of(adapter: str | os.PathLike) -> str:
    """
    What an adapter's folder names as its base: a folder or a Hub id.

    Raises:
        AdapterError: it names none, or a folder that is not there.
    """
    named = read_lora_config(adapter).base_model_name_or_path
    if not named:
        raise AdapterError(f"the adapter in {adapter} does not name its base; give it (base=...)")
    if not may_be_there(named):
        raise AdapterError(
            f"the adapter in {adapter} names {named} as its base, which is not there; give it (base=...)"
        )
    return named


def may_be_there(base: str | os.PathLike) -> bool:
    """Whether this is a folder, or could be an id on the Hub."""
    if Path(base).is_dir():
        return True
    try:
        validate_repo_id(os.fspath(base))
    except HFValidationError:
        return False
    return True


def adapter_shapes(
    model_class: type, config: Any, adapter: GrinMoeLoraConfig, embeddings: bool = False
) -> dict[str, tuple[int, ...]]:
    """
    Shapes of the tensors in the file of this adapter, by key. Nothing is allocated.

    Args:
        model_class: of the base, GrinMoeForCausalLM for one.
        config: of the base.
        adapter: the adapter's configuration.
        embeddings: with those of the input and output embeddings, which PEFT saves where they are targets or were resized.

    Raises:
        AdapterError: the base has none of the weights that the adapter is for, or not the experts.
    """
    with torch.device("meta"):
        base = model_class(copy.deepcopy(config))
        try:
            # Without the name of its base, which this one does not have.
            model = get_peft_model(base, replace(adapter, base_model_name_or_path=None))
        except Exception as error:  # PEFT's own, of every kind, for what it cannot apply
            raise AdapterError(f"the adapter does not fit a {config.model_type} model: {str(error)[:500]}") from error
        state_dict = get_peft_model_state_dict(model, save_embedding_layers=embeddings)
    return {key: tuple(tensor.shape) for key, tensor in state_dict.items()}


def stored_shapes(folder: str | os.PathLike) -> dict[str, tuple[int, ...]]:
    """
    Shapes of the tensors in an adapter's folder, by key. No weight is read.

    Raises:
        AdapterError: the file is missing, pickled or damaged, or holds a tensor that is not of 16, 32 or 64-bit floats.
    """
    file = Path(folder) / SAFETENSORS_WEIGHTS_NAME
    if not file.is_file():
        if (Path(folder) / WEIGHTS_NAME).is_file():
            raise AdapterError(
                f"{folder} holds only pickled weights, which can run code; save the adapter as safetensors"
            )
        raise AdapterError(f"{folder} holds no {SAFETENSORS_WEIGHTS_NAME}; copy the adapter again")
    try:
        tensors = read_header(file)
    except CheckpointFileError as error:
        raise AdapterError(f"{error}; copy the adapter again") from error
    for key, tensor in tensors.items():
        if tensor.dtype not in FLOATS:
            raise AdapterError(f"{file} holds {key} as {tensor.dtype}, where floats belong; save the adapter again")
    return {key: tensor.shape for key, tensor in tensors.items()}


def check_adapter(folder: str | os.PathLike, model_class: type, config: Any) -> GrinMoeLoraConfig:
    """
    Hold an adapter against its base before any weight of it is read.

    Returns:
        The adapter's configuration.

    Raises:
        AdapterError: a file is missing or damaged; a tensor is missing, unknown, or does not fit this base.
    """
    adapter = read_lora_config(folder)
    file = Path(folder) / SAFETENSORS_WEIGHTS_NAME
    found = stored_shapes(folder)
    expected = adapter_shapes(model_class, config, adapter)
    embeddings = adapter_shapes(model_class, config, adapter, embeddings=True)
    for key in found.keys() & embeddings.keys() - expected.keys():
        if found[key] != embeddings[key]:
            raise AdapterError(
                f"{file} holds {key} with shape {found[key]}, this base has {embeddings[key]}: it was trained on resized "
                f"embeddings; call resize_token_embeddings({found[key][0]}) on the base first (to merge, save that base)"
            )
        expected[key] = embeddings[key]
    _compare_shapes(file, expected, found, adapter.base_model_name_or_path)
    return adapter


def _compare_shapes(
    file: Path, expected: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]], made_for: str | None
) -> None:
    origin = f" It was made for {made_for}." if made_for else ""
    for problem, keys in (
        ("lacks", sorted(expected.keys() - found.keys())),
        ("holds, beyond what its configuration names,", sorted(found.keys() - expected.keys())),
    ):
        if keys:
            raise AdapterError(
                f"{file} {problem} {len(keys)} tensors, {keys[0]} first: it is damaged, or for another base (other number "
                f"of layers, other targets).{origin}"
            )
    for key, shape in expected.items():
        if found[key] != shape:
            raise AdapterError(
                f"{file} holds {key} with shape {found[key]}, this base needs {shape}: another base.{origin}"
            )


def load_adapter(
    model: nn.Module, folder: str | os.PathLike, is_trainable: bool = False, adapter_name: str = "default"
) -> PeftModel:
    """
    Load an adapter onto a base, or a further one onto a `PeftModel`, with [`ExpertLora`] and in the form it was trained in.

    A further adapter is added and not made active; `set_adapter` does that.

    Args:
        model: the base, dense or quantised, or a `PeftModel` of it. It is changed in place, as PEFT does.
        folder: `adapter_config.json` and `adapter_model.safetensors`, of plain PEFT too.
        is_trainable: go on training it, or only use it (PEFT then puts the model into evaluation mode).
        adapter_name: for a model with several.

    Raises:
        AdapterError: (before anything is loaded) as in [`check_adapter`], or the name is taken.

    Warns:
        UserWarning: the adapter names another base than `model` was loaded from.
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    if isinstance(model, PeftModel) and adapter_name in model.peft_config:
        raise AdapterError(f"the model has an adapter named {adapter_name!r} already; choose another adapter_name")
    adapter = check_adapter(folder, type(base), base.config)
    loaded_from = base.config._name_or_path
    if adapter.base_model_name_or_path and loaded_from and adapter.base_model_name_or_path != loaded_from:
        warnings.warn(
            f"the adapter in {folder} was made for {adapter.base_model_name_or_path}, this base was loaded from "
            f"{loaded_from}; the shapes fit, whether the weights are the same is yours to know",
            stacklevel=2,
        )
    adapter.inference_mode = not is_trainable
    if isinstance(model, PeftModel):
        model.add_adapter(adapter_name, adapter)
        model.load_adapter(str(folder), adapter_name, is_trainable=is_trainable)
        return model
    return PeftModel.from_pretrained(model, str(folder), adapter_name, is_trainable=is_trainable, config=adapter)
