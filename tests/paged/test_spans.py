"""Forms and the arrays that fill them, against what each token and each page should say, found one by one."""

from __future__ import annotations

import random

import torch
from hypothesis import given
from hypothesis import strategies as st

from flextron.model.decoder import Decoder
from flextron.paged.spans import arrange, pack, padded, page_bucket, size_bucket
from tests.paged.sequences import NUM_BLOCKS, PAGE, Blocks
from tests.random_decoders import ragged_specs, random_decoder

DECODER: Decoder = random_decoder("llama")
SINK, EMPTY = NUM_BLOCKS, NUM_BLOCKS + 1


@given(st.integers(1, 5000))
def test_buckets_are_few_and_hold_at_most_twice_as_much(count: int) -> None:
    for bucket in (size_bucket, page_bucket):
        found = bucket(count)
        assert count <= found < 2 * max(count, 3)
        assert bucket(found) == found  # the largest of its own
        assert bucket(count + 1) >= found
    assert len({size_bucket(n) for n in range(1, 65)}) == 11
    assert len({page_bucket(n) for n in range(1, 513)}) == 15


@given(
    seed=st.integers(0, 10**6),
    drawn=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 60), st.sampled_from([1, 1, 1, 4, 20])), min_size=1),
    repeats=st.booleans(),
)
def test_the_array_says_of_every_token_what_it_is_and_where(
    seed: int, drawn: list[tuple[int, int, int]], repeats: bool
) -> None:
    """And padding reads nothing but the block of zeros, and writes to nothing but the sink."""
    rng, specs = random.Random(seed), ragged_specs(DECODER.config, 3)
    blocks, spans = Blocks(DECODER, rng), []
    for number, start, length in sorted(drawn[:8]):
        sequence = blocks.sequence([rng.randrange(60) for _ in range(start + length)], specs[number])
        sequence.done = start
        spans.append(sequence.span(length))
    num_pages = [s.num_pages(PAGE) for s in spans]
    count = sum(len(s.tokens) for s in spans)
    wanted = rng.sample(range(count), rng.randint(0, count))
    form, members = arrange(spans, num_pages, len(wanted), DECODER.config)
    assert sorted(i for own in members for i in own) == list(range(len(spans)))
    large = padded(form, 16) if repeats else None
    form = large or form
    array = pack(form, members, spans, num_pages, wanted, page_size=PAGE, sink=SINK, empty=EMPTY, pinned=False)
    tokens, positions, chosen, *parts = array.split(form.sizes)
    groups = [group for own in form.groups for group in own]
    at, seen = 0, {}
    for k, (group, own) in enumerate(zip(groups, members, strict=True)):
        rows = parts[2 * k].tolist()
        tables = parts[2 * k + 1].view(group.num_rows, group.num_blocks)
        assert (tables[-1] == SINK).all()
        for b in range(group.size):
            span = spans[own[b]] if b < len(own) else None
            own_table = tables[b * group.pages : (b + 1) * group.pages]
            held = 0 if span is None else num_pages[own[b]]
            assert (own_table[held:] == EMPTY).all()
            if span is not None:
                assert torch.equal(own_table[:held], span.block_table[:held, : span.num_blocks])
            for t in range(group.length):
                row = rows[b * group.length + t]
                if span is None:
                    assert row == group.num_rows - 1
                    assert positions[at] == tokens[at] == 0
                else:
                    position = span.start + t
                    assert (tokens[at], positions[at]) == (span.tokens[t], position)
                    assert torch.equal(tables[row], span.block_table[position // PAGE, : span.num_blocks])
                    seen[own[b], t] = at
                at += 1
    assert at == form.num_tokens
    in_order = [seen[i, t] for i, span in enumerate(spans) for t in range(len(span.tokens))]
    assert chosen[: len(wanted)].tolist() == [in_order[n] for n in wanted]
