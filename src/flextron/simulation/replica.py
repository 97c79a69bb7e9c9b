"""One simulated server: what `serving/worker.py` and `serving/service.py` do around an engine, one event at a time.

An event is the end of an iteration, of several alike, or of a unit of finetuning. Between two events the replica is
busy and takes no request; those that arrive wait in an inbox, as commands wait for the engine's thread.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from flextron.engine import CoServingScheduler
from flextron.serving.adaptive import INTERVAL_SECONDS, Adaptive
from flextron.serving.ladder import narrowed
from flextron.simulation.core import SimulatedCore, SimulatedOutput, SimulatedRequest
from flextron.simulation.machine import Machine
from flextron.simulation.times import PICOSECONDS, Leap
from flextron.simulation.training import SimulatedTraining

__all__ = ["Arrival", "Finetuned", "Narrowing", "Replica", "Served"]

_INTERVAL = round(INTERVAL_SECONDS * PICOSECONDS)


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request of the load."""

    index: int
    ps: int
    """When it comes."""
    prompt: int
    """Tokens."""
    output: int


@dataclass(slots=True)
class Served:
    """What became of a request."""

    arrival: Arrival
    network: int
    """Index of its sub-network, at last if there were several; -1 if it was refused."""
    first_ps: int = 0
    last_ps: int = 0


@dataclass(frozen=True, slots=True)
class Narrowing:
    """Load-adaptive elasticity of one replica."""

    policy: Adaptive
    least: float
    """The narrowest latency target."""
    steps: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Finetuned:
    """Finetuning beside one replica's serving."""

    scheduler: CoServingScheduler[SimulatedOutput]
    work: SimulatedTraining


