"""Time and memory of sub-networks, alone and in one batch."""

from __future__ import annotations

from torch import Tensor

from benchmarks.harness import Figure, interleaved, median, ratios
from benchmarks.serving.models import PAUSE, ROUNDS, SHARES, elastic, num_bytes, subnets
from benchmarks.workload import Decoding, mixed_arrival, requests
from flextron.engine import EngineCore, EngineSettings

__all__ = ["kv_memory", "mixed_batch", "small_mixed_batch", "subnet_time"]


def subnet_time() -> Figure:
    """Decode time of sub-networks over the full network's, against the ratio of their bytes."""
    full, *smaller = subnets()
    decodings = {
        share: Decoding(elastic().decoder, [spec]) for share, spec in zip((1.0, *SHARES), subnets(), strict=True)
    }
    times = interleaved({str(share): d.step_seconds for share, d in decodings.items()}, ROUNDS, PAUSE)
    rows = []
    for share, spec in zip(SHARES, smaller, strict=True):
        ideal = num_bytes(spec) / num_bytes(full)
        rows.append((median([r / ideal for r in ratios(times, str(share), "1.0")]), ideal))
    worst = max(rows, key=lambda row: row[0][1])
    return Figure(
        name="decode time of a sub-network over the full network's, over the ratio of their bytes: worst of three",
        value=worst[0][1],
        unit="ratio",
        op="<=",
        bar=1.03,
        peer={"name": "ratio of bytes", "value": worst[1]},
        spread=worst[0],
        note="batch 1, float32; bytes and time: " + ", ".join(f"{i:.3f} and {r[1] * i:.3f}" for r, i in rows),
    )


def small_mixed_batch() -> Figure:
    """Four sequences of each of three sub-networks, against reading the widest and the arithmetic of each."""
    specs, decoder, count = subnets()[:3], elastic().decoder, 4
    many = 3 * count
    jobs = {(i, n): Decoding(decoder, [spec] * n) for i, spec in enumerate(specs) for n in (1, many)}
    mixed = Decoding(decoder, [spec for spec in specs for _ in range(count)])
    named = {f"{i} x {n}": d.step_seconds for (i, n), d in jobs.items()}
    times = interleaved({**named, "mixed": mixed.step_seconds}, ROUNDS, PAUSE)
    least = []
    for r in range(ROUNDS):
        # all weights are read once, and each sequence adds what one more of its own takes
        further = [(times[f"{i} x {many}"][r] - times[f"{i} x 1"][r]) / (many - 1) for i in range(len(specs))]
        least.append(times["0 x 1"][r] + count * sum(further) - further[0])
    spread = median([a / b for a, b in zip(times["mixed"], least, strict=True)])
    return Figure(
        name=f"iteration of {many} sequences in three sub-networks over reading the widest and the arithmetic of each",
        value=spread[1],
        unit="ratio",
        op="<=",
        bar=1.05,
        peer={"name": "that limit, ms", "value": 1e3 * median(least)[1]},
        spread=spread,
        note=f"float32; {count} each at 1, 0.75, 0.5 of the bytes; {1e3 * median(times['mixed'])[1]:.1f} ms",
    )


def mixed_batch() -> Figure:
    """Sixteen sequences of each of three sub-networks, against the sum of their shares of iterations of one each."""
    specs, decoder, count = subnets()[:3], elastic().decoder, 16
    alone = {f"{i}": Decoding(decoder, [spec] * (3 * count)) for i, spec in enumerate(specs)}
    mixed = Decoding(decoder, [spec for spec in specs for _ in range(count)])
    times = interleaved({name: d.step_seconds for name, d in {**alone, "mixed": mixed}.items()}, ROUNDS, PAUSE)
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


def kv_memory() -> Figure:
    """Memory of keys and values of a request at one third of the KV groups."""
    model = elastic()
    config = model.decoder.config
    prompt = requests(1, prompts=(64, 64), answers=(1, 1))
    written = []
    for groups in (config.num_groups // 3, config.num_groups):
        core = EngineCore(model.decoder, EngineSettings(kv_cache_gb=0.05))
        mixed_arrival(core, prompt, [model.space.uniform(config.intermediate_size, groups)])
        written.append(_written_bytes(core.runner._paged.cache))
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
