"""The simulator against the engine on a short load, and the time that it takes for a day of many replicas.

The engine runs on one thread, and its clock is that thread's processor time: what else runs on the machine meanwhile
does not count, on either side. Between requests the clock jumps to the next one.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path

import torch

from benchmarks.coserving.load import Arrival, Training, arrivals, engine, trainer
from benchmarks.coserving.models import smollm2_decoder
from benchmarks.harness import Figure
from flextron.bench.metrics import Objectives, summarize
from flextron.bench.plan import Arrivals, Load
from flextron.bench.timeline import Timeline
from flextron.engine import CoServing, CoServingScheduler, Request
from flextron.generation.sampling import SamplingParams
from flextron.model.decoder import Decoder
from flextron.simulation.cluster import Cluster, Policies
from flextron.simulation.load import planned
from flextron.simulation.machine import Machine
from flextron.simulation.measure import measure_decoder
from flextron.simulation.replica import Arrival as SimulatedArrival
from flextron.simulation.report import timeline
from flextron.simulation.simulate import Scenario
from flextron.simulation.times import PICOSECONDS

__all__ = ["Outcome", "agreement", "compared", "day_of_many"]

_DAY = 86_400
_REPLICAS = 100
_RATE = 5.5
"""Requests a second of the recorded conversations."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a load got, for real or simulated."""

    attainment: float
    tpot_p50: float
    tpot_p99: float
    finetuned: float
    """Tokens a second."""

    def distance(self, real: Outcome) -> dict[str, float]:
        """Relative differences; that of the attainment in shares of all requests."""
        return {
            "attainment": abs(self.attainment - real.attainment),
            "TPOT p50": abs(self.tpot_p50 / real.tpot_p50 - 1),
            "TPOT p99": abs(self.tpot_p99 / real.tpot_p99 - 1),
            "finetuned tokens": abs(self.finetuned / real.finetuned - 1),
        }


def _outcome(lines: Sequence[Timeline], objectives: Objectives, finetuned: float) -> Outcome:
    summary = summarize(lines, objectives, 1.0)
    assert summary.attainment is not None
    assert summary.tpot_ms is not None
    return Outcome(summary.attainment, summary.tpot_ms.p50, summary.tpot_ms.p99, finetuned)


class _Clock:
    """Processor time, and the waits that were skipped."""

    def __init__(self) -> None:
        self._skipped = -time.process_time()

    def __call__(self) -> float:
        return time.process_time() + self._skipped

    def skip_to(self, seconds: float) -> None:
        self._skipped += max(0.0, seconds - self())


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _played(decoder: Decoder, load: Sequence[Arrival], objectives: Objectives, seconds: float) -> Outcome:
    """The real engine and a real trainer, as the engine's thread of a server runs them."""
    core, training, clock = engine(decoder), Training(trainer(decoder)), _Clock()
    limits = CoServing(tpot_ms=objectives.tpot_ms, ttft_ms=objectives.ttft_ms)
    coserving = CoServingScheduler(core, training, limits, now=clock)
    network, waiting, times = core.network(decoder.widths), list(load)[::-1], dict[Request, list[float]]()
    trained = None

    def is_due() -> bool:
        return bool(waiting) and waiting[-1].time_s <= clock()

    while waiting or core.has_unfinished or trained is None:
        while is_due():
            arrival = waiting.pop()
            request = core.add(str(len(times)), arrival.prompt, SamplingParams(max_tokens=arrival.num_tokens), network)
            request.arrived, times[request] = arrival.time_s, []
        for output in coserving.step():
            times[output.request].append(clock())
        coserving.fill(is_due)
        if trained is None and clock() >= seconds:
            trained = training.num_tokens
    assert trained is not None
    lines = [
        Timeline(
            index=i,
            scheduled_s=request.arrived,
            sent_s=request.arrived,
            end_s=found[-1],
            chunk_s=tuple(found),
            prompt_tokens=request.num_prompt,
            wanted_tokens=len(found),
        )
        for i, (request, found) in enumerate(times.items())
    ]
    return _outcome(lines, objectives, trained / seconds)


def _simulated(
    machine: Machine, decoder: Decoder, load: Sequence[Arrival], objectives: Objectives, seconds: float
) -> Outcome:
    own = [SimulatedArrival(i, round(a.time_s * PICOSECONDS), len(a.prompt), a.num_tokens) for i, a in enumerate(load)]
    task = trainer(decoder)._task
    policies = Policies(
        objectives=objectives,
        examples=task.examples,
        batch_size=task.hyperparameters.batch_size,
        pack_tokens=512,
    )
    cluster = Cluster(machine, Scenario().settings(machine), 1, policies)
    run = cluster.run(own, seconds, num_arrivals=len(own))
    lines = [timeline(served) for served in run.served]
    return _outcome(lines, objectives, run.trained_tokens / run.training_seconds)


