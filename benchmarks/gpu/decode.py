"""Rows of the GPU suite that decode: against the bytes that must be read, a copy's bandwidth, and transformers."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache, partial

import torch

from benchmarks.gpu.engine import core, prompt
from benchmarks.gpu.generate import generate
from benchmarks.gpu.models import SHARES, num_bytes, seconds_left, setting, spec_of
from benchmarks.harness import Figure, median
from flextron.generation.sampling import SamplingParams
from flextron.model.device import wait_for
from flextron.spec import SubnetSpec

__all__ = ["bandwidth", "decode_speeds", "subnetwork_times"]

_UNTIMED = 6
"""Of transformers' steps: compiling, and the warm-up of its graphs."""


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


def decode_speeds() -> list[Callable[[], Figure]]:
    """A row for each batch."""
    return [partial(_decode_speed, i) for i in range(3)]


def _decode_speed(index: int) -> Figure:
    """Decode tokens a second against transformers' generate with a static cache."""
    own = setting()
    batch = own.batches[min(index, len(own.batches) - 1)]
    ours, compiles = _decode_seconds(1.0, batch), own.compiles and seconds_left() > 120
    prompts, count = [prompt(own.context, i) for i in range(batch)], _UNTIMED + 1 + own.steps
    try:
        theirs = median(generate(prompts, count, compiles=compiles)[_UNTIMED:])
    except Exception as error:  # a machine without a compiler, say
        if not compiles:
            raise
        compiles, theirs = False, median(generate(prompts, count, compiles=False)[_UNTIMED:])
        print(f"transformers runs without its compiler: {type(error).__name__}: {str(error)[:200]}")
    narrow = {share: _decode_seconds(share, batch)[1] for share in SHARES}
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
    for share in SHARES[1:]:
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
