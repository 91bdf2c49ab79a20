"""The folder of a training: what was asked for, on what it ran, how far it got, and whether a new start may go on in it."""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..checkpoint_grinmoe import write_through
from ..configuration_grinmoe import read_json_object
from ..distributed import has_manifest
from ..files import atomic_write_text
from ..outputs import check_folder
from ..provenance import environment
from .checkpoints import FoundCheckpoints, best_checkpoint, check_told, find_checkpoints, set_aside
from .recipe import Recipe
from .run_lock import LOCK_NAME

RUN_NAME, METRICS_NAME, PICTURE_NAME = "run.json", "metrics.json", "training.png"
RUNNING, STOPPED, COMPLETE = "running", "stopped", "complete"

# What a killed start leaves of the files above, by `atomic_file`.
_TEMPORARY = re.compile(r"\.(run|metrics|training)-[a-z0-9_]{8}\.(json|png)")

# Settings that say how a run is watched, where its time goes or how often it is saved, not what it computes. The two of
# the batch are compared as their product with the number of ranks.
_MAY_DIFFER = frozenset(
    "output_dir resume watch_routers early_stopping_patience per_device_train_batch_size gradient_accumulation_steps "
    "per_device_eval_batch_size disable_tqdm report_to project trackio_space_id trackio_bucket_id trackio_static_space_id "
    "run_name log_level log_level_replica log_on_each_node "
    "logging_dir logging_strategy logging_first_step logging_steps logging_nan_inf_filter eval_strategy eval_steps "
    "eval_delay eval_on_start eval_accumulation_steps load_best_model_at_end metric_for_best_model greater_is_better "
    "save_strategy save_steps save_total_limit save_on_each_node dataloader_num_workers dataloader_prefetch_factor "
    "dataloader_persistent_workers dataloader_pin_memory push_to_hub hub_model_id hub_strategy hub_token hub_private_repo "
    "hub_always_push hub_revision local_rank ddp_backend ddp_timeout ddp_bucket_cap_mb skip_memory_metrics "
    "include_num_input_tokens_seen torch_empty_cache_steps fsdp fsdp_config accelerator_config parallelism_config "
    "restore_callback_states_from_checkpoint".split()
)


