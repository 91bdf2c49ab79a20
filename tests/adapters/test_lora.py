"""LoRA on whole models: what is trained, the files, loading, and training with the Trainer and TRL."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
import warnings
from pathlib import Path

import peft
import pytest
import torch
from datasets import Dataset
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.helpers import rescale_adapter_scale
from peft.optimizers import create_lorafa_optimizer
from peft.tuners.lora import LoraLayer
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Trainer

from grinmoe import GrinMoeForCausalLM, GrinMoeForSequenceClassification
from grinmoe.adapters.expert_lora import ExpertLora
from grinmoe.adapters.lora import (
    AdapterError,
    GrinMoeLoraConfig,
    check_adapter,
    load_adapter,
    lora_config,
    read_lora_config,
    use_expert_lora,
)
from grinmoe.monitoring.callback import RoutingMonitor
from tests.tiny import training_arguments

IDS = torch.arange(24).view(2, 12)
FUSED = ["experts.gate_up_proj", "experts.down_proj"]
FORMS = {
    "all experts": {},
    "chosen experts": {"experts": [0, 3]},
    "shared A": {"shared_a": True},
}
EACH_FORM = pytest.mark.parametrize("form", FORMS)


@pytest.fixture
def tiny_model(tiny_model):
    """With a router that samples often: else an adapted one has no gradient in most steps."""
    return lambda **options: tiny_model(**{"router_jitter_noise": 0.5, **options})


@pytest.fixture
def adapted(tiny_model):
    """Factory of a tiny model with a LoRA that does something; `model` holds options of the model."""

    def make(model=None, **options) -> PeftModel:
        base = tiny_model(**(model or {}))
        return randomised(get_peft_model(base, lora_config(base, **{"r": 4, "router": True, **options})))

    return make


def randomised(model, seed: int = 1):
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def factors(model, part: str = "lora_") -> dict[str, torch.Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if part in name}


def layers(model) -> list[ExpertLora]:
    return [module for module in model.modules() if isinstance(module, ExpertLora)]


def step(model) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of a training step with draws that are always the same."""
    model.train().zero_grad()
    torch.manual_seed(5)
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


