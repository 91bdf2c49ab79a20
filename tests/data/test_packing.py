"""Packed samples train and evaluate as if each were alone, and rows are packed without loss or overlap."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers.modeling_flash_attention_utils as flash
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

from grinmoe.data.packing import NO_LOSS, RowCollator, Samples, arrow_table, best_fit, packed, wrapped
from grinmoe.routing_grinmoe import draw_routing_noise
from tests.tolerances import FAST_PATH_FLOAT32

# Longer and shorter than the window of 6 keys, and of one token.
LENGTHS = (13, 4, 9, 1, 2)
WINDOW = 5
# Two rows of different lengths: (13, 4) and (9, 1, 2), so that a batch of both has padding.
PACKED_ROWS = ((0, 1), (2, 3, 4))
ATTENTION = ("eager", "sdpa", "flex_attention", "flash_attention_2")


@pytest.fixture
def sample_ids() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, 90, (length,), generator=generator).tolist() for length in LENGTHS]


@pytest.fixture
def rows(sample_ids) -> list[dict[str, list[int]]]:
    """What a packed data set holds: the first label of every sample is masked, and every third one, as a prompt would be."""
    return [
        {
            "input_ids": [token for index in row for token in sample_ids[index]],
            "labels": [label for index in row for label in labels_of(sample_ids[index])],
            "position_ids": [position for index in row for position in range(LENGTHS[index])],
        }
        for row in PACKED_ROWS
    ]


def labels_of(ids: list[int]) -> list[int]:
    return [NO_LOSS if position % 3 == 0 else token for position, token in enumerate(ids)]


def number_of_targets(sample_ids) -> int:
    return sum(label != NO_LOSS for ids in sample_ids for label in labels_of(ids))


@pytest.fixture
def model(tiny_model, request, monkeypatch):
    """A tiny model in evaluation, where routing is greedy; `request.param` is its attention."""
    model = tiny_model(sliding_window=WINDOW, router_aux_loss_coef=0.0)
    attention = getattr(request, "param", "eager")
    if attention == "flex_attention":
        # On a CPU torch has no compiled backward of it and refuses; uncompiled, its mathematics has one.
        monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda query, key, value: None)
        model.set_attn_implementation(attention)
        with torch.compiler.set_stance("force_eager"):
            yield model
    elif attention == "flash_attention_2":
        # All of Transformers' own way to the kernel, and in the kernel's place its documented semantics.
        monkeypatch.setattr(flash, "_lazy_imports", lambda *args, **kwargs: (None, like_flash_varlen, None, None, None))
        for name in ("_loaded_implementation", "_flash_fn", "_flash_varlen_fn", "_process_flash_kwargs_fn"):
            monkeypatch.setattr(flash, name, None)
        model.config._attn_implementation = attention
        yield model
    else:
        model.set_attn_implementation(attention)
        yield model


def like_flash_varlen(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
):
    """Attention of (tokens, heads, head) within the borders `cu_seqlens_q`: query i sees keys i - left to i."""
    assert causal and torch.equal(cu_seqlens_q, cu_seqlens_k) and cu_seqlens_q.dtype == torch.int32
    assert cu_seqlens_q[0] == 0 and cu_seqlens_q[-1] == len(q)
    assert max_seqlen_q == max_seqlen_k == cu_seqlens_q.diff().max()
    parts = []
    for begin, end in zip(cu_seqlens_q.tolist(), cu_seqlens_q.tolist()[1:], strict=False):
        query, key, value = (x[begin:end].transpose(0, 1) for x in (q, k, v))
        key, value = (x.repeat_interleave(len(query) // len(x), dim=0) for x in (key, value))
        distance = torch.arange(end - begin)[:, None] - torch.arange(end - begin)
        hidden = distance < 0
        if window_size[0] >= 0:  # -1: no window
            hidden |= distance > window_size[0]
        scores = (query @ key.transpose(1, 2) * softmax_scale).masked_fill(hidden, float("-inf"))
        parts.append((scores.softmax(-1) @ value).transpose(0, 1))
    return torch.cat(parts)


def collated(rows, how: str) -> dict[str, Any]:
    """The batch, as collators give it."""
    if how == "flattened":  # Transformers' padding-free collator takes samples, not rows
        singles = [
            {"input_ids": row["input_ids"][begin:end], "labels": row["labels"][begin:end]}
            for row in rows
            for begin, end in spans_of(row)
        ]
        return dict(DataCollatorWithFlattening(return_tensors="pt")(singles))
    batch = RowCollator(pad_token_id=95)(rows)
    if how == "without a mask":
        del batch["attention_mask"]
    return batch


def spans_of(row) -> list[tuple[int, int]]:
    begins = [index for index, position in enumerate(row["position_ids"]) if position == 0]
    return list(zip(begins, [*begins[1:], len(row["position_ids"])], strict=True))


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name, value in expected.items():
        error = (found[name] - value).abs().max()
        assert error <= FAST_PATH_FLOAT32 * value.abs().max() + 1e-7, f"{name}: {error}"


def one_by_one(model, sample_ids, noise=None) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of all samples' tokens, and the loss of all of them, whose gradients are left in the model."""
    model.zero_grad()
    targets, logits, total, begin = number_of_targets(sample_ids), [], torch.tensor(0.0), 0
    for ids in sample_ids:
        drawn = {} if noise is None else {"routing_noise": [part_of(layer, begin, begin + len(ids)) for layer in noise]}
        begin += len(ids)
        output = model(
            input_ids=torch.tensor([ids]), labels=torch.tensor([labels_of(ids)]), num_items_in_batch=targets, **drawn
        )
        output.loss.backward()
        logits.append(output.logits[0].detach())
        total += output.loss.detach()
    return torch.cat(logits), total


