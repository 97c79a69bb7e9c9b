"""The nested layout of single tokens: each may have a width of its own, chosen by a router (Flextron, section 3.3).

It does for tokens what `nested.Layout` does for segments, and feeds the same `expand` and `contract`: tokens are
ordered by width once a layer, and the nested dimension is cut where widths change. There are as many blocks as
different widths, so few as long as a router has few choices.

Shapes: N tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from flextron.model.nested import Block

__all__ = ["TokenLayout"]


@dataclass(frozen=True, slots=True)
class TokenLayout:
    """How tokens with given widths are ordered and cut into blocks."""

    blocks: tuple[Block, ...]
    """Ascending blocks; the k-th is used by a prefix of the ordered tokens. Empty if all widths are 0."""
    order_N: Tensor | None
    """The tokens, widest first; None if all widths are equal, which needs no ordering."""
    inverse_N: Tensor | None
    """Where each token stands in that order."""

    @classmethod
    def of(cls, widths_N: Tensor) -> TokenLayout:
        """Order tokens by their widths and cut the nested dimension where widths change.

        The number of tokens of each width must be known to Python: on a GPU, this waits for it.

        Args:
            widths_N: int64, at least 0.
        """
        if widths_N.shape[0] == 1:
            width = int(widths_N)
            return cls((Block(1, 0, width),) if width else (), None, None)
        ordered_N, order_N = widths_N.sort(descending=True, stable=True)
        values, counts = (t.tolist() for t in torch.unique_consecutive(ordered_N, return_counts=True))
        reached = [(w, n) for w, n in zip(values, accumulate(counts), strict=True) if w][::-1]
        starts = [0, *(w for w, _ in reached[:-1])]
        blocks = tuple(Block(n, start, w) for start, (w, n) in zip(starts, reached, strict=False))
        if len(values) == 1:
            return cls(blocks, None, None)
        inverse_N = torch.empty_like(order_N)
        inverse_N[order_N] = torch.arange(len(order_N), device=order_N.device)
        return cls(blocks, order_N, inverse_N)

    def sort(self, x: Tensor) -> Tensor:
        """Rows of `x` (N, ...) from the batch's order to widest first."""
        return x if self.order_N is None else x.index_select(0, self.order_N)

    def unsort(self, y: Tensor) -> Tensor:
        """The inverse of `sort`."""
        return y if self.inverse_N is None else y.index_select(0, self.inverse_N)
