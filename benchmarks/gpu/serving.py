"""Rows of the GPU suite that serve: tokens, decode iterations, prompts, offline throughput."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import cycle
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from benchmarks.gpu.models import decoder, num_bytes, peer, seconds_left, setting, spec_of
from benchmarks.harness import Figure, interleaved, median, ratios
from flextron.engine import EngineCore, EngineSettings
from flextron.generation.sampling import SamplingParams
from flextron.model.decoder import Decoder
from flextron.model.device import wait_for
from flextron.spec import SubnetSpec

__all__ = [
    "bandwidth",
    "core",
    "decode_speeds",
    "exact_tokens",
    "prefill_speeds",
    "prompt",
    "subnetwork_times",
    "throughput",
]

_SHARES = (1.0, 0.75, 0.5)


def prompt(count: int, seed: int, small: bool = False) -> list[int]:
    """Tokens drawn at random."""
    vocabulary = (setting().small if small else setting().shape)["vocab_size"]
    rng = random.Random(seed)
    return [rng.randrange(1, vocabulary) for _ in range(count)]


def _engine(ours: Decoder) -> EngineCore:
    room = max(setting().prompts) + max(setting().batches)
    settings = EngineSettings(
        kv_cache_gb=setting().kv_cache_gb,
        max_num_seqs=max(64, max(setting().batches)),
        max_num_batched_tokens=max(256, room),
        prefix_caching=False,
        native=False,  # a rehearsal runs what a GPU runs
    )
    return EngineCore(ours, settings)


@cache
def core() -> EngineCore:
    """The engine that all rows of speed share, and its graphs with it."""
    return _engine(decoder())


def exact_tokens() -> Figure:
    """Greedy tokens in float32 against transformers, sub-networks and lengths mixed in one batch."""
    num_tokens, engine = 24, _engine(decoder(small=True))
    wanted = [prompt(5 + 9 * i, i, small=True) for i in range(8)]
    asked = [
        engine.add(str(i), p, SamplingParams(max_tokens=num_tokens), engine.network(spec_of(share, small=True)))
        for i, (p, share) in enumerate((p, share) for p in wanted for share in _SHARES)
    ]
    while engine.has_unfinished:
        engine.step()
    answers = [r.answer for r in asked if r.network.spec == spec_of(1.0, small=True)]
    equal = sum(
        a == b for p, own in zip(wanted, answers, strict=True) for a, b in zip(own, _greedy(p, num_tokens), strict=True)
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


@torch.no_grad()
def _greedy(tokens: Sequence[int], count: int) -> list[int]:
    """By running the whole text again for each token."""
    theirs, text = peer(small=True), list(tokens)
    for _ in range(count):
        text.append(int(theirs(torch.tensor([text], device=theirs.device), use_cache=False).logits[0, -1].argmax()))
    return text[len(tokens) :]


@cache
def _copy_rate() -> float:
    """Bytes read and written a second by a copy within the device's memory."""
    source = torch.zeros(setting().copied_bytes, dtype=torch.uint8, device=setting().device)
    target, times = torch.empty_like(source), []
    for _ in range(8):
        wait_for(source.device)
        start = time.perf_counter()
        target.copy_(source)
        wait_for(source.device)
        times.append(time.perf_counter() - start)
    return 2 * setting().copied_bytes / median(times[2:])[1]


def _decoding(spec: SubnetSpec, batch: int) -> list[float]:
    """Seconds of decode iterations of equal sequences; the first ones, which warm up and capture, do not count."""
    engine, own = core(), setting()
    network = engine.network(spec)
    params = SamplingParams(max_tokens=4 + own.steps)
    requests = [engine.add(f"{i}", prompt(own.context, i), params, network) for i in range(batch)]
    while any(r.num_new > 1 for r in requests):
        engine.step()
    times = []
    for _ in range(3 + own.steps):
        start = time.perf_counter()
        engine.step()
        times.append(time.perf_counter() - start)
    for request in requests:
        engine.abort(request)
    return times[3:]


@cache
def _decode_seconds(share: float, batch: int) -> tuple[float, float, float]:
    # once for the graphs, and once to be timed
    _decoding(spec_of(share), batch)
    return median(_decoding(spec_of(share), batch))