class TestWhatIsTrained:
    @pytest.mark.parametrize(
        "options, per_layer",
        [
            # H 32, I 24, E 4, r 4: A (r, 32) and (r, 24), B (48, r) and (32, r) an expert.
            ({}, 4 * 4 * (32 + 24 + 48 + 32)),
            ({"experts": [3, 0]}, 2 * 4 * (32 + 24 + 48 + 32)),
            ({"shared_a": True}, 4 * (32 + 24) + 4 * 4 * (48 + 32)),
            ({"experts": [1], "shared_a": True}, 4 * (32 + 24 + 48 + 32)),
            ({"experts": "none", "router": True}, 4 * (32 + 4)),
            ({"experts": "none", "attention": True}, 4 * (64 + 64 + 48 + 48)),
        ],
    )
    def test_no_more_factors_than_asked_for(self, tiny_model, options, per_layer):
        model = tiny_model()
        model = get_peft_model(model, lora_config(model, r=4, **{"attention": False, **options}))
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * per_layer

    @EACH_FORM
    def test_every_factor_gets_a_gradient_and_the_base_none(self, adapted, form):
        model = adapted(**FORMS[form])
        loss, gradients = step(model)
        assert loss.isfinite()
        assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients.values())
        assert gradients.keys() == factors(model).keys()
        assert len(layers(model)) == 4, "two weights in each of two layers"

    def test_a_new_adapter_changes_nothing(self, tiny_model):
        expected = tiny_model()(IDS).logits
        model = tiny_model()
        logits = get_peft_model(model, lora_config(model, router=True)).eval()(IDS).logits
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-6)  # other products, in another order

    def test_alpha_is_twice_the_rank_unless_it_is_given(self, tiny_config):
        assert (
            lora_config(tiny_config(), r=3).lora_alpha == 6 and lora_config(tiny_config(), r=3, alpha=3).lora_alpha == 3
        )

    @pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, dataclasses.replace])
    def test_the_configuration_survives_copies(self, tiny_model, copied):
        """Trainers copy it; a copy that forgot its layer class would compute by plain PEFT's without a word."""
        model = tiny_model()
        model = get_peft_model(model, copied(lora_config(model, r=2, experts=[1])))
        assert len(layers(model)) == 4 and all(layer.choices["default"].experts == (1,) for layer in layers(model))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"r": 0}, "r=0: the rank of LoRA must be at least 1"),
        ({"experts": [0, 4]}, r"experts=\[4\]: the model's experts are 0 to 3"),
        ({"experts": [-1]}, r"experts=\[-1\]: the model's"),
        ({"experts": []}, "not empty"),
        ({"experts": [1, 1]}, "different expert indices"),
        ({"experts": "some"}, "experts='some'; give 'all', or a list"),
        ({"experts": "none", "attention": False}, "nothing to adapt"),
        ({"experts": "none", "shared_a": True}, "there is no A to share"),
        ({"lora_dropout": 0.1}, "lora_dropout=0.1 with adapted experts"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' is not for fused experts"),
        ({"init_lora_weights": "pissa_niter_4", "experts": "none"}, "changes the base at random"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "copies of a layer share its weights"),
        ({"rank_pattern": {"experts": 8}}, "write 'experts.gate_up_proj', 'experts.down_proj'"),
        ({"alpha_pattern": {"block_sparse_moe.gate": 8}, "router": True}, "write 'gate.weight'"),
        ({"exclude_modules": ["experts"]}, r"exclude_modules=\['experts'\] names the experts"),
        ({"exclude_modules": r".*\.gate", "router": True}, "names the gate, which PEFT would adapt all the same"),
        ({"trainable_token_indices": {"lm_head": [1, 2]}}, "whose bias PEFT would drop"),
    ],
)
def test_wrong_options_say_what_is_right(tiny_config, options, message):
    with pytest.raises(ValueError, match=message):
        lora_config(tiny_config(), **options)


def test_a_model_without_our_experts_is_refused():
    with pytest.raises(ValueError, match="import grinmoe before the model is loaded"):
        lora_config(torch.nn.Linear(2, 2))


def test_tokens_of_a_tied_head_are_named_as_those_of_the_embeddings(tiny_config):
    tied = tiny_config(tie_word_embeddings=True, lm_head_bias=False)
    lora_config(tied, trainable_token_indices=[1, 2])
    with pytest.raises(ValueError, match="name embed_tokens"):
        lora_config(tied, trainable_token_indices={"lm_head": [1, 2]})
    with pytest.raises(ValueError, match="whose bias PEFT would drop"):
        lora_config(tiny_config(tie_word_embeddings=True, lm_head_bias=True), trainable_token_indices=[1, 2])


@pytest.mark.parametrize("options, per_layer", [({}, 8 + 4 + 2), ({"attention": False}, 4 + 2)])
def test_chosen_layers_hold_for_experts_and_router(tiny_model, options, per_layer):
    """PEFT has `layers_to_transform` for modules only."""
    model = tiny_model()
    model = get_peft_model(model, lora_config(model, router=True, layers_to_transform=[1], **options))
    assert len(factors(model)) == per_layer and all(".layers.1." in name for name in factors(model))


def test_attention_may_have_dropout(tiny_config):
    assert lora_config(tiny_config(), experts="none", lora_dropout=0.1).lora_dropout == 0.1


