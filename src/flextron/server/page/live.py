"""Live figures for the page: one sample a second, shared by all who look, and none while nobody does."""

from __future__ import annotations

import asyncio
import json
import time
from collections import deque
from collections.abc import AsyncIterator, Iterable, Mapping
from itertools import pairwise
from typing import Any

from flextron.serving.service import Service

__all__ = ["Live", "quantile", "rates"]

_SECONDS = 1.0
"""Between two samples."""
_NUM_KEPT = 600
"""Samples that somebody who comes later still gets: ten minutes."""
_TOTALS = {
    "prompt_tokens": "vllm:prompt_tokens_total",
    "looked_up": "vllm:prefix_cache_queries_total",
    "found": "vllm:prefix_cache_hits_total",
    "drafted": "vllm:spec_decode_num_draft_tokens_total",
    "accepted": "vllm:spec_decode_num_accepted_tokens_total",
    "preempted": "vllm:num_preemptions_total",
    "narrowed": "flextron:narrowed_requests_total",
    "trained": "flextron:trained_tokens_total",
}
_GAUGES = {
    "running": "vllm:num_requests_running",
    "waiting": "vllm:num_requests_waiting",
    "kv": "vllm:kv_cache_usage_perc",
    "cap": "flextron:latency_cap",
}
_TIMES = {"ttft": "vllm:time_to_first_token_seconds", "tpot": "vllm:time_per_output_token_seconds"}

Series = Mapping[tuple[str, str], float]
"""Values of the metrics by name and by the label that tells series of a name apart, if there is one."""


def quantile(counts: Iterable[tuple[float, float]], share: float) -> float | None:
    """A quantile of a histogram, interpolated within its bucket.

    Args:
        counts: upper limits in rising order, with the numbers of values up to each.
        share: which quantile, in (0, 1].

    Returns:
        None without a value; the last finite limit for what is above it.
    """
    steps = [(0.0, 0.0), *counts]
    wanted = share * steps[-1][1]
    if wanted <= 0:
        return None
    for (low, below), (high, upto) in pairwise(steps):
        if upto >= wanted:
            return low if high == float("inf") else low + (high - low) * (wanted - below) / (upto - below)
    return None


def rates(before: Series, now: Series, seconds: float) -> dict[str, Any]:
    """What happened between two readings of the metrics: levels, rates a second, and times in milliseconds.

    Args:
        before: values at the beginning.
        now: values at the end.
        seconds: between the two.
    """

    def grown(name: str, label: str = "") -> float:
        return now.get((name, label), 0.0) - before.get((name, label), 0.0)

    sample: dict[str, Any] = {key: now.get((name, ""), 0.0) for key, name in _GAUGES.items()}
    sample |= {key: grown(name) / seconds for key, name in _TOTALS.items()}
    name = "flextron:tokens_total"
    tokens = {label: grown(name, label) / seconds for series, label in now if series == name}
    sample["tokens"] = {label: rate for label, rate in tokens.items() if rate > 0}
    for key, name in _TIMES.items():
        count = grown(f"{name}_count")
        limits = [limit for series, limit in now if series == f"{name}_bucket"]
        counts = sorted((float(limit), grown(f"{name}_bucket", limit)) for limit in limits)
        high = quantile(counts, 0.95)
        sample[f"{key}_ms"] = 1e3 * grown(f"{name}_sum") / count if count else None
        sample[f"{key}_p95_ms"] = None if high is None else 1e3 * high
    return sample


class Live:
    """A stream of samples for each who looks."""

    def __init__(self, service: Service) -> None:
        """Take what is to be watched."""
        self._service = service
        self._queues: set[asyncio.Queue[str | None]] = set()
        self._kept: deque[str] = deque(maxlen=_NUM_KEPT)
        self._sampling: asyncio.Task[None] | None = None

    @property
    def is_sampling(self) -> bool:
        """Whether somebody looks."""
        return self._sampling is not None

    async def events(self) -> AsyncIterator[str]:
        """Server-sent events: the samples that are kept, and then one a second until the server ends."""
        queue: asyncio.Queue[str | None] = asyncio.Queue()
        for kept in self._kept:
            queue.put_nowait(kept)
        self._queues.add(queue)
        if self._sampling is None or self._sampling.done():
            self._sampling = asyncio.create_task(self._sample())
        try:
            yield ": begins\n\n"
            while (event := await queue.get()) is not None:
                yield event
        finally:
            self._queues.discard(queue)
            if not self._queues and self._sampling is not None:
                self._sampling.cancel()
                self._sampling = None

    async def _sample(self) -> None:
        before, begun = self._read(), time.monotonic()
        try:
            while not self._service.is_draining:
                await asyncio.sleep(_SECONDS)
                now, ended = self._read(), time.monotonic()
                sample = {"time": time.time(), **rates(before, now, ended - begun)}
                before, begun = now, ended
                event = f"data: {json.dumps(sample, separators=(',', ':'))}\n\n"
                self._kept.append(event)
                self._tell(event)
        finally:
            self._tell(None)

    def _tell(self, event: str | None) -> None:
        for queue in self._queues:
            queue.put_nowait(event)

    def _read(self) -> dict[tuple[str, str], float]:
        return {
            (sample.name, sample.labels.get("target") or sample.labels.get("le", "")): sample.value
            for family in self._service.metrics.registry.collect()
            for sample in family.samples
        }
