"""The main job from end to end, a few steps of it, and what it must not do to a user's folders."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, ModelCardData

import grinmoe.demo.demo as demo
import grinmoe_cli
from grinmoe import GrinMoeForCausalLM
from grinmoe.checkpoint_grinmoe import code_files
from grinmoe.hub.card_facts import CardFacts
from tests import ROOT

STEPS = 6

# The steps of the demo are tested on the oldest Transformers one by one.
pytestmark = [pytest.mark.integration, pytest.mark.newest_only]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Folder and printed text of one short demo, run as a user runs it."""
    folder = tmp_path_factory.mktemp("demo") / "nested" / "output"
    done = subprocess.run(
        [sys.executable, "-m", "grinmoe_cli", "demo", "--output", str(folder), "--steps", str(STEPS)],
        cwd=folder.parents[1],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, done.stdout


@pytest.fixture
def facts(finished):
    return json.loads((finished[0] / "demo.json").read_text())


def test_the_process_without_the_package_gives_the_same_logits_and_answers(finished, facts):
    assert facts["logits_difference"] == 0
    assert list(facts["answers"]) == list(demo.PROMPTS)
    for prompt in demo.PROMPTS:
        assert f"> {prompt}" in finished[1]


def test_training_lowers_the_held_out_perplexity(facts):
    assert facts["perplexity_after"] < 0.7 * facts["perplexity_before"]
    # An untrained model knows nothing: about the size of the vocabulary.
    assert facts["perplexity_before"] == pytest.approx(facts["settings"]["vocab_size"], rel=0.35)


def test_every_fact_is_measured(facts):
    numbers = [value for value in facts.values() if isinstance(value, int | float)]
    assert all(math.isfinite(value) for value in numbers)
    assert facts["tokens_per_s"] > 0 and facts["max_over_mean_load"] >= 1
    assert set(facts["seconds"]) == {"data", "evaluate", "train", "save", "load elsewhere", "picture", "total"}
    assert 0 < facts["peak_gib"] < 3


def test_the_checkpoint_is_sharded_and_brings_its_code_tokenizer_and_card(finished, facts):
    model = finished[0] / "model"
    shards = list(model.glob("model-*-of-*.safetensors"))
    assert len(shards) == facts["shards"] > 1
    assert {file.name for file in code_files()} <= {path.name for path in model.iterdir()}
    config = json.loads((model / "config.json").read_text())
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_grinmoe.GrinMoeForCausalLM"
    assert config["use_cache"] and config["num_local_experts"] >= 8 and config["router_aux_loss_coef"] > 0
    assert json.loads((model / "tokenizer_config.json").read_text())["tokenizer_class"] == "TokenizersBackend"
    card = ModelCard.load(model / "README.md")
    assert (card.data.license, card.data.pipeline_tag, card.data.library_name) == (
        "mit",
        "text-generation",
        "transformers",
    )
    assert f"{facts['parameters']:,}" in card.text and "<!-- checkpoint -->" not in card.text
    (result,) = card.data.eval_results
    assert result.metric_type == "perplexity" and result.metric_value == round(facts["perplexity_after"], 3)
    assert "](training.png)" in card.text and (model / "training.png").is_file()
    assert CardFacts.read(model).hyperparameters["optimizer steps"] == STEPS


def test_one_picture_and_nothing_else_is_left(finished):
    assert {path.name for path in finished[0].iterdir()} == {"model", "training.png", "demo.json"}
    assert [path.name for path in finished[0].parent.iterdir()] == ["output"]
    assert (finished[0] / "training.png").read_bytes().startswith(b"\x89PNG")


def test_the_table_says_what_was_measured(finished, facts):
    for text in (
        f"{facts['parameters']:,}",
        "held-out perplexity",
        "tokens/s",
        "busiest expert",
        "peak memory",
        "equal",
    ):
        assert text in finished[1]


def test_the_folder_loads_with_the_package_too(finished, facts):
    model = GrinMoeForCausalLM.from_pretrained(finished[0] / "model")
    assert demo.count_parameters(model) == (facts["parameters"], facts["active_parameters"])


@pytest.mark.parametrize("document", ["README.md", "model_card.md"])
def test_the_examples_of_the_documents_run(finished, tmp_path, document):
    """As printed, beside the demo's output."""
    text = ModelCard.from_template(ModelCardData(), template_path=str(ROOT / document)).text  # the card is a template
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert blocks
    script = "\n".join(blocks).replace("PATH_OR_ID", repr(str(finished[0] / "model")))
    (tmp_path / "demo-output").symlink_to(finished[0])
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "HF_MODULES_CACHE": str(tmp_path / "modules"),
            "HF_HUB_OFFLINE": "1",
        },
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "<|assistant|>" in done.stdout


def test_its_checkpoint_goes_to_the_hub_and_comes_back(finished, hub, tmp_path, monkeypatch, capsys):
    """With the commands of the README: push, pull, chat."""
    monkeypatch.chdir(tmp_path)
    model = finished[0] / "model"
    assert grinmoe_cli.main(["push", "--model", str(model), "--repo", "grin-demo", "--private", "--tag", "v1"]) == 0
    assert "loaded in a process without this package" in capsys.readouterr().out
    published = hub.files("writer-user/grin-demo", "v1")
    assert b"perplexity" in published["README.md"] and "training.png" in published
    assert not {"card.json", "training_args.bin"} & published.keys()

    arguments = ["pull", "--repo", "writer-user/grin-demo", "--revision", "v1", "--output", "pulled"]
    assert grinmoe_cli.main(arguments) == 0
    for path in Path("pulled").iterdir():
        assert path.read_bytes() == published[path.name]
    weights = [file.name for file in model.glob("*.safetensors*")]
    assert all((Path("pulled") / name).read_bytes() == (model / name).read_bytes() for name in weights)
    capsys.readouterr()
    answers = []
    for folder in (str(model), "pulled"):
        chat = ["generate", "--model", folder, "--prompt", demo.PROMPTS[0], "--max-new-tokens", "8", "--device", "cpu"]
        assert grinmoe_cli.main(chat) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1]
