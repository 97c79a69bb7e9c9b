"""Attention of training chunks, which may begin within a sequence and go on over several, and its gradients.

Shapes: N tokens of the chunk, h tokens before it, M = h + N, H query heads, K KV heads, d head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from flextron.finetuning import attention_torch
from flextron.kernels import training as kernels
from flextron.model.attention import sdpa, window_mask
from flextron.model.config import DecoderConfig

__all__ = ["ChunkAttention", "valued"]


class ChunkAttention:
    """Attention of a chunk that may begin within a sequence and go on over several; for one layer and one use."""

    def __init__(
        self,
        config: DecoderConfig,
        layer: int,
        past_kv: tuple[Tensor, Tensor],
        cached_kv: tuple[Tensor, Tensor] | None = None,
        cached_out: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Take what was computed before.

        Args:
            config: the decoder's.
            layer: the layer, whose window counts.
            past_kv: keys and values, (h, K, d), of the tokens before the chunk that its first sequence sees.
            cached_kv: keys and values of the chunk itself, where they are computed again; gradients flow past them.
            cached_out: what the heads gave, where that is cached, too; see `cached_out`.
        """
        self._window, self._cap = config.window_of(layer), config.attention_cap
        self._past_kv, self._cached_kv = past_kv, cached_kv
        self.new: tuple[Tensor, Tensor] | None = None
        """Keys and values of the chunk, (N, K, d), once the layer has run; None if its attention is skipped."""
        self.cached_out = cached_out
        """What the heads gave, (N, H, d), and their log-sum-exps, (N, H), once the layer has run; None on devices other
        than a CPU."""

    def __call__(
        self, layer: int, segment: int, q_NHd: Tensor, k_NKd: Tensor, v_NKd: Tensor, lengths: Sequence[int]
    ) -> Tensor:
        """See `flextron.model.attention.Attention`."""
        if self._cached_kv is not None:
            k_NKd, v_NKd = valued(k_NKd, self._cached_kv[0]), valued(v_NKd, self._cached_kv[1])
        self.new = k_MKd, v_MKd = k_NKd, v_NKd
        if len(self._past_kv[0]):
            k_MKd, v_MKd = torch.cat((self._past_kv[0], k_NKd)), torch.cat((self._past_kv[1], v_NKd))
        if q_NHd.device.type == "cpu":
            out, lse = _Attend.apply(  # type: ignore[no-untyped-call]
                q_NHd, k_MKd, v_MKd, lengths, self._window, self.cached_out, self._cap
            )
            self.cached_out = out.detach(), lse
            return out  # type: ignore[no-any-return]
        parts = [
            self._attend(q_NHd[rows], k_MKd[keys], v_MKd[keys])
            for rows, keys in attention_torch.sequences(lengths, len(k_MKd))
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _attend(self, q_NHd: Tensor, k_LKd: Tensor, v_LKd: Tensor) -> Tensor:
        """The last N tokens of one sequence over all of it."""
        num_new, length = len(q_NHd), len(k_LKd)
        q, k, v = (t.transpose(0, 1)[None] for t in (q_NHd, k_LKd, v_LKd))
        if num_new == length and (self._window is None or length <= self._window):
            return sdpa(q, k, v, causal=True, cap=self._cap)[0].transpose(0, 1)
        positions = torch.arange(length, device=k.device)
        mask = window_mask(positions[length - num_new :], positions, self._window)
        return sdpa(q, k, v, mask=mask, cap=self._cap)[0].transpose(0, 1)


class Backend(Protocol):
    """Attention of a chunk and its gradients; two modules implement it."""

    def attend(
        self,
        q_NHd: Tensor,
        k_MKd: Tensor,
        v_MKd: Tensor,
        lengths: Sequence[int],
        window: int | None,
        cap: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Causal attention of the last tokens of some sequences.

        Args:
            q_NHd: queries of the chunk.
            k_MKd: keys of the chunk, and before them those that its first sequence has from before.
            v_MKd: values.
            lengths: tokens of each sequence in the chunk.
            window: keys that a query sees, itself included; None for all.
            cap: scores s count as cap · tanh(s / cap); None leaves them alone. The compiled kernels have none.

        Returns:
            What the heads give, (N, H, d), and the logarithm of each one's sum of exponentials, (N, H), at least
            float32.
        """

    def attend_backward(
        self,
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
        """Gradients of queries, keys and values.

        Args:
            q_NHd: as for `attend`, like the next four.
            k_MKd: see there.
            v_MKd: see there.
            lengths: see there.
            window: see there.
            cached_out: what `attend` gave.
            g_NHd: gradient of the heads' outputs.
            needs: which of the three are wanted; others are None.
            cap: as for `attend`.
        """


def _backend(q_NHd: Tensor, cap: float | None) -> Backend:
    """The compiled kernels where they take such attention, else PyTorch's operators."""
    return kernels if cap is None and kernels.takes_heads(q_NHd) else attention_torch


class _Attend(torch.autograd.Function):
    """Attention on a CPU. The backward pass computes the scores again, and the outputs if they are not cached."""

    @staticmethod
    def forward(
        ctx: Any,
        q_NHd: Tensor,
        k_MKd: Tensor,
        v_MKd: Tensor,
        lengths: Sequence[int],
        window: int | None,
        cached_out: tuple[Tensor, Tensor] | None,
        cap: float | None,
    ) -> tuple[Tensor, Tensor]:
        if cached_out is None:
            cached_out = _backend(q_NHd, cap).attend(q_NHd, k_MKd, v_MKd, lengths, window, cap)
        out_NHd, lse_NH = cached_out[0].view_as(cached_out[0]), cached_out[1].view_as(cached_out[1])
        ctx.lengths, ctx.window, ctx.cap = lengths, window, cap
        ctx.save_for_backward(q_NHd, k_MKd, v_MKd, out_NHd, lse_NH)
        ctx.mark_non_differentiable(lse_NH)
        return out_NHd, lse_NH

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        q, k, v, *cached_out = ctx.saved_tensors
        differentiate, needs = _backend(q, ctx.cap).attend_backward, ctx.needs_input_grad[:3]
        gradients = differentiate(q, k, v, ctx.lengths, ctx.window, tuple(cached_out), grads[0], needs, ctx.cap)
        return *gradients, None, None, None, None


class _Known(torch.autograd.Function):
    """The known value of a tensor that was not computed; its gradient is the tensor's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0], None


def valued(x: Tensor, value: Tensor) -> Tensor:
    """`value`, with gradients to `x`."""
    return _Known.apply(x, value)  # type: ignore[no-untyped-call,no-any-return]
