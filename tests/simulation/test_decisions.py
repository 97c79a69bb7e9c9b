"""The real engine, driven by the simulator's clock, takes the same decisions: iterations, units and widths in turn.

The reference is a loop of its own around the engine's and the server's real parts, written from what
`serving/worker.py` and `serving/service.py` do: it knows nothing of the simulator but its times.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from flextron.bench.metrics import Objectives
from flextron.engine import CoServing, CoServingScheduler, EngineCore, EngineSettings, Network, Request, StepOutput
from flextron.engine.runner import block_bytes
from flextron.finetuning.hyperparameters import Hyperparameters
from flextron.finetuning.lora import LoraTrainer, LoraTrainers
from flextron.finetuning.trainer import TrainingTask
from flextron.generation.sampling import SamplingParams
from flextron.serving.adaptive import INTERVAL_SECONDS, Adaptive, Objective
from flextron.simulation.cluster import Cluster, Policies
from flextron.simulation.machine import Machine
from flextron.simulation.replica import Arrival
from flextron.simulation.times import PICOSECONDS, Chunk, Clock, IterationTimes, Jitter
from flextron.spec import SubnetSpec
from tests.finetuning.test_lora import examples
from tests.random_decoders import random_decoder

DECODER = random_decoder("llama")
CONFIG = DECODER.config
PAGE = 4
LATENCIES = (1.0, 0.7, 0.5)
LEAST = 0.5
INTERVAL = round(INTERVAL_SECONDS * PICOSECONDS)
EXAMPLES = examples(12)
BATCH = 3
Log = list[tuple[Any, ...]]


def machine(num_pages: int) -> Machine:
    unit = {"fixed_ms": 3.0, "token_ms": 1.1}
    return Machine.from_dict(
        {
            "name": "invented",
            "iteration_ms": {"1": 31.0, "4": 37.5, "16": 90.0},
            "sub_networks": [{"latency": f} for f in LATENCIES],
            "kv_cache_tokens": num_pages * PAGE,
            "context": 64,
            "ms_per_1000_keys": 40.0,
            "ms_per_1000000_pairs": 3000.0,
            "jitter": [0.9, 0.95, 1.0, 1.0, 1.05, 2.5],
            "training": {
                "num_layers": CONFIG.num_hidden_layers,
                "forward": unit,
                "head": {"fixed_ms": 2.0, "token_ms": 0.7},
                "backward": {"fixed_ms": 5.0, "token_ms": 2.3},
                "update": {"fixed_ms": 11.0, "token_ms": 0.5},
                "jitter": [0.8, 1.0, 1.0, 1.7],
            },
        }
    )


def arrivals(seed: int, count: int, seconds: float) -> list[Arrival]:
    rng = random.Random(seed)
    times = sorted(rng.randrange(round(seconds * PICOSECONDS)) for _ in range(count))
    return [Arrival(i, ps, rng.randint(1, 30), rng.randint(1, 25)) for i, ps in enumerate(times)]


def narrower(factor: float) -> SubnetSpec:
    """Another sub-network with pages of the same size, so that both sides count the same blocks."""
    full = CONFIG.full_spec
    return SubnetSpec.uniform(
        num_hidden_layers=CONFIG.num_hidden_layers,
        intermediate_size=max(1, int(factor * CONFIG.intermediate_size)),
        num_groups=full.layers[0].num_groups,
    )


@dataclass
class TimedWork:
    """A real trainer whose units take the machine's times."""

    trainer: LoraTrainer
    clock: Clock
    machine: Machine
    log: Log
    num_units: int = 0

    def __post_init__(self) -> None:
        assert self.machine.training is not None
        self.jitter = Jitter(self.machine.training.jitter)

    @property
    def unit(self) -> str:
        return self.trainer.unit

    @property
    def num_left(self) -> int:
        return self.trainer.num_left

    def run_unit(self, num_tokens: int) -> None:
        kind, size = self.unit, min(num_tokens, self.num_left)
        self.log.append(("unit", kind, size))
        self.trainer.run(num_tokens)
        times = getattr(self.machine.training, kind)
        ns = round(times.fixed_ms * 1e6) + size * round(times.token_ms * 1e6)
        self.clock.ps += ns * self.jitter.at(self.num_units)
        self.num_units += 1


