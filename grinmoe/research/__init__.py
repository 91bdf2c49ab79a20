"""The router's gradient estimators side by side: enumerated exactly, and trained."""

from .comparison import CompareSettings, prepare_corpus, run_compare, run_comparison
from .enumeration import (
    LOSSES,
    cosine_and_error,
    exact_gradients,
    moments,
    outcome_gradients,
    own_objective,
    random_decision,
)
from .options import CompareOptions
