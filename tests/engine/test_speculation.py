"""Drafts change how fast answers come, never what they are."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flextron.engine import EngineCore, EngineSettings, FinishReason, Speculation
from flextron.engine.runner import block_bytes
from flextron.engine.speculation import Draft, verified
from flextron.errors import FlextronError
from flextron.generation.generate import SamplingParams, generate
from flextron.kernels.build import load_library
from flextron.kernels.decoder import Weights
from tests.engine.test_engine import DECODER, PAGE, PATHS, SPECS, engine, random_requests, serve
from tests.random_decoders import ragged_specs, random_decoder

FULL = DECODER.config.full_spec


@pytest.mark.parametrize("native", PATHS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "llama-mqa", "neox"])
def test_greedy_answers_are_those_without_drafts(name: str, native: bool) -> None:
    decoder, rng = random_decoder(name), random.Random(2)
    specs = ragged_specs(decoder.config, 3)
    asked = random_requests(rng, decoder.config.vocab_size, specs, 10)
    speculation = Speculation(drafts=tuple(specs), num_tokens=3)
    core = engine(decoder, num_pages=40, native=native, max_num_seqs=2, speculation=speculation)
    requests = serve(core, asked, rng)
    assert [s.answer for s in requests] == [generate(decoder, [r.prompt], r.spec, r.params)[0] for r in asked]
    assert core.speculator is not None
    assert core.speculator.num_drafted > 0
    assert core.pool.num_used == 0


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), num_pages=st.integers(12, 30), length=st.none() | st.integers(1, 6))
def test_any_traffic_ends_well(seed: int, num_pages: int, length: int | None) -> None:
    """Little memory, cancelling, prefixes that are shared: nothing leaks, and no draft gets into an answer."""
    rng = random.Random(seed)
    asked = random_requests(rng, DECODER.config.vocab_size, SPECS, 8)
    speculation = Speculation(drafts=tuple(SPECS[:2]), num_tokens=length)
    core = engine(DECODER, num_pages=num_pages, native=False, max_num_seqs=3, speculation=speculation)
    for r, s in zip(asked, serve(core, asked, rng, aborts=0.1), strict=True):
        wanted = generate(DECODER, [r.prompt], r.spec, r.params)[0]
        assert s.answer == (wanted[: len(s.answer)] if s.finish_reason is FinishReason.ABORT else wanted)
    assert core.pool.num_used == 0


def test_the_network_itself_as_draft_is_always_right() -> None:
    core = engine(DECODER, num_pages=20, native=False, speculation=Speculation(drafts=(FULL,), num_tokens=3))
    request = core.add("a", [1, 2, 3], SamplingParams(max_tokens=13), core.network(FULL))
    steps = 0
    while core.has_unfinished:
        core.step()
        steps += 1
    # the prompt's step gives one token, three more give four each
    assert steps == 4
    assert core.speculator is not None
    assert core.speculator.num_accepted == core.speculator.num_drafted == 9
    assert request.answer == generate(DECODER, [[1, 2, 3]], FULL, SamplingParams(max_tokens=13))[0]


@pytest.mark.skipif(isinstance(load_library("decoder"), str), reason="needs the compiled iteration")
@pytest.mark.parametrize("drafts", ["int8", "int4"])
@pytest.mark.parametrize("weights", ["float32", "int8"])
def test_drafts_of_few_bits_serve_the_same_answers(weights: Weights, drafts: Weights) -> None:
    decoder = random_decoder("llama")
    speculation = Speculation(drafts=(decoder.config.full_spec,), weights=drafts, num_tokens=4)
    size = block_bytes(decoder, PAGE)
    plain, drafted = (
        EngineCore(
            decoder, EngineSettings(kv_cache_gb=400 * size / 1e9, page_size=PAGE, weights=weights, speculation=s)
        )
        for s in (None, speculation)
    )
    answers = []
    for core in (plain, drafted):
        request = core.add("a", [5, 6, 7], SamplingParams(max_tokens=24), core.network(decoder.config.full_spec))
        while core.has_unfinished:
            core.step()
        answers.append(request.answer)
    assert answers[0] == answers[1]
    assert drafted.speculator is not None
    least = 0.5 if drafts == "int8" else 0.2
    assert drafted.speculator.num_accepted > least * drafted.speculator.num_drafted


def test_a_stop_token_within_a_draft_ends_the_request() -> None:
    free = generate(DECODER, [[1, 2]], FULL, SamplingParams(max_tokens=10))[0]
    stop = free[4]
    core = engine(DECODER, num_pages=20, native=False, speculation=Speculation(drafts=(FULL,), num_tokens=6))
    request = core.add("a", [1, 2], SamplingParams(max_tokens=10, stop_token_ids=(stop,)), core.network(FULL))
    outputs = []
    while core.has_unfinished:
        outputs += core.step()
    assert request.answer == free[: free.index(stop)]
    assert [o.finish_reason for o in outputs] == [None] * free.index(stop) + [FinishReason.STOP]
    assert [o.token for o in outputs] == [*request.answer, None]


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000), temperature=st.sampled_from([0.7, 1.5]), top_p=st.sampled_from([0.6, 1.0]))
def test_drawn_tokens_have_the_distribution_of_the_checking_network(
    seed: int, temperature: float, top_p: float
) -> None:
    """The first of the tokens, over many draws, against the probabilities themselves."""
    generator, size, count = torch.Generator().manual_seed(seed), 6, 1500
    own, other = torch.randn(2, size, generator=generator), torch.randn(size, generator=generator)
    params = SamplingParams(temperature=temperature, top_p=top_p)
    q = (other / temperature).softmax(-1)
    first = torch.zeros(size)
    for _ in range(count):
        draft = Draft([int(torch.multinomial(q, 1, generator=generator))], [q])
        first[verified(draft, own, params, generator)[0]] += 1
    p = (own[0] / temperature).softmax(-1)
    ordered, order = p.sort(descending=True)
    p[order[ordered.cumsum(0) - ordered >= top_p]] = 0
    p /= p.sum()
    # five standard deviations of a share
    assert ((first / count - p).abs() <= 5 * (p * (1 - p) / count).sqrt() + 1e-3).all()


def test_useless_drafts_are_given_up() -> None:
    """A draft as slow as the network, and nearly always wrong, must not go on for long."""
    narrow = SPECS[-1].narrowed_to(FULL)
    core = engine(DECODER, num_pages=60, native=False, speculation=Speculation(drafts=(narrow,)))
    speculator = core.speculator
    assert speculator is not None
    for i in range(4):
        core.add("a", [1, 2, i], SamplingParams(max_tokens=50), core.network(FULL))
        while core.has_unfinished:
            core.step()
    right = speculator.num_accepted / speculator.num_drafted
    # where hardly any token is right, only trials are left
    assert right > 0.3 or speculator.num_drafted < 100


@pytest.mark.parametrize(
    "make", [lambda: Speculation(drafts=()), lambda: Speculation(drafts=(FULL,), num_tokens=0)], ids=["none", "zero"]
)
def test_bad_settings_are_refused(make: object) -> None:
    with pytest.raises(FlextronError):
        make()  # type: ignore[operator]
