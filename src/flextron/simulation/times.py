"""How long an iteration takes: whole nanoseconds by its tokens, times a factor in thousandths that differs each time.

So times are whole picoseconds, whose sums are exact in any order. Many iterations of the same requests can be leapt
over at once, and end when they would have ended one by one.

Tokens of several sub-networks share the rows of the weights that all of them use (`model/nested.py`). The time is
cut the same way: what the narrowest sub-network takes for all tokens, and for each wider one what it takes longer than
the next narrower one, for the tokens that are as wide.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import NamedTuple

from flextron.simulation.machine import Machine

__all__ = ["PICOSECONDS", "Chunk", "Clock", "IterationTimes", "Jitter", "Leap"]

PICOSECONDS = 10**12
"""Picoseconds of a second."""
_NUM_FACTORS = 4096


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


class Jitter:
    """Factors on the times of successive iterations, in thousandths: drawn once, then over and over again."""

    def __init__(self, factors: Sequence[float], seed: int = 0) -> None:
        """Draw them.

        Args:
            factors: those that have equal chances; none for 1 each time.
            seed: seed of the draws.
        """
        draws = random.Random(f"jitter {seed}")
        chosen = [max(1, round(1000 * f)) for f in factors] or [1000]
        self._factors = chosen if len(chosen) == 1 else draws.choices(chosen, k=_NUM_FACTORS)
        self._sums = list(accumulate(self._factors, initial=0))
        self._weighted = list(accumulate((i * f for i, f in enumerate(self._factors)), initial=0))

    def at(self, index: int) -> int:
        """The factor of an iteration, by its number."""
        return self._factors[index % len(self._factors)]

    def sums(self, end: int) -> tuple[int, int]:
        """Sum of the factors up to a number, and of each times its number."""
        size, (rounds, rest) = len(self._factors), divmod(end, len(self._factors))
        before = size * self._sums[-1] * (rounds * (rounds - 1) // 2) + rounds * self._weighted[-1]
        within = size * rounds * self._sums[rest] + self._weighted[rest]
        return rounds * self._sums[-1] + self._sums[rest], before + within


class IterationTimes:
    """Times of a machine's iterations in whole nanoseconds, before jitter."""

    def __init__(self, machine: Machine) -> None:
        """Take the machine's curves."""
        self._networks = machine.networks
        per_ms = 10**6
        self._key = [round(machine.ms_per_1000_keys * n.kv_share * per_ms / 1e3) for n in machine.networks]
        self._pair = [round(machine.ms_per_1000000_pairs * n.kv_share * per_ms / 1e6) for n in machine.networks]
        self._per_ms = per_ms
        self._known: dict[tuple[int, ...], int] = {}

    def sizes(self, counts: tuple[int, ...]) -> int:
        """Nanoseconds of an iteration by its tokens in each sub-network, the widest first; without attention."""
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
        """Nanoseconds of an iteration that computes these tokens."""
        counts, attention = [0] * len(self._networks), 0
        for network, start, num_new in chunks:
            counts[network] += num_new
            if num_new == 1:
                attention += self._key[network] * (start + 1)
            else:
                attention += self._pair[network] * (num_new * start + num_new * (num_new + 1) // 2)
        return self.sizes(tuple(counts)) + attention

    def growth(self, chunks: Iterable[Chunk]) -> int:
        """Nanoseconds that the next iteration takes longer, if each of these requests gets a token in both."""
        return sum(self._key[chunk.network] for chunk in chunks)


class Leap:
    """Iterations of the same requests, each of which attends to one more key every time."""

    __slots__ = ("_begun", "_first", "_growth", "_index", "_jitter", "num_iterations")

    def __init__(self, first: int, growth: int, num_iterations: int, jitter: Jitter, index: int) -> None:
        """Take the times.

        Args:
            first: nanoseconds of the first iteration.
            growth: how much longer each is than the one before; both without jitter.
            num_iterations: how many there are.
            jitter: factors.
            index: number of the first.
        """
        self._first, self._growth, self.num_iterations = first, growth, num_iterations
        self._jitter, self._index, self._begun = jitter, index, jitter.sums(index)

    def after(self, count: int) -> int:
        """Picoseconds from the beginning until so many iterations have ended."""
        plain, weighted = self._jitter.sums(self._index + count)
        plain, weighted = plain - self._begun[0], weighted - self._begun[1]
        return self._first * plain + self._growth * (weighted - self._index * plain)

    def num_within(self, ps: int) -> int:
        """How many iterations end before so many picoseconds have passed."""
        low, high = 0, self.num_iterations
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.after(middle) < ps else (low, middle - 1)
        return low
