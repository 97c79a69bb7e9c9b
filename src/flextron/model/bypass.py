"""Bypass networks: small trainable modules beside the frozen linears of the decoder (FlexLLM, section 5).

A bypass reads what its linear reads and adds to what it gives; the weights beside it never change, so that sequences
with different adapters, or none, share one batch and one product with each weight. Adapters are nested as the weights
are: the parameters beside a nested dimension lie along it, and a narrower sub-network uses their leading part.

Shapes: N tokens, r rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from flextron.model.nested import Block, Contraction, contract, expand

__all__ = ["NO_BYPASSES", "Beside", "Bypass", "Bypasses", "Dora", "Ia3", "Linear", "Lora", "Shape"]

_WHOLE = slice(None)


class Shape(NamedTuple):
    """Shape of a linear."""

    inputs: int
    outputs: int


class Bypass(nn.Module):
    """What stands beside one linear. A method overrides what it needs; each default changes nothing.

    `rows` are the positions of the nested dimension that a block of inputs or outputs holds; the whole of a dimension
    that is not nested.
    """

    is_additive = True
    """Whether the gradients need nothing of the linear's product, so that the product is not computed for them."""

    def before(self, x: Tensor, rows: slice) -> Tensor:
        """What the linear reads in the place of `x`."""
        return x

    def read(self, x: Tensor, rows: slice) -> Tensor | None:
        """What is kept of the input for `add`; summed over the blocks of an input that is nested."""
        return None

    def add(self, y: Tensor, z: Tensor | None, rows: slice) -> Tensor:
        """The linear's output `y` with the bypass, `z` being what `read` gave."""
        return y

    def narrowed(self, shape: Shape) -> Bypass:
        """A copy for the linear's leading part."""
        raise NotImplementedError

    def reorder(self, inputs: Tensor | None, outputs: Tensor | None) -> None:
        """Follow the linear into another order of its inputs or outputs, in place; None for a side that stays."""
        raise NotImplementedError


class Lora(Bypass):
    """Low-rank adaptation (arXiv 2106.09685): y + scale · (x A) Bᵀ."""

    def __init__(self, shape: Shape, rank: int, scale: float) -> None:
        """Initialise as peft does: A as `nn.Linear`, B zeros."""
        super().__init__()
        self.scale = scale
        self.a = nn.Parameter(torch.empty(shape.inputs, rank).uniform_(-(shape.inputs**-0.5), shape.inputs**-0.5))
        self.b = nn.Parameter(torch.zeros(shape.outputs, rank))

    @property
    def rank(self) -> int:
        """Columns of A and of B."""
        return self.a.shape[1]

    def read(self, x: Tensor, rows: slice) -> Tensor:
        """(N, r)."""
        return x @ self.a[rows].to(x.dtype)

    def add(self, y: Tensor, z: Tensor | None, rows: slice) -> Tensor:
        """See `Bypass`."""
        assert z is not None
        # in place where autograd does not look: `y` is a fresh product
        add = torch.addmm if torch.is_grad_enabled() else torch.Tensor.addmm_
        return add(y, z, self.b[rows].to(y.dtype).t(), alpha=self.scale)

    def narrowed(self, shape: Shape) -> Lora:
        """See `Bypass`."""
        out = Lora(shape, self.rank, self.scale)
        out.a, out.b = _leading(self.a, shape.inputs), _leading(self.b, shape.outputs)
        return out

    def reorder(self, inputs: Tensor | None, outputs: Tensor | None) -> None:
        """See `Bypass`."""
        self.a, self.b = _picked(self.a, inputs), _picked(self.b, outputs)


class Ia3(Bypass):
    """Learned factors of a linear's inputs or outputs (IA3, arXiv 2205.05638)."""

    def __init__(self, shape: Shape, *, on_input: bool) -> None:
        """Initialise with ones."""
        super().__init__()
        self.on_input = on_input
        self.is_additive = on_input
        self.factors = nn.Parameter(torch.ones(shape.inputs if on_input else shape.outputs))

    def before(self, x: Tensor, rows: slice) -> Tensor:
        """See `Bypass`."""
        return x * self.factors[rows].to(x.dtype) if self.on_input else x

    def add(self, y: Tensor, z: Tensor | None, rows: slice) -> Tensor:
        """See `Bypass`."""
        return y if self.on_input else y * self.factors[rows].to(y.dtype)

    def narrowed(self, shape: Shape) -> Ia3:
        """See `Bypass`."""
        out = Ia3(shape, on_input=self.on_input)
        out.factors = _leading(self.factors, len(out.factors))
        return out

    def reorder(self, inputs: Tensor | None, outputs: Tensor | None) -> None:
        """See `Bypass`."""
        self.factors = _picked(self.factors, inputs if self.on_input else outputs)