@dataclass
class RunFolder:
    """
    A run's folder and what its run.json says.

    Attributes:
        path: the folder, absolute.
        settings: of this start, by the names of the flags.
        batch_size: samples of an optimizer step, over all ranks and accumulated micro-batches.
        run: the run's id, which its checkpoints carry.
        found: its checkpoints.
    """

    path: Path
    settings: dict[str, Any]
    batch_size: int
    run: str
    found: FoundCheckpoints = field(default_factory=FoundCheckpoints)
    record: dict[str, Any] = field(default_factory=dict)

    @property
    def checkpoint(self) -> Path | None:
        """The checkpoint to go on from."""
        return self.found.newest

    @property
    def result(self) -> Path:
        """Where the trained model or adapter goes."""
        return self.path / ("adapter" if self.settings["method"] in ("lora", "qlora") else "model")

    @property
    def is_complete(self) -> bool:
        """Whether the run has come to its end and its result is there."""
        return self.record.get("status") == COMPLETE and self.result.is_dir()

    @classmethod
    def locate(cls, recipe: Recipe) -> Path:
        """
        The absolute path of a recipe's run directory, which may not be there yet.

        Raises:
            ValueError: something that is not a folder is at that path, or above it; it lies in another run directory; or
                the path is not UTF-8.
        """
        path = check_folder(recipe.output_dir, "output_dir")
        try:
            os.fspath(path).encode()
        except UnicodeEncodeError:
            raise ValueError(
                f"output_dir={os.fspath(path)!r} holds bytes that are not UTF-8, and {RUN_NAME} could not name it; give "
                "another folder"
            ) from None
        for parent in path.parents:
            if _is_record(parent / RUN_NAME):
                raise ValueError(
                    f"output_dir={recipe.output_dir} lies in {parent}, the folder of another run, which may delete it; "
                    "give a folder elsewhere"
                )
        return path

    @classmethod
    def open(cls, path: Path, recipe: Recipe, batch_size: int, tell: Callable[[str], Any] | None = None) -> RunFolder:
        """
        Look at the folder, which is locked, before anything is loaded. Nothing is changed.

        Args:
            path: of `locate`.
            recipe: of this start.
            batch_size: samples of an optimizer step.
            tell: gets a sentence before what takes long.

        Raises:
            ValueError: it holds something other than a run; its run had other settings or is to be left alone
                (resume=never); or there are checkpoints, and none to go on from exactly.
        """
        folder = cls(path, recipe.settings(), batch_size, uuid.uuid4().hex)
        file = folder.path / RUN_NAME
        if not os.path.lexists(file):
            present = sorted(one.name for one in path.iterdir() if one.name != LOCK_NAME and not _is_temporary(one))
            if present:
                raise ValueError(
                    f"output_dir={folder.path} holds {present[0]} and no {RUN_NAME}, so it is not a run of this command; "
                    "give a new folder"
                )
            return folder
        if recipe.run.resume == "never":
            raise ValueError(f"output_dir={folder.path} holds a run, and resume=never; give a new folder")
        folder.record = read_json_object(file, remedy="give a new output_dir", max_bytes=2**30, allow_nan=True)
        if not _is_valid(folder.record):
            raise ValueError(f"{file} is not what this command writes; give a new output_dir")
        if folder.is_complete:
            folder._compare()
            return folder
        if not isinstance(folder.record.get("run"), str) or not isinstance(folder.record.get("digests"), dict):
            raise ValueError(
                f"{file} was written by an earlier version of this command, whose checkpoints have no checksums; finish the "
                "run with that version, or give a new output_dir"
            )
        folder.run = folder.record["run"]
        folder.found = find_checkpoints(folder.path, folder.run, tell)
        if folder.checkpoint is None and folder.found.damaged:
            raise ValueError(
                f"{folder.found.damaged[0][1]}. No whole checkpoint is left to go on from: restore that one, move it "
                "elsewhere to start anew, or give a new output_dir"
            )
        if folder.checkpoint is not None:
            folder._compare(_places(folder.settings))
        elif any((folder.path / name).is_dir() for name in ("model", "adapter")):
            folder._compare()
        if folder.checkpoint is not None:
            folder._check_resume(recipe, tell)
        return folder

    def _check_resume(self, recipe: Recipe, tell: Callable[[str], Any] | None) -> None:
        """What the files of a whole checkpoint do not tell."""
        assert self.checkpoint is not None
        arguments: Any = recipe.training
        if getattr(arguments, "sync_ref_model", False):
            raise ValueError(
                f"{self.path} holds a run with sync_ref_model=True, whose reference model is not in the checkpoints, so it "
                "cannot go on; give a new output_dir"
            )
        if not arguments.load_best_model_at_end:
            return
        best = best_checkpoint(self.checkpoint)
        if best is None or best == self.checkpoint:
            return
        remedy = "restore it, give --load_best_model_at_end false without early stopping, or a new output_dir"
        if not best.is_dir() or not has_manifest(best):
            raise ValueError(f"{best}, the best checkpoint so far, is not there or not whole; {remedy}")
        try:
            check_told(best, tell)
        except ValueError as error:
            raise ValueError(f"{error}. It is the best checkpoint so far: {remedy}") from error

    def compare_inputs(self, data: dict[str, int], digests: dict[str, str | None]) -> None:
        """
        Hold data and model against those of the run that is to go on.

        Raises:
            ValueError: they differ.
        """
        if self.checkpoint is None:
            return
        before = self.record["data"]
        if before != data:
            raise ValueError(
                f"the data has changed since {self.path} was started ({_shown(before)}; now {_shown(data)}), and the run "
                "cannot go on at its place in it; restore the data, or give a new output_dir"
            )
        named = {"data": "rows of the data, or the tokenizer, have", "model": "model has", "adapter": "adapter has"}
        for name, digest in digests.items():
            if self.record["digests"].get(name) != digest:
                raise ValueError(
                    f"the {named[name]} changed since {self.path} was started, and the run cannot go on exactly; restore "
                    "what was there, or give a new output_dir"
                )

    def start(
        self, command: str, data: dict[str, int], report: str, digests: dict[str, str | None] | None = None
    ) -> list[str]:
        """
        Write down what now begins, and clear away what a killed start has left.

        Returns:
            What was deleted or renamed, in sentences.
        """
        said = []
        for folder in self.found.partial:
            shutil.rmtree(folder)
            said.append(f"{folder.name} was cut off while it was written or deleted; removed")
        for folder, reason in self.found.damaged:
            said.append(f"{reason}. It is kept as {set_aside(folder).name}")
        for file in self.path.iterdir():
            if _is_temporary(file):
                file.unlink()
        starts = [*self.record.get("starts", [])]
        starts.append({**environment(command), "from": None if self.checkpoint is None else self.checkpoint.name})
        self.record = {
            "status": RUNNING,
            "run": self.run,
            "settings": self.settings,
            "batch_size": self.batch_size,
            "data": data,
            "digests": digests or {},
            "data_report": report,
            "starts": starts,
        }
        self._write()
        return said

    def end(self, status: str, log_history: list[dict[str, Any]], **facts: Any) -> None:
        """Write down how it ended, and all that was logged."""
        atomic_write_text(self.path / METRICS_NAME, json.dumps(log_history, indent=1) + "\n")
        self.record |= {"status": status, **facts}
        self._write()

    def _write(self) -> None:
        atomic_write_text(
            self.path / RUN_NAME, json.dumps(self.record, indent=2, ensure_ascii=False, default=str) + "\n"
        )
        write_through(self.path, self.path.parent)

    def _compare(self, but: Collection[str] = ()) -> None:
        before = self.record["settings"]
        differing = [
            f"{name}={before.get(name)!r} (now {self.settings.get(name)!r})"
            for name in sorted(before.keys() & self.settings.keys())
            if name not in _MAY_DIFFER and name not in but and before[name] != self.settings[name]
        ]
        if self.record["batch_size"] != self.batch_size:
            differing.append(
                f"{self.record['batch_size']} samples in a step (now {self.batch_size}: ranks x "
                "per_device_train_batch_size x gradient_accumulation_steps)"
            )
        differing += [
            f"{name}={before[name]!r} (now {self.settings.get(name)!r}), by which the best checkpoint was chosen"
            for name in ("metric_for_best_model", "greater_is_better")
            if None not in (before.get(name), self.settings.get(name)) and before[name] != self.settings[name]
        ]
        if differing:
            raise ValueError(
                f"{self.path} holds a run with other settings: {'; '.join(differing)}. Give the same to go on with it, or "
                "a new output_dir"
            )


