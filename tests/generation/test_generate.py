"""Generation with a cache against Hugging Face's model without one; sampling against the definition of a nucleus."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from flextron.errors import FlextronError
from flextron.generation.generate import SamplingParams, generate, sample
from flextron.spec import SubnetSpec
from tests.checkpoints.families_cases import (
    decoder_of,
    hf_greedy,
    hf_logits,
    random_decoder_of,
    random_model,
    random_tokens,
)

PROMPTS = [random_tokens(n, seed=i).tolist() for i, n in enumerate((4, 9, 1, 4))]


@pytest.mark.parametrize("case", ["llama-mqa", "mistral", "gpt2", "neox"])
def test_greedy_batch_equals_transformers_prompt_by_prompt(case: str) -> None:
    model = random_model(case)
    decoder = decoder_of(model)
    out = generate(decoder, PROMPTS, decoder.widths, SamplingParams(max_tokens=12))
    expected = [hf_greedy(model, prompt, 12) for prompt in PROMPTS]
    assert out == expected
    assert len({tuple(tokens) for tokens in expected}) == len(PROMPTS)


@pytest.mark.parametrize("spec", [SubnetSpec.of([40, 0, 8], [1, 2, 0]), SubnetSpec.of([8, 8, 8], [1, 1, 1])])
def test_greedy_batch_in_a_subnetwork_equals_one_by_one(spec: SubnetSpec) -> None:
    decoder = random_decoder_of("llama-3")
    params = SamplingParams(max_tokens=10)
    alone = [generate(decoder, [prompt], spec, params)[0] for prompt in PROMPTS]
    assert generate(decoder, PROMPTS, spec, params) == alone
    assert alone != generate(decoder, PROMPTS, decoder.widths, params)


def test_stop_tokens_end_a_sequence_and_leave_the_others() -> None:
    decoder = random_decoder_of("llama")
    free = generate(decoder, PROMPTS, decoder.widths, SamplingParams(max_tokens=16))
    stop = free[1][3]
    stopped = generate(decoder, PROMPTS, decoder.widths, SamplingParams(max_tokens=16, stop_token_ids=(stop,)))
    assert stopped == [tokens[: tokens.index(stop)] if stop in tokens else tokens for tokens in free]
    assert len(stopped[1]) <= 3


def test_a_seed_reproduces_and_another_differs() -> None:
    decoder = random_decoder_of("llama")

    def draw(seed: int) -> list[list[int]]:
        return generate(decoder, PROMPTS, decoder.widths, SamplingParams(max_tokens=12, temperature=1.0, seed=seed))

    first = draw(5)
    torch.manual_seed(99)  # the global generator has no part in it
    assert draw(5) == first
    assert draw(6) != first


def test_samples_follow_the_models_distribution() -> None:
    model = random_model("llama")
    decoder = decoder_of(model)
    num_draws, prompt = 4000, PROMPTS[0]
    params = SamplingParams(max_tokens=1, temperature=2.0, seed=1)
    drawn = generate(decoder, [prompt] * num_draws, decoder.widths, params)
    counts = torch.bincount(torch.tensor(drawn).flatten(), minlength=67)
    p = torch.softmax(hf_logits(model, torch.tensor([prompt]))[0, -1].double() / 2.0, -1)
    chi_square = float(((counts - num_draws * p) ** 2 / (num_draws * p)).sum())
    # mean 66, deviation sqrt(132) if the draws follow p
    assert chi_square < 66 + 6 * math.sqrt(132)


@pytest.mark.parametrize("temperature", [5e-324, 1e-320, 1e-40, 1e-6])
@pytest.mark.parametrize("top_p", [1.0, 1e-320])
def test_tiny_temperatures_are_greedy(temperature: float, top_p: float) -> None:
    logits = torch.randn(4, 9) * 1e3
    params = SamplingParams(temperature=temperature, top_p=top_p)
    assert torch.equal(sample(logits, params, None), logits.argmax(-1))


@pytest.mark.parametrize("temperature", [0.5, 1e308])
@pytest.mark.parametrize("top_p", [5e-324, 1e-40])
def test_the_smallest_nucleus_is_the_likeliest_token(temperature: float, top_p: float) -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0]])
    assert sample(logits, SamplingParams(temperature=temperature, top_p=top_p), None) in (0, 1, 2)
    if temperature < 1:
        assert sample(logits, SamplingParams(temperature=temperature, top_p=top_p), None) == 1


@pytest.mark.parametrize("top_p", [0.05, 0.4, 0.65, 0.9])
def test_nothing_outside_the_nucleus_is_drawn_and_all_inside_is(top_p: float) -> None:
    p = torch.tensor([0.05, 0.3, 0.02, 0.25, 0.2, 0.1, 0.08])
    nucleus: set[int] = set()
    for token in p.argsort(descending=True).tolist():
        if sum(float(p[t]) for t in nucleus) < top_p - 1e-6:
            nucleus.add(token)
    logits = p.log().expand(6000, -1)
    params = SamplingParams(temperature=1.0, top_p=top_p)
    tokens = sample(logits, params, torch.Generator().manual_seed(0))
    assert set(tokens.tolist()) == nucleus
    share = torch.bincount(tokens, minlength=7) / 6000
    inside = torch.tensor([t in nucleus for t in range(7)])
    torch.testing.assert_close(share, p * inside / p[inside].sum(), rtol=0, atol=0.03)


def test_temperature_sharpens() -> None:
    logits = torch.tensor([[0.0, 0.5, 0.2]]).expand(2000, -1)
    shares = []
    for temperature in (10.0, 1.0, 0.1):
        params = SamplingParams(temperature=temperature)
        drawn = sample(logits, params, torch.Generator().manual_seed(0))
        shares.append(float((drawn == 1).float().mean()))
        expected = torch.softmax(logits[0] / temperature, -1)[1]
        assert abs(shares[-1] - float(expected)) < 0.04
    assert shares == sorted(shares)
    assert sample(logits, SamplingParams(), None).tolist() == [1] * 2000


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"max_tokens": -1}, "max_tokens must be at least 0"),
        ({"min_tokens": 65}, r"min_tokens \(65\) must be at most max_tokens \(64\)"),
        ({"top_k": -1}, "top_k must be at least 0"),
        ({"min_p": 1.1}, r"min_p must lie in \[0, 1\]"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be a number above 0"),
        ({"presence_penalty": float("nan")}, "presence_penalty must be a number"),
        ({"frequency_penalty": float("inf")}, "frequency_penalty must be a number"),
        ({"logit_bias": {1: float("inf")}}, "logit_bias must hold numbers"),
        ({"allowed_token_ids": ()}, "allowed_token_ids is empty"),
        ({"bad_words_ids": ((1,), ())}, "a sequence of bad_words_ids is empty"),
        ({"temperature": -0.1}, "temperature must be"),
        ({"temperature": float("inf")}, "temperature must be"),
        ({"temperature": float("nan")}, "temperature must be"),
        ({"top_p": 0.0}, r"top_p must lie in \(0, 1\]"),
        ({"top_p": 1.1}, r"top_p must lie in \(0, 1\]"),
        ({"top_p": float("nan")}, r"top_p must lie in \(0, 1\]"),
    ],
)
def test_senseless_parameters_are_refused(params: dict[str, Any], message: str) -> None:
    with pytest.raises(FlextronError, match=message):
        SamplingParams(**params)


def test_empty_and_overlong_prompts_are_refused() -> None:
    decoder = random_decoder_of("gpt2")
    with pytest.raises(FlextronError, match="prompt is empty"):
        generate(decoder, [[1, 2], []], decoder.widths, SamplingParams(max_tokens=2))
    with pytest.raises(FlextronError, match=r"come to 65 tokens, .* context length of 64"):
        generate(decoder, [[1] * 60], decoder.widths, SamplingParams(max_tokens=5))
    assert len(generate(decoder, [[1] * 60], decoder.widths, SamplingParams(max_tokens=4))[0]) == 4


def test_no_prompts_give_no_answers() -> None:
    decoder = random_decoder_of("llama")
    assert generate(decoder, [], decoder.widths, SamplingParams(max_tokens=2)) == []


@pytest.mark.parametrize("token", [67, -1])
def test_tokens_outside_the_vocabulary_are_refused(token: int) -> None:
    decoder = random_decoder_of("llama")
    with pytest.raises(FlextronError):
        generate(decoder, [[1, token]], decoder.widths, SamplingParams(max_tokens=2))
