"""Options of `grinmoe demo`."""

from dataclasses import dataclass
from typing import Annotated


@dataclass(frozen=True)
class DemoOptions:
    """Train a small GRIN MoE on real text, save it, load it elsewhere and talk to it.

    Train a small GRIN MoE from scratch on the question-answer pairs of chatterbot-corpus, evaluate it, save it with
    its code, load it in a process without this package, and chat with it. About 2 minutes on 2 cores.

    example: grinmoe demo --output demo-output
    """

    output: Annotated[str, "new folder, or that of an earlier demo", "DIR"]
    steps: Annotated[int | None, "optimizer steps (default: about 2 minutes)", "N"] = None
    seed: Annotated[int, "of initialisation, data order and routing", "N"] = 0
