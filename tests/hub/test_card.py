"""The model card: the text made of facts, and what a folder without facts gets."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, ModelCardData

from grinmoe import GrinMoeConfig
from grinmoe.hub.card import CardOverrides, card_for, check_metadata, render_card
from grinmoe.hub.card_facts import CardFacts, Evaluation
from tests import ROOT
from tests.hub.card_examples import BASE, HARNESS, HOSTILE, saved, some_facts, written

TEMPLATE = ROOT / "model_card.md"

# Benchmark -> shots and value as published: Table 2 of arXiv:2409.12136, and for MATH its abstract and Appendix B.
PUBLISHED = {
    "MMLU": ("5", 79.4),
    "HellaSwag": ("5", 83.7),
    "ANLI": ("7", 60.6),
    "GSM-8K": ("8, chain of thought", 90.4),
    "MATH": ("0, chain of thought", 58.9),
    "MedQA": ("2", 70.4),
    "AGIEval": ("0", 48.2),
    "TriviaQA": ("5", 73.9),
    "Arc-C": ("10", 92.0),
    "Arc-E": ("10", 98.0),
    "PIQA": ("5", 89.0),
    "SociQA": ("5", 79.5),
    "BigBench-Hard": ("3, chain of thought", 81.4),
    "WinoGrande": ("5", 81.4),
    "OpenBookQA": ("10", 89.8),
    "BoolQ": ("2", 83.4),
    "CommonSenseQA": ("10", 81.8),
    "TruthfulQA": ("10, MC2", 74.5),
    "HumanEval": ("0", 74.4),
    "MBPP": ("3", 80.3),
}


def table_after(text: str, heading: str) -> list[list[str]]:
    """Cells of the first table after a heading, split as GitHub's Markdown does: at pipes without a backslash."""
    lines = text.split(f"{heading}\n", 1)[1].strip().splitlines()
    rows = []
    for line in lines:
        if not line.startswith("|"):
            if rows:
                break
            continue
        cells = re.findall(r"((?:\\.|[^|\\])*)\|", line[1:])
        rows.append([re.sub(r"\\(.)", r"\1", cell.strip()) for cell in cells])
    return rows


def python_of(card: ModelCard) -> str:
    (block,) = re.findall(r"```python\n(.*?)```", card.text, flags=re.DOTALL)
    ast.parse(block)
    return block


@pytest.fixture
def model_folder(tmp_path) -> Path:
    """A folder with a config and nothing else of interest."""
    folder = tmp_path / "model"
    folder.mkdir()
    config = GrinMoeConfig(num_hidden_layers=3, num_local_experts=8, hidden_size=128, num_key_value_heads=8)
    config.architectures = ["GrinMoeForCausalLM"]
    config.save_pretrained(folder)
    return folder


# --- the template ----------------------------------------------------------------------------------------------------


def test_the_repository_s_own_card_has_metadata_that_the_hub_takes():
    card = ModelCard.load(TEMPLATE)
    check_metadata(card)
    assert card.data.to_dict() == {
        "language": ["en"],
        "library_name": "transformers",
        "license": "mit",
        "pipeline_tag": "text-generation",
        "tags": ["moe", "mixture-of-experts", "sparsemixer", "grin-moe"],
    }


def test_the_published_results_stand_in_it_row_by_row_with_their_shots():
    rows = table_after(ModelCard.load(TEMPLATE).text, "### Results")[2:]
    assert {name: (shots, float(value)) for name, shots, value in rows} == PUBLISHED


def test_the_averages_in_it_are_those_of_the_rows():
    text = " ".join(ModelCard.load(TEMPLATE).text.split())
    values = {name: value for name, (_, value) in PUBLISHED.items()}
    assert f"The average is {(sum(values.values()) - values['MATH']) / 19:.2f} over the 19 rows of Table 2" in text
    assert "and 78.6 over all 20" in text and sum(values.values()) / 20 == pytest.approx(78.6, abs=0.0501)


def test_it_says_that_nothing_of_them_was_measured_here():
    section = ModelCard.load(TEMPLATE).text.split("## The released GRIN-MoE, as published")[1].split("\n## ")[0]
    assert "Nothing in this section was measured here" in section
    assert "arXiv:2409.12136" in section and "### Results" in section


