"""`generate(cache_implementation="static")`: the text of the dynamic cache, by a compiled step that waits for nothing."""

from __future__ import annotations

import contextlib

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CompileConfig, StaticCache

from grinmoe import GrinMoeForCausalLM
from grinmoe.generation_grinmoe import CACHE

# No end of text, so that all texts have the same length.
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def padded_prompts(vocab_size: int) -> dict[str, torch.Tensor]:
    """Two rows of 11 tokens; the first 4 of row 0 are padding."""
    input_ids = torch.randint(3, vocab_size, (2, 11), generator=torch.Generator().manual_seed(0))
    attention_mask = torch.ones_like(input_ids)
    attention_mask[0, :4] = 0
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def compiled_anywhere(backend: str = "aot_eager") -> CompileConfig:
    """On a GPU `generate` compiles the steps of a static cache by itself, elsewhere only when it is told to."""
    config = CompileConfig(fullgraph=True, backend=backend, mode=None)
    config._compile_all_devices = True
    return config


@pytest.mark.parametrize(
    "name, new_tokens",
    [("golden-a", 12), ("golden-b", 3), ("golden-b", 20), ("golden-c", 12), ("golden-c", 30)],
    ids=["plain", "fills the window", "beyond the window", "short factors", "into LongRoPE's long factors"],
)
def test_both_caches_give_the_same_text(golden_models, name, new_tokens):
    model = golden_models[name]
    prompts = padded_prompts(model.config.vocab_size)
    expected = model.generate(**prompts, **GREEDY, max_new_tokens=new_tokens)
    for _ in range(2):  # the second call meets what the first has left
        found = model.generate(**prompts, **GREEDY, max_new_tokens=new_tokens, cache_implementation="static")
        assert torch.equal(found, expected)


@pytest.mark.parametrize("implementation", ["grinmoe", "grinmoe_triton", "grouped_mm", "batched_mm"])
def test_a_compiled_step_gives_the_same_text(tiny_model, implementation):
    torch.compiler.reset()
    model = tiny_model(num_hidden_layers=1, initializer_range=0.3)
    model.set_experts_implementation(implementation)
    prompts = padded_prompts(model.config.vocab_size)
    expected = model.generate(**prompts, **GREEDY, max_new_tokens=6)
    found = model.generate(
        **prompts, **GREEDY, max_new_tokens=6, cache_implementation="static", compile_config=compiled_anywhere()
    )
    assert torch.equal(found, expected)
    assert len({tuple(row[11:].tolist()) for row in expected}) == 2, "the rows' texts do not differ"


class OnTheDevice(TorchDispatchMode):
    """Names every operator whose result is on the host."""

    def __init__(self):
        super().__init__()
        self.on_the_host: list[str] = []
        self.operators = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.operators += 1
        for tensor in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                self.on_the_host.append(str(func))
        return result


def test_a_decoding_step_needs_nothing_from_the_host(tiny_config, monkeypatch):
    """Run on the meta device, where a value that the host asks for is an error: what a CUDA graph cannot hold."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())  # meta has none
    config = tiny_config(sliding_window=None)
    config._experts_implementation = "batched_mm"
    with torch.device("meta"):
        model = GrinMoeForCausalLM(config).eval()
        cache = StaticCache(config=config, max_cache_len=8)
        for length in (5, 1):  # the prompt sets the cache up
            inputs = {
                "input_ids": torch.zeros(2, length, dtype=torch.int64),
                "attention_mask": torch.ones(2, 1, length, 8, dtype=torch.bool),
                "position_ids": torch.zeros(2, length, dtype=torch.int64),
                CACHE: cache,
            }
            with torch.no_grad(), OnTheDevice() as seen:
                model(**inputs)
    assert seen.operators > 50 and seen.on_the_host == []


@pytest.mark.parametrize("window", [None, 7], ids=["no window", "a window that the text outgrows"])
def test_a_compiled_step_is_the_same_for_every_token(tiny_model, window):
    """One graph, and no number of Python's among its inputs: CUDA graphs are recorded anew for every value of one."""
    torch.compiler.reset()
    numbers = []

    def compiler(graph, inputs):
        numbers.append([value for value in inputs if not isinstance(value, torch.Tensor)])
        return make_boxed_func(graph.forward)

    model = tiny_model(num_hidden_layers=1, sliding_window=window)
    config = compiled_anywhere(aot_autograd(fw_compiler=compiler))
    prompts = padded_prompts(model.config.vocab_size)
    model.generate(**prompts, **GREEDY, max_new_tokens=6, cache_implementation="static", compile_config=config)
    assert numbers == [[]]