class TestFiles:
    @EACH_FORM
    def test_plain_peft_computes_the_same_from_them(self, adapted, tiny_model, tmp_path, form):
        model = adapted(**FORMS[form]).eval()
        model.save_pretrained(tmp_path)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            plain = PeftModel.from_pretrained(tiny_model(), tmp_path).eval()
        ignored = [str(one.message) for one in caught if "are ignored" in str(one.message)]
        assert len(ignored) == (form != "all experts"), "PEFT names what it does not know, and only there is something"
        assert not layers(plain)
        expected, found = model(IDS).logits, plain(IDS).logits
        assert (found - expected).abs().max() < 1e-5
        assert (expected - tiny_model()(IDS).logits).abs().max() > 1e-2

    def test_they_have_the_keys_and_shapes_of_plain_peft(self, adapted, tiny_model, tmp_path):
        options = lora_config(tiny_model().config, r=4, router=True)
        config = LoraConfig(
            r=4,
            target_modules=options.target_modules,
            target_parameters=options.target_parameters,
            task_type="CAUSAL_LM",
        )
        get_peft_model(tiny_model(), config).save_pretrained(tmp_path / "plain")
        adapted(experts=[2], shared_a=True).save_pretrained(tmp_path / "ours")
        plain, ours = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("plain", "ours"))
        assert {key: tensor.shape for key, tensor in plain.items()} == {
            key: tensor.shape for key, tensor in ours.items()
        }
        key = "base_model.model.model.layers.0.block_sparse_moe.experts.lora_B.weight"
        assert (ours[key].unflatten(1, (-1, 4))[..., [0, 1, 3]] == 0).all()

    @EACH_FORM
    def test_loading_is_bitwise_and_in_the_form_that_was_trained(self, adapted, tiny_model, tmp_path, form):
        model = adapted(**FORMS[form]).eval()
        model.save_pretrained(tmp_path)
        loaded = load_adapter(tiny_model(), tmp_path)
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)
        expected = factors(model)
        for name, parameter in factors(loaded).items():
            assert torch.equal(parameter, expected[name]) and not parameter.requires_grad
        again = load_adapter(tiny_model(), tmp_path, is_trainable=True)
        assert all(parameter.requires_grad for parameter in factors(again).values())
        again.save_pretrained(tmp_path / "again")
        files = [folder / "adapter_model.safetensors" for folder in (tmp_path, tmp_path / "again")]
        assert files[0].read_bytes() == files[1].read_bytes()

    def test_a_classifier_has_an_adapter_and_its_head(self, tiny_config, tmp_path):
        def build():
            torch.manual_seed(0)
            return GrinMoeForSequenceClassification(tiny_config(num_labels=3)).eval()

        model = build()
        model = randomised(get_peft_model(model, lora_config(model, r=2, task_type="SEQ_CLS"))).eval()
        model.save_pretrained(tmp_path)
        assert torch.equal(load_adapter(build(), tmp_path)(IDS).logits, model(IDS).logits)

    def test_what_plain_peft_made_is_taken_over(self, tiny_model, tmp_path):
        config = LoraConfig(r=4, target_modules=["q_proj"], target_parameters=FUSED, task_type="CAUSAL_LM")
        plain = randomised(get_peft_model(tiny_model(), config)).eval()
        expected = plain(IDS).logits
        trained = factors(plain)
        plain.save_pretrained(tmp_path)
        switched = use_expert_lora(plain)
        assert len(layers(switched)) == 4
        assert all(
            parameter is trained[name] and parameter.requires_grad for name, parameter in factors(switched).items()
        )
        loaded = load_adapter(tiny_model(), tmp_path)
        assert len(layers(loaded)) == 4
        for model in (switched, use_expert_lora(switched), loaded):
            assert (model(IDS).logits - expected).abs().max() < 1e-5
        step(switched)

    def test_there_must_be_something_to_take_over(self, tiny_model):
        model = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj"]))
        with pytest.raises(ValueError, match="no fused experts are adapted"):
            use_expert_lora(model)


