"""Which weights a model has, in a few letters: enough to tell that what was made for others does not go with them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

from flextron.model.decoder import Decoder

__all__ = ["fingerprint", "weights_digest"]

_NUM_SAMPLES = 4096
_NUM_MATRIX_SAMPLES = 256


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


@torch.no_grad()
def weights_digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Digest of a checkpoint's matrices, by shape and up to 256 numbers each; the same however it is stored.

    Names, order, shards, precision and a second copy of tied matrices make no difference. Tensors of mapped files are
    read at the sampled places only.
    """
    found = set()
    for _, tensor in tensors:
        if tensor.dim() != 2 or not tensor.numel():
            continue
        flat = tensor.flatten()
        sample = flat[:: -(-len(flat) // _NUM_MATRIX_SAMPLES)].to("cpu", torch.bfloat16).contiguous()
        found.add(str(tuple(tensor.shape)).encode() + sample.view(torch.uint8).numpy().tobytes())
    digest = hashlib.sha256()
    for part in sorted(hashlib.sha256(one).digest() for one in found):
        digest.update(part)
    return digest.hexdigest()[:32]
