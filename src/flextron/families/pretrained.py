"""A pretrained checkpoint as the rest of the package sees it, wherever it lies: config, streamed tensors, tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

__all__ = ["Pretrained"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Pretrained:
    """What `open_pretrained` found."""

    name: str
    """Hub id, directory or file it came from."""
    hf_config: dict[str, Any]
    """The checkpoint's `config.json`, or its equivalent for a GGUF file."""
    tensors: Callable[[], Iterator[tuple[str, Tensor]]]
    """Starts a stream of (Hugging Face parameter name, tensor), at most one shard in memory at a time."""
    tokenizer: PreTrainedTokenizerBase | None
    """The tokenizer, where the checkpoint has one."""
    directory: Path | None = None
    """Directory of its files; None for a GGUF file."""
    generation_config: Mapping[str, Any] | None = None
    """The checkpoint's `generation_config.json`; None where it has none."""
    names: frozenset[str] | None = None
    """Names of the tensors in the stream, where they are known before it starts."""