class TestUnusableAdapters:
    """Each is refused before the model is touched."""

    @pytest.fixture
    def folder(self, adapted, tmp_path) -> Path:
        adapted().save_pretrained(tmp_path / "adapter")
        return tmp_path / "adapter"

    def refused(self, model, folder, message):
        with pytest.raises(AdapterError, match=message):
            load_adapter(model, folder)
        assert not any(".lora_" in name for name, _ in model.named_parameters())

    @pytest.mark.parametrize(
        "base, message",
        [
            ({"num_hidden_layers": 3}, "lacks 14 tensors"),
            ({"num_hidden_layers": 1}, "holds, beyond what its configuration names, 14 tensors"),
            ({"num_local_experts": 8}, r"with shape \(4, 4\), this base needs \(8, 4\)"),
            ({"intermediate_size": 40}, "another base"),
        ],
    )
    def test_of_another_base(self, tiny_model, folder, base, message):
        self.refused(tiny_model(**base), folder, message)

    def test_of_experts_that_the_base_does_not_have(self, adapted, tiny_model, tmp_path):
        adapted(experts=[3]).save_pretrained(tmp_path)
        self.refused(tiny_model(num_local_experts=2), tmp_path, r"experts=\[3\]: the model's experts are 0 to 1")

    @pytest.mark.parametrize(
        "change, message",
        [
            (lambda tensors: tensors.pop(sorted(tensors)[0]), "lacks 1 tensors, base_model"),
            (lambda tensors: tensors.update(extra=torch.zeros(1)), "1 tensors, extra first"),
        ],
    )
    def test_with_other_tensors(self, tiny_model, folder, change, message):
        tensors = load_file(folder / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")
        self.refused(tiny_model(), folder, message)

    def test_with_damaged_files(self, tiny_model, folder):
        weights = folder / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:100])
        self.refused(tiny_model(), folder, "truncated or not safetensors")
        weights.unlink()
        self.refused(tiny_model(), folder, "holds no adapter_model.safetensors")
        (folder / "adapter_model.bin").touch()
        self.refused(tiny_model(), folder, "only pickled weights")
        (folder / "adapter_config.json").write_text("{")
        self.refused(tiny_model(), folder, "is not JSON")
        (folder / "adapter_config.json").write_text('{"peft_type": "IA3"}')
        self.refused(tiny_model(), folder, "peft_type 'IA3'")
        (folder / "adapter_config.json").write_text("[]")
        self.refused(tiny_model(), folder, "holds a list, not a JSON object")
        self.refused(tiny_model(), folder / "nowhere", "holds no adapter_config.json")

    def test_a_name_that_is_taken(self, tiny_model, folder):
        model = load_adapter(tiny_model(), folder)
        with pytest.raises(AdapterError, match="named 'default' already"):
            load_adapter(model, folder)

    def test_another_name_of_the_base_is_said(self, tiny_model, folder):
        content = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**content, "base_model_name_or_path": "one"}))
        model = tiny_model()
        model.config._name_or_path = "other"
        with pytest.warns(UserWarning, match="was made for one, this base was loaded from other"):
            load_adapter(model, folder)

    def test_what_a_newer_peft_wrote_is_said_and_the_rest_read(self, adapted, tmp_path):
        adapted(experts=[1]).save_pretrained(tmp_path)
        content = json.loads((tmp_path / "adapter_config.json").read_text())
        (tmp_path / "adapter_config.json").write_text(json.dumps({**content, "from_the_future": 1}))
        with pytest.warns(UserWarning, match=r"\['from_the_future'\]"):
            assert read_lora_config(tmp_path).experts == [1]

    def test_of_resized_embeddings(self, tiny_model, tmp_path):
        """PEFT saves them with the adapter, so the base has to be resized too."""
        tiny_model().save_pretrained(tmp_path / "base")
        bases = [GrinMoeForCausalLM.from_pretrained(tmp_path / "base") for _ in range(3)]
        for base in bases[:2]:
            base.resize_token_embeddings(104)
        adapted = randomised(get_peft_model(bases[0], lora_config(bases[0], r=2))).eval()
        adapted.save_pretrained(tmp_path / "adapter")
        self.refused(bases[2], tmp_path / "adapter", r"call resize_token_embeddings\(104\) on the base first")
        assert torch.equal(load_adapter(bases[1], tmp_path / "adapter")(IDS).logits, adapted(IDS).logits)

    def test_the_check_needs_no_model(self, tiny_config, folder):
        assert isinstance(check_adapter(folder, GrinMoeForCausalLM, tiny_config()), GrinMoeLoraConfig)


