"""The compiled kernels of `csrc/training.cpp`: attention of training chunks, float32, CPU.

Shapes: N tokens of the chunk, M keys, H query heads, K KV heads, d head size.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from flextron.kernels.build import library_of, load_library
from flextron.kernels.layout import LANES, Attention, Gradients

__all__ = ["attend", "attend_backward", "takes_heads"]

_Pointer, _Number = ctypes.c_void_p, ctypes.c_int64


def takes_heads(q_NHd: Tensor) -> bool:
    """Whether there is attention for queries like these."""
    is_known = q_NHd.device.type == "cpu" and q_NHd.dtype == torch.float32 and q_NHd.shape[-1] % LANES == 0
    return is_known and not isinstance(load_library("training"), str)


def attend(
    q_NHd: Tensor, k_MKd: Tensor, v_MKd: Tensor, lengths: Sequence[int], window: int | None, cap: float | None = None
) -> tuple[Tensor, Tensor]:
    """See `flextron.finetuning.attention.Backend`."""
    assert cap is None, "there are no kernels for capped scores"
    q, k, v = (_rows(t) for t in (q_NHd, k_MKd, v_MKd))
    out_NHd, lse_NH = q.new_empty(q.shape), q.new_empty(q.shape[:2])
    task = _task(q, k, v, lengths, window, out_NHd, lse_NH)
    library_of("training").flextron_attend(ctypes.byref(task))
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
    assert cap is None, "there are no kernels for capped scores"
    q, k, v, g = (_rows(t) for t in (q_NHd, k_MKd, v_MKd, g_NHd))
    out_NHd, lse_NH = (t.contiguous() for t in cached_out)
    task = _task(q, k, v, lengths, window, out_NHd, lse_NH)
    dq, dk, dv = (t.new_empty(t.shape) if need else None for t, need in zip((q, k, v), needs, strict=True))
    gradients = Gradients(g.data_ptr(), g.stride(0), *(None if t is None else t.data_ptr() for t in (dq, dk, dv)))
    library_of("training").flextron_attend_back(ctypes.byref(task), ctypes.byref(gradients))
    return dq, dk, dv


def _rows(x_NHd: Tensor) -> Tensor:
    """The tensor, each row of which is in one piece."""
    in_one_piece = x_NHd.stride(2) == 1 and x_NHd.stride(1) == x_NHd.shape[2]
    return x_NHd if in_one_piece else x_NHd.contiguous()


def _task(
    q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], window: int | None, out: Tensor, lse: Tensor
) -> Attention:
    return Attention(
        num_heads=q.shape[1],
        num_kv_heads=k.shape[1],
        head_dim=q.shape[2],
        window=window or 0,
        num_sequences=len(lengths),
        lengths=ctypes.cast((_Number * len(lengths))(*lengths), _Pointer),
        num_past=len(k) - len(q),
        q=q.data_ptr(),
        k=k.data_ptr(),
        v=v.data_ptr(),
        q_stride=q.stride(0),
        k_stride=k.stride(0),
        v_stride=v.stride(0),
        out=out.data_ptr(),
        lse=lse.data_ptr(),
        threads=torch.get_num_threads(),
    )
