"""The model beyond the goldens: compilation, continuous batching, heads, inputs that are refused."""

from __future__ import annotations

import collections
import copy
import logging

import pytest
import torch
from transformers import AttentionInterface, CompileConfig, DynamicCache, GenerationConfig, StaticCache
from transformers.modeling_flash_attention_utils import _process_flash_attention_kwargs
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import grinmoe
from grinmoe import GrinMoeForCausalLM, GrinMoeForSequenceClassification, GrinMoeModel
from grinmoe.generation_grinmoe import CACHE
from grinmoe.routing_grinmoe import RoutingNoise, draw_routing_noise
from tests.tolerances import GOLDEN


def test_the_released_names_are_aliases():
    """Those of the released config.json's auto_map."""
    assert grinmoe.GRINMoEForCausalLM is GrinMoeForCausalLM and grinmoe.GRINMoEConfig is grinmoe.GrinMoeConfig


class TestCompilation:
    @pytest.fixture(autouse=True)
    def _nothing_compiled_before(self):
        torch.compiler.reset()  # there is a limit to how often a function is compiled, and what failed hides the reason

    @pytest.mark.parametrize(
        "experts",
        ["grinmoe", *(pytest.param(name, marks=pytest.mark.integration) for name in ("grouped_mm", "grinmoe_triton"))],
    )
    def test_forward_in_one_graph(self, goldens, golden_models, experts):
        golden, model = goldens["golden-b"], golden_models["golden-b"]
        model.set_attn_implementation("sdpa")
        model.set_experts_implementation(experts)
        compiled = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            output = compiled(**golden.model_inputs("plain"), output_router_logits=True)
        torch.testing.assert_close(output.logits, golden["plain.logits"], atol=2e-4, rtol=0)
        torch.testing.assert_close(output.aux_loss, golden["plain.aux_loss_unmasked"], atol=2e-5, rtol=0)

    @pytest.mark.integration
    @pytest.mark.parametrize("name", ["golden-b", "golden-c"])
    def test_decoding_with_a_static_cache_in_one_graph(self, goldens, golden_models, name):
        """golden-b fills the window, golden-c crosses LongRoPE's switch."""
        golden, model = goldens[name], golden_models[name]
        model.set_attn_implementation("sdpa")
        model.set_experts_implementation("grinmoe")
        options = CompileConfig(fullgraph=True, mode=None, backend="aot_eager")
        options._compile_all_devices = True
        sequences = model.generate(
            golden.inputs["generate.input_ids"],
            max_new_tokens=20,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            cache_implementation="static",
            compile_config=options,
        )
        assert torch.equal(sequences, golden["generate.sequences"])

    @pytest.mark.integration
    @pytest.mark.parametrize(
        "experts, dtype",
        [("grinmoe", torch.float32), ("grinmoe", torch.bfloat16), ("grinmoe_triton", torch.float32)],
        ids=str,
    )
    def test_training_step_in_one_graph(self, tiny_model, experts, dtype):
        """Outputs and gradients of a compiled training step, with the same draws."""
        model = tiny_model(router_aux_loss_coef=0.1, router_jitter_noise=0.3).to(dtype).train()
        model.set_experts_implementation(experts)
        ids = torch.arange(20)[None]
        compiled = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
        assert compiled(input_ids=ids, labels=ids).loss.isfinite()  # with draws of its own
        noise = [draw_routing_noise(torch.zeros(20, 4), 2)._replace(input_jitter=torch.ones(20, 32)) for _ in range(2)]
        results = []
        for forward in (model.forward, compiled):
            model.zero_grad()
            loss = forward(input_ids=ids, labels=ids, routing_noise=noise).loss
            loss.backward()
            results.append((loss.detach(), [p.grad.clone() for p in model.parameters()]))
        loose = dtype == torch.bfloat16
        torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-2 if loose else 1e-5, atol=0)
        for eager, compiled in zip(results[0][1], results[1][1], strict=True):
            relative, floor = (0.05, 1e-4) if loose else (1e-4, 1e-7)
            assert (eager - compiled).abs().max() <= relative * eager.abs().max() + floor

    def test_padding_between_tokens_means_the_same(self, tiny_model):
        model = tiny_model(sliding_window=None).eval()
        inputs = {"input_ids": torch.arange(8)[None], "attention_mask": torch.tensor([[1, 1, 0, 1, 1, 1, 1, 1]])}
        compiled = torch.compile(model, backend="eager")(**inputs, use_cache=False).logits
        torch.testing.assert_close(compiled, model(**inputs, use_cache=False).logits)

    def test_what_cannot_be_compiled_says_so(self, tiny_model):
        model = tiny_model()
        model.set_experts_implementation("eager")
        compiled = torch.compile(model.forward, fullgraph=True, backend="eager")
        with pytest.raises(Exception, match="set_experts_implementation"):
            compiled(input_ids=torch.arange(6)[None])


