"""Options of `grinmoe evaluate`."""

from dataclasses import dataclass
from typing import Annotated

from ..files import Device, Dtype, KeptFolder, Model, check_dtype


@dataclass(frozen=True)
class EvaluateOptions:
    """Score a checkpoint by lm-eval, with the scores of the paper beside it.

    Run tasks of lm-eval on a checkpoint and write a table, with the paper's scores where a task is of its Table 2,
    and evaluations.json for the model card. Complete tasks are kept: an interrupted evaluation goes on. Tasks:
    names of the paper's suite (mmlu, arc_c, gsm8k, ...; paper is all of it), other names of lm-eval, or files of
    JSON lines, which need no network.

    example: grinmoe evaluate --model microsoft/GRIN-MoE --tasks arc_c gsm8k --output evaluation
    """

    model: Model
    tasks: Annotated[tuple[str, ...], "names of the paper's suite or of lm-eval, or .jsonl files", "NAME"]
    output: KeptFolder
    limit: Annotated[int | None, "questions of a task, to try it (measures nothing)", "N"] = None
    shots: Annotated[int | None, "examples in the prompt (default: the suite's)", "N"] = None
    batch_size: Annotated[int, "rows at a time", "B"] = 8
    dtype: Dtype = "auto"
    device: Device = None
    chat: Annotated[bool, "put prompts into the chat template"] = False
    allow_code: Annotated[bool, "run the programs that the model writes (HumanEval, MBPP)"] = False

    def __post_init__(self):
        if self.limit is not None and not 1 <= self.limit < 2**31:
            raise ValueError(f"--limit {self.limit} is not a number of questions; give 1 or more, below {2**31}")
        if self.shots is not None and self.shots < 0:
            raise ValueError(f"--shots {self.shots} is negative; give 0 or more")
        if self.batch_size < 1:
            raise ValueError(f"--batch-size {self.batch_size} takes no row; give 1 or more")
        check_dtype(self.dtype)
