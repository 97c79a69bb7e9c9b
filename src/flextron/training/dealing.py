"""Which process runs which sequences in which sub-networks: the same optimizer step, however many share it.

A step's sequences fall into micro batches of the recipe, each with sub-networks of its own. That, and the tokens whose
vocabulary losses are computed, depend on the seed and the step alone. The processes then share out whole sequences: as
many micro batches as there are processes are run at once, and of each sub-network every process has as many sequences
as the others, or one more. So all run the same sub-networks at the same time, and wait little for each other.

Shapes: B sequences, T tokens of each, N tokens in all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Protocol

import torch
from torch import Tensor, nn

from flextron.errors import FlextronError
from flextron.model.adapter import Adapter
from flextron.model.batch import Batch, Segment
from flextron.parallel.processes import Processes
from flextron.spec import SubnetSpec
from flextron.texts.blocks import TokenBlocks
from flextron.training.objective import Totals
from flextron.training.recipe import TrainRecipe
from flextron.training.sampling import SubnetSampler

__all__ = ["Dealer", "RoutedDraw", "RouterSampler", "Work"]


@dataclass(frozen=True, kw_only=True)
class RoutedDraw:
    """Sub-networks that a router drew."""

    specs: list[SubnetSpec]
    gates: list[Tensor | None]
    """See `Segment.gates_L2`; None where the router had no part."""
    loss: Tensor
    """Added to the model's."""


class RouterSampler(Protocol):
    """Draws sub-networks with a router that trains along with the model."""

    @property
    def router(self) -> nn.Module:
        """Whose parameters are trained."""

    def draw(self, step: int, micro_step: int, count: int) -> RoutedDraw:
        """The sub-networks of one micro batch; a function of the seed, the step and the router's weights."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one process runs at once."""

    tokens_BT: Tensor
    """Its sequences, each once, as the teacher reads them."""
    repeats: int
    """How often the batch holds them, one round after the other."""
    batch: Batch
    rows: Tensor
    """Tokens of the batch whose vocabulary losses are computed."""
    totals: Totals
    """What the losses of the whole step, over all processes, are divided by."""
    specs: list[SubnetSpec]
    """Sub-networks that any of the processes runs now."""
    routing_loss: Tensor | None
    """What routers add to this step's loss, once for all processes."""


@dataclass(frozen=True, slots=True)
class _Row:
    """A sequence in one of its sub-networks."""

    draw: int
    """Index of the sub-network among those of the micro batch."""
    micro_batch: int
    position: int
    """Index of the sequence in the micro batch."""


