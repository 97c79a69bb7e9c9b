"""The order in which a pass is cut into units: which layer is next, and which of its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

__all__ = ["Stage", "Units"]


class Stage(str, Enum):
    """Kinds of units, in their order."""

    FORWARD = "forward"
    """A layer for a chunk of tokens."""
    HEAD = "head"
    """The head and the loss, both ways, for a chunk of the tokens that have a weight."""
    BACKWARD = "backward"
    """A layer's gradients for a chunk of tokens."""


class Units:
    """Units of one pass: layers upwards from the first tokens, the head, layers downwards from the last tokens."""

    def __init__(self, layers: Sequence[int], trained: Sequence[int], num_tokens: int, num_weighted: int) -> None:
        """Begin with the lowest layer.

        Args:
            layers: those of the forward pass, the lowest first.
            trained: those of the backward pass, the lowest first; none if the pass ends after the head.
            num_tokens: tokens of each layer.
            num_weighted: tokens of the head.
        """
        self._trained, self._num_tokens, self._num_weighted = trained, num_tokens, num_weighted
        self._pending = list(reversed(layers))
        """Layers of the stage that are not complete, the next one last."""
        self._num_done = 0
        """Tokens of that layer, or of the head's, that have had their turn."""
        self.stage: Stage | None = Stage.FORWARD
        """Stage of the next unit; None once there is none."""

    @property
    def layer(self) -> int:
        """Layer of the next unit, which must not be the head's."""
        return self._pending[-1]

    @property
    def layer_after(self) -> int | None:
        """Layer that follows in this stage, if there is one."""
        return self._pending[-2] if len(self._pending) > 1 else None

    @property
    def num_left(self) -> int:
        """Tokens of this stage whose turn is still to come, summed over its layers."""
        if self.stage in (None, Stage.HEAD):
            return self.num_left_of_layer
        return len(self._pending) * self._num_tokens - self._num_done

    @property
    def num_left_of_layer(self) -> int:
        """Tokens of the next unit's layer, or of the head, whose turn is still to come."""
        return 0 if self.stage is None else self._size - self._num_done

    def next(self, num_tokens: int) -> tuple[int, int]:
        """The next unit's first token and the one behind its last, for a unit of at most `num_tokens`."""
        count = min(num_tokens, self.num_left_of_layer)
        start = self._size - self._num_done - count if self.stage is Stage.BACKWARD else self._num_done
        return start, start + count

    def complete(self, num_tokens: int) -> bool:
        """Go on behind a unit of so many tokens; whether it was the last one of its layer, or of the head."""
        self._num_done += num_tokens
        if self._num_done < self._size:
            return False
        self._num_done = 0
        if self.stage is Stage.HEAD:
            self.stage = Stage.BACKWARD if self._trained else None
            self._pending = list(self._trained)
            return True
        self._pending.pop()
        if not self._pending:
            self.stage = Stage.HEAD if self.stage is Stage.FORWARD else None
        return True

    @property
    def _size(self) -> int:
        """Tokens of the layer, or of the head."""
        return self._num_weighted if self.stage is Stage.HEAD else self._num_tokens
