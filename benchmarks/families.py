"""Tiny random models of every family against transformers: logits, gradients, greedy tokens."""

from __future__ import annotations

import torch

from flextron.checkpoints.weights import stock_tensors
from flextron.generation.generate import generate
from flextron.generation.sampling import SamplingParams
from tests.checkpoints.families_cases import (
    CASES,
    decoder_of,
    hf_greedy,
    our_logits,
    random_model,
    random_tokens,
    relative_error,
)

__all__ = ["worst_family_error"]


def _errors(case: str) -> tuple[float, bool]:
    """Largest relative error of logits and gradients, and whether 32 greedy tokens are equal."""
    theirs = random_model(case)
    ours = decoder_of(theirs).requires_grad_(True)
    tokens = random_tokens(2, 24)
    reference = theirs(tokens, use_cache=False).logits
    logits = our_logits(ours, tokens)
    errors = [relative_error(logits, reference)]
    reference.logsumexp(-1).sum().backward()
    logits.logsumexp(-1).sum().backward()
    wanted = dict(theirs.named_parameters())
    for name, gradient in stock_tensors(ours, {n: p.grad for n, p in ours.named_parameters()}):
        errors.append(relative_error(gradient, wanted[name if name in wanted else "lm_head.weight"].grad))
    prompt = random_tokens(12).tolist()
    with torch.no_grad():
        same = generate(ours, [prompt], ours.widths, SamplingParams(max_tokens=32))[0] == hf_greedy(theirs, prompt, 32)
    return max(errors), same


def worst_family_error() -> tuple[float, str, bool]:
    """Largest error over all cases, the case it is of, and whether all greedy tokens are equal."""
    results = {case: _errors(case) for case in CASES}
    worst = max(results, key=lambda case: results[case][0])
    return results[worst][0], worst, all(same for _, same in results.values())
