"""The experts of a GRIN-MoE layer: fused weights, the reference loop, and loading of per-expert weights.

Shapes: T tokens, K experts per token, E experts, H hidden size, I expert width.

On disk an expert has three matrices, w1 (gate, (I, H)), w3 (up, (I, H)) and w2 (down, (H, I)); in memory all experts
of a layer share `gate_up_proj` (E, 2I, H), gate first, and `down_proj` (E, H, I). Transformers' experts interface picks
the implementation by `experts_implementation`: `eager` is the reference loop below; dispatch_grinmoe.py has the default.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.integrations import use_experts_implementation

from .routing_grinmoe import mix_seed, routing_generator, this_rank

# They do not call `_apply_gate`.
_WITHOUT_DROPOUT = ("sonicmoe", "deepgemm_megamoe")

# On-disk name -> (fused parameter, position of its rows in there).
ON_DISK = {"w1": ("gate_up_proj", 0), "w3": ("gate_up_proj", 1), "w2": ("down_proj", 0)}


@use_experts_implementation
class GrinMoeExperts(nn.Module):
    """E SwiGLU experts. Every token is served by all of its K experts: nothing is dropped."""

    def __init__(self, config):
        super().__init__()
        self.num_experts = config.num_local_experts
        self.hidden_dim = config.hidden_size
        self.intermediate_dim = config.intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * self.intermediate_dim, self.hidden_dim))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, self.hidden_dim, self.intermediate_dim))
        self.act_fn = ACT2FN[config.hidden_act]
        self.dropout = config.expert_dropout
        self.dropout_generator: torch.Generator | None = None
        self.register_load_state_dict_pre_hook(load_per_expert_weights)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """
        Reference loop: sort by expert, one SwiGLU per expert, weight, sum. This is `experts_implementation="eager"`.

        The loop needs the group sizes on the host, so it does not compile.

        Args:
            hidden_states: (T, H).
            top_k_index: (T, K) expert of each choice. Under expert parallelism, E marks one that lives elsewhere.
            top_k_weights: (T, K) weight of each choice.

        Returns:
            (T, H), in the dtype of `hidden_states`.
        """
        if torch.compiler.is_compiling():
            raise RuntimeError(
                "experts_implementation='eager' loops over group sizes on the host and cannot be compiled; use "
                "model.set_experts_implementation('grinmoe')"
            )
        return self.loop(hidden_states, top_k_index, top_k_weights)

    def loop(self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        """The reference loop itself, which `experts_implementation` does not exchange. Contract of `forward`."""
        top_k = top_k_index.shape[-1]
        order, group_sizes = group_by_expert(top_k_index, self.num_experts)
        served_elsewhere = order.numel() - sum(group_sizes)
        *groups, elsewhere = hidden_states[order // top_k].split([*group_sizes, served_elsewhere])
        outputs = [
            down(self._apply_gate(gate_up(group)))
            for group, gate_up, down in zip(groups, self.linears("gate_up_proj"), self.linears("down_proj"))
        ]
        outputs.append(torch.zeros_like(elsewhere))
        weighted = torch.cat(outputs) * top_k_weights.reshape(-1)[order].unsqueeze(-1)  # (T * K, H)
        per_choice = weighted[order.argsort()].view(-1, top_k, self.hidden_dim)
        return per_choice.sum(dim=1).to(hidden_states.dtype)

    def linears(self, name: str) -> list[Callable[[torch.Tensor], torch.Tensor]]:
        """For each expert, the product with its part of a fused weight: (n, in) to (n, out).

        The loops read the weights here and nowhere else, so that they may be kept in another form. They are unbound once
        instead of indexed per expert: the backward of `W[e]` fills a zero tensor as large as all experts for each of them.

        Args:
            name: "gate_up_proj" (H to 2I) or "down_proj" (I to H).
        """
        return [functools.partial(nn.functional.linear, weight=weight) for weight in getattr(self, name).unbind(0)]

    def seed_dropout(self, routing_seed: int, layer_idx: int, device: torch.device) -> None:
        """Draw the next forward's dropout from a generator of its own, not from torch's default one.

        Under expert parallelism every rank drops other activations and another number of them; from the default
        generator, what the ranks draw after that would differ too.

        Raises:
            ValueError: the experts implementation has no place for dropout.
        """
        if self.dropout == 0:
            return
        implementation = self.config._experts_implementation
        if implementation in _WITHOUT_DROPOUT:
            raise ValueError(
                f"expert_dropout={self.dropout} with experts_implementation={implementation!r}, which computes the "
                "activation inside of its kernel and would drop nothing; choose 'grouped_mm', or expert_dropout=0"
            )
        self.dropout_generator = routing_generator(mix_seed(routing_seed, 1 + this_rank()), layer_idx, device)

    def keep_mask(self, activation: torch.Tensor) -> torch.Tensor:
        """What dropout multiplies activations of this shape with: 0, or 1 / (1 - p)."""
        keep = torch.empty_like(activation).bernoulli_(1 - self.dropout, generator=self.dropout_generator)
        return keep.div_(1 - self.dropout)

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        """(n, 2I) to (n, I): SwiGLU, and dropout. The library's experts functions call it by this name."""
        gate, up = gate_up.chunk(2, dim=-1)
        activation = self.act_fn(gate) * up
        return activation * self.keep_mask(activation) if self.training and self.dropout > 0 else activation