class Replica:
    """An engine with its policies. The cluster calls `arrive` at arrivals and `turn` when `busy_until` has come."""

    def __init__(
        self,
        core: SimulatedCore,
        machine: Machine,
        *,
        max_queue: int,
        on_end: Callable[[Served], None],
        narrowing: Narrowing | None = None,
        finetuned: Finetuned | None = None,
        leaps: bool = True,
    ) -> None:
        """Start idle.

        Args:
            core: its engine.
            machine: for the sub-networks.
            max_queue: requests that may wait while others run.
            on_end: told of each request when it ends or is refused.
            narrowing: makes requests narrower under load, if it is wanted.
            finetuned: trains between iterations, if it is wanted.
            leaps: whether iterations that are alike are taken at once; without training only.
        """
        self.core, self.narrowing, self.finetuned = core, narrowing, finetuned
        self.busy_until: int | None = 0 if finetuned is not None else None
        """When the event under way ends; None while there is nothing to do."""
        self.num_iterations = self.busy_ps = 0
        self._machine, self._on_end = machine, on_end
        self._most_open = core.settings.max_num_seqs + max_queue
        self._leaps = leaps and finetuned is None
        self._inbox: list[SimulatedRequest] = []
        self._outputs: list[SimulatedOutput] = []
        self._open: dict[int, Served] = {}
        self._unanswered: dict[int, int] = {}
        """When the requests without a token arrived, the oldest first."""
        self._leap: Leap | None = None
        self._leapt_at = self._num_seen = 0
        """When the leap began, and how many of its iterations the policy has seen."""
        self._may_fill = self._was_unit = False
        self._boundary, self._load = _INTERVAL, (0, 0)
        self._trained = self._trained_before = 0.0
        self._gaps = self._num_gaps = 0
        """Picoseconds between further tokens of this interval, and how many these were."""

    @property
    def num_open(self) -> int:
        """Requests that have not ended."""
        return len(self._open)

    def arrive(self, arrival: Arrival) -> None:
        """Take a request, or refuse it; `busy_until` may come sooner afterwards."""
        self._look(arrival.ps, self._leap)
        if len(self._open) >= self._most_open:
            self._on_end(Served(arrival, -1))
            return
        network = self.core.networks[self._machine.within(self._target())]
        seconds = arrival.ps / PICOSECONDS
        total = arrival.prompt + arrival.output
        request = SimulatedRequest(arrival.index, arrival.prompt, total, network, seconds, last_ps=arrival.ps)
        self._inbox.append(request)
        self._open[arrival.index] = Served(arrival, network.index)
        self._unanswered[arrival.index] = arrival.ps
        if self.busy_until is None:
            self.core.clock.ps = self.busy_until = arrival.ps
        elif self._leap is not None:
            # the iteration that runs is the last before the request is looked at
            count = self._leap.num_within(arrival.ps - self._leapt_at) + 1
            self._leap.num_iterations = min(count, self._leap.num_iterations)
            self.busy_until = self._leapt_at + self._leap.after(self._leap.num_iterations)

    def turn(self) -> None:
        """End what was under way, and begin what is next."""
        self._deliver()
        core, now = self.core, self.core.clock.ps
        if self._was_unit and (self._inbox or not core.has_unfinished):
            self._may_fill = False
        self._was_unit = False
        while core.clock.ps == now:
            if self._may_fill and self.finetuned is not None:
                # a unit at a time: whether more follow depends on who waits at its end
                self.finetuned.scheduler.fill(lambda: True)
                if core.clock.ps > now:
                    self._was_unit = True
                    break
            for request in self._inbox:
                core.add(request)
            self._inbox.clear()
            if self.finetuned is None and not core.has_unfinished:
                self.busy_until = None
                return
            if self._leaps and (leap := core.leap()) is not None:
                if self.narrowing is not None:
                    # the next look at the load may narrow what runs
                    leap.num_iterations = min(leap.num_iterations, leap.num_within(self._boundary - now) + 1)
                self._leap, self._leapt_at, self._num_seen = leap, now, 0
                self.busy_until = now + leap.after(leap.num_iterations)
                return
            self._step()
        self.busy_until = core.clock.ps

    def _step(self) -> None:
        """Run an iteration; its outputs come when it has ended."""
        began = self.core.clock.ps
        if self.finetuned is None:
            self._outputs = self.core.step()
        else:
            self._outputs, self._may_fill = self.finetuned.scheduler.step(), True
        self.num_iterations += self.core.num_tokens > 0
        self.busy_ps += self.core.clock.ps - began

    def _deliver(self) -> None:
        """Tell clients and the policy of what has ended just now."""
        core = self.core
        if self._leap is not None:
            leap, self._leap = self._leap, None
            count = leap.num_iterations
            self._look(self._leapt_at + leap.after(count), leap)
            self._see(leap, count)
            core.take(leap, count)
            self.num_iterations += count
            self.busy_ps += leap.after(count)
            return
        now = core.clock.ps
        self._look(now)
        for output in self._outputs:
            self._token(output, now)
        self._outputs = []
        self._load = len(core.scheduler.running), len(core.scheduler.waiting)
        if self.finetuned is not None:
            self._trained = self.finetuned.scheduler.seconds

    def _token(self, output: SimulatedOutput, now: int) -> None:
        request = output.request
        gap, request.last_ps = now - request.last_ps, now
        is_first = self._unanswered.pop(request.index, None) is not None
        if is_first:
            self._open[request.index].first_ps = now
            if self.narrowing is not None:
                self.narrowing.policy.token(gap / PICOSECONDS, is_first=True)
        else:
            self._gaps, self._num_gaps = self._gaps + gap, self._num_gaps + 1
        if output.finish_reason is not None:
            served = self._open.pop(request.index)
            served.last_ps = now
            self._on_end(served)

    def _look(self, until: int, leap: Leap | None = None) -> None:
        """Let the policy see the intervals that have ended by now."""
        if self.narrowing is None:
            return
        policy = self.narrowing.policy
        while self._boundary <= until:
            if leap is not None:
                self._see(leap, leap.num_within(self._boundary - self._leapt_at))
            elif not self._open and policy.is_at_rest and not self._num_gaps:
                self._boundary += ((until - self._boundary) // _INTERVAL + 1) * _INTERVAL
                self._trained_before = self._trained
                return
            if self._num_gaps:
                policy.further_tokens(self._gaps / PICOSECONDS, self._num_gaps)
                self._gaps = self._num_gaps = 0
            oldest = next(iter(self._unanswered.values()), self._boundary)
            policy.end_interval(
                INTERVAL_SECONDS,
                num_running=self._load[0],
                num_waiting=self._load[1],
                oldest=(self._boundary - oldest) / PICOSECONDS,
                training=self._trained - self._trained_before,
            )
            self._trained_before = self._trained
            self._boundary += _INTERVAL
            self._narrow()

    def _narrow(self) -> None:
        """Have all requests follow the cap down."""
        index, networks = self._machine.within(self._target()), self._machine.networks
        for request in (*self.core.scheduler, *self._inbox):
            if networks[request.network.index].latency > networks[index].latency:
                self.core.narrow(request, index)
                self._open[request.index].network = index

    def _see(self, leap: Leap, count: int) -> None:
        """Count the tokens of a leap's iterations up to the given one."""
        num_running = len(self.core.scheduler.running)
        self._gaps += num_running * (leap.after(count) - leap.after(self._num_seen))
        self._num_gaps += num_running * (count - self._num_seen)
        self._num_seen = count

    def _target(self) -> float:
        """The latency target of a request that arrives now."""
        if self.narrowing is None:
            return 1.0
        return narrowed(1.0, self.narrowing.policy.cap, self.narrowing.least, self.narrowing.steps)
