"""`grinmoe plan`: whether a training step fits into memory, and how fast it can be."""

from .memory_model import Step
from .options import METHODS, PlanOptions
from .plan import make_plan, run_plan
from .random_model import random_quantized_model
from .roofline import flops_per_token
