"""Saving: nothing is lost when it fails, is killed or cannot upload, and what is left loads or says why not."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import grinmoe.checkpoint_grinmoe as checkpoint
from grinmoe import GrinMoeForCausalLM
from grinmoe.checkpoint_grinmoe import CheckpointFileError, replaced_when_whole
from tests.model.test_checkpoint import weights_of


class TestSafeSaving:
    """A save that fails leaves the previous checkpoint as it was."""

    @pytest.fixture
    def saved(self, tiny_model, tmp_path):
        tiny_model(seed=0).save_pretrained(tmp_path / "model", max_shard_size="20KB")
        return tmp_path / "model"

    def content(self, folder: Path) -> dict[str, bytes]:
        return {file.name: file.read_bytes() for file in folder.iterdir()}

    @pytest.mark.parametrize("failing_shard", [0, 2])
    def test_full_disk(self, saved, tiny_model, monkeypatch, failing_shard):
        before = self.content(saved)
        written = []

        def full_disk(tensors, filename, metadata=None):
            if len(written) == failing_shard:
                Path(filename).write_bytes(b"half a shard")
                raise OSError(errno.ENOSPC, "No space left on device", str(filename))
            written.append(filename)
            save_file(tensors, filename, metadata=metadata)

        monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full_disk)
        with pytest.raises(OSError, match="No space left"):
            tiny_model(seed=1).save_pretrained(saved, max_shard_size="20KB")
        assert len(written) == failing_shard
        assert self.content(saved) == before
        GrinMoeForCausalLM.from_pretrained(saved)

    def test_folders_that_were_made_for_it_go_again(self, tmp_path):
        """And no others."""
        (tmp_path / "mine").mkdir()
        with pytest.raises(KeyboardInterrupt), replaced_when_whole(tmp_path / "mine" / "new" / "model"):
            raise KeyboardInterrupt
        assert list(tmp_path.rglob("*")) == [tmp_path / "mine"]

    @pytest.mark.parametrize("failing_move", [0, 1, 5, 9, 14, 22])
    @pytest.mark.parametrize("max_shard_size", ["20KB", "5GB"])
    def test_a_move_that_fails_is_undone(self, saved, tiny_model, monkeypatch, failing_move, max_shard_size):
        """Same shard names or others: there is never a mixture of the two checkpoints."""
        before, moves, replace = self.content(saved), [], os.replace

        def failing(source, target):
            moves.append(target)
            if len(moves) == failing_move + 1:
                raise OSError(errno.EIO, "Input/output error", str(target))
            replace(source, target)

        monkeypatch.setattr("os.replace", failing)
        with pytest.raises(OSError, match="Input/output error"):
            tiny_model(seed=1, rope_theta=5e5).save_pretrained(saved, max_shard_size=max_shard_size)
        assert len(moves) > failing_move
        assert self.content(saved) == before

    @pytest.mark.parametrize("failing_from", [1, 5, 14])
    def test_a_disk_that_goes_on_failing_costs_no_file(self, saved, tiny_model, monkeypatch, failing_from):
        """Moves that can neither be done nor undone: the old files are all still there, and nothing loads wrongly."""
        before, moves, replace = weights_of(saved), [], os.replace

        def failing(source, target):
            if len(moves) >= failing_from:
                raise OSError(errno.EIO, "Input/output error", str(target))
            moves.append(target)
            replace(source, target)

        monkeypatch.setattr("os.replace", failing)
        with pytest.raises(OSError, match="Input/output error"):
            tiny_model(seed=1).save_pretrained(saved, max_shard_size="20KB")
        kept = [load_file(file) for file in saved.rglob("*.safetensors")]
        for key, tensor in before.items():
            assert any(torch.equal(shard[key], tensor) for shard in kept if key in shard), key
        with pytest.raises(CheckpointFileError, match=r"holds no config\.json; a save was interrupted"):
            GrinMoeForCausalLM.from_pretrained(saved)

    @pytest.mark.parametrize("killed_at", [0, 3, 11, 19])
    def test_a_killed_save_leaves_nothing_that_loads_wrongly(self, saved, tiny_model, killed_at):
        before = weights_of(saved)
        process = os.fork()
        if process == 0:  # dies like by SIGKILL: no handler, no finally
            moves, replace = [], os.replace
            os.replace = lambda *paths: (
                os._exit(9) if len(moves) == killed_at else (moves.append(paths), replace(*paths))
            )
            tiny_model(seed=1, rope_theta=5e5).save_pretrained(saved, max_shard_size="20KB")
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 9
        if killed_at == 0:
            assert all(torch.equal(tensor, before[key]) for key, tensor in weights_of(saved).items())
        else:
            with pytest.raises(CheckpointFileError, match=r"holds no config\.json; a save was interrupted"):
                GrinMoeForCausalLM.from_pretrained(saved)
            kept = [load_file(file) for file in saved.rglob("*.safetensors")]
            assert sum(torch.equal(t[key], before[key]) for t in kept for key in t) >= len(before), "nothing is lost"
        tiny_model(seed=2).save_pretrained(saved, max_shard_size="20KB")
        assert not list(saved.glob(".saving-*"))
        again = GrinMoeForCausalLM.from_pretrained(saved).state_dict()
        assert all(torch.equal(tensor, again[key]) for key, tensor in tiny_model(seed=2).state_dict().items())

    def test_variants_replace_only_their_own_shards(self, saved, tiny_model):
        tiny_model().save_pretrained(saved, variant="fp16", max_shard_size="20KB")
        assert (saved / "model.safetensors.index.fp16.json").exists()
        tiny_model(seed=1).save_pretrained(saved, variant="fp16")
        names = {file.name for file in saved.iterdir()}
        assert not (saved / "model.safetensors.index.fp16.json").exists() and "model.fp16.safetensors" in names
        assert not [name for name in names if name.startswith("model.fp16-")]
        assert (saved / "model.safetensors.index.json").exists()
        GrinMoeForCausalLM.from_pretrained(saved)
        GrinMoeForCausalLM.from_pretrained(saved, variant="fp16")

    def test_shards_of_the_previous_checkpoint_go(self, saved, tiny_model):
        (saved / "notes.txt").write_text("mine")
        tiny_model(seed=1).save_pretrained(saved)
        names = {file.name for file in saved.iterdir()}
        assert "model.safetensors" in names and "notes.txt" in names
        assert not [n for n in names if n.startswith("model-") or n.endswith(".index.json") or n.startswith(".saving")]
        tiny_model(seed=0).save_pretrained(saved, max_shard_size="20KB")
        assert not (saved / "model.safetensors").exists()
        GrinMoeForCausalLM.from_pretrained(saved)

    def test_saving_over_the_files_it_was_loaded_from(self, saved):
        model = GrinMoeForCausalLM.from_pretrained(saved)
        before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        model.save_pretrained(saved, max_shard_size="20KB")
        again = GrinMoeForCausalLM.from_pretrained(saved).state_dict()
        assert all(torch.equal(before[key], again[key]) for key in before)

    def test_the_source_folder_is_refused(self, tiny_model):
        here = Path(checkpoint.__file__).resolve().parent
        for folder in (here, os.path.relpath(here)):
            with pytest.raises(ValueError, match="source code"):
                tiny_model().save_pretrained(folder)

    def test_a_file_is_refused(self, tiny_model, tmp_path):
        (tmp_path / "taken").write_text("")
        with pytest.raises(ValueError, match="is a file"):
            tiny_model().save_pretrained(tmp_path / "taken")

    def test_no_name_and_a_dangling_link_are_refused(self, tiny_model, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "link").symlink_to("nowhere")
        with pytest.raises(ValueError, match="save_directory is empty"):
            tiny_model().save_pretrained("")
        with pytest.raises(ValueError, match="leads nowhere"):
            tiny_model().save_pretrained("link")
        assert [path.name for path in tmp_path.iterdir()] == ["link"]

    def test_whoever_may_read_the_config_may_read_the_weights(self, saved):
        """safetensors writes files that only their owner can read, which a shared folder is not for."""
        assert len({file.stat().st_mode for file in saved.iterdir()}) == 1

    def test_code_and_auto_map_travel_along(self, saved):
        names = {file.name for file in saved.glob("*.py")}
        assert names == {file.name for file in checkpoint.code_files()} and "modeling_grinmoe.py" in names
        assert json.loads((saved / "config.json").read_text())["auto_map"] == checkpoint.AUTO_MAP
