"""One layer for one chunk of tokens, computed again for its gradients: only what some gradient needs.

Frozen linears need but dY · W. So the products whose values nothing reads (the down projection; the values, and the
keys where no norm follows, which the cache holds already) are not computed a second time: what stands in for them knows
only the way back.

Shapes: N tokens of the chunk, r rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from flextron.finetuning.attention import valued
from flextron.model.adapter import linear_shapes
from flextron.model.batch import Batch
from flextron.model.bypass import Bypasses, Linear, Lora
from flextron.model.config import DecoderConfig
from flextron.model.nested import Block, Layout
from flextron.spec import LayerSpec, SubnetSpec

__all__ = ["KEEPABLE", "PrunedBatch", "RecordedBatch", "num_keepable", "unread_linears"]

_WHOLE = slice(None)
KEEPABLE = frozenset({"q", "attention", "o", "gate", "up"})
"""What is computed twice unless it is kept: what the heads give, and products of linears; those of the others are not
needed, or cached."""


def num_keepable(config: DecoderConfig, spec: SubnetSpec) -> int:
    """Numbers a token that are kept of a sub-network if all of `KEEPABLE` is."""
    total = 0
    for widths in spec.layers:
        shapes = linear_shapes(config, widths)
        total += sum(shapes[t].outputs for t in KEEPABLE & shapes.keys())
        if "o" in shapes:
            total += shapes["o"].inputs + shapes["o"].inputs // config.head_dim
    return total


def unread_linears(config: DecoderConfig, widths: LayerSpec) -> frozenset[str]:
    """The linears of a layer whose products a backward pass can do without, given the cached keys and values.

    A norm reads its input on the way back: of keys, or of what a half of the layer gives.
    """
    unread = {"v"}
    if not config.qk_norm:
        unread.add("k")
    if not config.post_norm:
        unread.add("down")
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

    def needs(self, target: str) -> bool:
        """See `Batch`."""
        return target not in self.unread


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

    def keep_product(self, layer: int | None, target: str, product: Tensor) -> None:
        """See `Batch`."""
        if target in self.keep:
            assert layer is not None
            self.kept[layer, target] = product


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
        rows, whole = slice(blocks[0].stop), super().expand
        bias = None if linear.bias is None else linear.bias[rows]
        return (
            self._pruned(
                target,
                (x_ND, linear.weight[rows], bias),
                (_WHOLE, rows),
                lambda: whole(target, x_ND, linear, blocks)[0],
            ),
        )

    def contract(
        self, target: str, num_tokens: int, h: Sequence[Tensor], linear: Linear, blocks: tuple[Block, ...]
    ) -> Tensor:
        rows, whole = slice(blocks[0].stop), super().contract
        return self._pruned(
            target,
            (h[0], linear.weight[rows].t(), linear.bias),
            (rows, _WHOLE),
            lambda: whole(target, num_tokens, h, linear, blocks),
        )

    def _pruned(
        self,
        target: str,
        linear: tuple[Tensor, Tensor, Tensor | None],
        spans: tuple[slice, slice],
        whole: Callable[[], Tensor],
    ) -> Tensor:
        """What stands for a linear of (input, weight, bias), whose inputs and outputs are `spans` of its bypass's."""
        x, weight, bias = linear
        inputs, outputs = spans
        bypass = next((b for _, b in self._beside(target)), None)  # one at most: the batch has one segment
        value, is_unread = self._known.get(target), target in self._unread
        if isinstance(bypass, Lora):
            if value is None and is_unread:
                value = x.new_zeros(()).expand(len(x), len(weight))
            return _LoraLinear.apply(x, weight, bias, bypass.a[inputs], bypass.b[outputs], bypass.scale, value)  # type: ignore[no-untyped-call,no-any-return]
        if is_unread and (bypass is None or bypass.is_additive):
            return _Product.apply(x if bypass is None else bypass.before(x, inputs), weight, value)  # type: ignore[no-untyped-call,no-any-return]
        return whole() if value is None else valued(whole(), value)


class _Product(torch.autograd.Function):
    """A known value, or zeros, in the place of x Wᵀ, with its gradient by x; W is (out, in)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, value: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return x.new_zeros(()).expand(x.shape[0], weight.shape[0]) if value is None else value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0] @ ctx.saved_tensors[0], None, None


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
