"""Sub-networks widened with zeros: the same function in widths that a format can hold.

The padding is exact. A neuron with weights and biases of 0 gives 0 under every activation of the supported families; a
head whose values are 0 gives 0, whatever its scores; and a half that the sub-network skips adds 0.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from flextron.elastic import extract
from flextron.errors import FlextronError
from flextron.model.config import DecoderConfig
from flextron.model.decoder import Decoder
from flextron.spec import SubnetSpec

__all__ = ["FILL", "least_uniform", "widened"]

FILL = 32
"""Neurons of zeros that stand for an MLP which is skipped: one block of the quantised formats."""


@torch.no_grad()
def widened(decoder: Decoder, spec: SubnetSpec, widths: SubnetSpec) -> Decoder:
    """A copy of a sub-network, with zeros up to the given widths.

    Args:
        decoder: the model that holds the sub-network.
        spec: the sub-network, nested in `widths` and in the decoder.
        widths: widths of the copy; they may exceed the decoder's.
    """
    small = extract(decoder, spec)
    if widths == spec:
        return small
    with torch.device("meta"):
        wide = Decoder(decoder.config, widths)
    wide.to_empty(device=decoder.device).to(decoder.dtype)
    own = dict(small.named_parameters())
    for name, parameter in wide.named_parameters():
        parameter.zero_()
        if name in own:
            parameter[tuple(slice(0, n) for n in own[name].shape)] = own[name]
    return wide


def least_uniform(config: DecoderConfig, spec: SubnetSpec, check: Callable[[SubnetSpec], object]) -> SubnetSpec:
    """The narrowest equal widths in all kept layers that hold a sub-network.

    Args:
        config: the full model's.
        spec: the sub-network.
        check: raises `FlextronError` for widths that are no good.

    Raises:
        FlextronError: what `check` said of the widest.
    """
    skipped = set(range(len(spec.layers))) - set(spec.kept_layers)
    width, refusal = max(*spec.intermediate_sizes, min(FILL, config.intermediate_size)), None
    for groups in range(max(*spec.num_groups, 1), config.num_groups + 1):
        widths = SubnetSpec.uniform(
            num_hidden_layers=len(spec.layers), intermediate_size=width, num_groups=groups, skip=skipped
        )
        try:
            check(widths)
        except FlextronError as error:
            refusal = error
        else:
            return widths
    assert refusal is not None
    raise refusal
