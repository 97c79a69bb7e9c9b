"""The processes that train one model together, as `torchrun` or `accelerate launch` started them; usually just one.

All of them make the same calls in the same order. The first alone measures, writes small files and talks; what it
found out goes to the others as JSON.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from torch import Tensor
from torch import distributed as dist

from flextron.errors import FlextronError
from flextron.parallel.launcher import is_first_launched, num_launched

__all__ = [
    "LostProcessError",
    "Processes",
    "is_loss",
    "leave",
    "may_speak",
]

T = TypeVar("T")

_LOST = re.compile(
    r"gloo/|nccl|Connection (closed|reset|refused)|Broken pipe|heartbeat|Socket (closed|Timeout)|peer", re.IGNORECASE
)
"""What the libraries of collectives say when another process is gone; most of it comes as a plain `RuntimeError`."""
_PATIENCE = timedelta(hours=3)
"""How long the others wait for what the first alone does (tokenizing, measuring), and for a process that hangs."""


class LostProcessError(FlextronError):
    """Another process of the run is gone; the state that was saved last is what there is to go on from."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Processes:
    """The processes of a run, seen by one of them."""

    rank: int = 0
    """Number of this process, from 0."""
    size: int = 1
    """Processes in all."""
    device: torch.device
    """Where this process computes."""

    @classmethod
    def join(cls) -> Processes:
        """Meet the other processes, if a launcher started several; a second call gives the same."""
        if dist.is_available() and not dist.is_initialized() and num_launched() > 1:
            PartialState(cpu=not torch.accelerator.is_available(), timeout=_PATIENCE)
        device = PartialState().device
        if dist.is_available() and dist.is_initialized():
            return cls(rank=dist.get_rank(), size=dist.get_world_size(), device=device)
        return cls(device=device)

    @property
    def is_first(self) -> bool:
        """Whether this one writes and talks."""
        return self.rank == 0

    @property
    def are_several(self) -> bool:
        """Whether there are others."""
        return self.size > 1

    def summed(self, values: Tensor) -> Tensor:
        """The sum over all processes, on each; `values` itself is kept."""
        if not self.are_several:
            return values
        total = values.to(self.device, copy=True)
        dist.all_reduce(total)
        return total.to(values.device)

    def from_first(self, make: Callable[[], Any]) -> Any:
        """What the first process makes, on all: anything that JSON can say. The others wait meanwhile.

        Raises:
            FlextronError: the first raised one; all raise the same.
        """
        if not self.are_several:
            return make()
        message: dict[str, Any] = {}
        if self.is_first:
            try:
                message = {"made": make()}
            except FlextronError as error:
                message = {"error": str(error)}
        data = torch.frombuffer(bytearray(json.dumps(message).encode()), dtype=torch.uint8)
        size = int(self._broadcast(torch.tensor([len(data)])))
        received = self._broadcast(data if self.is_first else torch.empty(size, dtype=torch.uint8))
        message = json.loads(received.numpy().tobytes())
        if "error" in message:
            raise FlextronError(message["error"])
        return message["made"]

    def shared(self, make: Callable[[], T], to_json: Callable[[T], Any], from_json: Callable[[Any], T]) -> T:
        """What the first process makes, on all, by way of JSON; alone it is not written down."""
        if not self.are_several:
            return make()
        return from_json(self.from_first(lambda: to_json(make())))

    def tensor_from_first(self, make: Callable[[], Tensor]) -> Tensor:
        """A float32 tensor that the first process computes, on all, where this one computes."""
        if not self.are_several:
            return make()
        made: Tensor | None = None

        def shape() -> list[int]:
            nonlocal made
            made = make()
            return list(made.shape)

        sizes = self.from_first(shape)
        held = torch.empty(sizes) if made is None else made.float().contiguous()
        held = held.to(self.device)
        dist.broadcast(held, 0)
        return held

    def _broadcast(self, values: Tensor) -> Tensor:
        held = values.to(self.device)
        dist.broadcast(held, 0)
        return held.cpu()

    def wait(self) -> None:
        """Until all processes are here."""
        self.summed(torch.zeros(1))


def is_loss(error: BaseException) -> bool:
    """Whether an error says that another process is gone."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and _LOST.search(str(error)) is not None
    )


def may_speak() -> bool:
    """Whether this process is the one that tells the user of an error: of several that meet one, the first to ask."""
    if not (dist.is_available() and dist.is_initialized()):
        return is_first_launched()
    try:
        # lives in the launcher, and so outlives any of the processes
        store = dist.distributed_c10d._get_default_store()
        return int(store.add("flextron/errors", 1)) == 1
    except (RuntimeError, dist.DistError):
        return dist.get_rank() == 0


def leave() -> None:
    """Part from the other processes when all are done; alone, nothing happens."""
    if num_launched() > 1 and dist.is_initialized():
        Processes.join().wait()
        dist.destroy_process_group()
