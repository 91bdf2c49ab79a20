"""The fast experts as autograd functions: derivatives of every order and `torch.func`, held to the reference formula."""

import pytest
import torch
from torch.func import grad, vmap

from grinmoe.kernels import cpu, triton_experts
from grinmoe.kernels.cpu import experts_reference

CHOICES = {
    "spread": torch.tensor([[0, 1], [2, 3], [3, 0], [1, 2], [0, 3]]),
    "idle experts": torch.tensor([[1, 3], [3, 1], [1, 3], [3, 1], [1, 3]]),
    "elsewhere": torch.tensor([[0, 4], [4, 4], [3, 1], [4, 2], [2, 0]]),
}


def inputs_of(choices: torch.Tensor, dropout: bool):
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(shape, generator=generator)

    tensors = (randn(5, 16), randn(5, 2), randn(4, 24, 16), randn(4, 16, 12))
    keep = 1.25 * (torch.rand(10, 12, generator=generator) < 0.8) if dropout else None
    return tensors, (choices, keep), [randn(*tensor.shape) for tensor in tensors], randn(5, 16)


@pytest.mark.parametrize("dropout", [False, True], ids=["plain", "dropout"])
@pytest.mark.parametrize("choices", CHOICES.values(), ids=list(CHOICES))
@pytest.mark.parametrize("module", [cpu, triton_experts], ids=["cpu", "triton"])
def test_experts_function_has_every_derivative_of_the_reference(module, choices, dropout):
    tensors, rest, directions, upstream = inputs_of(choices, dropout)

    def all_derivatives(experts):
        def value(*tensors):
            return (experts(*tensors, *rest) * upstream).sum()

        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        first = torch.autograd.grad(value(*leaves), leaves, create_graph=True)
        along = sum((gradient * direction).sum() for gradient, direction in zip(first, directions, strict=True))
        gradient = grad(value, argnums=(0, 1, 2, 3))
        return [
            value(*tensors),
            *first,
            *torch.autograd.grad(along, leaves),
            *gradient(*tensors),
        ]

    found = all_derivatives(lambda *inputs: module._function(*inputs)[0])
    for one, expected in zip(found, all_derivatives(experts_reference), strict=True):
        torch.testing.assert_close(one, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("module", [cpu, triton_experts], ids=["cpu", "triton"])
def test_experts_function_under_vmap_computes_sample_by_sample(module):
    tensors, (choices, _), _, upstream = inputs_of(CHOICES["spread"], False)
    hidden_states = torch.stack([tensors[0], 2 * tensors[0], -tensors[0]])

    def value(hidden_states, gate_up_proj):
        return (
            module._function(hidden_states, tensors[1], gate_up_proj, tensors[3], choices, None)[0] * upstream
        ).sum()

    gradient = grad(value, argnums=(0, 1))
    found = vmap(gradient, in_dims=(0, None))(hidden_states, tensors[2])
    alone = [gradient(sample, tensors[2]) for sample in hidden_states]
    for stacked, samples in zip(found, zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(stacked, torch.stack(samples), rtol=1e-5, atol=1e-6)


def test_frozen_weights_get_no_gradient():
    """With LoRA their gradient would be as large as all experts."""
    tensors, rest, _, _ = inputs_of(CHOICES["spread"], False)
    hidden_states = tensors[0].clone().requires_grad_()
    wanted = []

    def backward(grad_output, inputs, kept, needed):
        wanted.append(needed)
        return cpu._gradients(grad_output, inputs, kept, needed)

    function = cpu.autograd_function(cpu.experts_and_kept, backward, experts_reference, trainable=4)
    function(hidden_states, *tensors[1:], *rest)[0].sum().backward()
    assert wanted == [(True, False, False, False)]
    assert hidden_states.grad is not None