@dataclass
class Server:
    """The engine's thread and the event loop of a server, in one loop on a clock."""

    machine: Machine
    settings: EngineSettings
    num_pages: int
    coming: list[Arrival]
    trains: bool
    adapts: bool
    objectives: Objectives
    clock: Clock = field(default_factory=Clock)
    log: Log = field(default_factory=list)
    caps: dict[int, float] = field(default_factory=dict)
    boundary: int = INTERVAL
    last: dict[int, int] = field(default_factory=dict)
    times: dict[int, list[int]] = field(default_factory=dict)
    load: tuple[int, int] = (0, 0)
    trained: tuple[float, float] = (0.0, 0.0)
    num_narrowed: int = 0
    """Answers that went on in a narrower sub-network."""

    def __post_init__(self) -> None:
        self.core = EngineCore(DECODER, self.settings)
        self.networks: list[Network] = [self.core.network(narrower(f)) for f in LATENCIES]
        self.requests: dict[Request, int] = {}
        self.iteration_times, self.num_iterations = IterationTimes(self.machine), 0
        self.jitter = Jitter(self.machine.jitter)
        schedule = self.core.scheduler.schedule

        def recorded() -> list[tuple[Request, int]]:
            found = schedule()
            if found:
                self.log.append(("iteration", self.clock.ps, *sorted((self.requests[s], n) for s, n in found)))
                specs = [network.spec for network in self.networks]
                chunks = [Chunk(specs.index(s.network.spec), s.num_computed_tokens, n) for s, n in found]
                self.seconds = self.iteration_times.iteration(chunks) * self.jitter.at(self.num_iterations)
                self.num_iterations += 1
            return found

        self.core.scheduler.schedule = recorded  # type: ignore[method-assign]
        step = self.core.step

        def timed() -> list[StepOutput]:
            self.seconds = 0
            outputs = step()
            self.clock.ps += self.seconds
            return outputs

        self.core.step = timed  # type: ignore[method-assign]
        limits = {"tpot_ms": self.objectives.tpot_ms, "ttft_ms": self.objectives.ttft_ms}
        self.policy = Adaptive(Objective(**limits), LATENCIES)
        self.coserving = None
        if self.trains:
            chosen = Hyperparameters(n_epochs=1000, batch_size=BATCH, rank=2)
            task = TrainingTask(hyperparameters=chosen, examples=EXAMPLES, seed=0)
            work = TimedWork(LoraTrainers(DECODER, "base")(task), self.clock, self.machine, self.log)
            self.coserving = CoServingScheduler(self.core, work, CoServing(**limits), now=self.clock)

    def run(self, horizon: int) -> None:
        while self.coming or self.core.has_unfinished or (self.trains and self.clock.ps < horizon):
            self.obey()
            if not self.core.has_unfinished and not self.trains:
                self.pass_time(self.coming[0].ps)
                self.clock.ps = self.coming[0].ps
                continue
            outputs = (self.coserving or self.core).step()
            self.pass_time(self.clock.ps)
            for output in outputs:
                self.token(output)
            self.load = len(self.core.scheduler.running), len(self.core.scheduler.waiting)
            if self.coserving is not None:
                self.trained = self.coserving.seconds, self.trained[1]
                self.coserving.fill(self.has_ended_unit)

    def obey(self) -> None:
        while self.coming and self.coming[0].ps <= self.clock.ps:
            arrival = self.coming.pop(0)
            cap = self.caps.setdefault(arrival.index, self.policy.cap)
            target = max(cap, LEAST) if self.adapts else 1.0
            params = SamplingParams(max_tokens=arrival.output)
            prompt = [(7 * arrival.index + i) % 50 for i in range(arrival.prompt)]
            network = self.networks[LATENCIES.index(target)]
            request = self.core.add(str(arrival.index), prompt, params, network)
            request.arrived = arrival.ps / PICOSECONDS
            self.requests[request] = arrival.index
            self.last[arrival.index] = arrival.ps

    def has_ended_unit(self) -> bool:
        assert self.coserving is not None
        self.pass_time(self.clock.ps)
        self.trained = self.coserving.seconds, self.trained[1]
        return bool(self.coming) and self.coming[0].ps <= self.clock.ps

    def token(self, output: StepOutput) -> None:
        index = self.requests[output.request]
        is_first = index not in self.times
        self.policy.token((self.clock.ps - self.last[index]) / PICOSECONDS, is_first=is_first)
        self.last[index] = self.clock.ps
        self.times.setdefault(index, []).append(self.clock.ps)

    def pass_time(self, until: int) -> None:
        """Intervals that end and requests that arrive by then, in their order; tokens that come then are later."""
        if not self.adapts:
            return
        arrived = [a for a in self.coming if a.ps <= until and a.index not in self.caps]
        while self.boundary <= until:
            for arrival in [a for a in arrived if a.ps < self.boundary]:
                self.caps.setdefault(arrival.index, self.policy.cap)
            open_ = [i for i in self.last if i not in self.times] + [a.index for a in arrived if a.index in self.caps]
            asked = {a.index: a.ps for a in ARRIVALS}
            oldest = min((asked[i] for i in open_), default=self.boundary)
            self.policy.end_interval(
                INTERVAL_SECONDS,
                num_running=self.load[0],
                num_waiting=self.load[1],
                oldest=(self.boundary - oldest) / PICOSECONDS,
                training=self.trained[0] - self.trained[1],
            )
            self.trained = self.trained[0], self.trained[0]
            self.boundary += INTERVAL
            self.narrow()
        for arrival in arrived:
            self.caps.setdefault(arrival.index, self.policy.cap)

    def narrow(self) -> None:
        """What runs follows the cap down, and so do those that wait for the engine's thread."""
        target = max(self.policy.cap, LEAST)
        for request in self.core.scheduler:
            if not request.network.spec.is_nested_in(self.networks[LATENCIES.index(target)].spec):
                self.core.narrow(request, self.networks[LATENCIES.index(target)].spec)
                self.num_narrowed += request.num_tokens > request.num_prompt
        for index in self.caps.keys() & {a.index for a in self.coming}:
            self.caps[index] = min(self.caps[index], target)


