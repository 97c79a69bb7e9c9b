"""The serving suite: exactness, decode speed, throughput beside transformers and llama.cpp, mixed batches, memory.

All on SmolLM2-135M and two threads or as many as PyTorch has. Sub-networks are those of the demo's trained model.
"""

from __future__ import annotations

import time
from dataclasses import replace
from functools import cache, partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import smollm2
from benchmarks.core import demo_record
from benchmarks.harness import Figure, interleaved, median, ratios, run_suite
from benchmarks.llamacpp import LlamaCpp
from benchmarks.rounding import perplexity
from benchmarks.transformers_peer import ContinuousBatching, dense, greedy
from benchmarks.workload import Decoding, mixed_arrival, offline, requests
from flextron.api import ElasticModel, load
from flextron.api.engine import speculation_of
from flextron.engine import EngineCore, EngineSettings
from flextron.model.cost import num_parameters
from flextron.model.decoder import Decoder
from flextron.routing import FrontierPoint
from flextron.spec import SubnetSpec

__all__ = ["run"]

_ELASTIC = Path("out/demo/elastic")
_SHARES = (0.75, 0.5, 0.35)
"""Of the full network's bytes."""
_ROUNDS = 11
_PAUSE = 0.03
"""Seconds; idle threads of one library spin for some milliseconds and would hold up the next."""


@cache
def _elastic() -> ElasticModel:
    demo_record()
    return load(_ELASTIC)


@cache
def _original() -> Decoder:
    """What llama.cpp and transformers run in the comparisons of speed."""
    return smollm2.decoder()


def _bytes(spec: SubnetSpec) -> int:
    """Weights that a decode step reads in float32; the embedding is the head, too."""
    return 4 * num_parameters(_elastic().decoder.config, spec)


@cache
def _subnets() -> list[SubnetSpec]:
    """The full network, and the measured ones whose bytes come nearest to the shares."""
    model = _elastic()
    full = model.space.full
    assert model.frontier is not None

    def distance(point: FrontierPoint, share: float) -> float:
        return abs(_bytes(point.spec) / _bytes(full) - share)

    return [full, *(min(model.frontier.points, key=lambda p: distance(p, s)).spec for s in _SHARES)]


def exact_tokens() -> Figure:
    """Greedy tokens of 64 requests of all targets that arrive one after the other, against transformers."""
    num_tokens = 24
    specs, asked = _subnets(), requests(64, answers=(num_tokens, num_tokens))
    each = list(islice(cycle(specs), len(asked)))
    core = EngineCore(_elastic().decoder, EngineSettings(max_num_seqs=24, max_num_batched_tokens=64))
    ours = mixed_arrival(core, asked, each)
    equal, different = 0, 0
    for i, spec in enumerate(specs):
        own = range(i, len(asked), len(specs))
        theirs = greedy(dense(_ELASTIC, _elastic().decoder, spec), [asked[j].prompt for j in own], num_tokens)
        for j, expected in zip(own, theirs, strict=True):
            equal += sum(a == b for a, b in zip(ours[j], expected, strict=True))
            different += ours[j] != expected
    return Figure(
        name="greedy tokens equal to transformers', 64 requests of four sub-networks, mixed arrival",
        value=100 * equal / (num_tokens * len(asked)),
        unit="%",
        op="==",
        bar=100,
        peer={"name": "transformers, requests that differ", "value": different},
        note=f"{num_tokens} tokens each, against generate of each extracted dense model; at most 24 at once, in chunks",
    )


def bandwidth() -> Figure:
    """Decode at batch 1, float32, against the memory bandwidth."""
    decoding = Decoding(_original(), [_original().widths])
    source, target = torch.ones(2, 2**26)
    weights = _bytes(_original().widths)
    jobs = {
        "ours": lambda: weights / decoding.step_seconds(),
        "copy": lambda: 2 * source.nbytes / _best_seconds(lambda: target.copy_(source)),
        "read": lambda: source.nbytes / _best_seconds(source.sum),
    }
    rates = interleaved(jobs, _ROUNDS, _PAUSE)
    spread = median(ratios(rates, "ours", "copy"))
    ours, copy, read = (median(rates[name])[1] / 1e9 for name in ("ours", "copy", "read"))
    return Figure(
        name="decode at batch 1, float32: bytes of weights a second over the bandwidth of copying memory",
        value=spread[1],
        unit="of the limit",
        op=">=",
        bar=0.85,
        peer={"name": "copying (read and written), GB/s", "value": copy},
        spread=spread,
        note=f"{ours:.1f} GB/s of weights, {ours * 1e9 / weights:.1f} tokens/s; reading alone {read:.1f} GB/s",
    )


