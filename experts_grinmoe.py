"""The experts of a GRIN-MoE layer: fused weights, the reference loop, and loading of per-expert weights.

Shapes: T tokens, K experts per token, E experts, H hidden size, I expert width.

On disk an expert has three matrices, w1 (gate, (I, H)), w3 (up, (I, H)) and w2 (down, (H, I)); in memory all experts
of a layer share `gate_up_proj` (E, 2I, H), gate first, and `down_proj` (E, H, I). Transformers' experts interface picks
the implementation by `experts_implementation`: `grouped_mm` by default, `eager` is the reference loop below, and
`grinmoe_cpu` a fast path for training on a CPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.activations import ACT2FN
from transformers.integrations import use_experts_implementation
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

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
        _refuse_compilation("eager")
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


def cpu_experts_forward(
    module: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """
    Fast path for training on a CPU: `experts_implementation="grinmoe_cpu"`. Contract of [`GrinMoeExperts.forward`].

    One pass over the experts in each direction, so that what belongs to an expert stays in the cache. Only the input
    and the pre-activations (T * K, 2I) are kept for the backward: activations are computed again, and the routing
    weights' gradient is their inner product with their own gradient.

    Raises:
        ValueError: tensors on another device than the CPU, or an activation other than silu.
    """
    if hidden_states.device.type != "cpu":
        raise ValueError(
            f"experts_implementation='grinmoe_cpu' got tensors on {hidden_states.device}; choose 'grouped_mm' there"
        )
    if module.config.hidden_act not in ("silu", "swish"):
        raise ValueError(
            f"experts_implementation='grinmoe_cpu' is for hidden_act='silu', not {module.config.hidden_act!r}; choose "
            "'grouped_mm'"
        )
    _refuse_compilation("grinmoe_cpu")
    gate_up_proj, down_proj = module.gate_up_proj, module.down_proj
    dtype = hidden_states.dtype
    if torch.is_autocast_enabled("cpu"):
        # Nothing inside of an autograd function is cast by itself.
        autocast = torch.get_autocast_dtype("cpu")
        hidden_states, gate_up_proj, down_proj = (t.to(autocast) for t in (hidden_states, gate_up_proj, down_proj))
    blocks = _Blocks(top_k_index, module.num_experts)
    weights = top_k_weights.to(hidden_states.dtype)
    keep = None
    if module.training and module.dropout > 0:
        keep = module.keep_mask(hidden_states.new_empty((blocks.num_rows, module.down_proj.shape[2])))
    return _CpuExperts.apply(hidden_states, weights, gate_up_proj, down_proj, blocks, keep).to(dtype)


class _Blocks:
    """
    The choices of all tokens, sorted by expert into blocks of rows whose lengths are rounded up.

    oneDNN compiles a product for every shape that it meets, and keeps some hundreds. Rounded to sixteenths of a power of
    two, the lengths that occur in training are few; the rows that fill a block up (3 % on average) have weight zero.

    Attributes:
        tokens: (rows,) the token of every row; of a filling row, any.
        row_of_choice: (T * K,) where a choice is; the row after the last block is for those served elsewhere.
        experts: number and rows (a slice) of each expert that has tokens.
        idle: the experts that have none.
    """

    def __init__(self, top_k_index: torch.Tensor, num_experts: int):
        order, sizes = group_by_expert(top_k_index, num_experts)
        self.experts: list[tuple[int, slice]] = []
        self.idle = [expert for expert, size in enumerate(sizes) if size == 0]
        first_choice = first_row = 0
        rows_in_order = []
        for expert, size in enumerate(sizes):
            if size:
                length = _rounded_up(size)
                self.experts.append((expert, slice(first_row, first_row + length)))
                rows_in_order.append(torch.arange(first_row, first_row + size))
                first_choice, first_row = first_choice + size, first_row + length
        self.num_rows = first_row
        rows_in_order.append(torch.full((order.numel() - first_choice,), self.num_rows))
        self.row_of_choice = torch.empty_like(order)
        self.row_of_choice[order] = torch.cat(rows_in_order)
        choices = torch.zeros(self.num_rows + 1, dtype=torch.int64)
        choices[self.row_of_choice] = torch.arange(order.numel())
        self.tokens = choices[:-1] // top_k_index.shape[1]


def _rounded_up(size: int) -> int:
    step = max(8, 2 ** (size.bit_length() - 5))
    return -(-size // step) * step


class _CpuExperts(torch.autograd.Function):
    """Sum over choices of weight * down(silu(gate) * up * keep); `keep` (rows, I) is dropout, None for none."""

    @staticmethod
    def forward(ctx, hidden_states, weights, gate_up_proj, down_proj, blocks, keep):
        pre_activation = hidden_states.new_empty(blocks.num_rows, gate_up_proj.shape[1])
        outputs = hidden_states.new_empty(blocks.num_rows + 1, hidden_states.shape[1])
        for expert, rows in blocks.experts:
            pre_activation[rows] = _linear(hidden_states[blocks.tokens[rows]], gate_up_proj[expert])
            gate, up = pre_activation[rows].chunk(2, dim=-1)
            activation = nn.functional.silu(gate).mul_(up)
            if keep is not None:
                activation *= keep[rows]
            outputs[rows] = _linear(activation, down_proj[expert])
        outputs[-1] = 0  # served elsewhere (expert parallelism)
        ctx.save_for_backward(hidden_states, weights, gate_up_proj, down_proj, pre_activation)
        ctx.blocks, ctx.keep = blocks, keep
        per_choice = outputs[blocks.row_of_choice].view(*weights.shape, hidden_states.shape[1])  # (T, K, H)
        return torch.bmm(weights.unsqueeze(1), per_choice).squeeze(1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        hidden_states, weights, gate_up_proj, down_proj, pre_activation = ctx.saved_tensors
        blocks = ctx.blocks
        row_weight = weights.new_zeros(blocks.num_rows + 1, 1)
        row_weight[blocks.row_of_choice] = weights.reshape(-1, 1)
        grad_row_weight = torch.zeros_like(row_weight)
        grad_rows = hidden_states.new_empty(blocks.num_rows + 1, hidden_states.shape[1])
        grad_gate_up = torch.empty_like(gate_up_proj) if ctx.needs_input_grad[2] else None
        grad_down = torch.empty_like(down_proj) if ctx.needs_input_grad[3] else None
        for expert, rows in blocks.experts:
            upstream = grad_output[blocks.tokens[rows]]  # (n, H)
            gate, up = pre_activation[rows].chunk(2, dim=-1)
            sigmoid = gate.sigmoid()
            silu = gate * sigmoid
            activation = silu * up
            grad_activation = _linear(upstream, down_proj[expert].t())  # (n, I), not yet weighted
            if ctx.keep is not None:
                activation *= ctx.keep[rows]
            grad_row_weight[rows] = torch.linalg.vecdot(grad_activation, activation).unsqueeze(-1)
            grad_activation *= row_weight[rows]
            if ctx.keep is not None:
                grad_activation *= ctx.keep[rows]
            if grad_down is not None:
                grad_down[expert] = _linear((upstream * row_weight[rows]).t(), activation.t())
            grad_pre = torch.empty_like(pre_activation[rows])
            grad_gate_part, grad_up_part = grad_pre.chunk(2, dim=-1)
            torch.mul(grad_activation, silu, out=grad_up_part)
            # d silu / d gate = sigmoid + silu * (1 - sigmoid)
            torch.mul(grad_activation.mul_(up), sigmoid + silu * (1 - sigmoid), out=grad_gate_part)
            if grad_gate_up is not None:
                grad_gate_up[expert] = _linear(grad_pre.t(), hidden_states[blocks.tokens[rows]].t())
            grad_rows[rows] = _linear(grad_pre, gate_up_proj[expert].t())
        for gradient in (grad_gate_up, grad_down):
            if gradient is not None:
                gradient[blocks.idle] = 0
        grad_rows[-1] = 0
        grad_hidden = grad_rows[blocks.row_of_choice].view(*weights.shape, hidden_states.shape[1]).sum(dim=1)
        return grad_hidden, grad_row_weight[blocks.row_of_choice].view_as(weights), grad_gate_up, grad_down, None, None


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


def _onednn_linear():
    """oneDNN's float32 product: (n, k) and (m, k) to (n, m), any strides; None where torch is built without it.

    The one use of a private torch operator in this project. torch.mm is MKL in float32, which on AMD processors takes
    twice the time of oneDNN, and no public function leads there. The operator is what torch's own compiler calls.
    """
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return None
    return lambda left, right: torch.ops.mkldnn._linear_pointwise(left, right, None, "none", [], "")


_float32_linear = _onednn_linear() or nn.functional.linear


def _linear(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """(n, k) and (m, k) to (n, m) = left @ right.T."""
    return _float32_linear(left, right) if left.dtype == torch.float32 else nn.functional.linear(left, right)


def _refuse_compilation(implementation: str) -> None:
    if torch.compiler.is_compiling():
        raise RuntimeError(
            f"experts_implementation={implementation!r} loops over group sizes on the host and cannot be compiled; use "
            "model.set_experts_implementation('grouped_mm') (or 'batched_mm' for decoding)"
        )


# Assigning again is harmless: this module may be imported under several names.
ALL_EXPERTS_FUNCTIONS.register("grinmoe_cpu", cpu_experts_forward)


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
