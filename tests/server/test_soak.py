"""Many clients for a long time, of which some leave at any moment: no answer is lost, cut, or another client's.

The KV cache is too small for all that run, so that requests are preempted again and again. A minute by default;
`FLEXTRON_SOAK_SECONDS=1200 pytest -m slow -s tests/server/test_soak.py` for twenty.
"""

from __future__ import annotations

import asyncio
import math
import os
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import httpx
import openai
import psutil
import pytest

from flextron import ElasticModel, Engine, SamplingParams, Target
from tests.server.running import Running, running

SECONDS = float(os.environ.get("FLEXTRON_SOAK_SECONDS", "60"))
NUM_CLIENTS = 16
SECONDS_FOR_ALL = 600.0
"""For an answer, and for a client to take it: the machine may be busy with something else for a while."""
FULL_PAGE_BYTES = 16_384
"""Of eight tokens in the full model: 16 units of 1,024 bytes."""
LATENCIES = (1.0, 0.8, 0.6, 0.5)
WORDS = ("The city was", "In 1998", "Once upon a time there", "a", "She said that", "It is not", "They were", "New")

SEED, NUM_DRAWN = 17, 2
"""Of drawn answers, and how many of them a request asks for."""


@dataclass(frozen=True, order=True)
class Case:
    """A request that clients make."""

    prompt: str
    latency: float
    """Of the target; 1 is the full model."""
    length: int
    is_drawn: bool

    @property
    def options(self) -> dict[str, Any]:
        """For OpenAI's client."""
        drawn = {"temperature": 1, "seed": SEED, "n": NUM_DRAWN} if self.is_drawn else {"temperature": 0}
        name = "tiny" if self.latency == 1 else f"tiny@{self.latency:g}"
        return {"model": name, "prompt": self.prompt, "max_tokens": self.length, **drawn}


@dataclass(frozen=True)
class Wanted:
    """One of its choices."""

    text: str
    logprobs: tuple[float, ...]

    def is_begun_by(self, text: str, logprobs: list[float]) -> bool:
        """Whether this may be a stream's beginning."""
        near = all(math.isclose(a, b, abs_tol=1e-3) for a, b in zip(logprobs, self.logprobs, strict=False))
        return self.text.startswith(text) and len(logprobs) <= len(self.logprobs) and near


def answers(model: ElasticModel, lengths: tuple[int, ...]) -> dict[Case, list[Wanted]]:
    """Without a server. Greedy ones where no token was nearly another: rounding depends on what else runs."""
    engine, found = Engine(model, kv_cache_gb=0.01), dict[Case, list[Wanted]]()
    for latency in LATENCIES:
        for length in lengths:
            for seed in (None, *range(SEED, SEED + NUM_DRAWN)):
                params = SamplingParams(
                    max_tokens=length, temperature=0 if seed is None else 1.0, seed=seed, logprobs=2
                )
                target = None if latency == 1 else Target(latency=latency)
                for word, answer in zip(WORDS, engine.generate(list(WORDS), params, target=target), strict=True):
                    assert answer.logprobs is not None
                    if seed is None and any(p.top[0][1] - p.top[1][1] < 1e-3 for p in answer.logprobs):
                        continue
                    made = Wanted(answer.text, tuple(p.chosen for p in answer.logprobs))
                    found.setdefault(Case(word, latency, length, seed is not None), []).append(made)
    return found


