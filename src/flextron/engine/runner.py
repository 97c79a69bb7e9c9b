"""Runs an iteration's tokens through the decoder over the paged KV cache, compiled where that is possible."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from flextron.engine.request import Chunk, Network, Request
from flextron.generation.sampling import most_likely
from flextron.kernels.adapters import NativeAdapter, why_adapter_not_native
from flextron.kernels.decoder import NativeStep, Weights, why_not_native
from flextron.model.adapter import Adapter
from flextron.model.batch import TokenChoice
from flextron.model.decoder import Decoder
from flextron.model.device import wait_for
from flextron.paged import PagedStep, Span
from flextron.spec import SubnetSpec

__all__ = ["Computed", "Runner", "block_bytes", "greedy_tokens", "nested_network"]


_COMPILED, _ADAPTED_MLP, _OTHER = "compiled", "adapted MLP", "other"


class Computed(NamedTuple):
    """What an iteration computed where its chunks want it, in their order."""

    logits_RV: Tensor
    """Scores over the vocabulary. Where a chunk does not need all, those that are certainly not the largest may be
    minus infinity."""
    hidden_SD: Tensor
    """Final hidden states, normalised."""


def block_bytes(decoder: Decoder, page_size: int) -> int:
    """Bytes of a block: keys and values of one KV head of one layer for a page's tokens."""
    return 2 * page_size * decoder.config.head_dim * decoder.dtype.itemsize


def greedy_tokens(chunks: Sequence[Chunk], logits_RV: Tensor) -> dict[Request, list[int]]:
    """The next token of each request that takes the likeliest one, found for all at once: a GPU is waited for once."""
    ends = accumulate(c.num_logits for c in chunks)
    last = {c.request: end - 1 for c, end in zip(chunks, ends, strict=True) if c.num_logits and not c.needs_all_logits}
    if not last:
        return {}
    rows = list(last.values())
    # those of draws, drafts and prompts need no likeliest token
    chosen = logits_RV if len(rows) == len(logits_RV) else logits_RV[rows]
    return {request: [token] for request, token in zip(last, most_likely(chosen).tolist(), strict=True)}


def nested_network(own: Network, spec: SubnetSpec) -> Network:
    """A sub-network of `own`, at most as wide as `spec`, that reads and writes the pages of `own`'s requests.

    It keeps `own`'s adapter, sliced as the weights are: its tokens are to be those that `own` would choose.
    """
    return replace(own, spec=own.spec.narrowed_to(spec))


def _span(chunk: Chunk) -> Span:
    network = chunk.network
    return Span(
        chunk.tokens,
        chunk.start,
        chunk.request.block_table,
        network.num_blocks,
        network.block_offsets,
        network.spec,
        network.router,
        network.adapter,
    )


