"""Computing with quantised experts: like a dense model of the same weights, forward, backward, and in training."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from transformers import BitsAndBytesConfig, Trainer, TrainingArguments

from grinmoe import GrinMoeForCausalLM, quantization_grinmoe
from grinmoe.modeling_grinmoe import GrinMoeExperts, GrinMoeExperts4bit, GrinMoeExperts8bit
from grinmoe.monitoring.callback import RoutingMonitor
from grinmoe.quantization_grinmoe import FUSED, _Int8Linear, quantize_model, quantize_rows, replace_experts
from tests.model.test_experts import ROUTINGS
from tests.tolerances import FAST_PATH_BFLOAT16, FAST_PATH_FLOAT32

bitsandbytes = pytest.importorskip("bitsandbytes")

METHODS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4 double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}
IDS = torch.arange(3, 15)[None]
SIZES = {"hidden_size": 64, "intermediate_size": 128}
every_method = pytest.mark.parametrize("method", METHODS)
two_methods = pytest.mark.parametrize("method", ["nf4 double", "int8"])


@pytest.fixture
def quantized_experts(tiny_config):
    """Factory of quantised experts with random weights."""

    def make(method: str, dtype=torch.float32, num_local_experts: int = 4, **options):
        torch.manual_seed(0)
        block = torch.nn.ModuleDict(
            {"experts": GrinMoeExperts(tiny_config(**SIZES, num_local_experts=num_local_experts))}
        )
        for parameter in block.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        block.to(dtype)
        replace_experts(block, BitsAndBytesConfig(**METHODS[method], **options))
        block["experts"].pack_all()
        assert not any(tensor.is_meta for tensor in block.state_dict().values())
        return block["experts"]

    return make


@pytest.fixture
def quantized_model(tiny_model):
    """Factory of a quantised model whose experts matter."""

    def make(method: str, **options) -> GrinMoeForCausalLM:
        return quantize_model(
            tiny_model(**SIZES, initializer_range=0.1, **options), BitsAndBytesConfig(**METHODS[method])
        )

    return make


def results(experts, selected, dtype=torch.float32):
    """Output, and the gradients of the input and of the routing weights."""
    torch.manual_seed(1)
    hidden_states = torch.randn(selected.shape[0], experts.hidden_dim).to(dtype).requires_grad_()
    weights = torch.rand(selected.shape).to(dtype).requires_grad_()
    output = experts(hidden_states, selected, weights)
    upstream = torch.randn(output.shape).to(dtype)
    return [output, *torch.autograd.grad((output * upstream).sum(), [hidden_states, weights])]


class TestExperts:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("routing", ROUTINGS)
    @every_method
    def test_they_match_dense_experts_of_the_same_weights(self, quantized_experts, method, routing, dtype):
        experts = quantized_experts(method, num_local_experts=8)
        dense = experts.dense(dtype)
        dense.config._experts_implementation = "eager"
        selected = ROUTINGS[routing](8)
        bound = FAST_PATH_FLOAT32 if dtype == torch.float32 else FAST_PATH_BFLOAT16
        for found, expected in zip(results(experts, selected, dtype), results(dense, selected, dtype), strict=True):
            assert found.dtype == expected.dtype == dtype
            assert (found - expected).abs().max() <= bound * expected.abs().max()

    @two_methods
    def test_choices_served_elsewhere_and_no_tokens_at_all(self, quantized_experts, method):
        experts = quantized_experts(method)
        output = experts(torch.ones(3, 64), torch.tensor([[0, 4], [4, 4], [3, 1]]), torch.ones(3, 2))
        assert (output[1] == 0).all() and (output[[0, 2]] != 0).any(dim=1).all()
        assert experts(torch.ones(0, 64), torch.empty(0, 2, dtype=torch.int64), torch.ones(0, 2)).shape == (0, 64)

    @two_methods
    def test_only_experts_with_tokens_are_unpacked_once_each_way(self, quantized_experts, method, monkeypatch):
        experts, unpacked = quantized_experts(method), []
        if method == "int8":
            unpack = quantization_grinmoe.dequantize_rows
            monkeypatch.setattr(
                quantization_grinmoe,
                "dequantize_rows",
                lambda codes, *others: unpacked.append(codes.data_ptr()) or unpack(codes, *others),
            )
        else:
            multiply = bitsandbytes.matmul_4bit
            monkeypatch.setattr(
                bitsandbytes,
                "matmul_4bit",
                lambda group, codes, **state: unpacked.append(codes.data_ptr()) or multiply(group, codes, **state),
            )
        expected = [getattr(experts, name)[expert].data_ptr() for expert in (0, 2) for name in FUSED]
        hidden_states = torch.randn(9, 64, requires_grad=True)
        output = experts(hidden_states, torch.tensor([[2, 0]]).expand(9, -1), torch.ones(9, 2))
        assert sorted(unpacked) == sorted(expected)
        output.sum().backward()
        assert sorted(unpacked) == sorted(expected * (2 if method == "int8" else 1))

    @two_methods
    def test_no_unpacked_weight_is_kept_for_the_backward(self, quantized_experts, method):
        experts, kept = quantized_experts(method), []
        hidden_states = torch.randn(4, 64, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            output = experts(hidden_states, torch.tensor([[2, 0]]).expand(4, -1), torch.ones(4, 2))
        nodes, seen = [output.grad_fn], set()
        while nodes:  # bitsandbytes keeps its own tensors on the node, where no hook sees them
            node = nodes.pop()
            if node is not None and node not in seen:
                seen.add(node)
                kept += [t for t in getattr(node, "tensors", ()) or () if isinstance(t, torch.Tensor)]
                nodes += [parent for parent, _ in node.next_functions]
        packed = [t for t in kept if not t.is_floating_point() and t.dtype != torch.int64]
        assert len(packed) == 2 * 2
        assert max(t.numel() for t in kept if t.is_floating_point()) < 64 * 128

    @every_method
    def test_one_expert_is_unpacked_alone(self, quantized_experts, method):
        experts = quantized_experts(method)
        dense = experts.dense(torch.float32)
        for name in FUSED:
            group = torch.randn(5, getattr(dense, name).shape[2])
            for expert, linear in enumerate(experts.linears(name)):
                weight = experts.dequantize(name, expert, torch.float32)
                assert torch.equal(weight, getattr(dense, name)[expert])
                torch.testing.assert_close(linear(group), group @ weight.t())

    def test_eight_bits_round_each_weight_to_the_nearest_code(self, quantized_experts):
        experts = quantized_experts("int8")
        weight = torch.randn(4, 64, 128)
        weight[1, 5] = 0
        packed = experts.pack("down_proj", weight)
        experts.install(packed)
        scale = weight.abs().amax(-1, keepdim=True) / 127
        assert packed["down_proj"].abs().amax(-1).unique().tolist() == [0, 127]
        error = (experts.dense(torch.float32).down_proj - weight).abs()
        assert (error <= scale * 0.5001).all() and (error[1, 5] == 0).all()

    def test_codes_under_a_parametrisation_are_refused(self, quantized_experts):
        """What it adds is cast to integers."""
        experts = quantized_experts("int8")
        torch.nn.utils.parametrize.register_parametrization(experts, "down_proj", torch.nn.Identity())
        with pytest.raises(ValueError, match=r"grinmoe.adapters.load_adapter.*lora_config"):
            experts(torch.ones(3, 64), torch.zeros(3, 2, dtype=torch.int64), torch.ones(3, 2))

    def test_weights_of_another_shape_are_refused(self, quantized_experts):
        with pytest.raises(
            ValueError, match=r"gate_up_proj has shape \(3, 256, 64\), the config makes it \(4, 256, 64\)"
        ):
            quantized_experts("nf4").pack("gate_up_proj", torch.zeros(3, 256, 64))

    def test_eight_bits_take_any_size(self, tiny_config):
        block = torch.nn.ModuleDict({"experts": GrinMoeExperts(tiny_config(intermediate_size=7))})
        for parameter in block.parameters():
            torch.nn.init.normal_(parameter)
        dense = copy.deepcopy(block["experts"])
        replace_experts(block, BitsAndBytesConfig(load_in_8bit=True))
        block["experts"].pack_all()
        for name in FUSED:
            torch.testing.assert_close(
                getattr(block["experts"].dense(torch.float32), name), getattr(dense, name), rtol=0, atol=0.02
            )


class TestDtypes:
    @two_methods
    def test_autocast_decides_before_anything_else(self, quantized_experts, method):
        experts = quantized_experts(method, bnb_4bit_compute_dtype=torch.float16)
        seen, gate = [], experts._apply_gate
        experts._apply_gate = lambda gate_up: seen.append(gate_up.dtype) or gate(gate_up)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output, *gradients = results(experts, ROUTINGS["spread"](4))
        assert set(seen) == {torch.bfloat16}
        assert output.dtype == torch.float32 and {g.dtype for g in gradients} == {torch.float32}

    @pytest.mark.parametrize(
        "asked, given, computed",
        [
            (torch.bfloat16, torch.float32, torch.bfloat16),
            (torch.float16, torch.bfloat16, torch.float16),
            (torch.float32, torch.bfloat16, torch.bfloat16),
            (None, torch.float32, torch.float32),
        ],
    )
    def test_a_compute_dtype_of_16_bits_is_used(self, quantized_experts, asked, given, computed):
        experts = quantized_experts("nf4", bnb_4bit_compute_dtype=asked)
        assert experts.linears("down_proj")[0](torch.ones(2, 128, dtype=given)).dtype == computed
        assert experts.linears("down_proj")[0](torch.ones(0, 128, dtype=given)).dtype == computed
        assert experts(torch.ones(2, 64, dtype=given), torch.zeros(2, 1, dtype=int), torch.ones(2, 1)).dtype == given

    @every_method
    def test_scales_keep_their_dtype_when_the_module_is_cast(self, quantized_experts, method):
        """Guards `Module._apply`, which torch documents as no more than an implementation detail."""
        experts = quantized_experts(method)
        before = {key: tensor.clone() for key, tensor in experts.state_dict().items()}
        experts.adapter = torch.nn.Linear(2, 2)
        for cast in (experts.bfloat16, experts.half, lambda: experts.to("cpu", torch.float64)):
            cast()
            assert all(
                torch.equal(tensor, before[key]) for key, tensor in experts.state_dict().items() if key in before
            )
        assert experts.adapter.weight.dtype == torch.float64, "what hangs on the experts is cast as ever"
        assert experts.to("meta").gate_up_proj.is_meta and all(buffer.is_meta for buffer in experts.buffers())


class TestStateDict:
    @two_methods
    def test_its_own_state_dict_is_taken_also_on_meta(self, quantized_experts, method):
        source, target = quantized_experts(method), quantized_experts(method)
        for tensor in target.state_dict().values():
            tensor.zero_()
        target.load_state_dict(source.state_dict())
        on_meta = quantized_experts(method).to("meta")
        on_meta.load_state_dict(source.state_dict(), assign=True)
        selected = ROUTINGS["spread"](4)
        for experts in (target, on_meta):
            assert torch.equal(results(experts, selected)[0], results(source, selected)[0])

    @pytest.mark.parametrize("strict", [True, False])
    @two_methods
    def test_full_precision_is_refused_and_changes_nothing(self, quantized_experts, method, strict):
        experts = quantized_experts(method)
        before = {key: tensor.clone() for key, tensor in experts.state_dict().items()}
        fused = {name: getattr(experts.dense(torch.float32), name) for name in FUSED}
        official = {"0.w1.weight": torch.ones(128, 64)}
        for state_dict in (fused, official):
            with pytest.raises(RuntimeError, match="quantised.*quantization_config="):
                experts.load_state_dict(state_dict, strict=strict)
        assert all(torch.equal(tensor, before[key]) for key, tensor in experts.state_dict().items())

    @pytest.mark.parametrize("lost", ["gate_up_proj", "scales"])
    @two_methods
    def test_codes_and_scales_are_taken_together(self, quantized_experts, method, lost):
        experts = quantized_experts(method)
        before = {key: tensor.clone() for key, tensor in experts.state_dict().items()}
        kept = FUSED if lost == "scales" else before.keys() - {lost}
        others = {key: before[key] + 1 for key in kept}
        with pytest.raises(RuntimeError, match="gate_up_proj.*which are not there"):
            experts.load_state_dict(others, strict=False)
        assert all(torch.equal(tensor, before[key]) for key, tensor in experts.state_dict().items())
        experts.load_state_dict({}, strict=False)

    @pytest.mark.parametrize("other", ["fp4", "nf4 double", "int8"])
    def test_codes_of_another_kind_are_refused(self, quantized_experts, other):
        experts = quantized_experts("nf4")
        before = {key: tensor.clone() for key, tensor in experts.state_dict().items()}
        with pytest.raises(RuntimeError, match="quantised"):
            experts.load_state_dict(quantized_experts(other).state_dict(), strict=False)
        assert all(torch.equal(tensor, before[key]) for key, tensor in experts.state_dict().items())

    @pytest.mark.parametrize("strict", [True, False])
    @every_method
    def test_a_model_takes_the_state_dict_of_another(self, quantized_model, method, strict):
        source, target = quantized_model(method), quantized_model(method, seed=1)
        if method != "int8":
            target(IDS)  # bitsandbytes' own 8-bit linears take none after a forward, and say so
        state_dict = source.state_dict()
        target.load_state_dict(state_dict, strict=strict)
        expected = source(IDS).logits
        assert torch.equal(target(IDS).logits, expected)
        for tensor in target.state_dict().values():
            tensor.zero_()
        assert torch.equal(source(IDS).logits, expected), "they share no memory"

    def test_linears_do_not_take_4_bit_codes_without_scales(self, quantized_model):
        source, target = quantized_model("nf4"), quantized_model("nf4", seed=1)
        before = target(IDS).logits
        key = "model.layers.0.self_attn.q_proj.weight"
        with pytest.raises(RuntimeError, match=f"{key} .* scales"):
            target.load_state_dict({key: source.state_dict()[key]}, strict=False)
        assert torch.equal(target(IDS).logits, before)


class TestModel:
    def test_other_implementations_have_no_effect_and_say_so(self, quantized_model, caplog):
        model, inputs = quantized_model("int8"), torch.arange(8)[None]
        expected = model(inputs).logits
        logger = logging.getLogger("transformers")
        logger.addHandler(caplog.handler)
        try:
            for implementation in ("eager", "batched_mm", "grouped_mm"):
                model.set_experts_implementation(implementation)
                assert torch.equal(model(inputs).logits, expected)
            assert "experts_implementation" not in caplog.text
            model.set_experts_implementation("grinmoe_cpu")
            assert torch.equal(model(inputs).logits, expected)
        finally:
            logger.removeHandler(caplog.handler)
        assert "experts_implementation='grinmoe_cpu' has no effect on quantised experts" in caplog.text

    @two_methods
    def test_generate_gives_what_the_logits_say(self, quantized_model, method):
        model = quantized_model(method)
        generated = model.generate(torch.arange(5)[None], max_new_tokens=6, do_sample=False, eos_token_id=None)
        with torch.no_grad():
            logits = (
                model.dequantize()(generated[:, :-1]).logits if method != "int8" else model(generated[:, :-1]).logits
            )
        assert generated.shape == (1, 11) and torch.equal(logits[0, 4:].argmax(-1), generated[0, 5:])

    def test_compiling_is_an_error_that_names_a_way(self, quantized_model):
        torch.compiler.reset()  # what failed to compile before hides the reason
        model = torch.compile(quantized_model("nf4"), backend="eager", fullgraph=True)
        with pytest.raises(Exception, match="compile model.dequantize()"):
            model(torch.arange(4)[None])

    def test_the_balance_loss_is_that_of_the_dense_model(self, quantized_model):
        model = quantized_model("nf4", router_aux_loss_coef=0.1)
        batch = {"input_ids": torch.arange(12).view(2, 6), "labels": torch.arange(12).view(2, 6)}
        outputs = []
        for each in (model, copy.deepcopy(model).dequantize()):
            each.train().requires_grad_(False)
            gate = each.model.layers[0].block_sparse_moe.gate.weight.requires_grad_()
            out = each(**batch, routing_seed=5, output_router_logits=True)
            out.loss.backward()
            outputs.append([out.loss, out.aux_loss, gate.grad])
        for found, expected in zip(*outputs, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)

    def test_linears_give_gradients_after_an_evaluation(self, quantized_model):
        """On CPUs with AVX512-BF16 they would not; that this attribute is what decides it is bitsandbytes' internal."""
        assert hasattr(bitsandbytes.nn.Linear4bit(64, 64), "support_avx512bf16_for_cpu"), (
            "it has moved: look at it anew"
        )
        model = quantized_model("nf4")
        with torch.no_grad():
            expected = model(torch.arange(6)[None]).logits
        linears = [module for module in model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
        assert len(linears) == 8 and not any(module.support_avx512bf16_for_cpu for module in linears)
        hidden_states = torch.randn(3, 64, requires_grad=True)
        linears[0](hidden_states).sum().backward()
        assert hidden_states.grad.abs().min() > 0
        torch.testing.assert_close(model.dequantize()(torch.arange(6)[None]).logits, expected)


def with_lora(model, gradient_checkpointing: bool):
    """The model as PEFT's documentation prepares it, with LoRA on attention."""
    peft = pytest.importorskip("peft")
    options = {"gradient_checkpointing_kwargs": {"use_reentrant": False}} if gradient_checkpointing else {}
    model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=gradient_checkpointing, **options)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    torch.manual_seed(0)
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))


