"""The attention backends against softmax written out, pair by pair; the cached one fed in pieces of any size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flextron.errors import FlextronError
from flextron.families.config import config_from_hf
from flextron.model.attention import CachedAttention, CausalAttention
from flextron.model.batch import Batch
from flextron.model.config import DecoderConfig
from flextron.spec import SubnetSpec
from tests.checkpoints.families_cases import (
    MECHANISMS,
    hf_config_of,
    random_decoder_of,
    random_model,
    random_tokens,
    relative_error,
)

HEAD_DIM = 8
WINDOWS = [None, 1, 3, 5, 100]


def config(window: int | None = None) -> DecoderConfig:
    return replace(config_from_hf(hf_config_of(random_model("llama"))), sliding_window=window)


def random_heads(length: int, num_heads: int, seed: int) -> Tensor:
    return torch.randn(length, num_heads, HEAD_DIM, generator=torch.Generator().manual_seed(seed))


def by_definition(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """One sequence, one head and one query at a time."""
    out = torch.empty_like(q)
    repeats = q.shape[1] // k.shape[1]
    for t in range(len(q)):
        first = 0 if window is None else max(0, t - window + 1)
        for h in range(q.shape[1]):
            scores = k[first : t + 1, h // repeats] @ q[t, h] / math.sqrt(HEAD_DIM)
            out[t, h] = scores.softmax(-1) @ v[first : t + 1, h // repeats]
    return out


class Sequences:
    """Random queries, keys and values of sequences of given lengths, with 4 query and 2 KV heads."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self.q, self.k, self.v = (
            [random_heads(n, heads, seed=100 * s + kind) for s, n in enumerate(lengths)]
            for kind, heads in enumerate((4, 2, 2))
        )

    def rows(self, starts: Sequence[int], lengths: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (
            torch.cat([t[a : a + n] for t, a, n in zip(kind, starts, lengths, strict=True)])
            for kind in (self.q, self.k, self.v)
        )
        return q, k, v

    def expected(self, window: int | None) -> list[Tensor]:
        return [by_definition(q, k, v, window) for q, k, v in zip(self.q, self.k, self.v, strict=True)]


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("lengths", [(7,), (6, 6, 6), (5, 1, 9)])
def test_causal_attention_equals_the_definition(lengths: tuple[int, ...], window: int | None) -> None:
    sequences = Sequences(lengths)
    out = CausalAttention(config(window))(0, 0, *sequences.rows([0] * len(lengths), lengths), lengths)
    torch.testing.assert_close(out, torch.cat(sequences.expected(window)))


@given(
    chunks=st.integers(1, 3).flatmap(
        lambda n: st.lists(st.lists(st.integers(1, 5), min_size=n, max_size=n), min_size=1, max_size=5)
    ),
    window=st.sampled_from(WINDOWS),
)
@settings(max_examples=40)
def test_cached_attention_in_chunks_equals_the_definition(chunks: list[list[int]], window: int | None) -> None:
    totals = [sum(column) for column in zip(*chunks, strict=True)]
    check_in_chunks(totals, chunks, window)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("prompts", [(4, 4), (2, 6, 1), (1,)])
def test_cached_attention_token_by_token_equals_the_definition(prompts: tuple[int, ...], window: int | None) -> None:
    chunks = [list(prompts), *([[1] * len(prompts)] * 6)]
    check_in_chunks([n + 6 for n in prompts], chunks, window)


def check_in_chunks(totals: list[int], chunks: list[list[int]], window: int | None) -> None:
    sequences = Sequences(totals)
    expected = sequences.expected(window)
    layer = SubnetSpec.of([1, 1], [2, 2])
    cache = CachedAttention(config(window), [(layer, len(totals))], max(totals))
    starts = [0] * len(totals)
    for lengths in chunks:
        q, k, v = sequences.rows(starts, lengths)
        wanted = torch.cat([e[a : a + n] for e, a, n in zip(expected, starts, lengths, strict=True)])
        # two layers, so that one that wrote over the other's keys would show
        cache(0, 0, q, -k, -v, lengths)
        torch.testing.assert_close(cache(1, 0, q, k, v, lengths), wanted)
        cache.advance([lengths])
        starts = [a + n for a, n in zip(starts, lengths, strict=True)]


@pytest.mark.parametrize("case", MECHANISMS)
def test_decoder_with_cache_and_mixed_specs_equals_whole_sequences(case: str) -> None:
    decoder = random_decoder_of(case)
    groups = decoder.config.num_groups
    specs = [SubnetSpec.of([40, 8, 0], [groups, 0, 1]), SubnetSpec.of([8, 0, 40], [1, 0, groups])]
    tokens = [random_tokens(14, seed=5), random_tokens(9, seed=6), random_tokens(12, seed=7)]
    owners = [specs[0], specs[0], specs[1]]
    chunks = [(5, 2, 1), (1, 1, 1), (1, 1, 4), (7, 5, 6)]
    cache = CachedAttention(decoder.config, [(specs[0], 2), (specs[1], 1)], 14)
    out: list[list[Tensor]] = [[], [], []]
    starts = [0, 0, 0]
    with torch.no_grad():
        for lengths in chunks:
            pieces = [t[a : a + n] for t, a, n in zip(tokens, starts, lengths, strict=True)]
            batch = Batch.ragged(pieces, owners, starts)
            for parts, hidden in zip(out, decoder(batch, cache).split(lengths), strict=True):
                parts.append(hidden)
            cache.advance([s.lengths for s in batch.segments])
            starts = [a + n for a, n in zip(starts, lengths, strict=True)]
        for parts, sequence, spec in zip(out, tokens, owners, strict=True):
            assert relative_error(torch.cat(parts), decoder(Batch.padded(sequence[None], spec))) <= 1e-5


def test_bytes_are_proportional_to_the_groups_that_run() -> None:
    specs = [SubnetSpec.of([8, 8, 8], [2, 1, 0]), SubnetSpec.of([8, 8, 0], [1, 0, 0])]
    per_group = 2 * HEAD_DIM * 10  # keys and values, for a capacity of ten tokens
    cache = CachedAttention(config(), [(specs[0], 3), (specs[1], 2)], 10)
    assert cache.num_bytes == (3 * (2 + 1) + 2 * 1) * per_group * 4
    half = CachedAttention(config(), [(specs[0], 3), (specs[1], 2)], 10, dtype=torch.bfloat16)
    assert half.num_bytes * 2 == cache.num_bytes


def test_bytes_of_a_multi_query_model_do_not_depend_on_its_query_heads() -> None:
    mqa = config_from_hf(hf_config_of(random_model("llama-mqa")))
    sizes = [CachedAttention(mqa, [(SubnetSpec.of([8], [g]), 1)], 10).num_bytes for g in (0, 1, 3, 4)]
    assert sizes == [0, *[2 * HEAD_DIM * 10 * 4] * 3]


def test_more_tokens_than_the_capacity_are_refused() -> None:
    sequences = Sequences([5])
    cache = CachedAttention(config(), [(SubnetSpec.of([1], [2]), 1)], 4)
    with pytest.raises(FlextronError, match="holds 4 tokens a sequence; 5 were needed"):
        cache(0, 0, *sequences.rows([0], [5]), [5])
