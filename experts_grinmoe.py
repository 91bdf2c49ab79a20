"""The experts of a GRIN-MoE layer: fused weights, the reference loop, and loading of per-expert weights.

Shapes: T tokens, K experts per token, E experts, H hidden size, I expert width.

On disk an expert has three matrices, w1 (gate, (I, H)), w3 (up, (I, H)) and w2 (down, (H, I)); in memory all experts
of a layer share `gate_up_proj` (E, 2I, H), gate first, and `down_proj` (E, H, I). Transformers' experts interface picks
the implementation by `experts_implementation`: `grouped_mm` by default, `eager` is the loop below.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.integrations import use_experts_implementation

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
        self.register_load_state_dict_pre_hook(load_per_expert_weights)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """
        Reference loop: sort by expert, one SwiGLU per expert, weight, sum. This is `experts_implementation="eager"`.

        The weights are unbound once instead of indexed per expert: the backward of `W[e]` fills a zero tensor as
        large as all experts for each of them. The loop needs the group sizes on the host, so it does not compile.

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
                "model.set_experts_implementation('grouped_mm') (or 'batched_mm' for decoding)"
            )
        top_k = top_k_index.shape[-1]
        sorted_experts, order = top_k_index.reshape(-1).sort(stable=True)
        group_sizes = torch.bincount(sorted_experts, minlength=self.num_experts + 1).tolist()  # last: served elsewhere
        groups = hidden_states[order // top_k].split(group_sizes)
        outputs = [
            nn.functional.linear(self._apply_gate(nn.functional.linear(group, gate_up)), down)
            for group, gate_up, down in zip(groups, self.gate_up_proj.unbind(0), self.down_proj.unbind(0))
        ]
        outputs.append(torch.zeros_like(groups[-1]))
        weighted = torch.cat(outputs) * top_k_weights.reshape(-1)[order].unsqueeze(-1)  # (T * K, H)
        per_choice = weighted[order.argsort()].view(-1, top_k, self.hidden_dim)
        return per_choice.sum(dim=1).to(hidden_states.dtype)


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
