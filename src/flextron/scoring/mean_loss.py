"""Mean loss of a sub-network over fixed sequences, and its perplexity.

The perplexity is per token, and no `word_perplexity` of lm-eval.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from flextron.losses.likelihoods import token_losses
from flextron.model.batch import Batch, TokenChoice
from flextron.model.decoder import Decoder
from flextron.spec import SubnetSpec

__all__ = ["Perplexity", "evaluate_perplexity", "mean_loss"]

_CHUNK_SEQUENCES = 4


@torch.no_grad()
def mean_loss(decoder: Decoder, tokens_BT: Tensor, spec: SubnetSpec, router: TokenChoice | None = None) -> float:
    """Mean negative log-likelihood, in nats, of every token but the first of each sequence.

    Args:
        decoder: holds the sub-network.
        tokens_BT: B sequences of T token ids.
        spec: the sub-network.
        router: chooses the MLP width of each token; by default all have the spec's.

    Raises:
        FlextronError: the sequences exceed the model's positions, or the router is of another model.
    """
    decoder.config.check_length(tokens_BT.shape[1])
    if router is not None:
        router.check(decoder.config, spec)
    losses = []
    for chunk in tokens_BT.to(decoder.device).split(_CHUNK_SEQUENCES):
        h_BTD = decoder(Batch.padded(chunk, spec, router)).unflatten(0, tuple(chunk.shape))
        losses.append(
            token_losses(
                h_BTD[:, :-1].flatten(0, 1), decoder.head_weight, chunk[:, 1:].flatten(), decoder.config.logits_cap
            )
        )
    return float(torch.cat(losses).double().mean())


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
