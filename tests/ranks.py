"""Processes of one group that run a test's function side by side, and a count of the collectives that they do."""

from __future__ import annotations

import multiprocessing as mp
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Ranks:
    """Workers that stay; importing torch is dear."""

    def __init__(self, backend: str, count: int, directory: Path) -> None:
        context = mp.get_context("spawn")
        self._pipes, self._processes = [], []
        for rank in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_work, args=(theirs, backend, rank, count, directory / "rendezvous"), daemon=True
            )
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What `function(device, *args)` returns, by rank; it is a module's own function."""
        for pipe in self._pipes:
            pipe.send((function, args))
        answers = []
        for rank, pipe in enumerate(self._pipes):
            assert pipe.poll(120), f"rank {rank} hangs"
            answers.append(pipe.recv())
        failures = [f"rank {rank}:\n{text}" for rank, (ok, text) in enumerate(answers) if not ok]
        assert not failures, "\n".join(failures)
        return [value for _, value in answers]

    def close(self) -> None:
        """End the workers."""
        for process in self._processes:
            process.kill()
            process.join()
        for pipe in self._pipes:
            pipe.close()


def _work(pipe: Connection, backend: str, rank: int, count: int, rendezvous: Path) -> None:
    torch.set_num_threads(1)
    device = torch.device("cpu") if backend == "gloo" else torch.device("cuda", rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(backend, init_method=f"file://{rendezvous}", rank=rank, world_size=count)
    while True:
        function, args = pipe.recv()
        try:
            pipe.send((True, function(device, *args)))
        except Exception:
            pipe.send((False, traceback.format_exc()))


class Collectives(TorchDispatchMode):
    """Counts the collectives of any kind within it, also those of backward passes, and their bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []
        """Operator and bytes of its tensors, in order."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            self.calls.append((func._opname, sum(t.nbytes for t in tensors)))
        return func(*args, **(kwargs or {}))
