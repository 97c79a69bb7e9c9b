"""What each format says of itself, and what it is told to write."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from flextron.export.source import Source
from flextron.model.config import DecoderConfig
from flextron.model.decoder import Decoder
from flextron.spec import SubnetSpec

__all__ = ["Format", "Order"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """One export."""

    path: Path
    """File or directory to write."""
    spec: SubnetSpec
    """The sub-network."""
    widths: SubnetSpec
    """Widths to write, with zeros where they exceed the sub-network's."""
    precision: str
    """One of the format's."""
    overwrite: bool
    """Whether to replace what is there."""
    notes: tuple[str, ...]
    """Sentences about the result."""


class Format(Protocol):
    """A kind of files that another program runs."""

    @property
    def name(self) -> str:
        """Name on the command line."""

    @property
    def suffix(self) -> str:
        """Suffix of its file; empty for a directory."""

    @property
    def precisions(self) -> tuple[str, ...]:
        """Types of numbers that it stores; the first is the default."""

    def widths(self, config: DecoderConfig, spec: SubnetSpec) -> SubnetSpec:
        """Widths that are written for a sub-network: its own, or slightly wider.

        Raises:
            FlextronError: the format cannot hold it.
        """

    def padded(self, config: DecoderConfig, spec: SubnetSpec) -> SubnetSpec:
        """The narrowest widths that hold a sub-network with zeros, where `widths` refuses it.

        Raises:
            FlextronError: none do.
        """

    def notes(self, config: DecoderConfig) -> tuple[str, ...]:
        """Sentences about what a model of this config loses in the format."""

    def write(self, decoder: Decoder, source: Source, order: Order) -> str:
        """Write it; returns the architecture's name.

        Args:
            decoder: holds `order.widths`; the caller has no use for it afterwards.
            source: the elastic model.
            order: where and how.

        Raises:
            FlextronError: the place is taken, or the tokenizer has no form there.
        """