class TestContinuousBatching:
    def generate(self, model, prompts, new_tokens=20):
        options = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
        results = model.generate_batch(inputs=prompts, generation_config=options)
        return [results[name].generated_tokens for name in sorted(results)]

    @pytest.mark.integration
    @pytest.mark.parametrize("name", ["golden-a", "golden-b"])
    def test_matches_the_reference_text(self, goldens, name):
        """The paged cache sees the same window as everything else."""
        golden = goldens[name]
        found = self.generate(golden.load(), golden.inputs["generate.input_ids"].tolist())
        assert found == golden["generate.sequences"][:, -20:].tolist()

    @pytest.mark.integration
    def test_longrope_is_served_up_to_its_switch_and_refused_beyond(self, goldens):
        golden = goldens["golden-c"]
        model, prompts = golden.load(), golden.inputs["generate.input_ids"].tolist()
        assert self.generate(model, prompts, 10) == golden["generate.sequences"][:, 22:32].tolist()
        with pytest.raises(ValueError, match="serves up to 32 tokens"):
            self.generate(model, prompts, 11)


LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0] * 4,
    "long_factor": [2.0, 3.0, 4.0, 5.0],
    "original_max_position_embeddings": 16,
    "short_mscale": 1.1,
    "long_mscale": 1.3,
}


