"""The metadata of a card: what the Hub's client reads back from the file, and what is refused before the Hub sees it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from grinmoe.hub.card import render_card
from grinmoe.hub.card_facts import Evaluation
from tests.hub.card_examples import BASE, GSM, HOSTILE, saved, some_facts


def test_its_metadata_come_back_from_the_file(tmp_path):
    metadata = saved(render_card(some_facts(tags=["pirate"]), "me/pirate"), tmp_path).data.to_dict()
    del metadata["model-index"]
    assert metadata == {
        "base_model": BASE,
        "base_model_relation": "finetune",
        "datasets": ["HuggingFaceH4/ultrachat_200k"],
        "language": ["en"],
        "library_name": "transformers",
        "license": "mit",
        "pipeline_tag": "text-generation",
        "tags": ["moe", "mixture-of-experts", "sparsemixer", "grin-moe", "pirate"],
    }


def test_evaluations_are_metadata_that_the_client_reads_back(tmp_path):
    perplexity = Evaluation("Held-out chats", "my-chats", "perplexity", "perplexity", 12.25, dataset_split="test")
    data = saved(render_card(some_facts(evaluations=[GSM, perplexity]), "me/pirate"), tmp_path).data
    assert data.model_name == "pirate"
    first, second = data.eval_results
    assert (first.task_type, first.dataset_type, first.dataset_name) == ("text-generation", "openai/gsm8k", "GSM-8K")
    assert (first.dataset_config, first.dataset_args) == ("main", {"num_few_shot": 8})
    assert (first.metric_type, first.metric_name, first.metric_value) == ("exact_match", "exact match", 0.5)
    assert (second.dataset_split, second.dataset_args, second.metric_value) == ("test", None, 12.25)


@pytest.mark.parametrize(
    "other, names",
    [
        (replace(GSM, value=0.25, shots=0), ["exact match (8-shot)", "exact match (0-shot)"]),
        (replace(GSM, value=0.25, dataset_name="GSM-Plus"), ["exact match (GSM-8K)", "exact match (GSM-Plus)"]),
    ],
)
def test_results_on_the_same_data_are_told_apart(tmp_path, other, names):
    """The client writes one name and one number of shots for all of them."""
    results = saved(render_card(some_facts(evaluations=[GSM, other])), tmp_path).data.eval_results
    assert [(r.metric_name, r.metric_value) for r in results] == list(zip(names, [0.5, 0.25]))


def test_two_values_of_the_same_are_refused():
    with pytest.raises(ValueError, match="two values of 'exact match' on openai/gsm8k"):
        render_card(some_facts(evaluations=[GSM, replace(GSM, value=0.9)]))


@pytest.mark.parametrize("text", HOSTILE, ids=repr)
def test_no_text_breaks_the_metadata(tmp_path, text):
    facts = some_facts(
        title=text,
        summary=text,
        data=text,
        tags=[text],
        license="other",
        license_name=text,
        evaluations=[Evaluation(text, "d", text, "m", 1.0, dataset_split=text)],
    )
    card = saved(render_card(facts), tmp_path)
    (result,) = card.data.eval_results
    assert card.data.model_name == " ".join(text.split())
    assert card.data.license_name == card.data.tags[-1] == text
    assert result.dataset_name == result.dataset_split == result.metric_name == text
    assert card.text.rstrip().endswith("```") and "@article{liu2024grin" in card.text
    assert card.text.count(text.strip()) >= 2


@pytest.mark.parametrize("license", ["mit", "apache-2.0", "openrail++", "cc-by-nc-sa-4.0", "llama3.1"])
def test_forms_of_license_ids(license):
    assert render_card(some_facts(license=license)).data.license == license


@pytest.mark.parametrize(
    "name", ["/models/base", "./base", "../base", "~/base", "C:\\base", "out/model", "a/b/c", "a b"]
)
@pytest.mark.parametrize("field", ["base_model", "datasets"])
def test_names_that_are_no_ids_of_the_hub_are_refused(tmp_path, monkeypatch, field, name):
    (tmp_path / "out" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    value = [name] if field == "datasets" else name
    with pytest.raises(ValueError, match=f"{field}: .* give (one|the id of the Hub repository)"):
        render_card(some_facts(**{field: value}))


def test_a_tag_does_not_tell_where_the_base_model_lay():
    with pytest.raises(ValueError, match="tags: '/models/base' is a path on this machine"):
        render_card(some_facts(tags=["base_model:adapter:/models/base"]))
    render_card(some_facts(tags=[f"base_model:adapter:{BASE}"]))
