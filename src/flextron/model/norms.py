"""Norms of the residual stream and of heads."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from flextron.model.config import DecoderConfig

__all__ = ["LayerNorm", "RMSNorm", "make_norm"]


class RMSNorm(nn.RMSNorm):
    """PyTorch's norm, except that its gains may train in float32 beside activations of fewer digits.

    Inputs may be narrower than it (heads of a sub-network, normalised as one vector); they get the leading gains.
    """

    def __init__(self, size: int, eps: float, offset: float = 0.0, scale: float = 1.0) -> None:
        """Allocate gains, which count as (gain + offset) · scale."""
        super().__init__(size, eps=eps)
        self._offset, self._scale = offset, scale

    @property
    def gains(self) -> Tensor:
        """What the normalised numbers are multiplied by."""
        gains = self.weight + self._offset if self._offset else self.weight
        return gains * self._scale if self._scale != 1 else gains

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        size = x.shape[-1]
        return F.rms_norm(x, (size,), self.gains[:size].to(x.dtype), self.eps)


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
