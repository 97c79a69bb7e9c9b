"""Two models under loads from idle to saturation: what training and serving keep."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from benchmarks.coserving.figure import draw
from benchmarks.coserving.load import (
    SLO,
    Arrival,
    Played,
    Training,
    arrivals,
    endless,
    engine,
    objectives,
    play,
    train_alone,
    trainer,
)
from benchmarks.coserving.models import smollm2_decoder, tiny_decoder
from benchmarks.harness import RESULTS, Figure
from flextron.engine import CoServing
from flextron.model.decoder import Decoder

__all__ = ["Row", "kept_attainment", "kept_light", "kept_throughput", "sweeps"]

_SHARES = (0.0, 0.05, 0.15, 0.25, 0.35, 0.45)
"""Of the capacity; the second is the light load."""
_SECONDS = {"SmolLM2-135M": 45.0, "tiny": 10.0}
_FEWEST = 200
"""Requests of the loads from a quarter of the capacity on, so that one more that is late changes little."""
_OBJECTIVES = {"SmolLM2-135M": (3.0, 60.0), "tiny": (40.0, 400.0)}
"""For the time per token and to the first, as multiples of the time per token of a request that is alone; the tiny
model's iteration takes less than any unit of training."""
_SWEEP, _PICTURE = RESULTS / "sweeps" / "coserving.json", Path("docs/images/coserving.png")
_ATTAINED = 0.95


@dataclass
class Row:
    """One load of a sweep."""

    share: float
    rate: float
    seconds: float
    num_requests: int
    alone: Played
    beside: Played | None
    limit: float
    """Share of the peak that time would allow on paper."""
    peak: float
    """Tokens a second of training alone, before and after this load: machines have slow minutes."""

    @property
    def kept(self) -> float | None:
        """Share of the peak."""
        return self.beside.trained / self.peak if self.beside else None


@dataclass
class Sweep:
    """A model under loads from idle to saturation."""

    model: str
    source: str
    slo: SLO
    alone_ms: float
    capacity: float
    """Requests a second, all there at once."""
    rows: list[Row]
    load: list[list[Arrival]]

    @property
    def heavy(self) -> Row:
        """The heaviest load at which inference alone attains its objectives."""
        return [row for row in self.rows if row.alone.attainment >= _ATTAINED][-1]

    @property
    def light(self) -> Row:
        """The lightest that is not idle."""
        return self.rows[1]

    def settings(self) -> CoServing:
        """Of the `CoServingScheduler`."""
        return CoServing(
            tpot_ms=self.slo.tpot_s * 1e3, ttft_ms=self.slo.ttft_s * 1e3, max_unit_ms=2 * self.slo.tpot_s * 1e3
        )

    def to_dict(self) -> dict[str, Any]:
        """For the JSON beside the figures."""
        return {
            "model": self.model,
            "load": self.source,
            "tpot_slo_ms": self.slo.tpot_s * 1e3,
            "ttft_slo_ms": self.slo.ttft_s * 1e3,
            "unloaded_tpot_ms": self.alone_ms,
            "capacity_requests_per_s": self.capacity,
            "rows": [
                {
                    "share_of_capacity": row.share,
                    "requests_per_s": row.rate,
                    "seconds": row.seconds,
                    "num_requests": row.num_requests,
                    "attainment_alone": row.alone.attainment,
                    "busy_alone": row.alone.busy,
                    "attainment": row.beside.attainment if row.beside else None,
                    "peak_tokens_per_s": row.peak,
                    "trained_share_of_peak": row.kept,
                    "limit_share_of_peak": row.limit,
                }
                for row in self.rows
            ],
        }


def _sweep(name: str, decoder: Decoder) -> Sweep:
    shortest = _SECONDS[name]
    slo, alone = objectives(engine(decoder), *_OBJECTIVES[name])
    probe, source = arrivals(5.0, 30.0, decoder.config)
    began = time.monotonic()
    played = play(engine(decoder), endless(probe), slo, 0.0)
    capacity = len(played.asked) / (time.monotonic() - began)
    training = Training(trainer(decoder))
    sweep = Sweep(name, source, slo, 1e3 * alone, capacity, [], [])
    before = train_alone(training, shortest / 8)
    for k, share in enumerate(_SHARES):
        rate = share * capacity
        seconds = max(shortest, _FEWEST / rate) if share >= _SHARES[3] else shortest
        requests = arrivals(rate, seconds, decoder.config, seed=k)[0] if share else []
        by_itself = play(engine(decoder), requests, slo, seconds) if share else Played(slo)
        beside = play(engine(decoder), requests, slo, seconds, training=training, settings=sweep.settings())
        limit = 1.0 if not share else _limit(requests, by_itself.iterations, seconds, slo)
        after = train_alone(training, shortest / 8)
        peak = statistics.fmean([before, after])
        sweep.rows.append(Row(share, rate, seconds, len(requests), by_itself, beside, limit, peak))
        before = after
        sweep.load.append(requests)
    return sweep