class TestTraining:
    @two_methods
    def test_lora_trains_on_the_frozen_quantised_model(self, quantized_model, method):
        """With and without checkpointing: the same losses, which fall, and not a bit of the base changes."""
        curves = []
        for gradient_checkpointing in (False, True):
            model = with_lora(quantized_model(method), gradient_checkpointing).train()
            assert isinstance(model.base_model.model.model.layers[0].self_attn.q_proj.base_layer, torch.nn.Linear)
            experts = [m for m in model.modules() if isinstance(m, (GrinMoeExperts4bit, GrinMoeExperts8bit))]
            before = [{key: t.clone() for key, t in module.state_dict().items()} for module in experts]
            trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
            assert len(trained) == 2 * 4 * 2 and all("lora_" in name for name in trained)
            optimizer = torch.optim.Adam(trained.values(), lr=0.01)
            batch = torch.arange(24).view(2, 12)
            curve = []
            for _ in range(5):
                loss = model(input_ids=batch, labels=batch, routing_seed=1).loss
                loss.backward()
                assert all(p.grad is not None for p in trained.values())
                optimizer.step()
                optimizer.zero_grad()
                curve.append(loss.item())
            curves.append(curve)
            assert len(experts) == 2
            for module, state in zip(experts, before, strict=True):
                assert all(torch.equal(t, state[key]) for key, t in module.state_dict().items())
            assert all((p.detach() != 0).any() for p in trained.values())
        assert curves[0][-1] < curves[0][0] - 0.1
        assert curves[0] == pytest.approx(curves[1], rel=1e-5)

    def test_the_trainer_resumes_and_the_monitor_counts(self, quantized_model, tmp_path):
        """Adapters after 4 steps, in one go and stopped after 2: equal, bit for bit."""
        rows = [{"input_ids": list(range(i, i + 8)), "labels": list(range(i, i + 8))} for i in range(16)]

        def trained(folder: str, steps: int, resume: bool | str = False):
            model = with_lora(quantized_model("nf4 double", router_aux_loss_coef=0.01), gradient_checkpointing=False)
            arguments = TrainingArguments(
                str(tmp_path / folder),
                max_steps=steps,
                per_device_train_batch_size=2,
                save_steps=2,
                logging_steps=1,
                lr_scheduler_type="constant",
                learning_rate=1e-2,
                report_to=[],
                disable_tqdm=True,
                use_cpu=True,
            )
            trainer = Trainer(model, arguments, train_dataset=rows)
            RoutingMonitor().attach(trainer)
            trainer.train(resume_from_checkpoint=resume)
            assert any(key.startswith("routing/") for entry in trainer.state.log_history for key in entry)
            return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

        straight = trained("straight", 4)
        trained("stopped", 2)
        assert not (tmp_path / "stopped" / "checkpoint-2" / "model.safetensors").exists(), "adapters alone are saved"
        resumed = trained("stopped", 4, resume=str(tmp_path / "stopped" / "checkpoint-2"))
        assert straight.keys() == resumed.keys() and len(straight) == 16
        assert all(torch.equal(straight[name], resumed[name]) for name in straight)


