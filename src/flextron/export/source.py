"""What an export needs of a model, whichever class it is of, and what it gives back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from flextron.elastic import ElasticInfo
from flextron.model.decoder import Decoder
from flextron.routing import Frontier
from flextron.spec import SubnetSpec

__all__ = ["Exported", "Source"]


class Source(Protocol):
    """An elastic model."""

    decoder: Decoder
    tokenizer: PreTrainedTokenizerBase | None
    hf_config: Mapping[str, Any]
    generation_config: Mapping[str, Any] | None
    info: ElasticInfo
    frontier: Frontier | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Exported:
    """What was written."""

    path: Path
    """The file or directory."""
    format: str
    """`hf`, `gguf` or `nemotron-nas`."""
    architecture: str
    """Name of the architecture in the written files."""
    precision: str
    """Type of the numbers in its matrices."""
    spec: SubnetSpec
    """The sub-network."""
    widths: SubnetSpec
    """Widths as they were written: wider where a format asks for zeros."""
    num_parameters: int
    """Parameters of the sub-network, embeddings included, zeros not."""
    num_bytes: int
    """Bytes of the file, or of the directory's files."""
    notes: tuple[str, ...] = ()
    """Sentences about what whoever runs it should know."""
