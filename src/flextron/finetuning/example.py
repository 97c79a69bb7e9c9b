"""A training text: what every part of finetuning, from the uploaded file to the packed row, passes on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

__all__ = ["Example"]


@dataclass(frozen=True, slots=True)
class Example:
    """One conversation, one prompt with its completion, or any other text."""

    tokens: Sequence[int] | Tensor
    """Token ids."""
    mask: Sequence[float] | Tensor
    """For each token what its prediction counts: 0 for those of a prompt, 1 for those that the model learns to say. The
    first one's is ignored."""
