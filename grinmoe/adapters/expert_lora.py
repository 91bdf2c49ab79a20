"""LoRA on the fused experts, as low-rank products per group of tokens: no delta as large as the experts is ever made.

PEFT adapts a fused weight (E, out, in) by `target_parameters`: its `ParamWrapper` holds the factors of all experts, and in
every forward builds the adapted weights of all of them. [`ExpertLora`] is that class with another forward. Parameters,
state-dict keys, adapter files, several adapters, `set_adapter` and `disable_adapter` are PEFT's own.

For expert e with factors A_e (r, in) and B_e (out, r), both products of an expert become x W_e^T + s (x A_e^T) B_e^T.

Two forms train less than all experts' factors, and hold no more than they train: `experts=[...]` adapts only some
experts, `shared_a=True` has one A per layer and weight. Their state dicts have PEFT's shapes all the same: an expert that is
not adapted has zeros there, a shared A is repeated. So plain PEFT loads the files and computes the same.

Shapes: T tokens, K experts per token, N = T * K choices, E experts, n adapted experts, H hidden size, I expert width,
r rank, R the ranks of all active adapters together.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from ..modeling_grinmoe import GrinMoeExperts
from ..quantization_grinmoe import FUSED
from .low_rank_experts import Factors, compute_dtype, low_rank_experts

try:
    from peft import LoraConfig
    from peft.tuners.lora import ParamWrapper
    from peft.tuners.tuners_utils import check_adapters_to_merge
except ImportError as error:
    raise ImportError("LoRA needs the package peft, 0.21 or newer; pip install 'grinmoe[train]'") from error


@dataclass
class GrinMoeLoraConfig(LoraConfig):
    """
    PEFT's `LoraConfig` whose fused experts are adapted by [`ExpertLora`]. `grinmoe.adapters.lora_config` makes one.

    Args:
        experts: "all", or the indices of the experts to adapt, in every layer.
        shared_a: one A (r, in) per layer and fused weight instead of one per expert.

    In `adapter_config.json` the two are written only where they differ from PEFT's own form; plain PEFT then says that
    it ignores them.

    Raises:
        ValueError: r below 1, lora_dropout or an initialisation that fused experts do not have, indices that are no list
            of different experts, `pissa_niter_...` or `layer_replication`, which go wrong in PEFT when the adapter is loaded
            or merged.
    """

    experts: list[int] | str = "all"
    shared_a: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.r < 1:
            raise ValueError(f"r={self.r}: the rank of LoRA must be at least 1")
        if str(self.init_lora_weights).startswith("pissa_niter"):
            raise ValueError(
                f"init_lora_weights={self.init_lora_weights!r} changes the base at random, and loading the adapter does so "
                "in another way; choose 'pissa'"
            )
        if self.layer_replication is not None:
            raise ValueError(
                f"layer_replication={self.layer_replication}: copies of a layer share its weights, and adapters of several "
                "copies would be merged into one; leave it out"
            )
        if self.adapts_experts:
            self._check_expert_options()
        # An experimental interface of PEFT, and its only one for a class of one's own. It lives on the instance, so that
        # copies of the configuration keep it.
        self._register_custom_module({GrinMoeExperts: ExpertLora})

    @property
    def adapts_experts(self) -> bool:
        """Whether a fused weight is among the targets."""
        return any(target.rpartition(".")[2] in FUSED for target in self.target_parameters or ())

    @property
    def is_compact(self) -> bool:
        """Whether fewer factors are trained than PEFT's files hold."""
        return self.experts != "all" or self.shared_a

    def _check_expert_options(self) -> None:
        if self.lora_dropout:
            raise ValueError(
                f"lora_dropout={self.lora_dropout} with adapted experts, where PEFT has none; set lora_dropout=0, or adapt "
                "attention only (experts='none')"
            )
        if not (self.init_lora_weights in (True, False) or self.init_lora_weights == "gaussian"):
            raise ValueError(
                f"init_lora_weights={self.init_lora_weights!r} is not for fused experts; choose True, False or 'gaussian'"
            )
        if self.experts == "all":
            return
        if isinstance(self.experts, str) or not self.experts or len(set(self.experts)) != len(self.experts):
            raise ValueError(f"experts={self.experts!r}; give 'all', or a list of different expert indices, not empty")
        self.experts = sorted(int(expert) for expert in self.experts)

    def to_dict(self) -> dict[str, Any]:
        fields = super().to_dict()
        if not self.is_compact:
            del fields["experts"], fields["shared_a"]
        return fields


