"""Choosing among measured sub-networks, against going through all of them."""

from __future__ import annotations

import json

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from flextron.errors import FlextronError
from flextron.routing import Frontier, FrontierPoint
from flextron.spec import SubnetSpec, Target

FULL = (8, 8, 8)
positive = st.floats(0.5, 50, allow_nan=False)


def all_alike(spec: SubnetSpec) -> bool:
    """The filter of a caller who wants the same widths everywhere."""
    return len(set(spec.layers)) == 1


@st.composite
def frontiers(draw: st.DrawFn) -> Frontier:
    """The full network and some others, few values so that ties happen."""
    widths = draw(st.lists(st.tuples(*[st.integers(1, 8)] * 3), max_size=7, unique=True))
    full_ms, full_loss = draw(st.sampled_from([5.0, 10.0])), draw(st.sampled_from([2.0, 3.0]))
    points = []
    for sizes in {FULL, *widths}:
        ms = full_ms if sizes == FULL else draw(st.one_of(st.sampled_from([2.0, 3.0, 4.0]), positive))
        loss = full_loss if sizes == FULL else draw(st.one_of(st.sampled_from([3.0, 3.5]), positive))
        points.append(
            FrontierPoint(
                spec=SubnetSpec.of(sizes, (2, 2, 2)),
                kind=draw(st.sampled_from(["uniform", "guided", "refined"])),
                params=100 + sum(sizes),
                mem_bytes=4 * (100 + sum(sizes)),
                latency_ms=ms,
                latency=ms / full_ms,
                loss=loss,
            )
        )
    return Frontier.of("this-device", "a text", points)


@given(frontiers())
def test_the_full_network_is_the_first(frontier: Frontier) -> None:
    assert frontier.full.spec.intermediate_sizes == FULL
    assert frontier.full == frontier.points[0]


@given(frontiers())
def test_best_is_what_nothing_beats(frontier: Frontier) -> None:
    best = frontier.best()
    latencies = [p.latency_ms for p in best]
    assert latencies == sorted(latencies, reverse=True)

    def beaten(point: FrontierPoint) -> bool:
        return any(
            q.latency_ms <= point.latency_ms
            and q.loss <= point.loss
            and (q.latency_ms, q.loss) != (point.latency_ms, point.loss)
            for q in frontier.points
        )

    expected = {(p.latency_ms, p.loss) for p in frontier.points if not beaten(p)}
    assert [(p.latency_ms, p.loss) for p in best] == sorted(expected, reverse=True)
    assert set(best) <= set(frontier.points)


@given(
    frontiers(),
    st.sampled_from(["latency", "latency_ms", "params"]),
    st.one_of(st.floats(0.01, 1), st.integers(0, 7)),
    st.booleans(),
)
def test_a_limit_on_cost_gives_the_least_loss_within(
    frontier: Frontier, axis: str, where: float | int, uniform: bool
) -> None:
    measures = {p: getattr(p, axis) for p in frontier.points}
    # anywhere up to the largest, or exactly what one of the points has
    value = frontier.points[where % len(measures)] if isinstance(where, int) else None
    limit = measures[value] if value else where * max(measures.values())
    assume(axis != "latency" or limit <= 1)
    limit = int(limit) if axis == "params" else limit
    assume(limit > 0)
    # the limit gives way by rounding, not more
    assume(not any(limit < m <= limit * (1 + 1e-6) for m in measures.values()))
    allowed = [p for p in frontier.points if measures[p] <= limit and (not uniform or all_alike(p.spec))]
    if not allowed:
        with pytest.raises(FlextronError):
            frontier.select(Target(**{axis: limit}), allowed=all_alike if uniform else None)
        return
    chosen = frontier.select(Target(**{axis: limit}), allowed=all_alike if uniform else None)
    assert chosen in allowed
    assert chosen.loss <= min(p.loss for p in allowed)
    assert not uniform or all_alike(chosen.spec)


@given(frontiers(), st.floats(0, 2), st.booleans())
def test_a_limit_on_loss_gives_the_fastest_within(frontier: Frontier, rise: float, uniform: bool) -> None:
    chosen = frontier.select(Target(max_loss_increase=rise), allowed=all_alike if uniform else None)
    limit = frontier.full.loss * (1 + rise)
    allowed = [p for p in frontier.points if p.loss <= limit and (not uniform or all_alike(p.spec))]
    assert chosen in allowed
    assert chosen.latency_ms == min(p.latency_ms for p in allowed)


@given(frontiers())
def test_an_unreachable_target_names_what_is_reachable(frontier: Frontier) -> None:
    fastest, slowest = (f([p.latency_ms for p in frontier.points]) for f in (min, max))
    with pytest.raises(FlextronError) as caught:
        frontier.select(Target(latency_ms=fastest * 0.5))
    for part in ("latency_ms", f"{fastest * 0.5:g}", f"{fastest:.4g}", f"{slowest:.4g}"):
        assert part in str(caught.value)


@given(frontiers())
def test_where_nothing_is_allowed_nothing_is_chosen(frontier: Frontier) -> None:
    with pytest.raises(FlextronError, match="none of the measured"):
        frontier.select(Target(latency=1.0), allowed=lambda spec: False)


@given(frontiers())
def test_json_round_trip(frontier: Frontier) -> None:
    assert Frontier.from_dict(json.loads(json.dumps(frontier.to_dict()))) == frontier


@pytest.mark.parametrize("damage", ["device", "points", "loss", "spec", "unknown"])
def test_damaged_records_say_how_to_make_a_new_one(damage: str) -> None:
    point = FrontierPoint(
        spec=SubnetSpec.of([4], [2]), kind="uniform", params=9, mem_bytes=36, latency_ms=1.0, latency=1.0, loss=2.0
    )
    data = Frontier.of("d", "t", [point]).to_dict()
    if damage in data:
        del data[damage]
    elif damage == "unknown":
        data["points"][0]["more"] = 1
    else:
        del data["points"][0][damage]
    with pytest.raises(FlextronError, match="profile"):
        Frontier.from_dict(data)
