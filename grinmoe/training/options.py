"""Options of `grinmoe sft`, `dpo` and `pretrain` besides a recipe's settings."""

from dataclasses import dataclass
from typing import Annotated


@dataclass(frozen=True)
class RecipeOptions:
    """A recipe of a task, as a file and as flags that differ from it."""

    task: str
    settings: tuple[str, ...] = ()  # flags and values as typed
    config: Annotated[str | None, "YAML; recipes/ has some to start from", "FILE"] = None
    options: Annotated[bool, "list all keys and flags, and exit"] = False


class SftOptions(RecipeOptions):
    """Fine-tune on chats, prompts with answers, or text.

    Supervised fine-tuning: the loss is over the assistant's text (or the completion, or all).

    example: grinmoe sft --config recipes/sft_qlora.yaml --learning_rate 1e-4 --output_dir runs/sft
    """


class DpoOptions(RecipeOptions):
    """Train on preferences: a chosen and a rejected answer to each prompt.

    Direct preference optimisation with TRL's DPOTrainer.

    example: grinmoe dpo --config recipes/dpo_qlora.yaml --learning_rate 1e-4 --output_dir runs/dpo
    """


class PretrainOptions(RecipeOptions):
    """Train on plain text, from scratch or on from a checkpoint.

    Texts are joined and cut into rows of max_length; attention does not cross from one text into another.

    example: grinmoe pretrain --config recipes/pretrain_small.yaml --learning_rate 1e-4 --output_dir runs/pretrain
    """
