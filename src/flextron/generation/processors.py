"""Changes of scores that depend on the tokens so far, in vLLM's order.

The order is: the grammar's mask (`constraints`), `allowed_token_ids`, bad words, `min_tokens`, `logit_bias`,
`repetition_penalty`, `frequency_penalty`, `presence_penalty`. All are functions of prompt and answer, so drafted tokens
are checked with the scores that they would have been drawn from one by one. Bad words count where their beginning
stands in the prompt, too, as in `transformers`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flextron.errors import FlextronError
from flextron.generation.sampling import SamplingParams

__all__ = ["check_named_tokens", "processed"]


def processed(
    logits_V: Tensor, params: SamplingParams, prompt: Sequence[int], answer: Sequence[int], mask_V: Tensor | None = None
) -> Tensor:
    """Scores of the next token as its choice sees them.

    Args:
        logits_V: the model's scores; they stay as they are.
        params: the settings.
        prompt: token ids of the prompt.
        answer: token ids after it.
        mask_V: true where a grammar allows the token; None if there is none.
    """
    scores_V = logits_V.float()
    # a copy in either case, in one pass
    scores_V = scores_V.clone() if mask_V is None else torch.where(mask_V.to(scores_V.device), scores_V, -torch.inf)
    if params.allowed_token_ids is not None:
        scores_V = _only(scores_V, params.allowed_token_ids)
    banned = _ends_of_bad_words(params.bad_words_ids, [*prompt, *answer]) if params.bad_words_ids else set()
    if len(answer) < params.min_tokens:
        banned.update(params.stop_token_ids)
    if banned:
        scores_V = _without(scores_V, banned)
    if params.logit_bias:
        ids = torch.tensor(list(params.logit_bias), device=scores_V.device)
        scores_V[ids] += torch.tensor(list(params.logit_bias.values()), device=scores_V.device)
    if params.repetition_penalty != 1:
        ids = torch.tensor(list({*prompt, *answer}), device=scores_V.device)
        seen, penalty = scores_V[ids], params.repetition_penalty
        scores_V[ids] = torch.where(seen < 0, seen * penalty, seen / penalty)
    if answer and (params.frequency_penalty or params.presence_penalty):
        ids, counts = torch.tensor(answer, device=scores_V.device).unique(return_counts=True)
        scores_V[ids] -= params.frequency_penalty * counts
        scores_V[ids] -= params.presence_penalty
    return scores_V


def check_named_tokens(params: SamplingParams, vocab_size: int) -> None:
    """Refuse settings that name tokens that the model does not have.

    Raises:
        FlextronError: there is one.
    """
    if not all(0 <= token < vocab_size for token in params.named_tokens):
        raise FlextronError(
            f"logit_bias, allowed_token_ids or bad words name tokens outside the model's vocabulary of {vocab_size}"
        )


def _only(scores_V: Tensor, allowed: Sequence[int]) -> Tensor:
    kept_V = torch.full_like(scores_V, -torch.inf)
    ids = torch.tensor(allowed, device=scores_V.device)
    kept_V[ids] = scores_V[ids]
    return kept_V if kept_V.isfinite().any() else scores_V


def _without(scores_V: Tensor, banned: set[int]) -> Tensor:
    """Without these tokens, unless nothing would be left."""
    ids = torch.tensor(sorted(banned), device=scores_V.device)
    left_V = scores_V.index_fill(0, ids, -torch.inf)
    return left_V if left_V.isfinite().any() else scores_V


def _ends_of_bad_words(words: Sequence[tuple[int, ...]], tokens: Sequence[int]) -> set[int]:
    """The last tokens of those words whose other tokens are the last so far."""
    return {word[-1] for word in words if len(word) == 1 or tuple(tokens[1 - len(word) :]) == word[:-1]}
