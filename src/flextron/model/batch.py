"""What a decoder runs on: tokens of many sequences side by side, in segments that each have their own sub-network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from flextron.model.nested import Layout
from flextron.spec import SubnetSpec

__all__ = ["Batch", "Segment"]


@dataclass(frozen=True)
class Segment:
    """Sequences that run in the same sub-network, one after the other."""

    spec: SubnetSpec
    lengths: tuple[int, ...]
    """New tokens of each sequence."""
    gates_L2: Tensor | None = None
    """Factors of each layer's attention and MLP outputs, (layers, 2), through which routers get gradients."""

    @cached_property
    def num_tokens(self) -> int:
        """Tokens of all its sequences."""
        return sum(self.lengths)


@dataclass(frozen=True)
class Batch:
    """A ragged batch of N tokens. Build one with `padded` or `ragged`."""

    tokens_N: Tensor
    """Token ids, int64, sequence after sequence."""
    positions_N: Tensor
    """Position of each token in its sequence, int64."""
    segments: tuple[Segment, ...]

    @classmethod
    def padded(cls, tokens_BT: Tensor, spec: SubnetSpec) -> Batch:
        """B sequences of T tokens from position 0; causality makes padding on the right harmless."""
        num_sequences, length = tokens_BT.shape
        positions = torch.arange(length, device=tokens_BT.device).repeat(num_sequences)
        return cls(tokens_BT.flatten(), positions, (Segment(spec, (length,) * num_sequences),))

    @classmethod
    def ragged(
        cls, sequences: Sequence[Tensor], specs: Sequence[SubnetSpec], starts: Sequence[int] | None = None
    ) -> Batch:
        """Sequences of any lengths, each with its spec; neighbours of equal spec share a segment.

        Args:
            sequences: token ids, 1-D.
            specs: the sub-network of each sequence.
            starts: position of each sequence's first token; 0 by default.
        """
        groups: list[tuple[SubnetSpec, list[int]]] = []
        for tokens, spec in zip(sequences, specs, strict=True):
            if not groups or groups[-1][0] != spec:
                groups.append((spec, []))
            groups[-1][1].append(len(tokens))
        offsets = starts or [0] * len(sequences)
        positions = [torch.arange(a, a + len(t), device=t.device) for t, a in zip(sequences, offsets, strict=True)]
        segments = tuple(Segment(spec, tuple(lengths)) for spec, lengths in groups)
        return cls(torch.cat(list(sequences)), torch.cat(positions), segments)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Tokens of each segment."""
        return tuple(s.num_tokens for s in self.segments)

    def gated(self, y_ND: Tensor, layer: int, half: int) -> Tensor:
        """What half a layer adds (0 attention, 1 MLP), times the gates of the segments that have them."""
        if all(s.gates_L2 is None for s in self.segments):
            return y_ND
        parts = y_ND.split(self.sizes)
        return torch.cat(
            [
                y if s.gates_L2 is None else y * s.gates_L2[layer, half]
                for s, y in zip(self.segments, parts, strict=True)
            ]
        )

    def layout(self, widths: Sequence[int]) -> Layout:
        """Nested layout of the tokens for these widths, one a segment."""
        return Layout.of(self.sizes, tuple(widths))