def part_of(noise, begin: int, end: int):
    return noise._replace(
        exponential=noise.exponential[:, begin:end],
        uniform=noise.uniform[:, begin:end],
        input_jitter=noise.input_jitter[begin:end],
    )


@pytest.mark.parametrize("how", ["with a mask", "without a mask", "flattened"])
@pytest.mark.parametrize("model", ATTENTION, indirect=True)
def test_logits_loss_and_all_gradients_of_a_packed_batch_are_those_of_its_samples(model, rows, sample_ids, how):
    attention = model.config._attn_implementation
    model.config._attn_implementation = "eager"
    expected_logits, expected_loss = one_by_one(model, sample_ids)
    expected = gradients(model)
    model.config._attn_implementation = attention

    model.zero_grad()
    batch = collated(rows, how)
    output = model(**batch, num_items_in_batch=number_of_targets(sample_ids))
    output.loss.backward()
    valid = torch.ones_like(batch["input_ids"], dtype=torch.bool)
    if how != "flattened":
        valid[0, len(rows[0]["input_ids"]) :] = False
        valid[1, len(rows[1]["input_ids"]) :] = False
        assert valid.sum() == sum(LENGTHS) < valid.numel()
    assert_same({"logits": output.logits[valid].detach()}, {"logits": expected_logits})
    assert_same({"loss": output.loss.detach()}, {"loss": expected_loss})
    assert_same(gradients(model), expected)


@pytest.mark.parametrize("model", ["eager", "flash_attention_2"], indirect=True)
def test_in_training_a_packed_batch_uses_the_draws_of_its_samples(model, rows, sample_ids):
    """SparseMixer's sampling and the input jitter too, each token with draws of its own; padding has draws as well."""
    model.train()
    width = max(len(row["input_ids"]) for row in rows)
    tokens = len(rows) * width
    generator = torch.Generator().manual_seed(0)
    noise = [
        draw_routing_noise(torch.zeros(tokens, 4), 2, generator)._replace(
            input_jitter=torch.empty(tokens, 32).uniform_(0.8, 1.2, generator=generator)
        )
        for _ in range(2)
    ]
    model.zero_grad()
    batch = RowCollator(pad_token_id=95)(rows)
    loss = model(**batch, num_items_in_batch=number_of_targets(sample_ids), routing_noise=noise).loss
    loss.backward()
    found = gradients(model)

    real = batch["attention_mask"].flatten().bool()
    noise = [
        layer._replace(
            exponential=layer.exponential[:, real],
            uniform=layer.uniform[:, real],
            input_jitter=layer.input_jitter[real],
        )
        for layer in noise
    ]
    model.config._attn_implementation = "eager"
    _, expected_loss = one_by_one(model, sample_ids, noise)
    assert_same({"loss": loss.detach()}, {"loss": expected_loss})
    assert_same(found, gradients(model))


