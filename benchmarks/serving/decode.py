"""Decoding at batch 1: beside memory, llama.cpp and the engine without speculation."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from benchmarks.harness import Figure, interleaved, median, ratios
from benchmarks.llamacpp import LlamaCpp
from benchmarks.rounding import perplexity
from benchmarks.serving.models import PAUSE, ROUNDS, elastic, num_bytes, original
from benchmarks.workload import Decoding, offline, requests
from flextron.api.engine import speculation_of
from flextron.engine import EngineCore, EngineSettings

__all__ = [
    "bandwidth",
    "float32_against_llamacpp",
    "int4_against_llamacpp",
    "int8_against_llamacpp",
    "self_speculation",
]


def bandwidth() -> Figure:
    """Decode at batch 1, float32, against the memory bandwidth."""
    decoding = Decoding(original(), [original().widths])
    source, target = torch.ones(2, 2**26)
    weights = num_bytes(original().widths)
    jobs = {
        "ours": lambda: weights / decoding.step_seconds(),
        "copy": lambda: 2 * source.nbytes / _best_seconds(lambda: target.copy_(source)),
        "read": lambda: source.nbytes / _best_seconds(source.sum),
    }
    rates = interleaved(jobs, ROUNDS, PAUSE)
    spread = median(ratios(rates, "ours", "copy"))
    ours, copy, read = (median(rates[name])[1] / 1e9 for name in ("ours", "copy", "read"))
    return Figure(
        name="decode at batch 1, float32: bytes of weights a second over the bandwidth of copying memory",
        value=spread[1],
        unit="of the limit",
        op=">=",
        bar=0.9,
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
    losses = {w: perplexity(original(), w) for w in ("float32", "int8", "int4")}
    rises = ", ".join(f"{w} {100 * (losses[w] / losses['float32'] - 1):.1f} %" for w in ("int8", "int4"))
    note = f"{figure.note}; heads have eight bits, ours `o` and `down`, too; perplexity rises over float32: {rises}"
    return replace(figure, note=note)


def _decode_against_llamacpp(weights: Any, kind: Any) -> Figure:
    prompt = requests(1, prompts=(32, 32))[0].prompt
    with LlamaCpp(kind) as peer:
        decoding = Decoding(original(), [original().widths], weights, screens_head=True)
        jobs = {"ours": decoding.step_seconds, "peer": lambda: peer.step_seconds(prompt, 5)}
        times = interleaved(jobs, ROUNDS, PAUSE)
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


def self_speculation() -> Figure:
    """Self-speculation at batch 1 on real prompts, the full network of a trained model, against the same without."""
    model, asked = elastic(), requests(8, prompts=(48, 64), answers=(64, 64))
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

    times = interleaved({name: partial(seconds, name) for name in cores}, 5, PAUSE)
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
        bar=2.0,
        peer={"name": "without, tokens/s", "value": tokens / median(times["plain"])[1]},
        spread=spread,
        note=(
            f"prompts' time included; {different} answers differ; {accepted['int8']:.0%} of drafted tokens accepted; "
            f"the eight-bit copy takes a quarter of the weights' memory; without a copy (narrow float32 drafts): "
            f"{narrow:.2f}x, {accepted['float32']:.0%} accepted"
        ),
    )
