"""The `config.json` that a GGUF file's metadata stands for.

No key names the activation; it is the one that published models of the architecture have by default.
Metadata holds 32-bit floats, so 1e-5 comes back as 9.99999974e-06; floats are rounded to the seven digits they have.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from flextron.errors import FlextronError
from flextron.families.config import FAMILIES
from flextron.gguf.keys import Metadata
from flextron.gguf.model import LONG_FACTORS, MODEL_TYPES, ROPE_FREQS, GgufModel
from flextron.gguf.rope import rope_scaling, rotated_dimensions

__all__ = ["hf_config_of"]


def hf_config_of(file: GgufModel) -> dict[str, Any]:
    """The equivalent of `config.json`."""
    model_type = MODEL_TYPES[file.arch]
    own = _KEYS.get(file.arch, _llama_keys)
    return {
        "architectures": [FAMILIES[model_type].architecture],
        "model_type": model_type,
        "dtype": "float32",
        "vocab_size": file.sizes.vocab_size,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        **own(file),
    }


def _gpt2_keys(file: GgufModel) -> dict[str, Any]:
    return {
        "n_embd": file.sizes.hidden_size,
        "n_layer": file.sizes.num_layers,
        "n_head": file.sizes.num_heads,
        "n_inner": file.sizes.intermediate_size,
        "n_positions": file.sizes.context,
        "layer_norm_epsilon": file.metadata.positive("attention.layer_norm_epsilon"),
    }


def _rotary_keys(file: GgufModel, *, may_be_partial: bool) -> tuple[dict[str, Any], int]:
    """What all families but GPT-2 share, and how many dimensions of each head are rotated."""
    sizes = file.sizes
    rotated = rotated_dimensions(file.metadata, sizes.head_dim, may_be_partial=may_be_partial)
    freqs = file.tensors[ROPE_FREQS].values() if ROPE_FREQS in file.tensors else None
    return {
        "hidden_size": sizes.hidden_size,
        "intermediate_size": sizes.intermediate_size,
        "num_hidden_layers": sizes.num_layers,
        "num_attention_heads": sizes.num_heads,
        "max_position_embeddings": sizes.context,
        "rope_scaling": rope_scaling(file.metadata, freqs, rotated),
    }, rotated


def _neox_keys(file: GgufModel) -> dict[str, Any]:
    keys, rotated = _rotary_keys(file, may_be_partial=True)
    return keys | {
        "layer_norm_eps": file.metadata.positive("attention.layer_norm_epsilon"),
        "rotary_emb_base": file.metadata.positive("rope.freq_base", 10000.0),
        "rotary_pct": _fraction(rotated, file.sizes.head_dim),
        "use_parallel_residual": file.metadata.flag("use_parallel_residual"),
        "attention_bias": file.has_biases("attn"),
    }


def _fraction(part: int, whole: int) -> float:
    """A fraction of the whole that truncates to the part, as `transformers` reads it."""
    fraction = part / whole
    return fraction if int(whole * fraction) == part else math.nextafter(fraction, 1.0)


def _llama_keys(file: GgufModel) -> dict[str, Any]:
    keys, _ = _rotary_keys(file, may_be_partial=False)
    keys |= {
        "num_key_value_heads": file.sizes.num_kv_heads,
        "head_dim": file.sizes.head_dim,
        "rms_norm_eps": file.metadata.positive("attention.layer_norm_rms_epsilon"),
        "rope_theta": file.metadata.positive("rope.freq_base", 10000.0),
    }
    if file.arch != "qwen2":  # its biases are part of the architecture
        keys["attention_bias"] = file.has_biases("attn")
    if file.arch == "llama":
        keys["mlp_bias"] = file.has_biases("ffn")
    return keys


def _gemma_keys(file: GgufModel) -> dict[str, Any]:
    """Gemma 2 and 3: what llama.cpp knows of the architecture without a key is written out."""
    metadata, sizes = file.metadata, file.sizes
    is_second = file.arch == "gemma2"
    # the largest of each generation alone scales queries by another size than the head's
    is_largest = sizes.num_layers == (46 if is_second else 62)
    sliding = metadata.flags("attention.sliding_window_pattern", sizes.num_layers)
    has_window = is_second or bool(metadata.get("attention.sliding_window"))
    if not has_window:
        sliding = [False] * sizes.num_layers
    elif sliding is None:
        period = metadata.count("attention.sliding_window_pattern", 2 if is_second else 6)
        sliding = [i % period < period - 1 for i in range(sizes.num_layers)]
    window = metadata.count("attention.sliding_window", 4096 if is_second else None) if has_window else sizes.context
    keys = _llama_keys(file) | {
        "query_pre_attn_scalar": sizes.hidden_size // sizes.num_heads if is_largest else sizes.head_dim,
        "sliding_window": window,
        "layer_types": ["sliding_attention" if slides else "full_attention" for slides in sliding],
        "final_logit_softcapping": _cap(metadata, "final_logit_softcapping", 30.0 if is_second else None),
    }
    if is_second:
        return keys | {"attn_logit_softcapping": _cap(metadata, "attn_logit_softcapping", 50.0)}
    return keys | {"rope_local_base_freq": metadata.positive("rope.freq_base_swa", 10000.0)}


def _cap(metadata: Metadata, name: str, default: float | None) -> float | None:
    """A cap of scores or logits; 0 means none."""
    if not metadata.has(name):
        return default
    return metadata.positive(name) if metadata.get(name) else None


def _granite_keys(file: GgufModel) -> dict[str, Any]:
    def factor(name: str, default: float) -> float:
        """A factor, where 0 means the default as in llama.cpp."""
        return file.metadata.positive(name) if file.metadata.get(name) else default

    return _llama_keys(file) | {
        "mlp_bias": file.has_biases("ffn"),
        "embedding_multiplier": factor("embedding_scale", 1.0),
        "residual_multiplier": factor("residual_scale", 1.0),
        "attention_multiplier": factor("attention.scale", file.sizes.head_dim**-0.5),
        "logits_scaling": factor("logit_scale", 1.0),
    }


def _smollm3_keys(file: GgufModel) -> dict[str, Any]:
    rotates = [int((i + 1) % 4 != 0) for i in range(file.sizes.num_layers)]  # llama.cpp knows no other pattern
    return _llama_keys(file) | {"mlp_bias": file.has_biases("ffn"), "no_rope_layers": rotates}


def _stablelm_keys(file: GgufModel) -> dict[str, Any]:
    keys, rotated = _rotary_keys(file, may_be_partial=True)
    return keys | {
        "num_key_value_heads": file.sizes.num_kv_heads,
        "layer_norm_eps": file.metadata.positive("attention.layer_norm_epsilon"),
        "rope_theta": file.metadata.positive("rope.freq_base", 10000.0),
        "partial_rotary_factor": _fraction(rotated, file.sizes.head_dim),
        "use_qkv_bias": file.has_biases("attn"),
    }


def _phi3_keys(file: GgufModel) -> dict[str, Any]:
    keys, rotated = _rotary_keys(file, may_be_partial=True)
    window = file.metadata.get("attention.sliding_window")
    if found := [name for name in LONG_FACTORS.values() if name in file.tensors]:
        keys |= _longrope(file, len(found), rotated)
    elif file.metadata.get("rope.scaling.attn_factor", 1) not in (0, 1):
        raise FlextronError(f"{file.metadata.path} scales its rotation and has no factors for it; convert it again")
    return keys | {
        "num_key_value_heads": file.sizes.num_kv_heads,
        "rms_norm_eps": file.metadata.positive("attention.layer_norm_rms_epsilon"),
        "rope_theta": file.metadata.positive("rope.freq_base", 10000.0),
        "partial_rotary_factor": _fraction(rotated, file.sizes.head_dim),
        "sliding_window": file.metadata.count("attention.sliding_window") if window else None,
    }


def _longrope(file: GgufModel, num_found: int, rotated: int) -> dict[str, Any]:
    """Phi-3's scaling for long texts."""
    metadata, shape = file.metadata, (rotated // 2,)
    factors = {name: file.tensors[tensor] for name, tensor in LONG_FACTORS.items() if tensor in file.tensors}
    if num_found < len(LONG_FACTORS) or any(tensor.shape != shape for tensor in factors.values()):
        raise FlextronError(f"{metadata.path} needs {shape[0]} rope factors for short texts and as many for long ones")
    original = metadata.count("rope.scaling.original_context_length", file.sizes.context)
    return {
        "original_max_position_embeddings": original,
        "rope_scaling": {
            "rope_type": "longrope",
            **{name: [float(f"{f:.7g}") for f in tensor.values()] for name, tensor in factors.items()},
            "attention_factor": metadata.positive("rope.scaling.attn_factor", 1.0),
            "original_max_position_embeddings": original,
        },
    }


_KEYS: Mapping[str, Callable[[GgufModel], dict[str, Any]]] = {
    "gpt2": _gpt2_keys,
    "gptneox": _neox_keys,
    "gemma2": _gemma_keys,
    "gemma3": _gemma_keys,
    "granite": _granite_keys,
    "smollm3": _smollm3_keys,
    "stablelm": _stablelm_keys,
    "phi3": _phi3_keys,
}
"""Keys of `config.json`, of architectures that have others than Llama's."""
