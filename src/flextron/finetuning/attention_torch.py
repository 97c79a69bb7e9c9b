"""Attention of training chunks in PyTorch, forward and backward, in a way that suits a CPU.

PyTorch's fused kernel reaches a quarter of a CPU's arithmetic, its backward pass less, and repeats KV heads. Here the
query heads of a KV head are rows of one product; tokens go block by block, so that what later keys would add is not
computed. Where there is a compiler, `kernels.training` does the same in half the time.

Shapes: N tokens of the chunk, M keys, H query heads, K KV heads, r query heads of a KV head, n tokens of a block, j of
its keys, d head size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flextron.model.attention import window_mask

__all__ = ["attend", "attend_backward", "sequences"]

_BLOCK = 64


def sequences(lengths: Sequence[int], num_keys: int) -> Iterator[tuple[slice, slice]]:
    """Rows of the chunk and keys of each sequence; keys from before the chunk are the first one's."""
    num_past, start = num_keys - sum(lengths), 0
    for k, n in enumerate(lengths):
        yield slice(start, start + n), slice(num_past + start if k else 0, num_past + start + n)
        start += n


def attend(
    q_NHd: Tensor,
    k_MKd: Tensor,
    v_MKd: Tensor,
    lengths: Sequence[int],
    window: int | None,
    cap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """See `flextron.finetuning.attention.Backend`."""
    num_kv = k_MKd.shape[1]
    out_NHd = torch.empty_like(q_NHd)
    lse_NH = q_NHd.new_empty(q_NHd.shape[:2], dtype=_precise(q_NHd))
    q, out, lse = (_rows(t, num_kv) for t in (q_NHd, out_NHd, lse_NH[..., None]))
    k, v = k_MKd.transpose(0, 1), v_MKd.transpose(0, 1)
    for block in _blocks(lengths, len(k_MKd), window):
        scores, _ = _scores(q, k, block, window, cap)
        sums = scores.logsumexp(-1, keepdim=True)
        share = scores.sub_(sums).exp_().to(v.dtype)
        out[:, :, block.rows] = torch.bmm(share, v[:, block.seen]).unflatten(1, (q.shape[1], -1))
        lse[:, :, block.rows] = sums.unflatten(1, (q.shape[1], -1))
    return out_NHd, lse_NH


def attend_backward(
    q_NHd: Tensor,
    k_MKd: Tensor,
    v_MKd: Tensor,
    lengths: Sequence[int],
    window: int | None,
    cached_out: tuple[Tensor, Tensor],
    g_NHd: Tensor,
    needs: Sequence[bool],
    cap: float | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """See `flextron.finetuning.attention.Backend`."""
    out_NHd, lse_NH = cached_out
    num_kv, scale = k_MKd.shape[1], q_NHd.shape[-1] ** -0.5
    through_NH1 = (g_NHd * out_NHd).sum(-1, keepdim=True)
    q, g, through, lse = (_rows(t, num_kv) for t in (q_NHd, g_NHd, through_NH1, lse_NH[..., None]))
    k, v = k_MKd.transpose(0, 1), v_MKd.transpose(0, 1)
    need_q, need_k, need_v = needs
    dq_NHd, dk, dv = torch.empty_like(q_NHd), torch.zeros_like(k), torch.zeros_like(v)
    for block in _blocks(lengths, len(k_MKd), window):
        scores, slope = _scores(q, k, block, window, cap)
        share = scores.sub_(_own(lse, block)).exp_().to(v.dtype)
        own_g = _own(g, block)
        if need_v:
            dv[:, block.seen] += torch.bmm(share.transpose(1, 2), own_g)
        if not (need_q or need_k):
            continue
        ds = torch.bmm(own_g, v[:, block.seen].transpose(1, 2)).sub_(_own(through, block)).mul_(share)
        if slope is not None:
            ds = ds.mul_(slope.to(ds.dtype))
        if need_q:
            own = torch.bmm(ds, k[:, block.seen]).mul_(scale)
            _rows(dq_NHd, num_kv)[:, :, block.rows] = own.unflatten(1, (q.shape[1], -1))
        if need_k:
            dk[:, block.seen] += torch.bmm(ds.transpose(1, 2), _own(q, block) * scale)
    return (
        dq_NHd if need_q else None,
        dk.transpose(0, 1) if need_k else None,
        dv.transpose(0, 1) if need_v else None,
    )


class _Block(NamedTuple):
    rows: slice
    """Rows of the chunk."""
    seen: slice
    """Keys that any of them sees."""
    is_cut: bool
    """Whether the model's sliding window hides some of these from some of them."""


def _blocks(lengths: Sequence[int], num_keys: int, window: int | None) -> Iterator[_Block]:
    for rows, keys in sequences(lengths, num_keys):
        before = keys.stop - rows.stop
        for a in range(rows.start, rows.stop, _BLOCK):
            e = min(a + _BLOCK, rows.stop)
            first = keys.start if window is None else max(keys.start, before + a + 1 - window)
            is_cut = window is not None and before + e - keys.start > window
            yield _Block(slice(a, e), slice(first, before + e), is_cut)


def _scores(q: Tensor, k: Tensor, block: _Block, window: int | None, cap: float | None) -> tuple[Tensor, Tensor | None]:
    """Scores of a block's rows, (K, r n, j), at least float32, and the slope of their cap, if there is one.

    Of the keys only the last n can come after a query.
    """
    n, j = block.rows.stop - block.rows.start, block.seen.stop - block.seen.start
    scores = torch.bmm(_own(q, block) * q.shape[-1] ** -0.5, k[:, block.seen].transpose(1, 2)).to(_precise(q))
    slope = None
    if cap is not None:
        share = scores.div_(cap).tanh_()
        scores, slope = share * cap, 1 - share.square()
    first = 0 if block.is_cut else j - n
    query, key = torch.arange(j - n, j), torch.arange(first, j)
    hidden = ~window_mask(query, key, window if block.is_cut else None)
    scores.unflatten(1, (q.shape[1], n))[..., first:].masked_fill_(hidden, -torch.inf)
    return scores, slope


def _precise(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _own(x: Tensor, block: _Block) -> Tensor:
    """A block's rows of a tensor by KV heads, (K, r n, d)."""
    return x[:, :, block.rows].flatten(1, 2)


def _rows(x_NHd: Tensor, num_kv: int) -> Tensor:
    """A view by KV heads, (K, r, N, d)."""
    by_head: Tensor = x_NHd.unflatten(1, (num_kv, -1))
    return by_head.permute(1, 2, 0, 3)
