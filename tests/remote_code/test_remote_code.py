"""Loading with trust_remote_code in a process that has never seen the package: what people do with a checkpoint."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from grinmoe.checkpoint_grinmoe import CODE_FILES, code_files
from tests import ROOT


def run_without_package(script: str, cwd: Path, *arguments: str) -> dict:
    """Run `script` in a fresh interpreter outside the checkout; its last line of output is JSON."""
    prelude = f"""
        import sys
        sys.path[:] = [p for p in sys.path if p not in ("", {str(ROOT)!r})]
        sys.modules["grinmoe"] = None  # importing it is an error, installed or not
    """
    environment = {**os.environ, "HF_HOME": str(cwd / "hf-home"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    completed = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(prelude) + textwrap.dedent(script), *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert completed.returncode == 0, completed.stderr[-3000:]
    return json.loads(completed.stdout.strip().splitlines()[-1])


LOAD_EVERY_WAY = """
    import json, torch
    from pathlib import Path
    from safetensors.torch import load_file, save_file
    from transformers import (AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification)
    folder, data, output = sys.argv[1:]
    inputs = load_file(data + "/inputs.safetensors")
    expected = load_file(data + "/expected.safetensors")["hub.plain.logits"]
    options = {"trust_remote_code": True, "dtype": torch.float32}
    found = {"config": type(AutoConfig.from_pretrained(folder, trust_remote_code=True)).__name__}
    base = AutoModel.from_pretrained(folder, **options)
    classifier = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3, pad_token_id=0, **options)
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    found |= {"base": type(base).__name__, "classifier": type(classifier).__name__, "causal": type(model).__name__}
    found["experts"] = model.config._experts_implementation
    # What the Trainer asks before it shifts the labels of label smoothing.
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    found["is_known_as_causal"] = model._get_name() in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    found["text_config_is_config"] = model.config.get_text_config() is model.config
    with torch.no_grad():
        found["error"] = (model(inputs["plain.input_ids"]).logits - expected).abs().max().item()
        found["labels"] = list(classifier(inputs["plain.input_ids"]).logits.shape)
        # Save from remote code, and load that again.
        model.save_pretrained(output, max_shard_size="300KB")
        again = AutoModelForCausalLM.from_pretrained(output, **options)
        found["error_again"] = (again(inputs["plain.input_ids"]).logits - expected).abs().max().item()
        classifier.save_pretrained(output + "/classifier")
        again = AutoModelForSequenceClassification.from_pretrained(output + "/classifier", **options)
        found["classifier_equal"] = bool(torch.equal(again.score.weight, classifier.score.weight))
    found["saved"] = sorted(path.name for path in Path(output).iterdir())
    print(json.dumps(found))
"""


@pytest.fixture
def released_snapshot(goldens, tmp_path):
    """Our flat files dropped over a released snapshot whose config.json is left as it is."""
    golden = goldens["golden-b"]
    folder = tmp_path / "GRIN-MoE"
    folder.mkdir()
    for name in ["config.json", "generation_config.json", *(f.name for f in golden.folder.glob("model*"))]:
        shutil.copy(golden.folder / name, folder)
    for file in code_files():
        shutil.copy(file, folder)
    return folder


def test_released_snapshot_with_our_files(released_snapshot, goldens, tmp_path):
    found = run_without_package(
        LOAD_EVERY_WAY, tmp_path, str(released_snapshot), str(goldens["golden-b"].folder), str(tmp_path / "saved")
    )
    assert (found["config"], found["causal"]) == ("GrinMoeConfig", "GrinMoeForCausalLM")
    assert (found["base"], found["classifier"]) == ("GrinMoeModel", "GrinMoeForSequenceClassification")
    assert found["experts"] == "grouped_mm", "without the package Transformers' own implementation runs"
    assert found["error"] < 2e-4 and found["error_again"] < 2e-4
    assert found["labels"] == [2, 3] and found["classifier_equal"]
    assert found["is_known_as_causal"] and found["text_config_is_config"]
    assert {name for name in found["saved"] if name.endswith(".py")} == set(CODE_FILES)
    assert "config.json" in found["saved"] and "model.safetensors.index.json" in found["saved"]


def test_text_generation_pipeline(goldens, tmp_path, tiny_tokenizer_folder):
    """A saved checkpoint with a tokenizer answers through the pipeline, the way most people start."""
    from grinmoe import GrinMoeForCausalLM

    folder = tmp_path / "model"
    model = GrinMoeForCausalLM.from_pretrained(goldens["golden-a"].folder, dtype=torch.float32)
    model.save_pretrained(folder)
    for file in tiny_tokenizer_folder.iterdir():
        shutil.copy(file, folder)
    script = """
        import json
        from transformers import pipeline
        generate = pipeline("text-generation", model=sys.argv[1], trust_remote_code=True, device="cpu")
        text = generate("aaa", max_new_tokens=4, do_sample=False, return_full_text=False)[0]["generated_text"]
        print(json.dumps({"class": type(generate.model).__name__, "text": text}))
    """
    found = run_without_package(script, tmp_path, str(folder))
    assert found["class"] == "GrinMoeForCausalLM" and isinstance(found["text"], str)


def test_every_file_of_the_flat_code_is_found_by_the_librarys_scan():
    """transformers copies what a regular expression over import lines finds; a file it misses would be lost."""
    from transformers.dynamic_module_utils import get_relative_import_files

    model_file = Path(code_files()[0]).parent / "modeling_grinmoe.py"
    found = {Path(file).name for file in get_relative_import_files(model_file)} | {model_file.name}
    assert found == {file.name for file in code_files()}


def test_remote_code_files_are_seven_and_short():
    assert sorted(path.name for path in ROOT.glob("*_grinmoe.py")) == sorted(CODE_FILES)
    assert len(CODE_FILES) == 7
    assert sum(len(path.read_text(encoding="utf-8").splitlines()) for path in code_files()) < 5350


IN_A_PROCESS_WITH_OLDER_CODE = """
    import json, shutil, torch
    from pathlib import Path
    from transformers import AutoModelForCausalLM
    folder, output = sys.argv[1:]
    options = {"trust_remote_code": True, "dtype": torch.float32}
    ids = torch.arange(12)[None]
    AutoModelForCausalLM.from_pretrained(folder, **options)
    # Files of a former version, as they stay in the cache of remote code beside the current ones.
    cached = Path(sys.modules[[m for m in sys.modules if m.endswith(".modeling_grinmoe")][0]].__file__).parent
    for name in ("attention", "experts", "upload"):
        (cached / f"{name}_grinmoe.py").write_text("raise RuntimeError('a file of a former version')")
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    model.save_pretrained(output)
    print(json.dumps(sorted(path.name for path in Path(output).glob("*.py"))))
