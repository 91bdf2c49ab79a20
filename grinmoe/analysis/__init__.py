"""`grinmoe analyze`: a report of how a checkpoint routes texts to its experts."""

from .run import AnalyzeOptions, run_analyze

__all__ = [
    "AnalyzeOptions",
    "run_analyze",
]
