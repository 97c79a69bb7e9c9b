"""One layer for one window of tokens, computed again for its gradients: only what some gradient needs.

Frozen linears need but dY · W. So the products whose values nothing reads (the down projection; the values, and the
keys where no norm follows, which the cache holds already) are not computed a second time: `_Unread` stands in for them
and knows only the way back.

Shapes: N tokens of the window, h tokens before it, H query heads, K KV heads, d head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flextron.model.attention import sdpa, window_mask
from flextron.model.batch import Batch
from flextron.model.bypass import Beside, Bypasses, Linear
from flextron.model.config import DecoderConfig
from flextron.model.nested import Block, Layout
from flextron.spec import LayerSpec

__all__ = ["PrunedBatch", "WindowAttention", "unread_linears"]


def unread_linears(config: DecoderConfig, widths: LayerSpec) -> frozenset[str]:
    """The linears of a layer whose products a backward pass can do without, given the cached keys and values."""
    unread = {"down", "v"}
    if not config.qk_norm:
        unread.add("k")
    if config.parallel_residual or not widths.intermediate_size:
        unread.add("o")
    return frozenset(unread)


@dataclass(frozen=True)
class PrunedBatch(Batch):
    """A batch of one segment, whose layers are run for their gradients; what they return is meaningless."""

    unread: frozenset[str] = frozenset()
    """Linears whose products are not computed."""

    def bypasses(self, layer: int | None, layout: Layout) -> Bypasses:
        """See `Batch`."""
        return _PrunedBypasses(self.placed(layer, layout), self.unread)


class _PrunedBypasses(Bypasses):
    """Leaves out products that neither their readers nor their bypasses need."""

    def __init__(self, placed: Any, unread: frozenset[str]) -> None:
        super().__init__(placed)
        self._unread = unread

    def _is_unread(self, target: str, own: Beside) -> bool:
        return target in self._unread and all(bypass.is_additive for _, bypass in own)

    def _expanded(
        self, target: str, own: Beside, x_ND: Tensor, linear: Linear, blocks: tuple[Block, ...]
    ) -> tuple[Tensor, ...]:
        if not self._is_unread(target, own):
            return super()._expanded(target, own, x_ND, linear, blocks)
        return (_unread(x_ND, linear.weight[: blocks[0].stop]),)

    def _contracted(
        self, target: str, own: Beside, num_tokens: int, h: Sequence[Tensor], linear: Linear, blocks: tuple[Block, ...]
    ) -> Tensor:
        if not self._is_unread(target, own):
            return super()._contracted(target, own, num_tokens, h, linear, blocks)
        return _unread(h[0], linear.weight[: blocks[0].stop].t())


class _Unread(torch.autograd.Function):
    """Zeros in the place of x Wᵀ, with its gradient by x; W is (out, in)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return x.new_zeros(()).expand(x.shape[0], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0] @ ctx.saved_tensors[0], None


def _unread(x: Tensor, weight: Tensor) -> Tensor:
    return _Unread.apply(x, weight)  # type: ignore[no-untyped-call,no-any-return]


class _Known(torch.autograd.Function):
    """The known value of a tensor that was not computed; its gradient is the tensor's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0], None


class WindowAttention:
    """Attention of a window that may begin within a sequence and go on over several; for one layer and one use."""

    def __init__(
        self,
        config: DecoderConfig,
        held: tuple[Tensor, Tensor],
        known: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Take what was computed before.

        Args:
            config: the decoder's.
            held: keys and values, (h, K, d), of the tokens before the window that its first sequence sees.
            known: keys and values of the window itself, where they are computed again; gradients flow past them.
        """
        self._window, self._held, self._known = config.sliding_window, held, known
        self.new: tuple[Tensor, Tensor] | None = None
        """Keys and values of the window, (N, K, d), once the layer has run; None if its attention is skipped."""

    def __call__(
        self, layer: int, segment: int, q_NHd: Tensor, k_NKd: Tensor, v_NKd: Tensor, lengths: Sequence[int]
    ) -> Tensor:
        """See `flextron.model.attention.Attention`."""
        if self._known is not None:
            k_NKd, v_NKd = (
                _Known.apply(t, known)  # type: ignore[no-untyped-call]
                for t, known in zip((k_NKd, v_NKd), self._known, strict=True)
            )
        self.new = k_NKd, v_NKd
        parts = list(zip(*(t.split(list(lengths)) for t in (q_NHd, k_NKd, v_NKd)), strict=True))
        if len(self._held[0]):
            q, k, v = parts[0]
            parts[0] = q, torch.cat((self._held[0], k)), torch.cat((self._held[1], v))
        return torch.cat([self._attend(*part) for part in parts])

    def _attend(self, q_NHd: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The last N tokens of one sequence over all of it."""
        num_new, length = len(q_NHd), len(k)
        q_HNd, k_Khd, v_Khd = (t.transpose(0, 1)[None] for t in (q_NHd, k, v))
        if num_new == length and (self._window is None or length <= self._window):
            out = sdpa(q_HNd, k_Khd, v_Khd, causal=True)
        else:
            positions = torch.arange(length, device=k.device)
            mask = window_mask(positions[length - num_new :], positions, self._window)
            out = sdpa(q_HNd, k_Khd, v_Khd, mask=mask)
        return out[0].transpose(0, 1)