"""


def test_save_pretrained_with_a_former_versions_files_in_the_cache_writes_the_current_ones(released_snapshot, tmp_path):
    saved = run_without_package(IN_A_PROCESS_WITH_OLDER_CODE, tmp_path, str(released_snapshot), str(tmp_path / "saved"))
    assert saved == sorted(CODE_FILES)


ASK_FOR_THE_PACKAGES_EXPERTS = """
    import json
    from transformers import AutoModelForCausalLM
    errors = []
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
    for name in ("grinmoe", "grinmoe_cpu", "grinmoe_triton"):
        for ask in (
            lambda: AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, experts_implementation=name),
            lambda: model.set_experts_implementation(name),
        ):
            try:
                ask()
            except ImportError as error:
                errors.append(str(error))
    print(json.dumps({"errors": errors, "experts": model.config._experts_implementation}))
"""


def test_experts_implementation_of_the_package_without_it_is_an_error_that_names_pip_install(
    released_snapshot, tmp_path
):
    found = run_without_package(ASK_FOR_THE_PACKAGES_EXPERTS, tmp_path, str(released_snapshot))
    assert len(found["errors"]) == 6 and all("pip install grinmoe" in error for error in found["errors"])
    assert found["experts"] == "grouped_mm"


BESIDE_THE_PACKAGE = """
    import json, sys, torch
    from transformers.dynamic_module_utils import get_class_from_dynamic_module
    folder, order = sys.argv[1:]
    sys.path.insert(0, {root!r})
    def remote(name):
        return get_class_from_dynamic_module("modeling_grinmoe." + name, folder)
    if order == "package first":
        import grinmoe
        model_class = remote("GrinMoeForCausalLM")
    else:
        model_class = remote("GrinMoeForCausalLM")
        import grinmoe
    model = model_class.from_pretrained(folder, dtype=torch.float32).train()
    ids = torch.arange(12)[None]
    def loss():
        torch.manual_seed(0)
        return model(ids, labels=ids, routing_seed=3).loss.item()
    found = {{"module": type(model).__module__, "experts": model.config._experts_implementation, "default": loss()}}
    model.set_experts_implementation("eager")
    found["eager"] = loss()
    own = grinmoe.GrinMoeForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    for name, either in (("remote", model), ("own", own)):
        either.set_experts_implementation("grinmoe_triton")
        torch.manual_seed(0)
        found[name] = either(ids, labels=ids, routing_seed=3).loss.item()
    print(json.dumps(found))
"""


@pytest.mark.parametrize("order", ["package first", "remote code first"])
def test_remote_code_beside_the_imported_package_gets_its_experts_and_router(released_snapshot, tmp_path, order):
    """The fused router draws by counting, so that its loss differs from the reference's and is that of the package."""
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf-home"), "HF_HUB_OFFLINE": "1", "TRITON_INTERPRET": "1"}
    script = textwrap.dedent(BESIDE_THE_PACKAGE.format(root=str(ROOT)))
    completed = subprocess.run(
        [sys.executable, "-c", script, str(released_snapshot), order],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert completed.returncode == 0, completed.stderr[-3000:]
    found = json.loads(completed.stdout.strip().splitlines()[-1])
    assert found["module"].startswith("transformers_modules.") and found["experts"] == "grinmoe"
    assert found["default"] == pytest.approx(found["eager"], abs=1e-5)
    assert found["remote"] == pytest.approx(found["own"], abs=1e-6)
    assert abs(found["remote"] - found["eager"]) > 1e-4


ODD_WIDTHS = """
    import json, torch
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
    ids = torch.arange(10)[None]
    with torch.no_grad():
        print(json.dumps({"experts": model.config._experts_implementation, "loss": model(ids, labels=ids).loss.item()}))
"""


def test_remote_code_with_rows_that_grouped_products_refuse_runs_the_reference(tmp_path, tiny_model):
    model = tiny_model(hidden_size=20, intermediate_size=7, num_attention_heads=2, num_key_value_heads=1)
    model.save_pretrained(tmp_path / "model")
    ids = torch.arange(10)[None]
    found = run_without_package(ODD_WIDTHS, tmp_path, str(tmp_path / "model"))
    assert found["experts"] == "eager"
    assert found["loss"] == pytest.approx(model(ids, labels=ids).loss.item(), abs=1e-5)