class TestLongRope:
    @pytest.fixture
    def model(self, tiny_model):
        model = tiny_model(initializer_range=0.2, sliding_window=None, rope_parameters=LONGROPE, eos_token_id=None)
        return model.eval()

    @pytest.mark.parametrize("chunk", [4, 5])
    def test_prefill_in_chunks_generates_the_same(self, model, chunk):
        ids = torch.randint(0, 90, (1, 12), generator=torch.Generator().manual_seed(1))
        whole, chunked = (
            model.generate(ids, max_new_tokens=8, do_sample=False, **options)
            for options in ({}, {"prefill_chunk_size": chunk})
        )
        assert torch.equal(whole, chunked)

    def test_new_tokens_alone_are_refused_where_they_reach_the_long_factors(self, model):
        """`generate` drops a mask of ones, and the cache could not be computed again."""
        ids = torch.randint(0, 90, (1, 20), generator=torch.Generator().manual_seed(1))
        cache = model(ids[:, :8], use_cache=True).past_key_values
        options = {"past_key_values": cache, "attention_mask": torch.ones_like(ids), "do_sample": False}
        with pytest.raises(ValueError, match="a cache with new tokens alone"):
            model.generate(ids[:, 8:], max_new_tokens=3, **options)
        options["attention_mask"] = torch.ones_like(ids[:, :12])
        found = model.generate(ids[:, 8:12], max_new_tokens=3, **options)
        assert torch.equal(found[:, -3:], model.generate(ids[:, :12], max_new_tokens=3, do_sample=False)[:, -3:])

    @pytest.mark.parametrize("max_new_tokens", [6, None])
    def test_manager_of_continuous_batching_refuses_what_could_reach_the_long_factors(self, model, max_new_tokens):
        options = GenerationConfig(do_sample=False, eos_token_id=-1, max_new_tokens=max_new_tokens)
        manager = model.init_continuous_batching(generation_config=options)
        with pytest.raises(ValueError, match="continuous batching with LongRoPE serves up to 16 tokens"):
            manager.add_requests([[1, 2, 3], list(range(14))])
        with pytest.raises(ValueError, match="continuous batching with LongRoPE serves up to 16 tokens"):
            model.generate_batch([list(range(14))], generation_config=options)

    def test_compiled_steps_over_the_switch_are_refused(self, model):
        ids = torch.randint(0, 90, (1, 17), generator=torch.Generator().manual_seed(1))
        cache = StaticCache(config=model.config, max_cache_len=24)
        step = torch.compile(model, backend="eager")
        with torch.no_grad():
            for index in range(15):
                step(input_ids=ids[:, index, None], past_key_values=cache, position_ids=torch.tensor([[index]]))
            with pytest.raises(RuntimeError, match="LongRoPE changes the frequencies of what is cached"):
                step(input_ids=ids[:, 15, None], past_key_values=cache, position_ids=torch.tensor([[15]]))

    def test_a_void_cache_is_refused(self, goldens, golden_models):
        model = golden_models["golden-c"]
        ids = goldens["golden-c"]["generate.sequences"][:1]
        with torch.no_grad():
            cache = model(ids[:, :31], use_cache=True).past_key_values
            with pytest.raises(ValueError, match="at 32 tokens LongRoPE changes"):
                model(ids[:, 31:32], past_key_values=cache)

    def test_a_cache_beyond_the_switch_goes_on(self, goldens, golden_models):
        model = golden_models["golden-c"]
        ids = goldens["golden-c"]["generate.sequences"][:1]
        with torch.no_grad():
            whole = model(ids[:, :36]).logits
            cache = model(ids[:, :34], use_cache=True).past_key_values
            rest = model(ids[:, 34:36], past_key_values=cache).logits
        torch.testing.assert_close(rest, whole[:, 34:], atol=2e-4, rtol=0)

    @pytest.mark.parametrize("pads", [3, 15])
    def test_rows_with_more_padding_than_text_do_not_switch_early(self, goldens, golden_models, pads):
        """Padding is not text: a batch padded to beyond the original length is still short."""
        golden, model = goldens["golden-c"], golden_models["golden-c"]
        ids = golden.inputs["generate.input_ids"][:1, :20]
        padded = torch.nn.functional.pad(ids, (pads, 0))
        mask = torch.nn.functional.pad(torch.ones_like(ids), (pads, 0))
        options = {"max_new_tokens": 15, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), use_cache=False, **options)
        found = model.generate(padded, attention_mask=mask, **options)
        assert torch.equal(found[:, pads:], expected)

    @pytest.mark.parametrize("offset", [0, 8], ids=["counting padding", "beginning late"])
    def test_given_positions_decide_the_switch(self, goldens, golden_models, offset):
        """They reach the switch before the tokens do."""
        golden, model = goldens["golden-c"], golden_models["golden-c"]
        ids = golden.inputs["generate.input_ids"][:1]
        mask = torch.ones_like(ids)
        if not offset:
            ids, mask = (torch.nn.functional.pad(tensor, (5, 0)) for tensor in (ids, mask))
        positions = torch.arange(ids.shape[1])[None] + offset
        options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        runs = [
            model.generate(ids, attention_mask=mask, position_ids=positions, use_cache=use_cache, **options)
            for use_cache in (True, False)
        ]
        assert torch.equal(*runs)

    def test_a_prompt_of_embeddings_is_not_lost_at_the_switch(self, goldens, golden_models):
        """It cannot be computed again from ids, so going on is refused; short of the switch it works."""
        golden, model = goldens["golden-c"], golden_models["golden-c"]
        embeddings = model.get_input_embeddings()(golden.inputs["generate.input_ids"])
        options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        found = model.generate(inputs_embeds=embeddings, max_new_tokens=10, **options)
        assert torch.equal(found, golden["generate.sequences"][:, 22:32])
        with pytest.raises(ValueError, match="at 32 tokens LongRoPE changes"):
            model.generate(inputs_embeds=embeddings, max_new_tokens=20, **options)

    def test_speculation_up_to_the_switch_and_no_further(self, goldens, golden_models):
        """Candidates that are rejected would have decided the frequencies of the tokens that are kept."""
        golden, model = goldens["golden-c"], golden_models["golden-c"]
        ids = golden.inputs["generate.input_ids"][:1]
        options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "prompt_lookup_num_tokens": 3}
        found = model.generate(ids, max_new_tokens=10, **options)
        assert torch.equal(found, golden["generate.sequences"][:1, :32])
        for more in ({"max_new_tokens": 11}, {"max_length": 40}, {}):
            with pytest.raises(ValueError, match="speculative decoding with LongRoPE serves up to 32"):
                model.generate(ids, **options, **more)
        with pytest.raises(ValueError, match="speculative decoding"):
            model.generate(ids, assistant_model=model, max_new_tokens=20, do_sample=False)

    @pytest.mark.parametrize("name", ["cache", "past_key_values"])
    def test_the_users_cache_object_is_kept(self, goldens, golden_models, name):
        golden, model = goldens["golden-c"], golden_models["golden-c"]
        cache = DynamicCache(config=model.config)
        sequences = model.generate(
            golden.inputs["generate.input_ids"],
            max_new_tokens=20,
            **{name: cache},
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert torch.equal(sequences, golden["generate.sequences"])
        assert cache.get_seq_length() == sequences.shape[1] - 1


@pytest.mark.parametrize("name", ["golden-a", "golden-b"])
@pytest.mark.parametrize("way", ["embeddings", "prompt lookup", "assistant", "chunked prefill"])
def test_every_way_of_generating_gives_the_same_text(goldens, golden_models, name, way):
    golden, model = goldens[name], golden_models[name]
    ids = golden.inputs["generate.input_ids"][:1]
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    if way == "embeddings":
        found = model.generate(inputs_embeds=model.get_input_embeddings()(ids), **options)
        found = torch.cat([ids, found], dim=1)
    else:
        ways = {
            "prompt lookup": {"prompt_lookup_num_tokens": 3},
            "assistant": {"assistant_model": model},
            "chunked prefill": {"prefill_chunk_size": 3},
        }
        found = model.generate(ids, **options, **ways[way])
    assert torch.equal(found, golden["generate.sequences"][:1])


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_chunked_prefill_sees_the_whole_window(goldens, golden_models, name):
    """A cache that is filled in pieces gives what one pass gives, with a window shorter than the text."""
    golden, model = goldens["golden-b"], golden_models["golden-b"]
    ids = golden.inputs["plain.input_ids"]
    cache, pieces = DynamicCache(config=model.config), []
    with torch.no_grad():
        for start in range(0, ids.shape[1], 5):
            output = model(ids[:, start : start + 5], **{name: cache})
            assert getattr(output, CACHE) is cache
            pieces.append(output.logits)
    torch.testing.assert_close(torch.cat(pieces, 1), golden["plain.logits"], atol=2e-4, rtol=0)


class TestCacheByBothNames:
    IDS = torch.arange(4)[None]

    @pytest.fixture
    def filled(self, tiny_model):
        def make() -> DynamicCache:
            cache = DynamicCache(config=tiny_model().config)
            tiny_model()(self.IDS, past_key_values=cache)
            return cache

        return make

    def test_of_one_object_serves(self, tiny_model, filled):
        cache = filled()
        logits = tiny_model()(self.IDS, cache=cache, past_key_values=cache).logits
        assert torch.equal(logits, tiny_model()(self.IDS, past_key_values=filled()).logits)
        assert cache.get_seq_length() == 8

    @pytest.mark.parametrize("name", ["cache", "past_key_values"])
    def test_of_which_one_is_empty_starts_with_the_other(self, tiny_model, filled, name):
        model, empty = tiny_model(), DynamicCache(config=tiny_model().config)
        other = ({"cache", "past_key_values"} - {name}).pop()
        output = model(self.IDS, **{name: empty, other: filled()})
        assert torch.equal(output.logits, model(self.IDS, past_key_values=filled()).logits)
        assert getattr(output, CACHE) is empty and empty.get_seq_length() == 8

    @pytest.mark.parametrize("kind", ["both filled", "both empty", "window"])
    def test_that_cannot_be_one_is_refused(self, tiny_model, filled, kind):
        model = tiny_model()
        first, second = filled(), DynamicCache(config=model.config)
        if kind == "both filled":
            second = filled()
        elif kind == "both empty":
            first = DynamicCache(config=model.config)
        else:  # the window has dropped keys, which the other's positions would lack
            model(torch.arange(30)[None], past_key_values=first)
        with pytest.raises(ValueError, match="two names of one argument"):
            model(self.IDS, cache=first, past_key_values=second)


class TestPaddingBetweenTokens:
    """As PEFT's prompts have it before left-padded rows, without `position_ids`."""

    def test_takes_no_position(self, tiny_model):
        model = tiny_model(sliding_window=None)
        alone = torch.tensor([[5, 6, 7, 8, 9]])
        padded, mask = torch.tensor([[5, 6, 95, 95, 7, 8, 9]]), torch.tensor([[1, 1, 0, 0, 1, 1, 1]])
        expected = model(alone).logits
        torch.testing.assert_close(model(padded, attention_mask=mask).logits[:, [0, 1, 4, 5, 6]], expected)
        cache = DynamicCache(config=model.config)
        model(padded[:, :-1], attention_mask=mask[:, :-1], past_key_values=cache)
        last = model(padded[:, -1:], attention_mask=mask, past_key_values=cache).logits
        torch.testing.assert_close(last, expected[:, -1:])


@pytest.mark.parametrize("columns", [1, 3, 6])
def test_a_mask_of_another_length_than_the_tokens_is_refused(tiny_model, columns):
    model = tiny_model()
    cache = DynamicCache(config=model.config)
    model(torch.arange(4)[None], past_key_values=cache)
    with pytest.raises(ValueError, match=f"attention_mask has {columns} columns, but there are 5 tokens"):
        model(torch.arange(1)[None], attention_mask=torch.ones(1, columns), past_key_values=cache)


def test_a_cache_in_training_with_checkpointing_is_refused(tiny_model):
    """The recomputed layers would write to it a second time."""
    model = tiny_model().train()
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="pass no cache in training"):
        model(torch.arange(4)[None], past_key_values=DynamicCache(config=model.config))


