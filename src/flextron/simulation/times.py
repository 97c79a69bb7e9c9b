"""How long an iteration takes, in whole picoseconds.

The sums of whole numbers are exact in any order. So many equal iterations can be leapt over at once, and end when they
would have ended one by one.

Tokens of several sub-networks share the rows of the weights that all of them use (`model/nested.py`). The time is
cut the same way: what the narrowest sub-network takes for all tokens, and for each wider one what it takes longer than
the next narrower one, for the tokens that are as wide.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from flextron.simulation.machine import Machine

__all__ = ["PICOSECONDS", "Chunk", "Clock", "IterationTimes", "Leap"]

PICOSECONDS = 10**12
"""Picoseconds of a second."""


class Clock:
    """Time that passes only when something is computed."""

    __slots__ = ("ps",)

    def __init__(self) -> None:
        """Start at zero."""
        self.ps = 0
        """Whole picoseconds."""

    def __call__(self) -> float:
        """Seconds."""
        return self.ps / PICOSECONDS


class Chunk(NamedTuple):
    """Tokens of a request that an iteration computes."""

    network: int
    """Index of its sub-network."""
    start: int
    """Tokens before them."""
    num_new: int


class IterationTimes:
    """Times of a machine's iterations."""

    def __init__(self, machine: Machine) -> None:
        """Take the machine's curves."""
        self._networks = machine.networks
        per_ms = PICOSECONDS // 1000
        self._key = [round(machine.ms_per_1000_keys * n.kv_share * per_ms / 1e3) for n in machine.networks]
        self._pair = [round(machine.ms_per_1000000_pairs * n.kv_share * per_ms / 1e6) for n in machine.networks]
        self._per_ms = per_ms
        self._known: dict[tuple[int, ...], int] = {}

    def sizes(self, counts: tuple[int, ...]) -> int:
        """Picoseconds of an iteration by its tokens in each sub-network, the widest first; without attention."""
        found = self._known.get(counts)
        if found is None:
            ms, before = 0.0, 0
            for network, count in zip(self._networks, counts, strict=True):
                if count:
                    ms += network.ms(before + count) - (network.ms(before) if before else 0.0)
                    before += count
            found = self._known[counts] = max(1, round(ms * self._per_ms))
        return found

    def iteration(self, chunks: Iterable[Chunk]) -> int:
        """Picoseconds of an iteration that computes these tokens."""
        counts, attention = [0] * len(self._networks), 0
        for network, start, num_new in chunks:
            counts[network] += num_new
            if num_new == 1:
                attention += self._key[network] * (start + 1)
            else:
                attention += self._pair[network] * (num_new * start + num_new * (num_new + 1) // 2)
        return self.sizes(tuple(counts)) + attention

    def leap(self, chunks: Sequence[Chunk], num_iterations: int) -> Leap:
        """So many iterations, of which this is the first, and in which each of these requests gets a token."""
        return Leap(self.iteration(chunks), sum(self._key[chunk.network] for chunk in chunks), num_iterations)


class Leap:
    """Iterations of the same requests, each of which attends to one more key every time."""

    __slots__ = ("_first", "_growth", "num_iterations")

    def __init__(self, first: int, growth: int, num_iterations: int) -> None:
        """Take picoseconds of the first iteration, and how much longer each is than the one before."""
        self._first, self._growth, self.num_iterations = first, growth, num_iterations

    def after(self, count: int) -> int:
        """Picoseconds from the beginning until so many iterations have ended."""
        return count * self._first + self._growth * (count * (count - 1) // 2)

    def num_within(self, ps: int) -> int:
        """How many iterations end before so many picoseconds have passed."""
        low, high = 0, self.num_iterations
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.after(middle) < ps else (low, middle - 1)
        return low
