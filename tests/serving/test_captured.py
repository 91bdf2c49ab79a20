"""The captured step: the tokens of `generate`, greedy and drawn, by a step that asks the host for nothing."""

from __future__ import annotations

import contextlib

import pytest
import torch

from grinmoe import GrinMoeForCausalLM
from grinmoe.serving import CapturedDecoder, Sampling, generate_captured
from tests.model.test_static_cache import GREEDY, OnTheDevice, padded_prompts

ENDLESS = {"eos_token_id": None, "pad_token_id": 0}


@pytest.mark.parametrize(
    "name, new_tokens",
    [("golden-a", 12), ("golden-b", 3), ("golden-b", 20), ("golden-c", 12)],
    ids=["plain", "fills the window", "beyond the window", "LongRoPE's short factors"],
)
def test_greedy_tokens_are_those_of_generate(golden_models, name, new_tokens):
    model = golden_models[name]
    prompts = padded_prompts(model.config.vocab_size)
    expected = model.generate(**prompts, **GREEDY, max_new_tokens=new_tokens)
    found = generate_captured(model, **prompts, max_new_tokens=new_tokens, mode="eager", **ENDLESS)
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "sampling",
    [Sampling(), Sampling(0.7, top_k=0), Sampling(1.3, top_k=5), Sampling(1.0, 0, 0.8), Sampling(1.5, 20, 0.9)],
    ids=str,
)
def test_drawn_tokens_are_those_of_generate_with_the_same_seed(tiny_model, sampling):
    model = tiny_model(initializer_range=0.3)
    prompts = padded_prompts(model.config.vocab_size)
    decoder = CapturedDecoder(model, 2, 31, sampling=sampling, mode="eager", **ENDLESS)
    for seed in (3, 4):
        torch.manual_seed(seed)
        expected = model.generate(
            **{**prompts, **GREEDY, "do_sample": True},
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            max_new_tokens=20,
        )
        assert torch.equal(decoder.generate(**prompts, max_new_tokens=20, seed=seed), expected)
    torch.manual_seed(7)
    first = decoder.generate(**prompts, max_new_tokens=20)
    torch.manual_seed(7)
    assert torch.equal(decoder.generate(**prompts, max_new_tokens=20), first)
    assert not torch.equal(decoder.generate(**prompts, max_new_tokens=20), first)


@pytest.mark.parametrize("read_every", [1, 3, 100])
def test_it_stops_where_all_rows_have_ended(tiny_model, read_every):
    model = tiny_model(initializer_range=0.3)
    prompts = padded_prompts(model.config.vocab_size)
    endless = model.generate(**prompts, **GREEDY, max_new_tokens=30)[:, 11:]
    # Tokens that end the rows in different steps.
    ends = [int(endless[0, 0]), int(endless[1, 3])]
    expected = model.generate(**prompts, do_sample=False, eos_token_id=ends, pad_token_id=0, max_new_tokens=30)
    assert 12 < expected.shape[1] < 41 and (expected == 0).any()
    decoder = CapturedDecoder(model, 2, 41, mode="eager", eos_token_id=ends, pad_token_id=0, read_every=read_every)
    steps = []
    compute = decoder.compute
    decoder.compute = lambda: steps.append(0) or compute()
    for _ in range(2):  # the second call meets what the first has left
        steps.clear()
        assert torch.equal(decoder.generate(**prompts, max_new_tokens=30), expected)
        needed = expected.shape[1] - 12
        assert needed <= len(steps) <= min(29, needed + 2 * read_every)


def test_ends_and_padding_are_those_of_the_generation_config(tiny_model):
    model = tiny_model(initializer_range=0.3)
    prompts = padded_prompts(model.config.vocab_size)
    model.generation_config.eos_token_id = int(model.generate(**prompts, **GREEDY, max_new_tokens=5)[0, 13])
    model.generation_config.pad_token_id = None
    expected = model.generate(**prompts, do_sample=False, max_new_tokens=9)
    assert torch.equal(generate_captured(model, **prompts, max_new_tokens=9, mode="eager"), expected)


