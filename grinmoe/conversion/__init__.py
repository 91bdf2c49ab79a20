"""Checkpoints of other models and formats: export, import and upcycling."""

from .configs import ConversionError
from .export import ExportOptions, export_checkpoint, run_export
from .upcycle import UpcycleOptions, run_upcycle, upcycle_checkpoint

__all__ = [
    "ConversionError",
    "ExportOptions",
    "UpcycleOptions",
    "export_checkpoint",
    "run_export",
    "run_upcycle",
    "upcycle_checkpoint",
]
