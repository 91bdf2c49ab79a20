"""`grinmoe analyze`: a report of how a checkpoint routes texts to its experts."""

from .options import AnalyzeOptions
from .run import run_analyze
