"""The peak of a training step's memory on one GPU, and what it consists of. See docs/planning.md.

The model itself runs the step: with the method's adapters, quantised experts, checkpointing and FSDP2, on tensors of torch's
FakeTensorMode, which have shapes and no data. `memory_tracker.py` counts what it allocates. No GPU is needed: the tensors
claim to be on a CPU, and `_cuda_autocast` makes up for what CUDA's autocast does otherwise.

Layers are alike, so memory is linear in their number at every phase of a step. A model of many runs with 3 and with 4.

Against real steps of small models (torch 2.13, tests/planning/test_plan.py) this is within 2 %, under FSDP2 over one rank
too. It stands on internals of torch: FakeTensorMode, the fake process group, and in `memory_tracker.py` the storages' common
utilities and `UntypedStorage.resize_`. The tests of that file fail when one of them moves.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._pytree import tree_map_only

from ..kernels import DEFAULT_EXPERTS
from ..modeling_grinmoe import GrinMoeForCausalLM
from .memory_model import Step, resident_bytes
from .memory_tracker import Allocations

PARTS = ("weights", "gradients", "optimizer", "activations", "logits", "communication", "temporary")
FEW_LAYERS = 3


@dataclass(frozen=True)
class Peak:
    """Bytes by part (of `PARTS`) when their sum is largest, and where in the step that is."""

    peak: dict[str, int]
    peak_phase: str

    @property
    def peak_total(self) -> int:
        return sum(self.peak.values())


def predict(step: Step) -> Peak:
    """
    Run a step that is not the first, so that the optimizer's states are there.

    Raises:
        ImportError: peft (for LoRA) or bitsandbytes (for 4 bits) is not installed.
        RuntimeError: a step with FSDP2 in a process that has a process group.
    """
    layers = step.config.num_hidden_layers
    if layers <= FEW_LAYERS + 1:
        phases = _peaks(step, layers)
    else:
        few, more = _peaks(step, FEW_LAYERS), _peaks(step, FEW_LAYERS + 1)
        further = layers - FEW_LAYERS - 1
        phases = {
            phase: Counter(
                {part: more[phase][part] + further * (more[phase][part] - few[phase][part]) for part in PARTS}
            )
            for phase in few.keys() & more.keys()
        }
    phase, peak = max(phases.items(), key=lambda item: item[1].total())
    resident = resident_bytes(step)
    if not step.cpu_offload:
        peak.update(weights=resident["weights"], optimizer=resident.get("optimizer", 0))
    if step.replicas > 1 and step.shards is None:
        # DistributedDataParallel reduces gradients in buckets of its own.
        peak["communication"] += resident["gradients"]
    name = phase if isinstance(phase, str) else f"backward of layer {phase % layers}"
    return Peak({part: peak[part] for part in PARTS}, name)


def _peaks(step: Step, layers: int) -> dict[Any, Counter[str]]:
    """Bytes at the peak of every phase; a backward's is the layer's index: 0 and 1, and negative for others."""
    config = copy.deepcopy(step.config)
    config.num_hidden_layers = layers
    step = replace(step, config=config)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with _mesh(step) as mesh, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # FSDP2 and checkpointing have advice for those who train
        model = _model(step, mode)
        with mode:
            if mesh is not None:
                from ..distributed import shard_model

                compute = torch.bfloat16 if step.precision.compute == 2 else None
                model = shard_model(model, mesh, param_dtype=compute)
            tokens = torch.zeros(step.batch, step.sequence, dtype=torch.long)
            allocations = Allocations(sharded=mesh is not None)
            allocations.ignore([*model.parameters(), *model.buffers(), tokens])
            _Phases(model, allocations, step)
            autocast = torch.autocast("cpu", torch.bfloat16, enabled=step.precision.autocast)
            with allocations, _cuda_autocast():
                for micro_batch in range(1 + step.accumulates):
                    if mesh is not None:
                        # The Trainer reduces in a step's last micro-batch only.
                        model.set_requires_gradient_sync(micro_batch == step.accumulates)
                    allocations.phase = "forward"
                    with autocast:
                        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
                    loss.backward()
    return allocations.peaks


@contextlib.contextmanager
def _mesh(step: Step) -> Iterator[Any]:
    """A mesh of `step.shards` GPUs, none of which is there; None without FSDP2."""
    if step.shards is None:
        yield None
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise RuntimeError("FSDP2's memory is planned with a process group of its own; plan in a process without one")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=step.shards)
    try:
        yield init_device_mesh("cpu", (step.shards,))
    finally:
        dist.destroy_process_group()


class _Phases:
    """Hooks that tell `allocations` where the step is, and what is a gradient."""

    def __init__(self, model: Any, allocations: Allocations, step: Step):
        self.allocations, self.sharded = allocations, step.shards is not None
        self.part = None if step.cpu_offload else "gradients"
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        layers = step.config.num_hidden_layers
        for module in model.modules():
            if type(module).__name__.endswith("GrinMoeDecoderLayer"):  # FSDP2 adds to the name
                index = module.self_attn.layer_idx
                self.backward_of(module, index if index < 2 and index < layers - 1 else index - layers)
        self.backward_of(model.get_input_embeddings(), "backward of the embedding")
        model.get_output_embeddings().register_forward_pre_hook(lambda *_: self.enter("loss"))
        if not self.sharded:
            for parameter in self.trained:
                parameter.register_post_accumulate_grad_hook(lambda p: allocations.move(p.grad, "gradients"))

    def backward_of(self, module: nn.Module, phase: Any) -> None:
        def after_forward(_: nn.Module, inputs: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            if self.allocations.phase == "forward" and hidden.requires_grad:  # and not as it is recomputed
                hidden.register_hook(lambda _: self.enter(phase))

        module.register_forward_hook(after_forward)

    def enter(self, phase: Any) -> None:
        self.allocations.phase = phase
        if self.sharded:
            for parameter in self.trained:
                if parameter.grad is not None:
                    self.allocations.move(parameter.grad, self.part)


@contextlib.contextmanager
def _cuda_autocast() -> Iterator[None]:
    """Norms and sums in float32, as in CUDA's autocast and not in a CPU's.

    Functions are exchanged, since a TorchFunctionMode does not reach what the backward recomputes.
    """
    total = torch.Tensor.sum

    def in_float32(function: Callable) -> Callable:
        def wide(*args: Any, **kwargs: Any) -> torch.Tensor:
            if torch.is_autocast_enabled("cpu"):
                args, kwargs = tree_map_only(torch.Tensor, torch.Tensor.float, (args, kwargs))
            with torch.autocast("cpu", enabled=False):
                return function(*args, **kwargs)

        return wide

    def sum_to_float32(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        narrow = torch.is_autocast_enabled("cpu") and tensor.dtype == torch.bfloat16
        return total(tensor, *args, **({"dtype": torch.float32} if narrow else {}), **kwargs)

    with (
        mock.patch.object(F, "layer_norm", in_float32(F.layer_norm)),
        mock.patch.object(F, "rms_norm", in_float32(F.rms_norm)),
        mock.patch.object(torch.Tensor, "sum", sum_to_float32),
    ):
        yield


def _model(step: Step, mode: FakeTensorMode) -> Any:
    """The model as the step's method trains it, of tensors without data."""
    with torch.device("meta"):
        model: Any = GrinMoeForCausalLM(step.config)
        model.set_experts_implementation(DEFAULT_EXPERTS)
        if not step.masked:
            # With tensors that have no values the library would make a mask that a real step goes without.
            model.model._causal_mask = lambda *_, **__: None
        if step.precision.compute == 2 and not (step.trains_all and step.precision.autocast):
            model.bfloat16()
        if step.method == "qlora":
            _quantise(model)
        if not step.trains_all:
            model = _with_adapters(model, step)
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = _fake(module, name, tensor, mode)
    if step.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def _with_adapters(model: Any, step: Step) -> Any:
    from peft import get_peft_model

    from ..adapters import lora_config

    adapters = step.adapters
    experts = "all" if adapters.experts else "none"
    options: dict[str, Any] = {"attention": adapters.attention, "experts": experts, "shared_a": adapters.shared_a}
    model = get_peft_model(model, lora_config(step.config, r=adapters.rank, **options))
    model.enable_input_require_grads()
    return model


