"""Autograd functions made of a fast forward and a fast backward, for `torch.func` and higher derivatives as well.

Each also exists as an operator of torch.library, which torch.compile and fake tensors take as it is, but not `torch.func`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Tensors = tuple[torch.Tensor, ...]


def autograd_function(
    forward: Callable[..., Tensors],
    backward: Callable[..., Tensors],
    reference: Callable[..., torch.Tensor],
    trainable: int,
) -> Callable[..., Tensors]:
    """
    A function of tensors that is differentiable in its first `trainable` arguments.

    The first derivative is `backward`, also under `torch.func.grad` and `vmap` (sample by sample); further ones are those of
    `reference`. In forward mode call `reference` itself (`quantization_grinmoe.in_forward_mode` tells).

    Args:
        forward: (*inputs) to the output and what the backward keeps. Inputs may be None.
        backward: (grad_output, inputs, kept, needed) to a gradient for each of the first inputs; an empty tensor where
            `needed` says that none is wanted.
        reference: (*inputs) to the same output, by differentiable operations.
        trainable: number of inputs with a gradient, which come first.
    """

    def gradients(grad_output: torch.Tensor, *inputs: torch.Tensor | None) -> Tensors:
        _, pullback = torch.func.vjp(lambda *first: reference(*first, *inputs[trainable:]), *inputs[:trainable])
        return pullback(grad_output)

    class Gradient(torch.autograd.Function):
        @staticmethod
        def forward(needed, num_inputs, grad_output, *tensors):
            return backward(grad_output, tensors[:num_inputs], tensors[num_inputs:], needed)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.needed, num_inputs, *tensors = inputs
            ctx.num_kept = len(tensors) - num_inputs - 1
            ctx.save_for_backward(*tensors[: num_inputs + 1])

        @staticmethod
        def backward(ctx, *upstream):
            grad_output, *inputs = ctx.saved_tensors
            first, rest = (grad_output, *inputs[:trainable]), inputs[trainable:]
            _, pullback = torch.func.vjp(lambda *tensors: gradients(*tensors, *rest), *first)
            upstream = [g if need else torch.zeros_like(x) for g, x, need in zip(upstream, inputs, ctx.needed)]
            return None, None, *pullback(tuple(upstream)), *(None,) * (len(rest) + ctx.num_kept)

        @staticmethod
        def vmap(info, in_dims, *arguments):
            return _sample_by_sample(Gradient.apply, info.batch_size, in_dims, arguments)

    def keep(ctx, inputs, output):
        ctx.num_inputs = len(inputs)
        ctx.save_for_backward(*inputs, *output[1:])
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    def pull_back(ctx, grad_output, *_):
        if grad_output is None:
            return (None,) * ctx.num_inputs
        needed, tensors = tuple(ctx.needs_input_grad[:trainable]), ctx.saved_tensors
        if torch.is_grad_enabled() or is_transformed():
            found = Gradient.apply(needed, ctx.num_inputs, grad_output, *tensors)
        else:  # nobody differentiates further
            found = backward(grad_output, tensors[: ctx.num_inputs], tensors[ctx.num_inputs :], needed)
        wanted = (gradient if need else None for gradient, need in zip(found, needed))
        return *wanted, *(None,) * (ctx.num_inputs - trainable)

    class Transformed(torch.autograd.Function):
        """As `torch.func` asks for it."""

        @staticmethod
        def forward(*inputs):
            return forward(*inputs)

        @staticmethod
        def setup_context(ctx, inputs, output):
            keep(ctx, inputs, output)

        @staticmethod
        def backward(ctx, *upstream):
            return pull_back(ctx, *upstream)

        @staticmethod
        def vmap(info, in_dims, *inputs):
            return _sample_by_sample(Transformed.apply, info.batch_size, in_dims, inputs)

    eager = eager_function(forward, keep, pull_back)
    return lambda *inputs: (Transformed.apply if is_transformed() else eager)(*inputs)


def eager_function(
    forward: Callable[..., Tensors], setup_context: Callable[..., None], backward: Callable[..., Any]
) -> Callable[..., Tensors]:
    """
    A differentiable function of what an operator of torch.library is registered with, for eager mode.

    A call of such an operator takes the host longer, and so does an autograd function with a `setup_context` of its own,
    whose arguments torch binds by name. Not for `torch.func`.
    """

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            output = forward(*inputs)
            setup_context(ctx, inputs, output)
            return output

    Eager.backward = staticmethod(backward)
    return Eager.apply


def takes_operator(tensor: torch.Tensor) -> bool:
    """Whether the operator serves for this input: compiled code, tensors without values (fake, meta) or of a subclass."""
    return torch.compiler.is_compiling() or type(tensor) is not torch.Tensor or tensor.is_meta


def gradient_takes_operator(gradient: torch.Tensor) -> bool:
    """Whether the operator of a backward serves for this gradient: also for a batch of several (`is_grads_batched`)."""
    if takes_operator(gradient):
        return True
    try:
        gradient.data_ptr()
    except RuntimeError:  # a batch has no memory of its own, and an operator is called for one after the other
        return True
    return False


def is_transformed() -> bool:
    """Whether `torch.func` follows what is computed. Autograd functions ask the same private question."""
    return torch._C._are_functorch_transforms_active()


def _sample_by_sample(function: Callable, batch_size: int, in_dims: tuple, arguments: tuple) -> tuple[Tensors, Any]:
    """What `vmap` asks for: the outputs of all samples, stacked, and their batch dimension."""
    outputs = [
        function(*(x.select(dim, sample) if isinstance(dim, int) else x for x, dim in zip(arguments, in_dims)))
        for sample in range(batch_size)
    ]
    return tuple(map(torch.stack, zip(*outputs, strict=True))), 0
