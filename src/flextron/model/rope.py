"""Rotary position embedding: frequencies of every kind of long-context scaling, tables of cosines and sines, rotation.

Shapes: N tokens, d head size, R rotated part of d.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from flextron.model.config import DecoderConfig, Rope

__all__ = ["Tables", "rotary_tables", "rotate"]

Tables = tuple[Tensor, Tensor]
"""Cosines and signed sines, each (N, 1, R)."""


@lru_cache(maxsize=64)
def _frequencies_on(rope: Rope, rotated: int, device: torch.device) -> tuple[Tensor, float]:
    """`_frequencies` on a device; kept, because copies from the host have no place in a CUDA graph."""
    inverse, factor = _frequencies(rope, rotated)
    return inverse.to(device), factor


def _frequencies(rope: Rope, rotated: int) -> tuple[Tensor, float]:
    """Frequencies of the rotated pairs, float32, (R/2,), and the factor of cosines and sines."""
    powers = rope.theta ** (torch.arange(0, rotated, 2, dtype=torch.float32, device="cpu") / rotated)
    if rope.scaling is None:
        return 1.0 / powers, 1.0
    kind = rope.scaling["rope_type"]
    if kind == "dynamic":
        return 1.0 / powers, 1.0  # up to the model's own length
    if kind == "linear":
        return 1.0 / powers / float(rope.scaling["factor"]), 1.0
    if kind == "llama3":
        return _llama3(1.0 / powers, rope.scaling), 1.0
    if kind == "yarn":
        return _yarn(powers, rope.theta, rotated, rope.scaling), float(rope.scaling["attention_factor"])
    assert kind == "longrope", kind
    factors = torch.tensor(rope.scaling["short_factor"], dtype=torch.float32)
    return 1.0 / (factors * powers), float(rope.scaling["attention_factor"])


def _llama3(inverse: Tensor, scaling: Mapping[str, Any]) -> Tensor:
    """Scaling as Meta published it with Llama 3.1: high frequencies stay, low ones are divided."""
    factor = float(scaling["factor"])
    low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    turns = float(scaling["original_max_position_embeddings"]) * inverse / (2 * torch.pi)
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return inverse * (keep + (1 - keep) / factor)


def _yarn(powers: Tensor, theta: float, rotated: int, scaling: Mapping[str, Any]) -> Tensor:
    """YaRN (arXiv 2309.00071): what turns often in the original context stays, what seldom does is divided."""

    def dimension(num_turns: float) -> float:
        """The dimension that turns so often."""
        turns = scaling["original_max_position_embeddings"] / (num_turns * 2 * math.pi)
        return rotated * math.log(turns) / (2 * math.log(theta))

    low, high = dimension(scaling["beta_fast"]), dimension(scaling["beta_slow"])
    if scaling["truncate"]:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotated - 1)
    ramp = ((torch.arange(rotated // 2, dtype=torch.float32) - low) / (high - low if high != low else 0.001)).clamp(
        0, 1
    )
    keep = 1 - ramp
    return 1.0 / (float(scaling["factor"]) * powers) * (1 - keep) + 1.0 / powers * keep


def rotary_tables(config: DecoderConfig, positions_N: Tensor, dtype: torch.dtype) -> tuple[Tables | None, ...]:
    """Tables of each layer; layers with the same settings share them, and those that rotate nothing have None."""
    made: dict[Rope, Tables] = {}
    out: list[Tables | None] = []
    for i in range(config.num_hidden_layers):
        rope = config.rope_of(i)
        if rope is not None and rope not in made:
            made[rope] = _tables(rope, int(config.head_dim * rope.fraction), positions_N, dtype)
        out.append(None if rope is None else made[rope])
    return tuple(out)


def _tables(rope: Rope, rotated: int, positions_N: Tensor, dtype: torch.dtype) -> Tables:
    inverse, factor = _frequencies_on(rope, rotated, positions_N.device)
    angles = positions_N.float()[:, None, None] * inverse
    cos, sin = angles.cos(), angles.sin()
    if factor != 1:
        cos, sin = cos * factor, sin * factor
    return torch.cat((cos, cos), -1).to(dtype), torch.cat((-sin, sin), -1).to(dtype)


def rotate(x_NHd: Tensor, tables: Tables) -> Tensor:
    """Rotate the leading R of each head, in Hugging Face's half-split layout."""
    cos, sin = tables
    rotated = cos.shape[-1]
    if rotated < x_NHd.shape[-1]:
        return torch.cat((rotate(x_NHd[..., :rotated], tables), x_NHd[..., rotated:]), dim=-1)
    return torch.addcmul(x_NHd * cos, x_NHd.roll(rotated // 2, -1), sin)