def test_template_rendered_without_facts_is_a_whole_card():
    card = ModelCard.from_template(ModelCardData(), template_path=TEMPLATE)
    assert "\n# GRIN MoE\n\nA mixture-of-experts" in card.text and "from_pretrained(PATH_OR_ID, trust" in python_of(
        card
    )
    assert "## This checkpoint" not in card.text and not re.search(r"{[{%#]", card.text)


def test_the_published_results_are_no_metadata_of_another_checkpoint():
    assert "model-index" not in render_card(some_facts(evaluations=[])).data.to_dict()


# --- rendering -------------------------------------------------------------------------------------------------------


def test_a_card_says_what_the_training_run_knew():
    text = render_card(some_facts(picture="training.png"), "me/pirate").text
    assert "\n# A fine-tune\n\nIt talks like a pirate.\n\n" in text
    assert f"Fine-tuned from [{BASE}](https://huggingface.co/{BASE})." in text
    assert "Chats, of which a tenth was held out." in text
    assert table_after(text, "### Hyperparameters")[2:] == [
        ["learning rate", "2e-05"],
        ["steps", "300"],
        ["packing", "no"],
        ["modules", "q_proj, v_proj"],
    ]
    assert table_after(text, "### Measurements")[2:] == [["throughput", "900 tokens/s"]]
    assert table_after(text, "### Evaluation")[2:] == [["GSM-8K (main)", "exact match", "8", "0.5"]]
    assert "![What happened during training](training.png)" in text
    assert text.index("## This checkpoint") < text.index("## How to load") < text.index("## Citation")
    assert "# GRIN MoE\n" not in text and "<!--" not in text


def test_the_example_loads_from_the_repository():
    card = render_card(some_facts(), "me/pirate")
    assert python_of(card).count('from_pretrained("me/pirate", trust_remote_code=True') == 2
    assert "PATH_OR_ID" not in card.text and "is the folder of this file" not in card.text


def test_without_a_repository_the_example_says_what_to_put_in():
    text = render_card(some_facts()).text
    assert "`PATH_OR_ID` is the folder of this file" in text and "from_pretrained(PATH_OR_ID, trust" in text


def test_an_adapter_is_loaded_over_its_base_with_peft(tmp_path):
    card = render_card(some_facts(library_name="peft", base_model_relation="adapter"), "me/lora")
    code = python_of(card)
    assert f'AutoModelForCausalLM.from_pretrained("{BASE}", dtype="auto")' in code
    assert 'PeftModel.from_pretrained(base, "me/lora")' in code and code.startswith("import grinmoe")
    assert "trust_remote_code" not in code
    data = saved(card, tmp_path).data
    assert (data.library_name, data.base_model, data["base_model_relation"]) == ("peft", BASE, "adapter")


def test_a_classifier_is_loaded_as_one():
    code = python_of(render_card(some_facts(pipeline_tag="text-classification"), "me/judge"))
    assert 'AutoModelForSequenceClassification.from_pretrained("me/judge"' in code and "generate" not in code


@pytest.mark.parametrize("text", HOSTILE, ids=repr)
def test_no_text_breaks_a_table(text):
    facts = some_facts(
        hyperparameters={text: text},
        measurements={text: text},
        evaluations=[Evaluation(text, "d", text, "m", 1.0)],
    )
    card = render_card(facts, "me/x")
    shown = " ".join(text.split())
    assert table_after(card.text, "### Hyperparameters")[2:] == [[shown, shown]]
    assert table_after(card.text, "### Measurements")[2:] == [[shown, shown]]
    assert table_after(card.text, "### Evaluation")[2:] == [[shown, shown, "", "1"]]
    assert card.text.count("## How to load") == 1


def test_a_picture_with_a_space_in_its_name_is_shown():
    assert "](my%20run.png)" in render_card(some_facts(picture="my run.png")).text


# --- the card of a folder --------------------------------------------------------------------------------------------


def test_a_folder_with_facts_gets_a_card_of_them_and_of_its_config(model_folder):
    some_facts().write(model_folder)
    card_for(model_folder).save(model_folder / "README.md")
    written = (model_folder / "README.md").read_text()
    card = card_for(model_folder, "me/pirate", parameters=(42_000, 6_600))
    assert card.data.license == "mit" and "It talks like a pirate." in card.text
    sizes = dict(table_after(card.text, "### Sizes")[2:])
    assert (sizes["layers"], sizes["experts in a layer"], sizes["hidden size"]) == ("3", "8", "128")
    assert (sizes["experts that work on a token"], sizes["gradient of the router"]) == ("2", "sparsemixer_v2")
    assert sizes["parameters"] == "42,000, of which 6,600 work on a token"
    assert (model_folder / "README.md").read_text() == written, "nothing is written"


