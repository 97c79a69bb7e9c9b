"""What a user asks of a sub-network: one limit, on latency, size or loss."""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields

from flextron.errors import FlextronError

__all__ = ["Target"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """Exactly one limit; the best sub-network within it is chosen."""

    latency: float | None = None
    """Decode latency as a fraction of the full model's on this device, in (0, 1]."""
    latency_ms: float | None = None
    """Milliseconds per output token on this device."""
    params: int | None = None
    """Parameters, embeddings included."""
    max_loss_increase: float | None = None
    """Loss above the full model's, as a fraction of it: 0.03 allows 3 % more. The fastest within it is chosen."""

    def __post_init__(self) -> None:
        """Check that exactly one limit is given and that it is positive and finite."""
        given = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}
        if len(given) != 1:
            names = ", ".join(f.name for f in fields(self))
            raise FlextronError(f"a target is exactly one of {names}; got {sorted(given) or 'none'}")
        ((name, value),) = given.items()
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
            raise FlextronError(f"{name} must be a finite number, not {value!r}")
        if value < 0 or (value == 0 and name != "max_loss_increase"):
            raise FlextronError(f"{name} must be positive, not {value!r}")
        if name == "latency" and value > 1:
            raise FlextronError(f"latency is a fraction of the full model's, in (0, 1]; got {value!r}")

    @property
    def axis(self) -> str:
        """The name of the limit that is set."""
        return next(f.name for f in fields(self) if getattr(self, f.name) is not None)

    @property
    def value(self) -> float:
        """The limit itself."""
        return float(getattr(self, self.axis))
