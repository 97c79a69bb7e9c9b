"""Times that were measured, and those expected from them."""

from __future__ import annotations

import random

import pytest

from flextron.engine.timing import TimeLine


def test_a_line_through_times_finds_the_costs() -> None:
    line, rng = TimeLine(), random.Random(0)
    assert not line
    for _ in range(200):
        n = rng.randint(1, 8)
        line.add(n, (20 + 3 * n) * rng.uniform(0.9, 1.1))
    assert line(1) == pytest.approx(23, rel=0.1)
    assert line(8) == pytest.approx(44, rel=0.1)
