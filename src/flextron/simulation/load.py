"""The requests of a simulated load: those that `flextron bench serve` would send, as numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from flextron.bench.lengths import Limits
from flextron.bench.plan import Load, make_plan
from flextron.errors import FlextronError
from flextron.simulation.machine import Machine
from flextron.simulation.replica import Arrival
from flextron.simulation.times import PICOSECONDS

__all__ = ["Arrivals", "planned"]

_MOST_REPEATS = 10_000


@dataclass(frozen=True, slots=True)
class Arrivals:
    """Requests by time, played one or more times."""

    once: tuple[Arrival, ...]
    period_s: float
    """Seconds from one time to the next."""
    repeat: int
    num_clipped: int
    """Requests that are shorter than they were recorded, because the machine's context is."""
    process: str
    """Where they are from, in words."""

    def __len__(self) -> int:
        """Number of requests."""
        return len(self.once) * self.repeat

    def __iter__(self) -> Iterator[Arrival]:
        """All requests by time."""
        yield from self.once
        for k in range(1, self.repeat):
            shift = round(k * self.period_s * PICOSECONDS)
            for arrival in self.once:
                yield Arrival(arrival.index + k * len(self.once), arrival.ps + shift, arrival.prompt, arrival.output)

    @property
    def seconds(self) -> float:
        """Time in which they arrive."""
        return self.repeat * self.period_s


def planned(load: Load, machine: Machine, repeat: int = 1) -> Arrivals:
    """Lay down all requests.

    Args:
        load: arrivals and lengths; a closed loop cannot be simulated.
        machine: whose context limits the lengths.
        repeat: how many times the load is played, one after the other.

    Raises:
        FlextronError: a value is out of range or a file is broken, see `make_plan`.
    """
    if load.arrivals.rate is None and load.arrivals.trace is None:
        raise FlextronError("a simulation needs times of arrival; give --trace, or --rate and --num-requests")
    if load.targets or load.shared_prefix or load.tokenizer is not None:
        raise FlextronError("targets, shared prefixes and tokenizers are not simulated; leave them out")
    if not 1 <= repeat <= _MOST_REPEATS:
        raise FlextronError(f"a load is repeated from 1 to {_MOST_REPEATS:,} times, not {repeat}")
    room = min(machine.context, machine.kv_cache_tokens)
    total = min(room, load.limits.total or room)
    if total < 2:
        raise FlextronError(f"{machine.name} has no room for a request of two tokens; check its context and cache")
    limits = Limits(prompt=load.limits.prompt, output=load.limits.output, total=total)
    plan = make_plan(replace(load, limits=limits), lambda key, num_tokens: "")
    requests = [
        Arrival(r.index, round((r.scheduled_s or 0.0) * PICOSECONDS), r.sizes.prompt, r.sizes.output)
        for r in plan.requests
    ]
    count, last = len(requests), requests[-1].ps / PICOSECONDS
    # a gap of ordinary length after the last one
    period = last * count / max(1, count - 1) if last else 1.0
    return Arrivals(
        tuple(requests),
        period,
        repeat,
        plan.num_clipped * repeat,
        plan.process if repeat == 1 else f"{plan.process}, {repeat} times",
    )
