"""`torch.func` and higher derivatives: what Transformers' own Mixtral does under them, this model does too."""

import itertools

import pytest
import torch
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vmap

from tests.tiny import tiny_model

# Transformers' grouped product has no forward-mode derivative, and its second one refuses some strides.
TWICE_DIFFERENTIABLE = ("eager", "batched_mm", "grinmoe")
IDS = torch.randint(0, 96, (2, 8), generator=torch.Generator().manual_seed(1))


def of_parameters(implementation: str, training: bool = False, **config):
    """A tiny model, its parameters, and its loss as a function of these and of a text; the same draws in every call."""
    model = tiny_model(**{"router_aux_loss_coef": 0.01, "expert_dropout": 0.1, **config}).train(training)
    model.set_attn_implementation("eager")  # sdpa has no second derivative on a CPU
    model.set_experts_implementation(implementation)

    def loss(parameters, ids=IDS):
        torch.manual_seed(0)
        output = functional_call(model, parameters, (), {"input_ids": ids, "labels": ids, "use_cache": False})
        if model.dtype == torch.float32:
            return output.loss
        return torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    return model, {name: parameter.detach() for name, parameter in model.named_parameters()}, loss


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("estimator", ["sparsemixer_v2", "sparsemixer_v2_printed", "topk"])
@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm", "grinmoe"])
def test_func_grad_equals_backward(implementation, estimator, training):
    model, parameters, loss = of_parameters(implementation, training, router_estimator=estimator)
    found = grad(loss)(parameters)
    loss(dict(model.named_parameters())).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-6)


def hessian_vector_products(loss, parameters: dict, vector: dict) -> list[dict]:
    """The product in three ways: twice backward by `torch.func` and by autograd, and forward over backward."""

    def along(gradients) -> torch.Tensor:
        return sum((gradients[name] * vector[name]).sum() for name in vector)

    leaves = {name: parameter.clone().requires_grad_() for name, parameter in parameters.items()}
    first = torch.autograd.grad(loss(leaves), list(leaves.values()), create_graph=True)
    second = torch.autograd.grad(along(dict(zip(leaves, first, strict=True))), list(leaves.values()))
    return [
        grad(lambda p: along(grad(loss)(p)))(parameters),
        dict(zip(leaves, second, strict=True)),
        jvp(grad(loss), (parameters,), (vector,))[1],
    ]


def test_forward_mode_derivative_equals_the_reference():
    """Products that autograd does not know would drop tangents silently."""
    found, expected = [], []
    for implementation, values in (("grinmoe", found), ("eager", expected)):
        model, parameters, loss = of_parameters(implementation)
        model.requires_grad_(False)
        ones = {name: torch.ones_like(parameter) for name, parameter in parameters.items()}
        values.append(jvp(loss, (parameters,), (ones,))[1])
        with torch.autograd.forward_ad.dual_level():
            dual = {name: torch.autograd.forward_ad.make_dual(p, ones[name]) for name, p in parameters.items()}
            values.append(torch.autograd.forward_ad.unpack_dual(loss(dual)).tangent)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("implementation", TWICE_DIFFERENTIABLE)
def test_hessian_vector_products_of_an_evaluated_model_equal_the_difference_of_gradients(implementation):
    model, parameters, loss = of_parameters(implementation)
    generator = torch.Generator().manual_seed(2)
    vector = {name: torch.randn(p.shape, generator=generator, dtype=p.dtype) for name, p in parameters.items()}
    if implementation != "grinmoe":  # which is for float32
        model.double()
        parameters = {name: parameter.double() for name, parameter in parameters.items()}
        vector = {name: direction.double() for name, direction in vector.items()}
    products = hessian_vector_products(loss, parameters, vector)
    if implementation != "grinmoe":
        step = 1e-5
        moved = [{name: parameters[name] + sign * step * vector[name] for name in vector} for sign in (1, -1)]
        above, below = (grad(loss)(one) for one in moved)
        expected = {name: (above[name] - below[name]) / (2 * step) for name in vector}
    else:
        _, _, reference = of_parameters("eager")
        expected = hessian_vector_products(reference, parameters, vector)[0]
    for product in products:
        for name, value in expected.items():
            torch.testing.assert_close(product[name], value, rtol=1e-3, atol=1e-3 * value.abs().max().item())


def test_second_derivatives_of_a_router_that_samples_are_refused():
    _, parameters, loss = of_parameters("grinmoe", training=True)
    with pytest.raises(RuntimeError, match=r"estimate, which has no derivative of its own; call model.eval\(\) first"):
        hessian_vector_products(loss, parameters, parameters)


@pytest.mark.parametrize("implementation", ["batched_mm", "grouped_mm", "grinmoe"])
def test_gradients_per_sample_equal_one_sample_at_a_time(implementation):
    _, parameters, loss = of_parameters(implementation)
    found = vmap(lambda ids: grad(loss)(parameters, ids[None]))(IDS)
    alone = [grad(loss)(parameters, ids[None]) for ids in IDS]
    for name, gradients in found.items():
        torch.testing.assert_close(gradients, torch.stack([one[name] for one in alone]), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("implementation", ["batched_mm", "grinmoe"])
def test_gradients_per_sample_in_training_have_draws_of_their_own(implementation):
    _, parameters, loss = of_parameters(implementation, training=True, router_jitter_noise=1.0, expert_dropout=0.0)
    same = IDS[:1].expand(2, -1)
    found = vmap(lambda ids: grad(loss)(parameters, ids[None]), randomness="different")(same)
    first, second = found["model.layers.0.block_sparse_moe.experts.down_proj"]
    assert first.isfinite().all() and second.isfinite().all() and not torch.equal(first, second)


@pytest.mark.parametrize("implementation", ["eager", "grinmoe"])
def test_hessians_in_every_order_of_modes_are_equal(implementation):
    """torch's LayerNorm is itself wrong backward over forward, so the norm is RMSNorm."""
    _, parameters, loss = of_parameters(implementation, norm_type="rms_norm")
    name = "model.layers.1.post_attention_layernorm.weight"

    def of_norm(weight):
        return loss({**parameters, name: weight})

    expected = torch.autograd.functional.hessian(of_norm, parameters[name])
    for outer, inner in itertools.product((jacfwd, jacrev), repeat=2):
        found = outer(inner(of_norm))(parameters[name])
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())
    vectorized = torch.autograd.functional.jacobian(of_norm, parameters[name], vectorize=True)
    torch.testing.assert_close(vectorized, grad(of_norm)(parameters[name]), rtol=1e-4, atol=1e-6)
