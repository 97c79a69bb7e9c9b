"""Load-adaptive elasticity: while the server misses its objectives, requests that allow it get narrower sub-networks.

The policy holds one number, the *cap*: a latency target out of the frontier's. A request that allows it runs within the
cap, but never below the least target that it names, and follows the cap down, but not up again, for a wider sub-network
would miss keys and values of earlier tokens. Others run as they ask.

Twice a second the policy compares what clients saw with the objectives:

- TPOT: the mean time between two tokens of an answer.
- TTFT: the largest of the mean of those that came, the age of the oldest request without a token, and the wait that a
  new request has to expect: the length of the queue over the rate at which requests leave it.

The worse of the two, as a fraction of its objective, is the *load*. Above 1 the cap goes down to the next rung, and
then rests until its effect can be seen. It goes up to the next rung after several intervals in each of
which the load, scaled by the ratio of the two rungs' latencies, would have stayed well below 1. The two rules leave
a gap between them, so that a steady load does not make the cap swing. More load never gives a wider cap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flextron.errors import FlextronError

__all__ = ["INTERVAL_SECONDS", "Adaptive", "Cap", "Objective"]

INTERVAL_SECONDS = 0.5
"""Seconds between two looks at the load."""
_REST = 2
"""Intervals from one rung down to the next."""
_CALM = 6
"""Calm intervals in a row before the cap goes a rung up."""
_MARGIN = 0.9
"""The most load that may be expected on the wider rung."""
_NEW = 0.3
"""Weight of an interval in the rate at which the queue moves."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Objective:
    """What clients should see."""

    tpot_ms: float | None = None
    """Time between two tokens of an answer."""
    ttft_ms: float | None = None
    """Time from a request's arrival to its first token."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name, value in (("slo_tpot_ms", self.tpot_ms), ("slo_ttft_ms", self.ttft_ms)):
            if value is not None and not 0 < value < float("inf"):
                raise FlextronError(f"{name} must be a number above 0, not {value}")

    def load(self, tpot: float, ttft: float) -> float:
        """The worse of two times in seconds, as a fraction of its objective."""
        pairs = ((tpot, self.tpot_ms), (ttft, self.ttft_ms))
        return max((1000 * seconds / limit for seconds, limit in pairs if limit is not None), default=0.0)


class Cap:
    """A place on a ladder of latency targets."""

    def __init__(self, rungs: Sequence[float]) -> None:
        """Start at the first rung.

        Args:
            rungs: falling fractions of the full model's latency; the first is 1.
        """
        self._rungs, self._at = tuple(rungs), 0
        self._rest, self._calm = 0, 0

    @property
    def value(self) -> float:
        """The widest target, as a fraction of the full model's latency; 1 leaves every request as it is."""
        return self._rungs[self._at]

    @property
    def is_at_rest(self) -> bool:
        """Whether it stays as it is while there is no load."""
        return not (self._at or self._rest or self._calm)

    def update(self, load: float) -> None:
        """Go a rung down or up, or stay, after an interval with this load."""
        self._rest = max(0, self._rest - 1)
        if load > 1:
            self._calm = 0
            if not self._rest and self._at + 1 < len(self._rungs):
                self._at, self._rest = self._at + 1, _REST
        elif self._at and load * self._rungs[self._at - 1] / self.value <= _MARGIN:
            self._calm += 1
            if self._calm == _CALM:
                self._at, self._calm = self._at - 1, 0
        else:
            self._calm = 0


class Adaptive:
    """Watches what clients see, and moves the cap."""

    def __init__(self, objective: Objective, rungs: Sequence[float]) -> None:
        """Start with nothing seen; the arguments are those of `Cap` and of `Objective.load`."""
        self._objective, self._cap = objective, Cap(rungs)
        self._first, self._next = _Mean(), _Mean()
        self._tpot = 0.0
        self._was_waiting = False
        self._rate: float | None = None

    @property
    def cap(self) -> float:
        """The widest latency target of requests that allow a narrower one."""
        return self._cap.value

    def token(self, seconds: float, *, is_first: bool) -> None:
        """Record a token: the time since the one before it, or for the first one since the request's arrival."""
        (self._first if is_first else self._next).add(seconds)

    def further_tokens(self, seconds: float, count: int) -> None:
        """Record so many further tokens at once, whose times come to `seconds` in all."""
        self._next.add(seconds, count)

    @property
    def is_at_rest(self) -> bool:
        """Whether intervals without a request would change nothing."""
        return self._cap.is_at_rest and not (self._tpot or self._was_waiting or self._first.count or self._next.count)

    def end_interval(
        self, seconds: float, *, num_running: int, num_waiting: int, oldest: float, training: float = 0.0
    ) -> None:
        """Set the cap for the next interval.

        Args:
            seconds: the interval's length.
            num_running: requests that the engine works on.
            num_waiting: requests in its queue.
            oldest: seconds since the oldest request without a token arrived; 0 if there is none.
            training: seconds of the interval that went to training. It takes what the objectives leave, so without it
                times would be shorter by that share; no request gets narrower for it.
        """
        # an iteration may take longer than an interval: then the last one counts
        if self._next.count or not num_running:
            self._tpot = self._next.value
        # only while there is a queue do first tokens come as fast as they can
        if num_waiting and self._was_waiting:
            rate = self._first.count / seconds
            self._rate = rate if self._rate is None else (1 - _NEW) * self._rate + _NEW * rate
        self._was_waiting = num_waiting > 0
        wait = num_waiting / self._rate if self._rate else 0.0
        served = max(0.0, 1 - training / seconds)
        self._cap.update(served * self._objective.load(self._tpot, max(self._first.value, oldest, wait)))
        self._first, self._next = _Mean(), _Mean()


@dataclass(slots=True)
class _Mean:
    """The mean of some times in seconds; 0 if there are none."""

    total: float = 0.0
    count: int = 0

    def add(self, seconds: float, count: int = 1) -> None:
        self.total += seconds
        self.count += count

    @property
    def value(self) -> float:
        return self.total / self.count if self.count else 0.0