def test_a_readme_edited_beside_its_facts_is_not_dropped_without_a_word(model_folder):
    some_facts().write(model_folder)
    card_for(model_folder).save(model_folder / "README.md")
    with (model_folder / "README.md").open("a") as file:
        file.write("\nA line of mine.\n")
    with pytest.raises(ValueError, match=r"is not what card\.json beside it makes.* Remove card\.json to publish"):
        card_for(model_folder, "me/pirate")
    (model_folder / "card.json").unlink()
    assert "A line of mine." in card_for(model_folder, "me/pirate").text


def test_a_readme_whose_metadata_does_not_end_is_refused(model_folder):
    (model_folder / "README.md").write_text("---\nlicense: mit\n\nText.\n")
    with pytest.raises(ValueError, match="has no end; close it with a line of ---"):
        card_for(model_folder)


def test_sizes_among_the_facts_are_kept(model_folder):
    some_facts(architecture={"layers": "as many as you like"}).write(model_folder)
    assert table_after(card_for(model_folder).text, "### Sizes")[2:] == [["layers", "as many as you like"]]


def test_a_folder_with_a_config_alone_says_no_more_than_that(model_folder):
    card = card_for(model_folder, "me/unknown")
    assert "\n# unknown\n" in card.text and "How it was trained was not recorded" in card.text
    assert dict(table_after(card.text, "### Sizes")[2:])["vocabulary"] == "32,064"
    assert card.data.to_dict().keys() == {"library_name", "pipeline_tag", "tags"}


def test_a_classifier_s_config_is_one_s(model_folder):
    path = model_folder / "config.json"
    written(path, json.loads(path.read_text()) | {"architectures": ["GrinMoeForSequenceClassification"]})
    assert card_for(model_folder).data.pipeline_tag == "text-classification"


def test_an_adapter_without_facts_is_told_by_its_config(tmp_path):
    adapter = {
        "peft_type": "LORA",
        "base_model_name_or_path": BASE,
        "r": 8,
        "target_modules": ["q_proj"],
        "bias": "none",
    }
    written(tmp_path / "adapter_config.json", adapter)
    card = card_for(tmp_path, "me/lora")
    assert (card.data.library_name, card.data.base_model) == ("peft", BASE)
    assert table_after(card.text, "### Hyperparameters")[2:] == [
        ["peft_type", "LORA"],
        ["r", "8"],
        ["target_modules", "q_proj"],
    ]


@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["unix", "dos"])
def test_a_readme_keeps_its_text_and_its_metadata(model_folder, end):
    text = end.join(["# Mine", "", "- a  ", "\ttab | pipe", "<!-- checkpoint -->", ""])
    head = end.join(["---", "widget:", "- text: hi", "license: apache-2.0", "tags: [mine]", "---", ""])
    (model_folder / "README.md").write_bytes((head + text).encode())
    card = card_for(model_folder, "me/mine")
    assert card.text == text and str(card).endswith(end + text)
    assert card.data.to_dict() == {
        "widget": [{"text": "hi"}],
        "license": "apache-2.0",
        "tags": ["mine"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
    }


def test_a_readme_without_metadata_keeps_its_text(model_folder):
    (model_folder / "README.md").write_text("# Mine\n")
    card = card_for(model_folder)
    assert card.text == "# Mine\n"
    assert "grin-moe" in card.data.tags and card.data.license is None


def test_an_empty_readme_is_none(model_folder):
    (model_folder / "README.md").write_text("\n")
    assert "How it was trained" in card_for(model_folder).text


def test_a_readme_with_a_byte_order_mark_keeps_its_metadata(model_folder):
    (model_folder / "README.md").write_bytes(b"\xef\xbb\xbf---\nlicense: mit\n---\ntext")
    card = card_for(model_folder)
    assert card.data.license == "mit" and card.text == "text"


def test_one_tag_that_is_no_list_stays_one(model_folder):
    (model_folder / "README.md").write_text("---\ntags: mine\n---\ntext")
    assert card_for(model_folder).data.tags == ["mine"]


def test_results_in_a_readme_stay_as_they_were_written(tmp_path, model_folder):
    """Read and written by the client they would lose the second dataset's name and arguments."""

    def result(name, shots):
        dataset = {"type": "gsm8k", "name": name, "args": {"num_few_shot": shots}}
        return {"task": {"type": "t"}, "dataset": dataset, "metrics": [{"type": "acc", "value": shots / 10}]}

    index = [{"name": "mine", "results": [result("zero", 0), result("five", 5)]}]
    (model_folder / "README.md").write_text(f"---\nmodel-index: {json.dumps(index)}\n---\ntext")
    assert card_for(model_folder).data.to_dict()["model-index"] == index


@pytest.mark.parametrize(
    "head",
    ["license: [mit", "- a list", "a: b: c", "model-index:\n- name: x", "1: x", "tags: 3"],
    ids=["open", "list", "colons", "index", "key", "tags"],
)
def test_a_readme_whose_metadata_cannot_be_read_is_named(model_folder, head):
    path = model_folder / "README.md"
    path.write_text(f"---\n{head}\n---\ntext")
    with pytest.raises(ValueError, match=f"top of {re.escape(str(path))} cannot be read .*correct the lines"):
        card_for(model_folder)


def test_a_readme_that_is_not_utf_8_is_named(model_folder):
    (model_folder / "README.md").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match="README.md is not UTF-8 .* at byte 3.; convert it"):
        card_for(model_folder)