class TestUse:
    def test_disabled_adapters_leave_the_base(self, adapted, tiny_model):
        model, expected = adapted().eval(), tiny_model()(IDS).logits
        with model.disable_adapter():
            assert torch.equal(model(IDS).logits, expected)
        assert not torch.equal(model(IDS).logits, expected)

    def test_adapters_take_turns(self, adapted, tmp_path):
        """Of different forms, on one base; and adding a second depends on the name that PEFT tells wrappers by."""
        first, second = adapted(), randomised(adapted(experts=[2], shared_a=True), seed=2)
        logits = [model.eval()(IDS).logits for model in (first, second)]
        second.save_pretrained(tmp_path)
        load_adapter(first, tmp_path, adapter_name="second")
        assert first.active_adapters == ["default"] and torch.equal(first(IDS).logits, logits[0])
        first.set_adapter("second")
        assert torch.equal(first(IDS).logits, logits[1])
        first.save_pretrained(tmp_path / "both", selected_adapters=["second"])
        saved = [folder / "adapter_model.safetensors" for folder in (tmp_path, tmp_path / "both" / "second")]
        assert saved[0].read_bytes() == saved[1].read_bytes()

    @EACH_FORM
    def test_decoding_with_a_cache_is_what_the_merged_model_says(self, adapted, form):
        model = adapted(**FORMS[form]).eval()
        options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 95, "eos_token_id": None}
        cached = model.generate(input_ids=IDS, **options)
        assert torch.equal(cached, model.generate(input_ids=IDS, use_cache=False, **options))
        assert torch.equal(cached, model.merge_and_unload().generate(input_ids=IDS, **options))

    def test_checkpointing_changes_nothing(self, adapted):
        model = adapted()
        loss, plain = step(model)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        loss_again, checkpointed = step(model)
        assert torch.equal(loss, loss_again)
        for name, gradient in plain.items():
            assert torch.equal(gradient, checkpointed[name]), name

    @pytest.mark.parametrize("model", [{"router_estimator": "sparsemixer_v2_printed"}, {"expert_dropout": 0.3}])
    def test_it_trains_as_the_model_does_otherwise(self, adapted, model):
        """With the loop and grouped products alike: an estimator that scales the experts' gradient, and dropout."""
        one = adapted(model=model)
        loss, gradients = step(one)
        expected_loss, expected = step(adapted())
        assert (loss != expected_loss) == ("expert_dropout" in model)
        if "expert_dropout" in model:
            assert layers(one)[0].experts.dropout_generator is not None, "seeded through the wrappers"
        changed = [name for name, gradient in gradients.items() if not torch.equal(gradient, expected[name])]
        assert changed
        if "router_estimator" in model:
            one.set_experts_implementation("eager")
            for name, gradient in step(one)[1].items():
                assert (gradient - gradients[name]).abs().max() <= 1e-5 * gradients[name].abs().max()

    @pytest.mark.parametrize("bits", [4, 8])
    def test_quantised_experts_are_adapted_in_place(self, adapted, tmp_path, bits):
        pytest.importorskip("bitsandbytes")
        from transformers import BitsAndBytesConfig

        sizes = {"hidden_size": 64, "intermediate_size": 64}
        adapted(model=sizes).get_base_model()  # of the same weights
        model = adapted(model=sizes)
        model.unload().save_pretrained(tmp_path / "base")
        quantised = GrinMoeForCausalLM.from_pretrained(
            tmp_path / "base",
            dtype=torch.float32,
            quantization_config=BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8),
        )
        assert not quantised.model.layers[0].block_sparse_moe.experts.down_proj.is_floating_point()
        quantised = randomised(get_peft_model(quantised, lora_config(quantised, r=4, attention=False, experts=[0, 1])))
        loss, gradients = step(quantised)
        assert loss.isfinite() and all(gradient.isfinite().all() for gradient in gradients.values())
        assert sum(gradient.abs().max() > 0 for gradient in gradients.values()) == len(gradients) == 8


