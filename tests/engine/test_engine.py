"""Requests of mixed sub-networks, in random order and number, against plain generation one by one."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flextron.engine import EngineCore, EngineSettings, FinishReason, Request
from flextron.engine.runner import block_bytes
from flextron.errors import FlextronError, PromptError
from flextron.generation import decoding
from flextron.generation.generate import SamplingParams, generate
from flextron.kernels.build import load_library
from flextron.kernels.decoder import Weights
from flextron.model.batch import Batch
from flextron.model.decoder import Decoder
from flextron.spec import SubnetSpec
from tests.random_decoders import ragged_specs, random_decoder, rounded_decoder, whole_number_products

PAGE = 4
PATHS = [False] if isinstance(load_library("decoder"), str) else [True, False]
DECODER = random_decoder("llama")
SPECS = ragged_specs(DECODER.config, 3)


@dataclass(frozen=True)
class Asked:
    """What a client asks."""

    prompt: list[int]
    spec: SubnetSpec
    params: SamplingParams


def engine(decoder: Decoder, *, num_pages: int, native: bool, **options: object) -> EngineCore:
    """An engine whose cache holds so many pages of the full network."""
    size, config = block_bytes(decoder, PAGE), decoder.config
    num_blocks = num_pages * config.num_hidden_layers * config.kv_rows(config.num_groups) // config.head_dim
    values: dict[str, object] = {"max_num_seqs": 5, "max_num_batched_tokens": 11}
    return EngineCore(
        decoder,
        EngineSettings(kv_cache_gb=(num_blocks + 0.5) * size / 1e9, page_size=PAGE, native=native, **values | options),  # type: ignore[arg-type]
    )


def random_requests(rng: random.Random, vocab_size: int, specs: list[SubnetSpec], count: int) -> list[Asked]:
    """Some of them begin alike."""
    shared = [rng.randrange(vocab_size) for _ in range(9)]

    def prompt() -> list[int]:
        own = [rng.randrange(vocab_size) for _ in range(rng.randint(1, 20))]
        return shared + own if rng.random() < 0.4 else own

    return [Asked(prompt(), rng.choice(specs), SamplingParams(max_tokens=rng.randint(1, 16))) for _ in range(count)]


def serve(core: EngineCore, asked: list[Asked], rng: random.Random, *, aborts: float = 0.0) -> list[Request]:
    """Add requests while others run; check the cache after every step."""
    requests: list[Request] = []
    waiting = list(asked)
    while waiting or core.has_unfinished:
        if waiting and rng.random() < 0.6:
            r = waiting.pop(0)
            requests.append(core.add(str(len(requests)), r.prompt, r.params, core.network(r.spec)))
        if requests and rng.random() < aborts:
            core.abort(rng.choice(requests))
        core.step()
        core.pool.check_integrity([page for s in core.scheduler for page in s.pages])
    return requests


@pytest.mark.parametrize("native", PATHS)
@pytest.mark.parametrize(
    "name", ["llama", "gpt2", "mistral", "llama-mqa", "neox", "gemma2", "gemma3", "smollm3", "granite", "olmo2"]
)
def test_answers_are_those_of_plain_generation(name: str, native: bool) -> None:
    decoder, rng = random_decoder(name), random.Random(1)
    asked = random_requests(rng, decoder.config.vocab_size, ragged_specs(decoder.config, 3), 14)
    core = engine(decoder, num_pages=15, native=native)
    requests = serve(core, asked, rng)
    wanted = [generate(decoder, [r.prompt], r.spec, r.params)[0] for r in asked]
    assert [s.answer for s in requests] == wanted
    assert all(s.finish_reason is FinishReason.LENGTH for s in requests)
    assert core.pool.num_used == 0


compiled = pytest.mark.skipif(isinstance(load_library("decoder"), str), reason="needs the compiled iteration")


@compiled
@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("name", ["llama", "neox"])
def test_answers_of_quantized_engines_are_those_of_rounded_weights_and_tokens(
    name: str, weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder, rng = random_decoder(name), random.Random(4)
    asked = random_requests(rng, decoder.config.vocab_size, ragged_specs(decoder.config, 3), 10)
    requests = serve(engine(decoder, num_pages=15, native=True, weights=weights), asked, rng)
    reference = rounded_decoder(decoder, weights)
    # the reference rounds what PyTorch's operators multiply
    monkeypatch.setattr(decoding, "why_not_native", lambda decoder: "of the test")
    with whole_number_products(decoder, reference, weights):
        wanted = [generate(reference, [r.prompt], r.spec, r.params)[0] for r in asked]
    # the last digit of a sum can turn a number between two steps, and random networks have close scores
    assert sum(s.answer == own for s, own in zip(requests, wanted, strict=True)) >= 8


@compiled
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), num_pages=st.integers(12, 30), budget=st.integers(5, 40))
def test_answers_in_int8_do_not_depend_on_the_traffic(seed: int, num_pages: int, budget: int) -> None:
    """Each request alone, with its prompt at once, gets what it gets in chunks, after preemption, beside others."""
    rng = random.Random(seed)
    asked = random_requests(rng, DECODER.config.vocab_size, SPECS, 8)
    core = engine(DECODER, num_pages=num_pages, native=True, weights="int8", max_num_batched_tokens=budget)
    for r, s in zip(asked, serve(core, asked, rng), strict=True):
        alone = engine(DECODER, num_pages=40, native=True, weights="int8", max_num_batched_tokens=64)
        assert serve(alone, [r], rng)[0].answer == s.answer


@pytest.mark.parametrize("native", PATHS)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), num_pages=st.integers(12, 30), budget=st.integers(5, 40))
def test_any_traffic_ends_well(native: bool, seed: int, num_pages: int, budget: int) -> None:
    """Preemption, cancelling, chunks of all sizes: nothing leaks, and whoever was not cancelled gets its answer."""
    rng = random.Random(seed)
    asked = random_requests(rng, DECODER.config.vocab_size, SPECS, 8)
    core = engine(DECODER, num_pages=num_pages, native=native, max_num_batched_tokens=budget)
    for r, s in zip(asked, serve(core, asked, rng, aborts=0.1), strict=True):
        wanted = generate(DECODER, [r.prompt], r.spec, r.params)[0]
        if s.finish_reason is FinishReason.ABORT:
            assert s.answer == wanted[: len(s.answer)]
        else:
            assert s.answer == wanted
    assert core.pool.num_used == 0


def test_preempted_and_cached_requests_happen_in_these_tests() -> None:
    rng = random.Random(1)
    asked = random_requests(rng, DECODER.config.vocab_size, [DECODER.config.full_spec], 14)
    core = engine(DECODER, num_pages=15, native=False)
    serve(core, asked, rng)
    assert core.scheduler.num_preemptions
    assert core.scheduler.num_cached_tokens


def test_memory_is_proportional_to_groups() -> None:
    full = DECODER.config.full_spec
    half = SubnetSpec.uniform(num_hidden_layers=3, intermediate_size=full.layers[0].intermediate_size, num_groups=1)
    core = engine(DECODER, num_pages=15, native=False)
    used = {}
    for spec in (full, half):
        request = core.add("a", [1] * 9, SamplingParams(max_tokens=4), core.network(spec))
        core.step()
        used[spec] = core.pool.num_used
        core.abort(request)
    assert used[half] * 2 == used[full]


def test_a_seed_gives_the_same_draws_whatever_runs_beside() -> None:
    params = SamplingParams(max_tokens=12, temperature=1.0, top_p=0.9, seed=3)
    answers = []
    for others in (0, 4):
        core = engine(DECODER, num_pages=40, native=False)
        network = core.network(DECODER.config.full_spec)
        request = core.add("a", [1, 2, 3], params, network)
        for i in range(others):
            core.add(str(i), [5, i], SamplingParams(max_tokens=5, temperature=1.0), network)
        while core.has_unfinished:
            core.step()
        answers.append(request.answer)
    assert answers[0] == answers[1]


def test_stop_tokens_end_a_request() -> None:
    spec = DECODER.config.full_spec
    free = generate(DECODER, [[1, 2]], spec, SamplingParams(max_tokens=8))[0]
    core = engine(DECODER, num_pages=10, native=False)
    params = SamplingParams(max_tokens=8, stop_token_ids=(free[3],))
    request = core.add("a", [1, 2], params, core.network(spec))
    while core.has_unfinished:
        core.step()
    assert request.answer == free[: free.index(free[3])]
    assert request.finish_reason is FinishReason.STOP


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "said"),
    [
        ([], 4, "empty"),
        ([10**6], 4, "vocabulary"),
        ([1] * 60, 8, "shorten the prompt"),
        ([1] * 40, 8, "raise kv_cache_gb"),
    ],
)
def test_bad_requests_are_refused(prompt: list[int], max_tokens: int, said: str) -> None:
    core = engine(DECODER, num_pages=7, native=False)
    with pytest.raises(FlextronError, match=said):
        core.add("a", prompt, SamplingParams(max_tokens=max_tokens), core.network(DECODER.config.full_spec))
    assert not core.has_unfinished


@pytest.mark.parametrize("spec", SPECS)
def test_the_capacity_is_the_longest_request_that_is_taken(spec: SubnetSpec) -> None:
    core = engine(DECODER, num_pages=7, native=False)
    network, capacity = core.network(spec), core.capacity(spec)
    request = core.add("a", [1], SamplingParams(max_tokens=capacity - 1), network)
    with pytest.raises(PromptError):
        core.add("b", [1], SamplingParams(max_tokens=capacity), network)
    while core.has_unfinished:
        core.step()
    assert len(request.tokens) == capacity


def test_bad_settings_are_refused() -> None:
    with pytest.raises(FlextronError, match="at least max_num_seqs"):
        EngineSettings(max_num_seqs=10, max_num_batched_tokens=5)
    foreign = SubnetSpec.uniform(num_hidden_layers=3, intermediate_size=10**6, num_groups=1)
    with pytest.raises(FlextronError, match="not nested"):
        engine(DECODER, num_pages=7, native=False).network(foreign)


def test_greedy_and_sampled_requests_share_a_batch() -> None:
    torch.manual_seed(0)
    core = engine(DECODER, num_pages=40, native=False)
    network = core.network(DECODER.config.full_spec)
    greedy = core.add("a", [1, 2, 3], SamplingParams(max_tokens=9), network)
    core.add("b", [4], SamplingParams(max_tokens=9, temperature=2.0), network)
    while core.has_unfinished:
        core.step()
    assert greedy.answer == generate(DECODER, [[1, 2, 3]], DECODER.config.full_spec, SamplingParams(max_tokens=9))[0]


def test_logprobs_are_the_models_own() -> None:
    spec = DECODER.config.full_spec
    core = engine(DECODER, num_pages=10, native=False)
    request = core.add("a", [1, 2, 3], SamplingParams(max_tokens=3, temperature=0.7, logprobs=4), core.network(spec))
    outputs = []
    while core.has_unfinished:
        outputs += core.step()
    hidden = DECODER(Batch.padded(torch.tensor([request.tokens]), spec))
    wanted = DECODER.logits(hidden).log_softmax(-1)[2:]
    for output, row in zip(outputs, wanted, strict=False):
        assert output.logprobs is not None
        assert output.token is not None
        assert output.logprobs.chosen == pytest.approx(float(row[output.token]), abs=1e-4)
        top = row.topk(4)
        assert [token for token, _ in output.logprobs.top] == top.indices.tolist()
        assert [value for _, value in output.logprobs.top] == pytest.approx(top.values.tolist(), abs=1e-4)


@pytest.mark.parametrize("native", PATHS)
def test_rounding_does_not_depend_on_where_networks_lie_in_memory(native: bool) -> None:
    asked = random_requests(random.Random(3), DECODER.config.vocab_size, SPECS, 12)
    found = set()
    for seed in range(4):
        core = engine(DECODER, num_pages=60, native=native, max_num_seqs=12, max_num_batched_tokens=64)
        # holes in the memory, filled in any order
        holes = [replace(core.network(DECODER.config.full_spec)) for _ in range(200)]
        random.Random(seed).shuffle(holes)
        networks = {}
        for spec in SPECS:
            holes.pop()
            networks[spec] = core.network(spec)
        for i, r in enumerate(asked):
            core.add(f"{i}", r.prompt, SamplingParams(max_tokens=8, logprobs=3), networks[r.spec])
        found.add(tuple(o.logprobs for _ in range(12) for o in core.step()))
    assert len(found) == 1
