"""How likely a sub-network finds continuations of contexts, which is how multiple-choice tasks are scored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from flextron.errors import FlextronError
from flextron.losses.likelihoods import token_scores
from flextron.model.batch import Batch
from flextron.model.decoder import Decoder
from flextron.scoring.branches import BranchedAttention, Forest
from flextron.spec import SubnetSpec

__all__ = ["Continuation", "Score", "score_continuations"]


@dataclass(frozen=True, slots=True)
class Continuation:
    """Tokens that may follow others."""

    context: tuple[int, ...]
    """Token ids that are read, at least one."""
    continuation: tuple[int, ...]
    """Token ids that are scored, at least one."""

    def __post_init__(self) -> None:
        """Refuse what nothing can be said about."""
        if not self.context or not self.continuation:
            raise FlextronError("there is nothing to score; give at least one token of context and one that follows")

    @property
    def inputs(self) -> tuple[int, ...]:
        """What runs: nothing is predicted from the last token."""
        return self.context + self.continuation[:-1]


@dataclass(frozen=True, slots=True)
class Score:
    """How well a model predicts a continuation."""

    log_likelihood: float
    """Sum over its tokens, in nats."""
    is_greedy: bool
    """Whether each of its tokens is the likeliest at its place."""


@torch.inference_mode()
def score_continuations(
    decoder: Decoder,
    asked: Sequence[Continuation],
    spec: SubnetSpec,
    *,
    batch_size: int = 16,
    on_done: Callable[[int, int], None] | None = None,
) -> list[Score]:
    """How likely a sub-network finds continuations of contexts, in the order in which they are asked.

    Nothing is padded. What neighbours in a batch begin with runs once, and so do equal sequences, such as those of
    answers of one token. Logits live in chunks, and only of tokens that are scored.

    Args:
        decoder: holds the sub-network.
        asked: contexts and continuations.
        spec: the sub-network.
        batch_size: different sequences of a forward pass.
        on_done: called with continuations scored and in all.

    Raises:
        FlextronError: a context and its continuation exceed learned positions.
    """
    by_inputs: dict[tuple[int, ...], list[int]] = {}
    for i, one in enumerate(asked):
        decoder.config.check_length(len(one.inputs))
        by_inputs.setdefault(one.inputs, []).append(i)
    # so that those that begin alike are neighbours
    inputs = sorted(by_inputs)
    scores: dict[int, Score] = {}
    for start in range(0, len(inputs), batch_size):
        batch = inputs[start : start + batch_size]
        places = [(sequence, i) for sequence, tokens in enumerate(batch) for i in by_inputs[tokens]]
        found = _score_batch(decoder, batch, [(sequence, asked[i].continuation) for sequence, i in places], spec)
        scores.update(zip((i for _, i in places), found, strict=True))
        if on_done is not None:
            on_done(len(scores), len(asked))
    return [scores[i] for i in range(len(asked))]


def _score_batch(
    decoder: Decoder, inputs: list[tuple[int, ...]], asked: list[tuple[int, tuple[int, ...]]], spec: SubnetSpec
) -> list[Score]:
    """Scores of (index of its inputs, continuation)."""
    forest, device = Forest.of(inputs), decoder.device
    parts = [torch.tensor(part, device=device) for part in forest.parts]
    h_ND = decoder(Batch.ragged(parts, [spec] * len(parts), forest.starts), BranchedAttention(decoder.config, forest))
    rows = [row for sequence, tokens in asked for row in forest.last_rows(sequence, len(tokens))]
    targets = torch.tensor([token for _, tokens in asked for token in tokens], device=device)
    lengths = [len(tokens) for _, tokens in asked]
    log_p, is_likeliest = token_scores(
        h_ND[torch.tensor(rows, device=device)], decoder.head_weight, targets, decoder.config.logits_cap
    )
    return [
        Score(float(own.double().sum()), bool(greedy.all()))
        for own, greedy in zip(log_p.split(lengths), is_likeliest.split(lengths), strict=True)
    ]