@pytest.mark.parametrize("sampling", [None, Sampling(0.9, 20, 0.9)], ids=["greedy", "sampling"])
@pytest.mark.parametrize("window", [None, 7], ids=["no window", "a window that the text outgrows"])
def test_a_compiled_step_is_one_graph_for_every_token_and_prompt(tiny_model, sampling, window):
    torch.compiler.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model = tiny_model(num_hidden_layers=1, initializer_range=0.3, sliding_window=window)
    options = {"sampling": sampling, **ENDLESS}
    compiled = CapturedDecoder(model, 2, 25, mode="compiled", backend=backend, **options)
    eager = CapturedDecoder(model, 2, 25, mode="eager", **options)
    prompts = padded_prompts(model.config.vocab_size)
    shorter = {name: tensor[:, 3:] for name, tensor in prompts.items()}
    for given in (prompts, shorter, prompts):
        expected = eager.generate(**given, max_new_tokens=12, seed=1)
        assert torch.equal(compiled.generate(**given, max_new_tokens=12, seed=1), expected)
    assert len(graphs) == 1


@pytest.mark.parametrize("implementation", ["batched_mm", "grinmoe_triton"])
@pytest.mark.parametrize("sampling", [None, Sampling(0.9, 20, 0.9)], ids=["greedy", "sampling"])
def test_a_step_needs_nothing_from_the_host(tiny_config, monkeypatch, sampling, implementation):
    """Run on the meta device, where a value that the host asks for is an error: what a CUDA graph cannot hold."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())  # meta has none
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *args: False)
    monkeypatch.setattr(torch, "Generator", lambda device: None)
    config = tiny_config()
    config._experts_implementation = implementation
    with torch.device("meta"):
        model = GrinMoeForCausalLM(config).eval()
        decoder = CapturedDecoder(model, 2, 8, sampling=sampling, mode="eager", **ENDLESS)
        with torch.no_grad():
            decoder._step()  # the cache makes its tensors
            with OnTheDevice() as seen:
                decoder._step()
    assert seen.operators > 50 and seen.on_the_host == []


def test_what_a_step_cannot_hold_is_refused(tiny_model, golden_models):
    model = tiny_model()
    with pytest.raises(ValueError, match="mode='graph' needs CUDA, and the model is on cpu"):
        CapturedDecoder(model, 1, 8)
    with pytest.raises(ValueError, match="mode='fast'; choose"):
        CapturedDecoder(model, 1, 8, mode="fast")
    with pytest.raises(ValueError, match="training mode"):
        CapturedDecoder(tiny_model().train(), 1, 8, mode="eager")
    with pytest.raises(ValueError, match="not GrinMoeModel"):
        CapturedDecoder(model.model, 1, 8, mode="eager")
    with pytest.raises(ValueError, match="read_every=0"):
        CapturedDecoder(model, 1, 8, mode="eager", read_every=0)
    with pytest.raises(ValueError, match="temperature"):
        CapturedDecoder(model, 1, 8, mode="eager", sampling=Sampling(temperature=0.0))
    looping = tiny_model()
    looping.set_experts_implementation("eager")
    with pytest.raises(ValueError, match="experts_implementation='eager' loops on the host"):
        CapturedDecoder(looping, 1, 8, mode="compiled")
    decoder = CapturedDecoder(model, 2, 12, mode="eager")
    prompts = padded_prompts(96)
    for wrong, message in (
        ({"input_ids": prompts["input_ids"][:1]}, "give 2 rows"),
        ({**prompts, "max_new_tokens": 2}, "max_length=12"),
        ({**prompts, "attention_mask": prompts["attention_mask"].flip(1)}, "pad prompts on the left"),
    ):
        with pytest.raises(ValueError, match=message):
            decoder.generate(**{"max_new_tokens": 1, **wrong})
    with pytest.raises(ValueError, match="LongRoPE changes the frequencies"):
        generate_captured(golden_models["golden-c"], **padded_prompts(96), max_new_tokens=30, mode="eager")


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["graph", "compiled"])
@pytest.mark.parametrize("implementation", ["grinmoe", "grinmoe_triton"])
@pytest.mark.parametrize("sampling", [None, Sampling(0.9, 20, 0.9)], ids=["greedy", "sampling"])
def test_a_captured_step_gives_the_tokens_of_an_eager_one(tiny_model, mode, implementation, sampling):
    model = tiny_model(initializer_range=0.3).cuda()
    model.set_experts_implementation(implementation)
    prompts = {name: tensor.cuda() for name, tensor in padded_prompts(model.config.vocab_size).items()}
    eager, captured = (CapturedDecoder(model, 2, 60, sampling=sampling, mode=how, **ENDLESS) for how in ("eager", mode))
    for seed in (1, 2):
        expected = eager.generate(**prompts, max_new_tokens=49, seed=seed)
        assert torch.equal(captured.generate(**prompts, max_new_tokens=49, seed=seed), expected)
    if sampling is None:
        assert torch.equal(expected, model.generate(**prompts, **GREEDY, max_new_tokens=49))
