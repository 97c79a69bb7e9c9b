"""Log-probabilities that are reported beside tokens: those of an answer, and those of a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Logprobs", "answer_logprobs", "prompt_logprobs"]

_AT_ONCE = 32
"""Positions whose log-probabilities are held at once."""


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Natural logarithms of the model's probabilities at one position, before everything that sampling changes."""

    chosen: float
    top: tuple[tuple[int, float], ...]
    """The most likely tokens, as many as were asked for, the likeliest first."""
    rank: int = 0
    """Place of the chosen token among all, counted from 1; 0 where it was not computed."""


def answer_logprobs(logits_V: Tensor, token: int, count: int | None) -> Logprobs | None:
    """Log-probabilities at one position; None if they were not asked for."""
    return None if count is None else _logprobs(logits_V[None], [token], count)[0]


def prompt_logprobs(logits_TV: Tensor, tokens: Sequence[int], count: int) -> list[Logprobs]:
    """Log-probabilities of tokens that are known, some positions at a time.

    Args:
        logits_TV: scores before each token.
        tokens: T token ids.
        count: most likely tokens to report beside each.
    """
    found: list[Logprobs] = []
    for i in range(0, len(tokens), _AT_ONCE):
        found += _logprobs(logits_TV[i : i + _AT_ONCE], tokens[i : i + _AT_ONCE], count)
    return found


def _logprobs(logits_TV: Tensor, tokens: Sequence[int], count: int) -> list[Logprobs]:
    logprobs_TV = logits_TV.float().log_softmax(-1)
    chosen_T1 = logprobs_TV.gather(1, torch.tensor(tokens, device=logits_TV.device)[:, None])
    ranks = ((logprobs_TV > chosen_T1).sum(-1) + 1).tolist()
    top = logprobs_TV.topk(min(count, logprobs_TV.shape[-1]))
    pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return [
        Logprobs(chosen, tuple(zip(ids, values, strict=True)), rank)
        for chosen, (ids, values), rank in zip(chosen_T1[:, 0].tolist(), pairs, ranks, strict=True)
    ]
