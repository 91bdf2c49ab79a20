"""A Trainer callback for runs that push to the Hub while they train."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from ..checkpoint_grinmoe import code_files


class CodeWithEveryPush(TrainerCallback):
    """
    Puts the model's code beside what the Trainer pushes, so that every commit of a run loads with `trust_remote_code`.

    With `hub_strategy="every_save"` or "checkpoint" the Trainer copies the file names that it knows (config, weights) from
    a checkpoint; the config's `auto_map` then names code that is not there until the end of the training.

        trainer.add_callback(CodeWithEveryPush())
    """

    def on_push_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        # An adapter is loaded by its base model's code.
        if not state.is_world_process_zero or hasattr(model, "peft_config"):
            return
        folder = Path(args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        for file in code_files():
            shutil.copyfile(file, folder / file.name)
