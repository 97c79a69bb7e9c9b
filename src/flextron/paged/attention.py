"""Attention over pages for all sequences of a batch at once.

The cache is an array of blocks, each with the keys, then the values, of one KV head of one layer for the tokens of a
page. Where a layer's blocks lie follows from index tensors that are made once an iteration, for all layers: each layer
takes a slice of them. KV heads stand where attention has its batch, sequences where it has its heads, and the query
heads of a group where it has its positions. So no KV head is repeated, and what is gathered is used as it lies.

Shapes: B sequences, T new tokens of each, N = B · T, P pages of each, S = P · page size, W blocks of a page, K KV
heads, r query heads of each, d head size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from flextron.model.attention import sdpa, window_mask
from flextron.model.config import DecoderConfig
from flextron.paged.spans import Form, Group

__all__ = ["PagedAttention"]


class _Indices:
    """Where a group's tokens are written and read, in all layers."""

    def __init__(self, group: Group, positions_N: Tensor, page_rows_N: Tensor, tables: Tensor, cache: Tensor) -> None:
        """Make them on the device.

        Args:
            group: shapes.
            positions_N: of the new tokens, int64.
            page_rows_N: row of `tables` with the page of each token.
            tables: block tables below each other, (rows, W).
            cache: (blocks, 2, page size, d).
        """
        self.group = group
        self._dtype, self._page_size = cache.dtype, cache.shape[2]
        self._positions_BT = positions_N.view(group.size, group.length)
        tables = tables.view(group.num_rows, group.num_blocks).long()
        # rows of d numbers in the cache
        self.keys_NW = tables[page_rows_N.long()] * (2 * self._page_size) + (positions_N % self._page_size)[:, None]
        self.values_NW = self.keys_NW + self._page_size
        own = tables[:-1].view(group.size, group.pages, group.num_blocks)
        self._blocks_WBP = own.permute(2, 0, 1).contiguous()
        self._read: dict[int | None, tuple[Tensor, Tensor, Tensor]] = {}
        self._masks: dict[tuple[int | None, int], Tensor] = {}

    def read(self, window: int | None) -> tuple[Tensor, Tensor]:
        """Halves of blocks with the keys, and with the values, that a layer of this window may see; (W, B, P)."""
        return self._reach(window)[:2]

    def mask(self, window: int | None, repeats: int) -> Tensor:
        """What is added to scores, (1, B, r T or 1, S): nothing where a token is seen, else minus infinity."""
        repeats = 1 if self.group.length == 1 else repeats
        if (window, repeats) not in self._masks:
            seen_BTS = window_mask(self._positions_BT, self._reach(window)[2], window)
            mask_BTS = torch.zeros_like(seen_BTS, dtype=self._dtype).masked_fill_(~seen_BTS, -torch.inf)
            self._masks[window, repeats] = mask_BTS.repeat(1, repeats, 1)[None]
        return self._masks[window, repeats]

    def _reach(self, window: int | None) -> tuple[Tensor, Tensor, Tensor]:
        """See `read`; and the positions of the keys, (B or 1, S). A window reads no page that lies before it."""
        if window not in self._read:
            group, size = self.group, self._page_size
            blocks_WBP, first_B = self._blocks_WBP, self._positions_BT.new_zeros(1)
            # what a span's tokens see, wherever in a page it begins
            pages = group.pages if window is None else min(group.pages, (window + group.length - 3) // size + 2)
            if window is not None and pages < group.pages:
                first_B = ((self._positions_BT[:, 0] - window + 1) // size).clamp(0, group.pages - pages)
                chosen_BP = first_B[:, None] + torch.arange(pages, device=first_B.device)
                blocks_WBP = blocks_WBP.gather(2, chosen_BP.expand(group.num_blocks, -1, -1))
            keys_BS = first_B[:, None] * size + torch.arange(pages * size, device=first_B.device)
            self._read[window] = 2 * blocks_WBP, 2 * blocks_WBP + 1, keys_BS
        return self._read[window]


class PagedAttention:
    """Backend over pages; see `flextron.model.attention.Attention`."""

    def __init__(self, config: DecoderConfig, cache: Tensor, form: Form, positions_N: Tensor, parts: Sequence[Tensor]):
        """Make what all layers share.

        Args:
            config: the decoder's.
            cache: (blocks, 2, page size, d).
            form: shapes of the iteration.
            positions_N: of all new tokens, int64.
            parts: page rows and block tables of each group, in turn.
        """
        self._config = config
        self._rows = cache.view(-1, cache.shape[3])
        self._halves = cache.view(-1, cache.shape[2] * cache.shape[3])
        self._groups: list[list[_Indices]] = []
        left, done = iter(parts), 0
        for groups in form.groups:
            own = []
            for group in groups:
                positions = positions_N[done : done + group.num_tokens]
                own.append(_Indices(group, positions, next(left), next(left), cache))
                done += group.num_tokens
            self._groups.append(own)

    def __call__(
        self, layer: int, segment: int, q_NHd: Tensor, k_NKd: Tensor, v_NKd: Tensor, lengths: Sequence[int]
    ) -> Tensor:
        """Write the new keys and values to their pages, and attend over all that each sequence holds."""
        groups = self._groups[segment]
        if len(groups) == 1:
            return self._attend(layer, groups[0], q_NHd, k_NKd, v_NKd)
        sizes = [indices.group.num_tokens for indices in groups]
        parts = zip(groups, *(t.split(sizes) for t in (q_NHd, k_NKd, v_NKd)), strict=True)
        return torch.cat([self._attend(layer, *part) for part in parts])

    def _attend(self, layer: int, indices: _Indices, q_NHd: Tensor, k_NKd: Tensor, v_NKd: Tensor) -> Tensor:
        group, cap = indices.group, self._config.attention_cap
        first, num_heads = group.block_offsets[layer], k_NKd.shape[1]
        own = slice(first, first + num_heads)
        self._rows[indices.keys_NW[:, own]] = k_NKd
        self._rows[indices.values_NW[:, own]] = v_NKd
        if group.is_whole:
            q, k, v = (t.unflatten(0, (group.size, -1)).transpose(1, 2) for t in (q_NHd, k_NKd, v_NKd))
            return sdpa(q, k, v, causal=True, cap=cap).transpose(1, 2).flatten(0, 1)
        window, shape = self._config.window_of(layer), (num_heads, group.size, -1, q_NHd.shape[2])
        k_KBSd, v_KBSd = (
            self._halves.index_select(0, halves_WBP[own].flatten()).view(shape) for halves_WBP in indices.read(window)
        )
        q = q_NHd.unflatten(1, (num_heads, -1)).unflatten(0, (group.size, -1)).permute(2, 0, 3, 1, 4)  # (K, B, r, T, d)
        mask = indices.mask(window, q.shape[2])
        out = _scaled(q.flatten(2, 3), k_KBSd, v_KBSd, mask, cap).view(q.shape)
        return out.permute(1, 3, 0, 2, 4).reshape(q_NHd.shape)


def _scaled(q_KBLd: Tensor, k_KBSd: Tensor, v_KBSd: Tensor, mask: Tensor, cap: float | None) -> Tensor:
    """Attention of L query rows each; with a cap, scores s count as cap · tanh(s / cap)."""
    if cap is None:
        return F.scaled_dot_product_attention(q_KBLd, k_KBSd, v_KBSd, attn_mask=mask)
    scores = cap * ((q_KBLd @ k_KBSd.transpose(2, 3)) * (q_KBLd.shape[3] ** -0.5 / cap)).tanh() + mask
    shares = torch.softmax(scores, -1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(v_KBSd.dtype)
    return shares @ v_KBSd
