"""What the engine learns of its own times, to know beforehand how long something will take."""

from __future__ import annotations

import math
from collections import deque

__all__ = ["RecentTimes", "Reserve", "TimeLine"]


class Reserve:
    """The part of an objective that is held back, learnt from who met it."""

    _RANGE = (0.05, 0.6)
    _AFTER_MISS, _AFTER_HIT = 0.05, 0.001

    def __init__(self) -> None:
        """Begin with a little."""
        self.part = 0.1
        """From 0 to 1."""

    def learn(self, was_met: bool) -> None:
        """Take in a request: the part grows while more than one in fifty misses."""
        least, most = self._RANGE
        self.part = min(max(self.part + (-self._AFTER_HIT if was_met else self._AFTER_MISS), least), most)


class RecentTimes:
    """The durations of the last iterations, for a time that nearly all of them keep."""

    _KEPT = 100
    _SHARE = 0.95

    def __init__(self) -> None:
        """Know nothing."""
        self._seconds: deque[float] = deque(maxlen=self._KEPT)
        self.expected = 0.0
        """The 95th percentile, in seconds: the longest of up to twenty; 0 before the first."""

    def add(self, seconds: float) -> None:
        """Take in a duration."""
        self._seconds.append(seconds)
        self.expected = sorted(self._seconds)[math.ceil(self._SHARE * len(self._seconds)) - 1]


class TimeLine:
    """Seconds of an iteration over its number of tokens: a straight line through what was measured lately."""

    _FORGET = 0.98
    _SLOPE = 0.05
    """Assumed before two sizes were seen: a further token costs that much of the first one's time."""

    def __init__(self) -> None:
        """Know nothing."""
        self._w = self._x = self._y = self._xx = self._xy = 0.0

    def add(self, num_tokens: int, seconds: float) -> None:
        """Take in a measurement."""
        if self._w and seconds > 5 * self(num_tokens):  # the machine was busy with something else
            seconds = 5 * self(num_tokens)
        old, x = self._FORGET, float(num_tokens)
        self._w, self._x, self._y = old * self._w + 1, old * self._x + x, old * self._y + seconds
        self._xx, self._xy = old * self._xx + x * x, old * self._xy + x * seconds

    def __bool__(self) -> bool:
        """Whether anything was measured."""
        return self._w > 0

    def __call__(self, num_tokens: int) -> float:
        """Expected seconds."""
        x, y = self._x / self._w, self._y / self._w
        variance = self._xx / self._w - x * x
        slope = self._SLOPE * y / (1 + self._SLOPE * (x - 1))
        if variance > 1e-6:
            slope = min(max((self._xy / self._w - x * y) / variance, 0.0), y / x)
        return y + slope * (num_tokens - x)
