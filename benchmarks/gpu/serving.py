"""Rows of the GPU suite that serve: equal tokens, prompts, offline throughput."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import cycle

import torch

from benchmarks.gpu.engine import core, engine_of, prompt
from benchmarks.gpu.generate import generate, greedy
from benchmarks.gpu.models import SHARES, decoder, num_bytes, peer, setting, spec_of
from benchmarks.harness import Figure, interleaved, median, ratios
from flextron.generation.sampling import SamplingParams
from flextron.spec import SubnetSpec

__all__ = ["exact_tokens", "prefill_speeds", "throughput"]


def exact_tokens() -> Figure:
    """Greedy tokens in float32 against transformers, sub-networks and lengths mixed in one batch."""
    num_tokens, engine = 24, engine_of(decoder(small=True))
    wanted = [prompt(5 + 9 * i, i, small=True) for i in range(8)]
    asked = [
        engine.add(str(i), p, SamplingParams(max_tokens=num_tokens), engine.network(spec_of(share, small=True)))
        for i, (p, share) in enumerate((p, share) for p in wanted for share in SHARES)
    ]
    while engine.has_unfinished:
        engine.step()
    answers = [r.answer for r in asked if r.network.spec == spec_of(1.0, small=True)]
    equal = sum(
        a == b for p, own in zip(wanted, answers, strict=True) for a, b in zip(own, greedy(p, num_tokens), strict=True)
    )
    return Figure(
        name="greedy tokens equal to transformers', float32, among sub-networks in one batch",
        value=100 * equal / (num_tokens * len(wanted)),
        unit="%",
        op=">=",
        bar=99,
        peer={"name": "transformers, prompts", "value": float(len(wanted))},
        note="random weights, whose scores lie close, and other kernels: a difference of rounding may turn a token",
    )


def prefill_speeds() -> list[Callable[[], Figure]]:
    """A row for each length."""
    return [partial(_prefill_speed, i) for i in range(2)]


def _prefill_speed(index: int) -> Figure:
    """Prompt tokens a second against transformers' forward pass."""
    own, engine, theirs = setting(), core(), peer()
    length = own.prompts[index]
    tokens = prompt(length, index)
    network, ids = engine.network(spec_of(1.0)), torch.tensor([tokens], device=theirs.device)

    def ours() -> float:
        request = engine.add("prompt", tokens, SamplingParams(max_tokens=1), network)
        start = time.perf_counter()
        while request.finish_reason is None:
            engine.step()
        return time.perf_counter() - start

    @torch.no_grad()
    def peers() -> float:
        start = time.perf_counter()
        theirs(ids, use_cache=True, logits_to_keep=1).logits.argmax(-1).tolist()
        return time.perf_counter() - start

    times = interleaved({"ours": ours, "peer": peers}, own.repeats)
    spread = median(ratios(times, "peer", "ours"))
    seconds = median(times["ours"])[1]
    flops = 2 * (num_bytes(engine.decoder, spec_of(1.0), 0, 0) / engine.decoder.dtype.itemsize) * length
    return Figure(
        name=f"prompt of {length} tokens against transformers' forward pass",
        value=spread[1],
        unit="x",
        op=">=",
        bar=0.9,
        peer={"name": "transformers, tokens/s", "value": length / median(times["peer"])[1]},
        spread=spread,
        note=f"{length / seconds:,.0f} tokens/s, {flops / seconds / 1e12:.1f} TFLOP/s of products; in one iteration",
    )


def throughput() -> Figure:
    """Offline throughput of many requests against transformers' generate, all in one padded batch."""
    own, engine = setting(), core()
    rng, network = random.Random(1), core().network(spec_of(1.0))
    asked = [
        (prompt(rng.randint(own.context // 4, own.context), i), rng.randint(*own.answers))
        for i in range(own.num_requests)
    ]

    def ours(specs: Sequence[SubnetSpec]) -> float:
        networks = [engine.network(spec) for spec in specs] or [network]
        start = time.perf_counter()
        for i, ((tokens, count), each) in enumerate(zip(asked, cycle(networks), strict=False)):
            engine.add(str(i), tokens, SamplingParams(max_tokens=count), each)
        while engine.has_unfinished:
            engine.step()
        return time.perf_counter() - start

    def peers() -> float:
        start = time.perf_counter()
        generate([tokens for tokens, _ in asked], own.answers[1], compiles=False)
        return time.perf_counter() - start

    jobs = {"ours": lambda: ours([]), "mixed": lambda: ours([spec_of(s) for s in SHARES]), "peer": peers}
    times = interleaved(jobs, min(2, own.repeats))
    spread, generated = median(ratios(times, "peer", "ours")), sum(count for _, count in asked)
    return Figure(
        name=f"offline throughput, {own.num_requests} requests, against transformers' generate in one batch",
        value=spread[1],
        unit="x",
        op=">=",
        bar=1.0,
        peer={"name": "transformers, tokens/s", "value": generated / median(times["peer"])[1]},
        spread=spread,
        note=f"{generated / median(times['ours'])[1]:,.0f} tokens/s; three sub-networks mixed: "
        f"{generated / median(times['mixed'])[1]:,.0f}; transformers goes on until the longest answer, not compiled",
    )