def bandwidth() -> Figure:
    """Decode at batch 1: bytes of weights and cache a second, of what a copy moves."""
    own = setting()
    spread = _decode_seconds(1.0, 1)
    read = num_bytes(core().decoder, spec_of(1.0), 1, own.context)
    rate = _copy_rate()
    each = [100 * read / seconds / rate for seconds in reversed(spread)]
    return Figure(
        name="decode at batch 1: bytes of weights and KV cache a second over a copy's in the same run",
        value=each[1],
        unit="%",
        op=">=",
        bar=60,
        peer={"name": "copy, GB/s read and written", "value": rate / 1e9},
        spread=(each[0], each[1], each[2]),
        note=f"{own.name}, {own.dtype}; {1e3 * spread[1]:.2f} ms, {read / 1e9:.2f} GB; engine included",
    )


class _Clock(StoppingCriteria):
    """Notes when each token is there; never stops."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        wait_for(input_ids.device)
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _generate(prompts: Sequence[Sequence[int]], count: int, *, compiles: bool) -> list[float]:
    """Seconds between transformers' tokens with a static cache, all prompts of one length or padded on the left."""
    theirs, clock, length = peer(), _Clock(), max(len(p) for p in prompts)
    ids = torch.tensor([[0] * (length - len(p)) + list(p) for p in prompts], device=theirs.device)
    mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts], device=theirs.device)
    theirs.generation_config = GenerationConfig(do_sample=False, pad_token_id=0, eos_token_id=None)
    theirs.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=count,
        cache_implementation="static",
        disable_compile=not compiles,
        stopping_criteria=StoppingCriteriaList([clock]),
    )
    return [b - a for a, b in zip(clock.times, clock.times[1:], strict=False)]


def decode_speeds() -> list[Callable[[], Figure]]:
    """A row for each batch."""
    return [partial(_decode_speed, i) for i in range(3)]


def _decode_speed(index: int) -> Figure:
    """Decode tokens a second against transformers' generate with a static cache."""
    own = setting()
    batch = own.batches[min(index, len(own.batches) - 1)]
    ours, compiles = _decode_seconds(1.0, batch), own.compiles and seconds_left() > 120
    prompts, count = [prompt(own.context, i) for i in range(batch)], 5 + own.steps
    try:
        _generate(prompts, 6, compiles=compiles)
        theirs = median(_generate(prompts, count, compiles=compiles)[2:])
    except Exception as error:  # a machine without a compiler, say
        if not compiles:
            raise
        compiles, theirs = False, median(_generate(prompts, count, compiles=False)[2:])
        print(f"transformers runs without its compiler: {type(error).__name__}: {str(error)[:200]}")
    narrow = {share: _decode_seconds(share, batch)[1] for share in _SHARES}
    spread = [theirs[1] / seconds for seconds in reversed(ours)]
    return Figure(
        name=f"decode of {batch} sequences against transformers' generate with a static cache",
        value=spread[1],
        unit="x",
        op=">=",
        bar=1.0,
        peer={"name": "transformers, tokens/s", "value": batch / theirs[1]},
        spread=(spread[0], spread[1], spread[2]),
        note=f"{own.name}, {own.dtype}; tokens/s by share of widths: "
        + ", ".join(f"{share:g}: {batch / s:,.0f}" for share, s in narrow.items())
        + f"; transformers {'compiles its step' if compiles else 'without its compiler'}",
    )


def subnetwork_times() -> list[Callable[[], Figure]]:
    """A row for each batch."""
    return [partial(_subnetwork_time, i) for i in range(3)]


def _subnetwork_time(index: int) -> Figure:
    """Time of a sub-network over its share of bytes."""
    own = setting()
    batch = own.batches[min(index, len(own.batches) - 1)]
    full = _decode_seconds(1.0, batch)[1]
    whole = num_bytes(core().decoder, spec_of(1.0), batch, own.context)
    found = {}
    for share in _SHARES[1:]:
        part = num_bytes(core().decoder, spec_of(share), batch, own.context) / whole
        found[share] = _decode_seconds(share, batch)[1] / full / part
    return Figure(
        name=f"decode of {batch} sequences in a sub-network of half the widths: time over its share of bytes",
        value=found[0.5],
        unit="ratio",
        op="<=",
        bar=1.3,
        peer={"name": "full network, ms", "value": 1e3 * full},
        note=f"three quarters: {found[0.75]:.2f}; bytes are those of weights, head and KV cache",
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
        _generate([tokens for tokens, _ in asked], own.answers[1], compiles=False)
        return time.perf_counter() - start

    jobs = {"ours": lambda: ours([]), "mixed": lambda: ours([spec_of(s) for s in _SHARES]), "peer": peers}
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
