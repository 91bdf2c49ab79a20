"""Training with the Trainer: exact resume, gradient accumulation, checkpointing, and the balance loss in all of them."""

from __future__ import annotations

import functools

import peft
import pytest
import torch
from transformers import Trainer

from grinmoe import GrinMoeForCausalLM, GrinMoeForSequenceClassification, modeling_grinmoe
from grinmoe.balance_grinmoe import load_balancing_loss
from grinmoe.routing_grinmoe import ESTIMATORS, RoutingNoise, draw_routing_noise, route
from tests.tiny import training_arguments

SEQUENCE = 12


@pytest.fixture
def dataset():
    generator = torch.Generator().manual_seed(7)
    rows = torch.randint(0, 90, (32, SEQUENCE), generator=generator)
    return [{"input_ids": row, "labels": row} for row in rows]


def train(model, dataset, folder, resume=None, **overrides) -> Trainer:
    arguments = training_arguments(folder, **overrides)
    trainer = Trainer(model=model, args=arguments, train_dataset=dataset, eval_dataset=dataset[:4])
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.fixture
def greedy_routing(monkeypatch):
    """Training without sampling, where runs with different batch shapes are to be compared exactly."""

    def evaluate(router_logits, top_k, jitter_eps, training, *args, **kwargs):
        return route(router_logits, top_k, jitter_eps, False)

    monkeypatch.setattr(modeling_grinmoe, "route", evaluate)


@pytest.fixture
def repeated_draws(monkeypatch):
    """Sampled routing with the same draws for every row of a batch, so that batches can be cut by rows."""

    def with_draws(router_logits, top_k, jitter_eps, training, *args, layer=None, generator=None, **kwargs):
        one = draw_routing_noise(router_logits[:SEQUENCE], top_k, torch.Generator().manual_seed(layer))
        rows = len(router_logits) // SEQUENCE
        noise = RoutingNoise(one.exponential.repeat(1, rows, 1), one.uniform.repeat(1, rows, 1))
        return route(router_logits, top_k, jitter_eps, training, noise, *args[1:], layer=layer, **kwargs)

    monkeypatch.setattr(modeling_grinmoe, "route", with_draws)


@pytest.mark.parametrize(
    "estimator, checkpointing",
    [
        ("sparsemixer_v2", False),
        ("topk", True),
        *(pytest.param(name, True, marks=pytest.mark.integration) for name in ESTIMATORS if name != "topk"),
    ],
)
def test_resume_is_bit_identical(tiny_model, dataset, tmp_path, estimator, checkpointing):
    """Sampled routing, input jitter and dropout included: 2 steps, a stop and 2 more are 4 steps."""
    options = {
        "gradient_checkpointing": checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
    }
    build = functools.partial(
        tiny_model,
        router_jitter_noise=0.2,
        router_aux_loss_coef=0.01,
        hidden_dropout=0.1,
        expert_dropout=0.1,
        router_aux_loss_scope="global",
        router_estimator=estimator,
        router_z_loss_coef=0.01,
    )
    straight = train(build(), dataset, tmp_path / "straight", **options).model
    first = train(build(), dataset, tmp_path / "half", save_strategy="steps", save_steps=2, **options)
    stale = build(seed=99)
    resumed = train(stale, dataset, tmp_path / "half", resume=str(tmp_path / "half" / "checkpoint-2"), **options).model
    for (name, a), b, c in zip(
        straight.state_dict().items(), resumed.state_dict().values(), first.model.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b) and torch.equal(a, c), name