def _best_seconds(job: Any, repeats: int = 3) -> float:
    """The least of a few runs."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        job()
        times.append(time.perf_counter() - start)
    return min(times)


def float32_against_llamacpp() -> Figure:
    """Decode at batch 1 in float32 against llama.cpp's F32."""
    return _decode_against_llamacpp("float32", "F32")


def int8_against_llamacpp() -> Figure:
    """Decode at batch 1 in int8 against llama.cpp's Q8_0."""
    return _decode_against_llamacpp("int8", "Q8_0")


def int4_against_llamacpp() -> Figure:
    """Decode at batch 1 in int4 against llama.cpp's Q4_0."""
    figure = _decode_against_llamacpp("int4", "Q4_0")
    losses = {w: perplexity(_original(), w) for w in ("float32", "int8", "int4")}
    rises = ", ".join(f"{w} {100 * (losses[w] / losses['float32'] - 1):.1f} %" for w in ("int8", "int4"))
    note = f"{figure.note}; heads have eight bits, ours `o` and `down`, too; perplexity rises over float32: {rises}"
    return replace(figure, note=note)


def _decode_against_llamacpp(weights: Any, kind: Any) -> Figure:
    prompt = requests(1, prompts=(32, 32))[0].prompt
    with LlamaCpp(kind) as peer:
        decoding = Decoding(_original(), [_original().widths], weights)
        jobs = {"ours": decoding.step_seconds, "peer": lambda: peer.step_seconds(prompt, 5)}
        times = interleaved(jobs, _ROUNDS, _PAUSE)
    spread = median(ratios(times, "peer", "ours"))
    return Figure(
        name=f"decode at batch 1, {weights}, against llama.cpp's {kind}",
        value=spread[1],
        unit="x",
        op=">=",
        bar=1.0,
        peer={"name": f"llama.cpp {kind}, tokens/s", "value": 1 / median(times["peer"])[1]},
        spread=spread,
        note=f"{1 / median(times['ours'])[1]:.1f} tokens/s; llama.cpp compiled for {peer.features}",
    )


def throughput_against_transformers() -> Figure:
    """Offline throughput, 64 requests, against transformers' continuous batching."""
    model = smollm2.peer()
    with ContinuousBatching(model, num_slots=64, max_tokens=128) as peer:
        return _throughput("transformers' continuous batching", peer.serve, 2.0, "")


def throughput_against_llamacpp() -> Figure:
    """Offline throughput, 64 requests, against llama.cpp with parallel slots."""
    with LlamaCpp("F32", num_slots=64) as peer:
        return _throughput(
            "llama.cpp with 64 slots, F32",
            lambda asked: peer.serve([(r.prompt, r.num_tokens) for r in asked]),
            1.2,
            f"; llama.cpp compiled for {peer.features}",
        )


def _throughput(name: str, serve: Any, bar: float, note: str) -> Figure:
    """All requests at once, float32 on both sides."""
    asked = requests(64)
    core = EngineCore(_original())
    answers: dict[str, list[list[int]]] = {}

    def ours() -> float:
        seconds, answers["ours"] = offline(core, asked)
        return seconds

    def theirs() -> float:
        seconds, answers["peer"] = serve(asked)
        return seconds

    times = interleaved({"ours": ours, "peer": theirs}, 3, _PAUSE)
    if [len(a) for a in answers["peer"]] != [r.num_tokens for r in asked]:
        raise RuntimeError(f"{name} did not generate the tokens that were asked for")
    spread = median(ratios(times, "peer", "ours"))
    generated, read = sum(r.num_tokens for r in asked), sum(len(r.prompt) for r in asked)
    equal = sum(a == b for a, b in zip(answers["ours"], answers["peer"], strict=True))
    return Figure(
        name=f"offline throughput, 64 requests, float32, against {name}",
        value=spread[1],
        unit="x",
        op=">=",
        bar=bar,
        peer={"name": f"{name}, tokens/s", "value": generated / median(times["peer"])[1]},
        spread=spread,
        note=(
            f"{generated / median(times['ours'])[1]:.0f} tokens/s; {read:,} tokens of prompts and {generated:,} of "
            f"answers; {equal} answers are equal{note}"
        ),
    )


