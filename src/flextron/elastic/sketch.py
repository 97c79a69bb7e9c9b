"""Some numbers of a model's weights, by which other weights of the same shape can be told from them.

A digest tells equal from different. What goes beside a model should also be taken by the same model in other words:
rounded to bfloat16, or read from a file of eight bits. So a few numbers of each matrix are kept, and a distance.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flextron.errors import FlextronError
from flextron.model.decoder import Decoder

__all__ = ["check_sketch", "is_like", "sketch"]

_NUM_SAMPLES = 16
_LARGEST_DISTANCE = 0.03
"""Eight bits by blocks of 32 change weights by 0.7 % of their size, bfloat16 by 0.2 %; four bits by 8 %."""


@torch.no_grad()
def sketch(decoder: Decoder) -> Tensor:
    """16 numbers of each matrix, evenly spaced; float32, on the CPU."""
    matrices = (p.detach().flatten() for p in decoder.parameters() if p.dim() == 2)
    return torch.cat([flat[:: max(1, len(flat) // _NUM_SAMPLES)][:_NUM_SAMPLES].float().cpu() for flat in matrices])


def check_sketch(decoder: Decoder, wanted: Tensor, name: str) -> None:
    """Raise unless a decoder has about the weights of a sketch.

    Args:
        decoder: in the order in which the sketch was made.
        wanted: a result of `sketch`.
        name: name of the base that was meant.

    Raises:
        FlextronError: the weights are others.
    """
    remedy = f"give the base for which it was made: {name}"
    if (distance := _distance(decoder, wanted)) is None:
        raise FlextronError(f"the elastic adapter is for a model of another shape; {remedy}")
    if not distance <= _LARGEST_DISTANCE:
        raise FlextronError(
            f"the elastic adapter is for other weights than these, which are {distance:.0%} away; {remedy}"
        )


def is_like(decoder: Decoder, wanted: Tensor) -> bool:
    """Whether a decoder has about the weights of a sketch, in its order."""
    distance = _distance(decoder, wanted)
    return distance is not None and distance <= _LARGEST_DISTANCE


def _distance(decoder: Decoder, wanted: Tensor) -> float | None:
    """Relative distance of a decoder's weights from a sketch; None if the shapes differ."""
    found = sketch(decoder)
    if found.shape != wanted.shape:
        return None
    return float((found - wanted).norm() / wanted.norm().clamp_min(1e-30))
