"""Benchmarks: one file per question, run by `python -m benchmarks`, results in results/."""
