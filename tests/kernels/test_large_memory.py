"""Memory for gradients: of which shape, when it is used again, and how much is kept."""

from __future__ import annotations

import copy
import gc
import io
import os
import pickle

import pytest
import torch

from grinmoe.kernels import large_memory
from grinmoe.kernels.large_memory import empty_like_on_cpu


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """From 4 KB on; nothing is kept from before."""
    monkeypatch.setattr(large_memory, "FROM_BYTES", 4096)
    large_memory._idle.clear()
    yield
    large_memory._idle.clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(3, 64, 100), (2, 3), (0, 5), (4096,), (1, 700_001)], ids=str)
def test_shape_dtype_and_room_for_all_of_it(shape, dtype):
    weight = torch.empty(shape, dtype=dtype)
    found = empty_like_on_cpu(weight)
    assert found.shape == weight.shape and found.dtype == dtype and found.is_contiguous()
    assert weight.nbytes < 4096 or found.data_ptr() % large_memory.LARGE_PAGE == 0
    found.fill_(7.0)
    assert (found == 7.0).all()


def test_a_transposed_weight_gets_a_contiguous_gradient():
    assert empty_like_on_cpu(torch.empty(64, 32).t()).is_contiguous()


def test_memory_is_used_again_when_its_last_tensor_is_gone():
    weight = torch.empty(100, 100)
    first = empty_like_on_cpu(weight)
    part, array, address = first[7:9], first.numpy(), first.data_ptr()
    del first
    assert empty_like_on_cpu(weight).data_ptr() != address  # a part of it is in use
    del part
    assert empty_like_on_cpu(weight).data_ptr() != address  # and numpy has it
    array.fill(3.0)
    del array
    gc.collect()
    again = {empty_like_on_cpu(weight).data_ptr() for _ in range(1)}
    held = [empty_like_on_cpu(weight) for _ in range(3)]
    assert address in again | {tensor.data_ptr() for tensor in held}


def test_two_tensors_at_once_never_share_memory():
    tensors = [empty_like_on_cpu(torch.empty(50, 50)).fill_(number) for number in range(8)]
    assert [tensor.unique().tolist() for tensor in tensors] == [[number] for number in range(8)]


def test_no_more_is_kept_than_the_limit(monkeypatch):
    one = 2 * large_memory.LARGE_PAGE
    monkeypatch.setattr(large_memory, "IDLE_BYTES", 3 * one)
    tensors = [empty_like_on_cpu(torch.empty(2000)) for _ in range(5)]
    assert not large_memory._idle
    del tensors
    assert sum(map(len, large_memory._idle)) == 3 * one
    monkeypatch.setattr(large_memory, "IDLE_BYTES", 0)
    empty_like_on_cpu(torch.empty(3000, 3000))
    assert not large_memory._idle


def test_what_optimizers_and_checkpoints_do_with_a_gradient():
    weight = torch.nn.Parameter(torch.ones(60, 60))
    weight.grad = empty_like_on_cpu(weight).fill_(2.0)
    torch.optim.AdamW([weight], lr=0.1).step()
    assert (weight < 1).all()
    for copied in (copy.deepcopy(weight.grad), pickle.loads(pickle.dumps(weight.grad)), weight.grad.clone()):
        assert torch.equal(copied, torch.full((60, 60), 2.0))
    weight.grad.share_memory_()
    assert (weight.grad == 2.0).all()


def test_storage_holds_the_gradient_and_nothing_else():
    """A checkpoint of a gradient holds its storage: neither what alignment takes nor what was there before."""
    gradient = empty_like_on_cpu(torch.empty(1000, 1000)).fill_(2.0)
    assert gradient.storage_offset() == 0 and gradient.untyped_storage().nbytes() == gradient.nbytes
    file = io.BytesIO()
    torch.save(gradient, file)
    assert len(file.getvalue()) < gradient.nbytes + 10_000


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.parametrize("idle", [False, True], ids=["in use", "idle"])
def test_a_forked_process_has_memory_of_its_own(idle):
    """What a child writes stays its own: in a gradient that it was born with, and in what it takes from the idle memory."""
    gradient = empty_like_on_cpu(torch.empty(60, 60))
    if idle:
        del gradient
    child = os.fork()
    if child == 0:
        mine = empty_like_on_cpu(torch.empty(60, 60)) if idle else gradient
        mine.numpy().fill(5.0)  # without torch's threads, of which a fork has none
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    if idle:
        gradient = empty_like_on_cpu(torch.empty(60, 60))
    assert (gradient == 0.0).all()
