"""Types of the functions that callers pass to hear how far long work is."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["OnProgress", "OnStep"]

OnProgress = Callable[[int, int], object]
"""Called with how much is done and how much there is in all."""
OnStep = Callable[[int, int, dict[str, float]], object]
"""Called after each step with steps done, steps in all, and figures such as losses."""