def test_packed_sequences_do_not_see_each_other(tiny_model):
    model = tiny_model()
    first, second = torch.arange(5), torch.arange(20, 29)
    packed = torch.cat([first, second])[None]
    positions = torch.cat([torch.arange(5), torch.arange(9)])[None]
    with torch.no_grad():
        logits = model(packed, position_ids=positions, use_cache=False).logits
        torch.testing.assert_close(logits[:, :5], model(first[None]).logits, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(logits[:, 5:], model(second[None]).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "keep, positions",
    [(1, [-1]), (3, [-3, -2, -1]), (torch.tensor([0, 4]), [0, 4]), (torch.tensor([[0, 4], [0, 4]]), [0, 4])],
)
def test_logits_to_keep(tiny_model, keep, positions):
    model, ids = tiny_model(), torch.arange(12).view(2, 6)
    whole = model(ids).logits
    torch.testing.assert_close(model(ids, logits_to_keep=keep).logits, whole[:, positions])


def test_recorded_outputs(tiny_model):
    output = tiny_model()(
        torch.arange(12).view(2, 6), output_router_logits=True, output_hidden_states=True, output_attentions=False
    )
    assert [layer.shape for layer in output.router_logits] == [(12, 4)] * 2
    assert [layer.shape for layer in output.selected_experts] == [(12, 2)] * 2
    assert len(output.hidden_states) == 3
    base = tiny_model().model(torch.arange(6)[None], output_router_logits=True, output_selected_experts=True)
    assert len(base.router_logits) == len(base.selected_experts) == 2


def test_classification_reads_the_last_token_that_is_not_padding(tiny_config):
    torch.manual_seed(0)
    model = GrinMoeForSequenceClassification(tiny_config(num_labels=3)).eval()
    ids = torch.tensor([[5, 6, 7, 95, 95], [1, 2, 3, 4, 5]])
    mask = (ids != 95).long()
    logits = model(ids, attention_mask=mask, labels=torch.tensor([0, 2])).logits
    alone = model(torch.tensor([[5, 6, 7]])).logits
    torch.testing.assert_close(logits[:1], alone, atol=1e-5, rtol=1e-5)


class TestInput:
    def test_an_empty_prompt_is_refused(self, tiny_model):
        model = tiny_model()
        with pytest.raises(ValueError, match="empty prompt"):
            model(torch.empty(1, 0, dtype=torch.long))
        with pytest.raises(ValueError, match="empty prompt"):
            model.generate(torch.empty(1, 0, dtype=torch.long), max_new_tokens=2)

    def test_exactly_one_kind_of_input(self, tiny_model):
        model, ids = tiny_model(), torch.arange(4)[None]
        with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
            model()
        with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
            model(ids, inputs_embeds=model.get_input_embeddings()(ids))

    def test_a_long_prompt_warns_about_what_happens(self, tiny_model, caplog):
        model = tiny_model(max_position_embeddings=8)
        library = logging.getLogger("transformers")
        library.propagate = True
        try:
            from transformers.utils import logging as library_logging

            library_logging.warning_once.cache_clear()
            with caplog.at_level(logging.WARNING, logger="transformers"):
                model.generate(torch.arange(12)[None], max_new_tokens=1, do_sample=False)
        finally:
            library.propagate = False
        assert any("12 tokens" in message and "Nothing is cut off" in message for message in caplog.messages)


def test_a_copy_keeps_its_own_window(tiny_model):
    """deepcopy (EMA, reference models): masks of the copy follow the copy's config, attention switch included."""
    model = tiny_model(sliding_window=3)
    twin = copy.deepcopy(model)
    twin.set_attn_implementation("eager")
    assert twin.model.window_config._attn_implementation == "eager"
    assert model.model.window_config._attn_implementation != "eager"
    ids = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(twin(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)


def test_meta_device_initialisation_restores_rope(goldens):
    """from_pretrained builds on the meta device; RoPE's buffers are not in the checkpoint."""
    for name, buffers in {"golden-a": ["inv_freq"], "golden-c": ["inv_freq", "long_inv_freq"]}.items():
        loaded = goldens[name].load().model.rotary_emb
        built = GrinMoeModel(loaded.config).rotary_emb
        for buffer in buffers:
            assert torch.equal(getattr(loaded, buffer), getattr(built, buffer)), (name, buffer)


@pytest.mark.parametrize("name", ["golden-a", "golden-c"])
def test_casting_the_model_leaves_the_frequencies_exact(goldens, name):
    """model.to(bfloat16), as bf16_full_eval does it: the weights are bfloat16 already, so nothing may change."""
    golden = goldens[name]
    model, ids = golden.load(), torch.arange(300)[None]
    with torch.no_grad():
        expected = model(ids).logits
        found = model.to(torch.bfloat16).float()(ids).logits
    torch.testing.assert_close(found, expected)
    assert all(buffer.dtype == torch.float32 for buffer in model.model.rotary_emb.buffers())


def test_recorded_input_jitter_is_replayed_whatever_the_config_says(tiny_model):
    """Also in another dtype than it was recorded in."""
    block = tiny_model(input_jitter_noise=0.0).model.layers[0].block_sparse_moe.train()
    seen = []
    block.gate.register_forward_hook(lambda _, args, __: seen.append(args[0]))
    hidden_states, jitter = torch.ones(1, 3, 32), torch.rand(3, 32)
    noise = RoutingNoise(torch.ones(2, 3, 4), torch.zeros(2, 3, 1), jitter)
    block(hidden_states, noise)
    block.bfloat16()(hidden_states.bfloat16(), noise)
    assert torch.equal(seen[0], jitter) and torch.equal(seen[1], jitter.bfloat16())


def test_input_jitter_is_applied_once_and_not_in_place(tiny_model):
    """The block's input is multiplied once; the residual stream keeps the unjittered values."""
    block = tiny_model(input_jitter_noise=0.5).model.layers[0].block_sparse_moe.train()
    seen = {}
    block.gate.register_forward_hook(lambda _, args, __: seen.update(gate=args[0]))
    block.experts.register_forward_hook(lambda _, args, __: seen.update(experts=args[0]))
    hidden_states = torch.ones(1, 200, 32)
    block(hidden_states)
    assert torch.equal(hidden_states, torch.ones(1, 200, 32))
    assert torch.equal(seen["gate"], seen["experts"])
    assert 0.5 <= seen["gate"].min() < 0.55 and 1.45 < seen["gate"].max() <= 1.5


class TestFlashAttention:
    """Without its package: what Transformers would pass to it, and what its documented semantics make of that."""

    @staticmethod
    def like_flash(module, query, key, value, attention_mask, scaling, sliding_window, **kwargs):
        """Causal attention with flash-attn's window: query i sees keys i - left to i. No mask is given to it."""
        assert attention_mask is None
        length, groups = query.shape[2], module.num_key_value_groups
        options = _process_flash_attention_kwargs(
            length,
            length,
            is_causal=True,
            sliding_window=sliding_window,
            supports_mapping=collections.defaultdict(lambda: True),
        )
        left, _ = options["window_size"]
        distance = torch.arange(length)[:, None] - torch.arange(length)
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        scores = (query @ key.transpose(2, 3) * scaling).masked_fill((distance < 0) | (distance > left), float("-inf"))
        return (scores.softmax(-1) @ value).transpose(1, 2), None

    def test_it_gets_the_released_window(self, goldens):
        """(W, W) in its arguments, as in the released call: W + 1 visible keys."""
        golden = goldens["golden-b"]
        model = golden.load()
        AttentionInterface.register("given_window", self.like_flash)
        try:
            model.set_attn_implementation("given_window")
            with torch.no_grad():
                logits = model(golden.inputs["plain.input_ids"], use_cache=False).logits
        finally:
            del ALL_ATTENTION_FUNCTIONS._global_mapping["given_window"]
        torch.testing.assert_close(logits, golden["plain.logits"], **GOLDEN["logits"])

    def test_asking_for_it_without_the_package_says_so(self, tiny_config):
        with pytest.raises((ImportError, ValueError), match=r"[Ff]lash"):
            GrinMoeForCausalLM._from_config(tiny_config(), attn_implementation="flash_attention_2")


def test_model_whose_config_asks_for_tuples_returns_the_same_values(tiny_model):
    """Transformers' Mixtral cannot compute at all with such a config."""
    ids = torch.tensor([[1, 2, 3]])
    model = tiny_model()
    expected = model(ids, labels=ids, use_cache=False)
    model.config.return_dict = False
    with_tuple = model(ids, labels=ids, use_cache=False)
    assert isinstance(with_tuple, tuple)
    torch.testing.assert_close(with_tuple[:2], (expected.loss, expected.logits), rtol=0, atol=0)
    assert model.generate(ids, max_new_tokens=2, do_sample=False).shape == (1, 5)
