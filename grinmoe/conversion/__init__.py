"""Checkpoints of other models and formats: export, import and upcycling."""

from .configs import ConversionError, UnequalLogitsError
from .export import export_checkpoint, run_export
from .options import ExportOptions, UpcycleOptions
from .upcycle import run_upcycle, upcycle_checkpoint
