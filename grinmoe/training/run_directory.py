"""The folder of a training: what was asked for, on what it ran, how far it got, and whether a new start may go on in it."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME

from ..configuration_grinmoe import read_json_object
from ..files import atomic_write_text
from ..provenance import environment
from .recipe import Recipe
from .stop import last_whole_checkpoint, remove_partial_checkpoints

RUN_NAME, METRICS_NAME, PICTURE_NAME = "run.json", "metrics.json", "training.png"
RUNNING, STOPPED, COMPLETE = "running", "stopped", "complete"

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
    "include_num_input_tokens_seen torch_empty_cache_steps fsdp fsdp_config accelerator_config parallelism_config".split()
)


@dataclass
class RunFolder:
    """
    A run's folder and what its run.json says.

    Attributes:
        path: the folder.
        settings: of this start, by the names of the flags.
        batch_size: samples of an optimizer step, over all ranks and accumulated micro-batches.
        checkpoint: the newest whole checkpoint that is there, or None.
        removed: names of partial checkpoints that were deleted.
    """

    path: Path
    settings: dict[str, Any]
    batch_size: int
    checkpoint: Path | None = None
    removed: list[str] = field(default_factory=list)
    record: dict[str, Any] = field(default_factory=dict)

    @property
    def result(self) -> Path:
        """Where the trained model or adapter goes."""
        return self.path / ("adapter" if self.settings["method"] in ("lora", "qlora") else "model")

    @property
    def is_complete(self) -> bool:
        """Whether the run has come to its end and its result is there."""
        return self.record.get("status") == COMPLETE and self.result.is_dir()

    @classmethod
    def open(cls, recipe: Recipe, batch_size: int, may_write: bool) -> RunFolder:
        """
        Look at the folder before anything is loaded.

        Args:
            recipe: of this start.
            batch_size: samples of an optimizer step.
            may_write: on the first rank; it removes partial checkpoints.

        Raises:
            ValueError: it is a file; it holds something else than a run; its run had other settings or is to be left alone
                (resume=never).
        """
        folder = cls(recipe.output_dir, recipe.settings(), batch_size)
        if folder.path.is_file():
            raise ValueError(f"output_dir={folder.path} is a file; give a folder")
        if may_write:
            try:
                folder.path.mkdir(parents=True, exist_ok=True)
                tempfile.TemporaryFile(dir=folder.path).close()
            except OSError as error:
                raise ValueError(
                    f"output_dir={folder.path} cannot be written ({error.strerror}); give another folder"
                ) from error
        file = folder.path / RUN_NAME
        if not file.is_file():
            # Logs of a start that failed early do no harm; anything else may be somebody's.
            present = [path.name for path in folder.path.iterdir()] if folder.path.is_dir() else []
            if present:
                raise ValueError(
                    f"output_dir={folder.path} holds {present[0]} and no {RUN_NAME}, so it is no run of this command; "
                    "give a new folder"
                )
            return folder
        if recipe.run.resume == "never":
            raise ValueError(f"output_dir={folder.path} holds a run, and resume=never; give a new folder")
        folder.record = read_json_object(file, remedy="give a new output_dir")
        if not isinstance(folder.record.get("settings"), dict) or not isinstance(folder.record.get("batch_size"), int):
            raise ValueError(f"{file} is not what this command writes; give a new output_dir")
        folder.checkpoint = last_whole_checkpoint(folder.path)
        if folder.checkpoint is not None or any((folder.path / name).is_dir() for name in ("model", "adapter")):
            folder._compare()
        if may_write:
            folder.removed = remove_partial_checkpoints(folder.path)
            if folder.checkpoint is not None:
                _name_best_here(folder.checkpoint)
        return folder

    def compare_data(self, facts: dict[str, int]) -> None:
        """Hold the data against that of the run which is to go on. Raises ValueError if they differ."""
        before = self.record.get("data")
        if self.checkpoint is not None and before is not None and before != facts:
            raise ValueError(
                f"the data has changed since {self.path} was started ({_shown(before)}; now {_shown(facts)}), and the run "
                "cannot go on at its place in it; restore the data, or give a new output_dir"
            )

    def start(self, command: str, data: dict[str, int], report: str) -> None:
        """Write down what now begins."""
        self.path.mkdir(parents=True, exist_ok=True)
        starts = [*self.record.get("starts", [])]
        starts.append({**environment(command), "from": None if self.checkpoint is None else self.checkpoint.name})
        self.record = {
            "status": RUNNING,
            "settings": self.settings,
            "batch_size": self.batch_size,
            "data": data,
            "data_report": report,
            "starts": starts,
        }
        self._write()

    def end(self, status: str, log_history: list[dict[str, Any]], **facts: Any) -> None:
        """Write down how it ended, and all that was logged."""
        atomic_write_text(self.path / METRICS_NAME, json.dumps(log_history, indent=1) + "\n")
        self.record |= {"status": status, **facts}
        self._write()

    def _write(self) -> None:
        atomic_write_text(
            self.path / RUN_NAME, json.dumps(self.record, indent=2, ensure_ascii=False, default=str) + "\n"
        )

    def _compare(self) -> None:
        before = self.record["settings"]
        differing = [
            f"{name}={before.get(name)!r} (now {self.settings.get(name)!r})"
            for name in sorted(before.keys() & self.settings.keys())
            if name not in _MAY_DIFFER and before[name] != self.settings[name]
        ]
        if self.record["batch_size"] != self.batch_size:
            differing.append(
                f"{self.record['batch_size']} samples in a step (now {self.batch_size}: ranks x "
                "per_device_train_batch_size x gradient_accumulation_steps)"
            )
        if differing:
            raise ValueError(
                f"{self.path} holds a run with other settings: {'; '.join(differing)}. Give the same to go on with it, or "
                "a new output_dir"
            )


def _name_best_here(checkpoint: Path) -> None:
    """The Trainer writes down the best checkpoint as output_dir was typed; the folder may be named otherwise by now."""
    file = checkpoint / TRAINER_STATE_NAME
    state = read_json_object(file, max_bytes=2**30, allow_nan=True)  # the Trainer writes its log into it
    best = state.get("best_model_checkpoint")
    here = None if best is None else checkpoint.parent / Path(best).name
    if here is not None and here.is_dir() and str(here) != best:
        state["best_model_checkpoint"] = str(here)
        atomic_write_text(file, json.dumps(state, indent=2) + "\n")


def _shown(facts: dict[str, int]) -> str:
    return ", ".join(f"{value} {name.replace('_', ' ')}" for name, value in facts.items())
