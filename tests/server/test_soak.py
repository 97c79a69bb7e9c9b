"""Many clients for a long time, of which some leave at any moment: no answer is lost, cut, or another client's.

A minute by default; `FLEXTRON_SOAK_SECONDS=1200 pytest -m slow -s tests/server/test_soak.py` for twenty.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections import Counter
from dataclasses import dataclass, field

import httpx
import openai
import psutil
import pytest

from flextron import ElasticModel, Engine, SamplingParams, Target
from tests.server.running import Running, running

SECONDS = float(os.environ.get("FLEXTRON_SOAK_SECONDS", "60"))
NUM_CLIENTS = 16
TARGETS = (None, 0.8, 0.6, 0.5)
WORDS = ("The city was", "In 1998", "Once upon a time there", "a", "She said that", "It is not", "They were", "New")

Case = tuple[str, float | None, int]


def answers(model: ElasticModel, lengths: tuple[int, ...]) -> dict[Case, str]:
    """Greedy ones without a server, where no token was nearly another: rounding depends on what else runs."""
    engine, found = Engine(model, kv_cache_gb=0.01), {}
    for target in TARGETS:
        asked = None if target is None else Target(latency=target)
        for length in lengths:
            params = SamplingParams(max_tokens=length, logprobs=2)
            for word, answer in zip(WORDS, engine.generate(list(WORDS), params, target=asked), strict=True):
                assert answer.logprobs is not None
                if min(p.top[0][1] - p.top[1][1] for p in answer.logprobs) > 1e-3:
                    found[word, target, length] = answer.text
    return found


@dataclass
class Soak:
    """What the clients share."""

    wanted: dict[Case, str]
    end: float
    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[tuple[Case, str]] = field(default_factory=list)

    async def client(self, api: openai.AsyncOpenAI, seed: int) -> None:
        """One request after the other."""
        rng, cases = random.Random(seed), sorted(self.wanted, key=str)
        while time.monotonic() < self.end and not self.wrong:
            case, is_stream, leaves = rng.choice(cases), rng.random() < 0.6, rng.random() < 0.3
            task = asyncio.create_task(self._stream(api, case) if is_stream else self._whole(api, case))
            if leaves:
                await asyncio.wait({task}, timeout=rng.expovariate(20))
                task.cancel()
            try:
                text = await task
            except asyncio.CancelledError:
                self.counts["cancelled"] += 1
                continue
            self.counts["streamed" if is_stream else "whole"] += 1
            if text != self.wanted[case]:
                self.wrong.append((case, text))

    async def _whole(self, api: openai.AsyncOpenAI, case: Case) -> str:
        prompt, target, length = case
        name = "tiny" if target is None else f"tiny@{target}"
        answer = await api.completions.create(model=name, prompt=prompt, max_tokens=length, temperature=0)
        return answer.choices[0].text

    async def _stream(self, api: openai.AsyncOpenAI, case: Case) -> str:
        prompt, target, length = case
        name, text, reason = "tiny" if target is None else f"tiny@{target}", "", None
        stream = await api.completions.create(model=name, prompt=prompt, max_tokens=length, temperature=0, stream=True)
        try:
            async for chunk in stream:
                text += chunk.choices[0].text
                reason = chunk.choices[0].finish_reason
                if not self.wanted[case].startswith(text):
                    self.wrong.append((case, text))
        finally:
            await stream.close()
        return text if reason else f"{text} … and no end"


async def soak(server: Running, wanted: dict[Case, str], seconds: float) -> Soak:
    """All clients; raises what any of them meets."""
    shared = Soak(wanted, time.monotonic() + seconds)
    limits = httpx.Limits(max_connections=4 * NUM_CLIENTS)
    async with (
        httpx.AsyncClient(limits=limits, timeout=60) as http,
        openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="a", max_retries=0, http_client=http) as api,
    ):
        await asyncio.gather(*(shared.client(api, seed) for seed in range(NUM_CLIENTS)))
    return shared


def run_soak(model: ElasticModel, lengths: tuple[int, ...], seconds: float) -> Counter[str]:
    """Soak a server that runs half as many requests as there are clients, so that requests wait."""
    wanted = answers(model, lengths)
    assert len(wanted) > len(TARGETS) * len(lengths) * len(WORDS) // 2
    sizes = {"kv_cache_gb": 0.001, "max_num_seqs": 8, "max_num_batched_tokens": 24, "page_size": 8}
    with running(model, sizes) as made:
        asyncio.run(soak(made, wanted, seconds / 10))
        before = psutil.Process().memory_info().rss
        shared = asyncio.run(soak(made, wanted, seconds))
        made.wait_until_idle()
        made.service.core.pool.check_integrity([])
        assert not made.service._sessions
        shared.counts["preemptions"] = made.service.core.scheduler.num_preemptions
        grown = psutil.Process().memory_info().rss - before
    assert shared.wrong == []
    assert grown < 64e6
    return shared.counts


def test_seconds(model: ElasticModel) -> None:
    counts = run_soak(model, (3, 12), 2)
    assert min(counts[kind] for kind in ("whole", "streamed", "cancelled")) > 0


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 240)
def test_minutes(model: ElasticModel, capsys: pytest.CaptureFixture[str]) -> None:
    counts = run_soak(model, (1, 5, 17, 40), SECONDS)
    with capsys.disabled():
        print(f"\nsoak of {SECONDS:g} s: {dict(counts)}")  # noqa: T201
    assert min(counts[kind] for kind in ("whole", "streamed", "cancelled")) > SECONDS / 4
