"""Models and Trainers push repositories that load on their own: code and auto_map, one commit, nothing stale."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from transformers import AutoModelForCausalLM, Trainer, TrainerState, TrainingArguments

from grinmoe import GrinMoeForCausalLM
from grinmoe.checkpoint_grinmoe import AUTO_MAP, code_files, stale_weights
from grinmoe.tokenization import build_tokenizer
from grinmoe.training.hub_callback import CodeWithEveryPush
from tests.fake_hub.server import OTHER

CODE = {file.name for file in code_files()}
CARD = """---
license: mit
tags: moe
model-index:
- name: grin
  results:
  - task: {type: text-generation}
    dataset: {name: Questions, type: questions, args: {num_few_shot: 0}}
    metrics: [{type: accuracy, value: 0.1}]
  - task: {type: text-generation}
    dataset: {name: Questions, type: questions, args: {num_few_shot: 5}}
    metrics: [{type: accuracy, value: 0.2}]
---
# Mine
"""


def loads_as(repo: str, model: GrinMoeForCausalLM, revision: str | None = None) -> bool:
    """Whether the repository gives this model, by the code that it carries."""
    loaded = AutoModelForCausalLM.from_pretrained(repo, revision=revision, trust_remote_code=True)
    expected = model.state_dict()
    return all(torch.equal(tensor, expected[key]) for key, tensor in loaded.state_dict().items())


class TestPushToHub:
    def test_the_repository_loads_and_holds_the_code(self, hub, tiny_model):
        model = tiny_model()
        model.add_model_tags(["mine"])
        model.push_to_hub("grin", max_shard_size="20KB", commit_message="first", tags="moe")
        files = hub.files("writer-user/grin")
        assert files.keys() >= CODE | {"README.md", "generation_config.json", "model.safetensors.index.json"}
        assert json.loads(files["config.json"])["auto_map"] == AUTO_MAP
        assert b"tags:\n- mine\n- moe\n" in files["README.md"]
        assert hub.commits("writer-user/grin")[0].title == "first"
        assert loads_as("writer-user/grin", tiny_model())

    def test_another_number_of_shards_leaves_none_behind(self, hub, tiny_model):
        """A model.safetensors beside an index would be loaded in its place: the old weights, without an error."""
        tiny_model(seed=0).push_to_hub("grin")
        before = len(hub.commits("writer-user/grin"))
        tiny_model(seed=1).push_to_hub("grin", max_shard_size="20KB")
        assert "model.safetensors" not in hub.files("writer-user/grin")
        assert len(hub.commits("writer-user/grin")) == before + 1, "one commit"
        tiny_model(seed=2).push_to_hub("grin")
        weights = [name for name in hub.files("writer-user/grin") if "safetensors" in name]
        assert weights == ["model.safetensors"] and loads_as("writer-user/grin", tiny_model(seed=2))

    def test_push_to_hub_over_a_card_leaves_it_as_it_is(self, hub, tiny_model):
        """Tags go into a first card only."""
        hub.add_commit("writer-user/grin", {"README.md": CARD.encode()})
        tiny_model().push_to_hub("grin")
        tiny_model(seed=1).push_to_hub("grin", tags=["moe", "mixture"])
        assert hub.files("writer-user/grin")["README.md"] == CARD.encode()

    def test_each_branch_keeps_its_own_card(self, hub, tiny_model):
        hub.add_commit("writer-user/grin", {"README.md": b"main"})
        HfApi().create_branch("writer-user/grin", branch="trial")
        hub.add_commit("writer-user/grin", {"README.md": b"trial"}, revision="trial")
        tiny_model().push_to_hub("grin", revision="trial")
        assert hub.files("writer-user/grin", "trial")["README.md"] == b"trial"

    def test_branches_and_pull_requests(self, hub, tiny_model):
        tiny_model(seed=0).push_to_hub("grin")
        tiny_model(seed=1).push_to_hub("grin", revision="trial", private=True)
        request = tiny_model(seed=2).push_to_hub("grin", create_pr=True)
        tiny_model(seed=2).push_to_hub("grin", create_pr=True, revision="new")
        assert request.pr_num is not None and "refs/heads/new" in hub.refs("writer-user/grin")
        for seed, revision in ((0, "main"), (1, "trial"), (2, f"refs/pr/{request.pr_num}")):
            assert loads_as("writer-user/grin", tiny_model(seed=seed), revision)

    def test_push_to_hub_as_a_pull_request_without_write_access(self, hub, tiny_model, monkeypatch):
        tiny_model(seed=0).push_to_hub("grin")
        refs = hub.refs("writer-user/grin")
        monkeypatch.setenv("HF_TOKEN", OTHER)
        with pytest.raises(HfHubHTTPError, match="new"):
            tiny_model(seed=1).push_to_hub("writer-user/grin", create_pr=True, revision="new")
        assert hub.refs("writer-user/grin") == refs, "no branch is made"
        for revision in (None, "main"):
            request = tiny_model(seed=1).push_to_hub("writer-user/grin", create_pr=True, revision=revision)
            assert loads_as("writer-user/grin", tiny_model(seed=1), f"refs/pr/{request.pr_num}")

    def test_a_failed_upload_publishes_nothing(self, hub, tiny_model):
        tiny_model(seed=0).push_to_hub("grin")
        before = hub.files("writer-user/grin")
        hub.fail("/commit/main", 403)
        with pytest.raises(HfHubHTTPError, match="403"):
            tiny_model(seed=1).push_to_hub("grin", max_shard_size="20KB")
        assert hub.files("writer-user/grin") == before


class TestPushWhileSaving:
    def test_only_the_models_own_files_are_sent(self, hub, tiny_model, tmp_path):
        (tmp_path / "grin").mkdir()
        (tmp_path / "grin" / "notes.txt").write_text("mine")
        tiny_model().save_pretrained(tmp_path / "grin", push_to_hub=True, repo_id=None, max_shard_size="20KB")
        files = hub.files("writer-user/grin")
        assert files.keys() >= CODE | {"README.md", "generation_config.json", "model.safetensors.index.json"}
        assert "notes.txt" not in files and loads_as("writer-user/grin", tiny_model())

    def test_a_card_edited_on_the_hub_survives_the_next_save(self, hub, tiny_model, tmp_path):
        tiny_model().save_pretrained(tmp_path / "grin", push_to_hub=True)
        assert "README.md" not in {path.name for path in (tmp_path / "grin").iterdir()}, (
            "nothing is put into the folder"
        )
        hub.add_commit("writer-user/grin", {"README.md": b"# edited"})
        tiny_model(seed=1).save_pretrained(tmp_path / "grin", push_to_hub=True)
        assert hub.files("writer-user/grin")["README.md"] == b"# edited"

    def test_the_folders_own_card_is_the_first_one(self, hub, tiny_model, tmp_path):
        (tmp_path / "grin").mkdir()
        (tmp_path / "grin" / "README.md").write_text(CARD)
        tiny_model().save_pretrained(tmp_path / "grin", push_to_hub=True)
        assert hub.files("writer-user/grin")["README.md"] == CARD.encode()

    def test_options_are_passed_on(self, hub, tiny_model, tmp_path):
        options = {"repo_id": "writer-user/other", "private": True, "revision": "trial", "commit_message": "a trial"}
        tiny_model().save_pretrained(tmp_path / "grin", push_to_hub=True, **options)
        assert HfApi().model_info("writer-user/other").private
        assert hub.commits("writer-user/other", "trial")[0].title == "a trial"
        assert "model.safetensors" not in hub.files("writer-user/other", "main")

    def test_a_failed_upload_costs_no_checkpoint(self, hub, tiny_model, tmp_path):
        hub.fail("/commit/main", 403)
        with pytest.raises(HfHubHTTPError):
            tiny_model().save_pretrained(tmp_path / "grin", push_to_hub=True)
        GrinMoeForCausalLM.from_pretrained(tmp_path / "grin")


@pytest.mark.parametrize(
    "present, entering, stale",
    [
        (["model.safetensors", "notes.txt"], ["model-00001-of-00002.safetensors"], ["model.safetensors"]),
        (
            ["model-00001-of-00002.safetensors", "model.safetensors.index.json", "model.fp16.safetensors"],
            ["model.safetensors"],
            ["model-00001-of-00002.safetensors", "model.safetensors.index.json"],
        ),
        (["model.safetensors"], ["model.fp16.safetensors"], []),
        (["model.safetensors"], ["adapter_model.safetensors"], []),
        (["model.safetensors"], ["config.json"], []),
    ],
    ids=["to shards", "to one file", "another variant", "an adapter", "no weights"],
)
def test_stale_weights(present, entering, stale):
    assert stale_weights(present, entering) == stale


class TestTrainer:
    def test_an_adapters_repository_gets_no_code(self, tmp_path):
        arguments = TrainingArguments(str(tmp_path / "run"), report_to="none")
        CodeWithEveryPush().on_push_begin(arguments, TrainerState(), None, model=SimpleNamespace(peft_config={}))
        assert not (tmp_path / "run").exists()

    def train(self, tiny_model, folder, tokenizer, **options) -> Trainer:
        rows = [{"input_ids": list(range(8)), "labels": list(range(8))}] * 8
        arguments = TrainingArguments(
            str(folder),
            push_to_hub=True,
            hub_model_id="writer-user/trained",
            report_to="none",
            disable_tqdm=True,
            per_device_train_batch_size=2,
            dataloader_pin_memory=False,
            **options,
        )
        model = tiny_model(vocab_size=len(tokenizer))
        trainer = Trainer(model, arguments, train_dataset=rows, processing_class=tokenizer)
        return trainer

    @pytest.fixture(scope="class")
    def tokenizer(self):
        return build_tokenizer(["Hello there"], vocab_size=300)

    def test_push_to_hub_gives_a_repository_that_loads(self, hub, tiny_model, tokenizer, tmp_path):
        trainer = self.train(tiny_model, tmp_path / "run", tokenizer, max_steps=1, save_strategy="no")
        trainer.train()
        trainer.push_to_hub()
        assert hub.files("writer-user/trained").keys() >= CODE | {"tokenizer.json", "chat_template.jinja"}
        assert loads_as("writer-user/trained", trainer.model)

    def test_every_commit_of_a_running_training_loads(self, hub, tiny_model, tokenizer, tmp_path):
        """The Trainer copies files that it knows from a checkpoint; the callback adds the code to each push."""
        trainer = self.train(
            tiny_model,
            tmp_path / "run",
            tokenizer,
            max_steps=2,
            save_steps=1,
            hub_strategy="every_save",
            hub_always_push=True,
        )
        trainer.add_callback(CodeWithEveryPush())
        trainer.train()
        trainer._finish_current_push()
        commits = [commit for commit in hub.commits("writer-user/trained") if "Training in progress" in commit.title]
        assert commits
        for commit in commits:
            assert hub.files("writer-user/trained", commit.sha).keys() >= CODE | {"config.json", "tokenizer.json"}
            AutoModelForCausalLM.from_pretrained("writer-user/trained", revision=commit.sha, trust_remote_code=True)
