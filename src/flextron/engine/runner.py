"""Runs an iteration's tokens through the decoder over the paged KV cache, compiled where that is possible."""

from __future__ import annotations

from collections.abc import Sequence as Items
from itertools import accumulate

import torch
from torch import Tensor

from flextron.engine.sequence import Network, Plan, Sequence
from flextron.model.attention import sdpa, window_mask
from flextron.model.batch import Batch, TokenChoice
from flextron.model.config import DecoderConfig
from flextron.model.decoder import Decoder
from flextron.model.decoding import unit_offsets
from flextron.model.native import NativeLayers, Weights, why_not_native
from flextron.spec import SubnetSpec

__all__ = ["PagedAttention", "Runner", "make_network", "unit_bytes"]


def unit_bytes(decoder: Decoder, page_size: int) -> int:
    """Bytes of a unit: keys and values of one KV head of one layer for a page's tokens."""
    return 2 * page_size * decoder.config.head_dim * decoder.dtype.itemsize


def make_network(config: DecoderConfig, spec: SubnetSpec, router: TokenChoice | None, name: str) -> Network:
    """How the engine runs a sub-network.

    Args:
        config: of the decoder.
        spec: the sub-network.
        router: of its tokens' MLP widths, if any.
        name: differs for networks whose keys and values differ.
    """
    *offsets, num_units = unit_offsets(config, spec)
    return Network(spec, router, num_units=num_units, unit_offsets=tuple(offsets), key=name.encode())


