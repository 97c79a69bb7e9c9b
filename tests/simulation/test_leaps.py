"""Leaps over iterations that are alike end where single steps end, to the picosecond."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from flextron.bench.metrics import Objectives
from flextron.engine import EngineSettings
from flextron.simulation.cluster import Cluster, Policies
from flextron.simulation.machine import Machine
from flextron.simulation.replica import Arrival
from flextron.simulation.times import PICOSECONDS, Jitter, Leap


@dataclass(frozen=True)
class Case:
    """A load and its servers."""

    seed: int
    rate: float
    num_replicas: int
    num_pages: int
    adapts: bool
    key_ms: float
    jitters: bool


CASES = st.builds(
    Case,
    seed=st.integers(0, 2**30),
    rate=st.floats(0.2, 12),
    num_replicas=st.integers(1, 4),
    num_pages=st.integers(14, 80),
    adapts=st.booleans(),
    key_ms=st.sampled_from([0.0, 0.37]),
    jitters=st.booleans(),
)


def outcome(case: Case, *, leaps: bool) -> tuple[Any, int]:
    """What clients saw and servers did, and how often the schedulers were asked."""
    machine = Machine.from_dict(
        {
            "name": "invented",
            "iteration_ms": {"1": 7.1, "8": 9.3, "64": 40.0},
            "sub_networks": [{"latency": 1.0}, {"latency": 0.8, "kv_share": 0.75}, {"latency": 0.5, "kv_share": 0.4}],
            "kv_cache_tokens": 8 * case.num_pages,
            "context": 112,
            "ms_per_1000_keys": case.key_ms,
            "ms_per_1000000_pairs": 10.0,
            "jitter": [0.8, 1.0, 1.1, 3.0] if case.jitters else [],
        }
    )
    rng = random.Random(case.seed)
    now, load = 0.0, []
    for i in range(60):
        now += rng.expovariate(case.rate)
        load.append(Arrival(i, round(now * PICOSECONDS), rng.randint(1, 50), rng.randint(1, 60)))
    policies = Policies(
        objectives=Objectives(ttft_ms=120, tpot_ms=12),
        min_latency_target=0.5 if case.adapts else None,
        max_queue=6,
        leaps=leaps,
    )
    sizes = EngineSettings(max_num_seqs=6, max_num_batched_tokens=32, page_size=8, prefix_caching=False)
    cluster = Cluster(machine, sizes, case.num_replicas, policies)
    asked = 0
    for replica in cluster.replicas:
        schedule = replica.core.scheduler.schedule

        def counted(schedule: Any = schedule) -> Any:
            nonlocal asked
            asked += 1
            return schedule()

        replica.core.scheduler.schedule = counted  # type: ignore[method-assign]
    run = cluster.run(load, now, num_arrivals=len(load))
    seen = sorted((s.arrival.index, s.network, s.first_ps, s.last_ps) for s in run.served)
    return (seen, run.seconds, run.num_iterations, run.busy_seconds, run.num_preemptions), asked


@settings(max_examples=120, deadline=None)
@given(case=CASES)
def test_leaps_change_nothing(case: Case) -> None:
    (leapt, few), (stepped, many) = outcome(case, leaps=True), outcome(case, leaps=False)
    assert leapt == stepped
    assert few < many
    assert len(stepped[0]) == 60


@given(
    first=st.integers(1, 50),
    growth=st.integers(0, 9),
    count=st.integers(0, 40),
    index=st.integers(0, 20_000),
    factors=st.lists(st.floats(0.1, 3), max_size=3),
    ps=st.integers(0, 4_000_000),
)
def test_iterations_of_a_leap_are_those_that_a_loop_counts(
    first: int, growth: int, count: int, index: int, factors: list[float], ps: int
) -> None:
    jitter, ends, now = Jitter(factors), [], 0
    for i in range(count):
        now += (first + growth * i) * jitter.at(index + i)
        ends.append(now)
    leap = Leap(first, growth, count, jitter, index)
    assert [leap.after(i + 1) for i in range(count)] == ends
    assert leap.num_within(ps) == sum(end < ps for end in ends)