class Runner:
    """Holds the cache; computes tokens."""

    def __init__(
        self,
        decoder: Decoder,
        *,
        num_blocks: int,
        page_size: int,
        native: bool | None = None,
        weights: Weights = "float32",
        draft_weights: Weights | None = None,
        screens_head: bool = True,
        adapts_threads: bool = True,
    ) -> None:
        """Reserve the cache.

        Args:
            decoder: the full, frozen model.
            num_blocks: blocks of the cache.
            page_size: tokens of a page.
            native: whether to run the compiled iteration; where it can by default.
            weights: precision of the matrices; `int8` and `int4` run in the compiled iteration only.
            draft_weights: another precision that `run` may be asked for.
            screens_head: keep a float32 head in eight bits, too, for chunks of which the likeliest token is enough.
            adapts_threads: let the compiled iteration run on fewer threads while that is faster.

        Raises:
            FlextronError: `native`, `int8` or `int4` is asked for and not possible.
        """
        self.decoder = decoder
        self._paged = PagedStep(decoder, num_blocks=num_blocks, page_size=page_size)
        self._weights = weights
        wanted = {weights, *([] if draft_weights is None else [draft_weights])}
        runs_compiled = why_not_native(decoder) is None if native is None else native
        if not runs_compiled:
            wanted -= {"float32"}  # PyTorch's operators run these
        how = {"screens_head": screens_head, "adapts_threads": adapts_threads}
        self._native = {w: NativeStep(decoder, page_size, w, **how) for w in sorted(wanted)}
        self._columns: dict[tuple[tuple[Network, int], ...], tuple[Tensor, Tensor, Tensor]] = {}
        self._adapters: dict[Adapter, NativeAdapter | None] = {}
        """Compiled forms of adapters; None for those that only PyTorch's operators can run."""

    def network(
        self,
        spec: SubnetSpec,
        router: TokenChoice | None,
        name: str,
        adapter: Adapter | None = None,
        layout: SubnetSpec | None = None,
    ) -> Network:
        """How the engine runs a sub-network.

        Args:
            spec: the sub-network.
            router: chooses the MLP widths of its tokens, if there is one.
            name: differs for networks whose keys and values differ.
            adapter: what stands beside its linears, if anything.
            layout: the sub-network whose pages it reads and writes; its own by default.
        """
        layout = layout or spec
        *offsets, num_blocks = accumulate(self._kv_heads(self.decoder.held(layout)), initial=0)
        return Network(
            spec, router, adapter, layout, num_blocks=num_blocks, block_offsets=tuple(offsets), key=name.encode()
        )

    def num_page_blocks(self, spec: SubnetSpec) -> int:
        """Blocks of a page of a sub-network; callable from any thread."""
        return sum(self._kv_heads(spec))

    def _kv_heads(self, spec: SubnetSpec) -> list[int]:
        """KV heads of each layer."""
        config = self.decoder.config
        return [config.kv_rows(layer.num_groups) // config.head_dim for layer in spec.layers]

    def forget(self, adapter: Adapter) -> None:
        """Drop what is kept of an adapter and of networks with it."""
        self._adapters.pop(adapter, None)
        self._paged.forget(adapter)
        used = {key: columns for key, columns in self._columns.items() if all(n.adapter is not adapter for n, _ in key)}
        self._columns = used

    @torch.inference_mode()
    def run(self, chunks: Sequence[Chunk], weights: Weights | None = None) -> Computed:
        """Compute tokens of different requests.

        Args:
            chunks: what to compute; pages must be there.
            weights: precision; the engine's by default.
        """
        native = self._native.get(weights or self._weights)
        groups = self._groups(chunks, native is not None)
        if len(groups) == 1:
            return self._run_group(chunks, native if _COMPILED in groups else None)
        logits: dict[int, Tensor] = {}
        hidden: dict[int, Tensor] = {}
        for kind, members in groups.items():
            own = [chunks[i] for i in members]
            made = self._run_group(own, native if kind == _COMPILED else None)
            logits |= zip(members, made.logits_RV.split([c.num_logits for c in own]), strict=True)
            hidden |= zip(members, made.hidden_SD.split([c.num_hidden for c in own]), strict=True)
        return Computed(*(torch.cat([found[i] for i in range(len(chunks))]) for found in (logits, hidden)))

    def _groups(self, chunks: Sequence[Chunk], has_native: bool) -> dict[str, list[int]]:
        """Which chunks run together, by index, so that how a request runs does not depend on what runs beside it."""
        is_routed = any(c.network.router is not None for c in chunks)
        groups: dict[str, list[int]] = {}
        for i, chunk in enumerate(chunks):
            adapter = chunk.network.adapter
            if has_native and chunk.network.router is None and (adapter is None or self._compiled(adapter) is not None):
                kind = _COMPILED
            else:  # the decoder has no bypasses in the MLPs of a routed batch
                kind = _ADAPTED_MLP if is_routed and adapter is not None and adapter.has_mlp else _OTHER
            groups.setdefault(kind, []).append(i)
        return groups

    def _compiled(self, adapter: Adapter) -> NativeAdapter | None:
        """An adapter's form for the compiled iteration; None if it does not run there."""
        if adapter not in self._adapters:
            runs = why_adapter_not_native(adapter) is None
            self._adapters[adapter] = NativeAdapter(adapter) if runs else None
        return self._adapters[adapter]

    def _run_group(self, chunks: Sequence[Chunk], native: NativeStep | None) -> Computed:
        """Run one group of chunks, compiled or by PyTorch's operators."""
        ends = list(accumulate(len(c.tokens) for c in chunks))
        rows = [row for end, c in zip(ends, chunks, strict=True) for row in range(end - c.num_logits, end)]
        shown = [row for end, c in zip(ends, chunks, strict=True) for row in range(end - c.num_hidden, end)]
        if native is None:
            return self._with_operators(chunks, rows, shown)
        tokens_N = torch.tensor([t for c in chunks for t in c.tokens])
        positions_N = torch.tensor([p for c in chunks for p in range(c.start, c.start + len(c.tokens))])
        block_tables = [c.request.block_table for c in chunks for _ in c.tokens]
        widths_LN, groups_LN, offsets_LN = self._layout(chunks)
        adapters = None
        if any(c.network.adapter is not None for c in chunks):
            each = [None if c.network.adapter is None else self._adapters[c.network.adapter] for c in chunks]
            adapters = [a for a, c in zip(each, chunks, strict=True) for _ in c.tokens]
        # those of which all logits are wanted come first
        full = [c.needs_all_logits for c in chunks for _ in range(c.num_logits)]
        order = sorted(range(len(rows)), key=lambda i: not full[i])
        wanted = [rows[i] for i in order]
        hidden_SD = torch.empty(len(shown), self.decoder.config.hidden_size)
        logits_RV = native(
            tokens_N,
            positions_N,
            widths_LN,
            groups_LN,
            block_tables,
            offsets_LN,
            self._paged.cache,
            wanted,
            adapters,
            sum(full),
            shown,
            hidden_SD,
        )
        return Computed(logits_RV if wanted == rows else logits_RV[torch.tensor(order).argsort()], hidden_SD)

    def _logits(self, hidden_RD: Tensor, chunks: Sequence[Chunk]) -> Tensor:
        """Scores by PyTorch's operators, by each adapter's own head where one has that."""
        outers = [None if c.network.adapter is None else c.network.adapter.outer for c in chunks]
        if not any(outers):
            return self.decoder.logits(hidden_RD)
        parts = hidden_RD.split([c.num_logits for c in chunks])
        return torch.cat([self.decoder.logits(part, outer) for part, outer in zip(parts, outers, strict=True)])

    def _with_operators(self, chunks: Sequence[Chunk], rows: list[int], shown: list[int]) -> Computed:
        """What is wanted of `rows` and `shown`, by PyTorch's operators."""
        ran = self._paged.run([_span(chunk) for chunk in chunks], rows + shown)
        if ran.mlp_shares is not None:
            for chunk, share in zip(chunks, ran.mlp_shares, strict=True):
                if chunk.network.router is not None:
                    chunk.request.mlp_share = share
        scored_RD, hidden_SD = ran.hidden_RD.split([len(rows), len(shown)])
        logits_RV = self._logits(scored_RD, chunks)
        wait_for(self.decoder.device)  # iterations are timed, and nothing else can be done meanwhile
        return Computed(logits_RV, hidden_SD)

    def _layout(self, chunks: Sequence[Chunk]) -> tuple[Tensor, Tensor, Tensor]:
        """Neurons, groups and first blocks of every token in every layer, (layers, N); kept for the next iteration."""
        key = tuple((c.network, len(c.tokens)) for c in chunks)
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
                table([list(w.block_offsets) for w in networks]),
            )
            self._columns[key] = found
        return found
