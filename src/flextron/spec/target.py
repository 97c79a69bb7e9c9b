"""What a user asks of a sub-network: one limit, on latency, size or loss."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from flextron.errors import FlextronError

__all__ = ["Target"]

_LIMITS = ("latency", "latency_ms", "params", "memory_gb", "max_loss_increase")


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """Exactly one limit; the best sub-network within it is chosen."""

    latency: float | None = None
    """Decode latency as a fraction of the full model's on this device, in (0, 1]."""
    latency_ms: float | None = None
    """Milliseconds per output token on this device."""
    params: int | None = None
    """Parameters, embeddings included."""
    memory_gb: float | None = None
    """Gigabytes (10^9 bytes) of weights, and of keys and values for one sequence of `context` tokens."""
    max_loss_increase: float | None = None
    """Loss above the full model's, as a fraction of it: 0.03 allows 3 % more. The fastest within it is chosen."""
    context: int = 2048
    """Tokens of the sequence that `memory_gb` makes room for; no limit of its own."""

    def __post_init__(self) -> None:
        """Check that exactly one limit is given and that it is positive and finite."""
        given = {name: getattr(self, name) for name in _LIMITS if getattr(self, name) is not None}
        if len(given) != 1:
            raise FlextronError(f"a target is exactly one of {', '.join(_LIMITS)}; got {sorted(given) or 'none'}")
        if type(self.context) is not int or self.context < 1:
            raise FlextronError(f"context must be a whole number of tokens, at least 1, not {self.context!r}")
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
        return next(name for name in _LIMITS if getattr(self, name) is not None)

    @property
    def value(self) -> float:
        """The limit itself."""
        return float(getattr(self, self.axis))
