"""An iteration of the engine: its overhead, and the cost of a larger batch."""

from __future__ import annotations

import time
from typing import Any

from torch import Tensor

from benchmarks.harness import Figure, interleaved, median, ratios
from benchmarks.serving.models import PAUSE, ROUNDS, original
from benchmarks.workload import Decoding

__all__ = ["batch_cost", "overhead"]


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
    full = original().widths
    decodings = {
        "1 sequence": Decoding(original(), [full]),
        "16 sequences": Decoding(original(), [full] * 16),
        "16 sequences, int8": Decoding(original(), [full] * 16, "int8"),
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

    shares = interleaved({name: lambda name=name: share(name) for name in decodings}, ROUNDS, PAUSE)
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
    full = original().widths
    jobs = {str(n): Decoding(original(), [full] * n).step_seconds for n in (1, 4, 16)}
    times = interleaved(jobs, ROUNDS, PAUSE)
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
