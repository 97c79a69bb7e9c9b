"""Live figures: what they are made of, and that nothing is sampled while nobody looks."""

from __future__ import annotations

import bisect
import json
import random
import statistics
import threading
from typing import Any

import httpx
import pytest
from prometheus_client import CollectorRegistry, Histogram

from flextron import ElasticModel
from flextron.server.page.live import Series, quantile, rates
from tests.server.running import running, wait_until


def readings(registry: CollectorRegistry) -> Series:
    return {(s.name, s.labels.get("le", "")): s.value for family in registry.collect() for s in family.samples}


def test_quantiles_are_those_of_the_values_up_to_the_width_of_a_bucket() -> None:
    rng, limits = random.Random(0), [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
    for _ in range(50):
        values = [rng.random() for _ in range(rng.randint(20, 200))]
        counts = [(limit, float(sum(v <= limit for v in values))) for limit in limits]
        for share in (0.5, 0.9, 0.95):
            wanted = sorted(values)[min(len(values) - 1, int(share * len(values)))]
            found = quantile([*counts, (float("inf"), float(len(values)))], share)
            assert found is not None
            # the same bucket, or its neighbour where the value next to it lies there
            assert abs(bisect.bisect_left(limits, found) - bisect.bisect_left(limits, wanted)) <= 1


def test_quantiles_of_nothing_and_beyond_the_last_limit() -> None:
    assert quantile([], 0.95) is None
    assert quantile([(1.0, 0.0), (float("inf"), 0.0)], 0.95) is None
    assert quantile([(1.0, 0.0), (float("inf"), 5.0)], 0.95) == 1.0


def test_times_are_those_of_the_interval_alone() -> None:
    registry = CollectorRegistry()
    times = Histogram("vllm:time_per_output_token_seconds", "", buckets=(0.01, 0.1, 1), registry=registry)
    for _ in range(100):
        times.observe(0.9)
    before = readings(registry)
    for value in (0.02, 0.03, 0.04):
        times.observe(value)
    sample = rates(before, readings(registry), 2.0)
    assert sample["tpot_ms"] == pytest.approx(1e3 * statistics.mean((0.02, 0.03, 0.04)))
    assert 10 < sample["tpot_p95_ms"] <= 100
    assert sample["ttft_ms"] is None


def test_rates_are_growth_by_seconds() -> None:
    tokens = "flextron:tokens_total"
    before = {(tokens, "full"): 5.0, ("vllm:prompt_tokens_total", ""): 10.0}
    now = {(tokens, "full"): 25.0, (tokens, "params"): 6.0, (tokens, "x"): 0.0, ("vllm:prompt_tokens_total", ""): 20.0}
    sample = rates(before, now, 4.0)
    assert sample["tokens"] == {"full": 5.0, "params": 1.5}
    assert sample["prompt_tokens"] == 2.5


def samples(url: str, count: int) -> list[dict[str, Any]]:
    """The next samples of a stream."""
    found: list[dict[str, Any]] = []
    with httpx.stream("GET", f"{url}/page/live", timeout=60) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: "):
                found.append(json.loads(line.removeprefix("data: ")))
            if len(found) == count:
                return found
    return found


def test_the_stream_counts_what_was_generated_and_ends_with_the_last_reader(model: ElasticModel) -> None:
    with running(model) as made:
        live = made.app.state.live
        assert not live.is_sampling
        found: list[dict[str, Any]] = []
        readers = [threading.Thread(target=lambda: found.extend(samples(made.url, 3))) for _ in range(2)]
        for reader in readers:
            reader.start()
        wait_until(lambda: live.is_sampling)
        body = {"model": "tiny@0.6", "prompt": "Once upon", "max_tokens": 40, "ignore_eos": True}
        assert httpx.post(f"{made.url}/v1/completions", json=body, timeout=60).status_code == 200
        for reader in readers:
            reader.join(60)
        wait_until(lambda: not live.is_sampling)
        assert len(found) == 6
        # both saw the same samples; each is the growth of a second
        counted = sum(sample["tokens"].get("latency=0.60", 0.0) for sample in found) / 2
        assert counted == pytest.approx(40, rel=0.2)
        # who comes later gets what is kept, at once
        assert [s["time"] for s in samples(made.url, 3)] == sorted({s["time"] for s in found})


def test_a_server_that_drains_ends_its_streams(model: ElasticModel) -> None:
    with running(model) as made:
        ended = threading.Event()

        def look() -> None:
            samples(made.url, 1000)
            ended.set()

        reader = threading.Thread(target=look)
        reader.start()
        wait_until(lambda: made.app.state.live.is_sampling)
        made.service.is_draining = True
        assert ended.wait(20)
        # who comes now is not kept waiting either
        assert len(samples(made.url, 1000)) <= 600
        reader.join()
        made.service.is_draining = False