@pytest.mark.parametrize(
    "head, message",
    [
        ("license: MIT", "license: 'MIT' is not an id of the Hub; ids are lower case"),
        ("license: Apache 2.0", "license: 'Apache 2.0' is not an id"),
        ("language: no", "language: False is not text; put the code in quotes"),
        ("language: English", "language: 'English' is not a code"),
        ("tags: [yes]", "tags: True is not text"),
        ("pipeline_tag: [text-generation]", "pipeline_tag: .* is not text"),
        ("base_model: [null]", "base_model: None is not text"),
        ("base_model: x/y\nbase_model_relation: child", "base_model_relation: 'child' is unknown; choose of finetune"),
        ("license: MIT\nlanguage: no", "license: .*; language: "),
        (
            "model-index: [{name: x, results: [{task: {type: t}, dataset: {type: d, name: D}, "
            "metrics: [{type: m, value: .nan}]}]}]",
            "D: nan is not a result",
        ),
    ],
)
def test_metadata_that_the_hub_would_refuse_are_named(model_folder, head, message):
    (model_folder / "README.md").write_text(f"---\n{head}\n---\ntext")
    with pytest.raises(ValueError, match=message):
        card_for(model_folder)


# --- names that are no ids -------------------------------------------------------------------------------------------


def test_an_adapter_of_a_local_base_asks_for_its_id_and_takes_it(tmp_path, model_folder):
    """PEFT writes the path that the base was loaded from into adapter_config.json and README.md."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    written(folder / "adapter_config.json", {"peft_type": "LORA", "base_model_name_or_path": str(model_folder)})
    for readme in (
        None,
        f"---\nbase_model: {model_folder}\ntags: [lora, base_model:adapter:{model_folder}]\n---\ntext",
    ):
        if readme:
            (folder / "README.md").write_text(readme)
        with pytest.raises(ValueError, match="base_model: .* is a path on this machine; give the id"):
            card_for(folder)
        card = card_for(folder, overrides=CardOverrides(base_model=BASE))
        assert (card.data.base_model, card.data.library_name) == (BASE, "peft")
        assert str(model_folder) not in str(card)


def test_facts_may_remember_a_local_base_until_a_card_is_made(tmp_path):
    some_facts(base_model="/models/base").write(tmp_path)
    assert CardFacts.read(tmp_path).base_model == "/models/base"
    with pytest.raises(ValueError, match="is a path on this machine"):
        card_for(tmp_path)


@pytest.mark.parametrize("repo_id", ["a/b/c", "-x", "a--b", ""])
def test_a_repository_that_cannot_be_is_refused(model_folder, repo_id):
    (model_folder / "README.md").write_text("text")
    with pytest.raises(ValueError, match="is no name of a repository; give NAME or OWNER/NAME"):
        card_for(model_folder, repo_id)


# --- overrides -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["facts", "readme", "config"])
def test_what_the_user_says_wins_over_everything(tmp_path, model_folder, source):
    if source == "facts":
        some_facts(license="other", license_name="secret", license_link="L").write(model_folder)
    if source == "readme":
        head = (
            "license: other\nlicense_name: secret\nlicense_link: L\nbase_model: /local\nlanguage: de\ndatasets: [x/y]"
        )
        result = "{task: {type: t}, dataset: {type: d, name: D}, metrics: [{type: m, value: 1}]}"
        index = f"model-index: [{{name: old, results: [{result}]}}]"
        (model_folder / "README.md").write_text(f"---\n{head}\n{index}\n---\nMy text.\n")
    (model_folder / "run.png").write_bytes(b"")
    overrides = CardOverrides(
        license="apache-2.0",
        base_model="me/base",
        base_model_relation="merge",
        datasets=("me/one", "me/two"),
        language=("fr",),
        evaluations=written(tmp_path / "results.json", HARNESS),
        picture="run.png",
    )
    card = saved(card_for(model_folder, "me/x", overrides=overrides), tmp_path)
    metadata = card.data.to_dict()
    assert (metadata["license"], "license_name" in metadata, "license_link" in metadata) == ("apache-2.0", False, False)
    assert (metadata["base_model"], metadata["base_model_relation"]) == ("me/base", "merge")
    assert (metadata["datasets"], metadata["language"]) == (["me/one", "me/two"], ["fr"])
    assert [result.metric_value for result in card.data.eval_results] == [0.79, 0.9, 0.91]
    assert card.text.count("](run.png)") == 1
    if source == "readme":
        assert card.text.startswith("My text.\n") and card.data.model_name == "old"


def test_a_picture_that_a_readme_shows_is_not_added_again(model_folder):
    (model_folder / "run.png").write_bytes(b"")
    (model_folder / "README.md").write_text("See ![it](run.png).\n")
    assert card_for(model_folder, overrides=CardOverrides(picture="run.png")).text == "See ![it](run.png).\n"


def test_a_license_of_one_s_own_needs_its_name(model_folder):
    with pytest.raises(ValueError, match="license='other' needs a license_name"):
        card_for(model_folder, overrides=CardOverrides(license="other"))
    named = CardOverrides(license="other", license_name="my-license", license_link="LICENSE")
    data = card_for(model_folder, overrides=named).data
    assert (data.license, data.license_name, data.license_link) == ("other", "my-license", "LICENSE")


@pytest.mark.parametrize("source", ["facts", "override", "readme"])
def test_a_picture_that_is_not_there_is_named(model_folder, source):
    overrides = CardOverrides(picture=None if source == "facts" else "p.png")
    if source == "facts":
        some_facts(picture="p.png").write(model_folder)
    if source == "readme":
        (model_folder / "README.md").write_text("text")
    with pytest.raises(ValueError, match="picture='p.png' is not a file in .*; put it there"):
        card_for(model_folder, overrides=overrides)


def test_a_picture_elsewhere_is_not_taken(tmp_path, model_folder):
    (tmp_path / "p.png").write_bytes(b"")
    (model_folder / "README.md").write_text("text")
    with pytest.raises(ValueError, match="is not a file in"):
        card_for(model_folder, overrides=CardOverrides(picture="../p.png"))


def test_a_folder_that_is_none_and_one_without_a_model_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        card_for(tmp_path / "missing")
    with pytest.raises(ValueError, match="has no config.json, so there is no model in it"):
        card_for(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_config_that_is_none_is_named(model_folder, content):
    (model_folder / "config.json").write_text(content)
    with pytest.raises(ValueError, match="config.json cannot be read: it .*write it anew"):
        card_for(model_folder)


@pytest.mark.parametrize("filled_in", ["nothing", "text", "metadata"])
def test_the_empty_form_that_peft_writes_is_no_card_until_somebody_fills_it_in(tmp_path, filled_in):
    written(tmp_path / "adapter_config.json", {"peft_type": "LORA", "base_model_name_or_path": BASE})
    form = ModelCard.from_template(ModelCardData())
    form.data.base_model, form.data.library_name, form.data.tags = BASE, "peft", ["lora"]
    form.text += "\n### Framework versions\n\n- PEFT 0.21.2\n"
    if filled_in == "text":
        form.text = form.text.replace("[More Information Needed]", "It sails the seven seas.", 1)
    if filled_in == "metadata":
        form.data.license = "mit"
    form.save(tmp_path / "README.md")
    text = card_for(tmp_path).text
    kept = filled_in != "nothing"
    assert ("[More Information Needed]" in text, "How it was trained was not recorded" in text) == (kept, not kept)
