"""How an iteration of a form that comes again is run: kept as a CUDA graph, or by whatever else prepares a function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["CudaGraphs", "Executor"]


class Executor(Protocol):
    """Prepares a function that reads and writes tensors which stay where they are; `torch.compile` is one, too."""

    def __call__(self, function: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Something that does what the function does. The function has run at least once before."""


class CudaGraphs:
    """Captures functions; all graphs draw from one pool of memory, so the result of one is lost with the next."""

    def __init__(self) -> None:
        """Begin a pool."""
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, function: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Capture; see `Executor`."""
        graph = torch.cuda.CUDAGraph()
        # other threads may use the device meanwhile
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            out = function()

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay
