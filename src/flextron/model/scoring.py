"""How well a sub-network predicts text: its mean loss over fixed windows of tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from flextron.model.batch import Batch, TokenChoice
from flextron.model.decoder import Decoder
from flextron.model.losses import token_losses
from flextron.spec import SubnetSpec

__all__ = ["mean_loss"]

_CHUNK_SEQUENCES = 4


@torch.no_grad()
def mean_loss(decoder: Decoder, tokens_BT: Tensor, spec: SubnetSpec, router: TokenChoice | None = None) -> float:
    """Mean negative log-likelihood, in nats, of every token but the first of each window.

    Args:
        decoder: holds the sub-network.
        tokens_BT: B windows of T token ids.
        spec: the sub-network.
        router: chooses the MLP width of each token; by default all have the spec's.

    Raises:
        FlextronError: the windows exceed the model's positions, or the router is of another model.
    """
    decoder.config.check_length(tokens_BT.shape[1])
    if router is not None:
        router.check(decoder.config, spec)
    losses = []
    for chunk in tokens_BT.to(decoder.device).split(_CHUNK_SEQUENCES):
        h_BTD = decoder(Batch.padded(chunk, spec, router)).unflatten(0, tuple(chunk.shape))
        losses.append(token_losses(h_BTD[:, :-1].flatten(0, 1), decoder.head_weight, chunk[:, 1:].flatten()))
    return float(torch.cat(losses).double().mean())
