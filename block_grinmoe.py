"""The sparse block of a layer: the router, and the experts that it sends tokens to.

Shapes: B batch, S sequence, T = B * S tokens, H hidden size, E experts, K experts per token.
"""

import torch
from torch import nn
from transformers.utils import is_triton_available

from .configuration_grinmoe import GrinMoeConfig
from .dispatch_grinmoe import uses_triton
from .estimators_grinmoe import RoutingNoise, scale_gradient
from .experts_grinmoe import GrinMoeExperts
from .routing_grinmoe import check_router_logits, route, routing_generator, within_capacity

if is_triton_available():
    from .triton_router_grinmoe import FUSED_ESTIMATORS, fused_input_jitter, fused_route


class GrinMoeRouter(nn.Module):
    """The gate: (T, H) to router logits, routing weights and selected experts.

    Not an nn.Linear: tools that adapt or quantise every linear layer expect one tensor from it.
    """

    def __init__(self, config: GrinMoeConfig, layer_idx: int | None = None):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.num_experts = config.num_local_experts  # read by the library's expert parallelism
        self.top_k = config.num_experts_per_tok
        self.jitter_eps = config.router_jitter_noise
        self.estimator = config.router_estimator
        self.capacity_factor = config.router_capacity_factor
        self.weight = nn.Parameter(torch.empty(self.num_experts, config.hidden_size))

    def forward(
        self,
        hidden_states: torch.Tensor,
        noise: RoutingNoise | None = None,
        generator: torch.Generator | None = None,
        routing_seed: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """
        Draws in training are `noise`, or come from `generator`, or from torch's default one. Where the Triton kernels were
        asked for (`experts_implementation="grinmoe_triton"`) and the estimator has one, they follow from `routing_seed`
        by counting (counter_draws_grinmoe.py).

        Returns:
            router_logits (T, E); routing_weights (T, K), 0 for a choice beyond an expert's capacity; selected_experts
            (T, K), what was chosen, dropped or not; the scale of the experts' own gradient (T, K), or None; and the
            selected experts once more, to be recorded.
        """
        router_logits = nn.functional.linear(hidden_states, self.weight)  # (T, E)
        options = (router_logits, self.top_k, self.jitter_eps, self.training)
        if uses_triton(self.config, hidden_states.device) and self.estimator in FUSED_ESTIMATORS:
            check_router_logits(router_logits, self.top_k, self.layer_idx)
            routing = fused_route(*options, self.estimator, noise, routing_seed, self.layer_idx or 0)
            routing_weights, selected_experts, expert_gradient_scale = routing[:3]
        else:
            routing_weights, selected_experts, expert_gradient_scale = route(
                *options, noise, self.estimator, generator=generator, layer=self.layer_idx
            )
        if self.training and self.capacity_factor is not None:
            fits = within_capacity(selected_experts, self.num_experts, self.capacity_factor)
            routing_weights = routing_weights.masked_fill(~fits, 0.0)
        # Expert parallelism of Transformers before 5.24 rewrites the third output to experts of this rank, and leaves
        # what follows alone.
        return router_logits, routing_weights, selected_experts, expert_gradient_scale, selected_experts


class GrinMoeSparseMoeBlock(nn.Module):
    """Route every token to K experts and sum their weighted outputs.

    No token is dropped, unless the config sets `router_capacity_factor` to compare with recipes that do.
    """

    def __init__(self, config: GrinMoeConfig, layer_idx: int | None = None):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.input_jitter_noise = config.input_jitter_noise
        self.expert_dropout = config.expert_dropout
        self.gate = GrinMoeRouter(config, layer_idx)
        self.experts = GrinMoeExperts(config)

    def forward(
        self, hidden_states: torch.Tensor, noise: RoutingNoise | None = None, routing_seed: int | None = None
    ) -> torch.Tensor:
        """(B, S, H) to (B, S, H).

        In training `noise` replays recorded draws; else they come from this layer's stream of `routing_seed`, or from
        torch's default generator where there is none.
        """
        shape = hidden_states.shape
        hidden_states = hidden_states.reshape(-1, shape[-1])  # (T, H)
        generator = None
        if self.training:
            if routing_seed is not None:
                generator = routing_generator(routing_seed, self.layer_idx, hidden_states.device)
                if self.expert_dropout > 0:  # PEFT's wrappers of the experts know no seed_dropout
                    self.experts.seed_dropout(routing_seed, self.layer_idx, hidden_states.device)
            hidden_states = self._jittered(hidden_states, noise, generator, routing_seed)
        _, routing_weights, selected_experts, expert_gradient_scale, _ = self.gate(
            hidden_states, noise, generator, routing_seed
        )
        if expert_gradient_scale is None:
            output = self.experts(hidden_states, selected_experts, routing_weights)
        else:
            output = self._scaled_gradient_output(
                hidden_states, selected_experts, routing_weights, expert_gradient_scale
            )
        return output.reshape(shape)

    def _jittered(
        self,
        hidden_states: torch.Tensor,
        noise: RoutingNoise | None,
        generator: torch.Generator | None,
        routing_seed: int | None,
    ) -> torch.Tensor:
        # Once, seen by the router and the experts but not by the residual stream, and never in place.
        if noise is not None and noise.input_jitter is not None:
            return hidden_states * noise.input_jitter.reshape(hidden_states.shape).to(hidden_states.dtype)
        if self.input_jitter_noise == 0:
            return hidden_states
        if uses_triton(self.config, hidden_states.device):
            return fused_input_jitter(hidden_states, self.input_jitter_noise, routing_seed, self.layer_idx or 0)
        low, high = 1.0 - self.input_jitter_noise, 1.0 + self.input_jitter_noise
        return hidden_states * torch.empty_like(hidden_states).uniform_(low, high, generator=generator)

    def _scaled_gradient_output(
        self,
        hidden_states: torch.Tensor,
        selected_experts: torch.Tensor,
        routing_weights: torch.Tensor,
        expert_gradient_scale: torch.Tensor,
    ) -> torch.Tensor:
        """The experts' output, where only their own gradient is scaled, choice by choice.

        Each choice becomes a token of its own, so that any experts implementation serves. What the weights get is
        scaled back.
        """
        top_k = selected_experts.shape[1]
        routing_weights = scale_gradient(routing_weights, 1 / expert_gradient_scale)
        per_choice = self.experts(
            hidden_states.repeat_interleave(top_k, dim=0),
            selected_experts.reshape(-1, 1),
            routing_weights.reshape(-1, 1),
        )  # (T * K, H)
        per_choice = scale_gradient(per_choice, expert_gradient_scale.reshape(-1, 1))
        return per_choice.view(-1, top_k, hidden_states.shape[1]).sum(dim=1)


__all__ = ["GrinMoeRouter", "GrinMoeSparseMoeBlock"]
