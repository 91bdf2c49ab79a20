"""Every tuning method of PEFT on the attention and the head: what a fresh adapter, a saved one and `generate` compute.

A method that PEFT adds, or a wrapper that forgets a bias, shows here. The head has a bias and so has attention.
"""

from __future__ import annotations

import copy
import itertools

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model

from grinmoe import GrinMoeForSequenceClassification

IDS = torch.arange(14).view(2, 7)
PROMPTS = [[1, 2, 3, 4, 5, 6, 7], [30, 40, 50], [77, 3, 9, 12, 60]]
PAD, NEW_TOKENS = 95, 4
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "lm_head"]

# By configuration, the options that this size of a model needs.
WEIGHT_METHODS = {
    "AdaLoraConfig": {"total_step": 10},
    "AdamssConfig": {},
    "BOFTConfig": {"boft_block_size": 4},
    "BeftConfig": {},
    "C3AConfig": {"block_size": 8},
    "DeftConfig": {},
    "DeloraConfig": {},
    "FourierFTConfig": {"n_frequency": 10},
    "FrodConfig": {},
    "GloraConfig": {},
    "GraloraConfig": {"r": 8},
    "HRAConfig": {},
    "HiraConfig": {},
    "IA3Config": {"feedforward_modules": ["o_proj"]},
    "LNTuningConfig": {},
    "LilyConfig": {},
    "LoHaConfig": {},
    "LoKrConfig": {},
    "LoraConfig": {},
    "MissConfig": {"r": 8},
    "OFTConfig": {"oft_block_size": 4, "r": 0},
    "OSFConfig": {},
    "PeanutConfig": {},
    "PsoftConfig": {"r": 8},
    "PveraConfig": {},
    "RandLoraConfig": {},
    "RoadConfig": {"group_size": 8},
    "ShiraConfig": {"r": 2},
    "SupertuningConfig": {},
    "TinyLoraConfig": {},
    "UniLoraConfig": {},
    "VBLoRAConfig": {"num_vectors": 4, "vector_length": 8, "topk": 2},
    "VeraConfig": {},
    "WaveFTConfig": {"n_frequency": 10},
}
# A fresh adapter of these is drawn at random and changes the output, of any model.
RANDOM_FIRST = {"C3AConfig", "FourierFTConfig", "UniLoraConfig", "VBLoRAConfig"}
NOT_MERGED = {"LilyConfig"}  # PEFT says so
PROMPT_METHODS = {
    "CPTConfig": {"cpt_token_ids": [1, 2, 3, 4, 5], "cpt_mask": [1] * 5, "cpt_tokens_type_mask": [1, 2, 2, 3, 4]},
    "CartridgeConfig": {"num_virtual_tokens": 5},
    "MultitaskPromptTuningConfig": {"num_virtual_tokens": 5, "num_tasks": 2},
    "PrefixTuningConfig": {"num_virtual_tokens": 5},
    "PromptEncoderConfig": {"num_virtual_tokens": 5, "encoder_hidden_size": 16},
    "PromptTuningConfig": {"num_virtual_tokens": 5},
}
# Adaption prompts are refused by PEFT; the others need more than this model and a batch of text.
ELSEWHERE = {"AdaptionPromptConfig", "PolyConfig", "ShadowConfig", "TrainableTokensConfig", "XLoraConfig"}
OPTIONS = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": PAD}
EACH_PROMPT_METHOD = pytest.mark.parametrize("method", PROMPT_METHODS)


@pytest.fixture
def base(tiny_model):
    """Factory of a model in evaluation mode, whose biases and large weights matter."""

    def make(**options):
        model = tiny_model(**{"initializer_range": 0.2, "sliding_window": None, "router_jitter_noise": 0.5, **options})
        torch.manual_seed(9)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.3)
        return model

    return make


def tuned(model, method: str, seed: int | None = None, **options) -> PeftModel:
    """The model under a method of PEFT; with `seed`, every trained parameter is moved by random numbers."""
    torch.manual_seed(0)
    fields = {"task_type": "CAUSAL_LM", **(PROMPT_METHODS | WEIGHT_METHODS)[method], **options}
    if method in WEIGHT_METHODS:
        fields.setdefault("target_modules", MODULES)
    model = get_peft_model(model, getattr(peft, method)(**fields)).eval()
    if seed is not None:
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in trained(model).values():
                parameter.add_(torch.randn_like(parameter), alpha=1.0 if method in PROMPT_METHODS else 0.1)
    return model


