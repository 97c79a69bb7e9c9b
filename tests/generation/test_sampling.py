"""What sampling makes of scores, against the processors of `transformers` in vLLM's order."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation import logits_process as stock

from flextron.errors import FlextronError
from flextron.generation.generate import generate
from flextron.generation.processors import processed
from flextron.generation.sampling import SamplingParams, probabilities
from tests.checkpoints.families_cases import random_decoder_of, random_tokens

SIZE = 24
TOKENS = st.integers(0, SIZE - 1)
PENALTIES = st.just(0.0) | st.floats(-2, 2, width=32)
PARAMS = st.fixed_dictionaries(
    {},
    optional={
        "allowed_token_ids": st.lists(TOKENS, min_size=2, max_size=12, unique=True).map(tuple),
        "bad_words_ids": st.lists(st.lists(TOKENS, min_size=1, max_size=3).map(tuple), max_size=4, unique=True).map(
            tuple
        ),
        "min_tokens": st.integers(0, 6),
        "stop_token_ids": st.lists(TOKENS, max_size=2, unique=True).map(tuple),
        "logit_bias": st.dictionaries(TOKENS, st.floats(-100, 100, width=32), max_size=4),
        "repetition_penalty": st.floats(0.5, 2, width=32),
        "frequency_penalty": PENALTIES,
        "presence_penalty": PENALTIES,
    },
)


def expected(logits: torch.Tensor, p: SamplingParams, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """The processors of `transformers`; penalties of the answer by OpenAI's formula."""
    ids, scores = torch.tensor([[*prompt, *answer]]), logits[None].clone()
    steps: list[Any] = []
    if p.allowed_token_ids is not None:
        others = sorted(set(range(SIZE)) - set(p.allowed_token_ids))
        steps.append(stock.SuppressTokensLogitsProcessor(others))
    if p.bad_words_ids:
        steps.append(stock.NoBadWordsLogitsProcessor([list(word) for word in p.bad_words_ids]))
    if p.min_tokens and p.stop_token_ids:
        steps.append(stock.MinNewTokensLengthLogitsProcessor(len(prompt), p.min_tokens, list(p.stop_token_ids)))
    if p.logit_bias:
        steps.append(stock.SequenceBiasLogitsProcessor({(t,): float(bias) for t, bias in p.logit_bias.items()}))
    if p.repetition_penalty != 1:
        steps.append(stock.RepetitionPenaltyLogitsProcessor(p.repetition_penalty))
    for step in steps:
        scores = step(ids, scores)
    counts = torch.bincount(torch.tensor(answer, dtype=torch.long), minlength=SIZE)
    found: torch.Tensor = scores[0] - p.frequency_penalty * counts - p.presence_penalty * (counts > 0).float()
    return found


@settings(max_examples=300, deadline=None)
@given(
    params=PARAMS,
    seed=st.integers(0, 2**31),
    prompt=st.lists(TOKENS, min_size=1, max_size=8),
    answer=st.lists(TOKENS, max_size=8),
)
def test_scores_are_those_of_transformers(params: Any, seed: int, prompt: list[int], answer: list[int]) -> None:
    logits = 4 * torch.randn(SIZE, generator=torch.Generator().manual_seed(seed))
    before = logits.clone()
    p = SamplingParams(**params)
    found, wanted = processed(logits, p, prompt, answer), expected(logits, p, prompt, answer)
    assert torch.equal(logits, before)
    if wanted.isfinite().any():
        assert torch.equal(found, wanted)
    else:  # bad words and least lengths give way
        assert found.isfinite().any()


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    temperature=st.floats(0.2, 3),
    min_p=st.just(0.0) | st.floats(0.01, 1),
    top_k=st.integers(0, SIZE + 2),
    top_p=st.just(1.0) | st.floats(0.05, 0.99),
)
def test_what_is_drawn_from_is_that_of_transformers(
    seed: int, temperature: float, min_p: float, top_k: int, top_p: float
) -> None:
    logits = 3 * torch.randn(2, SIZE, generator=torch.Generator().manual_seed(seed))
    found = probabilities(logits, SamplingParams(temperature=temperature, min_p=min_p, top_k=top_k, top_p=top_p))
    steps: list[Any] = [stock.TemperatureLogitsWarper(temperature)]
    steps += [stock.MinPLogitsWarper(min_p)] if min_p else []
    steps += [stock.TopKLogitsWarper(top_k)] if top_k else []
    steps += [stock.TopPLogitsWarper(top_p)] if top_p < 1 else []
    scores = logits
    for step in steps:
        scores = step(torch.zeros(2, 0, dtype=torch.long), scores)
    wanted = scores.softmax(-1)
    assert torch.equal(found > 0, wanted > 0)
    torch.testing.assert_close(found / found.sum(-1, keepdim=True), wanted)


def test_ties_stay_as_in_transformers() -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0, 0.0]])
    assert (probabilities(logits, SamplingParams(temperature=1, top_k=1)) > 0).tolist() == [[False, True, True, False]]


def test_what_the_grammar_allows_wins() -> None:
    mask = torch.tensor([False, True, False])
    params = SamplingParams(allowed_token_ids=(0,), bad_words_ids=((1,),), stop_token_ids=(1,), min_tokens=2)
    assert processed(torch.zeros(3), params, [0], [], mask).isfinite().tolist() == mask.tolist()


def test_generation_counts_each_sequence_by_itself() -> None:
    decoder = random_decoder_of("llama")
    prompts = [random_tokens(n, seed=i).tolist() for i, n in enumerate((3, 6))]
    params = SamplingParams(max_tokens=12, frequency_penalty=2.0, repetition_penalty=1.5, min_tokens=4)
    alone = [generate(decoder, [prompt], decoder.widths, params)[0] for prompt in prompts]
    assert generate(decoder, prompts, decoder.widths, params) == alone
    assert alone != generate(decoder, prompts, decoder.widths, SamplingParams(max_tokens=12))


@pytest.mark.parametrize(
    "params", [{"logit_bias": {67: 1.0}}, {"allowed_token_ids": (-1,)}, {"bad_words_ids": ((99,),)}]
)
def test_tokens_that_the_model_does_not_have_are_refused(params: Any) -> None:
    decoder = random_decoder_of("llama")
    with pytest.raises(FlextronError, match="outside the model's vocabulary of 67"):
        generate(decoder, [[1]], decoder.widths, SamplingParams(max_tokens=2, **params))