def subnet_time() -> Figure:
    """Decode time of sub-networks over the full network's, against the ratio of their bytes."""
    full, *smaller = _subnets()
    decodings = {
        share: Decoding(_elastic().decoder, [spec]) for share, spec in zip((1.0, *_SHARES), _subnets(), strict=True)
    }
    times = interleaved({str(share): d.step_seconds for share, d in decodings.items()}, _ROUNDS, _PAUSE)
    rows = []
    for share, spec in zip(_SHARES, smaller, strict=True):
        ideal = _bytes(spec) / _bytes(full)
        rows.append((median([r / ideal for r in ratios(times, str(share), "1.0")]), ideal))
    worst = max(rows, key=lambda row: row[0][1])
    return Figure(
        name="decode time of a sub-network over the full network's, over the ratio of their bytes: worst of three",
        value=worst[0][1],
        unit="ratio",
        op="<=",
        bar=1.05,
        peer={"name": "ratio of bytes", "value": worst[1]},
        spread=worst[0],
        note="batch 1, float32; bytes and time: " + ", ".join(f"{i:.3f} and {r[1] * i:.3f}" for r, i in rows),
    )


def small_mixed_batch() -> Figure:
    """Four sequences of each of three sub-networks: most of the time goes to reading weights, which shares ignore."""
    return _mixed_batch(4)


def mixed_batch() -> Figure:
    """Sixteen sequences of each of three sub-networks."""
    return _mixed_batch(16)


def _mixed_batch(count: int) -> Figure:
    """An iteration of three sub-networks' sequences against the sum of their shares of iterations of one each."""
    specs = _subnets()[:3]
    decoder = _elastic().decoder
    alone = {f"{i}": Decoding(decoder, [spec] * (3 * count)) for i, spec in enumerate(specs)}
    mixed = Decoding(decoder, [spec for spec in specs for _ in range(count)])
    times = interleaved({name: d.step_seconds for name, d in {**alone, "mixed": mixed}.items()}, _ROUNDS, _PAUSE)
    shares = [sum(row) / len(row) for row in zip(*(times[name] for name in alone), strict=True)]
    spread = median([a / b for a, b in zip(times["mixed"], shares, strict=True)])
    parts = ", ".join(f"{1e3 * median(times[name])[1]:.1f}" for name in alone)
    return Figure(
        name=f"iteration of {3 * count} sequences in three sub-networks over the sum of their shares",
        value=spread[1],
        unit="ratio",
        op="<=",
        bar=1.05,
        peer={"name": "sum of shares, ms", "value": 1e3 * median(shares)[1]},
        spread=spread,
        note=f"float32; {count} each at 1, 0.75, 0.5 of the bytes; {3 * count} in one network take {parts} ms",
    )


def self_speculation() -> Figure:
    """Self-speculation at batch 1 on real prompts, the full network of a trained model, against the same without."""
    model, asked = _elastic(), requests(8, prompts=(48, 64), answers=(64, 64))
    settings = {
        "plain": None,
        "int8": speculation_of(model, "int8"),
        "float32": speculation_of(model, "float32"),
    }
    cores = {n: EngineCore(model.decoder, EngineSettings(max_num_seqs=1, speculation=s)) for n, s in settings.items()}
    answers: dict[str, list[list[int]]] = {}

    def seconds(name: str) -> float:
        total, answers[name] = offline(cores[name], asked)
        return total

    times = interleaved({name: partial(seconds, name) for name in cores}, 5, _PAUSE)
    different = sum(answers["plain"][i] != answers[n][i] for n in ("int8", "float32") for i in range(len(asked)))
    spread = median(ratios(times, "plain", "int8"))
    narrow = median(ratios(times, "plain", "float32"))[1]
    accepted = {n: c.speculator.num_accepted / c.speculator.num_drafted for n, c in cores.items() if c.speculator}
    tokens = sum(r.num_tokens for r in asked)
    return Figure(
        name="self-speculation at batch 1, drafts in int8: tokens a second over the same engine without",
        value=spread[1] if not different else 0.0,
        unit="x",
        op=">=",
        bar=1.4,
        peer={"name": "without, tokens/s", "value": tokens / median(times["plain"])[1]},
        spread=spread,
        note=(
            f"prompts' time included; {different} answers differ; {accepted['int8']:.0%} of drafted tokens accepted; "
            f"the eight-bit copy takes a quarter of the weights' memory; without a copy (narrow float32 drafts): "
            f"{narrow:.2f}x, {accepted['float32']:.0%} accepted"
        ),
    )