def trained(model) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def tasks(method: str, rows: int) -> dict[str, torch.Tensor]:
    return {"task_ids": torch.zeros(rows, dtype=torch.long)} if method.startswith("Multitask") else {}


def logits(model, ids=IDS, **arguments) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids), **arguments).logits


def greedy(model, ids: torch.Tensor, **arguments) -> torch.Tensor:
    """New tokens, each from a forward over the whole text."""
    text = ids
    for _ in range(NEW_TOKENS):
        text = torch.cat([text, logits(model, text, **arguments)[:, -1:].argmax(-1)], dim=1)
    return text[:, ids.shape[1] :]


def left_padded() -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(map(len, PROMPTS))
    ids = torch.tensor([[PAD] * (longest - len(row)) + row for row in PROMPTS])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in PROMPTS])
    return ids, mask


def assert_every_gradient(model, **arguments) -> None:
    model.train()
    torch.manual_seed(5)
    model(input_ids=IDS, attention_mask=torch.ones_like(IDS), labels=IDS.clone(), **arguments).loss.backward()
    assert trained(model)
    for name, parameter in trained(model).items():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert any(parameter.grad.abs().max() > 0 for parameter in trained(model).values())


@pytest.mark.parametrize(
    "method",
    [pytest.param(one, marks=pytest.mark.integration) if one == "AdamssConfig" else one for one in WEIGHT_METHODS],
)
def test_method_on_weights(base, tmp_path, method):
    fresh = tuned(base(), method)
    moved = (logits(fresh) - logits(base())).abs().max()
    assert moved > 1e-3 if method in RANDOM_FIRST else moved < 1e-5
    assert_every_gradient(fresh)
    model = tuned(base(), method, seed=1)
    expected = logits(model)
    assert (expected - logits(base())).abs().max() > 1e-3
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(base(), tmp_path).eval()), expected)
    generated = model.generate(input_ids=IDS[:1], attention_mask=torch.ones_like(IDS[:1]), **OPTIONS)
    assert torch.equal(generated[:, IDS.shape[1] :], greedy(model, IDS[:1]))
    if method in NOT_MERGED:
        with pytest.raises(NotImplementedError):
            model.merge_and_unload()
    else:
        merged = logits(model.merge_and_unload())
        torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-4)


@EACH_PROMPT_METHOD
class TestMethodOfVirtualTokens:
    def test_trains_and_is_loaded_again(self, base, tmp_path, method):
        assert_every_gradient(tuned(base(), method), **tasks(method, 2))
        model = tuned(base(), method, seed=1)
        expected = logits(model, **tasks(method, 2))[:, -IDS.shape[1] :]
        assert (expected - logits(base())).abs().max() > 1e-2
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(base(), tmp_path).eval()
        torch.testing.assert_close(logits(loaded, **tasks(method, 2))[:, -IDS.shape[1] :], expected)

    def test_generates_what_whole_forwards_say(self, base, method):
        """With a cache and without one, in a batch of left-padded rows, by beams and by sampling."""
        model = tuned(base(), method, seed=1)
        rows = [torch.tensor([row]) for row in PROMPTS]
        expected = torch.cat([greedy(model, row, **tasks(method, 1)) for row in rows])
        assert not torch.equal(expected, torch.cat([greedy(base(), row) for row in rows]))
        ids, mask = left_padded()
        found = model.generate(input_ids=ids, attention_mask=mask, **OPTIONS, **tasks(method, 3))
        assert torch.equal(found[:, ids.shape[1] :], expected)
        one = {"input_ids": rows[0], "attention_mask": torch.ones_like(rows[0]), **tasks(method, 1)}
        for options in ({"use_cache": True}, {"use_cache": False}):
            assert torch.equal(model.generate(**one, **OPTIONS, **options)[:, 7:], expected[:1])
        beams = [model.generate(**one, **OPTIONS, num_beams=3, use_cache=cached) for cached in (True, False)]
        assert torch.equal(*beams)
        if not method.startswith("Multitask"):  # PEFT does not repeat the task ids
            sampling = {**OPTIONS, "do_sample": True, "top_k": 1, "num_return_sequences": 2}
            assert torch.equal(model.generate(**one, **sampling)[:, 7:], expected[:1].expand(2, -1))

    def test_with_a_window_shorter_than_the_text(self, base, method):
        model = tuned(base(sliding_window=5), method, seed=1)
        row = torch.tensor(PROMPTS[:1])
        found = model.generate(input_ids=row, attention_mask=torch.ones_like(row), **OPTIONS, **tasks(method, 1))
        assert torch.equal(found[:, 7:], greedy(model, row, **tasks(method, 1)))
        ids, mask = left_padded()
        with pytest.raises(ValueError, match="padding of rows that grow beyond the window of 6 keys"):
            model.generate(input_ids=ids, attention_mask=mask, **OPTIONS, **tasks(method, 3))

    def test_a_step_of_ones_own_is_refused_by_its_mask(self, base, method):
        """PEFT exchanges the cache for the prefix, or puts the prompt before the new token."""
        model = tuned(base(), method, seed=1)
        output = model(input_ids=IDS[:1], use_cache=True, **tasks(method, 1))
        with pytest.raises(ValueError, match="give a column for each"):
            model(
                input_ids=IDS[:1, :1],
                attention_mask=torch.ones(1, IDS.shape[1] + 1),
                past_key_values=output.past_key_values,
                **tasks(method, 1),
            )

    @pytest.mark.parametrize(
        "options, what",
        [
            ({"prompt_lookup_num_tokens": 2}, "speculative decoding"),
            ({"prefill_chunk_size": 3}, "prefill_chunk_size"),
            ({"cache_implementation": "static"}, "a static cache"),
            ({"past_key_values": None}, "a cache that is passed in"),
        ],
    )
    def test_what_would_lose_tokens_is_refused(self, base, method, options, what):
        model = tuned(base(), method, seed=1)
        if "past_key_values" in options:
            first = model.generate(input_ids=IDS[:1], return_dict_in_generate=True, **OPTIONS, **tasks(method, 1))
            options = {"past_key_values": first.past_key_values}
        with pytest.raises(ValueError, match=f"{what} does not go with PEFT's virtual tokens"):
            model.generate(input_ids=IDS[:1], **OPTIONS, **options, **tasks(method, 1))


