"""Sequences that begin alike, side by side: what they share runs once, and each goes on from there by itself.

The answers of a multiple-choice question share the question, and the questions of a subject share their examples. A
*branch* attends to all of its *stem* and to its own tokens; sequences without a stem are stems themselves, or alone.

Shapes: N new tokens of all sequences, H query heads, K KV heads, d head size.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flextron.model.attention import sdpa, window_mask
from flextron.model.config import DecoderConfig

__all__ = ["BranchedAttention", "Forest", "common_length"]


def common_length(a: Sequence[int], b: Sequence[int]) -> int:
    """Tokens with which both begin."""
    shorter = min(len(a), len(b))
    return next((i for i in range(shorter) if a[i] != b[i]), shorter)


@dataclass(frozen=True)
class Forest:
    """Sequences, cut into stems and branches."""

    parts: tuple[tuple[int, ...], ...]
    """Token ids of each stem and branch, in the order in which they run; none is empty."""
    stems: tuple[int | None, ...]
    """The part from which each goes on, an earlier one; None for those that begin at position 0."""
    rows: tuple[tuple[range, range], ...]
    """Where the tokens of each sequence lie among all parts: first the stem's, then its own."""

    @classmethod
    def of(cls, sequences: Sequence[tuple[int, ...]]) -> Forest:
        """Cut sequences; neighbours share a stem where that saves tokens, so it is best to sort them.

        Args:
            sequences: token ids, none empty and no two equal.
        """
        parts: list[tuple[int, ...]] = []
        stems: list[int | None] = []
        rows: list[tuple[range, range]] = []
        end = 0

        def add(part: tuple[int, ...], stem: int | None) -> range:
            nonlocal end
            if not part:
                return range(end, end)
            parts.append(part)
            stems.append(stem)
            end += len(part)
            return range(end - len(part), end)

        for members, shared in _groups(sequences):
            stem = len(parts) if shared else None
            first = add(members[0][:shared], None)
            rows += [(first, add(sequence[shared:], stem)) for sequence in members]
        return cls(tuple(parts), tuple(stems), tuple(rows))

    @property
    def starts(self) -> list[int]:
        """Position of each part's first token."""
        return [0 if stem is None else len(self.parts[stem]) for stem in self.stems]

    def last_rows(self, sequence: int, count: int) -> list[int]:
        """Rows of a sequence's last tokens."""
        stem, own = self.rows[sequence]
        return [*stem, *own][len(stem) + len(own) - count :]


def _groups(sequences: Sequence[tuple[int, ...]]) -> list[tuple[Sequence[tuple[int, ...]], int]]:
    """Runs of neighbours, and how many tokens all of one share, such that the fewest tokens are left to run."""
    neighbours = [common_length(a, b) for a, b in itertools.pairwise(sequences)]
    # of the first `end` sequences: tokens saved, where the last run begins, what it shares
    best: list[tuple[int, int, int]] = [(0, 0, 0)]
    for end in range(1, len(sequences) + 1):
        found = (best[end - 1][0], end - 1, 0)
        shared = len(sequences[end - 1])
        for start in range(end - 2, -1, -1):
            shared = min(shared, neighbours[start])
            saved = best[start][0] + shared * (end - start - 1)
            if saved > found[0]:
                found = (saved, start, shared)
        best.append(found)
    groups, end = [], len(sequences)
    while end:
        _, start, shared = best[end]
        groups.append((sequences[start:end], shared))
        end = start
    return groups[::-1]


class BranchedAttention:
    """The `Attention` of a forest's parts, run as one segment."""

    def __init__(self, config: DecoderConfig, forest: Forest) -> None:
        """Take windows and cap from the config."""
        self._config, self._stems = config, forest.stems
        self._masks: dict[tuple[int, int, int | None], Tensor] = {}

    def __call__(
        self, layer: int, segment: int, q_NHd: Tensor, k_NKd: Tensor, v_NKd: Tensor, lengths: Sequence[int]
    ) -> Tensor:
        """See `Attention`."""
        queries, keys, values = (t.split(list(lengths)) for t in (q_NHd, k_NKd, v_NKd))
        out = []
        for i, stem in enumerate(self._stems):
            k, v = keys[i], values[i]
            if stem is not None:
                k, v = torch.cat([keys[stem], k]), torch.cat([values[stem], v])
            out.append(self._attend(layer, queries[i], k, v))
        return torch.cat(out)

    def _attend(self, layer: int, q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor) -> Tensor:
        """Queries are those of the last positions."""
        q, k, v = (t.transpose(0, 1)[None] for t in (q_THd, k_TKd, v_TKd))
        num_new, end, window = len(q_THd), len(k_TKd), self._config.window_of(layer)
        if num_new == end and (window is None or end <= window):
            out = sdpa(q, k, v, causal=True, cap=self._config.attention_cap)
        else:
            out = sdpa(q, k, v, mask=self._mask(num_new, end, window, q.device), cap=self._config.attention_cap)
        return out[0].transpose(0, 1)

    def _mask(self, num_new: int, end: int, window: int | None, device: torch.device) -> Tensor:
        key = num_new, end, window
        if key not in self._masks:
            positions = torch.arange(end, device=device)
            self._masks[key] = window_mask(positions[end - num_new :], positions, window)
        return self._masks[key]