@dataclass(frozen=True, kw_only=True)
class Dealer:
    """Deals a step's sequences to sub-networks and processes."""

    recipe: TrainRecipe
    blocks: TokenBlocks
    processes: Processes
    sampler: SubnetSampler
    routing: RouterSampler | None = None
    adapter: Adapter | None = None
    """Runs beside all sequences."""

    @property
    def _micro(self) -> int:
        """Sequences of a micro batch."""
        return micro_batch(self.recipe)

    @property
    def _count(self) -> int:
        """Sub-networks of a micro batch."""
        recipe = self.recipe
        return min(recipe.subnets_per_batch, self._micro * (recipe.subnets_per_batch if recipe.sandwich else 1))

    @property
    def num_works(self) -> int:
        """Pieces of work in which a process does its share of a step."""
        share = self.recipe.batch_size // self.processes.size
        return share // min(self._micro, share)

    def works(self, step: int) -> Iterator[Work]:
        """This process's share of a step, piece by piece."""
        num_micro = self.recipe.batch_size // self._micro
        tokens_GBT = self.blocks.batch(step, self.recipe.batch_size).unflatten(0, (num_micro, self._micro))
        chosen = [self._chosen(step, g) for g in range(num_micro)]
        totals = Totals(
            tokens=len(chosen) * chosen[0].numel(),
            rows=sum(int(c.sum()) for c in chosen),
            targets=max(1, sum(int(c[:, :-1].sum()) for c in chosen)),
        )
        at_once = num_micro // self.num_works
        for first in range(0, num_micro, at_once):
            yield self._work(step, range(first, first + at_once), tokens_GBT, chosen, totals)

    def _work(self, step: int, group: range, tokens_GBT: Tensor, chosen: list[Tensor], totals: Totals) -> Work:
        drawn = {g: self._draw(step, g) for g in group}
        rows = self._own_rows(group)
        device = self.processes.device
        tokens_NT = torch.stack([tokens_GBT[r.micro_batch, r.position] for r in rows]).to(device)
        repeats = self._count if self.recipe.sandwich else 1
        wanted_NT = torch.stack([chosen[r.micro_batch][self._index(r)] for r in rows])
        losses = [d.loss for d in drawn.values() if isinstance(d, RoutedDraw)]
        return Work(
            tokens_BT=tokens_NT[: len(rows) // repeats],
            repeats=repeats,
            batch=replace(
                Batch.padded(tokens_NT, self.sampler.space.full),
                segments=self._segments(rows, drawn, tokens_NT.shape[1]),
            ),
            rows=wanted_NT.flatten().nonzero().flatten().to(device),
            totals=totals,
            specs=[spec for d in drawn.values() for spec in _specs(d)],
            routing_loss=torch.stack(losses).sum() / len(chosen) if losses else None,
        )

    def _segments(
        self, rows: list[_Row], drawn: dict[int, RoutedDraw | list[SubnetSpec]], length: int
    ) -> tuple[Segment, ...]:
        """Neighbouring rows of the same sub-network."""
        out = []
        for (draw, g), own in groupby(rows, lambda r: (r.draw, r.micro_batch)):
            found = drawn[g]
            gates = found.gates[draw] if isinstance(found, RoutedDraw) else None
            out.append(Segment(_specs(found)[draw], (length,) * len(list(own)), gates, None, self.adapter))
        return tuple(out)

    def _draw(self, step: int, g: int) -> RoutedDraw | list[SubnetSpec]:
        """Sub-networks of micro batch `g`."""
        if self.routing is not None:
            return self.routing.draw(step, g, self._count)
        return self.sampler.draw(step, g, self._count)

    def _own_rows(self, group: range) -> list[_Row]:
        """This process's rows of some micro batches, sorted by sub-network."""
        rank, size = self.processes.rank, self.processes.size
        if self.recipe.sandwich:
            own = [(g, p) for g in group for p in range(self._micro)][rank::size]
            return [_Row(j, g, p) for j in range(self._count) for g, p in own]
        parts = [part.tolist() for part in torch.arange(self._micro).tensor_split(self._count)]
        return [_Row(j, g, p) for j, part in enumerate(parts) for g in group for p in part][rank::size]

    def _index(self, row: _Row) -> int:
        """Place of a row in `_chosen`."""
        return row.position + (row.draw * self._micro if self.recipe.sandwich else 0)

    def _chosen(self, step: int, g: int) -> Tensor:
        """Whether the vocabulary losses of each token of a micro batch are computed; (rows, T)."""
        num_rows = self._micro * (self._count if self.recipe.sandwich else 1)
        num_tokens = num_rows * self.blocks.context
        count = max(1, round(self.recipe.kl_fraction * num_tokens))
        seed = hash((self.recipe.seed, step, g, 0)) % 2**63
        order = torch.randperm(num_tokens, generator=torch.Generator().manual_seed(seed))
        chosen = torch.zeros(num_tokens, dtype=torch.bool)
        chosen[order[:count]] = True
        return chosen.view(num_rows, self.blocks.context)


def micro_batch(recipe: TrainRecipe) -> int:
    """Sequences that share drawn sub-networks."""
    return min(recipe.micro_batch_size, recipe.batch_size)


def check_division(recipe: TrainRecipe, num_processes: int) -> None:
    """Raise unless the batch can be dealt.

    Raises:
        FlextronError: it cannot; names the numbers.
    """
    share, rest = divmod(recipe.batch_size, num_processes)
    micro = micro_batch(recipe)
    if rest or recipe.batch_size % micro or share % min(micro, share):
        raise FlextronError(
            f"batch_size {recipe.batch_size} must divide evenly among {num_processes} processes and then into micro "
            f"batches of {recipe.micro_batch_size}"
        )


def _specs(drawn: RoutedDraw | Sequence[SubnetSpec]) -> list[SubnetSpec]:
    return drawn.specs if isinstance(drawn, RoutedDraw) else list(drawn)
