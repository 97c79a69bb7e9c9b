"""One layer for one window of tokens, computed again for its gradients: only what some gradient needs.

Frozen linears need but dY · W. So the products whose values nothing reads (the down projection; the values, and the
keys where no norm follows, which the cache holds already) are not computed a second time: what stands in for them knows
only the way back.

Shapes: N tokens of the window, r rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from flextron.model.batch import Batch
from flextron.model.bypass import Bypass, Bypasses, Linear, Lora
from flextron.model.config import DecoderConfig
from flextron.model.nested import Block, Layout
from flextron.model.window_attention import valued
from flextron.spec import LayerSpec

__all__ = ["KEEPABLE", "PrunedBatch", "RecordedBatch", "unread_linears"]

_WHOLE = slice(None)
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
        bypass = self._only(target)
        rows = slice(blocks[0].stop)
        bias = None if linear.bias is None else linear.bias[rows]
        if isinstance(bypass, Lora):
            return (self._with_lora(target, x_ND, linear.weight[rows], bias, bypass.a, bypass.b[rows], bypass.scale),)
        if target in self._unread and (bypass is None or bypass.is_additive):
            x = x_ND if bypass is None else bypass.before(x_ND, _WHOLE)
            return (_product(x, linear.weight[rows], self._known.get(target)),)
        ys = super().expand(target, x_ND, linear, blocks)
        return (valued(ys[0], self._known[target]),) if target in self._known else ys

    def contract(
        self, target: str, num_tokens: int, h: Sequence[Tensor], linear: Linear, blocks: tuple[Block, ...]
    ) -> Tensor:
        bypass = self._only(target)
        rows = slice(blocks[0].stop)
        weight = linear.weight[rows].t()
        if isinstance(bypass, Lora):
            return self._with_lora(target, h[0], weight, linear.bias, bypass.a[rows], bypass.b, bypass.scale)
        if target in self._unread and (bypass is None or bypass.is_additive):
            x = h[0] if bypass is None else bypass.before(h[0], rows)
            return _product(x, weight, self._known.get(target))
        y_ND = super().contract(target, num_tokens, h, linear, blocks)
        return valued(y_ND, self._known[target]) if target in self._known else y_ND

    def _only(self, target: str) -> Bypass | None:
        """What stands beside a linear: the batch has one segment."""
        return next((bypass for _, bypass in self._beside(target)), None)

    def _with_lora(
        self, target: str, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
    ) -> Tensor:
        value = self._known.get(target)
        if value is None and target in self._unread:
            value = x.new_zeros(()).expand(len(x), len(weight))
        return _LoraLinear.apply(x, weight, bias, a, b, scale, value)  # type: ignore[no-untyped-call,no-any-return]


class _Product(torch.autograd.Function):
    """A known value, or zeros, in the place of x Wᵀ, with its gradient by x; W is (out, in)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, value: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return x.new_zeros(()).expand(x.shape[0], weight.shape[0]) if value is None else value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0] @ ctx.saved_tensors[0], None, None


def _product(x: Tensor, weight: Tensor, value: Tensor | None) -> Tensor:
    return _Product.apply(x, weight, value)  # type: ignore[no-untyped-call,no-any-return]


class _LoraLinear(torch.autograd.Function):
    """x Wᵀ + bias + scale (x A) Bᵀ, or a value that is known or not read, with gradients by x, A and B.

    One function for all of it: autograd's parts would make and add up tensors of the size of inputs and outputs.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scale: float,
        value: Tensor | None,
    ) -> Tensor:
        low_a, low_b = a.to(x.dtype), b.to(x.dtype)
        z_Nr = x @ low_a
        ctx.scale, ctx.dtype = scale, a.dtype
        ctx.save_for_backward(x, weight, low_a, low_b, z_Nr)
        if value is not None:
            return value.view_as(value)
        return F.linear(x, weight, bias).addmm_(z_Nr, low_b.t(), alpha=scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (g,) = grads
        x, weight, a, b, z_Nr = ctx.saved_tensors
        gz_Nr = torch.mm(g, b).mul_(ctx.scale)
        dx = torch.mm(g, weight).addmm_(gz_Nr, a.t()) if ctx.needs_input_grad[0] else None
        da, db = torch.mm(x.t(), gz_Nr), torch.mm(g.t(), z_Nr).mul_(ctx.scale)
        return dx, None, None, da.to(ctx.dtype), db.to(ctx.dtype), None, None
