"""Options of `grinmoe demo` (see `grinmoe/options.py`)."""

from dataclasses import dataclass
from typing import Annotated


@dataclass(frozen=True)
class DemoOptions:
    """Where the demo goes, and how long it trains."""

    output: Annotated[str, "new folder, or that of an earlier demo", "DIR"]
    steps: Annotated[int | None, "optimizer steps (default: about 2 minutes)", "N"] = None
    seed: Annotated[int, "of initialisation, data order and routing", "N"] = 0
