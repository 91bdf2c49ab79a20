"""The router in one Triton launch each way, logits to choices and weights; and the input jitter.

For the backward the logits and the choices are kept, and probabilities computed again. The kernels are in
router_kernels.py.

Shapes: T tokens, E experts, K experts per token, H hidden size.

Imported only where Triton is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import triton

from ..quantization_grinmoe import in_forward_mode
from ..routing_grinmoe import (
    ESTIMATORS,
    ROUTERS,
    FusedRouter,
    Routing,
    RoutingNoise,
    check_arguments,
    credit_to_go,
    joint_credit,
    own_credit,
    route,
)
from .autograd import eager_function, gradient_takes_operator, is_transformed, takes_operator
from .launching import DTYPES, MAX_EXPERTS, interpreted, launch_kernel
from .philox import STRIPE, STRIPES, counter_jitter, counter_noise
from .router_kernels import jitter_kernel, router_backward_kernel, router_kernel
from .triton_experts import check_triton

# Logits of a program, which are in registers, and tokens at most.
_MOST_LOGITS, _MOST_TOKENS = 1024, 64
# The kernel's number for each way to share out a draw's contribution to the loss.
_CREDITS = {own_credit: 0, credit_to_go: 1, joint_credit: 2}


def _tile(num_experts: int) -> tuple[int, int]:
    """Tokens and columns of a program."""
    columns = max(2, triton.next_power_of_2(num_experts))
    return min(_MOST_TOKENS, _MOST_LOGITS // columns), columns


@functools.lru_cache
def _in_dtype(number: float, dtype: torch.dtype) -> float:
    """What torch makes of a number beside a tensor of that dtype."""
    return torch.tensor(number, dtype=dtype).item()


def router_forward(
    router_logits: torch.Tensor,
    exponential: torch.Tensor | None,
    uniform: torch.Tensor | None,
    seed_on_device: torch.Tensor | None,
    seed: int,
    stream: int,
    top_k: int,
    threshold: float,
    estimator: str,
    samples: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights (T, K), experts (T, K), and the scale of the experts' gradient (T, K) or an empty tensor."""
    spec, (num_tokens, num_experts) = ESTIMATORS[estimator], router_logits.shape
    weights, experts, expert_scale = _router_outputs(router_logits, top_k, estimator, samples)
    tokens, columns = _tile(num_experts)
    if num_tokens:
        launch_kernel(
            router_kernel,
            (triton.cdiv(num_tokens, tokens),),
            router_logits,
            exponential,
            uniform,
            seed if seed_on_device is None else seed_on_device,
            weights,
            experts,
            expert_scale,
            stream,
            num_tokens,
            _in_dtype(threshold, router_logits.dtype),
            _in_dtype(spec.third, router_logits.dtype),
            1.0 - spec.full_probability,
            spec.expert_gradient or 1.0,
            NUM_EXPERTS=num_experts,
            COLUMNS=columns,
            TOP_K=top_k,
            SAMPLES=samples,
            GIVEN=exponential is not None,
            ON_DEVICE=seed_on_device is not None,
            SCALES=samples and spec.full_probability != 1,
            SCALES_EXPERTS=expert_scale.numel() > 0,
            SHARED=spec.shared_scale,
            HALVES=spec.halves_logits,
            TOKENS=tokens,
            enable_fp_fusion=False,
        )
    return weights, experts, expert_scale


def _router_outputs(router_logits, top_k: int, estimator: str, samples: bool) -> tuple[torch.Tensor, ...]:
    weights = router_logits.new_empty(len(router_logits), top_k)
    scales_experts = samples and ESTIMATORS[estimator].expert_gradient is not None
    expert_scale = router_logits.new_empty(weights.shape if scales_experts else 0)
    return weights, torch.empty_like(weights, dtype=torch.int64), expert_scale


# Operators are global, also to remote code of a former version: another schema gets another name.
_router = torch.library.custom_op("grinmoe::route", router_forward, mutates_args=())


@_router.register_fake
def _(router_logits, exponential, uniform, seed_on_device, seed, stream, top_k, threshold, estimator, samples):
    return _router_outputs(router_logits, top_k, estimator, samples)


