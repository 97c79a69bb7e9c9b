"""Target: exactly one sensible limit, kept as given."""

from __future__ import annotations

import json
import math
from dataclasses import FrozenInstanceError, asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flextron.errors import FlextronError
from flextron.spec import Target

POSITIVE = st.floats(min_value=0, exclude_min=True, allow_infinity=False)
LIMITS = st.one_of(
    st.tuples(st.just("latency"), st.floats(min_value=0, max_value=1, exclude_min=True)),
    st.tuples(st.just("latency_ms"), POSITIVE),
    st.tuples(st.just("params"), st.integers(1, 10**12)),
    st.tuples(st.just("memory_gb"), POSITIVE),
    st.tuples(st.just("max_loss_increase"), st.floats(min_value=0, allow_infinity=False)),
)


@given(LIMITS)
def test_the_limit_is_kept_and_survives_json(limit: tuple[str, float]) -> None:
    name, value = limit
    target = Target(**{name: value})
    assert (target.axis, target.value) == (name, value)
    assert Target(**json.loads(json.dumps(asdict(target)))) == target


@given(st.lists(LIMITS, min_size=2, max_size=4, unique_by=lambda limit: limit[0]))
def test_two_limits_are_refused(limits: list[tuple[str, float]]) -> None:
    with pytest.raises(
        FlextronError, match="exactly one of latency, latency_ms, params, memory_gb, max_loss_increase; got"
    ):
        Target(**dict(limits))


def test_no_limit_is_refused() -> None:
    with pytest.raises(FlextronError, match=r"exactly one of latency, .*; got none"):
        Target()


@given(
    st.sampled_from(["latency", "latency_ms", "params", "memory_gb", "max_loss_increase"]),
    st.sampled_from([math.nan, math.inf, -math.inf, True, "0.5"]),
)
def test_what_is_no_finite_number_is_refused(name: str, value: float) -> None:
    with pytest.raises(FlextronError, match=f"{name} must be a finite number, not {value!r}"):
        Target(**{name: value})


@given(
    st.sampled_from(["latency", "latency_ms", "params", "memory_gb", "max_loss_increase"]),
    st.floats(max_value=0, exclude_max=True, allow_infinity=False),
)
def test_negative_limits_are_refused(name: str, value: float) -> None:
    with pytest.raises(FlextronError, match=f"{name} must be positive"):
        Target(**{name: value})


@pytest.mark.parametrize("name", ["latency", "latency_ms", "params", "memory_gb"])
def test_zero_is_refused_where_nothing_fits_it(name: str) -> None:
    with pytest.raises(FlextronError, match=f"{name} must be positive, not 0"):
        Target(**{name: 0})


@given(st.floats(min_value=1, exclude_min=True, allow_infinity=False))
def test_latency_is_a_fraction(value: float) -> None:
    with pytest.raises(FlextronError, match=r"a fraction of the full model's, in \(0, 1\]"):
        Target(latency=value)


def test_a_target_is_frozen() -> None:
    target = Target(latency=0.5)
    with pytest.raises(FrozenInstanceError):
        target.latency = 0.6  # type: ignore[misc]
