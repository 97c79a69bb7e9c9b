"""One vector for a whole text: the mean of its tokens' final hidden states, or that of its last token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

__all__ = ["Pooled", "Pooling"]

Pooling = Literal["mean", "last"]
"""How hidden states become one."""


@dataclass(eq=False, slots=True)
class Pooled:
    """The vector of one request, as far as it is computed."""

    kind: Pooling
    scale: float
    """What the final norm multiplies the family's hidden states with, for the sake of the logits."""
    num_done: int = 0
    """Leading tokens whose hidden states are taken in."""
    total_D: Tensor | None = None
    """Their sum, or the last one's."""

    @property
    def needs_all(self) -> bool:
        """Whether tokens whose keys and values are in the cache must be computed all the same."""
        return self.kind == "mean"

    def num_wanted(self, num_new: int, *, is_last: bool) -> int:
        """After how many of a chunk's tokens, counted from the last, hidden states are wanted."""
        return num_new if self.kind == "mean" else int(is_last)

    def add(self, start: int, hidden_TD: Tensor) -> None:
        """Take in hidden states of the tokens from `start` on."""
        # a request that starts over comes by tokens that it has taken in
        fresh = hidden_TD[max(0, self.num_done - start) :] if self.kind == "mean" else hidden_TD[-1:]
        if not len(fresh):
            return
        # thousands of tokens add up without a loss of digits
        own_D = fresh.sum(0, dtype=torch.float64)
        self.total_D = own_D if self.total_D is None or self.kind == "last" else self.total_D + own_D
        self.num_done = start + len(hidden_TD)

    @property
    def vector(self) -> Tensor:
        """The vector, (hidden size), float32, on the CPU; of a prompt that is computed."""
        assert self.total_D is not None, "no token was computed"
        return (self.total_D / (self.scale * (self.num_done if self.kind == "mean" else 1))).float().cpu()
