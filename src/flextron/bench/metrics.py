"""Computes figures from timelines.

Latencies are of the requests that succeeded. Attainment and goodput are of all that ended: a failed request meets no
objective. Rates are over the time from the first scheduled arrival to the last end.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from flextron.bench.timeline import Timeline
from flextron.errors import FlextronError

__all__ = ["Objectives", "Spread", "Summary", "duration_s", "summarize"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Objectives:
    """Service level objectives; those that are None hold always."""

    ttft_ms: float | None = None
    """Longest time to the first token, in milliseconds."""
    tpot_ms: float | None = None
    """Longest time per further token, in milliseconds."""

    def __post_init__(self) -> None:
        """Refuse limits that nothing can meet."""
        for name, value in (("TTFT", self.ttft_ms), ("TPOT", self.tpot_ms)):
            if value is not None and not value > 0:
                raise FlextronError(f"the {name} objective must be positive, not {value:g} ms")

    def __bool__(self) -> bool:
        """Whether there is any."""
        return self.ttft_ms is not None or self.tpot_ms is not None

    def met_by(self, timeline: Timeline) -> bool:
        """Whether a request succeeded and met every objective; one token alone has no TPOT to exceed."""
        if timeline.error is not None or timeline.ttft_s is None:
            return False
        if self.ttft_ms is not None and timeline.ttft_s * 1e3 > self.ttft_ms:
            return False
        tpot_s = timeline.tpot_s
        return self.tpot_ms is None or tpot_s is None or tpot_s * 1e3 <= self.tpot_ms


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """How a quantity is spread over requests (or gaps); milliseconds."""

    count: int
    mean: float
    p50: float
    p90: float
    p99: float
    max: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Spread | None:
        """The spread of values in seconds; None of none."""
        if not seconds:
            return None
        ordered = sorted(value * 1e3 for value in seconds)
        return cls(
            count=len(ordered),
            mean=math.fsum(ordered) / len(ordered),
            p50=_percentile(ordered, 50),
            p90=_percentile(ordered, 90),
            p99=_percentile(ordered, 99),
            max=ordered[-1],
        )


def _percentile(ordered: Sequence[float], percent: float) -> float:
    """A percentile, interpolated linearly between the neighbours."""
    place = (len(ordered) - 1) * percent / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """The figures of some requests."""

    num_requests: int
    """Requests that ended, well or not."""
    num_ok: int
    errors: dict[str, int]
    """Failures by kind."""
    prompt_tokens: int
    """Prompt tokens of successful requests."""
    output_tokens: int
    """Output tokens of successful requests."""
    wanted_tokens: int
    """Output tokens that these were to have at most."""
    num_chunks: int
    """Pieces of text in which they came."""
    tokens_counted_by: str
    """`usage` (the server), `chunks` (one for each piece of text), `mixed`, or `nothing` without a success."""
    requests_per_s: float | None
    output_tokens_per_s: float | None
    total_tokens_per_s: float | None
    """Prompt and output."""
    ttft_ms: Spread | None
    tpot_ms: Spread | None
    itl_ms: Spread | None
    e2e_ms: Spread | None
    attainment: float | None
    """Share of the requests that met every objective; None without objectives."""
    goodput_per_s: float | None
    """Requests per second that did; None without objectives."""

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return asdict(self)


def duration_s(timelines: Sequence[Timeline]) -> float:
    """Seconds from the first scheduled arrival to the last end; 0 of none."""
    if not timelines:
        return 0.0
    return max(line.end_s for line in timelines) - min(line.scheduled_s for line in timelines)


def _counted_by(ok: Sequence[Timeline]) -> str:
    ways = {"chunks" if line.usage_tokens is None else "usage" for line in ok}
    return "mixed" if len(ways) > 1 else next(iter(ways), "nothing")


def summarize(timelines: Sequence[Timeline], objectives: Objectives, duration: float) -> Summary:
    """The figures of requests that ended within `duration` seconds; it is given, so that parts of a run add up."""
    ok = [line for line in timelines if line.error is None]
    prompt_tokens = sum(line.prompt_tokens for line in ok)
    output_tokens = sum(line.output_tokens for line in ok)
    met = sum(objectives.met_by(line) for line in timelines)

    def per_second(count: float) -> float | None:
        return count / duration if duration > 0 else None

    return Summary(
        num_requests=len(timelines),
        num_ok=len(ok),
        errors=dict(Counter(line.error for line in timelines if line.error is not None).most_common()),
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        wanted_tokens=sum(line.wanted_tokens for line in ok),
        num_chunks=sum(len(line.chunk_s) for line in ok),
        tokens_counted_by=_counted_by(ok),
        requests_per_s=per_second(len(ok)),
        output_tokens_per_s=per_second(output_tokens),
        total_tokens_per_s=per_second(prompt_tokens + output_tokens),
        ttft_ms=Spread.of([line.ttft_s for line in ok if line.ttft_s is not None]),
        tpot_ms=Spread.of([line.tpot_s for line in ok if line.tpot_s is not None]),
        itl_ms=Spread.of([gap for line in ok for gap in line.itl_s]),
        e2e_ms=Spread.of([line.e2e_s for line in ok]),
        attainment=met / len(timelines) if objectives and timelines else None,
        goodput_per_s=per_second(met) if objectives else None,
    )
