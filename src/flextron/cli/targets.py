"""Options that name a target."""

from __future__ import annotations

from typing import Any

__all__ = ["named"]


def named(**limits: float | None) -> dict[str, Any]:
    """Those limits of a target that were given, by the names of `flextron.Target`'s fields."""
    return {name: value for name, value in limits.items() if value is not None}
