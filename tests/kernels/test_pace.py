"""The choice of threads on simulated machines."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flextron.kernels.pace import ThreadPace

ALONE = {1: 0.050, 2: 0.029}
"""Seconds of an iteration by threads."""
BESIDE_ONE = {1: 0.052, 2: 0.070}
BESIDE_FOUR = {1: 0.120, 2: 1.600}


def total(
    phases: list[tuple[dict[int, float], float]],
    pace: ThreadPace | None,
    clock: list[float],
    noise: Callable[[], float],
) -> list[float]:
    """Mean seconds of an iteration in each phase, of which each lasts some seconds; all threads without a pace."""
    means = []
    for times, duration in phases:
        end, count, began = clock[0] + duration, 0, clock[0]
        while clock[0] < end:
            work = 1.0 + (count % 7 == 0)
            threads = max(times) if pace is None else pace.choose()
            seconds = work * times[threads] * noise()
            clock[0] += seconds
            count += 1
            if pace is not None:
                pace.learn(work, seconds)
        means.append((clock[0] - began) / (count + (count + 6) // 7))
    return means


@pytest.mark.parametrize("seed", range(5))
def test_it_follows_what_the_machine_allows(seed: int) -> None:
    rng = random.Random(seed)
    clock = [0.0]
    pace = ThreadPace(2, lambda: clock[0])
    phases = [(ALONE, 60.0), (BESIDE_ONE, 60.0), (ALONE, 60.0), (BESIDE_FOUR, 60.0), (ALONE, 60.0)]
    means = total(phases, pace, clock, lambda: rng.uniform(0.95, 1.1))
    for mean, (times, _) in zip(means, phases, strict=True):
        assert mean < 1.15 * min(times.values())
    assert means[0] < 1.05 * ALONE[2]


@settings(max_examples=50)
@given(seed=st.integers(0, 10**6), most=st.integers(1, 8))
def test_a_machine_that_stays_as_it_is(seed: int, most: int) -> None:
    """From all threads down to the best number, one by one, if each step is faster."""
    rng = random.Random(seed)
    best = rng.randint(1, most)
    times = {n: 0.02 * 1.25 ** abs(n - best) for n in range(1, most + 1)}
    clock = [0.0]
    pace = ThreadPace(most, lambda: clock[0])
    total([(times, 60.0)], pace, clock, lambda: rng.uniform(0.99, 1.01))
    assert pace.threads == best


def test_one_thread_is_never_changed() -> None:
    clock = [0.0]
    pace = ThreadPace(1, lambda: clock[0])
    for _ in range(100):
        clock[0] += 1.0
        assert pace.choose() == 1
        pace.learn(1.0, 0.5)