def router_backward(
    router_logits: torch.Tensor,
    experts: torch.Tensor,
    grad_weights: torch.Tensor,
    threshold: float,
    estimator: str,
    samples: bool,
) -> torch.Tensor:
    """dL/dlogits (T, E) of dL/dweights (T, K)."""
    spec, (num_tokens, num_experts) = ESTIMATORS[estimator], router_logits.shape
    grad_logits = torch.empty_like(router_logits)
    tokens, columns = _tile(num_experts)
    if num_tokens:
        launch_kernel(
            router_backward_kernel,
            (triton.cdiv(num_tokens, tokens),),
            router_logits,
            experts,
            grad_weights.contiguous(),
            grad_logits,
            num_tokens,
            _in_dtype(threshold, router_logits.dtype),
            NUM_EXPERTS=num_experts,
            COLUMNS=columns,
            TOP_K=experts.shape[1],
            CREDIT=_CREDITS[spec.credit] if samples else _CREDITS[own_credit],
            HALVES=spec.halves_logits,
            # In training the halving is undone for the router (Algorithm 2).
            HALF_GRADIENT=spec.halves_logits and not samples,
            TOKENS=tokens,
            enable_fp_fusion=False,
        )
    return grad_logits


_router_backward = torch.library.custom_op("grinmoe::route_backward", router_backward, mutates_args=())


@_router_backward.register_fake
def _(router_logits, experts, grad_weights, threshold, estimator, samples):
    return torch.empty_like(router_logits)


def _keep_for_backward(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[0], output[1])
    ctx.options = inputs[-3:]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _router_gradient(ctx, grad_weights, _experts, _scale):
    gradient = None
    if grad_weights is not None:
        # The operator also tells who wants a second derivative that there is none.
        by_operator = torch.is_grad_enabled() or gradient_takes_operator(grad_weights)
        function: Callable = _router_backward if by_operator else router_backward
        gradient = function(*ctx.saved_tensors, grad_weights, *ctx.options)
    return gradient, *(None,) * 9


_router.register_autograd(_router_gradient, setup_context=_keep_for_backward)
_eager_router = eager_function(router_forward, _keep_for_backward, _router_gradient)


def fused_route(
    router_logits: torch.Tensor,
    top_k: int,
    jitter_eps: float,
    training: bool,
    estimator: str = "sparsemixer_v2",
    noise: RoutingNoise | None = None,
    seed: int | torch.Tensor | None = None,
    stream: int = 0,
) -> Routing:
    """
    `routing_grinmoe.route` in one launch, and one for its backward; with the same draws it decides the same.

    Under `torch.func` the reference computes, from the same draws.

    Args:
        router_logits: (T, E), float32, bfloat16 or float16.
        top_k, jitter_eps, training: as in `routing_grinmoe.sparsemixer`.
        estimator: one whose `EstimatorSpec` says `kernel`.
        noise: the draws to use in training, or None for those of `philox.counter_noise`.
        seed, stream: of these. `seed` is an int, or an int64 tensor of one element on the device, which compiled code needs;
            None draws one there from torch's generator.

    Raises:
        ValueError: an estimator that is not fused, more than 128 experts, a dtype, shape or number that the kernel does not
            take, or a device that it does not run on.
    """
    _check_arguments(router_logits, top_k, jitter_eps, noise if training else None, estimator)
    check_triton(router_logits.device)
    exponential = uniform = on_device = None
    number = 0
    if training and noise is not None:
        exponential, uniform = noise.exponential.float().contiguous(), noise.uniform.float().contiguous()
    elif training:
        number, on_device = _split_seed(seed, router_logits.device)
    if is_transformed() or in_forward_mode():
        if training and noise is None:
            seed = number if on_device is None else on_device
            num_tokens, num_experts = router_logits.shape
            noise = counter_noise(seed, stream, num_tokens, num_experts, top_k, router_logits.device)
        return route(router_logits, top_k, jitter_eps, training, noise, estimator)
    options = (stream, top_k, 2.0 * jitter_eps, estimator, training)
    if takes_operator(router_logits):
        function = _router
    elif torch.is_grad_enabled() and router_logits.requires_grad:
        function = _eager_router
    else:
        function = router_forward
    weights, experts, expert_scale = function(
        router_logits.contiguous(), exponential, uniform, on_device, number, *options
    )
    scales_experts = training and ESTIMATORS[estimator].expert_gradient is not None
    return Routing(weights, experts, expert_scale if scales_experts else None)


