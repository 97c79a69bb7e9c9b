"""Nested linear algebra: products with prefixes of a weight, where each token pays for its own width only.

Every nested weight has its nested dimension first, also the projections out of it, so that a prefix is one contiguous
piece of memory (a slice of columns reads almost as slowly as the whole). Tokens are ordered by width, widest first.
Then block k of the weight (rows d_{k-1}…d_k) multiplies just the first n_k tokens, those at least d_k wide: no masks,
no copies of weights, every weight read once. A batch with one width is the case of a single block. `expand` goes into
the nested dimension, `contract` comes back out of it, and both have their own backward, whose weight gradient is
computed for the prefix alone and is zero elsewhere.

Shapes: N tokens, D hidden size, F nested size (MLP neurons, or rows of attention heads).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    "Block",
    "Contraction",
    "Layout",
    "autocast",
    "contract",
    "contract_blocks",
    "expand",
    "expand_blocks",
    "sum_of_products",
]


@dataclass(frozen=True, slots=True)
class Block:
    """Nested positions `start:stop`, which the first `num_tokens` tokens use."""

    num_tokens: int
    start: int
    stop: int

    def scaled(self, factor: int) -> Block:
        """The same block in finer units (groups to rows)."""
        return Block(self.num_tokens, self.start * factor, self.stop * factor)


@dataclass(frozen=True, slots=True)
class Layout:
    """How segments of tokens with given widths are ordered and cut into blocks."""

    sizes: tuple[int, ...]
    """Tokens of each segment, in the batch's order."""
    order: tuple[int, ...]
    """The segments, widest first."""
    widths: tuple[int, ...]
    """Width of each segment, in the batch's order."""
    blocks: tuple[Block, ...]
    """Ascending blocks; the k-th is used by a prefix of the ordered tokens."""

    @staticmethod
    @lru_cache(maxsize=4096)
    def of(sizes: tuple[int, ...], widths: tuple[int, ...]) -> Layout:
        """Order segments of `sizes` tokens by their `widths` and cut the nested dimension where widths change.

        Cached: every layer of every step asks, and most ask alike; in a decode step the answer must not cost time.
        """
        order = tuple(sorted(range(len(sizes)), key=lambda j: -widths[j]))
        ends = sorted({w for w in widths if w > 0})
        counts = [sum(n for n, w in zip(sizes, widths, strict=True) if w >= end) for end in ends]
        starts = [0, *ends[:-1]]
        blocks = tuple(Block(n, a, b) for n, a, b in zip(counts, starts, ends, strict=True))
        return Layout(sizes, order, widths, blocks)

    @property
    def is_single(self) -> bool:
        """Whether there is one segment, which needs no ordering."""
        return len(self.sizes) == 1

    def sort(self, x: Tensor) -> Tensor:
        """Rows of `x` (N, ...) from the batch's order to widest first."""
        if self.is_single:
            return x
        segments = x.split(self.sizes)
        return torch.cat([segments[j] for j in self.order])

    def unsort(self, y: Tensor) -> Tensor:
        """The inverse of `sort`."""
        if self.is_single:
            return y
        segments = dict(zip(self.order, y.split([self.sizes[j] for j in self.order]), strict=True))
        return torch.cat([segments[j] for j in range(len(self.sizes))])


class _Expand(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, w_FD: Tensor, b_F: Tensor | None, blocks: tuple[Block, ...]) -> Any:
        ctx.save_for_backward(x_ND, w_FD)
        ctx.blocks, ctx.has_bias = blocks, b_F is not None
        return expand_blocks(x_ND, w_FD, b_F, blocks)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x_ND, w_FD = ctx.saved_tensors
        need_x, need_w, need_b, _ = ctx.needs_input_grad
        dx = dw = db = None
        if need_x:
            dx = sum_of_products(
                x_ND, [(b.num_tokens, g, w_FD[b.start : b.stop]) for b, g in zip(ctx.blocks, grads, strict=True)]
            )
        if need_w:
            dw = _prefix_like(w_FD, covered=ctx.blocks[-1].stop == len(w_FD))
            for b, g in zip(ctx.blocks, grads, strict=True):
                torch.mm(g.t(), x_ND[: b.num_tokens], out=dw[b.start : b.stop])
        if ctx.has_bias and need_b:
            db = w_FD.new_zeros(len(w_FD))
            for b, g in zip(ctx.blocks, grads, strict=True):
                torch.sum(g, 0, out=db[b.start : b.stop])
        return dx, dw, db, None


class _Contract(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, num_tokens: int, w_FD: Tensor, b_D: Tensor | None, blocks: tuple[Block, ...], *h: Tensor
    ) -> Tensor:
        ctx.save_for_backward(w_FD, *h)
        ctx.blocks, ctx.has_bias = blocks, b_D is not None
        return contract_blocks(num_tokens, w_FD, b_D, blocks, h)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (g_ND,) = grads
        w_FD, *h = ctx.saved_tensors
        need_w, need_b = ctx.needs_input_grad[1:3]
        dw = db = None
        if need_w:
            dw = _prefix_like(w_FD, covered=ctx.blocks[-1].stop == len(w_FD))
            for b, h_k in zip(ctx.blocks, h, strict=True):
                torch.mm(h_k.t(), g_ND[: b.num_tokens], out=dw[b.start : b.stop])
        if ctx.has_bias and need_b:
            db = g_ND[: ctx.blocks[0].num_tokens].sum(0)
        dh = [g_ND[: b.num_tokens] @ w_FD[b.start : b.stop].t() for b in ctx.blocks]
        return None, dw, db, None, *dh