class TestQuantisedExpertsUnderPlainPeft:
    """It would add its delta to their integer codes: in 8 bits the cast makes it zero, without an error."""

    @pytest.fixture
    def folders(self, adapted, tiny_model, tmp_path):
        """A base, and an adapter made for it."""
        pytest.importorskip("bitsandbytes")
        sizes = {"hidden_size": 64, "intermediate_size": 64}
        tiny_model(**sizes).save_pretrained(tmp_path / "base")
        adapter = adapted(model=sizes)
        adapter.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
        adapter.save_pretrained(tmp_path / "adapter")
        return tmp_path / "base", tmp_path / "adapter"

    @pytest.fixture(params=[8, 4])
    def bits(self, request):
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(load_in_8bit=request.param == 8, load_in_4bit=request.param == 4)

    @pytest.mark.parametrize(
        "load",
        [
            lambda base, adapter: get_peft_model(base, LoraConfig(target_modules=["q_proj"], target_parameters=FUSED)),
            lambda base, adapter: get_peft_model(base, LoraConfig(target_parameters=["experts.down_proj"])),
            PeftModel.from_pretrained,
            lambda base, adapter: base.load_adapter(adapter),
        ],
        ids=["new", "of one weight", "PeftModel", "load_adapter"],
    )
    def test_it_is_refused_when_it_wraps_them(self, folders, bits, load):
        model = GrinMoeForCausalLM.from_pretrained(folders[0], quantization_config=bits)
        before = model(IDS).logits
        with pytest.raises(ValueError, match=r"grinmoe.adapters.load_adapter.*lora_config"):
            load(model, folders[1])
        assert torch.equal(model(IDS).logits, before)

    @pytest.mark.parametrize("auto", [AutoModelForCausalLM, peft.AutoPeftModelForCausalLM])
    def test_the_folder_of_an_adapter_is_refused_too(self, folders, bits, auto):
        with pytest.raises(ValueError, match=r"grinmoe.adapters.load_adapter.*lora_config"):
            auto.from_pretrained(folders[1], quantization_config=bits)

    def test_ours_computes_what_it_does_on_the_dequantised_base(self, folders, bits):
        base, adapter = folders
        bits.llm_int8_skip_modules = ["self_attn"]  # whose 8-bit linears round activations
        model = load_adapter(GrinMoeForCausalLM.from_pretrained(base, quantization_config=bits), adapter)
        dense = GrinMoeForCausalLM.from_pretrained(base)
        for layer, quantised in zip(dense.model.layers, model.get_base_model().model.layers, strict=True):
            experts = quantised.block_sparse_moe.experts.get_base_layer()
            layer.block_sparse_moe.experts = experts.dense(torch.float32)
        without, expected = dense(IDS).logits, PeftModel.from_pretrained(dense, adapter)(IDS).logits
        assert (expected - without).abs().max() > 0.1
        for one in (model, use_expert_lora(model)):
            assert (one(IDS).logits - expected).abs().max() < 1e-5

    def test_experts_are_not_trained_whole(self, folders, bits):
        model = GrinMoeForCausalLM.from_pretrained(folders[0], quantization_config=bits)
        for entry in ("experts", "block_sparse_moe", "layers.0.block_sparse_moe"):
            with pytest.raises(ValueError, match=f"modules_to_save=.*'{entry}' holds quantised experts"):
                lora_config(model, experts="none", modules_to_save=[entry])
        get_peft_model(model, lora_config(model, modules_to_save=["lm_head"]))


