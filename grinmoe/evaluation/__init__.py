"""`grinmoe evaluate`: scores by lm-eval, with those of the paper beside them."""

from .options import EvaluateOptions
from .run import evaluate, run_evaluate
