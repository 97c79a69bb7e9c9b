"""Rotary settings of a GGUF file, as Hugging Face writes them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from flextron.errors import FlextronError, UnsupportedModelError, shown
from flextron.gguf.keys import Metadata

__all__ = ["rope_scaling", "rotated_dimensions"]


def rotated_dimensions(metadata: Metadata, head_dim: int, *, may_be_partial: bool) -> int:
    """How many dimensions of each head are rotated.

    Raises:
        UnsupportedModelError: not all of them, in an architecture that rotates all.
        FlextronError: the number is odd or larger than the head.
    """
    count = metadata.count("rope.dimension_count", head_dim)
    if count != head_dim and not may_be_partial:
        raise UnsupportedModelError(
            f"{metadata.path} rotates {count} of the {head_dim} dimensions of each head "
            f"({metadata.arch}.rope.dimension_count); {metadata.arch} models that rotate a part are not supported"
        )
    if count > head_dim or count % 2:
        raise FlextronError(
            f"{metadata.path} cannot rotate {count} of the {head_dim} dimensions of each head; convert it again"
        )
    return count


def rope_scaling(metadata: Metadata, freqs: np.ndarray[Any, Any] | None, rotated: int) -> dict[str, Any] | None:
    """Hugging Face's `rope_scaling`.

    Args:
        metadata: the file's.
        freqs: factors by which each frequency is divided, (rotated / 2,), where the file has them.
        rotated: dimensions of each head that are rotated.

    Raises:
        UnsupportedModelError: the scaling is neither linear nor Llama 3's, or both at once.
        FlextronError: a number is missing or makes no sense.
    """
    kind, factor = metadata.text("rope.scaling.type", "linear"), _linear_factor(metadata)
    if kind not in ("none", "linear"):
        raise UnsupportedModelError(f"rope scaling of type {shown(kind)} is not supported; none, linear and llama3 are")
    linear = None if kind == "none" or factor == 1 else {"rope_type": "linear", "factor": factor}
    llama3 = None if freqs is None else _llama3(metadata, freqs.reshape(-1).astype(np.float64), rotated)
    if linear and llama3:
        raise UnsupportedModelError(
            f"{metadata.path} scales its rope by a factor of {factor} and by one of each frequency; both at once are "
            "not supported"
        )
    return linear or llama3


def _linear_factor(metadata: Metadata) -> float:
    """What positions are divided by; as in llama.cpp 0 means 1, and a factor without a type is linear."""
    name = "rope.scaling.factor" if metadata.has("rope.scaling.factor") else "rope.scale_linear"
    return metadata.positive(name) if metadata.get(name) else 1.0


def _llama3(metadata: Metadata, factors: np.ndarray[Any, Any], rotated: int) -> dict[str, Any] | None:
    """The four numbers behind Llama 3's factors, one per frequency.

    Short wavelengths are left alone (1), long ones are stretched by the full factor, and between them the weight of the
    unstretched frequency rises linearly with (original context / wavelength) from `low_freq_factor` to
    `high_freq_factor`. Only ratios of the last three numbers show in the factors; `low_freq_factor` is 1 by custom.
    """
    if len(factors) != rotated // 2 or not np.isfinite(factors).all() or factors.min() <= 0:
        raise FlextronError(f"{metadata.path} needs a factor above 0 for each of {rotated // 2} rope frequencies")
    if np.allclose(factors, 1):
        return None
    factor = float(f"{factors.max():.5g}")
    exponents = np.arange(len(factors)) / len(factors)
    waves = metadata.positive("rope.freq_base", 10000.0) ** -exponents / (2 * math.pi)  # per token
    between = (factors > 1 + 1e-5) & (factors < factor * (1 - 1e-5))
    if between.sum() >= 2:
        weights = (1 / factors[between] - 1 / factor) / (1 - 1 / factor)
        slope, offset = np.polyfit(waves[between], weights, 1)
        if slope * offset < 0:
            context, high = round(-slope / offset), float(f"{1 - 1 / offset:.4g}")
            weights = np.clip((context * waves - 1) / (high - 1), 0, 1)
            if np.allclose(1 / ((1 - weights) / factor + weights), factors, rtol=1e-4):
                return {
                    "rope_type": "llama3",
                    "factor": factor,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": high,
                    "original_max_position_embeddings": context,
                }
    raise FlextronError(
        f"{metadata.path} has rope factors that are not Llama 3's; use the Hugging Face checkpoint instead"
    )
