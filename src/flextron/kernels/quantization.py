"""Weights of eight and of four bits, for the compiled iteration.

Rows are the nested dimension of every matrix, and no scale spans two rows: a sub-network's prefix has the same numbers
as the whole.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "GROUP",
    "PANEL_ROWS",
    "QUAD",
    "column_scales",
    "pack_groups",
    "pack_panels",
    "quantize_groups",
    "quantize_rows",
    "row_errors",
]

GROUP = 32
"""Columns that share a scale of four-bit weights."""
PANEL_ROWS, QUAD = 16, 4
"""Outputs of a panel of eight-bit weights, and inputs of an output that lie beside each other in it."""
_STEPS = (-8.0, -7.4, -8.7, -6.9, 7.6, -9.5)
"""What the number of largest magnitude in a group becomes, before rounding, in the scales that are tried."""
_BLOCK = 2**16
"""Numbers that are quantized at once: they stay in the cache."""


def column_scales(weight: Tensor) -> Tensor:
    """Root mean squares of columns.

    Where columns are outputs, some are many times as large as others, and would take all the steps of the scales that
    they share. Divided by these before they are rounded, all have the same size; a product is multiplied at its end.

    Args:
        weight: (rows, columns).

    Returns:
        (columns,) float32.
    """
    return weight.detach().float().square().mean(0).sqrt().clamp_min(1e-30)


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 by rows: the nearest of 255 multiples of each row's scale.

    Args:
        weight: (rows, columns).

    Returns:
        (rows, columns) int8, and (rows,) float32 scales.
    """
    scales = weight.detach().float().abs().amax(1).clamp_min(1e-12) / 127
    return (weight.detach() / scales[:, None]).round().to(torch.int8), scales


def row_errors(weight: Tensor, numbers: Tensor, scales: Tensor) -> Tensor:
    """How far products with a quantized row can be from those with the row itself, for inputs of norm 1.

    That is the norm of the difference (Cauchy and Schwarz), and what float32 may lose in both sums.

    Args:
        weight: (rows, columns).
        numbers: (rows, columns) int8, of `quantize_rows`.
        scales: (rows,) of the same.

    Returns:
        (rows,) float32.
    """
    errors = torch.empty(len(weight))
    rounding = 4 * weight.shape[1] * torch.finfo(torch.float32).eps
    step = max(1, _BLOCK // weight.shape[1])
    for i in range(0, len(weight), step):
        rows = weight.detach()[i : i + step].float()
        lost = rows - numbers[i : i + step] * scales[i : i + step, None]
        errors[i : i + step] = lost.norm(dim=1) * (1 + rounding) + rounding * rows.norm(dim=1)
    return errors


def quantize_groups(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Four bits by groups of 32 columns: multiples, -8 to 7, of each group's scale, which may be negative.

    Of a few scales that map the number of largest magnitude near to -8, each group gets the one with the least sum of
    squared errors.

    Args:
        weight: (rows, columns); columns a multiple of 32.

    Returns:
        (rows, columns) int8, and (rows, columns / 32) bfloat16 scales.
    """
    groups = weight.detach().float().reshape(-1, GROUP)
    numbers = torch.empty(groups.shape, dtype=torch.int8)
    scales = torch.empty(len(groups), dtype=torch.bfloat16)
    for block, own, scale in zip(
        *(t.split(_BLOCK // GROUP) for t in (groups, numbers, scales)),
        strict=True,
    ):
        _quantize_block(block, own, scale)
    return numbers.view(weight.shape), scales.view(len(weight), -1)


def _quantize_block(groups: Tensor, numbers: Tensor, scales: Tensor) -> None:
    """(groups, 32) into numbers and scales, in place."""
    largest = groups.gather(1, groups.abs().argmax(1, keepdim=True))
    groups = (groups / largest).nan_to_num_(0, 0, 0)
    best = torch.full_like(largest, -1.0)
    chosen, factor = torch.zeros_like(groups), torch.zeros_like(largest)
    # the error is sum(w^2) - sum(w q)^2 / sum(q^2), with the best scale for these q
    for step in _STEPS:
        q = (groups * step).round_().clamp_(-8, 7)
        product, square = (groups * q).sum(1, keepdim=True), (q * q).sum(1, keepdim=True).clamp_min_(1)
        gain = product * product / square
        better = gain > best
        best = torch.where(better, gain, best)
        chosen = torch.where(better, q, chosen)
        factor = torch.where(better, product / square, factor)
    factor *= largest
    numbers.copy_(chosen)
    scales.copy_(factor[:, 0])


def pack_groups(numbers: Tensor) -> Tensor:
    """Four-bit numbers as dot products read them, in blocks of two groups, the last one filled up.

    Two bytes hold column i of the first group, columns i and 16 + i of the second, and column 16 + i of the first, each
    + 8, from the lowest bits.

    Args:
        numbers: (rows, columns) int8, -8 to 7.

    Returns:
        (rows, columns / 2) uint8, columns rounded up to a multiple of 64.
    """
    filled = torch.nn.functional.pad(numbers + 8, (0, numbers.shape[1] % (2 * GROUP)))
    parts = filled.to(torch.uint8).view(len(numbers), -1, 4, GROUP // 2)
    low, high = parts[:, :, 0] | parts[:, :, 2] << 4, parts[:, :, 3] | parts[:, :, 1] << 4
    return torch.stack([low, high], -1).flatten(1)


def pack_panels(numbers: Tensor) -> Tensor:
    """Eight-bit numbers as products of whole numbers read them.

    Args:
        numbers: (outputs, inputs) int8.

    Returns:
        (panels of 16 outputs, fours of inputs, 16, 4) uint8: numbers + 128, and 128 where there is nothing.
    """
    outputs, inputs = numbers.shape
    filled = torch.nn.functional.pad(numbers, (0, -inputs % QUAD, 0, -outputs % PANEL_ROWS))
    parts = filled.view(torch.uint8).bitwise_xor(128).view(-1, PANEL_ROWS, filled.shape[1] // QUAD, QUAD)
    return parts.transpose(1, 2).contiguous()