def compared(decoder: Decoder, seconds: float, *, share: float = 0.4) -> tuple[Outcome, Outcome, int]:
    """A load on the engine and on a simulation of it, and its number of requests.

    Args:
        decoder: the model.
        seconds: time in which requests arrive.
        share: part of the rate at which the engine could answer them at best.
    """
    with _one_thread():
        before = _machine(decoder)
        line, most = before.networks[0], before.max_num_batched_tokens
        probe, _ = arrivals(5.0, 60.0, decoder.config)
        tokens = sum(len(a.prompt) + a.num_tokens for a in probe) / len(probe)
        rate = share * most / (line.ms(most) / 1e3) / tokens
        objectives = Objectives(ttft_ms=40 * line.ms(most), tpot_ms=1.5 * line.ms(most))
        load, _ = arrivals(rate, seconds, decoder.config)
        real = _played(decoder, load, objectives, seconds)
        # what the machine was like meanwhile lies between what it was before and what it is afterwards
        machines = before, _machine(decoder)
        return real, _mean([_simulated(m, decoder, load, objectives, seconds) for m in machines]), len(load)


def _machine(decoder: Decoder) -> Machine:
    settings = engine(decoder).settings
    return measure_decoder(decoder, [(1.0, None, decoder.widths)], "here", settings, rounds=2, clock=time.process_time)


def _mean(outcomes: Sequence[Outcome]) -> Outcome:
    columns = zip(*(astuple(outcome) for outcome in outcomes), strict=True)
    return Outcome(*(statistics.fmean(column) for column in columns))


def agreement() -> Figure:
    """The simulator against the engine on a short load."""
    real, simulated, count = compared(smollm2_decoder(), 240.0)
    apart = simulated.distance(real)
    return Figure(
        name="simulator against the engine beside finetuning: largest difference of attainment, TPOT, tuned tokens",
        value=max(apart.values()),
        unit="of the engine's",
        op="<=",
        bar=0.1,
        note="; ".join(f"{name} {value:.1%}" for name, value in apart.items())
        + f"; engine: attainment {real.attainment:.1%}, TPOT p50 {real.tpot_p50:.0f} and p99 {real.tpot_p99:.0f} ms, "
        f"{real.finetuned:.0f} tokens/s; {count} requests",
    )


def _day_machine() -> Machine:
    """Numbers of the order of a model of 7 billion parameters on a GPU; only their being there matters here."""
    return Machine.from_dict(
        {
            "name": "invented GPU",
            "iteration_ms": {"1": 12.0, "64": 14.0, "512": 40.0, "2048": 140.0},
            "kv_cache_tokens": 120_000,
            "context": 16_384,
            "max_num_batched_tokens": 2048,
            "ms_per_1000_keys": 0.25,
            "ms_per_1000000_pairs": 2.6,
        }
    )


def _day_load() -> tuple[Load, int, str]:
    trace = os.environ.get("FLEXTRON_TRACE")
    if trace:
        return (
            Load(arrivals=Arrivals(trace=Path(trace))),
            24,
            f"{Path(trace).name.partition('.')[0]}, 24 times its hour",
        )
    drawn = Load(
        arrivals=Arrivals(rate=_RATE),
        num_requests=round(_RATE * 3600),
        prompt_tokens="lognormal:800:0.9",
        output_tokens="lognormal:150:0.8",
    )
    return drawn, 24, "Poisson, log-normal lengths (FLEXTRON_TRACE names a recorded load)"


def day_of_many(clock: Callable[[], float] = time.process_time) -> Figure:
    """The time that a simulated day of a hundred replicas takes."""
    machine = _day_machine()
    load, repeat, source = _day_load()
    found = planned(load, machine, repeat)
    began = clock()
    policies = Policies(objectives=Objectives(ttft_ms=2000, tpot_ms=50))
    run = Cluster(machine, Scenario().settings(machine), _REPLICAS, policies).run(
        found, found.seconds, num_arrivals=len(found)
    )
    seconds = (clock() - began) * _DAY / found.seconds
    return Figure(
        name="one simulated day of the conversation load on 100 replicas, one core",
        value=seconds,
        unit="s",
        op="<=",
        bar=300,
        note=f"{len(run.served):,} requests, {run.num_iterations:,} iterations; {source}",
    )