class TestToolsOfPeft:
    """They write factors or scales from outside: the result is right, or an error says why not."""

    @EACH_FORM
    @pytest.mark.parametrize("r", [2, 4, 8])
    def test_hotswap_is_refused_before_it_writes(self, adapted, tmp_path, form, r):
        """It would copy factors of fewer or lower-ranked experts across the borders of experts, without an error."""
        model = adapted(**FORMS[form]).eval()
        randomised(adapted(r=r), seed=2).save_pretrained(tmp_path)
        before = model(IDS).logits
        with pytest.raises(ValueError, match="hotswap_adapter and LoRA-FA would mix experts"):
            hotswap_adapter(model, str(tmp_path), "default", torch_device="cpu")
        assert torch.equal(model(IDS).logits, before)

    def test_hotswap_is_refused_in_a_model_of_plain_peft_that_was_turned_into_ours(self, adapted, tiny_model, tmp_path):
        randomised(adapted(r=2), seed=2).save_pretrained(tmp_path / "other")
        adapted().save_pretrained(tmp_path / "first")
        model = use_expert_lora(PeftModel.from_pretrained(tiny_model(), tmp_path / "first").eval())
        before = model(IDS).logits
        with pytest.raises(ValueError, match="would mix experts"):
            hotswap_adapter(model, str(tmp_path / "other"), "default", torch_device="cpu")
        assert torch.equal(model(IDS).logits, before)

    @EACH_FORM
    def test_lora_fa_is_refused(self, adapted, form):
        with pytest.raises(ValueError, match="would mix experts"):
            create_lorafa_optimizer(adapted(**FORMS[form]), r=4, lora_alpha=8, lr=1e-3)

    @EACH_FORM
    def test_factors_of_another_shape_are_refused(self, adapted, form):
        model = adapted(**FORMS[form])
        factor = layers(model)[0].trained("lora_A", "default")
        factor.data = factor.data.repeat(2, 1)
        with pytest.raises(ValueError, match="something wrote other factors there"):
            model(IDS)
        if FORMS[form]:
            with pytest.raises(ValueError, match="something wrote other factors there"):
                model.state_dict()  # a file of it could not be loaded

    @EACH_FORM
    def test_scales_change_as_in_plain_peft(self, adapted, tiny_model, tmp_path, form):
        model = adapted(**FORMS[form]).eval()
        model.save_pretrained(tmp_path)
        plain = PeftModel.from_pretrained(tiny_model(), tmp_path).eval()
        unscaled = model(IDS).logits
        tuned = {one: [module for module in one.modules() if isinstance(module, LoraLayer)] for one in (model, plain)}
        for change, argument, back in (
            (LoraLayer.scale_layer, (0.5,), (0.5,)),
            (LoraLayer.set_scale, ("default", 0.5), ()),
        ):
            for modules in tuned.values():
                for module in modules:
                    getattr(module, change.__name__)(*argument)
            scaled = [one(IDS).logits for one in tuned]
            assert (scaled[0] - scaled[1]).abs().max() < 1e-5 and (scaled[0] - unscaled).abs().max() > 1e-2
            for modules in tuned.values():
                for module in modules:
                    module.unscale_layer(*back)
            assert torch.equal(model(IDS).logits, unscaled)
        with rescale_adapter_scale(model, 0.5):
            assert torch.equal(model(IDS).logits, scaled[0])
        assert torch.equal(model(IDS).logits, unscaled)

    @EACH_FORM
    def test_the_state_dict_of_plain_peft_is_loaded(self, adapted, form):
        model, other = adapted(**FORMS[form]).eval(), randomised(adapted(**FORMS[form]), seed=2).eval()
        set_peft_model_state_dict(model, get_peft_model_state_dict(other))
        assert torch.equal(model(IDS).logits, other(IDS).logits)

    @EACH_FORM
    def test_deleting_and_disabling_leave_the_other_adapter_or_the_base(self, adapted, tiny_model, tmp_path, form):
        model, second = adapted(**FORMS[form]).eval(), randomised(adapted(experts=[1, 2]), seed=2).eval()
        second.save_pretrained(tmp_path)
        load_adapter(model, tmp_path, adapter_name="second")
        model.set_adapter("second")
        model.delete_adapter("default")
        assert torch.equal(model(IDS).logits, second(IDS).logits)
        model.merge_adapter()
        with model.disable_adapter():
            torch.testing.assert_close(model(IDS).logits, tiny_model()(IDS).logits, rtol=0, atol=1e-5)

    def test_what_peft_does_not_do_for_experts_is_an_error(self, adapted, tmp_path):
        model = adapted().eval()
        randomised(adapted(), seed=2).save_pretrained(tmp_path)
        load_adapter(model, tmp_path, adapter_name="second")
        for combination in ("linear", "cat", "svd", "ties", "dare_linear", "magnitude_prune"):
            with pytest.raises(ValueError, match="add_weighted_adapter does not support"):
                model.add_weighted_adapter(
                    ["default", "second"], [0.5, 0.5], combination, combination_type=combination, density=0.5
                )
        with pytest.raises(ValueError, match="mixed adapter batches"):
            model(IDS, adapter_names=["default", "second"])


