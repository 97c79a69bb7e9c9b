"""Examples side by side in one row of tokens, of which any chunk can be run.

Shapes: T tokens of all examples that are run.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from flextron.errors import FlextronError
from flextron.finetuning.example import Example
from flextron.model.config import DecoderConfig
from flextron.model.rope import Tables, rotary_tables

__all__ = ["Packed"]


class Packed:
    """Examples without their last tokens, which predict nothing; none sees another."""

    def __init__(
        self,
        config: DecoderConfig,
        examples: Sequence[Example],
        total_weight: float | None,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """Put them side by side.

        Args:
            config: the decoder's.
            examples: at least one.
            total_weight: what the weights are divided by; by default their sum.
            device: device of the tensors.
            dtype: type of what the decoder computes.

        Raises:
            FlextronError: see `Finetuning`.
        """
        for example in examples:
            if len(example.tokens) < 2 or len(example.tokens) != len(example.mask):
                raise FlextronError("an example needs at least two tokens, and one weight for each of them")
            config.check_length(len(example.tokens) - 1)
        tokens = [_tensor(e.tokens, torch.long) for e in examples]
        weights = [_tensor(e.mask, torch.float64)[1:] for e in examples]
        total = sum(float(w.sum()) for w in weights) if total_weight is None else total_weight
        if not total > 0:
            raise FlextronError("no token of the examples has a weight; nothing could be learned from them")
        self._config = config
        lengths = [len(t) - 1 for t in tokens]
        self._starts = tuple(accumulate(lengths, initial=0))
        self.tokens_T = torch.cat([t[:-1] for t in tokens]).to(device)
        """Token ids, int64."""
        self.targets_T = torch.cat([t[1:] for t in tokens]).to(device)
        """The token that each shall predict, int64."""
        self.weights_T = torch.cat(weights).to(device) / total
        """What each prediction counts, float64."""
        self.positions_T = torch.cat([torch.arange(n) for n in lengths]).to(device)
        """Position of each token in its example, int64."""
        self._ropes = rotary_tables(config, self.positions_T, dtype)

    def __len__(self) -> int:
        """T."""
        return len(self.tokens_T)

    def lengths(self, start: int, stop: int) -> tuple[int, ...]:
        """Tokens of each example in a chunk."""
        cuts = [start, *(s for s in self._starts if start < s < stop), stop]
        return tuple(b - a for a, b in pairwise(cuts))

    def rope(self, layer: int, start: int, stop: int) -> Tables | None:
        """Rotations of a chunk's tokens in a layer; see `rope.rotary_tables`."""
        tables = self._ropes[layer]
        return None if tables is None else (tables[0][start:stop], tables[1][start:stop])

    def seen(self, layer: int, start: int) -> slice:
        """The tokens before a chunk that its first token sees in a layer."""
        window = self._config.window_of(layer)
        first = self._starts[bisect_right(self._starts, start) - 1]
        return slice(first if window is None else max(first, start + 1 - window), start)


def _tensor(numbers: Sequence[float] | Tensor, dtype: torch.dtype) -> Tensor:
    return torch.as_tensor(numbers if isinstance(numbers, Tensor) else list(numbers), dtype=dtype)