def group_by_expert(top_k_index: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, list[int]]:
    """
    Sort the choices of all tokens by expert.

    Args:
        top_k_index: (T, K). Under expert parallelism, `num_experts` marks an expert that lives elsewhere.
        num_experts: E.

    Returns:
        order (T * K,): positions in the flattened `top_k_index`, those of expert 0 first, those served elsewhere last;
        and how many there are of each of the E experts, on the host.
    """
    sorted_experts, order = top_k_index.reshape(-1).sort(stable=True)
    return order, torch.bincount(sorted_experts, minlength=num_experts)[:num_experts].tolist()


def load_per_expert_weights(
    module: nn.Module,
    state_dict: dict[str, torch.Tensor],
    prefix: str,
    local_metadata: dict,
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """`load_state_dict` pre-hook: take per-expert (w1, w3, w2) keys, also when they are spread over several calls.

    The Trainer resumes and reloads its best model by plain `load_state_dict(strict=False)`, shard by shard, on the keys
    that `save_pretrained` wrote. Without this the trained experts would be dropped there without an error.
    """
    matrices_per_expert = {"gate_up_proj": 2, "down_proj": 1}
    rows_per_matrix = {"gate_up_proj": module.intermediate_dim, "down_proj": module.hidden_dim}
    fused: dict[str, torch.Tensor] = {}
    loaded = dict.fromkeys(matrices_per_expert, 0)
    for expert in range(module.num_experts):
        for on_disk, (name, position) in ON_DISK.items():
            key = f"{prefix}{expert}.{on_disk}.weight"
            if key not in state_dict:
                continue
            weight = state_dict.pop(key)
            if name not in fused:
                parameter = getattr(module, name).detach()
                # A meta parameter has no memory to fill; load_state_dict(assign=True) puts this tensor in its place.
                fused[name] = torch.zeros_like(parameter, device=weight.device) if parameter.is_meta else parameter
            rows = rows_per_matrix[name]
            target = fused[name][expert, position * rows : (position + 1) * rows]
            if not target.is_floating_point():
                error_msgs.append(
                    f"{key} is full precision, and these experts are quantised; load it by from_pretrained(..., "
                    "quantization_config=...)"
                )
                continue
            if weight.shape != target.shape:
                error_msgs.append(
                    f"size mismatch for {key}: the checkpoint has {tuple(weight.shape)}, the model {tuple(target.shape)}"
                )
                continue
            target.copy_(weight)
            loaded[name] += 1
    for name, tensor in fused.items():
        expected = module.num_experts * matrices_per_expert[name]
        if loaded[name] == expected:
            state_dict[prefix + name] = tensor
        elif getattr(module, name).is_meta:
            error_msgs.append(
                f"{prefix}{name}: {loaded[name]} of {expected} expert matrices cannot fill a parameter on the meta device; "
                "give all of them at once, or materialise the model first (model.to_empty)"
            )
        # Otherwise they are in place, and load_state_dict(strict=True) reports the parameter as missing.


__all__ = ["GrinMoeExperts"]