@pytest.fixture
def dataset():
    generator = torch.Generator().manual_seed(7)
    rows = torch.randint(0, 90, (16, 10), generator=generator)
    return [{"input_ids": row, "labels": row} for row in rows]


@EACH_FORM
def test_resume_is_bit_identical(adapted, dataset, tmp_path, form):
    """Weights and optimizer state of steps 3 and 4, from the checkpoint of step 2."""
    trainers = []
    for resume in (None, str(tmp_path / "checkpoint-2")):
        model = adapted(**FORMS[form])
        trainer = Trainer(
            model,
            training_arguments(tmp_path, per_device_train_batch_size=2, save_strategy="steps", save_steps=2),
            train_dataset=dataset,
        )
        trainer.train(resume_from_checkpoint=resume)
        trainers.append(trainer)
        if resume is None:
            shutil.rmtree(tmp_path / "checkpoint-4")
    whole, resumed = trainers
    assert len(resumed.state.log_history) == len(whole.state.log_history)
    expected = factors(whole.model)
    before = factors(adapted(**FORMS[form]))
    for name, parameter in factors(resumed.model).items():
        assert torch.equal(parameter, expected[name]) and not torch.equal(parameter, before[name]), name
    states = [trainer.optimizer.state_dict()["state"] for trainer in trainers]
    assert states[0].keys() == states[1].keys() and len(states[0]) == len(before)
    for key, state in states[0].items():
        assert all(torch.equal(value, states[1][key][name]) for name, value in state.items())


def test_the_balance_loss_and_the_monitor_see_an_adapted_router(adapted, dataset, tmp_path):
    model = adapted(model={"router_aux_loss_coef": 0.1})
    trainer = Trainer(
        model, training_arguments(tmp_path, per_device_train_batch_size=2, max_steps=2), train_dataset=dataset
    )
    monitor = RoutingMonitor().attach(trainer)
    trainer.train()
    assert len(monitor.records) == 2
    _, with_balance = step(model)
    model.config.router_aux_loss_coef = 0.0
    _, without = step(model)
    key = next(name for name in with_balance if "gate.lora_B" in name)
    assert not torch.equal(with_balance[key], without[key])


def test_trl_trains_it_from_its_configuration(tiny_model, tiny_tokenizer_folder, tmp_path):
    trl = pytest.importorskip("trl")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer_folder)
    tokenizer.pad_token = tokenizer.eos_token = tokenizer.convert_ids_to_tokens(95)
    model = tiny_model(vocab_size=320)
    options = training_arguments(tmp_path, per_device_train_batch_size=2).to_dict() | {"max_steps": 1, "max_length": 16}
    names = {field.name for field in dataclasses.fields(trl.SFTConfig) if field.init}
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(**{name: value for name, value in options.items() if name in names}),
        train_dataset=Dataset.from_list([{"text": "as you like it"}] * 4),
        processing_class=tokenizer,
        peft_config=lora_config(model, r=2, experts=[0, 1], shared_a=True),
    )
    before = {name: parameter.detach().clone() for name, parameter in factors(trainer.model).items()}
    trainer.train()
    assert len(layers(trainer.model)) == 4
    assert all(layer.choices["default"].shared_a for layer in layers(trainer.model))
    assert any(not torch.equal(parameter, before[name]) for name, parameter in factors(trainer.model, "lora_B").items())


def test_the_installed_peft_is_one_whose_interfaces_are_used():
    """`ParamWrapper`, its name, `_register_custom_module` and `update_layer(config=...)` are not public."""
    version = tuple(int(part) for part in peft.__version__.split(".")[:2])
    assert version >= (0, 21)
    assert ExpertLora.__name__ == "ParamWrapper" and ExpertLora.__qualname__ == "ExpertLora"
