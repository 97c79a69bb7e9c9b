"""Which of several equal replicas gets a request: the one with the fewest that have not ended.

Nothing is asked of the replicas. The balancer counts what it gave and what came back, so it works in front of servers
as it works in a simulation.
"""

from __future__ import annotations

from flextron.errors import FlextronError

__all__ = ["LeastOutstanding"]


class LeastOutstanding:
    """Counts open requests; among replicas with equally many, turns go round."""

    def __init__(self, num_replicas: int) -> None:
        """Start with idle replicas.

        Raises:
            FlextronError: there is none.
        """
        if num_replicas < 1:
            raise FlextronError(f"the number of replicas must be at least 1, not {num_replicas}")
        self._open = [0] * num_replicas
        self._next = 0

    def choose(self) -> int:
        """The replica for one more request; it counts from now on."""
        least = min(self._open)
        try:
            chosen = self._open.index(least, self._next)
        except ValueError:
            chosen = self._open.index(least)
        self._open[chosen] += 1
        self._next = (chosen + 1) % len(self._open)
        return chosen

    def ended(self, replica: int) -> None:
        """A request of a replica was answered, refused or broken off."""
        self._open[replica] -= 1
