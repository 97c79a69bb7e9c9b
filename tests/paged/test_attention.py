"""What sliding windows read of the pages, against the definition."""

from __future__ import annotations

import random

import torch
from hypothesis import given
from hypothesis import strategies as st

from flextron.paged import PagedStep
from flextron.paged.attention import _Indices
from flextron.paged.spans import Group
from tests.paged.sequences import NUM_BLOCKS, PAGE, Blocks, reference, run
from tests.random_decoders import random_decoder


@given(
    window=st.none() | st.integers(1, 30),
    length=st.integers(1, 6),
    starts=st.lists(st.integers(0, 50), min_size=1, max_size=4),
    spare=st.integers(0, 5),
)
def test_every_token_sees_its_window_and_pages_before_it_are_not_read(
    window: int | None, length: int, starts: list[int], spare: int
) -> None:
    num_pages = -(-(max(starts) + length) // PAGE) + spare
    group = Group(len(starts), length, num_pages, 1, (0,), is_whole=False)
    positions = torch.tensor(starts)[:, None] + torch.arange(length)
    tables = torch.arange(group.num_rows, dtype=torch.int32)  # so a block's number says whose page it is, and which
    rows = torch.arange(len(starts))[:, None] * num_pages + positions // PAGE
    cache = torch.zeros(group.num_rows, 2, PAGE, 8)
    indices = _Indices(group, positions.flatten(), rows.flatten().int(), tables, cache)
    keys, values = indices.read(window)
    assert torch.equal(values, keys + 1)
    mask = indices.mask(window, 1)[0] == 0
    for b in range(len(starts)):
        read = [(int(half) // 2 - b * num_pages) * PAGE + i for half in keys[0, b] for i in range(PAGE)]
        for t in range(length):
            position = int(positions[b, t])
            seen = {p for p, shown in zip(read, mask[b, t].tolist(), strict=True) if shown}
            assert seen == set(range(max(0, position - window + 1) if window else 0, position + 1))
        if window is not None:
            assert len(read) <= window + length - 1 + 2 * PAGE


def test_what_lies_before_all_windows_does_not_count() -> None:
    decoder, rng = random_decoder("mistral").double(), random.Random(0)
    step = PagedStep(decoder, num_blocks=NUM_BLOCKS, page_size=PAGE)
    sequence = Blocks(decoder, rng).sequence([rng.randrange(60) for _ in range(30)], decoder.widths)
    run(step, [sequence], [25])
    sequence.done = 25
    window = decoder.config.window_of(0)
    assert window is not None
    before = (25 - window + 1) // PAGE
    step.cache[sequence.table[:before, : sequence.num_blocks].flatten().long()] = float("nan")
    for length in (1, 3):
        (hidden,) = run(step, [sequence], [length])
        wanted = reference(decoder, sequence, length)
        assert float((hidden - wanted).abs().max() / wanted.abs().max()) < 1e-9
        sequence.done += length
