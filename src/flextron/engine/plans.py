"""An iteration as numbers: what the first rank tells the others, which run the same tokens over their own pages.

Pages are told once. As long as a request runs in one iteration after the other, a plan names only the pages that came
since the last one; whoever was left out of a plan is told anew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from flextron.engine.pages import Page
from flextron.engine.request import Chunk, Network, Request
from flextron.generation.sampling import SamplingParams

__all__ = ["PlanReader", "PlanWriter"]

_FIELDS = 6
"""Numbers of a chunk: network, first position, tokens, its place in the last plan, pages known, new pages."""


class PlanWriter:
    """Writes plans; remembers what the last one has told."""

    def __init__(self) -> None:
        """Nothing is told yet."""
        self._told: dict[Request, tuple[int, list[Page]]] = {}

    def write(self, chunks: Sequence[Chunk], networks: Mapping[Network, int]) -> Tensor:
        """The plan of an iteration, (any number,), int32.

        Args:
            chunks: what runs; one a request.
            networks: number of each network.
        """
        numbers, tokens, blocks = [len(chunks)], list[int](), list[Tensor]()
        told: dict[Request, tuple[int, list[Page]]] = {}
        for i, chunk in enumerate(chunks):
            request = chunk.request
            place, known = self._told.get(request, (-1, []))
            # pages may have been given back and taken anew meanwhile
            if known != request.pages[: len(known)]:
                place, known = -1, []
            told[request] = i, list(request.pages)
            num_new = len(request.pages) - len(known)
            numbers += [networks[chunk.network], chunk.start, len(chunk.tokens), place, len(known), num_new]
            tokens += chunk.tokens
            blocks.append(request.block_table[len(known) : len(request.pages)].flatten())
        self._told = told
        return torch.cat([torch.tensor(numbers + tokens, dtype=torch.int32), *blocks])


class PlanReader:
    """Reads plans on the other ranks; keeps the block tables of the last one."""

    def __init__(self) -> None:
        """Nothing is known yet."""
        self._tables: list[Tensor] = []

    def read(self, plan: Tensor, networks: Mapping[int, Network], page_blocks: Mapping[int, int]) -> list[Chunk]:
        """The chunks of an iteration, after which nothing is wanted of this rank.

        Args:
            plan: what `PlanWriter.write` gave.
            networks: the rank's form of each network, by number.
            page_blocks: columns of their block tables.
        """
        (count,) = plan[:1].tolist()
        fields = plan[1 : 1 + count * _FIELDS].view(count, _FIELDS).tolist()
        at = 1 + count * _FIELDS
        next_blocks = at + sum(f[2] for f in fields)
        chunks, tables = [], []
        for number, start, num_tokens, place, num_known, num_new in fields:
            width = page_blocks[number]
            fresh = plan[next_blocks : next_blocks + num_new * width].view(num_new, width)
            table = fresh if place < 0 else self._tables[place]
            if place >= 0 and num_new:
                table = torch.cat([table[:num_known], fresh])
            request = Request("", [], 0, networks[number], SamplingParams(), block_table=table)
            tokens = plan[at : at + num_tokens].tolist()
            chunks.append(Chunk(request, start, tokens, networks[number], num_logits=0))
            tables.append(table)
            at, next_blocks = at + num_tokens, next_blocks + num_new * width
        self._tables = tables
        return chunks
