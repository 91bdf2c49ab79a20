"""How kernels are launched: in one place, on the device of their tensors, with the rounding that was asked for."""

from __future__ import annotations

import ast
from types import SimpleNamespace

import pytest
import torch

from grinmoe.kernels import launching
from tests import ROOT

FILES = sorted((ROOT / "grinmoe" / "kernels").glob("*.py"))


def launches(tree: ast.AST) -> list[str]:
    """Where a kernel is launched by itself, `kernel[grid](...)`."""
    calls = [
        node.func for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript)
    ]
    return [ast.unparse(call) for call in calls if ast.unparse(call.value).endswith("kernel")]


def test_every_launch_goes_through_the_guard():
    found = {path.name: launches(ast.parse(path.read_text())) for path in FILES}
    assert {name: calls for name, calls in found.items() if calls} == {"launching.py": ["kernel[grid]"]}
    assert sum("launch_kernel(" in path.read_text() for path in FILES) >= 3


@pytest.mark.parametrize("device, index", [("cuda:1", 1), ("xpu:0", 0), ("cpu", None), ("cpu:0", None), ("meta", None)])
def test_launch_happens_on_the_device_of_the_first_tensor(monkeypatch, device, index):
    done = []

    class Guard:
        def __init__(self, index):
            self.index = index

        def __enter__(self):
            done.append(("enter", self.index))

        def __exit__(self, *_):
            done.append(("exit", self.index))

    class Kernel:
        def __getitem__(self, grid):
            return lambda *arguments, **constants: done.append((grid, arguments, constants))

    monkeypatch.setattr(torch.accelerator, "device_index", Guard)
    tensor = SimpleNamespace(device=torch.device(device))
    launching.launch_kernel(Kernel(), (3,), tensor, 5, TOKENS=8)
    called = ((3,), (tensor, 5), {"TOKENS": 8, "enable_fp_fusion": True})
    assert done == [("enter", index), called, ("exit", index)]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_second_device_computes_what_the_first_does(tiny_config):
    """Router, jitter, experts and their gradients, and the kernels for few tokens, while another device is current."""
    from grinmoe.kernels.triton_router import fused_input_jitter, fused_route
    from grinmoe.modeling_grinmoe import GrinMoeExperts

    config = tiny_config(hidden_size=64, intermediate_size=48)
    config._experts_implementation = "grinmoe_triton"
    generator = torch.Generator().manual_seed(0)
    hidden, logits = torch.randn(40, 64, generator=generator), torch.randn(40, 4, generator=generator)
    weights = [torch.randn(4, 96, 64, generator=generator), torch.randn(4, 64, 48, generator=generator)]

    def results(device: str) -> list[torch.Tensor]:
        experts = GrinMoeExperts(config).to(device)
        with torch.no_grad():
            experts.gate_up_proj.copy_(weights[0])
            experts.down_proj.copy_(weights[1])
        inputs = [hidden.to(device).requires_grad_(), logits.to(device).requires_grad_()]
        jittered = fused_input_jitter(inputs[0], 0.1, seed=3, stream=1)
        routing = fused_route(inputs[1], 2, 0.1, True, seed=3, stream=1)
        output = experts(jittered, routing.selected_experts, routing.routing_weights)
        gradients = torch.autograd.grad(output.sum(), [*inputs, *experts.parameters()])
        with torch.no_grad():
            few = experts(jittered[:3], routing.selected_experts[:3], routing.routing_weights[:3])
        return [output, few, routing.selected_experts, *gradients]

    with torch.cuda.device(0):
        first, second = results("cuda:0"), results("cuda:1")
    for here, there in zip(first, second, strict=True):
        assert there.device == torch.device("cuda", 1)
        assert torch.equal(here.cpu(), there.cpu())