@pytest.mark.parametrize(
    "part, module",
    [
        *itertools.product(
            ["modules_to_save", "target_modules"], ["embed_tokens", "lm_head", "input_layernorm", "gate"]
        ),
        ("modules_to_save", "experts"),  # LN tuning merges modules with one weight
    ],
)
def test_whole_modules_can_be_tuned(base, tmp_path, part, module):
    """By copies, which `modules_to_save` and LN tuning train: routing is recorded and dropout drawn in those too."""
    options = {"router_aux_loss_coef": 0.5, "expert_dropout": 0.3 if part == "modules_to_save" else 0.0}
    method = "LoraConfig" if part == "modules_to_save" else "LNTuningConfig"
    chosen = {part: [module]} | ({"target_modules": ["q_proj"]} if part == "modules_to_save" else {})
    expected_gradients = {}
    for model in (base(**options), tuned(base(**options), method, **chosen)):
        model.train()
        torch.manual_seed(5)
        model(input_ids=IDS, labels=IDS).loss.backward()
        for name, parameter in trained(model).items():
            plain = name.removeprefix("base_model.model.").replace("modules_to_save.default.", "")
            plain = plain.replace("ln_tuning_layers.default.", "")
            if plain in expected_gradients:
                torch.testing.assert_close(parameter.grad, expected_gradients.pop(plain), rtol=1e-4, atol=1e-6)
            elif not isinstance(model, PeftModel):
                expected_gradients[plain] = parameter.grad
    assert len(expected_gradients) < len(list(base().parameters()))
    assert not any(f".{module}." in f".{name}" for name in expected_gradients)
    model = tuned(base(**options), method, seed=1, **chosen)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(base(**options), tmp_path).eval()), logits(model))
    torch.testing.assert_close(logits(copy.deepcopy(model).merge_and_unload()), logits(model), rtol=1e-4, atol=1e-4)


