"""Attention of training windows, which may begin within a sequence, with a backward pass that suits a CPU.

PyTorch's fused kernel reaches a quarter of a CPU's arithmetic, its backward pass less, and repeats KV heads. Here the
query heads of a KV head are rows of one product; tokens go block by block, so that what later keys would add is not
computed.

Shapes: N tokens of the window, h tokens before it, L of one sequence so far, H query heads, K KV heads, r query heads
of a KV head, n tokens of a block, d head size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flextron.model.attention import sdpa, window_mask
from flextron.model.config import DecoderConfig

__all__ = ["WindowAttention"]

_BLOCK = 64


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
            k_NKd, v_NKd = valued(k_NKd, self._known[0]), valued(v_NKd, self._known[1])
        self.new = k_NKd, v_NKd
        parts = list(zip(*(t.split(list(lengths)) for t in (q_NHd, k_NKd, v_NKd)), strict=True))
        if len(self._held[0]):
            q, k, v = parts[0]
            parts[0] = q, torch.cat((self._held[0], k)), torch.cat((self._held[1], v))
        out = [self._attend(*part) for part in parts]
        return out[0] if len(out) == 1 else torch.cat(out)

    def _attend(self, q_NHd: Tensor, k_LKd: Tensor, v_LKd: Tensor) -> Tensor:
        """The last N tokens of one sequence over all of it."""
        if q_NHd.device.type == "cpu":
            out: Tensor = _Blockwise.apply(q_NHd, k_LKd, v_LKd, self._window)  # type: ignore[no-untyped-call]
            return out
        num_new, length = len(q_NHd), len(k_LKd)
        q, k, v = (t.transpose(0, 1)[None] for t in (q_NHd, k_LKd, v_LKd))
        if num_new == length and (self._window is None or length <= self._window):
            return sdpa(q, k, v, causal=True)[0].transpose(0, 1)
        positions = torch.arange(length, device=k.device)
        mask = window_mask(positions[length - num_new :], positions, self._window)
        return sdpa(q, k, v, mask=mask)[0].transpose(0, 1)


class _Block(NamedTuple):
    rows: slice
    """Of the window."""
    seen: slice
    """Keys of the sequence that any of them sees."""
    is_cut: bool
    """Whether the window of the model hides some of these from some of them."""


def _blocks(num_new: int, length: int, window: int | None) -> Iterator[_Block]:
    before = length - num_new
    for a in range(0, num_new, _BLOCK):
        e = min(a + _BLOCK, num_new)
        first = 0 if window is None else max(0, before + a + 1 - window)
        yield _Block(slice(a, e), slice(first, before + e), window is not None and before + e > window)


def _hide(scores_Knj: Tensor, block: _Block, num_heads: int, window: int | None) -> None:
    """Take out what a query does not see; of the keys j only the last n can come after it."""
    n, j = block.rows.stop - block.rows.start, scores_Knj.shape[-1]
    first = 0 if block.is_cut else j - n
    query, key = torch.arange(j - n, j), torch.arange(first, j)
    hidden = ~window_mask(query, key, window if block.is_cut else None)
    scores_Knj.unflatten(1, (num_heads, n))[..., first:].masked_fill_(hidden, -torch.inf)


class _Blockwise(torch.autograd.Function):
    """The last N tokens of a sequence over all L of it."""

    @staticmethod
    def forward(ctx: Any, q_NHd: Tensor, k_LKd: Tensor, v_LKd: Tensor, window: int | None) -> Tensor:
        num_heads, scale = q_NHd.shape[1] // k_LKd.shape[1], q_NHd.shape[-1] ** -0.5
        q, k, v = _rows(q_NHd, k_LKd.shape[1]), k_LKd.transpose(0, 1), v_LKd.transpose(0, 1)
        out_NHd = torch.empty_like(q_NHd)
        out = _rows(out_NHd, len(k))
        ctx.shares, ctx.window = [], window
        for block in _blocks(len(q_NHd), len(k_LKd), window):
            own = (q[:, :, block.rows] * scale).flatten(1, 2)
            share = torch.bmm(own, k[:, block.seen].transpose(1, 2))
            _hide(share, block, num_heads, window)
            share = torch.softmax(share, -1)
            out[:, :, block.rows] = torch.bmm(share, v[:, block.seen]).unflatten(1, (num_heads, -1))
            ctx.shares.append(share)
        ctx.save_for_backward(q_NHd, k_LKd, v_LKd, out_NHd)
        return out_NHd

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        q_NHd, k_LKd, v_LKd, out_NHd = ctx.saved_tensors
        num_kv, scale = k_LKd.shape[1], q_NHd.shape[-1] ** -0.5
        q, g = _rows(q_NHd, num_kv), _rows(grads[0], num_kv)
        through = _rows((grads[0] * out_NHd).sum(-1, keepdim=True), num_kv)
        k, v = k_LKd.transpose(0, 1), v_LKd.transpose(0, 1)
        need_q, need_k, need_v, _ = ctx.needs_input_grad
        dq_NHd, dk, dv = torch.empty_like(q_NHd), torch.zeros_like(k), torch.zeros_like(v)
        for block, share in zip(_blocks(len(q_NHd), len(k_LKd), ctx.window), ctx.shares, strict=True):
            own_g = g[:, :, block.rows].flatten(1, 2)
            if need_v:
                dv[:, block.seen] += torch.bmm(share.transpose(1, 2), own_g)
            if not (need_q or need_k):
                continue
            ds = torch.bmm(own_g, v[:, block.seen].transpose(1, 2))
            ds.sub_(through[:, :, block.rows].flatten(1, 2)).mul_(share)
            if need_q:
                own = torch.bmm(ds, k[:, block.seen]).mul_(scale)
                _rows(dq_NHd, num_kv)[:, :, block.rows] = own.unflatten(1, (q.shape[1], -1))
            if need_k:
                own = (q[:, :, block.rows] * scale).flatten(1, 2)
                dk[:, block.seen] += torch.bmm(ds.transpose(1, 2), own)
        return dq_NHd if need_q else None, dk.transpose(0, 1), dv.transpose(0, 1), None


def _rows(x_NHd: Tensor, num_kv: int) -> Tensor:
    """A view by KV heads, (K, r, N, d)."""
    by_head: Tensor = x_NHd.unflatten(1, (num_kv, -1))
    return by_head.permute(1, 2, 0, 3)


class _Known(torch.autograd.Function):
    """The known value of a tensor that was not computed; its gradient is the tensor's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0], None


def valued(x: Tensor, value: Tensor) -> Tensor:
    """`value`, with gradients to `x`."""
    return _Known.apply(x, value)  # type: ignore[no-untyped-call,no-any-return]