def _places(settings: dict[str, Any]) -> set[str]:
    """
    Settings that say where something is, of which `compare_inputs` compares the content.

    A run may have been copied to another machine. Of a model on the Hub only the commit is compared, and thus its name too.
    """
    local = {name for name in ("model", "model_config", "adapter") if os.path.exists(settings.get(name) or "")}
    return {"train_data", "eval_data", "tokenizer"} | local


def _is_valid(record: dict[str, Any]) -> bool:
    kinds: dict[str, type] = {"settings": dict, "batch_size": int, "data": dict, "starts": list}
    if record.get("status") == COMPLETE:
        kinds |= {"step": int, "metrics": dict}
    return all(isinstance(record.get(name), kind) for name, kind in kinds.items())


def _is_record(file: Path) -> bool:
    """Whether a file is the run.json of this command, and not some other file of that name."""
    try:
        return file.is_file() and _is_valid(read_json_object(file, max_bytes=2**30, allow_nan=True))
    except (OSError, ValueError):
        return False


def _is_temporary(path: Path) -> bool:
    """Whether a file was one of `atomic_file` for a file of the run directory."""
    if not _TEMPORARY.fullmatch(path.name) or path.is_symlink() or not path.is_file():
        return False
    return not hasattr(os, "geteuid") or path.stat().st_uid == os.geteuid()


def _shown(facts: dict[str, int]) -> str:
    return ", ".join(f"{value} {name.replace('_', ' ')}" for name, value in facts.items())
