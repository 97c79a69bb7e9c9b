"""Where a step of elastic training spends its time, and how fast a low rank could be at best.

`python -m benchmarks.training_time RANK` runs a step of SmolLM2 with all weights and one of that rank on one thread,
and prints seconds of the thread by kind of operation. A low rank saves the weights' gradients and adds thin products;
at best these run as fast as the large ones.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.training_memory import training_run

__all__ = ["main"]

_PRODUCTS = ("mm", "addmm", "addmm_")
_STEPS = 3


class _Timed(TorchDispatchMode):
    """Adds up the thread's seconds and the operations of products, by kind."""

    def __init__(self, thin: int) -> None:
        super().__init__()
        self.seconds, self.operations, self._thin = Counter[str](), Counter[str](), thin

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        began = time.thread_time()
        out = func(*args, **(kwargs or {}))
        seconds = time.thread_time() - began
        kind = "other operations"
        if func.__name__.split(".")[0] in _PRODUCTS:
            a, b = [x for x in args if isinstance(x, Tensor)][-2:]
            kind = self._kind(a, b)
            self.operations[kind] += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        self.seconds[kind] += seconds
        return out

    def _kind(self, a: Tensor, b: Tensor) -> str:
        if min(*a.shape, b.shape[1]) <= self._thin:
            return "thin products"
        return "gradients of weights" if a.stride(0) == 1 else "other large products"


def _measured(rank: int, thin: int) -> _Timed:
    run = training_run(rank, sequences=8)
    run.step(0)
    with _Timed(thin) as timed:
        for _ in range(_STEPS):
            run.step(0)
    return timed


def main() -> None:
    """Print both steps and the limit."""
    rank = int(sys.argv[1])
    torch.set_num_threads(1)
    whole, low = _measured(0, rank), _measured(rank, rank)
    for name, timed in (("all weights", whole), (f"rank {rank}", low)):
        total = sum(timed.seconds.values())
        print(f"{name}: {total / _STEPS:.1f} s a step")
        for kind, seconds in timed.seconds.most_common():
            speed = f", {timed.operations[kind] / seconds / 1e9:.0f} GFLOP/s" if timed.operations[kind] else ""
            print(f"  {kind}: {seconds / total:.1%}{speed}")
    total, gradients = sum(whole.seconds.values()), whole.seconds["gradients of weights"]
    large = "other large products"
    least = low.operations["thin products"] * whole.seconds[large] / whole.operations[large]
    limits = (total / (total - gradients + added) for added in (least, 0.0))
    print("limit: {:.2f} x, and {:.2f} x if thin products were free".format(*limits))


if __name__ == "__main__":
    main()