def test_without_their_borders_samples_do_see_each_other(model, rows):
    """What the tests above would not notice if the samples were too short or too alike."""
    batch = RowCollator(pad_token_id=95)(rows)
    with torch.no_grad():
        apart = model(**batch).logits
        del batch["position_ids"]
        together = model(**batch).logits
    begins = LENGTHS[0]
    torch.testing.assert_close(apart[0, :begins], together[0, :begins])
    assert (apart[0, begins] - together[0, begins]).abs().max() > 1e-3


def test_packed_rows_leave_no_cache(model, rows):
    """A cache keeps the library from seeing the borders, and nothing could go on from several samples at once."""
    assert model.config.use_cache
    for how in ("with a mask", "without a mask"):
        output = model(**collated(rows, how))
        assert output.get("past_key_values") is None and output.get("cache") is None


def test_left_padded_rows_with_positions_are_no_packed_ones(model):
    """The usual batch for generation: positions begin at 0 behind the padding, and a cache is filled."""
    ids = torch.tensor([[95, 95, 3, 4, 5], [1, 2, 3, 4, 5]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        output = model(ids, attention_mask=mask, position_ids=positions)
        alone = model(ids[:1, 2:]).logits
    assert (output.get("past_key_values") or output.get("cache")).get_seq_length() == 5
    torch.testing.assert_close(output.logits[:1, 2:], alone)


@pytest.mark.parametrize("model", ATTENTION, indirect=True)
def test_no_sample_sees_padding_whatever_positions_that_has(model):
    """Padding on the left, whose positions run on into the first sample."""
    ids, mask = torch.tensor([[95, 95, 3, 4, 5, 6]]), torch.tensor([[0, 0, 1, 1, 1, 1]])
    with torch.no_grad():
        found = model(ids, attention_mask=mask, position_ids=torch.tensor([[0, 1, 2, 3, 0, 1]])).logits
        model.config._attn_implementation = "eager"
        expected = [model(ids[:, begin : begin + 2]).logits for begin in (2, 4)]
    torch.testing.assert_close(found[:, 2:], torch.cat(expected, dim=1))


def test_a_packed_training_step_compiles_in_one_graph(model, rows):
    """With a mask and positions nothing depends on whether there are borders, so the graph has no break."""
    batch = RowCollator(pad_token_id=95)(rows)
    compiled = torch.compile(model.forward, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(**batch, use_cache=False).loss, model(**batch).loss)


@pytest.mark.parametrize("scope", ["released", "local", "global"])
def test_the_balance_loss_counts_no_padding(tiny_model, rows, scope):
    model = tiny_model(
        sliding_window=WINDOW, router_aux_loss_coef=0.5, router_aux_loss_scope=scope, router_z_loss_coef=0.1
    )
    padded = model(**RowCollator(pad_token_id=95)(rows), output_router_logits=True)
    dense = model(**collated(rows, "flattened"), output_router_logits=True)
    assert padded.router_logits[0].shape[0] > dense.router_logits[0].shape[0] == sum(LENGTHS)
    torch.testing.assert_close(padded.aux_loss, dense.aux_loss)
    torch.testing.assert_close(padded.z_loss, dense.z_loss)
    torch.testing.assert_close(padded.loss, dense.loss)


class TestTrainers:
    """Rows and collator go into trainers as they are, and nothing of them is lost on the way."""

    def expected(self, model, sample_ids) -> float:
        return one_by_one(model, sample_ids)[1].item()

    def test_transformers_trainer_evaluates_packed_rows_as_single_samples(self, model, rows, sample_ids, tmp_path):
        expected = self.expected(model, sample_ids)
        arguments = TrainingArguments(
            str(tmp_path), per_device_eval_batch_size=2, report_to=[], use_cpu=True, prediction_loss_only=True
        )
        trainer = Trainer(model, arguments, data_collator=RowCollator(95), eval_dataset=as_dataset(rows))
        assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)

    def test_trl_sft_trainer_evaluates_packed_rows_as_single_samples(
        self, model, rows, sample_ids, tiny_tokenizer_folder, tmp_path
    ):
        """Its preparation is skipped, and it may drop no column: it would drop the positions."""
        trl = pytest.importorskip("trl")
        from transformers import AutoTokenizer

        expected = self.expected(model, sample_ids)
        arguments = trl.SFTConfig(
            str(tmp_path),
            per_device_eval_batch_size=2,
            report_to=[],
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            packing=False,
            dataset_kwargs={"skip_prepare_dataset": True},
            remove_unused_columns=False,
        )
        tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer_folder, eos_token="!", pad_token="!")
        trainer = trl.SFTTrainer(
            model,
            arguments,
            train_dataset=as_dataset(rows),
            eval_dataset=as_dataset(rows),
            data_collator=RowCollator(95),
            processing_class=tokenizer,
        )
        assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


