"""Measured figures: `python -m benchmarks`; results lie in `benchmarks/results`."""
