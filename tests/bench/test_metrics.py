"""Figures against the definitions, computed with numpy from raw timelines."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flextron.bench.metrics import Objectives, Spread, duration_s, summarize
from flextron.bench.timeline import Timeline
from flextron.errors import FlextronError

SECONDS = st.floats(0, 50, allow_subnormal=False)


@st.composite
def timelines(draw: st.DrawFn) -> Timeline:
    scheduled = draw(SECONDS)
    sent = scheduled + draw(SECONDS)
    gaps = draw(st.lists(SECONDS, max_size=6))
    chunks = tuple(float(x) for x in sent + np.cumsum(gaps))
    failed = not chunks or draw(st.booleans())
    return Timeline(
        index=0,
        target=draw(st.sampled_from(["1.0", "0.6"])),
        scheduled_s=scheduled,
        sent_s=sent,
        chunk_s=chunks,
        end_s=(chunks[-1] if chunks else sent) + draw(SECONDS),
        prompt_tokens=draw(st.integers(1, 100)),
        wanted_tokens=draw(st.integers(1, 100)),
        usage_tokens=draw(st.none() | st.integers(1, 20)),
        error=draw(st.sampled_from(["http 500", "timeout"])) if failed else None,
    )


def assert_spread(spread: Spread | None, milliseconds: list[float]) -> None:
    if not milliseconds:
        assert spread is None
        return
    assert spread is not None
    found = (spread.count, spread.mean, spread.p50, spread.p90, spread.p99, spread.max)
    quantiles = np.percentile(milliseconds, [50, 90, 99, 100])
    assert found == pytest.approx((len(milliseconds), np.mean(milliseconds), *quantiles), abs=1e-6)


@given(lines=st.lists(timelines(), max_size=12), ttft=SECONDS.filter(bool), tpot=SECONDS.filter(bool))
def test_figures_follow_the_definitions(lines: list[Timeline], ttft: float, tpot: float) -> None:
    """Also where nothing succeeded, or nothing was sent."""
    rows: list[dict[str, Any]] = []
    for line in lines:
        times = np.array(line.chunk_s)
        tokens = line.usage_tokens if line.usage_tokens is not None else len(times)
        row: dict[str, Any] = {"ok": line.error is None, "tokens": tokens, "ttft": None, "tpot": None}
        if row["ok"]:
            row["ttft"] = 1e3 * (times[0] - line.scheduled_s)
            if tokens > 1 and len(times) > 1:
                row["tpot"] = 1e3 * (times[-1] - times[0]) / (tokens - 1)
        slow = row["ttft"] is None or row["ttft"] > ttft * 1e3 or (row["tpot"] or 0) > tpot * 1e3
        rows.append(row | {"met": row["ok"] and not slow})
    duration = duration_s(lines)
    summary = summarize(lines, Objectives(ttft_ms=ttft * 1e3, tpot_ms=tpot * 1e3), duration)
    ok = [line for line in lines if line.error is None]
    assert_spread(summary.ttft_ms, [row["ttft"] for row in rows if row["ttft"] is not None])
    assert_spread(summary.tpot_ms, [row["tpot"] for row in rows if row["tpot"] is not None])
    assert_spread(summary.itl_ms, [1e3 * gap for line in ok for gap in np.diff(line.chunk_s)])
    assert_spread(summary.e2e_ms, [1e3 * (line.end_s - line.scheduled_s) for line in ok])
    assert (summary.num_requests, summary.num_ok) == (len(lines), len(ok))
    assert sum(summary.errors.values()) == len(lines) - len(ok)
    assert summary.output_tokens == sum(row["tokens"] for row in rows if row["ok"])
    if duration > 0:
        met = sum(row["met"] for row in rows)
        assert summary.attainment == pytest.approx(met / len(lines))
        assert summary.goodput_per_s == pytest.approx(met / duration)
        assert summary.requests_per_s == pytest.approx(len(ok) / duration)
        tokens = summary.output_tokens + sum(line.prompt_tokens for line in ok)
        assert summary.total_tokens_per_s == pytest.approx(tokens / duration)


@given(lines=st.lists(timelines(), min_size=1, max_size=12))
def test_parts_by_target_add_up_to_the_whole(lines: list[Timeline]) -> None:
    duration = duration_s(lines)
    objectives = Objectives(ttft_ms=1000)
    parts = [summarize([x for x in lines if x.target == t], objectives, duration) for t in ("1.0", "0.6")]
    whole = summarize(lines, objectives, duration)
    assert whole.num_requests == sum(part.num_requests for part in parts)
    if duration > 0:
        assert whole.output_tokens_per_s == pytest.approx(sum(part.output_tokens_per_s or 0 for part in parts))
        assert whole.goodput_per_s == pytest.approx(sum(part.goodput_per_s or 0 for part in parts))


def line(*chunks: float, usage: int | None = None, error: str | None = None) -> Timeline:
    return Timeline(
        index=0,
        scheduled_s=1.0,
        sent_s=1.5,
        chunk_s=chunks,
        end_s=9.0,
        prompt_tokens=3,
        wanted_tokens=4,
        usage_tokens=usage,
        error=error,
    )


def test_a_request_by_hand() -> None:
    seen = line(2.0, 2.5, 4.0, usage=5)
    assert (seen.ttft_s, seen.late_s, seen.e2e_s) == (1.0, 0.5, 8.0)
    assert seen.tpot_s == pytest.approx(2.0 / 4)
    assert line(2.0, 2.5, 4.0).tpot_s == pytest.approx(2.0 / 2)
    assert seen.itl_s == [0.5, 1.5]


def test_what_cannot_be_measured_has_no_time_per_token() -> None:
    assert line(2.0).tpot_s is None
    assert line(2.0, usage=7).tpot_s is None  # all in one piece: 0 would flatter
    assert Objectives(tpot_ms=1).met_by(line(2.0))


def test_failures_meet_no_objective_even_if_they_began_well() -> None:
    assert not Objectives(ttft_ms=5000).met_by(line(2.0, error="broken stream"))
    assert summarize([line(2.0)], Objectives(), 8.0).attainment is None


def test_who_counted_is_told() -> None:
    counted = [line(2.0, usage=1), line(2.0)]
    ways = [summarize(lines, Objectives(), 1.0).tokens_counted_by for lines in (counted, counted[:1], counted[1:], [])]
    assert ways == ["mixed", "usage", "chunks", "nothing"]


def test_objectives_that_nothing_meets_are_refused() -> None:
    with pytest.raises(FlextronError, match="TPOT"):
        Objectives(tpot_ms=0)
