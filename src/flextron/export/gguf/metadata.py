"""The keys of a GGUF file that say what its model looks like: the reverse of `flextron.gguf`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flextron.export.gguf.architectures import Architecture
from flextron.model.config import DecoderConfig, Rope
from flextron.spec import SubnetSpec

__all__ = ["context_length", "model_metadata"]


def context_length(config: DecoderConfig) -> int:
    """Tokens of context: a model whose layers have a sliding window is exact within the window, no further."""
    return min(config.max_position_embeddings, config.sliding_window or config.max_position_embeddings)


def model_metadata(architecture: Architecture, config: DecoderConfig, widths: SubnetSpec) -> dict[str, Any]:
    """Keys without the architecture's name, and their values.

    Args:
        architecture: how the model is written.
        config: the full model's.
        widths: widths as they are written.
    """
    layers = [widths.layers[i] for i in widths.kept_layers]
    kv_heads = [config.kv_rows(layer.num_groups) // config.head_dim for layer in layers]
    out: dict[str, Any] = {
        "block_count": len(layers),
        "context_length": context_length(config),
        "embedding_length": config.hidden_size,
        "feed_forward_length": _sizes(architecture, [layer.intermediate_size for layer in layers]),
        "attention.head_count": _sizes(
            architecture, [layer.num_groups * config.query_rows_per_group // config.head_dim for layer in layers]
        ),
        "attention.head_count_kv": _sizes(architecture, kv_heads),
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "vocab_size": config.vocab_size,
    }
    kind = "layer_norm_rms_epsilon" if config.norm == "rms" else "layer_norm_epsilon"
    out[f"attention.{kind}"] = float(config.norm_eps)
    if config.rope is not None:
        out |= _rope(config.rope, config.head_dim)
    if architecture.name == "gptneox":
        out["use_parallel_residual"] = config.parallel_residual
    return out


def _sizes(architecture: Architecture, sizes: Sequence[int]) -> int | list[int]:
    """One entry a layer where the architecture has them; layers are equal where it has not."""
    return list(sizes) if architecture.has_layers else sizes[0]


def _rope(rope: Rope, head_dim: int) -> dict[str, Any]:
    """Rotary settings; Llama 3's scaling is a tensor instead, see `tensors.py`."""
    out: dict[str, Any] = {
        "rope.dimension_count": int(head_dim * rope.fraction),
        "rope.freq_base": float(rope.theta),
    }
    if rope.scaling is not None and rope.scaling["rope_type"] == "linear":
        out |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope.scaling["factor"])}
    return out