ARRIVALS: list[Arrival] = []


def real(
    load: Sequence[Arrival], num_pages: int, objectives: Objectives, horizon: int, *, trains: bool, adapts: bool
) -> Server:
    blocks = sum(CONFIG.full_spec.num_groups) * num_pages
    settings = EngineSettings(
        kv_cache_gb=(blocks + 0.5) * block_bytes(DECODER, PAGE) / 1e9,
        page_size=PAGE,
        max_num_seqs=5,
        max_num_batched_tokens=12,
        prefix_caching=False,
    )
    ARRIVALS[:] = load
    server = Server(machine(num_pages), settings, num_pages, list(load), trains, adapts, objectives)
    assert server.core.pool.num_blocks == blocks
    server.run(horizon)
    return server


def simulated(
    load: Sequence[Arrival], num_pages: int, objectives: Objectives, horizon: int, *, trains: bool, adapts: bool
) -> tuple[Log, dict[int, tuple[int, int, int]], Cluster]:
    settings = EngineSettings(page_size=PAGE, max_num_seqs=5, max_num_batched_tokens=12, prefix_caching=False)
    policies = Policies(
        objectives=objectives,
        min_latency_target=LEAST if adapts else None,
        examples=EXAMPLES if trains else (),
        batch_size=BATCH,
        leaps=False,
    )
    cluster = Cluster(machine(num_pages), settings, 1, policies)
    log: Log = []
    replica = cluster.replicas[0]
    schedule, clock = replica.core.scheduler.schedule, replica.core.clock

    def recorded() -> list[Any]:
        found = schedule()
        if found:
            log.append(("iteration", clock.ps, *sorted((s.index, n) for s, n in found)))
        return found

    replica.core.scheduler.schedule = recorded  # type: ignore[method-assign]
    if replica.finetuned is not None:
        replica.finetuned.work._on_unit = lambda kind, size: log.append(("unit", kind, size))
    run = cluster.run(load, horizon / PICOSECONDS, num_arrivals=len(load))
    return log, {s.arrival.index: (s.first_ps, s.last_ps, s.network) for s in run.served}, cluster


def common(ours: Iterable[Any], theirs: Iterable[Any]) -> None:
    """Both are the same up to where the shorter one ends: training goes on for ever."""
    for i, (a, b) in enumerate(zip(ours, theirs, strict=False)):
        assert a == b, f"decision {i}"


@pytest.mark.parametrize("adapts", [False, True], ids=["fixed", "elastic"])
@pytest.mark.parametrize("trains", [False, True], ids=["serving", "coserving"])
@pytest.mark.parametrize(("seed", "count", "num_pages"), [(0, 80, 100), (2, 60, 20)])
def test_the_real_engine_takes_the_same_decisions(
    seed: int, count: int, num_pages: int, *, trains: bool, adapts: bool
) -> None:
    seconds = 25.0
    load, objectives = arrivals(seed, count, seconds), Objectives(ttft_ms=400.0, tpot_ms=60.0)
    horizon = round(seconds * PICOSECONDS)
    server = real(load, num_pages, objectives, horizon, trains=trains, adapts=adapts)
    log, served, cluster = simulated(load, num_pages, objectives, horizon, trains=trains, adapts=adapts)
    common(log, server.log)
    iterations = [[entry for entry in each if entry[0] == "iteration"] for each in (log, server.log)]
    assert len(iterations[0]) == len(iterations[1]) > 150
    assert {i: (times[0], times[-1]) for i, times in server.times.items()} == {i: s[:2] for i, s in served.items()}
    if num_pages < 100:
        assert cluster.replicas[0].core.scheduler.num_preemptions > 0
    if adapts:
        assert {network for _, _, network in served.values()} == {0, 1, 2}
        assert server.num_narrowed > 0
    if trains:
        assert sum(entry[0] == "unit" for entry in log) > 100
