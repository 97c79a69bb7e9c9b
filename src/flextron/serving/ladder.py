"""The few latency targets that a server offers, and which of them a request gets while the server is busy."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

__all__ = ["fractions", "narrowed", "rungs"]

_MOST_LISTED = 8


def fractions(latencies: Iterable[float]) -> list[float]:
    """Latencies of a frontier's points, rounded up, so that each reaches its point; falling, few, spread evenly."""
    found = {math.ceil(latency * 100 - 1e-6) / 100 for latency in latencies if latency <= 1}
    ordered = sorted(found, reverse=True)
    last, most = len(ordered) - 1, _MOST_LISTED - 1
    return ordered if last <= most else [ordered[round(i * last / most)] for i in range(_MOST_LISTED)]


def rungs(offered: Iterable[float]) -> tuple[float, ...]:
    """The steps by which requests get narrower: 1, and what is offered below it."""
    return (1.0, *(f for f in offered if f < 1))


def narrowed(wanted: float, cap: float, least: float, steps: Sequence[float]) -> float:
    """The latency target of a request that allows a narrower one.

    Args:
        wanted: what it asked for; 1 is the full sub-network.
        cap: the widest one for now.
        least: the narrowest that it allows.
        steps: a result of `rungs`.
    """
    return min(wanted, max(cap, least, steps[-1]))