class TestTrainableTokens:
    @pytest.mark.parametrize("head", [{}, {"tie_word_embeddings": True, "lm_head_bias": False}])
    @pytest.mark.parametrize("method", ["LoraConfig", "TrainableTokensConfig"])
    def test_of_the_embeddings_change_nothing_at_first(self, base, tmp_path, method, head):
        def make(seed=None):
            torch.manual_seed(0)
            options = {"token_indices": [1, 2]}
            if method == "LoraConfig":
                options = {"trainable_token_indices": [1, 2], "target_modules": ["q_proj"]}
            config = getattr(peft, method)(task_type="CAUSAL_LM", **options)
            model = get_peft_model(base(**head), config).eval()
            if seed is not None:
                for name, parameter in trained(model).items():
                    if "trainable_tokens" in name:
                        torch.nn.init.normal_(parameter)
            return model

        assert torch.equal(logits(make()), logits(base(**head)))
        model = make(seed=1)
        expected = logits(model)
        assert (expected - logits(base(**head))).abs().max() > 1e-2
        model.save_pretrained(tmp_path)
        torch.testing.assert_close(logits(PeftModel.from_pretrained(base(**head), tmp_path).eval()), expected)
        torch.testing.assert_close(logits(model.merge_and_unload()), expected, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize(
        "tokens, head, message",
        [
            ({"lm_head": [1, 2]}, {}, "with a bias, which they would drop"),
            ({"embed_tokens": [1, 2], "lm_head": [1, 2]}, {}, "with a bias, which they would drop"),
            ([1, 2], {"tie_word_embeddings": True, "lm_head_bias": True}, "with a bias, which they would drop"),
            ({"lm_head": [1]}, {"tie_word_embeddings": True, "lm_head_bias": False}, "name embed_tokens"),
        ],
    )
    def test_of_a_head_that_peft_computes_otherwise_are_refused(self, base, tokens, head, message):
        """By a configuration of plain PEFT too, which does not know the model."""
        config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], trainable_token_indices=tokens)
        model = get_peft_model(base(**head), config)
        with pytest.raises(ValueError, match=message):
            model(IDS)

    @pytest.mark.parametrize("module", ["lm_head", "o_proj"])
    def test_as_a_method_of_their_own_on_linear_layers_are_refused(self, base, module):
        config = peft.TrainableTokensConfig(task_type="CAUSAL_LM", token_indices=[1], target_modules=[module])
        with pytest.raises(ValueError, match="with a bias, which they would drop"):
            get_peft_model(base(), config)(IDS)


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0, 3.0, 4.0, 5.0],
    "original_max_position_embeddings": 16,
    "short_mscale": 1.1,
    "long_mscale": 1.3,
}


@pytest.mark.parametrize("method", ["PrefixTuningConfig", "PromptTuningConfig"])
def test_virtual_tokens_under_longrope_are_refused_where_its_factors_change(base, method):
    model = tuned(base(rope_parameters=LONGROPE), method, seed=1)
    row = torch.tensor(PROMPTS[:1])
    within = {**OPTIONS, "max_new_tokens": 3}
    generated = model.generate(input_ids=row, attention_mask=torch.ones_like(row), **within)
    assert torch.equal(generated[:, 7:], greedy(model, row)[:, :3])
    with pytest.raises(ValueError, match="changes the frequencies of all positions"):
        model.generate(input_ids=row, attention_mask=torch.ones_like(row), **{**OPTIONS, "max_new_tokens": 8})


def test_packed_samples_behind_a_prefix_are_refused(base):
    """They would see each other, which a cache hides from the library's masks."""
    model = tuned(base(), "PrefixTuningConfig", seed=1)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3]])
    with pytest.raises(ValueError, match="packed samples"):
        model(input_ids=IDS[:1], position_ids=positions)
    alone = model(input_ids=IDS[:1], position_ids=torch.arange(7)[None]).logits
    torch.testing.assert_close(alone, logits(model, IDS[:1]))


class TestClassifier:
    @pytest.fixture
    def classifier(self, tiny_config):
        def make():
            torch.manual_seed(0)
            return GrinMoeForSequenceClassification(tiny_config(initializer_range=0.2, num_labels=3)).eval()

        return make

    @pytest.mark.parametrize("method", ["PrefixTuningConfig", "PromptTuningConfig"])
    def test_padding_changes_no_class(self, classifier, method):
        model = tuned(classifier(), method, seed=1, task_type="SEQ_CLS")
        row = torch.tensor([[5, 6, 7, 8, 9]])
        expected = logits(model, row)
        assert (expected - logits(classifier(), row)).abs().max() > 1e-2
        for left in (True, False):
            padded = torch.tensor([[PAD, PAD, 5, 6, 7, 8, 9] if left else [5, 6, 7, 8, 9, PAD, PAD]])
            mask = (padded != PAD).long()
            if method == "PromptTuningConfig" and not left:
                continue  # Transformers reads the class of embeddings from the last position, and warns
            torch.testing.assert_close(model(input_ids=padded, attention_mask=mask).logits, expected)

    @pytest.mark.parametrize("method", ["PrefixTuningConfig", "PromptTuningConfig"])
    def test_its_virtual_tokens_train(self, classifier, method):
        model = tuned(classifier(), method, task_type="SEQ_CLS").train()
        model(input_ids=IDS, attention_mask=torch.ones_like(IDS), labels=torch.tensor([0, 2])).loss.backward()
        assert all(parameter.grad.abs().max() > 0 for parameter in trained(model).values())
