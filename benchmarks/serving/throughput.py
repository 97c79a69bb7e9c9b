"""Exact tokens and offline throughput beside transformers and llama.cpp."""

from __future__ import annotations

from itertools import cycle, islice
from typing import Any

from benchmarks import smollm2
from benchmarks.harness import Figure, interleaved, median, ratios
from benchmarks.llamacpp import Kind, LlamaCpp
from benchmarks.serving.models import ELASTIC, PAUSE, elastic, original, subnets
from benchmarks.transformers_peer import ContinuousBatching, dense, greedy
from benchmarks.workload import mixed_arrival, offline, requests
from flextron.engine import EngineCore, EngineSettings
from flextron.kernels.decoder import Weights

__all__ = [
    "exact_tokens",
    "throughput_against_llamacpp",
    "throughput_against_transformers",
    "throughput_int8_against_llamacpp",
]


def exact_tokens() -> Figure:
    """Greedy tokens of 64 requests of all targets that arrive one after the other, against transformers."""
    num_tokens = 24
    specs, asked = subnets(), requests(64, answers=(num_tokens, num_tokens))
    each = list(islice(cycle(specs), len(asked)))
    core = EngineCore(elastic().decoder, EngineSettings(max_num_seqs=24, max_num_batched_tokens=64))
    ours = mixed_arrival(core, asked, each)
    equal, different = 0, 0
    for i, spec in enumerate(specs):
        own = range(i, len(asked), len(specs))
        theirs = greedy(dense(ELASTIC, elastic().decoder, spec), [asked[j].prompt for j in own], num_tokens)
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


def throughput_against_transformers() -> Figure:
    """Offline throughput, 64 requests, against transformers' continuous batching."""
    model = smollm2.peer()
    with ContinuousBatching(model, num_slots=64, max_tokens=128) as peer:
        return _throughput("transformers' continuous batching", peer.serve, "float32", 2.0, "")


def throughput_against_llamacpp() -> Figure:
    """Offline throughput, 64 requests, against llama.cpp with parallel slots."""
    return _throughput_against_llamacpp("float32", "F32", 1.2)


def throughput_int8_against_llamacpp() -> Figure:
    """Offline throughput in int8, 64 requests, against llama.cpp with parallel slots."""
    return _throughput_against_llamacpp("int8", "Q8_0", 3.0)


def _throughput_against_llamacpp(weights: Weights, kind: Kind, bar: float) -> Figure:
    with LlamaCpp(kind, num_slots=64) as peer:
        return _throughput(
            f"llama.cpp with 64 slots, {kind}",
            lambda asked: peer.serve([(r.prompt, r.num_tokens) for r in asked]),
            weights,
            bar,
            f"; llama.cpp compiled for {peer.features}",
        )


def _throughput(name: str, serve: Any, weights: Weights, bar: float, note: str) -> Figure:
    """All requests at once, weights of the same kind on both sides."""
    asked = requests(64)
    core = EngineCore(original(), EngineSettings(weights=weights))
    answers: dict[str, list[list[int]]] = {}

    def ours() -> float:
        seconds, answers["ours"] = offline(core, asked)
        return seconds

    def theirs() -> float:
        seconds, answers["peer"] = serve(asked)
        return seconds

    times = interleaved({"ours": ours, "peer": theirs}, 3, PAUSE)
    if [len(a) for a in answers["peer"]] != [r.num_tokens for r in asked]:
        raise RuntimeError(f"{name} did not generate the tokens that were asked for")
    spread = median(ratios(times, "peer", "ours"))
    generated, read = sum(r.num_tokens for r in asked), sum(len(r.prompt) for r in asked)
    equal = sum(a == b for a, b in zip(answers["ours"], answers["peer"], strict=True))
    return Figure(
        name=f"offline throughput, 64 requests, {weights}, against {name}",
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
