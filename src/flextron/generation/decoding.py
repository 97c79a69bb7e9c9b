"""Steps of a few sequences in one sub-network: compiled where that is possible, by PyTorch's operators elsewhere."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from flextron.kernels.decoder import NativeStep, why_not_native
from flextron.model.attention import CachedAttention
from flextron.model.batch import Batch, TokenChoice
from flextron.model.config import DecoderConfig
from flextron.model.decoder import Decoder
from flextron.paged import PagedStep, Span
from flextron.spec import SubnetSpec

__all__ = ["Steps", "block_offsets"]

_PAGE = 16


def block_offsets(config: DecoderConfig, spec: SubnetSpec) -> tuple[int, ...]:
    """KV heads of the layers before each layer of a sub-network, and of all; one more than there are layers."""
    heads = (config.kv_rows(layer.num_groups) // config.head_dim for layer in spec.layers)
    return tuple(accumulate(heads, initial=0))


class _OperatorSteps:
    """Through `Decoder.forward` and `CachedAttention`."""

    def __init__(
        self, decoder: Decoder, spec: SubnetSpec, num_sequences: int, capacity: int, router: TokenChoice | None
    ) -> None:
        self._decoder, self._spec, self._router = decoder, spec, router
        self._cache = CachedAttention(
            decoder.config, [(decoder.held(spec), num_sequences)], capacity, dtype=decoder.dtype, device=decoder.device
        )

    def run(self, new: Sequence[Tensor], starts: Sequence[int]) -> Tensor:
        count = len(new)
        self._cache.hold([starts])
        batch = Batch.ragged(new, [self._spec] * count, starts, [self._router] * count)
        hidden_ND = self._decoder(batch, self._cache)
        ends = torch.tensor([len(t) for t in new], device=self._decoder.device).cumsum(0) - 1
        return self._decoder.logits(hidden_ND[ends])


class _PagedSteps:
    """Through the engine's iteration for a GPU, with pages in order."""

    def __init__(
        self, decoder: Decoder, spec: SubnetSpec, num_sequences: int, capacity: int, router: TokenChoice | None
    ) -> None:
        self._decoder, self._spec, self._router = decoder, spec, router
        *self._offsets, row = block_offsets(decoder.config, spec)
        shape = (num_sequences, -(-capacity // _PAGE), row)
        self._tables = torch.arange(math.prod(shape), dtype=torch.int32).view(shape)
        self._step = PagedStep(decoder, num_blocks=self._tables.numel(), page_size=_PAGE)

    def run(self, new: Sequence[Tensor], starts: Sequence[int]) -> Tensor:
        lengths = [len(t) for t in new]
        tokens, ends = torch.cat(list(new)).tolist(), list(accumulate(lengths))
        row, offsets = self._tables.shape[2], tuple(self._offsets)
        spans = [
            Span(tokens[end - n : end], start, table, row, offsets, self._spec, self._router)
            for end, n, start, table in zip(ends, lengths, starts, self._tables, strict=True)
        ]
        ran = self._step.run(spans, [end - 1 for end in ends])
        return self._decoder.logits(ran.hidden_RD)


class _NativeSteps:
    """Through the compiled iteration, with pages in order."""

    def __init__(
        self, decoder: Decoder, spec: SubnetSpec, num_sequences: int, capacity: int, *, likeliest: bool
    ) -> None:
        config = decoder.config
        self._step = NativeStep(decoder, _PAGE, screens_head=likeliest)
        self._num_full = 0 if likeliest else None
        *offsets, row = block_offsets(config, spec)
        shape = (num_sequences, -(-capacity // _PAGE), row)
        self._tables = torch.arange(math.prod(shape), dtype=torch.int32).view(shape)
        # zeros: a latency probe attends to tokens that were never written
        self._cache = torch.zeros(self._tables.numel(), 2, _PAGE, config.head_dim)
        columns = [[layer.intermediate_size for layer in spec.layers], [layer.num_groups for layer in spec.layers]]
        self._columns = torch.tensor([*columns, offsets], dtype=torch.int32)[..., None]

    def run(self, new: Sequence[Tensor], starts: Sequence[int]) -> Tensor:
        lengths = [len(t) for t in new]
        tokens_N = torch.cat(list(new))
        positions_N = torch.cat([torch.arange(a, a + n) for a, n in zip(starts, lengths, strict=True)])
        widths_LN, groups_LN, offsets_LN = self._columns.expand(-1, -1, len(tokens_N)).contiguous()
        tables = [table for table, n in zip(self._tables, lengths, strict=True) for _ in range(n)]
        last = [end - 1 for end in accumulate(lengths)]
        where = (tokens_N, positions_N, widths_LN, groups_LN, tables, offsets_LN)
        return self._step(*where, self._cache, last, num_full=self._num_full)


class Steps:
    """Runs new tokens of sequences that share a sub-network, and keeps their keys and values."""

    def __init__(
        self,
        decoder: Decoder,
        spec: SubnetSpec,
        num_sequences: int,
        capacity: int,
        router: TokenChoice | None = None,
        *,
        likeliest: bool = False,
    ) -> None:
        """Reserve the cache.

        Args:
            decoder: the full, frozen model.
            spec: the sub-network.
            num_sequences: how many run side by side.
            capacity: tokens that each can hold.
            router: chooses the MLP width of each token; by default all have the spec's.
            likeliest: whether only the largest score matters, so that those that are certainly smaller may be minus
                infinity.
        """
        self.is_native = router is None and why_not_native(decoder) is None
        """Whether the compiled iteration runs."""
        self._steps: _NativeSteps | _OperatorSteps | _PagedSteps
        if self.is_native:
            self._steps = _NativeSteps(decoder, spec, num_sequences, capacity, likeliest=likeliest)
        else:
            # what is timed on a GPU is what serves there
            is_paged = decoder.device.type == "cuda" and decoder.num_ranks == 1
            kind = _PagedSteps if is_paged else _OperatorSteps
            self._steps = kind(decoder, spec, num_sequences, capacity, router)

    @torch.inference_mode()
    def run(self, new: Sequence[Tensor], starts: Sequence[int]) -> Tensor:
        """Scores over the vocabulary after the last new token of each sequence.

        Args:
            new: token ids of each sequence, 1-D.
            starts: position of each sequence's first new token; those before it must have run, or count as zeros.

        Returns:
            (sequences, vocabulary).
        """
        return self._steps.run(new, starts)
