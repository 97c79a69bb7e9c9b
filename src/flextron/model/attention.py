"""The attention core behind one small interface, with a backend for whole sequences and one with a KV cache.

A backend gets queries, keys and values of one segment's new tokens, already rotated, and returns the heads' outputs.
The paged and the chunked backends of serving and finetuning implement the same protocol.

Shapes: N new tokens of the segment, H query heads, K KV heads, d head size, B sequences, T tokens of a sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from flextron.errors import FlextronError
from flextron.model.config import DecoderConfig
from flextron.spec import SubnetSpec

__all__ = ["Attention", "CachedAttention", "CausalAttention", "sdpa", "window_mask"]


class Attention(Protocol):
    """What the decoder asks of a backend."""

    def __call__(
        self, layer: int, segment: int, q_NHd: Tensor, k_NKd: Tensor, v_NKd: Tensor, lengths: Sequence[int]
    ) -> Tensor:
        """Causal attention of a segment's new tokens over all that their sequences hold; (N, H, d)."""


def sdpa(
    q_BHTd: Tensor,
    k_BKTd: Tensor,
    v_BKTd: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    cap: float | None = None,
) -> Tensor:
    """Scaled dot-product attention with grouped KV heads; with a cap, scores s count as cap · tanh(s / cap).

    On a CPU, repeating the KV heads is faster than PyTorch's own grouped mode, which leaves the flash kernel. The flash
    kernel's backward pass in bfloat16 takes twice as long as whole score matrices do.
    """
    if cap is not None:
        length = q_BHTd.shape[2]
        whole = q_BHTd.new_ones((length, length), dtype=torch.bool).tril() if causal else mask
        return _capped_scores(q_BHTd, k_BKTd, v_BKTd, whole, cap)
    if causal and q_BHTd.dtype == torch.bfloat16 and q_BHTd.device.type == "cpu" and q_BHTd.requires_grad:
        return _whole_scores(q_BHTd, k_BKTd, v_BKTd)
    repeats = q_BHTd.shape[1] // k_BKTd.shape[1]
    if repeats > 1:
        k_BKTd, v_BKTd = (t.repeat_interleave(repeats, dim=1) for t in (k_BKTd, v_BKTd))
    return F.scaled_dot_product_attention(q_BHTd, k_BKTd, v_BKTd, attn_mask=mask, is_causal=causal)


