"""Whole jobs over the Python API: a recipe from checkpoint to profiled elastic model, and the demo."""