def test_sharded_checkpoints_resume_too(tiny_model, dataset, tmp_path):
    """Experts split over shards are put together again."""
    straight = train(tiny_model(), dataset, tmp_path / "straight", save_strategy="steps", save_steps=2)
    folder = tmp_path / "straight" / "checkpoint-2"
    GrinMoeForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 5 and not (folder / "model.safetensors").exists()
    resumed = train(tiny_model(seed=9), dataset, tmp_path / "resumed", resume=str(folder))
    for a, b in zip(straight.model.state_dict().values(), resumed.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_the_best_model_is_loaded_at_the_end(tiny_model, dataset, tmp_path):
    trainer = train(
        tiny_model(),
        dataset,
        tmp_path,
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=True,  # the worst, so that it is not the last one
    )
    best = trainer.state.best_model_checkpoint
    assert best is not None and not best.endswith("checkpoint-4")
    expected = GrinMoeForCausalLM.from_pretrained(best).state_dict()
    assert all(torch.equal(expected[name], tensor) for name, tensor in trainer.model.state_dict().items())


@pytest.mark.parametrize("coefficient", [0.0, 1.0])
@pytest.mark.parametrize("scope", ["released", "local"])
def test_accumulation_does_not_change_the_step(tiny_model, tmp_path, greedy_routing, scope, coefficient):
    """GA 1 and GA 4 over the same rows: same loss, same gradients. Rows alike, so that the pooled balance loss is theirs."""
    row = torch.randint(0, 90, (SEQUENCE,), generator=torch.Generator().manual_seed(1))
    rows = [{"input_ids": row, "labels": row}] * 4
    found = {}
    for accumulation in (1, 4):
        model = tiny_model(input_jitter_noise=0.0, router_aux_loss_coef=coefficient, router_aux_loss_scope=scope)
        gradients = {}
        for name, parameter in model.named_parameters():
            parameter.register_post_accumulate_grad_hook(
                lambda p, name=name, gradients=gradients: gradients.__setitem__(name, p.grad.clone())
            )
        trainer = train(
            model,
            rows,
            tmp_path / str(accumulation),
            max_steps=1,
            per_device_train_batch_size=4 // accumulation,
            gradient_accumulation_steps=accumulation,
            max_grad_norm=0.0,
        )
        found[accumulation] = trainer.state.log_history[0]["loss"], gradients
    assert found[1][0] == pytest.approx(found[4][0], rel=1e-5)
    assert found[1][1].keys() == found[4][1].keys()
    for name, gradient in found[1][1].items():
        torch.testing.assert_close(found[4][1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


# The baseline is of the tokens of one forward, so it is the one estimator that depends on how a batch is cut.
@pytest.mark.parametrize("estimator", [name for name in ESTIMATORS if name != "sparsemixer_centred"])
def test_accumulation_does_not_change_the_estimate(tiny_model, dataset, tmp_path, repeated_draws, estimator):
    """Sampled routing: the router's and all other gradients of GA 1 and GA 4, within float32 rounding."""
    found = []
    for accumulation in (1, 4):
        model = tiny_model(input_jitter_noise=0.0, router_estimator=estimator, router_jitter_noise=0.4)
        gradients = {}
        for name, parameter in model.named_parameters():
            parameter.register_post_accumulate_grad_hook(
                lambda p, name=name, gradients=gradients: gradients.__setitem__(name, p.grad.clone())
            )
        train(
            model,
            dataset[:4],
            tmp_path / str(accumulation),
            max_steps=1,
            per_device_train_batch_size=4 // accumulation,
            gradient_accumulation_steps=accumulation,
            max_grad_norm=0.0,
        )
        found.append(gradients)
    assert found[0]["model.layers.0.block_sparse_moe.gate.weight"].abs().max() > 0
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_accumulated_loss_is_the_token_mean_plus_the_weighted_balance_loss(tiny_model, dataset, greedy_routing):
    """Micro-batches of different lengths: each counts by its share of the step's target tokens."""
    model = tiny_model(input_jitter_noise=0.0, router_aux_loss_coef=0.5).train()
    batches = [torch.stack([row["input_ids"] for row in dataset[start : start + 4]]) for start in (0, 4)]
    labels = [batches[0].clone(), batches[1].clone()]
    labels[1][:, :8] = -100
    counts = [int((label[:, 1:] != -100).sum()) for label in labels]
    items = torch.tensor(sum(counts))
    parts = [
        model(input_ids=ids, labels=label, num_items_in_batch=items, output_router_logits=True)
        for ids, label in zip(batches, labels, strict=True)
    ]
    alone = [model(input_ids=ids, labels=label).loss for ids, label in zip(batches, labels, strict=True)]
    expected = sum(count * loss for count, loss in zip(counts, alone, strict=True)) / items
    torch.testing.assert_close(sum(part.loss for part in parts), expected)


def test_the_balance_loss_trains_the_router_without_being_asked_for_logits(tiny_model, dataset):
    batch = torch.stack([row["input_ids"] for row in dataset[:4]])
    torch.manual_seed(0)
    quiet = tiny_model(router_aux_loss_coef=1.0).train()
    output = quiet(input_ids=batch, labels=batch)
    assert output.router_logits is None and output.aux_loss is not None
    torch.manual_seed(0)
    output_plain = tiny_model(router_aux_loss_coef=0.0).train()(input_ids=batch, labels=batch)
    assert output_plain.aux_loss is None
    assert output.loss > output_plain.loss
    # Evaluation reports the language loss alone, so that perplexity is one.
    quiet.eval()
    evaluated = quiet(input_ids=batch, labels=batch)
    assert evaluated.aux_loss is None
    with_logits = quiet(input_ids=batch, labels=batch, output_router_logits=True)
    torch.testing.assert_close(with_logits.loss, evaluated.loss + with_logits.aux_loss)


@pytest.mark.parametrize(
    "scope, estimator",
    [("released", "sparsemixer_v2"), ("local", "sparsemixer_v2"), *(("global", name) for name in ESTIMATORS)],
)
@pytest.mark.parametrize("keep_rng_state", [True, False])
def test_checkpointing_changes_nothing(tiny_model, dataset, scope, estimator, keep_rng_state):
    """Same draws, same loss, same gradients, the router's share of the balance loss included.

    The draws do not need torch's generator to be put back for the recomputation; dropout would.
    """
    batch = torch.stack([row["input_ids"] for row in dataset[:4]])
    results = []
    for checkpointing in (False, True):
        model = tiny_model(
            router_jitter_noise=0.3, router_aux_loss_coef=1.0, router_aux_loss_scope=scope, router_estimator=estimator
        ).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": keep_rng_state})
        torch.manual_seed(11)
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        results.append((loss, {name: p.grad for name, p in model.named_parameters()}))
    assert torch.equal(results[0][0], results[1][0])
    for name, gradient in results[0][1].items():
        assert torch.equal(gradient, results[1][1][name]), name
    assert results[0][1]["model.layers.0.block_sparse_moe.gate.weight"].abs().max() > 0


@pytest.mark.parametrize("through", ["model", "trainer"])
def test_reentrant_checkpointing_is_refused(tiny_model, dataset, tmp_path, through):
    options = {"use_reentrant": True}
    with pytest.raises(ValueError, match="use_reentrant=True"):
        if through == "model":
            tiny_model().gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        else:
            train(tiny_model(), dataset, tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs=options)


@pytest.mark.parametrize("enable", ["no options", "empty options", "peft"])
def test_checkpointing_is_not_reentrant_where_nothing_is_chosen(tiny_model, dataset, enable):
    """torch's own default is reentrant; the balance loss must keep its gradient all the same."""
    batch = torch.stack([row["input_ids"] for row in dataset[:4]])
    norms = []
    for checkpointing in (False, True):
        model = tiny_model(router_aux_loss_coef=1.0, router_jitter_noise=1e-6, input_jitter_noise=0.0)
        if checkpointing and enable == "peft":
            model = peft.prepare_model_for_kbit_training(model)
            model.requires_grad_(True)
        elif checkpointing:
            model.gradient_checkpointing_enable(None if enable == "no options" else {})
        model.train()(input_ids=batch, labels=batch).loss.backward()
        norms.append(model.model.layers[0].block_sparse_moe.gate.weight.grad.norm())
    torch.testing.assert_close(norms[0], norms[1])


def test_reentrant_checkpointing_of_a_classifier_is_exact(tiny_config):
    """It has no balance loss, so nothing is dropped there."""
    config = tiny_config(num_labels=3, router_jitter_noise=0.3)
    ids = torch.arange(12).view(2, 6)
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = GrinMoeForSequenceClassification(config).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
            model.enable_input_require_grads()
        torch.manual_seed(1)
        model(input_ids=ids, labels=torch.tensor([0, 2])).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_the_global_scope_talks_to_other_ranks_in_training_only(tiny_model, dataset, monkeypatch):
    """Ranks evaluate and generate at their own pace; a collective there would wait for ever."""
    calls = []
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda group=None: 2)
    monkeypatch.setattr("torch.distributed.get_rank", lambda group=None: 0)
    monkeypatch.setattr("torch.distributed.all_reduce", lambda tensor, **kwargs: calls.append(tensor.shape))
    model = tiny_model(router_aux_loss_coef=0.1, router_aux_loss_scope="global", output_router_logits=True)
    batch = torch.stack([row["input_ids"] for row in dataset[:2]])
    model(input_ids=batch, labels=batch)
    model.generate(batch, max_new_tokens=2, do_sample=False)
    assert calls == []
    model.train()(input_ids=batch, labels=batch)
    assert calls == [(2, 6)], "one collective of all layers' counts"


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"]], ids=str)
def test_lora_adapts_the_linear_layers(tiny_model, dataset, targets):
    """The router is not one of them: it returns a tuple, which adapters of linear layers cannot handle."""
    model = peft.get_peft_model(tiny_model(), peft.LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM"))
    batch = torch.stack([row["input_ids"] for row in dataset[:2]])
    model(input_ids=batch, labels=batch).loss.backward()
    adapted = {name for name, p in model.named_parameters() if p.grad is not None}
    assert any("q_proj.lora_B" in name for name in adapted) and not any(".gate." in name for name in adapted)


def test_lora_can_train_the_router_by_its_parameter(tiny_model, dataset):
    options = peft.LoraConfig(r=2, target_modules=[], target_parameters=["gate.weight"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(tiny_model(router_jitter_noise=0.5), options)
    batch = torch.stack([row["input_ids"] for row in dataset[:2]])
    model.train()(input_ids=batch, labels=batch).loss.backward()
    gradients = [p.grad for name, p in model.named_parameters() if "lora_B" in name]
    assert len(gradients) == 2 and all(gradient.abs().max() > 0 for gradient in gradients)


def test_neftune_comes_from_the_trainer(tiny_model, dataset, tmp_path):
    """Noise on the input embeddings while it trains, by the Trainer's own option; none afterwards."""
    model, alpha, looked_up, noise = tiny_model(), 5.0, [], []
    model.get_input_embeddings().register_forward_hook(lambda _, __, output: looked_up.append(output))
    model.model.layers[0].register_forward_pre_hook(lambda _, arguments: noise.append(arguments[0] - looked_up[-1]))
    train(model, dataset, tmp_path, max_steps=1, neftune_noise_alpha=alpha)
    bound = alpha / (SEQUENCE * 32) ** 0.5
    assert 0.9 * bound < noise[-1].abs().max() <= bound
    model(dataset[0]["input_ids"][None])
    assert (noise[-1] == 0).all()


class TestExpertDropout:
    @pytest.mark.parametrize("experts", ["eager", "grouped_mm", "batched_mm", "grinmoe_cpu", "grinmoe_triton"])
    def test_a_share_of_activations_is_dropped_and_the_mean_kept(self, tiny_model, experts):
        """With down projections that sum the activations, every output is a sum over those that were kept."""
        model = tiny_model(expert_dropout=0.25, input_jitter_noise=0.0)
        model.set_experts_implementation(experts)
        layer = model.model.layers[0].block_sparse_moe.experts
        hidden = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
        chosen = torch.randint(0, 4, (64, 1), generator=torch.Generator().manual_seed(1))
        weights = torch.ones(64, 1)
        with torch.no_grad():
            layer.down_proj.copy_(torch.eye(32, 24).expand(4, 32, 24))
            activations = layer(hidden, chosen, weights)[:, :24]
            layer.train()
            torch.manual_seed(2)
            dropped = layer(hidden, chosen, weights)[:, :24]
        kept = dropped != 0
        torch.testing.assert_close(dropped[kept], (activations / 0.75)[kept])
        assert abs(kept.float().mean() - 0.75) < 0.03

    def test_an_implementation_without_a_place_for_it_is_refused(self, tiny_model):
        model = tiny_model(expert_dropout=0.25).train()
        model.config._experts_implementation = "sonicmoe"
        with pytest.raises(ValueError, match="expert_dropout=0.25 with experts_implementation='sonicmoe'"):
            model(input_ids=torch.arange(6)[None])

    def test_the_fast_path_has_the_gradient_of_what_it_dropped(self, tiny_model, monkeypatch):
        """Against the reference loop with the very same activations dropped."""
        model = tiny_model(expert_dropout=0.4)
        layer = model.model.layers[0].block_sparse_moe.experts.train()
        generator = torch.Generator().manual_seed(0)
        chosen = torch.rand(40, 4, generator=generator).topk(2).indices
        hidden = torch.randn(40, 32, generator=generator, requires_grad=True)
        weights = torch.rand(40, 2, generator=generator, requires_grad=True)

        def run(implementation: str) -> list[torch.Tensor]:
            model.set_experts_implementation(implementation)
            output = layer(hidden, chosen, weights)
            leaves = (hidden, weights, *layer.parameters())
            return [output, *torch.autograd.grad(output.square().sum(), leaves)]

        torch.manual_seed(1)
        fast = run("grinmoe_cpu")
        # The same mask as the fast path drew, cut into the rows of each expert.
        torch.manual_seed(1)
        keep = torch.empty(80, 24).bernoulli_(0.6).div_(0.6)
        groups = iter(keep.split(chosen.flatten().bincount(minlength=4).tolist()))
        monkeypatch.setattr(layer, "keep_mask", lambda activation: next(groups))
        for found, expected in zip(fast, run("eager"), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_evaluation_does_not_gather_router_logits(tiny_model, dataset, tmp_path):
    model = tiny_model(output_router_logits=True)
    trainer = Trainer(model=model, args=training_arguments(tmp_path), eval_dataset=dataset[:8])
    predictions = trainer.predict(dataset[:8]).predictions
    assert predictions.shape == (8, SEQUENCE, 96)


class TestBalanceLoss:
    """The three scopes on small cases worked out by hand."""

    def test_an_even_load_gives_k(self):
        logits = torch.zeros(8, 4)
        choices = torch.stack([torch.arange(8) % 4, (torch.arange(8) + 1) % 4], dim=1)
        for scope in ("local", "global"):
            assert load_balancing_loss((logits,) * 3, (choices,) * 3, 2, scope) == pytest.approx(2.0)

    def test_local_counts_what_was_dispatched(self):
        logits = torch.tensor([[5.0, 0.0, 0.0, 0.0]]).repeat(6, 1)
        choices = torch.tensor([[1, 2]]).repeat(6, 1)
        probs = torch.softmax(logits[0], -1)
        assert load_balancing_loss((logits,), (choices,), 2, "local") == pytest.approx(
            float(4 * (probs[1] + probs[2])), rel=1e-6
        )
        # Whatever was dispatched, the released form counts the plain top-2, expert 0 among them.
        assert load_balancing_loss((logits,), (choices,), 2, "released") > 3.9

    def test_layers_are_pooled_or_averaged(self):
        to_first, to_second = torch.tensor([[9.0, 0, 0, 0]] * 4), torch.tensor([[0, 9.0, 0, 0]] * 4)
        choices = (torch.tensor([[0]] * 4), torch.tensor([[1]] * 4))
        pooled = load_balancing_loss((to_first, to_second), choices, 1, "released")
        per_layer = load_balancing_loss((to_first, to_second), choices, 1, "local")
        assert pooled == pytest.approx(2.0, abs=0.01) and per_layer == pytest.approx(4.0, abs=0.01)

    @pytest.mark.parametrize("scope", ["released", "local"])
    def test_padding_does_not_count(self, scope):
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(10, 4, generator=generator)
        choices = logits.topk(2).indices
        mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])
        kept = mask.reshape(-1).bool()
        expected = load_balancing_loss((logits[kept],), (choices[kept],), 2, scope)
        found = load_balancing_loss((logits,), (choices,), 2, scope, mask)
        torch.testing.assert_close(found, expected)

    def test_nothing_but_padding_is_zero(self):
        logits = torch.randn(4, 4)
        mask = torch.zeros(1, 4)
        assert load_balancing_loss((logits,), (logits.topk(2).indices,), 2, "local", mask) == 0

    def test_a_mask_of_another_batch_is_refused(self):
        with pytest.raises(ValueError, match="marks 3 positions, the router saw 4"):
            load_balancing_loss((torch.randn(4, 4),), None, 2, "released", torch.ones(1, 3))

    def test_an_unknown_scope_is_refused(self):
        with pytest.raises(ValueError, match="scope='globl' is unknown"):
            load_balancing_loss((torch.randn(4, 4),), None, 2, "globl")


class TestWarningOfDraws:
    """Two forwards in training mode differ. Without gradients that is rarely meant: generation, a reference's forward."""

    TEXT = "training mode samples its experts without gradients"

    @pytest.fixture
    def warnings(self, caplog):
        modeling_grinmoe.logger.warning_once.__func__.cache_clear()
        return lambda: [message for message in caplog.messages if self.TEXT in message]

    @pytest.mark.parametrize(
        "overrides", [{}, {"router_estimator": "topk", "input_jitter_noise": 0.1}], ids=["samples", "jitters"]
    )
    def test_forward_without_gradients_in_training_mode_warns_once(self, tiny_model, warnings, overrides):
        model, ids = tiny_model(**overrides).train(), torch.arange(8)[None]
        with torch.no_grad():
            first, second = model(ids).logits, model(ids).logits
        assert not torch.equal(first, second) and len(warnings()) == 1

    def test_generation_in_training_mode_warns(self, tiny_model, warnings):
        tiny_model().train().generate(torch.arange(8)[None], max_new_tokens=1, do_sample=False)
        assert len(warnings()) == 1

    def test_forward_whose_draws_do_not_matter_or_are_given_does_not_warn(
        self, tiny_model, warnings, dataset, tmp_path
    ):
        model, ids = tiny_model().train(), torch.arange(8)[None]
        noise = [draw_routing_noise(torch.zeros(8, 4), 2) for _ in model.model.layers]
        with torch.no_grad():
            model(ids, routing_seed=1)
            model(ids, routing_noise=noise)
            tiny_model(router_estimator="topk", input_jitter_noise=0.0).train()(ids)
            model.eval()(ids)
        checkpointing = {"gradient_checkpointing": True, "eval_strategy": "steps", "eval_steps": 1}
        train(model, dataset, tmp_path, max_steps=2, **checkpointing)
        reentrant = GrinMoeForSequenceClassification(model.config)
        reentrant.config.pad_token_id = 0
        reentrant.gradient_checkpointing_enable({"use_reentrant": True})
        reentrant.train()
        reentrant.enable_input_require_grads()
        reentrant(ids).logits.sum().backward()
        assert warnings() == []