def kv_memory() -> Figure:
    """Memory of keys and values of a request at one third of the KV groups."""
    model = _elastic()
    config = model.decoder.config
    prompt = requests(1, prompts=(64, 64), answers=(1, 1))
    written = []
    for groups in (config.num_groups // 3, config.num_groups):
        core = EngineCore(model.decoder, EngineSettings(kv_cache_gb=0.05))
        mixed_arrival(core, prompt, [model.space.uniform(config.intermediate_size, groups)])
        written.append(_written_bytes(core.runner.cache))
    return Figure(
        name="memory of keys and values of a request at one third of the KV groups",
        value=written[0] / written[1],
        unit="of the full",
        op="==",
        bar=1 / 3,
        peer={"name": "full network, bytes", "value": written[1]},
        note="64 tokens, all MLP neurons; counted are the parts of the cache that were written",
    )


def _written_bytes(cache: Tensor) -> int:
    """Of the cache's units that do not hold zeros any more."""
    units = cache.flatten(1)
    return int(units.any(1).sum()) * units[0].nbytes


class _Clocked:
    """Counts the seconds that the compiled call takes."""

    def __init__(self, native: Any) -> None:
        self._native, self.seconds = native, 0.0

    def __call__(self, *args: Any) -> Tensor:
        start = time.perf_counter()
        out: Tensor = self._native(*args)
        self.seconds += time.perf_counter() - start
        return out


def overhead() -> Figure:
    """The share of an iteration that is not the model."""
    full = _original().widths
    decodings = {
        "1 sequence": Decoding(_original(), [full]),
        "16 sequences": Decoding(_original(), [full] * 16),
        "16 sequences, int8": Decoding(_original(), [full] * 16, "int8"),
    }
    clocks = {}
    for name, decoding in decodings.items():
        compiled = decoding.core.runner._native
        for weights, native in compiled.items():
            compiled[weights] = clocks[name] = _Clocked(native)  # type: ignore[assignment]

    def share(name: str) -> float:
        parts = []
        for _ in range(6):
            clocks[name].seconds = 0.0
            total = decodings[name].step()
            parts.append(1 - clocks[name].seconds / total)
        return median(parts[1:])[1]

    shares = interleaved({name: lambda name=name: share(name) for name in decodings}, _ROUNDS, _PAUSE)
    spreads = {name: median(values) for name, values in shares.items()}
    worst = max(("1 sequence", "16 sequences"), key=lambda name: spreads[name][1])
    return Figure(
        name="engine overhead: share of an iteration outside the compiled decoder",
        value=100 * spreads[worst][1],
        unit="%",
        op="<=",
        bar=5,
        spread=tuple(100 * x for x in spreads[worst]),  # type: ignore[arg-type]
        note="scheduling, page tables, choice of tokens; float32 unless said otherwise: "
        + ", ".join(f"{name} {100 * s[1]:.1f} %" for name, s in spreads.items()),
    )


def batch_cost() -> Figure:
    """A decode iteration of 16 sequences over one of 1, float32."""
    full = _original().widths
    jobs = {str(n): Decoding(_original(), [full] * n).step_seconds for n in (1, 4, 16)}
    times = interleaved(jobs, _ROUNDS, _PAUSE)
    spread = median(ratios(times, "16", "1"))
    milliseconds = ", ".join(f"{n}: {1e3 * median(times[n])[1]:.1f}" for n in times)
    return Figure(
        name="decode iteration of 16 sequences over one of 1, float32",
        value=spread[1],
        unit="ratio",
        op="<=",
        bar=1.6,
        peer={"name": "1 sequence, ms", "value": 1e3 * median(times["1"])[1]},
        spread=spread,
        note=f"milliseconds by sequences: {milliseconds}",
    )


def run() -> bool:
    """All figures of the suite."""
    torch.manual_seed(0)
    return run_suite(
        "serving",
        [
            exact_tokens,
            bandwidth,
            float32_against_llamacpp,
            int8_against_llamacpp,
            int4_against_llamacpp,
            throughput_against_transformers,
            throughput_against_llamacpp,
            subnet_time,
            mixed_batch,
            small_mixed_batch,
            self_speculation,
            kv_memory,
            overhead,
            batch_cost,
        ],
    )