@dataclass
class Soak:
    """What the clients share."""

    wanted: dict[Case, list[Wanted]]
    end: float
    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[tuple[Case, list[str]]] = field(default_factory=list)

    async def client(self, api: openai.AsyncOpenAI, seed: int) -> None:
        """One request after the other."""
        rng, cases = random.Random(seed), sorted(self.wanted)
        while time.monotonic() < self.end and not self.wrong:
            case, is_stream, leaves = rng.choice(cases), rng.random() < 0.6, rng.random() < 0.3
            ask = self._stream if is_stream else self._whole
            task = asyncio.create_task(ask(api, case, {"logprobs": 1} if rng.random() < 0.3 else {}))
            if leaves:
                await asyncio.wait({task}, timeout=rng.expovariate(20))
                task.cancel()
            try:
                texts = await task
            except asyncio.CancelledError:
                self.counts["cancelled"] += 1
                continue
            self.counts["streamed" if is_stream else "whole"] += 1
            self.counts["drawn" if case.is_drawn else "greedy"] += 1
            if texts != [wanted.text for wanted in self.wanted[case]]:
                self.wrong.append((case, texts))

    async def _whole(self, api: openai.AsyncOpenAI, case: Case, more: dict[str, Any]) -> list[str]:
        answer = await api.completions.create(**case.options, **more)
        for choice in answer.choices:
            logprobs = list(choice.logprobs.token_logprobs or []) if choice.logprobs else []
            wanted = self.wanted[case][choice.index]
            if (more and len(logprobs) != len(wanted.logprobs)) or not wanted.is_begun_by(choice.text, logprobs):
                self.wrong.append((case, [choice.text]))
        return [choice.text for choice in answer.choices]

    async def _stream(self, api: openai.AsyncOpenAI, case: Case, more: dict[str, Any]) -> list[str]:
        wanted = self.wanted[case]
        texts, reasons = [""] * len(wanted), [""] * len(wanted)
        logprobs: list[list[float]] = [[] for _ in wanted]
        stream = await api.completions.create(**case.options, **more, stream=True)
        try:
            async for chunk in stream:
                for choice in chunk.choices:
                    i = choice.index
                    texts[i] += choice.text
                    reasons[i] += choice.finish_reason or ""
                    logprobs[i] += (choice.logprobs.token_logprobs or []) if choice.logprobs else []
                    if not wanted[i].is_begun_by(texts[i], logprobs[i]):
                        self.wrong.append((case, texts))
        finally:
            await stream.close()
        return [
            text if reason in ("stop", "length") else f"{text} … {reason}"
            for text, reason in zip(texts, reasons, strict=True)
        ]


async def soak(server: Running, wanted: dict[Case, list[Wanted]], seconds: float) -> Soak:
    """All clients; raises what any of them meets."""
    shared = Soak(wanted, time.monotonic() + seconds)
    # a connection that is picked again while the server closes it would look like a lost answer
    limits = httpx.Limits(max_connections=4 * NUM_CLIENTS, max_keepalive_connections=0)
    async with (
        httpx.AsyncClient(limits=limits, timeout=SECONDS_FOR_ALL) as http,
        openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="a", max_retries=0, http_client=http) as api,
    ):
        await asyncio.gather(*(shared.client(api, seed) for seed in range(NUM_CLIENTS)))
    return shared


def run_soak(model: ElasticModel, lengths: tuple[int, ...], seconds: float) -> Counter[str]:
    """Soak a server that runs half as many requests as there are clients, and holds the pages of fewer."""
    wanted = answers(model, lengths)
    assert sum(not case.is_drawn for case in wanted) > len(LATENCIES) * len(lengths) * len(WORDS) // 2
    # pages for two or three of the longest answers of the full model
    num_pages = 2.5 * -(-(max(lengths) + 8) // 8)
    sizes = {
        "kv_cache_gb": num_pages * FULL_PAGE_BYTES / 1e9,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 24,
        "page_size": 8,
    }
    with running(model, sizes, client_seconds=SECONDS_FOR_ALL) as made:
        asyncio.run(soak(made, wanted, seconds / 10))
        before = psutil.Process().memory_info().rss
        shared = asyncio.run(soak(made, wanted, seconds))
        made.wait_until_idle()
        made.service.core.pool.check_integrity([])
        assert made.service.is_idle
        shared.counts["preemptions"] = made.service.core.scheduler.num_preemptions
        grown = psutil.Process().memory_info().rss - before
    assert shared.wrong == []
    assert grown < 64e6
    return shared.counts


def test_seconds(model: ElasticModel) -> None:
    counts = run_soak(model, (3, 12), 2)
    assert min(counts[kind] for kind in ("whole", "streamed", "cancelled", "drawn", "greedy", "preemptions")) > 0


@pytest.mark.slow
@pytest.mark.timeout(2 * SECONDS + SECONDS_FOR_ALL)
def test_minutes(model: ElasticModel, capsys: pytest.CaptureFixture[str]) -> None:
    counts = run_soak(model, (1, 5, 17, 40), SECONDS)
    with capsys.disabled():
        print(f"\nsoak of {SECONDS:g} s: {dict(counts)}")  # noqa: T201
    assert min(counts[kind] for kind in ("whole", "streamed", "cancelled", "preemptions")) > SECONDS / 4