class Dora(Bypass):
    """LoRA with learned lengths of the weight's rows (DoRA, arXiv 2402.09353): f · (W x + scale · B A x) + bias.

    The factors f are those lengths over the rows' own ones in the full model. So a sub-network is the leading part of
    the model with the adapter merged in.
    """

    is_additive = False

    def __init__(self, lora: Lora, lengths: Tensor) -> None:
        """Take the low-rank update and the lengths of the rows, (outputs,); `settle` comes before any use."""
        super().__init__()
        self.lora = lora
        self.factors = nn.Parameter(lengths)
        self.shift: nn.Parameter | None = None
        """What leaves the linear's bias as it is."""

    @torch.no_grad()
    def settle(self, weight: Tensor, bias: Tensor | None) -> None:
        """Turn lengths into factors.

        Args:
            weight: the full model's, (outputs, inputs).
            bias: the linear's, if it has one.
        """
        own = self.lora
        changed = weight.to(own.b) + own.scale * own.b @ own.a.t()
        factors = self.factors / torch.linalg.vector_norm(changed, dim=1)
        self.factors = nn.Parameter(factors)
        self.shift = None if bias is None else nn.Parameter(bias.to(factors) * (1 - factors))

    def read(self, x: Tensor, rows: slice) -> Tensor:
        """See `Bypass`."""
        return self.lora.read(x, rows)

    def add(self, y: Tensor, z: Tensor | None, rows: slice) -> Tensor:
        """See `Bypass`."""
        y = self.lora.add(y, z, rows) * self.factors[rows].to(y.dtype)
        return y if self.shift is None else y + self.shift[rows].to(y.dtype)

    def narrowed(self, shape: Shape) -> Dora:
        """See `Bypass`."""
        out = Dora(self.lora.narrowed(shape), _leading(self.factors, shape.outputs))
        out.shift = None if self.shift is None else _leading(self.shift, shape.outputs)
        return out

    def reorder(self, inputs: Tensor | None, outputs: Tensor | None) -> None:
        """See `Bypass`."""
        self.lora.reorder(inputs, outputs)
        self.factors = _picked(self.factors, outputs)
        self.shift = None if self.shift is None else _picked(self.shift, outputs)


def _leading(parameter: Tensor, size: int) -> nn.Parameter:
    return nn.Parameter(parameter.detach()[:size].clone())


def _picked(parameter: nn.Parameter, order: Tensor | None) -> nn.Parameter:
    return parameter if order is None else nn.Parameter(parameter.detach()[order.to(parameter.device)])


Linear = nn.Linear | Contraction
"""A frozen linear of the decoder, into a nested dimension or out of it."""
Beside = Sequence[tuple[slice, Bypass]]
"""The rows of each segment that has a bypass beside a linear, and the bypass."""


class Bypasses:
    """The bypasses of all adapters in a batch beside the linears of one layer, for tokens in a layout's order."""

    def __init__(self, placed: Sequence[tuple[slice, Mapping[str, Bypass]]]) -> None:
        """Take (rows of a segment's tokens, its bypasses by target), rows ascending, without segments of width 0."""
        self._placed = placed

    def expand(self, target: str, x_ND: Tensor, linear: Linear, blocks: tuple[Block, ...]) -> tuple[Tensor, ...]:
        """The same as `nested.expand`, with what the bypasses beside `target` add."""
        own = self._beside(target)
        ys = self._expanded(target, own, _each(x_ND, own, lambda b, x, _: b.before(x, _WHOLE)), linear, blocks)
        if not own:
            return ys
        low = {rows.start: b.read(_rows_of(x_ND, rows), _WHOLE) for rows, b in own}
        return tuple(
            _each(y, own, lambda b, y, start, rows=slice(k.start, k.stop): b.add(y, low[start], rows))  # type: ignore[misc]
            for y, k in zip(ys, blocks, strict=True)
        )

    def contract(
        self, target: str, num_tokens: int, h: Sequence[Tensor], linear: Linear, blocks: tuple[Block, ...]
    ) -> Tensor:
        """The same as `nested.contract`, with what the bypasses beside `target` add."""
        own = self._beside(target)
        if not own:
            return self._contracted(target, own, num_tokens, h, linear, blocks)
        spans = [slice(k.start, k.stop) for k in blocks]
        read = [
            _each(part, own, lambda b, x, _, rows=rows: b.before(x, rows))  # type: ignore[misc]
            for part, rows in zip(h, spans, strict=True)
        ]
        y_ND = self._contracted(target, own, num_tokens, read, linear, blocks)
        low = {}
        for rows, b in own:
            parts = [
                b.read(_rows_of(part, rows), s) for part, s in zip(h, spans, strict=True) if rows.start < len(part)
            ]
            low[rows.start] = None if parts[0] is None else sum(cast("list[Tensor]", parts[1:]), parts[0])
        return _each(y_ND, own, lambda b, y, start: b.add(y, low[start], _WHOLE))

    def _expanded(
        self, target: str, own: Beside, x_ND: Tensor, linear: Linear, blocks: tuple[Block, ...]
    ) -> tuple[Tensor, ...]:
        """The frozen product alone."""
        return expand(x_ND, linear.weight, linear.bias, blocks)

    def _contracted(
        self, target: str, own: Beside, num_tokens: int, h: Sequence[Tensor], linear: Linear, blocks: tuple[Block, ...]
    ) -> Tensor:
        """The frozen product alone."""
        return contract(num_tokens, h, linear.weight, linear.bias, blocks)

    def _beside(self, target: str) -> Beside:
        return [(rows, bypasses[target]) for rows, bypasses in self._placed if target in bypasses]


def _each(x: Tensor, own: Beside, change: Callable[[Bypass, Tensor, int], Tensor]) -> Tensor:
    """Change the rows of each bypass that `x` has, which may be but the leading ones; others pass."""
    parts, done = [], 0
    for rows, bypass in own:
        if rows.start >= x.shape[0]:
            break
        if rows.start > done:
            parts.append(x[done : rows.start])
        parts.append(change(bypass, _rows_of(x, rows), rows.start))
        done = rows.stop
    if done < x.shape[0]:
        parts.append(x[done:])
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _rows_of(x: Tensor, rows: slice) -> Tensor:
    """A slice of rows; `x` itself if that is all of them, because the gradient of a slice is padded with zeros."""
    return x if rows.start == 0 and rows.stop >= x.shape[0] else x[rows]


NO_BYPASSES = Bypasses(())
"""Bypasses of batches without adapters: none."""
