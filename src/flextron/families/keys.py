"""The keys of `config.json` that a family may read, each with its type and bounds: checked before anything is built.

The bounds are generous, several times what published models have; they keep a damaged file from asking for a thousand
gigabytes or an hour. What a key means, and which of them count, is the family's affair (`families.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from flextron.errors import FlextronError, UnsupportedModelError
from flextron.files import checked

__all__ = ["HfKeys", "RopeKeys", "check_keys", "needed"]

_Layers = Annotated[int, Field(ge=1, le=1024)]
_Heads = Annotated[int, Field(ge=1, le=4096)]
_Width = Annotated[int, Field(ge=1, le=2**20)]
_Vocabulary = Annotated[int, Field(ge=1, le=2**24)]
_Tokens = Annotated[int, Field(ge=1, le=2**27)]
_Base = Annotated[float, Field(gt=0, le=1e12, allow_inf_nan=False)]
_Factor = Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)]
_Factors = Annotated[list[_Factor], Field(max_length=2**16)]
_Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
_Epsilon = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
_Word = Annotated[str, Field(max_length=100)]


class RopeKeys(BaseModel):
    """Entries of `rope_parameters` or `rope_scaling`; others say nothing about the kinds that are supported."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")

    rope_type: _Word | None = None
    type: _Word | None = None
    rope_theta: _Base | None = None
    partial_rotary_factor: _Fraction | None = None
    factor: _Factor | None = None
    low_freq_factor: _Factor | None = None
    high_freq_factor: _Factor | None = None
    original_max_position_embeddings: _Tokens | None = None
    attention_factor: _Factor | None = None
    beta_fast: _Factor | None = None
    beta_slow: _Factor | None = None
    mscale: _Factor | None = None
    mscale_all_dim: _Factor | None = None
    truncate: bool | None = None
    short_factor: _Factors | None = None
    long_factor: _Factors | None = None


class HfKeys(BaseModel):
    """All keys that some family reads. A null stands for the family's default."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    vocab_size: _Vocabulary | None = None
    hidden_size: _Width | None = None
    n_embd: _Width | None = None
    intermediate_size: _Width | None = None
    n_inner: _Width | None = None
    num_hidden_layers: _Layers | None = None
    n_layer: _Layers | None = None
    num_attention_heads: _Heads | None = None
    n_head: _Heads | None = None
    num_key_value_heads: _Heads | None = None
    head_dim: _Width | None = None
    max_position_embeddings: _Tokens | None = None
    n_positions: _Tokens | None = None
    rms_norm_eps: _Epsilon | None = None
    layer_norm_eps: _Epsilon | None = None
    layer_norm_epsilon: _Epsilon | None = None
    hidden_act: _Word | None = None
    activation_function: _Word | None = None
    attention_bias: bool | None = None
    mlp_bias: bool | None = None
    use_parallel_residual: bool | None = None
    scale_attn_weights: bool | None = None
    scale_attn_by_inverse_layer_idx: bool | None = None
    tie_word_embeddings: bool | None = None
    rope_parameters: RopeKeys | None = None
    rope_scaling: RopeKeys | None = None
    rope_theta: _Base | None = None
    partial_rotary_factor: _Fraction | None = None
    rotary_pct: _Fraction | None = None
    rotary_emb_base: _Base | None = None
    original_max_position_embeddings: _Tokens | None = None
    sliding_window: _Tokens | None = None
    use_sliding_window: bool | None = None
    max_window_layers: Annotated[int, Field(ge=0, le=2**20)] | None = None
    layer_types: Annotated[list[_Word], Field(max_length=1024)] | None = None
    sliding_window_pattern: Annotated[int, Field(ge=1, le=1024)] | None = None
    no_rope_layers: Annotated[list[Annotated[int, Field(ge=0, le=1)]], Field(max_length=1024)] | None = None
    no_rope_layer_interval: Annotated[int, Field(ge=1, le=1024)] | None = None
    rope_local_base_freq: _Base | None = None
    ropes_by_kind: Mapping[_Word, RopeKeys | None] | None = None
    """`rope_parameters` of families whose kinds of layers differ in them."""
    hidden_activation: _Word | None = None
    use_qkv_bias: bool | None = None
    qk_layernorm: bool | None = None
    use_bidirectional_attention: bool | None = None
    query_pre_attn_scalar: _Factor | None = None
    attn_logit_softcapping: _Factor | None = None
    final_logit_softcapping: _Factor | None = None
    embedding_multiplier: _Factor | None = None
    attention_multiplier: _Factor | None = None
    residual_multiplier: _Factor | None = None
    logits_scaling: _Factor | None = None


def check_keys(values: Mapping[str, Any], family: str, *, rope_by_kind: bool = False) -> HfKeys:
    """Check keys of a `config.json`.

    Args:
        values: the keys.
        family: the family's name.
        rope_by_kind: whether its kinds of layers may differ in their rotary settings.

    Raises:
        FlextronError: one has a value of the wrong type or size; names it.
        UnsupportedModelError: rotary settings differ from layer to layer where the family's do not.
    """
    found = dict(values)
    for name in ("rope_parameters", "rope_scaling"):
        entries = found.get(name)
        if isinstance(entries, Mapping) and any(isinstance(v, Mapping) for v in entries.values()):
            if not rope_by_kind:
                raise UnsupportedModelError(
                    f"{name} of each kind of layer are not supported in a {family} model; only one for all layers are"
                )
            found.setdefault("ropes_by_kind", found.pop(name))
    return checked(HfKeys, found, f"config.json of a {family} model", "restore it from the original checkpoint")


def needed(found: HfKeys, key: str) -> Any:
    """The value of a key that every config must have, by itself or by its family's default.

    Raises:
        FlextronError: it has none.
    """
    value = getattr(found, key)
    if value is None:
        raise FlextronError(f"config.json lacks {key}; restore it from the original checkpoint")
    return value
