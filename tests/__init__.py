"""Tests, in the same rooms as the package."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
