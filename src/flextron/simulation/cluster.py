"""Several simulated replicas behind one balancer: arrivals and events in the order of their times."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from flextron.bench.metrics import Objectives
from flextron.engine import CoServing, CoServingScheduler, EngineSettings
from flextron.errors import FlextronError
from flextron.finetuning.example import Example
from flextron.progress import OnProgress
from flextron.serving.adaptive import Adaptive, Objective
from flextron.serving.balancing import LeastOutstanding
from flextron.serving.ladder import fractions, rungs
from flextron.simulation.core import SimulatedCore
from flextron.simulation.machine import Machine
from flextron.simulation.replica import Arrival, Finetuned, Narrowing, Replica, Served
from flextron.simulation.times import PICOSECONDS, Clock, IterationTimes, Jitter
from flextron.simulation.training import SimulatedTraining

__all__ = ["Cluster", "Policies", "Run"]

_APART = 1009
"""Iterations by which replicas are apart in the sequence of jitter."""
_REPORTS = 1000
"""Arrivals from one word on progress to the next."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Policies:
    """What the servers do beside answering."""

    objectives: Objectives
    min_latency_target: float | None = None
    """How narrow requests may become under load; None for not at all."""
    examples: Sequence[Example] = ()
    """Examples of a finetuning job that each replica trains without end; none for no job."""
    batch_size: int = 8
    """Examples of an optimizer step."""
    pack_tokens: int = 1024
    """Tokens of examples that are run side by side."""
    max_queue: int = 128
    """Requests of a replica that may wait while others run."""
    leaps: bool = True
    """Whether iterations that are alike are taken at once, where no job trains."""

    def __post_init__(self) -> None:
        """Refuse what a server would refuse."""
        if self.max_queue < 0:
            raise FlextronError(f"max_queue must be at least 0, not {self.max_queue}")
        least = self.min_latency_target
        if least is not None and not 0 < least <= 1:
            raise FlextronError(f"min_latency_target must be in (0, 1], not {least}")
        if least is not None and not self.objectives:
            raise FlextronError("min_latency_target needs an objective; give slo_tpot_ms or slo_ttft_ms")


@dataclass(slots=True)
class Run:
    """What a load got."""

    served: list[Served]
    """Requests in the order of their ends; those that ran when the run was given up are not among them."""
    num_unserved: int = 0
    """Requests of the load that the run did not come to, because it was given up."""
    seconds: float = 0.0
    """From the beginning to the last end."""
    num_iterations: int = 0
    busy_seconds: float = 0.0
    """Time that iterations took, over all replicas."""
    num_preemptions: int = 0
    trained_tokens: float = 0.0
    """Tokens that went both ways through the model while requests arrived, over all replicas."""
    training_seconds: float = 0.0
    """Length of that time."""


class Cluster:
    """Replicas of one machine, and the balancer before them."""

    def __init__(self, machine: Machine, settings: EngineSettings, num_replicas: int, policies: Policies) -> None:
        """Start idle replicas.

        Raises:
            FlextronError: the settings cannot be simulated, or there is something to train and no time known for it.
        """
        self._machine, self._settings, self._policies = machine, settings, policies
        if policies.examples and machine.training is None:
            raise FlextronError(
                f"{machine.name} has no times of finetuning; add the key training to its file, or leave finetuning out"
            )
        self._balancer = LeastOutstanding(num_replicas)
        self._times, self._jitter = IterationTimes(machine), Jitter(machine.jitter)
        self._home: dict[int, int] = {}
        """Replica of each open request."""
        self._served: list[Served] = []
        self.replicas = [self._replica(i) for i in range(num_replicas)]

    def run(
        self,
        arrivals: Iterable[Arrival],
        seconds: float,
        *,
        num_arrivals: int,
        gives_up: Callable[[Served], bool] = lambda served: False,
        on_progress: OnProgress = lambda done, total: None,
    ) -> Run:
        """Play a load to its end.

        Args:
            arrivals: by time.
            seconds: time in which requests arrive, which is also the time in which training counts.
            num_arrivals: how many there are.
            gives_up: asked at each end of a request; True ends the run.
            on_progress: called with the requests that have arrived and all.
        """
        events = [(0, i) for i, replica in enumerate(self.replicas) if replica.busy_until is not None]
        horizon, trained, is_over = round(seconds * PICOSECONDS), [0.0] * len(self.replicas), False
        num_arrived, num_seen, now = 0, 0, 0
        coming = iter(arrivals)
        upcoming = next(coming, None)
        while (upcoming is not None or self._home or (events and events[0][0] <= horizon)) and not is_over:
            if upcoming is not None and (not events or upcoming.ps <= events[0][0]):
                i = self._balancer.choose()
                self._home[upcoming.index] = i
                replica, before = self.replicas[i], self.replicas[i].busy_until
                replica.arrive(upcoming)
                if replica.busy_until is not None and replica.busy_until != before:
                    heapq.heappush(events, (replica.busy_until, i))
                num_arrived += 1
                if num_arrived % _REPORTS == 0 or num_arrived == num_arrivals:
                    on_progress(num_arrived, num_arrivals)
                upcoming = next(coming, None)
            else:
                at, i = heapq.heappop(events)
                replica = self.replicas[i]
                if replica.busy_until != at:
                    continue  # it was cut short since
                now = at
                if replica.finetuned is not None and now <= horizon:
                    trained[i] = replica.finetuned.work.num_tokens
                replica.turn()
                if replica.busy_until is not None:
                    heapq.heappush(events, (replica.busy_until, i))
            while num_seen < len(self._served) and not is_over:
                is_over = gives_up(self._served[num_seen])
                num_seen += 1
        return Run(
            self._served,
            num_unserved=num_arrivals - len(self._served),
            seconds=now / PICOSECONDS,
            num_iterations=sum(replica.num_iterations for replica in self.replicas),
            busy_seconds=sum(replica.busy_ps for replica in self.replicas) / PICOSECONDS,
            num_preemptions=sum(replica.core.scheduler.num_preemptions for replica in self.replicas),
            trained_tokens=sum(trained),
            training_seconds=seconds,
        )

    def _ended(self, served: Served) -> None:
        self._balancer.ended(self._home.pop(served.arrival.index))
        self._served.append(served)

    def _replica(self, index: int) -> Replica:
        policies, clock = self._policies, Clock()
        core = SimulatedCore(self._machine, self._settings, clock, self._times, self._jitter, _APART * index)
        objectives = policies.objectives
        narrowing = finetuned = None
        if policies.min_latency_target is not None:
            objective = Objective(tpot_ms=objectives.tpot_ms, ttft_ms=objectives.ttft_ms)
            steps = rungs(fractions(n.latency for n in self._machine.networks))
            narrowing = Narrowing(Adaptive(objective, steps), policies.min_latency_target, steps)
        if policies.examples and self._machine.training is not None:
            work = SimulatedTraining(
                self._machine.training,
                clock,
                policies.examples,
                batch_size=policies.batch_size,
                pack_tokens=policies.pack_tokens,
                seed=index,
            )
            limits = CoServing(tpot_ms=objectives.tpot_ms, ttft_ms=objectives.ttft_ms)
            finetuned = Finetuned(CoServingScheduler(core, work, limits, now=clock), work)
        return Replica(
            core,
            self._machine,
            max_queue=policies.max_queue,
            on_end=self._ended,
            narrowing=narrowing,
            finetuned=finetuned,
            leaps=policies.leaps,
        )
