"""The router's gradient estimators side by side: enumerated exactly, and trained."""

from .comparison import CompareSettings, RunsFailedError, prepare_corpus, run_comparison, settings_here
from .enumeration import (
    LOSSES,
    cosine_and_error,
    exact_gradients,
    moments,
    outcome_gradients,
    own_objective,
    random_decision,
)

__all__ = [
    "LOSSES",
    "CompareSettings",
    "RunsFailedError",
    "cosine_and_error",
    "exact_gradients",
    "moments",
    "outcome_gradients",
    "own_objective",
    "prepare_corpus",
    "random_decision",
    "run_comparison",
    "settings_here",
]
