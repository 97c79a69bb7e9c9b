"""What a decoder runs on: tokens of many sequences side by side, in segments that each have their own sub-network.

Within a segment, a router may further give each token an MLP width of its own.

Shapes: N tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from flextron.errors import FlextronError
from flextron.model.adapter import Adapter
from flextron.model.bypass import NO_BYPASSES, Bypass, Bypasses
from flextron.model.config import DecoderConfig
from flextron.model.low_rank import SharedLora
from flextron.model.nested import Layout
from flextron.model.outer import Outer
from flextron.spec import SubnetSpec

__all__ = ["Batch", "Segment", "TokenChoice"]


class TokenChoice(Protocol):
    """What a layer asks of a router: the MLP width of each token."""

    def __call__(self, layer: int, x_ND: Tensor) -> tuple[Tensor, Tensor | None]:
        """Choose for a segment's tokens in a layer whose MLP the segment's spec does not skip.

        Args:
            layer: index.
            x_ND: what the layer's MLP reads, normalised.

        Returns:
            widths_N: leading neurons that run, int64, on the device of `x_ND`; 0 skips the MLP.
            gates_N: factors of the MLP's outputs, through which a router gets gradients, or None.
        """

    def check(self, config: DecoderConfig, spec: SubnetSpec) -> None:
        """Raise a `FlextronError` unless the router is made for this model and works around this sub-network."""


@dataclass(frozen=True)
class Segment:
    """Sequences that run in the same sub-network, one after the other."""

    spec: SubnetSpec
    lengths: tuple[int, ...]
    """New tokens of each sequence."""
    gates_L2: Tensor | None = None
    """Factors of each layer's attention and MLP outputs, (layers, 2), through which routers get gradients."""
    router: TokenChoice | None = None
    """Chooses the MLP width of each token in the layers that have one in `spec`; None leaves all tokens with `spec`'s.
    Attention is always `spec`'s, for later tokens need the keys and values of all its heads."""
    adapter: Adapter | None = None
    """What stands beside the linears for these sequences; None leaves them alone."""

    def __post_init__(self) -> None:
        """Refuse an adapter that does not fit."""
        if self.adapter is None:
            return
        if not self.spec.is_nested_in(self.adapter.widths):
            raise FlextronError("the adapter is for a narrower sub-network; run it in one nested in its own widths")
        if self.router is not None and self.adapter.has_mlp:
            raise FlextronError("an adapter of MLP linears cannot run beside a token router; leave one of them out")

    @cached_property
    def num_tokens(self) -> int:
        """Tokens of all its sequences."""
        return sum(self.lengths)


