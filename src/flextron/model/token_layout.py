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

_FEW = 64
"""Tokens up to which Python orders faster than PyTorch: those of a decode step."""


def _blocks(values: list[int], counts: list[int]) -> tuple[Block, ...]:
    """Ascending blocks, from the different widths, widest first, and the tokens of each."""
    reached = [(w, n) for w, n in zip(values, accumulate(counts), strict=True) if w][::-1]
    starts = [0, *(w for w, _ in reached[:-1])]
    return tuple(Block(n, start, w) for start, (w, n) in zip(starts, reached, strict=False))


@dataclass(frozen=True, slots=True)
class TokenLayout:
    """How tokens with given widths are ordered and cut into blocks."""

    blocks: tuple[Block, ...]
    """Ascending blocks; the k-th is used by a prefix of the ordered tokens. Empty if all widths are 0."""
    order_N: Tensor | None
    """The tokens, widest first; None if all widths are equal, which needs no ordering."""
    inverse_N: Tensor | None
    """Position of each token in that order."""

    @classmethod
    def of(cls, widths_N: Tensor) -> TokenLayout:
        """Order tokens by their widths and cut the nested dimension where widths change.

        The number of tokens of each width must be known to Python: on a GPU, this waits for it.

        Args:
            widths_N: int64, at least 0.
        """
        num_tokens = widths_N.shape[0]
        if num_tokens == 1:
            width = int(widths_N)
            return cls((Block(1, 0, width),) if width else (), None, None)
        if num_tokens <= _FEW:
            widths = widths_N.tolist()
            values = sorted(set(widths), reverse=True)
            blocks = _blocks(values, [widths.count(w) for w in values])
            if len(values) == 1:
                return cls(blocks, None, None)
            order_N = torch.tensor(sorted(range(num_tokens), key=widths.__getitem__, reverse=True))
            order_N = order_N.to(widths_N.device)
        else:
            ordered_N, order_N = widths_N.sort(descending=True, stable=True)
            values, counts = (t.tolist() for t in torch.unique_consecutive(ordered_N, return_counts=True))
            blocks = _blocks(values, counts)
            if len(values) == 1:
                return cls(blocks, None, None)
        return cls(blocks, order_N, order_N.argsort())

    def sort(self, x: Tensor) -> Tensor:
        """Rows of `x` (N, ...) from the batch's order to widest first."""
        return x if self.order_N is None else x.index_select(0, self.order_N)

    def unsort(self, y: Tensor) -> Tensor:
        """The inverse of `sort`."""
        return y if self.inverse_N is None else y.index_select(0, self.inverse_N)