class PagedAttention:
    """Backend over pages for PyTorch's operators; see `flextron.model.attention.Attention`."""

    def __init__(self, config: DecoderConfig, cache: Tensor, segments: Items[Items[Sequence]]) -> None:
        """Take the sequences of each segment of the batch that will run."""
        self._window, self._cache, self._segments = config.sliding_window, cache, segments
        self._page_size = cache.shape[2]

    def __call__(
        self, layer: int, segment: int, q_NHd: Tensor, k_NKd: Tensor, v_NKd: Tensor, lengths: Items[int]
    ) -> Tensor:
        """Write the new keys and values to their pages, and attend over all that each sequence holds."""
        parts = zip(*(t.split(list(lengths)) for t in (q_NHd, k_NKd, v_NKd)), strict=True)
        sequences = self._segments[segment]
        return torch.cat([self._one(layer, s, q, k, v) for s, (q, k, v) in zip(sequences, parts, strict=True)])

    def _one(self, layer: int, sequence: Sequence, q_NHd: Tensor, k_NKd: Tensor, v_NKd: Tensor) -> Tensor:
        size, device = self._page_size, q_NHd.device
        start, end = sequence.num_computed, sequence.num_computed + len(q_NHd)
        first = sequence.network.unit_offsets[layer]
        num_heads = k_NKd.shape[1]
        # (pages, KV heads)
        units = sequence.table[: -(-end // size), first : first + num_heads].long().to(device)
        positions = torch.arange(start, end, device=device)
        own, within = units[positions // size], (positions % size)[:, None].expand(-1, num_heads)
        self._cache[own, 0, within], self._cache[own, 1, within] = k_NKd, v_NKd
        # (pages, KV heads, 2, page, d) to (2, KV heads, tokens, d)
        held = self._cache[units].permute(2, 1, 0, 3, 4).flatten(2, 3)[:, None, :, :end]
        mask = window_mask(positions, torch.arange(end, device=device), self._window)
        out = sdpa(q_NHd.transpose(0, 1)[None], held[0], held[1], mask=mask)
        return out[0].transpose(0, 1)


class Runner:
    """Holds the cache; computes tokens."""

    def __init__(
        self,
        decoder: Decoder,
        *,
        num_units: int,
        page_size: int,
        native: bool | None = None,
        weights: Weights = "float32",
    ) -> None:
        """Reserve the cache.

        Args:
            decoder: the full, frozen model.
            num_units: of the cache.
            page_size: tokens of a page.
            native: whether to run the compiled iteration; where it can by default.
            weights: precision of the matrices; `int8` runs in the compiled iteration only.

        Raises:
            FlextronError: `native` or `int8` is asked for and not possible.
        """
        config = decoder.config
        self.decoder = decoder
        shape = (num_units, 2, page_size, config.head_dim)
        # zeros cost nothing until they are written: the system gives pages on first use
        self.cache = torch.zeros(shape, dtype=decoder.dtype, device=decoder.device)
        self.reason = why_not_native(decoder) if native is None else None
        """Why the compiled iteration is not used; None if it is, or was not wanted."""
        self._native: NativeLayers | None = None
        if native or weights == "int8" or (native is None and self.reason is None):
            self._native = NativeLayers(decoder, page_size, weights)
        self._columns: dict[tuple[tuple[Network, int], ...], tuple[Tensor, Tensor, Tensor]] = {}

    @property
    def is_native(self) -> bool:
        """Whether static sub-networks run in the compiled iteration."""
        return self._native is not None

    @torch.inference_mode()
    def run(self, plan: Plan) -> Tensor:
        """Compute the planned tokens.

        Returns:
            Scores over the vocabulary after the last token of each sequence whose tokens are all computed then,
            (such sequences, vocabulary), in the plan's order.
        """
        device = self.decoder.device
        tokens = [t for s, n in plan for t in s.tokens[s.num_computed : s.num_computed + n]]
        positions = [p for s, n in plan for p in range(s.num_computed, s.num_computed + n)]
        ends = list(accumulate(n for _, n in plan))
        rows = [end - 1 for end, (s, n) in zip(ends, plan, strict=True) if n == s.num_new]
        tokens_N, positions_N = torch.tensor(tokens, device=device), torch.tensor(positions, device=device)
        native = self._native
        if native is None or any(s.network.router is not None for s, _ in plan):
            hidden_ND = self._with_operators(tokens_N, positions_N, plan)
            return self.decoder.logits(hidden_ND[torch.tensor(rows, device=device, dtype=torch.long)])
        x_ND = self.decoder.embed(Batch(tokens_N, positions_N, ())).contiguous()
        tables = [s.table for s, n in plan for _ in range(n)]
        widths_LN, groups_LN, offsets_LN = self._layout(plan)
        native(x_ND, positions_N, widths_LN, groups_LN, tables, offsets_LN, self.cache)
        last_ND = x_ND if len(rows) == len(tokens) else x_ND[rows]
        return native.logits(self.decoder.final_norm(last_ND))

    def _with_operators(self, tokens_N: Tensor, positions_N: Tensor, plan: Plan) -> Tensor:
        """Final hidden states by PyTorch's operators; (N, D)."""
        batch = Batch.ragged(
            list(tokens_N.split([n for _, n in plan])),
            [s.network.spec for s, _ in plan],
            [s.num_computed for s, _ in plan],
            [s.network.router for s, _ in plan],
        )
        sequences = iter([s for s, _ in plan])
        segments = [[next(sequences) for _ in segment.lengths] for segment in batch.segments]
        hidden: Tensor = self.decoder(batch, PagedAttention(self.decoder.config, self.cache, segments))
        return hidden

    def _layout(self, plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
        """Neurons, groups and first units of every token in every layer, (layers, N); kept for the next iteration."""
        key = tuple((s.network, n) for s, n in plan)
        found = self._columns.get(key)
        if found is None:
            if len(self._columns) > 256:
                self._columns.clear()
            networks = [network for network, n in key for _ in range(n)]

            def table(columns: list[list[int]]) -> Tensor:
                return torch.tensor(columns, dtype=torch.int32).t().contiguous()

            found = (
                table([[layer.intermediate_size for layer in w.spec.layers] for w in networks]),
                table([[layer.num_groups for layer in w.spec.layers] for w in networks]),
                table([list(w.unit_offsets) for w in networks]),
            )
            self._columns[key] = found
        return found