def _quantise(model: Any) -> None:
    """NF4 with double quantisation, packed from the start: there is nothing to pack."""
    from transformers import BitsAndBytesConfig

    from ..quantization_grinmoe import QUANTIZERS, import_bitsandbytes

    with torch.device("cpu"):
        # bitsandbytes keeps its table of codes once it has made it, and cannot make it without values.
        import_bitsandbytes().functional.quantize_4bit(torch.ones(64, 64), compress_statistics=True, quant_type="nf4")
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=model.dtype,
    )
    quantizer: Any = QUANTIZERS["bitsandbytes_4bit"]
    model.hf_quantizer = quantizer(config, pre_quantized=True)
    model.hf_quantizer.preprocess_model(model, device_map=None)
    model.hf_quantizer.postprocess_model(model)


def _fake(module: Any, name: str, tensor: torch.Tensor, mode: FakeTensorMode) -> torch.Tensor:
    """A tensor that claims to be on a CPU; a linear's in 4 bits with its scales."""
    fake = FakeTensor(mode, tensor.detach().to("meta"), torch.device("cpu"))
    if not isinstance(tensor, nn.Parameter):
        return fake
    if name == "weight" and type(module).__name__ == "Linear4bit":
        from bitsandbytes.functional import quantize_4bit

        with mode:
            dense = torch.empty(module.out_features, module.in_features, dtype=torch.bfloat16)
            codes, state = quantize_4bit(dense, blocksize=64, compress_statistics=True, quant_type="nf4")
        packed: Any = nn.Parameter(codes, requires_grad=False)
        packed.quant_state, packed.bnb_quantized = state, True
        return packed
    return nn.Parameter(fake, requires_grad=tensor.requires_grad)
