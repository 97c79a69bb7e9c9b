"""Which weights a model has, in a few letters: enough to tell that what was made for others does not go with them."""

from __future__ import annotations

import hashlib

import torch

from flextron.model.decoder import Decoder

__all__ = ["fingerprint"]

_NUM_SAMPLES = 4096


@torch.no_grad()
def fingerprint(decoder: Decoder) -> str:
    """Digest of each weight's shape and of up to 4,096 of its numbers, evenly spaced and rounded to bfloat16.

    Training changes nearly every number, so that a sample shows it; and rounded, they are the same on a device where
    the model runs in less than the checkpoint's precision. Names in this program are left out: they may change.
    """
    digest = hashlib.sha256()
    for parameter in decoder.parameters():
        flat = parameter.detach().flatten()
        sample = flat[:: -(-len(flat) // _NUM_SAMPLES)].to("cpu", torch.bfloat16)
        digest.update(f"{tuple(parameter.shape)}".encode())
        digest.update(sample.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]
