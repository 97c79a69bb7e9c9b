"""Vectors of prompts: in chunks, with caches, beside answers and in narrow networks, against whole passes."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from flextron.engine import EngineCore, FinishReason, Pooling, Request, Speculation
from flextron.engine.pooling import Pooled
from flextron.generation.generate import SamplingParams, generate
from flextron.model.adapter import Adapter
from flextron.model.batch import Batch
from flextron.model.decoder import Decoder
from flextron.spec import SubnetSpec
from tests.checkpoints.families_cases import CASES, decoder_of, random_model, random_tokens
from tests.engine.test_engine import PATHS, engine
from tests.model.adapter_cases import random_ia3, random_lora
from tests.random_decoders import ragged_specs, random_decoder, rounded_decoder, whole_number_products

NOTHING = SamplingParams(max_tokens=0)


def vector(request: Request) -> Tensor:
    assert request.pooled is not None
    return request.pooled.vector


def reference(
    decoder: Decoder, prompt: list[int], spec: SubnetSpec, pooling: Pooling, adapter: Adapter | None
) -> Tensor:
    """By one pass over the whole prompt."""
    hidden_TD = decoder(Batch.ragged([torch.tensor(prompt)], [spec], adapters=[adapter])) / decoder.config.logits_scale
    return hidden_TD.mean(0) if pooling == "mean" else hidden_TD[-1]


def run(core: EngineCore, *requests: Request) -> None:
    while core.has_unfinished:
        core.step()
        core.pool.check_integrity([page for s in core.scheduler for page in s.pages])
    assert all(r.finish_reason is FinishReason.STOP and not r.answer for r in requests)
    assert core.pool.num_used == 0


@pytest.mark.parametrize("native", PATHS)
@pytest.mark.parametrize("case", ["llama", "gpt2", "neox", "gemma2", "granite", "olmo2", "stablelm"])
def test_vectors_are_made_of_transformers_hidden_states(case: str, native: bool) -> None:
    model = random_model(case)
    core = engine(decoder_of(model).requires_grad_(False), num_pages=20, native=native)
    prompts = [random_tokens(n, seed=n).tolist() for n in (1, 5, 17)]
    network = core.network(core.decoder.config.full_spec)
    made = {
        pooling: [core.add(f"{pooling}{i}", p, NOTHING, network, pooling=pooling) for i, p in enumerate(prompts)]
        for pooling in ("mean", "last")
    }
    run(core, *made["mean"], *made["last"])
    for i, prompt in enumerate(prompts):
        with torch.no_grad():
            states_TD = model.base_model(torch.tensor([prompt]), use_cache=False).last_hidden_state[0]
        for pooling, wanted in (("mean", states_TD.mean(0)), ("last", states_TD[-1])):
            torch.testing.assert_close(vector(made[pooling][i]), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("native", PATHS)
@pytest.mark.parametrize("name", ["llama", "llama-mqa", "gemma3", "neox"])
def test_beside_answers_in_other_networks(name: str, native: bool) -> None:
    """Chunks of 11 tokens, prefixes in the cache, and so few pages that requests start over."""
    decoder, rng = random_decoder(name), random.Random(2)
    config = decoder.config
    adapters = [None, random_lora(config, seed=1), random_ia3(config, seed=2)]
    specs = ragged_specs(config, 3)
    core = engine(decoder, num_pages=11, native=native)
    shared = [rng.randrange(config.vocab_size) for _ in range(9)]
    asked, others = [], []
    for i in range(24):
        prompt = shared[: rng.randint(0, 9)] + [rng.randrange(config.vocab_size) for _ in range(rng.randint(1, 14))]
        spec, adapter, pooling = rng.choice(specs), rng.choice(adapters), rng.choice(["mean", "last", None])
        params = NOTHING if pooling else SamplingParams(max_tokens=14)
        request = core.add(str(i), prompt, params, core.network(spec, adapter=adapter), pooling=pooling)
        (asked if pooling else others).append((request, prompt, spec, pooling, adapter))
        if rng.random() < 0.4:
            core.step()
    run(core, *(request for request, *_ in asked))
    assert core.scheduler.num_preemptions
    assert core.scheduler.num_cached_tokens
    for request, prompt, spec, pooling, adapter in asked:
        torch.testing.assert_close(
            vector(request), reference(decoder, prompt, spec, pooling, adapter), rtol=1e-4, atol=1e-4
        )
    for request, prompt, spec, _, adapter in others:
        if adapter is None:
            assert request.answer == generate(decoder, [prompt], spec, SamplingParams(max_tokens=14))[0]


@pytest.mark.skipif(True not in PATHS, reason="no compiler")
def test_eight_bits() -> None:
    decoder = random_decoder("llama")
    core = engine(decoder, num_pages=20, native=True, weights="int8")
    request = core.add("0", list(range(20)), NOTHING, core.network(decoder.config.full_spec), pooling="mean")
    run(core, request)
    rounded = rounded_decoder(decoder, "int8")
    with whole_number_products(decoder, rounded, "int8"):
        wanted = reference(rounded, list(range(20)), decoder.config.full_spec, "mean", None)
    # where a number lies between two steps, the last bit of a float32 sum decides: a step is 1/127 of the largest
    assert float((vector(request) - wanted).norm() / wanted.norm()) < 0.03
    others = reference(rounded, list(range(20)), decoder.config.full_spec, "last", None)
    assert float((vector(request) - others).norm() / wanted.norm()) > 0.3


@pytest.mark.skipif(True not in PATHS, reason="no compiler")
def test_nothing_is_drafted_for_vectors() -> None:
    decoder = random_decoder("llama")
    spec = ragged_specs(decoder.config, 3)[0]
    core = engine(decoder, num_pages=20, native=True, speculation=Speculation(drafts=(spec,), num_tokens=2))
    requests = [
        core.add(str(i), [i + 1], NOTHING, core.network(decoder.config.full_spec), pooling="mean") for i in range(2)
    ]
    run(core, *requests)
    for i, request in enumerate(requests):
        wanted = reference(decoder, [i + 1], decoder.config.full_spec, "mean", None)
        torch.testing.assert_close(vector(request), wanted, rtol=1e-4, atol=1e-4)


def test_tokens_that_come_twice_count_once() -> None:
    hidden_TD = torch.randn(9, 4)
    pooled = Pooled("mean", 2.0)
    for start, end in ((0, 4), (0, 3), (3, 6), (6, 9)):
        pooled.add(start, hidden_TD[start:end])
    torch.testing.assert_close(pooled.vector, hidden_TD.mean(0) / 2)


def test_all_cases_have_a_place_for_the_scale() -> None:
    """The only family with scaled logits is among those above."""
    assert [name for name in CASES if random_decoder(name).config.logits_scale != 1] == ["granite"]
