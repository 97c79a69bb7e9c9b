"""The keys of a GGUF file that say what its model looks like: the reverse of `flextron.gguf`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flextron.export.gguf.architectures import Architecture
from flextron.model.config import DecoderConfig, Rope
from flextron.spec import SubnetSpec

__all__ = ["context_length", "model_metadata"]


def context_length(architecture: Architecture, config: DecoderConfig) -> int:
    """Tokens of context: where an architecture has no sliding window, it is exact within the model's, no further."""
    windows = [config.window_of(i) for i in range(config.num_hidden_layers)]
    known = [] if architecture.has_windows else [window for window in windows if window is not None]
    return min([config.max_position_embeddings, *known])


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
        "context_length": context_length(architecture, config),
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
    if architecture.name in ("gptneox", "stablelm"):
        out["use_parallel_residual"] = config.parallel_residual
    if architecture.name == "phi3":  # llama.cpp reads it, and has no use for it
        out["attention.sliding_window"] = config.sliding_window or 0
    if architecture.has_windows:
        out |= _windows(architecture, config, widths)
    return out | _scalars(architecture, config)


def _scalars(architecture: Architecture, config: DecoderConfig) -> dict[str, float]:
    """Factors and caps, of those architectures that have a key for them."""
    found: dict[str, float | None] = {}
    if architecture.name == "granite":
        found = {
            "attention.scale": config.attention_scale or config.head_dim**-0.5,
            "embedding_scale": config.embedding_scale,
            "residual_scale": config.residual_scale,
            "logit_scale": 1 / config.logits_scale,
        }
    elif "logits_cap" in architecture.traits:
        found = {"attn_logit_softcapping": config.attention_cap, "final_logit_softcapping": config.logits_cap}
    return {key: float(value) for key, value in found.items() if value is not None}


def _windows(architecture: Architecture, config: DecoderConfig, widths: SubnetSpec) -> dict[str, Any]:
    """Sliding windows, and the rotation of the layers that have one."""
    windows = [config.window_of(i) for i in widths.kept_layers]
    sliding = [window is not None for window in windows]
    if not any(sliding):
        return {} if (rope := config.rope_of(widths.kept_layers[0])) is None else _rope(rope, config.head_dim)
    out: dict[str, Any] = {"attention.sliding_window": config.sliding_window}
    # a file says which layers where its layers do not follow the architecture's own pattern
    period = 2 if architecture.name == "gemma2" else 6
    usual = [n % period < period - 1 for n in range(len(windows))]
    if sliding != usual:
        out["attention.sliding_window_pattern"] = sliding
    ropes = {window is not None: config.rope_of(i) for window, i in zip(windows, widths.kept_layers, strict=True)}
    if (whole := ropes.get(False, config.rope)) is not None:
        out |= _rope(whole, config.head_dim)
    if (local := ropes.get(True)) is not None and "layer_ropes" in architecture.traits:
        out["rope.freq_base_swa"] = float(local.theta)
    return out


def _sizes(architecture: Architecture, sizes: Sequence[int]) -> int | list[int]:
    """One entry a layer where the architecture has them; layers are equal where it has not."""
    return list(sizes) if architecture.has_layers else sizes[0]


def _rope(rope: Rope, head_dim: int) -> dict[str, Any]:
    """Rotary settings; factors of each frequency (Llama 3, Phi-3) are tensors instead, see `tensors.py`."""
    out: dict[str, Any] = {
        "rope.dimension_count": int(head_dim * rope.fraction),
        "rope.freq_base": float(rope.theta),
    }
    if rope.scaling is not None and rope.scaling["rope_type"] == "linear":
        out |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope.scaling["factor"])}
    if rope.scaling is not None and rope.scaling["rope_type"] == "longrope":
        out["rope.scaling.original_context_length"] = int(rope.scaling["longest"])
        out["rope.scaling.attn_factor"] = float(rope.scaling["attention_factor"])
    return out
