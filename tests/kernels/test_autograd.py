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


@pytest.mark.parametrize("module", [cpu, triton_experts], ids=["cpu", "triton"])
def test_batch_of_gradients_is_one_after_the_other(module):
    tensors, rest, _, _ = inputs_of(CHOICES["spread"], False)
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    output, upstream = module._function(*leaves, *rest)[0], torch.randn(3, 5, 16)
    batched = torch.autograd.grad(output, leaves, upstream, retain_graph=True, is_grads_batched=True)
    alone = [torch.autograd.grad(output, leaves, one, retain_graph=True) for one in upstream]
    for found, expected in zip(batched, zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(found, torch.stack(expected))


def test_eager_training_calls_no_operator(monkeypatch):
    """An operator of torch.library takes the host longer than an autograd function."""

    def refuse(*_):
        raise AssertionError("an operator was called")

    for name in ("_experts", "_experts_backward"):
        monkeypatch.setattr(triton_experts, name, refuse)
    tensors, rest, _, _ = inputs_of(CHOICES["spread"], False)
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    triton_experts._function(*leaves, *rest)[0].sum().backward()
    assert all(leaf.grad is not None for leaf in leaves)


def test_first_derivative_alone_goes_straight_to_the_backward(monkeypatch):
    """An autograd function inside of the backward is for those who differentiate further."""
    applied = []
    apply = torch.autograd.Function.apply.__func__
    recorded = classmethod(lambda cls, *arguments: applied.append(cls.__name__) or apply(cls, *arguments))
    monkeypatch.setattr(torch.autograd.Function, "apply", recorded)
    function = cpu.autograd_function(lambda x: (x * 2,), lambda grad, *_: (grad * 2,), lambda x: x * 2, trainable=1)
    leaf = torch.ones(3, requires_grad=True)
    torch.autograd.grad(function(leaf)[0].sum(), leaf)
    assert len(applied) == 1
    (gradient,) = torch.autograd.grad(function(leaf)[0].sum(), leaf, create_graph=True)
    assert len(applied) == 3 and gradient.requires_grad


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
