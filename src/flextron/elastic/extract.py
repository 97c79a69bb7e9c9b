"""A sub-network as a model of its own: the prefixes, copied out."""

from __future__ import annotations

import torch

from flextron.errors import FlextronError
from flextron.model.decoder import Decoder
from flextron.spec import SubnetSpec

__all__ = ["extract"]


@torch.no_grad()
def extract(decoder: Decoder, spec: SubnetSpec) -> Decoder:
    """Copy a sub-network out of a decoder.

    Args:
        decoder: the model that holds it.
        spec: nested in the decoder's widths.

    Returns:
        A decoder with just those weights, on the same device, sharing no memory.

    Raises:
        FlextronError: the spec is wider than the decoder, or names other layers.
    """
    if not spec.is_nested_in(decoder.widths):
        raise FlextronError(
            f"the sub-network ({spec.describe()}) is not nested in the model ({decoder.widths.describe()})"
        )
    with torch.device("meta"):
        small = Decoder(decoder.config, spec)
    small.to_empty(device=decoder.device).to(decoder.dtype)
    source = dict(decoder.named_parameters())
    for name, parameter in small.named_parameters():
        prefix = tuple(slice(0, n) for n in parameter.shape)
        parameter.copy_(source[name][prefix])
    return small
