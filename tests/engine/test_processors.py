"""Settings that change scores, in the engine: mixed batches and drafts give the answers of plain generation."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from flextron.engine import EngineCore, FinishReason, Speculation
from flextron.errors import FlextronError
from flextron.generation.generate import generate
from flextron.generation.sampling import SamplingParams
from flextron.model.attention import CausalAttention
from flextron.model.batch import Batch
from flextron.spec import SubnetSpec
from tests.engine.test_engine import DECODER, PATHS, SPECS, Asked, engine, random_requests, serve

FULL = DECODER.config.full_spec
NARROW = SubnetSpec.of([4] * DECODER.config.num_hidden_layers, [1] * DECODER.config.num_hidden_layers)
SIZE = DECODER.config.vocab_size


def settings(rng: random.Random) -> dict[str, object]:
    """Some of all."""
    every: dict[str, object] = {
        "repetition_penalty": rng.choice([0.8, 1.4]),
        "presence_penalty": rng.uniform(-1, 1),
        "frequency_penalty": rng.uniform(-1, 1),
        "logit_bias": {rng.randrange(SIZE): 1.5},
        "allowed_token_ids": tuple(rng.sample(range(SIZE), 30)),
        "bad_words_ids": tuple((rng.randrange(SIZE),) for _ in range(20)),
        "stop_token_ids": tuple(rng.sample(range(SIZE), 10)),
    }
    return {name: every[name] for name in rng.sample(sorted(every), rng.randint(0, 4))}


def mixed(rng: random.Random, count: int) -> list[Asked]:
    return [
        Asked(r.prompt, r.spec, replace(r.params, min_tokens=min(3, r.params.max_tokens), **settings(rng)))  # type: ignore[arg-type]
        for r in random_requests(rng, SIZE, SPECS, count)
    ]


@pytest.mark.parametrize("native", PATHS)
@pytest.mark.parametrize("drafts", [False, True])
def test_greedy_answers_are_those_of_plain_generation(native: bool, drafts: bool) -> None:
    rng = random.Random(3)
    asked = mixed(rng, 16)
    speculation = Speculation(drafts=tuple(SPECS), num_tokens=3) if drafts else None
    core = engine(DECODER, num_pages=40, native=native, max_num_seqs=2 if drafts else 5, speculation=speculation)
    requests = serve(core, asked, rng)
    assert [s.answer for s in requests] == [generate(DECODER, [r.prompt], r.spec, r.params)[0] for r in asked]
    assert {s.finish_reason for s in requests} == {FinishReason.STOP, FinishReason.LENGTH}
    assert not drafts or (core.speculator is not None and core.speculator.num_drafted > 20)


def test_drawn_answers_have_the_distribution_that_the_settings_say() -> None:
    """The second token after each first one, drafted by another network, against its exact probabilities."""
    params = SamplingParams(max_tokens=3, temperature=0.8, repetition_penalty=1.7, frequency_penalty=1.0, top_k=4)
    speculation = Speculation(drafts=(NARROW,), num_tokens=2, max_num_seqs=20)
    core = engine(
        DECODER, num_pages=200, native=False, max_num_seqs=20, max_num_batched_tokens=80, speculation=speculation
    )
    counts = torch.zeros(SIZE, SIZE)
    for _ in range(35):
        requests = [core.add(f"{i}", [5, 6, 7], params, core.network(FULL)) for i in range(20)]
        while core.has_unfinished:
            core.step()
        for request in requests:
            counts[request.answer[1], request.answer[2]] += 1
    assert core.speculator is not None
    assert 0 < core.speculator.num_accepted < core.speculator.num_drafted
    wanted = torch.zeros(SIZE, SIZE)
    for a, p_a in enumerate(following([5, 6, 7], [], params)):
        for b, p_b in enumerate(following([5, 6, 7], [a], params)) if p_a else ():
            wanted[b] += float(p_a * p_b) * following([5, 6, 7], [a, b], params) if p_b else 0
    share, error = counts / 700, (wanted * (1 - wanted) / 700).sqrt()
    assert ((share - wanted).abs() <= 5 * error + 2e-3).all()


def following(prompt: list[int], answer: list[int], params: SamplingParams) -> torch.Tensor:
    """Probabilities of the next token by the whole network without a cache, and the definitions."""
    batch = Batch.ragged([torch.tensor([*prompt, *answer])], [FULL], [0], [None])
    with torch.inference_mode():
        scores = DECODER.logits(DECODER(batch, CausalAttention(DECODER.config))[-1:])[0]
    scores = scores.clone()
    for token in {*prompt, *answer}:
        scores[token] = scores[token] / 1.7 if scores[token] > 0 else scores[token] * 1.7
    for token in answer:
        scores[token] -= 1.0
    p = (scores / 0.8).softmax(-1)
    p[p < p.topk(4).values[-1]] = 0
    return p / p.sum()


@pytest.mark.parametrize("native", PATHS)
@pytest.mark.parametrize("max_tokens", [0, 1, 3])
def test_scores_of_prompts_are_those_of_the_whole_pass(native: bool, max_tokens: int) -> None:
    """Chunk by chunk, with little memory and prefixes in the cache, in several sub-networks at once."""
    rng = random.Random(7)
    params = SamplingParams(max_tokens=max_tokens, prompt_logprobs=3)
    asked = [replace(r, params=params) for r in random_requests(rng, SIZE, SPECS, 12)]
    core = engine(DECODER, num_pages=14, native=native)
    for r, request in zip(asked, serve(core, asked, rng), strict=True):
        assert len(request.answer) == max_tokens
        assert request.finish_reason is FinishReason.LENGTH
        batch = Batch.ragged([torch.tensor(r.prompt)], [r.spec], [0], [None])
        with torch.inference_mode():
            wanted = DECODER.logits(DECODER(batch, CausalAttention(DECODER.config))).log_softmax(-1)
        assert len(request.prompt_logprobs) == len(r.prompt) - 1
        for found, row, token in zip(request.prompt_logprobs, wanted, r.prompt[1:], strict=False):
            assert found.chosen == pytest.approx(float(row[token]), abs=1e-4)
            assert found.rank == int((row > row[token]).sum()) + 1
            assert [t for t, _ in found.top] == row.topk(3).indices.tolist()
    assert core.pool.num_used == 0
    # those without the setting do use what the others left in the cache
    again = core.add("b", asked[0].prompt * 2, SamplingParams(max_tokens=1), core.network(asked[0].spec))
    while core.has_unfinished:
        core.step()
    assert again.prompt_logprobs == []


def test_the_engine_refuses_tokens_that_the_model_does_not_have() -> None:
    core: EngineCore = engine(DECODER, num_pages=10, native=False)
    with pytest.raises(FlextronError, match="outside the model's vocabulary"):
        core.add("a", [1], SamplingParams(max_tokens=2, logit_bias={SIZE: 1.0}), core.network(FULL))