def as_dataset(rows):
    from datasets import Dataset

    return Dataset.from_list(rows)


def test_the_collator_fills_up_on_the_right():
    batch = RowCollator(pad_token_id=7)(
        [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, {"input_ids": [4], "labels": [-100]}]
    )
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 7, 7]]
    assert batch["labels"].tolist() == [[-100, 2, 3], [-100] * 3]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())
    assert batch.keys() == {"input_ids", "labels", "attention_mask"}


LENGTH_LISTS = st.lists(st.integers(1, 24), min_size=1, max_size=40)


@given(LENGTH_LISTS)
@settings(deadline=None)
def test_best_fit_puts_every_sample_into_the_row_that_it_fills_best(lengths):
    """Against the same rule in its plainest form."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    expected: list[list[int]] = []
    for index in order:
        space = [24 - sum(lengths[i] for i in row) for row in expected]
        fitting = [left for left in space if left >= lengths[index]]
        if fitting:
            expected[space.index(min(fitting))].append(index)
        else:
            expected.append([index])
    found = best_fit(lengths, 24)
    assert sorted(index for row in found for index in row) == list(range(len(lengths)))
    filled = [sum(lengths[i] for i in row) for row in found]
    assert max(filled) <= 24
    assert sorted(filled) == sorted(sum(lengths[i] for i in row) for row in expected)
    assert found == sorted(sorted(row) for row in found)


def test_a_sample_longer_than_a_row_is_refused():
    with pytest.raises(ValueError, match="sample 1 has 9 tokens and a row 8; truncate or drop"):
        best_fit([3, 9], 8)


def some_samples(lengths) -> Samples:
    """Token ids count up over all samples, and labels are the same."""
    samples, next_id = Samples(), 0
    for length in lengths:
        ids = list(range(next_id, next_id + length))
        samples.append(ids, ids)
        next_id += length
    return samples


@given(LENGTH_LISTS)
@settings(deadline=None, max_examples=50)
def test_packed_rows_hold_every_sample_whole_with_its_first_label_masked(lengths):
    table = arrow_table(some_samples(lengths), packed(some_samples(lengths), 24)).to_pydict()
    found = []
    for ids, labels, positions in zip(*table.values(), strict=True):
        assert len(ids) == len(labels) == len(positions) <= 24
        for begin, end in spans_of({"position_ids": positions}):
            found.append(end - begin)
            assert ids[begin:end] == list(range(ids[begin], ids[begin] + end - begin))
            assert positions[begin:end] == list(range(end - begin))
            assert labels[begin:end] == [NO_LOSS, *ids[begin + 1 : end]]
    assert sorted(found) == sorted(lengths)


@given(LENGTH_LISTS)
@settings(deadline=None, max_examples=50)
def test_wrapped_rows_are_full_and_hold_all_tokens_in_their_order(lengths):
    table = arrow_table(some_samples(lengths), wrapped(some_samples(lengths), 10)).to_pydict()
    rows = table["input_ids"]
    assert [token for row in rows for token in row] == list(range(sum(lengths)))
    assert [len(row) for row in rows[:-1]] == [10] * (len(rows) - 1) and 1 <= len(rows[-1]) <= 10
    document_begins = {sum(lengths[:i]) for i in range(len(lengths))}
    for ids, labels, positions in zip(*table.values(), strict=True):
        begins = [ids[begin] for begin, _ in spans_of({"position_ids": positions})]
        assert begins == [token for token in ids if token in document_begins or token == ids[0]]
        assert labels == [NO_LOSS if token in begins else token for token in ids]
