"""What a decoder looks like, family differences included: one frozen value that every other file reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from flextron.errors import FlextronError
from flextron.spec import SubnetSpec

__all__ = ["DecoderConfig", "Origin", "Rope"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Rope:
    """Rotary position embedding."""

    theta: float
    """Base of the frequencies."""
    fraction: float = 1.0
    """Leading part of each head that is rotated (GPT-NeoX: 0.25)."""
    scaling: Mapping[str, Any] | None = None
    """Long-context scaling as in Hugging Face's `rope_scaling` (types `linear` and `llama3`)."""

    def __hash__(self) -> int:
        """Hash the numbers alone; a mapping has no hash."""
        return hash((self.theta, self.fraction))


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Origin:
    """The origin of weights that are another checkpoint's in another order; see `flextron.checkpoints.origin`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderConfig:
    """Shape and family traits of a decoder. Field names are Hugging Face's where it has one."""

    family: str
    """Key into `flextron.checkpoints.families.FAMILIES`."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    norm: Literal["rms", "layer"]
    norm_eps: float
    activation: str
    gated: bool
    """Whether the MLP has a gate beside its up projection (SwiGLU)."""
    qkv_bias: bool
    output_bias: bool
    """Whether the attention's output projection has a bias."""
    mlp_bias: bool
    qk_norm: bool
    """Whether queries and keys are RMS-normalised per head before the rotation (Qwen3)."""
    rope: Rope | None
    """Rotary settings; None if positions are learned embeddings (GPT-2)."""
    parallel_residual: bool
    """Whether attention and MLP both read the layer's input (GPT-NeoX)."""
    sliding_window: int | None
    """Tokens that each token can see, itself included; None for all."""
    tie_word_embeddings: bool
    origin: Origin | None = field(default=None, compare=False, repr=False)
    """Origin of the weights, if they were put into another order; it says nothing of the shape."""

    def check_length(self, num_tokens: int) -> None:
        """Raise if sequences of `num_tokens` exceed learned positions.

        Raises:
            FlextronError: they do; names the limit.
        """
        if self.rope is None and num_tokens > self.max_position_embeddings:
            raise FlextronError(
                f"the model has {self.max_position_embeddings} learned positions; {num_tokens} tokens do not fit, "
                "shorten the context"
            )

    @property
    def is_multi_query(self) -> bool:
        """Whether all query heads share one KV head: then the unit of the attention axis is the query head."""
        return self.num_key_value_heads == 1 and self.num_attention_heads > 1

    @property
    def num_groups(self) -> int:
        """Attention groups: KV heads, each with its query heads (multi-query: query heads)."""
        return self.num_attention_heads if self.is_multi_query else self.num_key_value_heads

    @property
    def query_rows_per_group(self) -> int:
        """Rows of the query projection (columns of the output projection) that one group owns."""
        return self.num_attention_heads // self.num_groups * self.head_dim

    def kv_rows(self, num_groups: int) -> int:
        """Rows of the key (or value) projection that the first `num_groups` groups need."""
        return self.head_dim * (min(num_groups, 1) if self.is_multi_query else num_groups)

    @property
    def full_spec(self) -> SubnetSpec:
        """The spec of the whole model."""
        return SubnetSpec.uniform(
            num_hidden_layers=self.num_hidden_layers,
            intermediate_size=self.intermediate_size,
            num_groups=self.num_groups,
        )
