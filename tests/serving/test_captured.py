"""The captured step: the tokens of `generate`, greedy and drawn, by a step that asks the host for nothing."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model

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
    flash = tiny_model()
    flash.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="attn_implementation='flash_attention_2' does not go with a captured step"):
        CapturedDecoder(flash, 1, 8, mode="eager")
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


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_queries_keys_and_values_are_one_product(tiny_model, compiled, bias):
    torch.compiler.reset()
    model = tiny_model(initializer_range=0.3, attention_bias=bias)
    prompts = padded_prompts(model.config.vocab_size)
    expected = model.generate(**prompts, **GREEDY, max_new_tokens=12)
    counts = []

    def backend(graph, inputs):
        counts.append(sum(node.target is torch._C._nn.linear for node in graph.graph.nodes))
        return graph.forward

    decoder = CapturedDecoder(
        model, 2, 23, mode="compiled" if compiled else "eager", backend=backend, fused_qkv=True, **ENDLESS
    )
    assert torch.equal(decoder.generate(**prompts, max_new_tokens=12), expected)
    # In each of two layers a product, that of the output and the router's; and the head.
    assert counts == [7] * compiled
    assert torch.equal(model.generate(**prompts, **GREEDY, max_new_tokens=12), expected)


def test_fused_weights_are_there_once_and_keep_their_names(tiny_model, tmp_path):
    model, plain = tiny_model(initializer_range=0.3), tiny_model(initializer_range=0.3)
    parameters = dict(model.named_parameters())
    decoder = CapturedDecoder(model, 1, 20, mode="eager", fused_qkv=True, **ENDLESS)
    attention = model.model.layers[0].self_attn
    storages = {getattr(attention, name).weight.untyped_storage().data_ptr() for name in ("q_proj", "k_proj", "v_proj")}
    assert len(storages) == 1 and attention.q_proj.weight.untyped_storage().nbytes() == 64 * 32 * 4
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert "project" not in vars(attention)
    again = CapturedDecoder(model, 1, 20, mode="eager", fused_qkv=True, **ENDLESS)
    assert all(map(torch.equal, again.projections.products[0].args[1:], decoder.projections.products[0].args[1:]))
    # Saved, copied and loaded as before.
    model.save_pretrained(tmp_path)
    for other in (GrinMoeForCausalLM.from_pretrained(tmp_path), copy.deepcopy(model)):
        assert all(map(torch.equal, other.state_dict().values(), plain.state_dict().values()))
    prompt = torch.arange(5, 10)[None]
    trained = tiny_model(seed=1, initializer_range=0.3)
    expected = trained.generate(prompt, **GREEDY, max_new_tokens=9)
    model.load_state_dict(trained.state_dict())
    assert all(torch.equal(one.generate(prompt, max_new_tokens=9), expected) for one in (decoder, again))
    attention.q_proj.weight.data = attention.q_proj.weight.data.clone()
    with pytest.raises(ValueError, match="no longer where they were"):
        decoder.generate(prompt, max_new_tokens=9)


def test_projections_that_are_not_plain_are_refused(tiny_model):
    hooked, mixed, adapted = tiny_model(), tiny_model(), tiny_model()
    hooked.model.layers[1].self_attn.k_proj.register_forward_hook(lambda *_: None)
    mixed.model.layers[1].self_attn.v_proj.bfloat16()
    inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), adapted)
    for model, message in ((hooked, "without hooks"), (mixed, "one dtype"), (adapted.eval(), "merge adapters")):
        before = model.model.layers[0].self_attn.k_proj.weight.data_ptr()
        with pytest.raises(ValueError, match=message):
            CapturedDecoder(model, 1, 8, mode="eager", fused_qkv=True)
        assert model.model.layers[0].self_attn.k_proj.weight.data_ptr() == before


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["graph", "compiled"])
@pytest.mark.parametrize("implementation", ["grinmoe", "grinmoe_triton"])
@pytest.mark.parametrize("sampling", [None, Sampling(0.9, 20, 0.9)], ids=["greedy", "sampling"])
@pytest.mark.parametrize("fused_qkv", [False, True], ids=["three products", "one product"])
def test_a_captured_step_gives_the_tokens_of_an_eager_one(tiny_model, mode, implementation, sampling, fused_qkv):
    model = tiny_model(initializer_range=0.3).cuda()
    model.set_experts_implementation(implementation)
    prompts = {name: tensor.cuda() for name, tensor in padded_prompts(model.config.vocab_size).items()}
    options = {"sampling": sampling, "fused_qkv": fused_qkv, **ENDLESS}
    eager, captured = (CapturedDecoder(model, 2, 60, mode=how, **options) for how in ("eager", mode))
    for seed in (1, 2):
        expected = eager.generate(**prompts, max_new_tokens=49, seed=seed)
        assert torch.equal(captured.generate(**prompts, max_new_tokens=49, seed=seed), expected)
    if sampling is None:
        assert torch.equal(expected, model.generate(**prompts, **GREEDY, max_new_tokens=49))
