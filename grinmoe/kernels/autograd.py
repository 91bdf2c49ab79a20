"""Autograd functions made of a fast forward and a fast backward, for `torch.func` and higher derivatives as well.

Each also exists as an operator of torch.library, which torch.compile and fake tensors take as it is, but not `torch.func`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

Tensors = tuple[torch.Tensor, ...]


def autograd_function(
    forward: Callable[..., Tensors],
    backward: Callable[..., Tensors],
    reference: Callable[..., torch.Tensor],
    trainable: int,
) -> Callable[..., Tensors]:
    """
    A function of tensors that is differentiable in its first `trainable` arguments.

    The first derivative is `backward`, also under `torch.func.grad` and `vmap` (sample by sample); forward-mode and second
    derivatives are those of `reference`.

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

    def pushed(function: Callable, arguments: tuple, tangents: tuple) -> Any:
        """The forward-mode derivative of `function` in those arguments that have a tangent.

        Backward, twice: forward mode does not nest in all ways.
        """
        moving = [position for position, tangent in enumerate(tangents) if tangent is not None]

        def of_moving(*values: torch.Tensor) -> Any:
            given = dict(zip(moving, values, strict=True))
            return function(*(given.get(position, argument) for position, argument in enumerate(arguments)))

        output, pullback = torch.func.vjp(of_moving, *(arguments[position] for position in moving))
        zeros = torch.zeros_like(output) if isinstance(output, torch.Tensor) else tuple(map(torch.zeros_like, output))
        _, pushforward = torch.func.vjp(pullback, zeros)
        return pushforward(tuple(tangents[position] for position in moving))[0]

    class Gradient(torch.autograd.Function):
        @staticmethod
        def forward(needed, num_inputs, grad_output, *tensors):
            return backward(grad_output, tensors[:num_inputs], tensors[num_inputs:], needed)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.needed, num_inputs, *tensors = inputs
            ctx.num_kept = len(tensors) - num_inputs - 1
            ctx.save_for_backward(*tensors[: num_inputs + 1])
            ctx.save_for_forward(*tensors[: num_inputs + 1])

        @staticmethod
        def backward(ctx, *upstream):
            grad_output, *inputs = ctx.saved_tensors
            first, rest = (grad_output, *inputs[:trainable]), inputs[trainable:]
            _, pullback = torch.func.vjp(lambda *tensors: gradients(*tensors, *rest), *first)
            upstream = [g if need else torch.zeros_like(x) for g, x, need in zip(upstream, inputs, ctx.needed)]
            return None, None, *pullback(tuple(upstream)), *(None,) * (len(rest) + ctx.num_kept)

        @staticmethod
        def jvp(ctx, _needed, _num_inputs, *tangents):
            saved = ctx.saved_tensors
            moved = pushed(gradients, saved, tangents[: len(saved)])
            return tuple(t if need else t.new_empty(0) for t, need in zip(moved, ctx.needed))

        @staticmethod
        def vmap(info, in_dims, *arguments):
            return _sample_by_sample(Gradient.apply, info.batch_size, in_dims, arguments)

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(*inputs):
            return forward(*inputs)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.num_inputs, ctx.num_kept = len(inputs), len(output) - 1
            ctx.save_for_backward(*inputs, *output[1:])
            ctx.save_for_forward(*inputs)
            ctx.mark_non_differentiable(*output[1:])
            ctx.set_materialize_grads(False)

        @staticmethod
        def backward(ctx, grad_output, *_):
            if grad_output is None:
                return (None,) * ctx.num_inputs
            needed = tuple(ctx.needs_input_grad[:trainable])
            found = Gradient.apply(needed, ctx.num_inputs, grad_output, *ctx.saved_tensors)
            wanted = (gradient if need else None for gradient, need in zip(found, needed))
            return *wanted, *(None,) * (ctx.num_inputs - trainable)

        @staticmethod
        def jvp(ctx, *tangents):
            return pushed(reference, ctx.saved_tensors, tangents), *(None,) * ctx.num_kept

        @staticmethod
        def vmap(info, in_dims, *inputs):
            return _sample_by_sample(Function.apply, info.batch_size, in_dims, inputs)

    return Function.apply


def takes_operator(tensor: torch.Tensor) -> bool:
    """Whether the operator serves for this input: compiled code, and subclasses of tensors (fake ones have no values)."""
    return torch.compiler.is_compiling() or type(tensor) is not torch.Tensor


def is_transformed(*tensors: torch.Tensor) -> bool:
    """Whether `torch.func` or a forward-mode derivative follows what is computed of these tensors.

    Products that autograd does not know would lose that without an error. Autograd functions ask the same private question.
    """
    if torch._C._are_functorch_transforms_active():
        return True
    return any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


def _sample_by_sample(function: Callable, batch_size: int, in_dims: tuple, arguments: tuple) -> tuple[Tensors, Any]:
    """What `vmap` asks for: the outputs of all samples, stacked, and their batch dimension."""
    outputs = [
        function(*(x.select(dim, sample) if isinstance(dim, int) else x for x, dim in zip(arguments, in_dims)))
        for sample in range(batch_size)
    ]
    return tuple(map(torch.stack, zip(*outputs, strict=True))), 0
