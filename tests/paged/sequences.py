"""Sequences over a paged cache, a reference for them, and an executor that sees what a CUDA graph would be given."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flextron.model.adapter import Adapter
from flextron.model.batch import Batch
from flextron.model.decoder import Decoder
from flextron.paged import PagedStep, Span
from flextron.spec import SubnetSpec

PAGE = 4
NUM_BLOCKS = 1500


@dataclass(eq=False)
class Live:
    """Tokens with pages of their own, in a sub-network."""

    tokens: list[int]
    spec: SubnetSpec
    table: Tensor
    adapter: Adapter | None = None
    done: int = 0
    num_blocks: int = 0
    offsets: tuple[int, ...] = ()

    def span(self, length: int) -> Span:
        """The next tokens."""
        tokens = self.tokens[self.done : self.done + length]
        return Span(tokens, self.done, self.table, self.num_blocks, self.offsets, self.spec, None, self.adapter)


@dataclass
class Blocks:
    """Gives blocks in a random order."""

    decoder: Decoder
    rng: random.Random
    free: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.free = list(range(NUM_BLOCKS))
        self.rng.shuffle(self.free)

    def sequence(self, tokens: list[int], spec: SubnetSpec, adapter: Adapter | None = None) -> Live:
        """A sequence with pages for all its tokens; the rows beyond them hold what would be an error to read."""
        config = self.decoder.config
        *offsets, row = accumulate((config.kv_rows(w.num_groups) // config.head_dim for w in spec.layers), initial=0)
        pages = -(-len(tokens) // PAGE)
        table = torch.full((pages + 2, row + 1), 10**6, dtype=torch.int32)
        table[:pages, :row] = torch.tensor([[self.free.pop() for _ in range(row)] for _ in range(pages)]).view(-1, row)
        return Live(tokens, spec, table, adapter, 0, row, tuple(offsets))

    def release(self, sequence: Live) -> None:
        """Take its blocks back."""
        pages = -(-len(sequence.tokens) // PAGE)
        self.free += sequence.table[:pages, : sequence.num_blocks].flatten().tolist()
        self.rng.shuffle(self.free)


@torch.no_grad()
def reference(decoder: Decoder, sequence: Live, length: int) -> Tensor:
    """Hidden states of the next tokens, from the whole sequence without a cache."""
    tokens = torch.tensor(sequence.tokens[: sequence.done + length])
    batch = Batch.ragged([tokens], [sequence.spec], adapters=[sequence.adapter])
    hidden: Tensor = decoder(batch)
    return hidden[-length:]


def run(step: PagedStep, sequences: Sequence[Live], lengths: Sequence[int]) -> list[Tensor]:
    """Compute the next tokens of each; their hidden states."""
    spans = [s.span(n) for s, n in zip(sequences, lengths, strict=True)]
    out = step.run(spans, range(sum(lengths))).hidden_RD.split(list(lengths))
    return list(out)


class Recorder(TorchDispatchMode):
    """Writes down what a device would be asked to do, so that two runs can be compared call by call.

    What a run makes itself is named by its place in it; all else by where it lies in memory.
    """

    WAITS = ("_local_scalar_dense", "nonzero", "unique", "masked_select", "equal")

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device, self.calls = device, list[Any]()
        self._made: dict[int, int] = {}
        self._held: list[Any] = []
        """Kept, so that no address is given out twice."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        assert name not in self.WAITS, f"{name} waits for the device"
        given = tree_leaves((args, kwargs or {}))
        tensors = [t for t in given if isinstance(t, Tensor)]
        assert all(t.device == self.device or t.dim() == 0 for t in tensors), f"{name} reads another device's memory"
        self.calls.append((str(func), [self._named(x) for x in given]))
        self._held.append(out)
        for t in tree_leaves(out):
            if isinstance(t, Tensor):
                key = self._key(t)
                if key not in {self._key(own) for own in tensors}:
                    self._made.setdefault(key, len(self._made))
        return out

    @staticmethod
    def _key(tensor: Tensor) -> int:
        return tensor.untyped_storage()._cdata

    def _named(self, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        key = self._key(x)
        where: Any = ("made", self._made[key]) if key in self._made else ("given", key, x.untyped_storage().data_ptr())
        return where, x.storage_offset(), tuple(x.shape), x.stride(), x.dtype


@dataclass
class Replays:
    """An executor that runs a function again and asserts that a graph of its first run would have done the same."""

    device: str = "cpu"
    num_captured: int = 0
    num_replayed: int = 0

    def __call__(self, function: Callable[[], Tensor]) -> Callable[[], Tensor]:
        self.num_captured += 1
        captured, _ = self._recorded(function)

        def replay() -> Tensor:
            self.num_replayed += 1
            again, out = self._recorded(function)
            assert len(again.calls) == len(captured.calls) > 10
            for now, before in zip(again.calls, captured.calls, strict=True):
                assert now == before
            return out

        return replay

    def _recorded(self, function: Callable[[], Tensor]) -> tuple[Recorder, Tensor]:
        with Recorder(torch.device(self.device)) as recorder:
            out = function()
        return recorder, out
