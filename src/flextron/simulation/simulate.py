"""The questions: what a load gets from so many replicas, and how many it needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from flextron.bench.metrics import Objectives
from flextron.bench.plan import Load
from flextron.engine import EngineSettings
from flextron.errors import FlextronError
from flextron.progress import OnProgress
from flextron.simulation.cluster import Cluster, Policies, Run
from flextron.simulation.load import Arrivals, planned
from flextron.simulation.machine import Machine
from flextron.simulation.profile import machine_of
from flextron.simulation.replica import Served
from flextron.simulation.report import Simulated, timeline
from flextron.simulation.training import drawn_examples

__all__ = ["MOST_REPLICAS", "Scenario", "simulate"]

MOST_REPLICAS = 1000
_LONGEST_EXAMPLE = 512


@dataclass(frozen=True, kw_only=True, slots=True)
class Scenario:
    """What is asked of the servers, and how they are set up."""

    objectives: Objectives = field(default_factory=Objectives)
    attainment: float = 0.95
    """Share of the requests that is to meet them, where the number of replicas is searched."""
    min_latency_target: float | None = None
    """How narrow requests may become under load; with it everything is simulated without and with that."""
    finetune: str | None = None
    """Lengths of the examples of an endless job on each replica, as `Lengths` has them; none by default."""
    batch_size: int = 8
    """Examples of its optimizer steps."""
    max_num_seqs: int | None = None
    """Requests that run at once; the machine's by default."""
    max_num_batched_tokens: int | None = None
    """Tokens of an iteration; the machine's by default."""
    page_size: int = 16
    """Tokens of a page of the cache."""
    max_queue: int = 128
    """Requests of a replica that may wait while others run; more are refused."""
    repeat: int = 1
    """How many times the load is played, one after the other."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not 0 < self.attainment <= 1:
            raise FlextronError(f"the attainment is a share above 0 and at most 1, not {self.attainment:g}")
        if self.batch_size < 1:
            raise FlextronError(f"the examples of an optimizer step must be at least 1, not {self.batch_size}")

    def settings(self, machine: Machine) -> EngineSettings:
        """Sizes of a replica's engine."""
        return EngineSettings(
            max_num_seqs=machine.max_num_seqs if self.max_num_seqs is None else self.max_num_seqs,
            max_num_batched_tokens=machine.max_num_batched_tokens
            if self.max_num_batched_tokens is None
            else self.max_num_batched_tokens,
            page_size=self.page_size,
            prefix_caching=False,
        )


def simulate(
    machine: Machine | str | Path,
    load: Load,
    scenario: Scenario | None = None,
    *,
    replicas: int | Sequence[int] | None = None,
    on_progress: OnProgress = lambda done, total: None,
) -> list[Simulated]:
    """Play a load on simulated servers: the real scheduler and policies in the time that a machine's numbers say.

    Args:
        machine: the numbers, a file of them, or a profiled elastic checkpoint, whose weights are not read.
        load: arrivals and lengths, from a trace or drawn.
        scenario: objectives, and what servers do to meet them.
        replicas: numbers of replicas; by default the smallest with which the attainment is reached.
        on_progress: called with the requests that have arrived and all, in each run anew.

    Returns:
        For each number of replicas a result without and, where the scenario allows narrower sub-networks, one with
        load-adaptive elasticity; where it has finetuning, each is followed by one with that. Where the number is
        searched, each way has its own, found without finetuning.

    Raises:
        FlextronError: a value is out of range, a file is damaged, or no number of replicas reaches the attainment.
    """
    scenario = scenario or Scenario()
    found = machine if isinstance(machine, Machine) else machine_of(machine)
    simulation = _Simulation(found, planned(load, found, scenario.repeat), scenario, on_progress)
    if replicas is None:
        if not scenario.objectives:
            raise FlextronError("the number of replicas follows from objectives; give them, or the number")
        return list(simulation.results(None))
    numbers = [replicas] if isinstance(replicas, int) else list(replicas)
    for number in numbers:
        if not 1 <= number <= MOST_REPLICAS:
            raise FlextronError(f"from 1 to {MOST_REPLICAS:,} replicas can be simulated, not {number:,}")
    return [result for number in numbers for result in simulation.results(number)]


class _Simulation:
    """One load on one machine, with any number of replicas."""

    def __init__(self, machine: Machine, arrivals: Arrivals, scenario: Scenario, on_progress: OnProgress) -> None:
        self._machine, self._arrivals, self._scenario = machine, arrivals, scenario
        self._on_progress, self._settings = on_progress, scenario.settings(machine)
        longest = min(_LONGEST_EXAMPLE, machine.context)
        self._examples = () if scenario.finetune is None else drawn_examples(scenario.finetune, longest, 0)
        if scenario.min_latency_target is not None and len(machine.networks) == 1:
            raise FlextronError(
                f"{machine.name} has no narrower sub-networks; add the key sub_networks to its file, profile the "
                "checkpoint, or leave min_latency_target out"
            )
        if self._examples and machine.training is None:
            raise FlextronError(
                f"{machine.name} has no times of finetuning; add the key training to its file, or leave finetuning out"
            )

    def results(self, number: int | None) -> Iterator[Simulated]:
        """Without and with what the scenario allows, on so many replicas or on as few as are needed."""
        for elastic in [False] if self._scenario.min_latency_target is None else [False, True]:
            own = self._fewest(elastic=elastic) if number is None else number
            for trains in [False, True] if self._examples else [False]:
                run = self._run(own, elastic=elastic, trains=trains)
                yield Simulated.of(
                    run,
                    self._machine,
                    self._arrivals,
                    self._scenario.objectives,
                    own,
                    elastic=elastic,
                    finetuning=trains,
                )

    def _run(
        self, number: int, *, elastic: bool, trains: bool = False, gives_up: Callable[[Served], bool] = lambda _: False
    ) -> Run:
        scenario = self._scenario
        policies = Policies(
            objectives=scenario.objectives,
            min_latency_target=scenario.min_latency_target if elastic else None,
            examples=self._examples if trains else (),
            batch_size=scenario.batch_size,
            max_queue=scenario.max_queue,
        )
        cluster = Cluster(self._machine, self._settings, number, policies)
        return cluster.run(
            self._arrivals,
            self._arrivals.seconds,
            num_arrivals=len(self._arrivals),
            gives_up=gives_up,
            on_progress=self._on_progress,
        )

    def _fewest(self, *, elastic: bool) -> int:
        """The smallest number of replicas that reaches the attainment: doubled until it does, then halved between."""
        failing, number = 0, 1
        while not self._reaches(number, elastic=elastic):
            if number == MOST_REPLICAS:
                raise FlextronError(
                    f"not even {MOST_REPLICAS:,} replicas meet the objectives for {self._scenario.attainment:.1%} of "
                    "the requests; relax the objectives or the attainment, or take a faster machine"
                )
            failing, number = number, min(2 * number, MOST_REPLICAS)
        while number - failing > 1:
            middle = (failing + number) // 2
            if self._reaches(middle, elastic=elastic):
                number = middle
            else:
                failing = middle
        return number

    def _reaches(self, number: int, *, elastic: bool) -> bool:
        """Whether so many replicas reach the attainment; given up at the first miss too many."""
        allowed, missed = round((1 - self._scenario.attainment) * len(self._arrivals), 6), 0

        def is_missed(served: Served) -> bool:
            nonlocal missed
            missed += not self._scenario.objectives.met_by(timeline(served))
            return missed > allowed

        self._run(number, elastic=elastic, gives_up=is_missed)
        return missed <= allowed
