"""Norms of the residual stream and of heads."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from torch import Tensor, nn
from torch.nn import functional as F

from flextron.model.config import DecoderConfig

__all__ = ["LayerNorm", "RMSNorm", "make_norm", "rms_norm"]


def rms_norm(x: Tensor, gains: Tensor, eps: float) -> Tensor:
    """The last dimension over the root of its mean square, times the gains."""
    return F.rms_norm(x, (x.shape[-1],), gains.to(x.dtype), eps)


class RMSNorm(nn.RMSNorm):
    """PyTorch's norm, except that its gains may train in float32 beside activations of fewer digits.

    Inputs may be narrower than it (heads of a sub-network, normalised as one vector); they get the leading gains.
    """

    def __init__(self, size: int, eps: float, offset: float = 0.0, scale: float = 1.0) -> None:
        """Allocate gains, which count as (gain + offset) · scale."""
        super().__init__(size, eps=eps)
        self._offset, self._scale = offset, scale
        # compiled kernels may take its place
        self.normalise: Callable[[Tensor, Tensor, float], Tensor] = rms_norm

    @property
    def gains(self) -> Tensor:
        """What the normalised numbers are multiplied by."""
        gains = self.weight + self._offset if self._offset else self.weight
        return gains * self._scale if self._scale != 1 else gains

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        return self.normalise(x, self.gains[: x.shape[-1]], cast("float", self.eps))


class LayerNorm(nn.LayerNorm):
    """PyTorch's norm, except that its gains and biases may train in float32 beside activations of fewer digits."""

    @property
    def gains(self) -> Tensor:
        """What the normalised numbers are multiplied by."""
        return self.weight

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


def make_norm(config: DecoderConfig, scale: float = 1.0) -> RMSNorm | LayerNorm:
    """The family's normalisation of the residual stream, multiplied by `scale`."""
    if config.norm == "rms":
        return RMSNorm(config.hidden_size, config.norm_eps, config.norm_offset, scale)
    assert scale == 1, "no family scales what a LayerNorm gives"
    return LayerNorm(config.hidden_size, eps=config.norm_eps)
