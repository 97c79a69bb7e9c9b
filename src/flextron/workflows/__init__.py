"""Whole jobs over the Python face: a recipe from checkpoint to profiled elastic model, and the demo."""
