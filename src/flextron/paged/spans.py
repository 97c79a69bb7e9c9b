"""What an iteration runs, as numbers: its form, which is known beforehand, and one array that fills the form.

All that the device must know of an iteration (tokens, positions, where keys and values go, block tables, rows that are
wanted) lies in one array of whole numbers, so that it gets there by one copy. The form says how the array is cut: equal
forms have equal shapes throughout, which is what a CUDA graph needs.

The tokens of a segment are cut into groups of equally long spans: all that decode are one group, and so are those that
verify as many drafted tokens; chunks of prompts are groups of their own. Attention runs once for each group.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from flextron.model.adapter import Adapter
from flextron.model.batch import Segment, TokenChoice
from flextron.model.config import DecoderConfig
from flextron.spec import SubnetSpec

__all__ = ["Form", "Group", "Span", "arrange", "fresh_blocks", "pack", "padded", "size_bucket"]

_MOST_WASTE = 2
"""Pages that a group gathers over those that its spans have, from which on it is cut."""


@dataclass(frozen=True, eq=False, slots=True)
class Span:
    """Consecutive tokens of a sequence that an iteration computes, and what they run in."""

    tokens: Sequence[int]
    start: int
    """Position of the first; all before it are in the cache."""
    block_table: Tensor
    """Blocks of the sequence's pages, (pages, at least `num_blocks`), int32, on the CPU."""
    num_blocks: int
    """Blocks of a page."""
    block_offsets: tuple[int, ...]
    """First block of each layer in a page."""
    spec: SubnetSpec
    router: TokenChoice | None = None
    adapter: Adapter | None = None

    def num_pages(self, page_size: int) -> int:
        """Pages that hold its tokens and all before them."""
        return -(-(self.start + len(self.tokens)) // page_size)


@dataclass(frozen=True, slots=True)
class Group:
    """Spans of one segment that attend together."""

    size: int
    """Spans, padding included."""
    length: int
    """Tokens of each."""
    pages: int
    """Pages of each, padding included."""
    num_blocks: int
    block_offsets: tuple[int, ...]
    is_whole: bool
    """Whether the spans are prompts from their beginning, which need nothing from the cache."""

    @property
    def num_tokens(self) -> int:
        """Tokens of all its spans."""
        return self.size * self.length

    @property
    def num_rows(self) -> int:
        """Rows of its block tables, laid below each other; the last one is for tokens that are padding."""
        return self.size * self.pages + 1


@dataclass(frozen=True, slots=True)
class Form:
    """Shapes of an iteration."""

    segments: tuple[Segment, ...]
    groups: tuple[tuple[Group, ...], ...]
    """Groups of each segment."""
    num_wanted: int
    """Rows of hidden states that can be asked for."""

    @property
    def num_tokens(self) -> int:
        """Tokens, padding included."""
        return sum(segment.num_tokens for segment in self.segments)

    @property
    def sizes(self) -> list[int]:
        """Lengths of the parts of the array: tokens, positions, wanted rows; each group's rows and block tables."""
        groups = [(g.num_tokens, g.num_rows * g.num_blocks) for own in self.groups for g in own]
        return [self.num_tokens, self.num_tokens, self.num_wanted, *(n for pair in groups for n in pair)]


def _segments(spans: Sequence[Span]) -> Iterator[list[int]]:
    """Neighbours that run in the same network, by index."""
    own: list[int] = []
    for i, span in enumerate(spans):
        last = spans[own[-1]] if own else span
        same_spec = span.spec is last.spec or span.spec == last.spec  # the first is the usual case, and costs nothing
        if not same_spec or span.router is not last.router or span.adapter is not last.adapter:
            yield own
            own = []
        own.append(i)
    if own:
        yield own


def arrange(
    spans: Sequence[Span], num_pages: Sequence[int], num_wanted: int, config: DecoderConfig
) -> tuple[Form, list[list[int]]]:
    """The form that fits exactly, and the spans of each group, by index, in the order of the groups.

    Args:
        spans: what runs; neighbours of one network share a segment.
        num_pages: of each span.
        num_wanted: rows of hidden states that are asked for.
        config: the decoder's.
    """
    segments, groups, members = list[Segment](), list[tuple[Group, ...]](), list[list[int]]()
    windows = [w for i in range(config.num_hidden_layers) if (w := config.window_of(i)) is not None]
    for own in _segments(spans):
        alike: dict[tuple[int, bool, tuple[int, ...], int], list[int]] = {}
        for i in own:
            span = spans[i]
            is_whole = span.start == 0 and 1 < len(span.tokens) <= min(windows, default=len(span.tokens))
            alike.setdefault((len(span.tokens), is_whole, span.block_offsets, span.num_blocks), []).append(i)
        made = []
        for (length, is_whole, offsets, num_blocks), together in alike.items():
            for part in _by_pages(together, num_pages):
                most = max(num_pages[i] for i in part)
                made.append(Group(len(part), length, most, num_blocks, offsets, is_whole))
                members.append(part)
        groups.append(tuple(made))
        first = spans[own[0]]
        lengths = tuple(group.length for group in made for _ in range(group.size))
        segments.append(Segment(first.spec, lengths, router=first.router, adapter=first.adapter))
    return Form(tuple(segments), tuple(groups), num_wanted), members


def _by_pages(own: list[int], num_pages: Sequence[int]) -> list[list[int]]:
    """The spans as they are, or in parts of about as many pages, where padding all to the longest is too much."""
    counts = [num_pages[i] for i in own]
    if max(counts) * len(own) <= _MOST_WASTE * sum(counts):
        return [own]
    parts: dict[int, list[int]] = {}
    for i, count in zip(own, counts, strict=True):
        parts.setdefault((count - 1).bit_length() // 2, []).append(i)
    return list(parts.values())


def size_bucket(count: int) -> int:
    """The next number of 1, 2, 4, 8, 16, 24, 32 and so on: few sizes, and at most twice the work."""
    return 1 << (count - 1).bit_length() if count <= 8 else -(-count // 8) * 8


def page_bucket(count: int) -> int:
    """The next number of 4, 6, 8, 12, 16, 24, 32 and so on."""
    power = 1 << max(2, (count - 1).bit_length())
    return power * 3 // 4 if 4 < count <= power * 3 // 4 else power


def padded(form: Form, most_tokens: int) -> Form | None:
    """The form that stands for all that are a little smaller; None if each iteration is better run by itself.

    Args:
        form: one that `arrange` made.
        most_tokens: tokens of a span up to which forms repeat: those that decode, or verify drafts.
    """
    everything = [group for groups in form.groups for group in groups]
    if any(group.length > most_tokens or group.is_whole for group in everything):
        return None
    if any(segment.router is not None for segment in form.segments):
        return None  # how many tokens are how wide is known when the router has run
    made = [
        tuple(replace(g, size=size_bucket(g.size), pages=page_bucket(g.pages)) for g in groups)
        for groups in form.groups
    ]
    segments = tuple(
        replace(segment, lengths=tuple(g.length for g in groups for _ in range(g.size)))
        for segment, groups in zip(form.segments, made, strict=True)
    )
    # scores and hidden states may be wanted of each token
    return Form(segments, tuple(made), 2 * sum(g.num_tokens for groups in made for g in groups))


def pack(
    form: Form,
    members: Sequence[Sequence[int]],
    spans: Sequence[Span],
    num_pages: Sequence[int],
    wanted: Sequence[int],
    *,
    page_size: int,
    sink: int,
    empty: int,
    pinned: bool,
) -> Tensor:
    """The array that fills a form.

    Args:
        form: at least as large as the spans in all its groups.
        members: spans of each group, by index.
        spans: what runs.
        num_pages: of each span.
        wanted: tokens, counted through all spans, of which hidden states are asked for.
        page_size: tokens of a page.
        sink: block that padding writes to, and nothing reads.
        empty: block of zeros, which padding reads and nothing writes to.
        pinned: whether the memory is pinned, for a copy that the host does not wait for.

    Returns:
        (sum of `form.sizes`,), int32, on the CPU.
    """
    host = torch.empty(sum(form.sizes), dtype=torch.int32, pin_memory=pinned)
    numbers = host.numpy()
    ends = list(accumulate(form.sizes))
    tokens, positions, chosen, *parts = (numbers[end - n : end] for end, n in zip(ends, form.sizes, strict=True))
    tokens[:], positions[:], chosen[:] = 0, 0, 0
    firsts = np.zeros(len(spans), dtype=np.int64)
    done = 0
    groups = [group for own in form.groups for group in own]
    for k, (group, own) in enumerate(zip(groups, members, strict=True)):
        num_tokens = len(own) * group.length
        starts = np.array([spans[i].start for i in own])
        own_positions = starts[:, None] + np.arange(group.length)
        tokens[done : done + num_tokens] = np.array([spans[i].tokens for i in own]).ravel()
        positions[done : done + num_tokens] = own_positions.ravel()
        page_rows, tables = parts[2 * k], parts[2 * k + 1].reshape(group.num_rows, group.num_blocks)
        page_rows[:] = group.num_rows - 1
        page_rows[:num_tokens] = (np.arange(len(own))[:, None] * group.pages + own_positions // page_size).ravel()
        tables[:-1], tables[-1] = empty, sink
        for row, i in enumerate(own):
            first, count = row * group.pages, num_pages[i]
            tables[first : first + count] = spans[i].block_table.numpy()[:count, : group.num_blocks]
            firsts[i] = done + row * group.length
        done += group.num_tokens
    lengths = np.array([len(span.tokens) for span in spans])
    # how far each span's tokens are from their places in the form
    places = np.arange(lengths.sum()) + np.repeat(firsts - (lengths.cumsum() - lengths), lengths)
    chosen[: len(wanted)] = places[np.asarray(wanted, dtype=np.int64)]
    return host


def fresh_blocks(spans: Sequence[Span], num_pages: Sequence[int], page_size: int) -> Tensor | None:
    """Blocks of the pages that begin with one of the tokens, int32; None if there are none."""
    found = []
    for span, stop in zip(spans, num_pages, strict=True):
        first = -(-span.start // page_size)
        if first < stop and span.num_blocks:
            found.append(span.block_table[first:stop, : span.num_blocks].flatten())
    return torch.cat(found) if found else None
