"""Processes of one group that run a test's function side by side, and a count of the collectives that they do."""

from __future__ import annotations

import multiprocessing as mp
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Ranks:
    """Workers that stay, since importing torch is dear; after a failure new ones are started."""

    def __init__(self, backend: str, count: int, directory: Path) -> None:
        self._backend, self._count, self._directory = backend, count, directory
        self._workers: list[tuple[Connection, SpawnProcess]] = []
        self._num_groups = 0

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What `function(device, *args)` returns, by rank; it is a module's own function."""
        if not self._workers:
            self._start()
        for pipe, _ in self._workers:
            pipe.send((function, args))
        waiting = {pipe: rank for rank, (pipe, _) in enumerate(self._workers)}
        answers: dict[int, Any] = {}
        while waiting:
            ready = wait(list(waiting), timeout=120)
            failures = [] if ready else [f"ranks {sorted(waiting.values())} hang"]
            for pipe in ready:
                rank = waiting.pop(pipe)  # type: ignore[arg-type]
                succeeded, answers[rank] = pipe.recv()  # type: ignore[union-attr]
                if not succeeded:
                    failures.append(f"rank {rank}:\n{answers[rank]}")
            if failures:  # others may wait for it for ever
                self.close()
                raise AssertionError("\n".join(failures))
        return [answers[rank] for rank in range(self._count)]

    def close(self) -> None:
        """End the workers."""
        for pipe, process in self._workers:
            process.kill()
            process.join()
            pipe.close()
        self._workers = []

    def _start(self) -> None:
        context = mp.get_context("spawn")
        rendezvous = self._directory / str(self._num_groups)
        self._num_groups += 1
        for rank in range(self._count):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_work, args=(theirs, self._backend, rank, self._count, rendezvous), daemon=True
            )
            process.start()
            theirs.close()
            self._workers.append((ours, process))


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