def _whole_scores(q_BHTd: Tensor, k_BKTd: Tensor, v_BKTd: Tensor) -> Tensor:
    """Causal attention of whole sequences by plain products; the query heads of a group lie below each other."""
    num_sequences, num_kv_heads, length, head_dim = k_BKTd.shape
    q, k, v = (t.reshape(num_sequences * num_kv_heads, -1, head_dim) for t in (q_BHTd, k_BKTd, v_BKTd))
    mask = q.new_full((length, length), float("-inf")).triu(1).repeat(q.shape[1] // length, 1)
    scores = torch.baddbmm(mask, q, k.transpose(1, 2), alpha=head_dim**-0.5)
    return torch.bmm(torch.softmax(scores, -1), v).view_as(q_BHTd)


def _capped_scores(q_BHTd: Tensor, k_BKTd: Tensor, v_BKTd: Tensor, mask: Tensor | None, cap: float) -> Tensor:
    """Attention by plain products, for PyTorch's kernels have no cap; `mask` is (queries, keys)."""
    num_queries, num_kv_heads = q_BHTd.shape[2], k_BKTd.shape[1]
    q_BKnd = q_BHTd.unflatten(1, (num_kv_heads, -1)).flatten(2, 3)
    scores = cap * ((q_BKnd @ k_BKTd.transpose(2, 3)) * (q_BHTd.shape[-1] ** -0.5 / cap)).tanh()
    if mask is not None:
        by_query = scores.unflatten(2, (-1, num_queries))
        scores = by_query.masked_fill(~mask, -torch.inf).flatten(2, 3)
    share = torch.softmax(scores, -1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(v_BKTd.dtype)
    out: Tensor = (share @ v_BKTd).unflatten(2, (-1, num_queries))
    return out.flatten(1, 2)


def _attend_last(q_BHd: Tensor, k_BKTd: Tensor, v_BKTd: Tensor, cap: float | None) -> Tensor:
    """One new token a sequence, which sees all that its sequence holds; (B, H, d).

    The query heads of a group stand in for positions, so that no KV head is repeated.
    """
    num_sequences, num_kv_heads, _, head_dim = k_BKTd.shape
    q_BKrd = q_BHd.reshape(num_sequences, num_kv_heads, -1, head_dim)
    if cap is not None:
        return _capped_scores(q_BKrd, k_BKTd, v_BKTd, None, cap).flatten(1, 2)
    return F.scaled_dot_product_attention(q_BKrd, k_BKTd, v_BKTd).flatten(1, 2)


def window_mask(query: Tensor, key: Tensor, window: int | None) -> Tensor:
    """Which key positions a query position sees: itself and the `window - 1` (or all) before it."""
    distance = query[..., :, None] - key[..., None, :]
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


class CausalAttention:
    """Whole sequences from position 0, without a cache: training and scoring."""

    def __init__(self, config: DecoderConfig) -> None:
        """Take windows and cap from the config."""
        self._config = config

    def __call__(
        self, layer: int, segment: int, q_NHd: Tensor, k_NKd: Tensor, v_NKd: Tensor, lengths: Sequence[int]
    ) -> Tensor:
        """See `Attention`; sequences of equal length run as one padded batch."""
        if len(set(lengths)) == 1:
            return self._equal(layer, q_NHd, k_NKd, v_NKd, len(lengths))
        parts = zip(*(t.split(list(lengths)) for t in (q_NHd, k_NKd, v_NKd)), strict=True)
        return torch.cat([self._equal(layer, q, k, v, 1) for q, k, v in parts])

    def _equal(self, layer: int, q_NHd: Tensor, k_NKd: Tensor, v_NKd: Tensor, num_sequences: int) -> Tensor:
        q, k, v = (t.unflatten(0, (num_sequences, -1)).transpose(1, 2) for t in (q_NHd, k_NKd, v_NKd))
        length, window, cap = q.shape[2], self._config.window_of(layer), self._config.attention_cap
        if window is not None and length > window:
            positions = torch.arange(length, device=q.device)
            out = sdpa(q, k, v, mask=window_mask(positions, positions, window), cap=cap)
        else:
            out = sdpa(q, k, v, causal=True, cap=cap)
        return out.transpose(1, 2).flatten(0, 1)


class CachedAttention:
    """Sequences that grow: new keys and values are appended to a cache of fixed capacity and attended with it.

    Its bytes are proportional to the attention groups of each segment's sub-network; skipped layers hold nothing.
    """

    def __init__(
        self,
        config: DecoderConfig,
        segments: Sequence[tuple[SubnetSpec, int]],
        capacity: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        """Reserve room.

        Args:
            config: the decoder's.
            segments: (sub-network, number of sequences) in the order of the batches that will come.
            capacity: tokens that each sequence can hold.
            dtype: type of keys and values.
            device: their device.
        """
        self._config, self._capacity, self._device = config, capacity, device
        self._lengths = [torch.zeros(n, dtype=torch.long, device=device) for _, n in segments]
        self._uniform_length: list[int | None] = [0 for _ in segments]
        self._store: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        for j, (spec, n) in enumerate(segments):
            for i, layer in enumerate(spec.layers):
                if layer.num_groups:
                    shape = (n, config.kv_rows(layer.num_groups) // config.head_dim, capacity, config.head_dim)
                    keys, values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
                    self._store[j, i] = keys, values

    @property
    def num_bytes(self) -> int:
        """Bytes reserved for keys and values."""
        return sum(t.numel() * t.element_size() for pair in self._store.values() for t in pair)

    def hold(self, lengths: Sequence[Sequence[int]]) -> None:
        """State how many tokens each sequence holds, per segment; what lies beyond is forgotten."""
        for j, held in enumerate(lengths):
            self._lengths[j] = torch.tensor(held, device=self._device)
            self._uniform_length[j] = held[0] if len(set(held)) == 1 else None

    def advance(self, lengths: Sequence[Sequence[int]]) -> None:
        """Count a batch's tokens as held, once all layers have seen them; `lengths` per segment and sequence."""
        for j, new in enumerate(lengths):
            self._lengths[j] += torch.tensor(new, device=self._device)
            held = self._uniform_length[j]
            self._uniform_length[j] = held + new[0] if held is not None and len(set(new)) == 1 else None

    def __call__(
        self, layer: int, segment: int, q_NHd: Tensor, k_NKd: Tensor, v_NKd: Tensor, lengths: Sequence[int]
    ) -> Tensor:
        """See `Attention`; `lengths` may differ between sequences."""
        held = self._uniform_length[segment]
        if held is not None and len(set(lengths)) == 1:
            return self._append_equal(layer, segment, q_NHd, k_NKd, v_NKd, len(lengths), held)
        parts = zip(*(t.split(list(lengths)) for t in (q_NHd, k_NKd, v_NKd)), strict=True)
        starts = self._lengths[segment].tolist()
        return torch.cat(
            [
                self._append_equal(layer, segment, q, k, v, 1, starts[s], slice(s, s + 1))
                for s, (q, k, v) in enumerate(parts)
            ]
        )

    def _append_equal(
        self,
        layer: int,
        segment: int,
        q_NHd: Tensor,
        k_NKd: Tensor,
        v_NKd: Tensor,
        num_sequences: int,
        held: int,
        rows: slice = slice(None),
    ) -> Tensor:
        """The same number of new tokens in each sequence, all of which hold `held` tokens."""
        keys, values = self._store[segment, layer]
        if num_sequences < keys.shape[0]:
            keys, values = keys[rows], values[rows]
        end = held + q_NHd.shape[0] // num_sequences
        if end > self._capacity:
            raise FlextronError(f"the KV cache holds {self._capacity} tokens a sequence; {end} were needed")
        window, cap = self._config.window_of(layer), self._config.attention_cap
        first = 0 if window is None else max(0, held + 1 - window)
        if end == held + 1:
            keys[:, :, held], values[:, :, held] = k_NKd, v_NKd
            return _attend_last(q_NHd, keys[:, :, first:end], values[:, :, first:end], cap)
        q, k, v = (t.unflatten(0, (num_sequences, -1)).transpose(1, 2) for t in (q_NHd, k_NKd, v_NKd))
        keys[:, :, held:end], values[:, :, held:end] = k, v
        if held == 0 and (window is None or end <= window):
            out = sdpa(q, k, v, causal=True, cap=cap)
        else:
            query = torch.arange(held, end, device=q.device)
            key = torch.arange(first, end, device=q.device)
            mask = window_mask(query, key, window)
            out = sdpa(q, keys[:, :, first:end], values[:, :, first:end], mask=mask, cap=cap)
        return out.transpose(1, 2).flatten(0, 1)