@dataclass(frozen=True)
class Batch:
    """A ragged batch of N tokens. Build one with `padded`, `dealt` or `ragged`."""

    tokens_N: Tensor
    """Token ids, int64, sequence after sequence."""
    positions_N: Tensor
    """Position of each token in its sequence, int64."""
    segments: tuple[Segment, ...]

    @classmethod
    def padded(cls, tokens_BT: Tensor, spec: SubnetSpec, router: TokenChoice | None = None) -> Batch:
        """B sequences of T tokens from position 0; causality makes padding on the right harmless."""
        num_sequences, length = tokens_BT.shape
        positions = torch.arange(length, device=tokens_BT.device).repeat(num_sequences)
        return cls(tokens_BT.flatten(), positions, (Segment(spec, (length,) * num_sequences, router=router),))

    @classmethod
    def dealt(
        cls,
        tokens_BT: Tensor,
        specs: Sequence[SubnetSpec],
        gates: Sequence[Tensor | None] | None = None,
        routers: Sequence[TokenChoice] | None = None,
        adapter: Adapter | None = None,
    ) -> Batch:
        """The same as `padded`, with the sequences dealt to several sub-networks in order, as evenly as possible.

        Args:
            tokens_BT: token ids.
            specs: the sub-networks.
            gates: gates of each sub-network's segment; none by default.
            routers: routers of each sub-network's segment; none by default.
            adapter: adapter of all segments; none by default.
        """
        whole = cls.padded(tokens_BT, specs[0])
        none = [None] * len(specs)
        parts = zip(specs, tokens_BT.tensor_split(len(specs)), gates or none, routers or none, strict=True)
        segments = tuple(
            Segment(s, (part.shape[1],) * len(part), g, r, adapter) for s, part, g, r in parts if len(part)
        )
        return cls(whole.tokens_N, whole.positions_N, segments)

    @classmethod
    def ragged(
        cls,
        sequences: Sequence[Tensor],
        specs: Sequence[SubnetSpec],
        starts: Sequence[int] | None = None,
        routers: Sequence[TokenChoice | None] | None = None,
        adapters: Sequence[Adapter | None] | None = None,
    ) -> Batch:
        """Sequences of any lengths, each with its spec; neighbours of equal spec, router and adapter share a segment.

        Args:
            sequences: token ids, 1-D.
            specs: the sub-network of each sequence.
            starts: position of each sequence's first token; 0 by default.
            routers: what chooses the MLP widths of each sequence's tokens, or None; none by default.
            adapters: adapters of each sequence, or None; none by default.
        """
        none = [None] * len(sequences)
        groups: list[tuple[SubnetSpec, TokenChoice | None, Adapter | None, list[int]]] = []
        for tokens, spec, router, adapter in zip(sequences, specs, routers or none, adapters or none, strict=True):
            if not groups or groups[-1][0] != spec or groups[-1][1] is not router or groups[-1][2] is not adapter:
                groups.append((spec, router, adapter, []))
            groups[-1][3].append(len(tokens))
        offsets = starts or [0] * len(sequences)
        positions = [torch.arange(a, a + len(t), device=t.device) for t, a in zip(sequences, offsets, strict=True)]
        segments = tuple(
            Segment(spec, tuple(lengths), None, router, adapter) for spec, router, adapter, lengths in groups
        )
        return cls(torch.cat(list(sequences)), torch.cat(positions), segments)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Tokens of each segment."""
        return tuple(s.num_tokens for s in self.segments)

    @cached_property
    def is_routed(self) -> bool:
        """Whether any segment's tokens choose their own MLP widths.

        Raises:
            FlextronError: another segment has an adapter of MLP linears.
        """
        is_routed = any(s.router is not None for s in self.segments)
        if is_routed and any(s.adapter is not None and s.adapter.has_mlp for s in self.segments):
            raise FlextronError("an adapter of MLP linears cannot share a batch with routed tokens; run them apart")
        return is_routed

    @cached_property
    def is_adapted(self) -> bool:
        """Whether any segment has an adapter."""
        return any(s.adapter is not None for s in self.segments)

    @cached_property
    def outer(self) -> list[tuple[slice, Outer]]:
        """Tokens of the segments whose adapter has parts beside the embedding and the head, and these parts."""
        found, start = [], 0
        for segment, size in zip(self.segments, self.sizes, strict=True):
            if segment.adapter is not None and segment.adapter.outer is not None:
                found.append((slice(start, start + size), segment.adapter.outer))
            start += size
        return found

    @cached_property
    def shared_lora(self) -> Adapter | None:
        """The adapter of all segments, if they have one and the same, and that is LoRA throughout."""
        first = self.segments[0].adapter
        is_shared = first is not None and all(s.adapter is first for s in self.segments) and first.is_lora
        return first if is_shared else None

    def bypasses(self, layer: int | None, layout: Layout) -> Bypasses:
        """What stands beside the linears of half a layer, for tokens in the layout's order.

        Args:
            layer: index; None only where no segment has an adapter.
            layout: layout of the half's widths.
        """
        if self.shared_lora is not None:
            assert layer is not None
            return SharedLora(self.shared_lora.at(layer))
        return Bypasses(self.placed(layer, layout)) if self.is_adapted else NO_BYPASSES

    def needs(self, target: str) -> bool:
        """Whether anything reads the product of a linear of `SelfAttention` or `MLP`."""
        return True

    def keep_product(self, layer: int | None, target: str, product: Tensor) -> None:
        """Take note of a linear's product, where it was summed over ranks; nothing keeps it here."""

    def placed(self, layer: int | None, layout: Layout) -> list[tuple[slice, Mapping[str, Bypass]]]:
        """Rows of each adapted segment in the layout's order, and its bypasses in a layer, by target."""
        if not self.is_adapted:
            return []
        assert layer is not None
        placed, start = [], 0
        for j in layout.order:
            adapter, size = self.segments[j].adapter, layout.sizes[j]
            if adapter is not None and layout.widths[j]:
                placed.append((slice(start, start + size), adapter.at(layer)))
            start += size
        return placed

    def token_widths(self, layer: int, x_ND: Tensor, widths: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """MLP width and gate of every token in a layer, as `TokenChoice` gives them.

        Args:
            layer: index.
            x_ND: what the layer's MLP reads, normalised.
            widths: widths of the segments' specs; 0 skips the MLP of a routed segment, too.
        """
        if len(self.segments) == 1 and widths[0] and (router := self.segments[0].router) is not None:
            return router(layer, x_ND)
        chosen, gates, is_gated = [], [], False
        for segment, x, width in zip(self.segments, x_ND.split(self.sizes), widths, strict=True):
            if segment.router is None or width == 0:
                own, gate = self.tokens_N.new_full((len(x),), width), None
            else:
                own, gate = segment.router(layer, x)
            is_gated |= gate is not None
            chosen.append(own)
            gates.append(x.new_ones(len(x)) if gate is None else gate)
        return torch.cat(chosen), torch.cat(gates) if is_gated else None

    def gated(self, y_ND: Tensor, layer: int, half: int) -> Tensor:
        """What half a layer adds (0 attention, 1 MLP), times the gates of the segments that have them."""
        if all(s.gates_L2 is None for s in self.segments):
            return y_ND
        parts = y_ND.split(self.sizes)
        return torch.cat(
            [
                y if s.gates_L2 is None else y * s.gates_L2[layer, half]
                for s, y in zip(self.segments, parts, strict=True)
            ]
        )

    def layout(self, widths: Sequence[int]) -> Layout:
        """Nested layout of the tokens for these widths, one a segment."""
        return Layout.of(self.sizes, tuple(widths))