def test_int8_product_has_backward_derivatives_of_every_order():
    codes, scale = quantize_rows(torch.randn(6, 4))
    group = torch.randn(3, 4, dtype=torch.double, requires_grad=True)

    def product(group):
        return _Int8Linear.apply(group, codes, scale.double()).tanh()

    assert torch.autograd.gradcheck(product, (group,)) and torch.autograd.gradgradcheck(product, (group,))
    alone = [torch.func.grad(lambda x: product(x).sum())(row[None]) for row in group.detach()]
    together = torch.func.vmap(torch.func.grad(lambda x: product(x[None]).sum()))(group.detach())
    torch.testing.assert_close(together, torch.cat(alone))


@every_method
def test_forward_mode_follows_quantised_experts(quantized_experts, method):
    """bitsandbytes' own products lose the tangent without an error where nothing requires a gradient."""
    experts = quantized_experts(method).requires_grad_(False)
    choices, weights = ROUTINGS["spread"](experts.num_experts), torch.rand(40, 2)
    hidden_states, direction = torch.randn(2, 40, experts.hidden_dim)

    def total(hidden_states):
        return experts(hidden_states, choices, weights).sum()

    forward = torch.func.jvp(total, (hidden_states,), (direction,))[1]
    leaf = hidden_states.clone().requires_grad_()
    total(leaf).backward()
    torch.testing.assert_close(forward, (leaf.grad * direction).sum(), rtol=1e-3, atol=1e-3)
