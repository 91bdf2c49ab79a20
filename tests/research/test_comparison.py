"""`grinmoe compare`: its text, its measures, and a whole comparison at the smallest size."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace

import pytest
import torch

from grinmoe.demo.docstring_corpus import documents_of_file, installed_documentation
from grinmoe.modeling_grinmoe import GrinMoeForCausalLM
from grinmoe.research import comparison
from grinmoe.research.comparison import (
    ARMS,
    CompareSettings,
    RunsFailedError,
    build_config,
    explained_entropy,
    run_comparison,
)
from grinmoe.research.comparison_report import summarise

pytestmark = pytest.mark.newest_only  # experiments; the model and its estimators are tested elsewhere

TINY = CompareSettings(
    steps=4,
    seeds=2,
    vocab_size=320,
    row_length=16,
    micro_batch_size=2,
    accumulation=2,
    held_out_rows=6,
    evaluations=2,
    hidden_size=16,
    intermediate_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    num_local_experts=4,
)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "numbers.txt"
    words = "one two three four five six seven eight nine ten".split()
    path.write_text("\n\n".join(f"{a} and {b} is more than {a} or {b}" for a in words for b in words))
    return path


@pytest.fixture(scope="module")
def compared(text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("comparison")
    run_comparison(folder, TINY, arms=["dense", "topk", "v2"], text=text, workers=1, command="grinmoe compare X")
    return folder


def test_a_comparison_writes_table_figure_and_numbers(compared):
    table = (compared / "comparison.md").read_text()
    assert (
        "Repeat it: `grinmoe compare X`. The runs were made at" in table
        and "SparseMixer-v2" in table
        and "commit" in table
    )
    content = json.loads((compared / "comparison.json").read_text())
    assert {(run["arm"], run["seed"]) for run in content["runs"]} == {
        (arm, seed) for arm in ("dense", "topk", "v2") for seed in (0, 1)
    }
    for run in content["runs"]:
        assert [step for step, _ in run["held_out"]] == [2, 4]
        assert all(math.isfinite(loss) for _, loss in run["held_out"])
        assert run["environment"]["torch"] == torch.__version__
    routed = content["runs"][2]["routing"]
    assert sum(routed["load"][0]) == pytest.approx(1) and 0 <= routed["token_information"][0] <= 1
    assert (compared / "comparison.png").stat().st_size > 10_000
    assert not list(compared.rglob("*.partial*"))


def test_complete_runs_are_kept_and_missing_ones_made(compared, text, monkeypatch):
    made = []
    monkeypatch.setattr(comparison, "run_arm", lambda folder, settings, name, seed: made.append((name, seed)))
    run_comparison(compared, TINY, arms=["dense", "topk", "v2"], text=text, workers=1)
    assert made == []
    (compared / "runs" / "v2-seed1.json").rename(compared / "runs" / "aside")
    with pytest.raises(FileNotFoundError):  # the stand-in makes nothing
        run_comparison(compared, TINY, arms=["dense", "topk", "v2"], text=text, workers=1)
    (compared / "runs" / "aside").rename(compared / "runs" / "v2-seed1.json")
    assert made == [("v2", 1)]


def test_runs_of_other_settings_are_not_mixed(compared, text):
    with pytest.raises(ValueError, match=r"other settings \(settings.learning_rate\)"):
        run_comparison(compared, replace(TINY, learning_rate=1.0), arms=["v2"], text=text, workers=1)


@pytest.mark.parametrize(
    "arms, settings, message",
    [
        (["v3"], {}, "--arms v3 unknown; choose from dense"),
        (None, {"steps": 0}, "--steps 0"),
        (None, {"seeds": 0}, "--seeds 0"),
    ],
)
def test_wrong_arguments_are_named(tmp_path, text, arms, settings, message):
    with pytest.raises(ValueError, match=message):
        run_comparison(tmp_path, replace(TINY, **settings), arms=arms, text=text)


@pytest.mark.integration
def test_a_failed_run_is_named_and_the_others_are_kept(text, tmp_path, monkeypatch):
    """Diverging is a result; a run that cannot be made is not. In processes of their own."""
    monkeypatch.setitem(ARMS, "impossible", ARMS["v2"])  # unknown to the worker processes
    with pytest.raises(RunsFailedError, match="1 of 2 runs failed.*impossible with seed 0: KeyError"):
        run_comparison(tmp_path, replace(TINY, seeds=1), arms=["v2", "impossible"], text=text, workers=2)
    assert [path.name for path in (tmp_path / "runs").glob("*.json")] == ["v2-seed0.json"]


def test_a_text_that_is_too_short_is_named(tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("one\n\ntwo")
    with pytest.raises(ValueError, match="give a longer text"):
        run_comparison(tmp_path / "out", TINY, arms=["v2"], text=path)


def test_comparison_in_a_folder_with_something_else_is_refused_and_it_stays(tmp_path, text):
    (tmp_path / "corpus.safetensors").write_text("mine")
    with pytest.raises(ValueError, match="holds something that is not a comparison"):
        run_comparison(tmp_path, TINY, text=text)
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.safetensors"]


def test_comparison_of_more_runs_than_anybody_trains_is_refused():
    with pytest.raises(ValueError, match="--seeds 1000000000000 cannot be compared; give 1 to 1000"):
        replace(TINY, seeds=10**12)


def test_a_damaged_run_of_a_comparison_is_named(compared, text, tmp_path):
    shutil.copytree(compared, tmp_path / "copy")
    file = next((tmp_path / "copy" / "runs").glob("*.json"))
    file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(ValueError, match=f"{file.name} is damaged .*; remove it to train that run again"):
        run_comparison(tmp_path / "copy", TINY, arms=["dense", "topk", "v2"], text=text, workers=1)


def test_a_text_that_is_no_text_is_named(tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match="nowhere.txt is not a file"):
        run_comparison(tmp_path, TINY, text=tmp_path / "nowhere.txt")
    with pytest.raises(ValueError, match="--workers 0"):
        run_comparison(tmp_path, TINY, text=path, workers=0)
    with pytest.raises(ValueError, match="not UTF-8"):
        documents_of_file(path)
    path.write_text("\n \n\n")
    with pytest.raises(ValueError, match="no text"):
        documents_of_file(path)


@pytest.mark.integration
def test_the_installed_documentation_is_plenty_and_splits_by_content():
    documents = installed_documentation(("numpy",))
    assert {document.domain for document in documents} == {"python", "numpy"}
    assert sum(len(document.text) for document in documents) > 2_000_000
    held_out = sum(document.is_held_out(0.05) for document in documents) / len(documents)
    assert 0.03 < held_out < 0.07
    with pytest.raises(ImportError, match="no_such_package is not installed"):
        installed_documentation(("no_such_package",))


def test_arms_start_from_the_same_weights_and_the_dense_twin_has_as_many_active_parameters():
    models = {}
    for name in ("v2", "star", "topk-local", "dense"):
        torch.manual_seed(0)
        models[name] = GrinMoeForCausalLM(build_config(TINY, ARMS[name]))
    reference = models["v2"].state_dict()
    for name in ("star", "topk-local"):
        assert all(torch.equal(reference[key], value) for key, value in models[name].state_dict().items())
    expert = reference["model.layers.0.block_sparse_moe.experts.gate_up_proj"][0].numel()
    dense = models["dense"].state_dict()["model.layers.0.block_sparse_moe.experts.gate_up_proj"].numel()
    assert dense == TINY.num_experts_per_tok * expert


def test_build_config_of_wide_and_narrowing_arms_has_the_width_that_training_ends_with():
    for name, (width, mask_from) in {"v2": (0.01, None), "v2-wide": (0.1, None), "v2-narrowing": (0.01, 0.1)}.items():
        assert (build_config(TINY, ARMS[name]).router_jitter_noise, ARMS[name].mask_from) == (width, mask_from)
    assert build_config(TINY, ARMS["topk-local"]).router_aux_loss_scope == "local"


def test_explained_entropy():
    target = torch.tensor([0, 0, 1, 1])
    assert explained_entropy(target, torch.tensor([3, 3, 5, 5])) == pytest.approx(1)
    assert explained_entropy(target, torch.tensor([0, 1, 0, 1])) == pytest.approx(0, abs=1e-12)
    assert explained_entropy(torch.zeros(4, dtype=torch.int64), target) == 0


def test_differences_are_taken_seed_by_seed():
    def run(seed, loss):
        return {"arm": "x", "seed": seed, "held_out": [[1, loss]], "tokens_per_s": 1.0, "parameters": 1}

    reference = [run(0, 3.0), run(1, 4.0)]
    summary = summarise([run(0, 3.1), run(1, 4.1)], reference)
    assert summary["difference"] == pytest.approx(0.1) and summary["difference_spread"] == pytest.approx(0, abs=1e-9)
    assert summary["spread"] == pytest.approx(math.sqrt(0.5))
