"""An iteration by PyTorch's operators: numbers are packed on the host, copied once, and the decoder runs on them.

Where an executor is at hand (CUDA graphs on a GPU), an iteration in which all sequences decode, or verify drafts, is
padded to a form that comes again, and runs from memory that stays in place. Padding reads a block of zeros and writes
to a block that nobody reads, so it touches no page of a sequence.

A page is cleared when its first token is written: attention reads whole pages, and what another sequence has left there
may be no number, which no mask can hide.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from flextron.model.adapter import Adapter
from flextron.model.batch import Batch
from flextron.model.decoder import Decoder
from flextron.paged.attention import PagedAttention
from flextron.paged.graphs import CudaGraphs, Executor
from flextron.paged.spans import Form, Span, arrange, fresh_blocks, pack, padded

__all__ = ["PagedStep", "Ran"]

_EXTRA_BLOCKS = 2
_MOST_FORMS = 64
"""Forms that are kept; the one that was used the longest ago gives way."""
_MOST_TOKENS = 16
"""Tokens of a span up to which its form is likely to come again."""


class Ran(NamedTuple):
    """What an iteration gave."""

    hidden_RD: Tensor
    """Final hidden states, normalised, of the tokens that were asked for."""
    mlp_shares: list[float] | None
    """The share of the full model's MLP neurons that the last token of each span ran through; None without routers."""


@dataclass(frozen=True)
class _RoutedBatch(Batch):
    """Keeps how many neurons each token ran through."""

    neurons: list[Tensor] = field(default_factory=list)
    """MLP widths of all tokens, (N,), of each layer that has run."""

    def token_widths(self, layer: int, x_ND: Tensor, widths: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """See `Batch.token_widths`."""
        chosen_N, gates_N = super().token_widths(layer, x_ND, widths)
        self.neurons.append(chosen_N)
        return chosen_N, gates_N


class _Kept:
    """A form that came before: memory for its numbers, and how it runs."""

    def __init__(self, numbers: Tensor, function: Callable[[], Tensor]) -> None:
        self.numbers, self.run = numbers, function
        self.num_runs = 0


class PagedStep:
    """Runs spans of many sequences over one paged cache."""

    def __init__(self, decoder: Decoder, *, num_blocks: int, page_size: int, executor: Executor | None = None) -> None:
        """Reserve the cache.

        Args:
            decoder: the full, frozen model.
            num_blocks: blocks of the cache that block tables may name.
            page_size: tokens of a page.
            executor: runs forms that come again; CUDA graphs by default, where the decoder is on a GPU by itself.
        """
        self._decoder, self._page_size = decoder, page_size
        shape = (num_blocks + _EXTRA_BLOCKS, 2, page_size, decoder.config.head_dim)
        # zeros cost nothing until they are written: the system gives pages on first use
        self.cache = torch.zeros(shape, dtype=decoder.dtype, device=decoder.device)
        self._sink, self._empty = num_blocks, num_blocks + 1
        self._is_cuda = decoder.device.type == "cuda"
        # a graph holds the sums over ranks only where NCCL runs them
        self._executor = CudaGraphs() if executor is None and self._is_cuda and decoder.num_ranks == 1 else executor
        self._kept: OrderedDict[Form, _Kept] = OrderedDict()

    def forget(self, adapter: Adapter) -> None:
        """Drop what was kept of iterations with an adapter."""
        for form in [f for f in self._kept if any(s.adapter is adapter for s in f.segments)]:
            del self._kept[form]

    @torch.inference_mode()
    def run(self, spans: Sequence[Span], wanted: Sequence[int]) -> Ran:
        """Compute tokens of different sequences.

        Args:
            spans: what to compute, at most one of a sequence; pages must be there.
            wanted: tokens, counted through all spans, of which hidden states are asked for.
        """
        num_pages = [span.num_pages(self._page_size) for span in spans]
        fresh = fresh_blocks(spans, num_pages, self._page_size)
        if fresh is not None:
            self.cache.index_fill_(0, self._to_device(fresh).long(), 0)
        form, members = arrange(spans, num_pages, len(wanted), self._decoder.config)
        kept_form = None if self._executor is None else padded(form, _MOST_TOKENS)
        form = kept_form or form
        host = pack(
            form,
            members,
            spans,
            num_pages,
            wanted,
            page_size=self._page_size,
            sink=self._sink,
            empty=self._empty,
            pinned=self._is_cuda,
        )
        if kept_form is None:
            numbers = self._to_device(host)
            batch, hidden_ND = self._compute(form, numbers)
            shares = self._mlp_shares(batch, form, members) if batch.is_routed else None
        else:
            numbers, hidden_ND = self._repeat(kept_form, host)
            shares = None
        first = 2 * form.num_tokens
        return Ran(hidden_ND.index_select(0, numbers[first : first + len(wanted)]), shares)

    def _to_device(self, numbers: Tensor) -> Tensor:
        if not self._is_cuda:
            return numbers.to(self._decoder.device)
        return (numbers if numbers.is_pinned() else numbers.pin_memory()).to(self._decoder.device, non_blocking=True)

    def _repeat(self, form: Form, host: Tensor) -> tuple[Tensor, Tensor]:
        """Run from the memory of a form: as it is the first time, which is the warm-up of the second."""
        assert self._executor is not None
        kept = self._kept.get(form)
        if kept is None:
            numbers = torch.zeros(len(host), dtype=torch.int32, device=self._decoder.device)
            kept = self._kept[form] = _Kept(numbers, lambda: self._compute(form, numbers)[1])
            if len(self._kept) > _MOST_FORMS:
                self._kept.popitem(last=False)
        self._kept.move_to_end(form)
        # an executor may run the function to learn what it does, so the numbers come first
        kept.numbers.copy_(host, non_blocking=True)
        kept.num_runs += 1
        if kept.num_runs == 2:
            kept.run = self._executor(kept.run)
        return kept.numbers, kept.run()

    def _compute(self, form: Form, numbers: Tensor) -> tuple[Batch, Tensor]:
        """The decoder's hidden states of all tokens of a form, (N, D), and what it ran on."""
        tokens_N, positions_N, _, *parts = numbers.split(form.sizes)
        positions_N = positions_N.long()
        is_routed = any(segment.router is not None for segment in form.segments)
        batch = (_RoutedBatch if is_routed else Batch)(tokens_N.long(), positions_N, form.segments)
        attention = PagedAttention(self._decoder.config, self.cache, form, positions_N, parts)
        hidden_ND: Tensor = self._decoder(batch, attention)
        return batch, hidden_ND

    def _mlp_shares(self, batch: Batch, form: Form, members: Sequence[Sequence[int]]) -> list[float]:
        """See `Ran`."""
        assert isinstance(batch, _RoutedBatch)
        whole = sum(layer.intermediate_size for layer in self._decoder.widths.layers)
        shares = (torch.stack(batch.neurons).sum(0) / whole).tolist()
        found, done = dict[int, float](), 0
        groups = [group for own in form.groups for group in own]
        for group, own in zip(groups, members, strict=True):
            for i in own:
                done += group.length
                found[i] = shares[done - 1]
        return [found[i] for i in range(len(found))]