def _prefix_like(weight: Tensor, *, covered: bool) -> Tensor:
    """Room for a weight's gradient; zeroed only where the blocks do not cover it."""
    return torch.empty_like(weight) if covered else torch.zeros_like(weight)


def sum_of_products(like: Tensor, terms: Sequence[tuple[int, Tensor, Tensor]]) -> Tensor:
    """Sum of `a @ b` over (n, a, b), each added to the first n rows; n falls from term to term."""
    n, a, b = terms[0]
    total = a @ b
    if n < len(like):
        total = F.pad(total, (0, 0, 0, len(like) - n))
    for n, a, b in terms[1:]:
        total[:n].addmm_(a, b)
    return total


def _prefix(weight: Tensor, stop: int) -> Tensor:
    """The first `stop` rows; a slice costs microseconds, which a decode step has few of, so a whole is not sliced."""
    return weight if stop == weight.shape[0] else weight.narrow(0, 0, stop)


def expand_blocks(x_ND: Tensor, w_FD: Tensor, b_F: Tensor | None, blocks: Sequence[Block]) -> tuple[Tensor, ...]:
    """`expand`, unknown to autograd."""
    if len(blocks) == 1 and blocks[0].num_tokens == x_ND.shape[0]:
        stop = blocks[0].stop
        return (F.linear(x_ND, _prefix(w_FD, stop), None if b_F is None else _prefix(b_F, stop)),)
    return tuple(
        F.linear(x_ND[: b.num_tokens], w_FD[b.start : b.stop], None if b_F is None else b_F[b.start : b.stop])
        for b in blocks
    )


def contract_blocks(
    num_tokens: int, w_FD: Tensor, b_D: Tensor | None, blocks: Sequence[Block], h: Sequence[Tensor]
) -> Tensor:
    """`contract`, unknown to autograd."""
    first = _prefix(w_FD, blocks[0].stop)
    y_ND = h[0] @ first if b_D is None else torch.addmm(b_D, h[0], first)
    if blocks[0].num_tokens < num_tokens:
        y_ND = F.pad(y_ND, (0, 0, 0, num_tokens - blocks[0].num_tokens))
    for b, h_k in zip(blocks[1:], h[1:], strict=True):
        y_ND[: b.num_tokens].addmm_(h_k, w_FD[b.start : b.stop])
    return y_ND


def autocast(*tensors: Any) -> tuple[Any, ...]:
    """Cast as autocast would (None passes): own functions and products in place are not on its list."""
    device = tensors[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):  # shapes alone have no precision to lower
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(None if t is None else t.to(dtype) for t in tensors)


def expand(x_ND: Tensor, w_FD: Tensor, b_F: Tensor | None, blocks: tuple[Block, ...]) -> tuple[Tensor, ...]:
    """Products of the ordered tokens with the row blocks of `w_FD`.

    Args:
        x_ND: tokens, widest first.
        w_FD: weight whose rows are nested.
        b_F: bias, or None.
        blocks: ascending, from `Layout`; at least one.

    Returns:
        One (num_tokens of the block, rows of the block) tensor a block.
    """
    if not torch.is_grad_enabled():
        return expand_blocks(x_ND, w_FD, b_F, blocks)
    x, w, b = autocast(x_ND, w_FD, b_F)
    return tuple(_Expand.apply(x, w, b, blocks))  # type: ignore[no-untyped-call]


def contract(
    num_tokens: int, h: Sequence[Tensor], w_FD: Tensor, b_D: Tensor | None, blocks: tuple[Block, ...]
) -> Tensor:
    """Sum of the blocks' products with the row blocks of `w_FD`: the inverse direction of `expand`.

    Args:
        num_tokens: N; tokens beyond the first block's (of width 0) get zeros, without the bias.
        h: one (num_tokens of the block, rows of the block) tensor a block.
        w_FD: weight whose rows are nested, (in, out).
        b_D: bias, or None.
        blocks: ascending, from `Layout`; at least one.

    Returns:
        (N, D), widest tokens first.
    """
    if len(blocks) == 1 and not torch.is_grad_enabled():
        return contract_blocks(num_tokens, w_FD, b_D, blocks, h)
    w, b, *h_cast = autocast(w_FD, b_D, *h)
    if not torch.is_grad_enabled():
        return contract_blocks(num_tokens, w, b, blocks, h_cast)
    return _Contract.apply(num_tokens, w, b, blocks, *h_cast)  # type: ignore[no-untyped-call,no-any-return]


class Contraction(nn.Module):
    """A linear map out of a nested dimension; its weight is (in, out)."""

    def __init__(self, nested_size: int, out_features: int, *, bias: bool) -> None:
        """Allocate; initialised as `nn.Linear` is."""
        super().__init__()
        self.weight = nn.Parameter(torch.empty(nested_size, out_features))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        nn.init.uniform_(self.weight, -(nested_size**-0.5), nested_size**-0.5)
