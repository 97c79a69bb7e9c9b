"""Perplexity over fixed sequences of tokens. It is per token, and no `word_perplexity` of lm-eval."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from flextron.model.decoder import Decoder
from flextron.model.scoring import mean_loss
from flextron.spec import SubnetSpec

__all__ = ["Perplexity", "evaluate_perplexity"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Perplexity:
    """How well a sub-network predicts a text."""

    loss: float
    """Mean negative log-likelihood in nats a token."""
    num_tokens: int
    """Tokens that were predicted: all but the first of each sequence."""

    @property
    def perplexity(self) -> float:
        """Exponential of the loss."""
        return math.exp(self.loss)


def evaluate_perplexity(decoder: Decoder, tokens_BT: Tensor, spec: SubnetSpec) -> Perplexity:
    """Evaluate a sub-network on B sequences of T tokens."""
    batch_size, length = tokens_BT.shape
    return Perplexity(loss=mean_loss(decoder, tokens_BT, spec), num_tokens=batch_size * (length - 1))
