"""What is assembled and checked before a push, without a Hub: bad folders, and what a good one becomes."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer, GenerationConfig

from grinmoe import GrinMoeForCausalLM, GrinMoeForSequenceClassification, GrinMoeModel
from grinmoe.checkpoint_grinmoe import code_files
from grinmoe.configuration_grinmoe import AUTO_MAP
from grinmoe.hub import release
from grinmoe.hub.card import CardFacts, CardOverrides
from grinmoe.hub.checks import ReleaseError, check_files
from grinmoe.hub.isolated_load import Elsewhere, LoadElsewhereError
from grinmoe.hub.private_text import Private
from grinmoe.hub.release import Release, ReleaseOptions, make_release
from grinmoe.tokenization import TokenizerError
from tests.hub.bad_folders import BAD_FOLDERS, poison, without
from tests.hub.release_folders import (
    INDEX,
    SHARDS,
    contents,
    edit_json,
    edit_weights,
    save_model,
    small_tokenizer,
)

QUICK = ReleaseOptions(load_check=False)
CODE = {file.name for file in code_files()}
TOKENIZER = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
MODEL = {
    "README.md",
    "LICENSE",
    "training.png",
    "config.json",
    "generation_config.json",
    INDEX,
    *SHARDS,
    *CODE,
    *TOKENIZER,
}


@pytest.fixture
def made(tmp_path):
    """Make a release of a folder, which must stay what it is."""

    def make(source: Path | str, options: ReleaseOptions = QUICK, repo: str = "me/model") -> Release:
        before = contents(Path(source).expanduser())
        folder = tmp_path / "release"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        try:
            return make_release(source, folder, repo, options)
        finally:
            assert contents(Path(source).expanduser()) == before

    return make


# ---- what a good folder becomes


def test_a_release_of_a_model(model, made):
    made_release = made(model, ReleaseOptions())
    files = contents(made_release.folder)
    assert files.keys() == {file.name for file in made_release.files} == MODEL
    assert not made_release.is_adapter and not made_release.left_out
    assert "loaded in a process without this package: same logits, same ids" in made_release.notes
    for name in (*SHARDS, INDEX, "LICENSE", "training.png", "generation_config.json"):
        assert files[name] == (model / name).read_bytes()
    config = json.loads(files["config.json"])
    assert config["auto_map"] == AUTO_MAP and config["architectures"] == ["GrinMoeForCausalLM"]
    card = files["README.md"].decode()
    assert "license: mit" in card and "It was trained on text." in card and "library_name: transformers" in card
    # Making it again gives the same bytes, or a second push would be a commit.
    assert contents(made(model).folder) == files


def test_a_card_is_made_where_there_is_none(model, made):
    (model / "README.md").unlink()
    card = (made(model, repo="me/my-model").folder / "README.md").read_text()
    assert card.startswith("---\n") and '"me/my-model"' in card and "# my-model" in card


def test_the_facts_of_a_training_run_become_the_card(model, made):
    CardFacts(title="Trained", summary="A model that was trained.", license="mit").write(model)
    with pytest.raises(ValueError, match=r"README\.md is not what card\.json beside it makes"):
        made(model)
    (model / "README.md").unlink()
    made_release = made(model)
    card = (made_release.folder / "README.md").read_text()
    assert "A model that was trained." in card
    # Neither are they published, nor does that need saying. The picture is one that this card does not show.
    assert "card.json" not in contents(made_release.folder) and made_release.left_out == ["training.png"]


@pytest.mark.parametrize(
    "model_class, has_generation_config",
    [(GrinMoeForCausalLM, True), (GrinMoeForSequenceClassification, False), (GrinMoeModel, False)],
)
def test_the_config_names_the_class_of_the_weights(tmp_path, made, model_class, has_generation_config):
    folder = save_model(tmp_path / "model", model_class)
    edit_json(folder / "config.json", architectures=["SomethingElse"], auto_map=None)
    (folder / "generation_config.json").unlink(missing_ok=True)
    made_release = made(folder)
    config = json.loads((made_release.folder / "config.json").read_text())
    assert config["architectures"] == [model_class.__name__] and config["auto_map"] == AUTO_MAP
    assert (made_release.folder / "generation_config.json").exists() == has_generation_config
    if has_generation_config:
        assert GenerationConfig.from_pretrained(made_release.folder).eos_token_id == [309, 316]
        assert any("generation_config.json was missing" in note for note in made_release.notes)


def test_the_code_is_the_packages_whatever_lies_in_the_folder(model, made):
    (model / "modeling_grinmoe.py").write_text("raise SystemExit")
    (model / "evil_grinmoe.py").write_text("raise SystemExit")
    made_release = made(model)
    package = next(file for file in code_files() if file.name == "modeling_grinmoe.py")
    assert (made_release.folder / "modeling_grinmoe.py").read_bytes() == package.read_bytes()
    assert made_release.left_out == ["evil_grinmoe.py"]


def test_the_checkpoint_of_a_trainer_goes_without_the_training(model, made):
    state = ["optimizer.pt", "scheduler.pt", "rng_state.pth", "rng_state_0.pth", "training_args.bin", "scaler.pt"]
    state += ["trainer_state.json", "checkpoint-5/optimizer.pt", "checkpoint-5/model.safetensors", "runs/events.out.1"]
    for name in state:
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_bytes(b"\x80\x04state")
    (model / ".cache").mkdir()
    (model / ".cache" / "x").write_text("x")
    made_release = made(model)
    assert contents(made_release.folder).keys() == MODEL
    assert made_release.left_out == sorted([*state, ".cache/x"])


def test_ways_to_name_a_folder(model, made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    expected = contents(made(model).folder)
    for name in ("model", "model/", "./model//", "~/model", str(model) + "/"):
        assert contents(made(name).folder) == expected
    monkeypatch.chdir(model)
    assert contents(made(".").folder) == expected


def test_shards_that_are_links(model, made, tmp_path):
    store = tmp_path / "store"
    store.mkdir()
    expected = contents(made(model).folder)
    for name in SHARDS:
        (model / name).rename(store / name)
        (model / name).symlink_to(Path("..") / "store" / name)
    assert contents(made(model).folder) == expected


def test_a_tokenizer_of_another_folder(model, made, tmp_path):
    for name in TOKENIZER:
        (model / name).unlink()
    tokenizer = tmp_path / "tokenizer"
    small_tokenizer().save_pretrained(tokenizer)
    (tokenizer / "tokenizer.model").write_bytes(b"\n\x07 pieces")
    made_release = made(model, ReleaseOptions(load_check=False, tokenizer=str(tokenizer)))
    assert contents(made_release.folder).keys() == {*MODEL, "tokenizer.model"}
    assert AutoTokenizer.from_pretrained(made_release.folder)("Hello").input_ids == small_tokenizer()("Hello").input_ids
    # There is no config beside it that it could be held against.
    small_tokenizer(400).save_pretrained(tokenizer)
    with pytest.raises(TokenizerError, match="ids up to 354 .* vocab_size is 320"):
        made(model, ReleaseOptions(load_check=False, tokenizer=str(tokenizer)))


def test_notes_say_what_may_be_wrong(model, made):
    edit_json(model / "generation_config.json", eos_token_id=309)
    edit_json(model / "config.json", eos_token_id=2)
    (model / "chat_template.jinja").rename(model / "chat_template.txt")
    notes = " ".join(made(model).notes)
    assert "has no chat template" in notes and "the config with [2]" in notes and "<|end|>" not in notes
    (model / "chat_template.txt").rename(model / "chat_template.jinja")
    assert "a chat with <|end|> (316)" in " ".join(made(model).notes)


# ---- adapters


@pytest.mark.integration
def test_a_release_of_an_adapter(adapter, saved, made):
    """Trained on a folder, which PEFT writes into config, card and tags: the id is put in its place everywhere."""
    options = ReleaseOptions(card=CardOverrides(base_model="me/base"))
    small_tokenizer().save_pretrained(adapter)
    (adapter / "optimizer.pt").write_bytes(b"\x80\x04state")
    made_release = made(adapter, options)
    files = contents(made_release.folder)
    assert files.keys() == {"README.md", "adapter_config.json", "adapter_model.safetensors", *TOKENIZER}
    assert made_release.is_adapter and made_release.left_out == ["optimizer.pt"]
    assert "loaded in a process without this package: same logits" in made_release.notes
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "me/base"
    card = files["README.md"].decode()
    assert "base_model: me/base" in card and "base_model:adapter" not in card and "lora" in card
    assert not any(str(saved).encode() in content for content in files.values())


def test_an_adapter_whose_base_model_is_not_here(adapter, made, tmp_path):
    edit_json(adapter / "adapter_config.json", base_model_name_or_path="me/base")
    (adapter / "README.md").unlink()
    made_release = made(adapter, ReleaseOptions())
    assert any("not loaded for a check" in note for note in made_release.notes)
    assert "base_model: me/base" in (made_release.folder / "README.md").read_text()


@pytest.mark.parametrize(
    "change, note",
    [
        (lambda base, adapter: without("modeling_grinmoe.py")(base), "its base model, with its code, is in no folder"),
        (
            lambda base, adapter: edit_json(adapter / "adapter_config.json", task_type="SEQ_CLS"),
            "it puts another head on its base model",
        ),
    ],
)
def test_an_adapter_that_cannot_be_loaded_for_a_check(model, adapter, made, change, note):
    edit_json(adapter / "adapter_config.json", base_model_name_or_path=str(model))
    change(model, adapter)
    made_release = made(adapter, ReleaseOptions(card=CardOverrides(base_model="me/base")))
    assert any("not loaded for a check: " + note in said for said in made_release.notes)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda folder: None, "not a repository of the Hub; name the one that it was trained on with --base-model"),
        (
            lambda folder: edit_json(folder / "adapter_config.json", base_model_name_or_path=None),
            "base model is None, which is not a repository",
        ),
        (
            lambda folder: (folder / "adapter_config.json").write_text("{"),
            "cannot be read: it is not JSON",
        ),
        (lambda folder: (folder / "adapter_config.json").write_text("[]"), "not a JSON object; save the adapter again"),
        (
            without("adapter_model.safetensors"),
            "holds no adapter_model.safetensors; save the adapter with save_pretrained",
        ),
        (
            lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"short"),
            "is truncated or not safetensors",
        ),
        (poison(float("nan")), "has 2 values that are NaN or infinite"),
    ],
)
def test_bad_adapters(adapter, made, change, message):
    if message.startswith("has 2"):
        edit_json(adapter / "adapter_config.json", base_model_name_or_path="me/base")
        without("README.md")(adapter)
    change(adapter)
    with pytest.raises(ValueError, match=message):
        made(adapter)


def test_a_model_and_an_adapter_in_one_folder(model, adapter, made):
    shutil.copy(adapter / "adapter_config.json", model)
    with pytest.raises(ReleaseError, match="holds a model .* and an adapter .*a folder of its own"):
        made(model)


# ---- folders that must not be published


@pytest.mark.parametrize("name", BAD_FOLDERS)
def test_bad_folders_are_refused_with_a_remedy(model, made, name):
    change, error, message = BAD_FOLDERS[name]
    change(model)
    with pytest.raises(error, match=message) as raised:
        made(model)
    assert isinstance(raised.value, (ValueError, OSError)), "what the command line says in one line"


@pytest.mark.parametrize(
    "name", ["optimizer.pt", "rng_state_3.pth", "training_args.bin", "trainer_state.json", "latest"]
)
def test_training_state_has_a_message_of_its_own(tmp_path, name):
    """Nothing puts it into a release; the check does not rely on that."""
    (tmp_path / name).write_bytes(b"{}")
    with pytest.raises(ReleaseError, match=f"^{name} is training state, which a release does not need; leave it out$"):
        check_files(tmp_path, [name], Private())
    (tmp_path / "WEIGHTS.PT").write_bytes(b"{}")
    with pytest.raises(ReleaseError, match="WEIGHTS.PT is a pickle"):
        check_files(tmp_path, ["WEIGHTS.PT"], Private())


def test_own_template(model, made):
    (model / "chat_template.jinja").write_text("{{ messages[0].content }}")
    made_release = made(model, ReleaseOptions(load_check=False, own_template=True))
    assert (made_release.folder / "chat_template.jinja").read_text() == "{{ messages[0].content }}"


@pytest.mark.parametrize("name", ["", "not-there", "README.md"])
def test_what_is_no_folder(model, tmp_path, monkeypatch, name):
    monkeypatch.chdir(model)
    with pytest.raises(ReleaseError, match="is no folder; give that of a checkpoint or an adapter"):
        make_release(name, tmp_path, "me/model", QUICK)


def test_a_tokenizer_folder_without_a_tokenizer(model, adapter, made, tmp_path):
    options = ReleaseOptions(load_check=False, tokenizer=str(tmp_path), card=CardOverrides(base_model="me/base"))
    for folder in (model, adapter):
        with pytest.raises(ReleaseError, match="--tokenizer .* holds no tokenizer.json"):
            made(folder, options)


def test_weights_that_change_while_they_are_checked(model, made, monkeypatch):
    """A training that goes on: what was checked is not what would be sent."""

    def save_again(weights):
        os.utime(model / SHARDS[0], ns=(1, 1))

    monkeypatch.setattr(release, "check_finite", save_again)
    with pytest.raises(ReleaseError, match="changed while they were checked; push when nothing writes there"):
        made(model)


def test_check_files_with_a_file_over_the_hubs_limit_names_the_remedy(tmp_path):
    (tmp_path / "weights.pt").touch()
    os.truncate(tmp_path / "weights.pt", 51 * 10**9)  # a sparse file, which takes no space on the disk
    with pytest.raises(
        ReleaseError, match=r"has 51.0 GB, the Hub takes .* 50 GB; .* smaller shards \(max_shard_size\)"
    ):
        check_files(tmp_path, ["weights.pt"], Private())


def test_the_memory_for_the_check(model, made, monkeypatch):
    monkeypatch.setattr(os, "sysconf", lambda name: 300)
    with pytest.raises(ReleaseError, match="needs 0 GiB of memory, .* --no-load-check"):
        made(model, ReleaseOptions())


# ---- loading elsewhere


@pytest.mark.integration
def test_code_that_does_not_load_is_not_published(model, made, monkeypatch):
    def broken(folder):
        release_add_remote_code(folder)
        (folder / "routing_grinmoe.py").write_text("raise ImportError('not on this machine')\n")

    release_add_remote_code = release.add_remote_code
    monkeypatch.setattr(release, "add_remote_code", broken)
    with pytest.raises(LoadElsewhereError, match="did not load without the package .*not on this machine") as raised:
        made(model, ReleaseOptions())
    assert isinstance(raised.value, ValueError), "the command line says it in one line"


def test_other_ids_elsewhere_are_an_error(model, made, monkeypatch):
    def other_ids(*arguments, texts, **options):
        return Elsewhere(0.0, {}, [[1]] * len(texts))

    monkeypatch.setattr(release, "load_elsewhere", other_ids)
    with pytest.raises(ReleaseError, match="AutoTokenizer gives other ids without this package"):
        made(model, ReleaseOptions())


def test_logits_that_are_not_finite(model, made):
    """The weights are, but they are too large for what is computed with them."""
    edit_weights(model / SHARDS[2], lambda tensors: [tensor.fill_(3e38) for tensor in tensors.values()])
    with pytest.raises(ReleaseError, match="gives logits that are not finite"):
        made(model, ReleaseOptions())


@pytest.mark.parametrize("content", ["[]", "null"])
@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "model.safetensors.index.json", "tokenizer.json"]
)
def test_json_of_another_kind(model, made, name, content):
    (model / name).write_text(content)
    with pytest.raises(ValueError, match=name.removesuffix(".json").replace(".", r"\.")):
        made(model)


def test_a_tokenizer_file_of_something_else(model, made):
    edit_json(model / "tokenizer.json", something="else")
    with pytest.raises(TokenizerError, match="no tokenizer can be loaded from"):
        made(model)


def test_a_picture_that_is_none(model, made):
    (model / "training.png").write_bytes(b"<script>alert(1)</script>")
    (model / "README.md").write_text("---\nlicense: mit\n---\n# A model\n\n![x](training.png)\n")
    with pytest.raises(ReleaseError, match=r"training\.png is no picture"):
        made(model)


def test_a_picture_with_a_space_in_its_name_is_published_with_the_card_that_shows_it(model, made):
    (model / "training.png").rename(model / "my run.png")
    (model / "README.md").unlink()
    CardFacts(title="Trained", summary="It has a picture.", license="mit", picture="my run.png").write(model)
    folder = made(model).folder
    assert "](my%20run.png)" in (folder / "README.md").read_text() and (folder / "my run.png").is_file()


def test_a_picture_shown_by_html_is_published(model, made):
    (model / "README.md").write_text("---\nlicense: mit\n---\n# A model\n\n<img src='training.png' width='80%'>\n")
    assert (made(model).folder / "training.png").is_file()