def _check_arguments(router_logits, top_k: int, jitter_eps: float, noise: RoutingNoise | None, estimator: str) -> None:
    if estimator not in ESTIMATORS or not ESTIMATORS[estimator].kernel:
        kernels = [name for name, spec in ESTIMATORS.items() if spec.kernel]
        raise ValueError(f"estimator={estimator!r} has no kernel; choose one of {', '.join(kernels)}")
    # The kernel would read beyond noise of another shape.
    check_arguments(router_logits, top_k, jitter_eps, noise, estimator)
    if router_logits.dtype not in DTYPES or router_logits.shape[1] > MAX_EXPERTS:
        raise ValueError(
            f"router_logits has shape {tuple(router_logits.shape)} and dtype {router_logits.dtype}; give (tokens, experts) "
            f"with at most {MAX_EXPERTS} experts, in float32, bfloat16 or float16"
        )


def _split_seed(seed: int | torch.Tensor | None, device: torch.device) -> tuple[int, torch.Tensor | None]:
    """The seed as a number of 64 bits with a sign, or as a tensor that a kernel reads."""
    if seed is None:
        return 0, torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=device)
    if isinstance(seed, int):
        return (seed + 2**63) % 2**64 - 2**63, None
    if seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != device:
        raise ValueError(
            f"seed is a tensor of {seed.numel()} {seed.dtype} on {seed.device}; give one int64 on {device}"
        )
    return 0, seed


def jitter(
    hidden_states: torch.Tensor, seed_on_device: torch.Tensor | None, seed: int, stream: int, jitter_eps: float
) -> torch.Tensor:
    """(T, H) times the factors of the counter: forward and backward."""
    hidden_states = hidden_states.contiguous()
    output = torch.empty_like(hidden_states)
    num_tokens, hidden = hidden_states.shape
    if output.numel():
        tokens = 64 if interpreted() else 8
        launch_kernel(
            jitter_kernel,
            (triton.cdiv(num_tokens, tokens), triton.cdiv(hidden, STRIPE * STRIPES)),
            hidden_states,
            output,
            seed if seed_on_device is None else seed_on_device,
            stream,
            num_tokens,
            hidden,
            jitter_eps,
            ON_DEVICE=seed_on_device is not None,
            TOKENS=tokens,
            STRIPE=STRIPE,
            STRIPES=STRIPES,
            enable_fp_fusion=False,
        )
    return output


_jitter = torch.library.custom_op("grinmoe::input_jitter", jitter, mutates_args=())


@_jitter.register_fake
def _(hidden_states, seed_on_device, seed, stream, jitter_eps):
    return torch.empty_like(hidden_states, memory_format=torch.contiguous_format)


def _keep_seed(ctx, inputs, output) -> None:
    _, seed_on_device, *ctx.draw = inputs
    ctx.save_for_backward(seed_on_device)


def _jitter_gradient(ctx, gradient):
    # The product with the same factors. The operator is differentiable in turn.
    by_operator = torch.is_grad_enabled() or gradient_takes_operator(gradient)
    function = _jitter if by_operator else jitter
    return function(gradient, *ctx.saved_tensors, *ctx.draw), None, None, None, None


_jitter.register_autograd(_jitter_gradient, setup_context=_keep_seed)
_eager_jitter = eager_function(jitter, _keep_seed, _jitter_gradient)


def fused_input_jitter(
    hidden_states: torch.Tensor, jitter_eps: float, seed: int | torch.Tensor | None = None, stream: int = 0
) -> torch.Tensor:
    """
    The MoE block's input (T, H) times U(1 - eps, 1 + eps), the factors of `philox.counter_jitter`.

    They are drawn again in the backward, so that nothing of the input's size is kept. `seed` and `stream` as in
    `fused_route`, whose draws have other counters.

    Raises:
        ValueError: a shape, dtype or seed that the kernel does not take, or a device that it does not run on.
    """
    if hidden_states.dim() != 2 or hidden_states.dtype not in DTYPES:
        raise ValueError(
            f"hidden_states has shape {tuple(hidden_states.shape)} and dtype {hidden_states.dtype}; give (tokens, hidden "
            "size) in float32, bfloat16 or float16"
        )
    check_triton(hidden_states.device)
    number, on_device = _split_seed(seed, hidden_states.device)
    if is_transformed() or in_forward_mode():
        seed = number if on_device is None else on_device
        sizes = (*hidden_states.shape, jitter_eps, hidden_states.dtype, hidden_states.device)
        return hidden_states * counter_jitter(seed, stream, *sizes)
    if takes_operator(hidden_states):
        function = _jitter
    elif torch.is_grad_enabled() and hidden_states.requires_grad:
        function = _eager_jitter
    else:
        function = jitter
    return function(hidden_states, on_device, number, stream, float(jitter_eps))


ROUTERS["grinmoe_triton"] = FusedRouter(fused_route, fused_input_jitter)