@dataclass(frozen=True)
class ExpertChoice:
    """Which of PEFT's factors are trained: those of `experts`, and one A for all of them if `shared_a`."""

    num_experts: int
    experts: tuple[int, ...]
    shared_a: bool

    @property
    def is_compact(self) -> bool:
        return self.shared_a or len(self.experts) < self.num_experts

    def stack(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """Trained lora_A (n r, in) or (r, in) to (E, r, in); lora_B (out, r n) to (E, out, r). Zeros for other experts."""
        if name == "lora_A":
            blocks = weight.unflatten(0, (1 if self.shared_a else len(self.experts), -1))
            blocks = blocks.expand(len(self.experts), -1, -1)
        else:
            blocks = weight.unflatten(1, (-1, len(self.experts))).permute(2, 0, 1)
        if len(self.experts) == self.num_experts:
            return blocks
        index = torch.tensor(self.experts, device=weight.device)
        return blocks.new_zeros(self.num_experts, *blocks.shape[1:]).index_copy(0, index, blocks)

    def expand(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """Trained factors to PEFT's: lora_A (E r, in), rows expert by expert; lora_B (out, r E), columns rank by rank."""
        stacked = self.stack(name, weight)
        return stacked.flatten(0, 1) if name == "lora_A" else stacked.permute(1, 2, 0).flatten(1)

    def contract(self, name: str, weight: torch.Tensor, check: bool = True) -> torch.Tensor:
        """The inverse of `expand`.

        Raises:
            ValueError: with `check`, if something would be lost: another expert is adapted, or the As differ.
        """
        chosen = list(self.experts)
        if name == "lora_A":
            blocks = weight.unflatten(0, (self.num_experts, -1))[chosen]
            if not self.shared_a:
                return blocks.flatten(0, 1)
            if check and not torch.equal(blocks, blocks[:1].expand_as(blocks)):
                raise ValueError("the experts' A differ, while shared_a=True trains one for all of them")
            return blocks[0]
        blocks = weight.unflatten(1, (-1, self.num_experts))
        others = [expert for expert in range(self.num_experts) if expert not in self.experts]
        if check and blocks[..., others].any():
            raise ValueError(f"experts other than {chosen} are adapted too")
        return blocks[..., chosen].flatten(1)


class _Scales(dict[str, float]):
    """Scale by adapter, for writing. PEFT's tools that read one go on to treat the factors as those of one linear layer."""

    def of(self, adapter_name: str) -> float:
        return super().__getitem__(adapter_name)

    def __getitem__(self, adapter_name: str) -> float:
        raise ValueError(
            f"the factors of adapter {adapter_name!r} on fused experts are not those of one linear layer: PEFT's "
            "hotswap_adapter and LoRA-FA would mix experts; to change adapters, use grinmoe.adapters.load_adapter(model, "
            "folder, adapter_name=...) and set_adapter"
        )


class ExpertLora(ParamWrapper):
    """
    LoRA on one fused weight of [`GrinMoeExperts`], in the format of PEFT's `ParamWrapper`, whose forward it replaces.

    PEFT nests one wrapper per fused weight; the outermost computes for all of them. It reads the experts' own weights
    through `GrinMoeExperts.linears` alone, so these may be quantised; or, in the grouped form, as they are (see
    `uses_grouped_mm`).

    Raises:
        ValueError: (when made) an expert index that the layer does not have; (in forward) weights that are offloaded or
            sharded by tensor or expert parallelism, hooks on the experts that would not run, a wrapper of plain PEFT in
            between, factors that something else has exchanged; (in merging) quantised weights; (when a scale is read by
            index) tools of PEFT that would mix experts.
    """

    leaves_codes_alone = True  # which `PackedExperts.check_wrapper` asks for

    # Set by PEFT's constructor.
    num_experts: int
    in_features: int
    out_features: int

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, parameter_name: str, config: LoraConfig, **kwargs: Any
    ):
        self.choices: dict[str, ExpertChoice] = {}  # `update_layer` fills it, and the constructor calls that
        super().__init__(base_layer, adapter_name, parameter_name=parameter_name, config=config, **kwargs)
        self._register_state_dict_hooks()

    def _register_state_dict_hooks(self) -> None:
        self.register_state_dict_post_hook(_expand_factors)
        self.register_load_state_dict_pre_hook(_contract_factors)

    @classmethod
    def adopt(cls, wrapper: ParamWrapper) -> None:
        """
        Turn plain PEFT's wrapper of a fused weight into an `ExpertLora`, in place.

        A new module would have new parameters, which an optimizer or a second reference to the model does not know. The
        two classes hold the same parameters under the same names, so it is enough to exchange the class and to set what
        `__init__` adds to PEFT's: the choice of experts (plain PEFT trains all of them) and the state-dict hooks.
        """
        wrapper.__class__ = cls
        adopted = cast(ExpertLora, wrapper)
        adopted.scaling = adopted.__dict__.pop("scaling")
        adopted.choices = {name: adopted._all_experts() for name in adopted.lora_A}
        adopted._register_state_dict_hooks()

    @property
    def experts(self) -> GrinMoeExperts:
        return cast(GrinMoeExperts, self.get_base_layer())

    @property
    def scaling(self) -> dict[str, float]:
        """Scale by adapter. PEFT exchanges the whole of it, writes into it, and may not read one."""
        return self._scales

    @scaling.setter
    def scaling(self, scales: dict[str, float]) -> None:
        self._scales = _Scales(scales)

    def scale_layer(self, scale: float) -> None:
        active = {name for name in self.active_adapters if name in self.lora_A}
        self.scaling = {name: old * scale if name in active else old for name, old in self.scaling.items()}

    def unscale_layer(self, scale: float | None = None) -> None:
        if scale is None:
            super().unscale_layer()  # to the first one
        else:
            self.scale_layer(1 / scale)

    def _all_experts(self) -> ExpertChoice:
        return ExpertChoice(self.num_experts, tuple(range(self.num_experts)), shared_a=False)

    def trained(self, name: str, adapter_name: str) -> nn.Parameter:
        """The factors of an adapter as they are trained; `name` is lora_A or lora_B."""
        return getattr(self, name)[adapter_name].weight

    def checked(self, name: str, adapter_name: str, weight: torch.Tensor) -> torch.Tensor:
        """The same factors of an adapter, if they have the shape that it was made with. Whoever reads them calls this."""
        ranks = self.r[adapter_name] * len(self.choices[adapter_name].experts)
        rows = self.r[adapter_name] if self.choices[adapter_name].shared_a else ranks
        shape = (rows, self.in_features) if name == "lora_A" else (self.out_features, ranks)
        if weight.shape != shape:
            raise ValueError(
                f"{name} of adapter {adapter_name!r} on {self.parameter_name} has the shape {tuple(weight.shape)}, its rank "
                f"{self.r[adapter_name]} and its experts need {shape}: something wrote other factors there; load them with "
                "grinmoe.adapters.load_adapter"
            )
        return weight

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        # PEFT reads the parameter's shape, which quantised experts do not have.
        self.num_experts, self._param_ndim = self.experts.num_experts, 3
        width, hidden = self.experts.intermediate_dim, self.experts.hidden_dim
        # PEFT names the last two dimensions (in, out) and later swaps them.
        return (2 * width, hidden) if self.parameter_name == "gate_up_proj" else (hidden, width)

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        """Add an adapter, or make one anew. PEFT makes and initialises all experts' factors; the trained ones are kept."""
        choice = self.choices[adapter_name] = self._choice_of(config)
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)
        if choice.is_compact:
            self._keep_trained_factors(adapter_name, choice)

    def _choice_of(self, config: LoraConfig) -> ExpertChoice:
        if not isinstance(config, GrinMoeLoraConfig):  # plain PEFT's
            return self._all_experts()
        experts = range(self.num_experts) if isinstance(config.experts, str) else config.experts
        if min(experts) < 0 or max(experts) >= self.num_experts:
            raise ValueError(f"experts={list(experts)}: the model's experts are 0 to {self.num_experts - 1}")
        return ExpertChoice(self.num_experts, tuple(experts), config.shared_a)

    def _keep_trained_factors(self, adapter_name: str, choice: ExpertChoice) -> None:
        for name in ("lora_A", "lora_B"):
            linear = getattr(self, name)[adapter_name]
            # The values are PEFT's initial ones; a shared A takes those of one expert.
            trained = choice.contract(name, linear.weight.detach(), check=False).clone()
            linear.weight = nn.Parameter(trained, requires_grad=linear.weight.requires_grad)
            linear.out_features, linear.in_features = trained.shape

    def forward(  # type: ignore[override]
        self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Contract of `GrinMoeExperts.forward`: (T, H), top_k_index (T, K), top_k_weights (T, K) to (T, H)."""
        self._check_forward_args(hidden_states, *args, **kwargs)
        kwargs.pop("adapter_names", None)
        active = {layer.parameter_name: layer for layer in self._nested() if layer._active_here()}
        if not active:
            return self.experts(hidden_states, *args, **kwargs)
        _check_base(self.experts)
        dtype = compute_dtype(hidden_states)
        factors = {name: layer.factors(layer._active_here(), dtype) for name, layer in active.items()}
        adapted = {
            name: {expert for adapter in layer._active_here() for expert in layer.choices[adapter].experts}
            for name, layer in active.items()
        }
        return low_rank_experts(self.experts, factors, adapted, hidden_states, *args, **kwargs)

    def _nested(self) -> list[ExpertLora]:
        """This wrapper and those inside of it."""
        layers: list[ExpertLora] = []
        layer: nn.Module = self
        while isinstance(layer, ParamWrapper):
            if not isinstance(layer, ExpertLora):
                raise ValueError(
                    "a wrapper of plain PEFT lies inside of an ExpertLora; call use_expert_lora on the whole model"
                )
            layers.append(layer)
            layer = layer.base_layer
        return layers

    def _active_here(self) -> list[str]:
        """Names of the adapters whose terms are to be added; none where they are merged."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:
            return []
        return [name for name in self.active_adapters if name in self.lora_A]

    def factors(self, names: list[str], dtype: torch.dtype) -> Factors:
        """A (E, R, in) and B (E, out, R), the scale within B, of these adapters side by side."""
        stacks = []
        for name in names:
            stack_a, stack_b = (
                self.choices[name].stack(part, self.checked(part, name, self.trained(part, name)).to(dtype))
                for part in ("lora_A", "lora_B")
            )
            stacks.append((stack_a, stack_b * self._scales.of(name)))
        if len(stacks) == 1:
            return stacks[0]
        return torch.cat([a for a, _ in stacks], dim=1), torch.cat([b for _, b in stacks], dim=2)

    def get_delta_weight(self, adapter_name: str, *args: Any, **kwargs: Any) -> torch.Tensor:
        """(E, out, in), in the weight's dtype. For callers of PEFT; neither forward nor merging makes it."""
        lora_a, lora_b = self.factors([adapter_name], self.trained("lora_A", adapter_name).dtype)
        parameter = self._floating_parameter()
        return (lora_b @ lora_a).to(parameter.device, parameter.dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """PEFT's contract. Expert by expert, added in float32 and rounded once."""
        for name in check_adapters_to_merge(self, adapter_names):
            if name in self.lora_A:
                self._add_delta(name, 1, check_finite=safe_merge)
                self.merged_adapters.append(name)

    def unmerge(self) -> None:
        while self.merged_adapters:
            self._add_delta(self.merged_adapters.pop(), -1, check_finite=False)

    @torch.no_grad()
    def _add_delta(self, adapter_name: str, sign: int, check_finite: bool) -> None:
        weight = self._floating_parameter().data
        dtype = torch.promote_types(weight.dtype, torch.float32)
        lora_a, lora_b = (factor.to(weight.device) for factor in self.factors([adapter_name], dtype))
        if check_finite and not (lora_a.isfinite().all() and lora_b.isfinite().all()):
            raise ValueError(
                f"adapter {adapter_name!r} holds NaN or infinity in {self.parameter_name}; nothing was merged"
            )
        for expert in self.choices[adapter_name].experts:
            weight[expert] = torch.addmm(weight[expert].to(dtype), lora_b[expert], lora_a[expert], alpha=sign)

    def _floating_parameter(self) -> nn.Parameter:
        parameter = self.get_param()
        if not parameter.is_floating_point() or parameter.dim() != 3:
            raise ValueError(
                f"{self.parameter_name} is quantised (stored as {parameter.dtype}), and nothing can be added to it in "
                "place; dequantise the model first (model.dequantize()), or use grinmoe.adapters.merge_adapter"
            )
        return parameter


# PEFT tells a wrapper by the name of its class when a second parameter of a module, or a second adapter, comes along. Any
# other name ends in its "not a valid target". (Pickling goes by `__qualname__`.)
ExpertLora.__name__ = ParamWrapper.__name__


def _check_base(experts: GrinMoeExperts) -> None:
    """What would go wrong without a word: the experts' own `forward` does not run, nor what is attached to it."""
    for name in FUSED:
        parameter = getattr(experts, name)
        if parameter.is_meta:
            raise ValueError(
                f"experts.{name} is offloaded (on the meta device), which LoRA on the experts does not support; load "
                "the model without offloading, or in 4 bits"
            )
        if isinstance(parameter, DTensor):
            raise ValueError(
                f"experts.{name} is sharded by tensor or expert parallelism, which LoRA on the experts does not support; "
                "use FSDP2 on the decoder layers, or data parallelism"
            )
    if experts._forward_hooks or experts._forward_pre_hooks:
        raise ValueError(
            "hooks are registered on the experts inside of an ExpertLora, whose forward does not run; register them on the "
            "sparse block"
        )


def _compact_factors(
    module: ExpertLora, state_dict: dict[str, Any], prefix: str
) -> Iterator[tuple[str, str, str, ExpertChoice]]:
    """Factors in a state dict that are trained compactly: key, lora_A or lora_B, name of the adapter, and its choice."""
    for adapter_name, choice in module.choices.items():
        for name in ("lora_A", "lora_B"):
            key = f"{prefix}{name}.{adapter_name}.weight"
            if choice.is_compact and key in state_dict:
                yield key, name, adapter_name, choice


def _expand_factors(module: ExpertLora, state_dict: dict[str, Any], prefix: str, _metadata: dict) -> None:
    """State-dict hook: compact factors leave in PEFT's shapes."""
    for key, name, adapter_name, choice in _compact_factors(module, state_dict, prefix):
        weight = state_dict[key].detach()
        if isinstance(weight, DTensor):
            if weight.is_meta:
                raise ValueError(
                    "experts=[...] or shared_a=True under FSDP2 with weights that are loaded after sharding; set "
                    "fsdp_cpu_ram_efficient_loading to false, or train PEFT's own form (experts='all')"
                )
            weight = weight.full_tensor()  # collective, as every state dict that is gathered
        state_dict[key] = choice.expand(name, module.checked(name, adapter_name, weight)).contiguous()


def _contract_factors(module: ExpertLora, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
    """Load-state-dict hook: the way back. Of the hook's other arguments, the last takes messages of errors."""
    error_msgs: list[str] = others[-1]
    for key, name, adapter_name, choice in _compact_factors(module, state_dict, prefix):
        full = state_dict[key]
        target = module.trained(name, adapter_name)
        rows = module.r[adapter_name] * module.num_experts
        shape = (rows, module.in_features) if name == "lora_A" else (module.out_features, rows)
        if full.shape != shape:
            continue  # load_state_dict reports the shape
        if isinstance(full, DTensor):
            full = full.full_tensor()
        try:
            trained = choice.contract(name, full, check=not full.is_meta)
        except ValueError as error:
            error_msgs.append(f"{key}: {error}; load this adapter in PEFT's own form (experts='all', shared_a=False)")
            continue
        if isinstance(target, DTensor):
            trained = distribute_tensor(trained, target.device_mesh, target.placements)
        state_dict[key] = trained
