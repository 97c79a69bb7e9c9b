"""An iteration of the engine: its overhead, and the cost of a larger batch."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness import Figure, interleaved, median, seconds
from benchmarks.serving.models import PAUSE, ROUNDS, matrices, original
from benchmarks.workload import Decoding

__all__ = ["batch_cost", "overhead"]

_TOKENS = 512
"""Enough for PyTorch to multiply as fast as it can."""


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
    """A decode iteration of 16 sequences, float32, over what reading or arithmetic takes at least."""
    full, count = original().widths, 16
    weights = [*matrices(), original().head_weight]
    inputs = {m.shape[1]: torch.randn(_TOKENS, m.shape[1]) for m in weights}

    def products() -> None:
        for matrix in weights:
            F.linear(inputs[matrix.shape[1]], matrix)

    jobs = {str(n): Decoding(original(), [full] * n).step_seconds for n in (1, 4, count)}
    times = interleaved({**jobs, "products": lambda: seconds(products)}, ROUNDS, PAUSE)
    least = [max(one, many * count / _TOKENS) for one, many in zip(times["1"], times["products"], strict=True)]
    spread = median([a / b for a, b in zip(times[str(count)], least, strict=True)])
    milliseconds = ", ".join(f"{n}: {1e3 * median(times[n])[1]:.1f}" for n in jobs)
    return Figure(
        name=f"decode iteration of {count} sequences, float32, over what reading (one sequence) or arithmetic takes",
        value=spread[1],
        unit="ratio",
        op="<=",
        bar=1.1,
        peer={"name": "the longer of both, ms", "value": 1e3 * median(least)[1]},
        spread=spread,
        note=f"arithmetic: that part of PyTorch's products with {_TOKENS} tokens; ms by sequences: {milliseconds}",
    )
