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
    """Long-context scaling as in Hugging Face's `rope_scaling`, with all that its type needs; see `model.rope`."""

    def __hash__(self) -> int:
        """Hash the numbers alone; a mapping has no hash."""
        return hash((self.theta, self.fraction))

    @property
    def longest(self) -> int | None:
        """Tokens of a sequence up to which the frequencies do not depend on its length; None where they never do."""
        return None if self.scaling is None else self.scaling.get("longest")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Origin:
    """The origin of weights that are another checkpoint's in another order; see `flextron.checkpoints.origin`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderConfig:
    """Shape and family traits of a decoder. Field names are Hugging Face's where it has one."""

    family: str
    """Key into `flextron.families.config.FAMILIES`."""
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
    norm_offset: float = 0.0
    """What is added to the gains of norms as they are stored (Gemma: 1)."""
    pre_norm: bool = True
    """Whether attention and MLP read the residual stream normalised."""
    post_norm: bool = False
    """Whether their outputs are normalised before they join it (OLMo 2; beside the other norms in Gemma)."""
    activation: str
    gated: bool
    """Whether the MLP has a gate beside its up projection (SwiGLU)."""
    qkv_bias: bool
    output_bias: bool
    """Whether the attention's output projection has a bias."""
    mlp_bias: bool
    qk_norm: Literal["head", "width"] | None
    """Whether queries and keys are RMS-normalised before the rotation: per head (Qwen3), or all heads as one vector."""
    rope: Rope | None
    """Rotary settings; None if positions are learned embeddings (GPT-2)."""
    layer_ropes: tuple[Rope | None, ...] | None = None
    """Rotary settings of each layer, None where it rotates nothing; by default `rope` is every layer's."""
    parallel_residual: bool
    """Whether attention and MLP both read the layer's input (GPT-NeoX)."""
    sliding_window: int | None
    """Tokens that each token can see, itself included; None for all."""
    layer_windows: tuple[int | None, ...] | None = None
    """The same of each layer, where layers differ."""
    attention_scale: float | None = None
    """Factor of the attention's scores; by default 1 / sqrt(head_dim)."""
    scale_by_layer: bool = False
    """Whether scores are further divided by the layer's number, from 1 (GPT-2)."""
    attention_cap: float | None = None
    """Scores s become cap · tanh(s / cap) (Gemma 2); None leaves them alone."""
    logits_cap: float | None = None
    """The same of the logits."""
    embedding_scale: float = 1.0
    """Factor of the embeddings, in the weights' precision."""
    residual_scale: float = 1.0
    """Factor of what attention and MLP add to the residual stream."""
    logits_scale: float = 1.0
    """Factor of the logits, which the final norm applies."""
    tie_word_embeddings: bool
    origin: Origin | None = field(default=None, compare=False, repr=False)
    """Origin of the weights, if they were put into another order; it says nothing of the shape."""

    def rope_of(self, layer: int) -> Rope | None:
        """Rotary settings of a layer; None if it rotates nothing."""
        return self.rope if self.layer_ropes is None else self.layer_ropes[layer]

    def window_of(self, layer: int) -> int | None:
        """Tokens that each token can see in a layer, itself included; None for all."""
        return self.sliding_window if self.layer_windows is None else self.layer_windows[layer]

    def query_scale(self, layer: int) -> float:
        """Factor of a layer's queries with which the usual scores, q · k / sqrt(head_dim), are the family's."""
        scale = 1.0 if self.attention_scale is None else self.attention_scale * self.head_dim**0.5
        return scale / (layer + 1) if self.scale_by_layer else scale

    @property
    def longest(self) -> int | None:
        """Tokens of the longest sequence that the positions are made for; None where nothing bounds them."""
        if self.rope is None:
            return self.max_position_embeddings
        ropes = (self.rope,) if self.layer_ropes is None else self.layer_ropes
        return min((r.longest for r in ropes if r is not None and r.longest is not None), default=None)

    def check_length(self, num_tokens: int) -> None:
        """Raise if sequences of `num_tokens` exceed learned positions, or those that a rope scaling is read for.

        Raises:
            FlextronError: they do; names the limit.
        """
        if self.longest is None or num_tokens <= self.longest:
            return
        if self.rope is None:
            raise FlextronError(
                f"the model has {self.max_position_embeddings} learned positions; {num_tokens} tokens do not fit, "
                "shorten the context"
            )
        raise FlextronError(
            f"the model's rope scaling changes all positions of a sequence beyond {self.longest} tokens, which is not "
            f"supported; {num_tokens} tokens do not fit, shorten the context"
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
