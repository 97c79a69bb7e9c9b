"""Attention of training windows, which may begin within a sequence and go on over several, and its gradients.

Shapes: N tokens of the window, h tokens before it, M = h + N, H query heads, K KV heads, d head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flextron.finetuning import attention_torch as blockwise
from flextron.kernels import training as window_kernels
from flextron.model.attention import sdpa, window_mask
from flextron.model.config import DecoderConfig

__all__ = ["WindowAttention", "valued"]


class WindowAttention:
    """Attention of a window that may begin within a sequence and go on over several; for one layer and one use."""

    def __init__(
        self,
        config: DecoderConfig,
        held: tuple[Tensor, Tensor],
        known: tuple[Tensor, Tensor] | None = None,
        given: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Take what was computed before.

        Args:
            config: the decoder's.
            held: keys and values, (h, K, d), of the tokens before the window that its first sequence sees.
            known: keys and values of the window itself, where they are computed again; gradients flow past them.
            given: what the heads gave, where that is known, too; see `given`.
        """
        self._window, self._held, self._known = config.sliding_window, held, known
        self.new: tuple[Tensor, Tensor] | None = None
        """Keys and values of the window, (N, K, d), once the layer has run; None if its attention is skipped."""
        self.given = given
        """What the heads gave, (N, H, d), and the logarithms of their sums of exponentials, (N, H), once the layer has
        run; None on other devices than a CPU."""

    def __call__(
        self, layer: int, segment: int, q_NHd: Tensor, k_NKd: Tensor, v_NKd: Tensor, lengths: Sequence[int]
    ) -> Tensor:
        """See `flextron.model.attention.Attention`."""
        if self._known is not None:
            k_NKd, v_NKd = valued(k_NKd, self._known[0]), valued(v_NKd, self._known[1])
        self.new = k_MKd, v_MKd = k_NKd, v_NKd
        if len(self._held[0]):
            k_MKd, v_MKd = torch.cat((self._held[0], k_NKd)), torch.cat((self._held[1], v_NKd))
        if q_NHd.device.type == "cpu":
            out, log_sums = _Attend.apply(q_NHd, k_MKd, v_MKd, lengths, self._window, self.given)  # type: ignore[no-untyped-call]
            self.given = out.detach(), log_sums
            return out  # type: ignore[no-any-return]
        parts = [
            self._attend(q_NHd[rows], k_MKd[keys], v_MKd[keys])
            for rows, keys in blockwise.sequences(lengths, len(k_MKd))
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _attend(self, q_NHd: Tensor, k_LKd: Tensor, v_LKd: Tensor) -> Tensor:
        """The last N tokens of one sequence over all of it."""
        num_new, length = len(q_NHd), len(k_LKd)
        q, k, v = (t.transpose(0, 1)[None] for t in (q_NHd, k_LKd, v_LKd))
        if num_new == length and (self._window is None or length <= self._window):
            return sdpa(q, k, v, causal=True)[0].transpose(0, 1)
        positions = torch.arange(length, device=k.device)
        mask = window_mask(positions[length - num_new :], positions, self._window)
        return sdpa(q, k, v, mask=mask)[0].transpose(0, 1)


class _Attend(torch.autograd.Function):
    """Attention on a CPU. The backward pass computes the scores again, and the outputs if they are not given."""

    @staticmethod
    def forward(
        ctx: Any,
        q_NHd: Tensor,
        k_MKd: Tensor,
        v_MKd: Tensor,
        lengths: Sequence[int],
        window: int | None,
        given: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, Tensor]:
        if given is None:
            attend = window_kernels.attend if window_kernels.takes_heads(q_NHd) else blockwise.attend
            given = attend(q_NHd, k_MKd, v_MKd, lengths, window)
        out_NHd, log_sums_NH = given[0].view_as(given[0]), given[1].view_as(given[1])
        ctx.lengths, ctx.window = lengths, window
        ctx.save_for_backward(q_NHd, k_MKd, v_MKd, out_NHd, log_sums_NH)
        ctx.mark_non_differentiable(log_sums_NH)
        return out_NHd, log_sums_NH

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        q, k, v, *given = ctx.saved_tensors
        compiled = window_kernels.takes_heads(q)
        differentiate = window_kernels.attend_backward if compiled else blockwise.attend_backward
        gradients = differentiate(q, k, v, ctx.lengths, ctx.window, tuple(given), grads[0], ctx.needs_input_grad[:3])
        return *gradients, None, None, None


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