def _limit(requests: Sequence[Arrival], iterations: Sequence[tuple[int, float]], seconds: float, slo: SLO) -> float:
    """Share of the time that serving would leave if every request took its whole objective.

    An iteration of n tokens takes a + b n (fitted to those measured). Prompts take b a token, and answers too; at the
    slowest pace that is allowed, one iteration an objective, a is paid once for all that decode then.
    """
    sizes = torch.tensor([[1.0, n] for n, _ in iterations], dtype=torch.float64)
    times = torch.tensor([t for _, t in iterations], dtype=torch.float64)
    fixed, a_token = torch.linalg.lstsq(sizes, times[:, None]).solution[:, 0].tolist()
    tokens = sum(len(r.prompt) + r.num_tokens for r in requests)
    decoding = min(1.0, sum(r.num_tokens for r in requests) * slo.tpot_s / seconds)
    return max(0.0, 1 - a_token * tokens / seconds - fixed * decoding / slo.tpot_s)


@cache
def sweeps() -> tuple[Sweep, Sweep]:
    """Both models' sweeps, run once; writes their numbers and the picture."""
    both = _sweep("SmolLM2-135M", smollm2_decoder()), _sweep("tiny", tiny_decoder())
    written = [sweep.to_dict() for sweep in both]
    _SWEEP.parent.mkdir(parents=True, exist_ok=True)
    _SWEEP.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    draw(written, _PICTURE)
    return both


def kept_throughput() -> Figure:
    """Finetuning throughput kept at the heaviest load."""
    sweep = sweeps()[0]
    row = sweep.heavy
    kept = row.kept
    assert kept is not None
    holds_by_limit = kept >= 0.95 * row.limit
    return Figure(
        name="finetuning kept at the heaviest load at which inference alone attains 95 %, of the measured limit",
        value=kept / row.limit if row.limit else 0.0,
        unit="of the limit",
        op=">=",
        bar=0.95,
        peer={"name": "limit on paper, share of the peak", "value": row.limit},
        note=(
            f"{kept:.0%} of the peak of {row.peak:.0f} tokens/s (bar 80 %, or 95 % of the limit"
            f"{'' if holds_by_limit else ', missed'}); {row.rate:.2f} requests/s, {row.share:.0%} of capacity; "
            f"{sweep.source}; "
            f"objectives {1e3 * sweep.slo.tpot_s:.0f} ms a token and {1e3 * sweep.slo.ttft_s:.0f} ms to the first, "
            f"unloaded {sweep.alone_ms:.1f} ms a token; inference alone is busy "
            f"{row.alone.busy:.0%} of the time"
        ),
    )


def kept_light() -> Figure:
    """Finetuning throughput kept at a light load."""
    sweep = sweeps()[0]
    row = sweep.light
    assert row.kept is not None
    return Figure(
        name="finetuning kept at a light load, of the limit on paper",
        value=row.kept / row.limit,
        unit="of the limit",
        op=">=",
        bar=0.9,
        peer={"name": "limit on paper, share of the peak", "value": row.limit},
        note=f"{row.kept:.0%} of the peak of {row.peak:.0f} tokens/s; {row.num_requests} requests, {row.rate:.2f}/s",
    )


def kept_attainment() -> Figure:
    """Attainment beside finetuning at that load."""
    row = sweeps()[0].heavy
    assert row.beside is not None
    return Figure(
        name="attainment beside finetuning at that load, of inference alone's",
        value=row.beside.attainment / row.alone.attainment,
        unit="ratio",
        op=">=",
        bar=0.98,
        peer={"name": "inference alone, attainment", "value": row.alone.attainment},
        note="; ".join(
            f"{r.share:.0%} ({r.num_requests} requests): {r.alone.attainment:.0%} alone, "
            f"{r.beside.attainment:.0%} beside, {r.kept:.0%} of the peak"
            for r in sweeps()[0].rows[1:]
            if r.beside is not None
        ),
    )
