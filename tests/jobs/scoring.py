"""Examples scored by a plain decoder, one by one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from flextron.finetuning.example import Example
from flextron.model.adapter import Adapter
from flextron.model.batch import Batch
from flextron.model.decoder import Decoder

__all__ = ["score"]


@torch.no_grad()
def score(decoder: Decoder, adapter: Adapter, data: Sequence[Example]) -> tuple[float, float]:
    """Mean loss and share of right tokens, by the textbook."""
    logits, targets = [], []
    for e in data:
        tokens, is_trained = torch.tensor(list(e.tokens)), torch.tensor(list(e.mask[1:]), dtype=torch.bool)
        out = decoder.logits(decoder(Batch.ragged([tokens], [decoder.widths], adapters=[adapter])))
        logits.append(out[:-1][is_trained])
        targets.append(tokens[1:][is_trained])
    scores, wanted = torch.cat(logits), torch.cat(targets)
    return float(F.cross_entropy(scores, wanted)), float((scores.argmax(-1) == wanted).float().mean())
