"""One layer for one window of tokens, computed again for its gradients: only what some gradient needs.

Frozen linears need but dY · W. So the products whose values nothing reads (the down projection; the values, and the
keys where no norm follows, which the cache holds already) are not computed a second time: `_Unread` stands in for them
and knows only the way back.

Shapes: N tokens of the window, h tokens before it, H query heads, K KV heads, d head size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from flextron.model.attention import sdpa, window_mask
from flextron.model.batch import Batch
from flextron.model.bypass import Beside, Bypasses, Linear
from flextron.model.config import DecoderConfig
from flextron.model.nested import Block, Layout
from flextron.spec import LayerSpec

__all__ = ["KEEPABLE", "PrunedBatch", "RecordedBatch", "WindowAttention", "unread_linears"]

KEEPABLE = frozenset({"q", "o", "gate", "up"})
"""Linears whose products are computed twice, unless they are kept; those of the others are not needed or cached."""


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
    known: Mapping[str, Tensor] = field(default_factory=dict)
    """What those of them gave, bypasses included, whose values something reads; gradients flow past them."""

    def bypasses(self, layer: int | None, layout: Layout) -> Bypasses:
        """See `Batch`."""
        return _PrunedBypasses(self.placed(layer, layout), self.unread, self.known)


@dataclass(frozen=True)
class RecordedBatch(Batch):
    """A batch of one segment that keeps what some linears give."""

    keep: frozenset[str] = frozenset()
    """Linears."""
    kept: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    """What they gave, by layer and linear; filled as the layers run."""

    def bypasses(self, layer: int | None, layout: Layout) -> Bypasses:
        """See `Batch`."""
        assert layer is not None
        return _RecordedBypasses(self.placed(layer, layout), layer, self.keep, self.kept)


class _RecordedBypasses(Bypasses):
    """Keeps results."""

    def __init__(self, placed: Any, layer: int, keep: frozenset[str], kept: dict[tuple[int, str], Tensor]) -> None:
        super().__init__(placed)
        self._layer, self._keep, self._kept = layer, keep, kept

    def expand(self, target: str, x_ND: Tensor, linear: Linear, blocks: tuple[Block, ...]) -> tuple[Tensor, ...]:
        ys = super().expand(target, x_ND, linear, blocks)
        if target in self._keep:
            (self._kept[self._layer, target],) = ys
        return ys

    def contract(
        self, target: str, num_tokens: int, h: Sequence[Tensor], linear: Linear, blocks: tuple[Block, ...]
    ) -> Tensor:
        y_ND = super().contract(target, num_tokens, h, linear, blocks)
        if target in self._keep:
            self._kept[self._layer, target] = y_ND
        return y_ND


class _PrunedBypasses(Bypasses):
    """Leaves out products that neither their readers nor their bypasses need."""

    def __init__(self, placed: Any, unread: frozenset[str], known: Mapping[str, Tensor]) -> None:
        super().__init__(placed)
        self._unread, self._known = unread, known

    def expand(self, target: str, x_ND: Tensor, linear: Linear, blocks: tuple[Block, ...]) -> tuple[Tensor, ...]:
        ys = super().expand(target, x_ND, linear, blocks)
        return (_valued(ys[0], self._known[target]),) if target in self._known else ys

    def contract(
        self, target: str, num_tokens: int, h: Sequence[Tensor], linear: Linear, blocks: tuple[Block, ...]
    ) -> Tensor:
        y_ND = super().contract(target, num_tokens, h, linear, blocks)
        return _valued(y_ND, self._known[target]) if target in self._known else y_ND

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


def _valued(x: Tensor, value: Tensor) -> Tensor:
    return _Known.apply(x, value)  # type: ignore[no-untyped-call,no-any-return]


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
            k_NKd, v_NKd = _valued(k_NKd, self._known[0]), _valued(v_NKd, self._known[1])
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
