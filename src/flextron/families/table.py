"""The supported families, as data: traits, the keys of `config.json` that count in each, and tensor names.

Adding a family means adding one entry to `FAMILIES`; nothing else in the package knows a family's name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from flextron.families.keys import HfKeys, needed
from flextron.families.tensor_maps import (
    GEMMA_MAPS,
    GPT2_MAPS,
    LLAMA_MAPS,
    LLAMA_QK_NORM,
    NEOX_MAPS,
    OLMO2_MAPS,
    PHI3_MAPS,
    STABLELM_MAPS,
    TensorMap,
)

__all__ = ["FAMILIES", "Family"]

_SHARED_KEYS = frozenset(
    {
        *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"),
        "tie_word_embeddings",
    }
)
_ROPE_KEYS = frozenset({"rope_parameters", "rope_scaling", "original_max_position_embeddings"})
_LLAMA_KEYS = (
    _SHARED_KEYS
    | _ROPE_KEYS
    | {
        *("intermediate_size", "num_key_value_heads", "head_dim", "rms_norm_eps", "hidden_act"),
        *("rope_theta", "partial_rotary_factor"),
    }
)
_WINDOW_KEYS = frozenset({"sliding_window", "use_sliding_window", "max_window_layers", "layer_types"})
_GEMMA_KEYS = (
    _SHARED_KEYS
    | _ROPE_KEYS
    | {
        *("intermediate_size", "num_key_value_heads", "head_dim", "rms_norm_eps", "hidden_activation", "rope_theta"),
        *("attention_bias", "query_pre_attn_scalar", "sliding_window", "layer_types", "use_bidirectional_attention"),
        *("final_logit_softcapping", "partial_rotary_factor"),
    }
)
_GEMMA_SCALARS: Mapping[str, Callable[[HfKeys], float | None]] = {
    "embedding_scale": lambda keys: needed(keys, "hidden_size") ** 0.5,
    "attention_scale": lambda keys: needed(keys, "query_pre_attn_scalar") ** -0.5,
    "logits_cap": lambda keys: keys.final_logit_softcapping,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """Traits of a family. A trait given as a string is the name of the config attribute that holds it."""

    architecture: str
    """The `transformers` class of its checkpoints."""
    tensors: tuple[TensorMap, ...]
    """All tensors that a checkpoint of the family can have; the decoder decides which it needs."""
    keys: frozenset[str]
    """Keys of `config.json` that its config class and modelling code read; all others say nothing."""
    required: Mapping[str, bool] = field(default_factory=dict)
    """Keys among these of which only one value is implemented; null is as good as false."""
    prefix: str
    """Prefix of the base model's tensors, which checkpoints of the base model alone leave out."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Tensor names that `transformers` reads as others."""
    scalars: Mapping[str, Callable[[HfKeys], float | None]] = field(default_factory=dict)
    """Numbers of a `DecoderConfig`, and how they follow from the keys; None stands for the usual one."""
    norm: Literal["rms", "layer"] = "rms"
    norm_offset: float = 0.0
    pre_norm: bool = True
    post_norm: bool = False
    norm_eps: str = "rms_norm_eps"
    activation: str = "hidden_act"
    gated: bool = True
    qkv_bias: bool | str = False
    output_bias: bool | str = False
    mlp_bias: bool | str = False
    qk_norm: Literal["head", "width"] | None = None
    rotary: bool = True
    partly_rotary: bool = False
    """Whether its modelling code rotates a part of each head where the config says so; the others rotate all of it."""
    rope_by_kind: bool = False
    """Whether layers with a sliding window have rotary settings of their own."""
    scale_by_layer: bool | str = False
    window: Literal["none", "every layer", "by layer"] = "none"
    """Which layers a sliding window in the config is for: every one, unless layer_types says else, or those alone."""
    parallel_residual: bool | str = False
    explicit_head_dim: bool = True
    """Whether heads x head_dim may differ from hidden_size."""
    heads_divide_hidden: bool = False
    """Whether `transformers` insists that the number of heads divide the hidden size, whatever the head size."""
    config_keys: Mapping[str, str] = field(default_factory=dict)
    """Names in `config.json` where they differ from Hugging Face's usual ones."""


FAMILIES: Mapping[str, Family] = {
    "llama": Family(
        architecture="LlamaForCausalLM",
        tensors=LLAMA_MAPS,
        keys=_LLAMA_KEYS | {"attention_bias", "mlp_bias"},
        prefix="model.",
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        mlp_bias="mlp_bias",
        heads_divide_hidden=True,
    ),
    "mistral": Family(
        architecture="MistralForCausalLM",
        tensors=LLAMA_MAPS,
        keys=_LLAMA_KEYS | {"sliding_window", "layer_types"},
        prefix="model.",
        window="every layer",
    ),
    "qwen2": Family(
        architecture="Qwen2ForCausalLM",
        tensors=LLAMA_MAPS,
        keys=_LLAMA_KEYS | _WINDOW_KEYS,
        prefix="model.",
        qkv_bias=True,
        window="by layer",
    ),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        tensors=LLAMA_MAPS + LLAMA_QK_NORM,
        keys=_LLAMA_KEYS | _WINDOW_KEYS | {"attention_bias"},
        prefix="model.",
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        qk_norm="head",
        window="by layer",
    ),
    "gpt2": Family(
        architecture="GPT2LMHeadModel",
        tensors=GPT2_MAPS,
        keys=_SHARED_KEYS
        | {
            *("n_embd", "n_layer", "n_head", "n_inner", "n_positions", "activation_function", "layer_norm_epsilon"),
            *("scale_attn_weights", "scale_attn_by_inverse_layer_idx"),
        },
        prefix="transformer.",
        scalars={"attention_scale": lambda keys: None if keys.scale_attn_weights else 1.0},
        scale_by_layer="scale_attn_by_inverse_layer_idx",
        norm="layer",
        norm_eps="layer_norm_epsilon",
        activation="activation_function",
        gated=False,
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        rotary=False,
        explicit_head_dim=False,
        config_keys={"intermediate_size": "n_inner", "num_hidden_layers": "n_layer"},
    ),
    "gpt_neox": Family(
        architecture="GPTNeoXForCausalLM",
        tensors=NEOX_MAPS,
        # its rotation reads a head_dim that its attention does not
        keys=_SHARED_KEYS
        | _ROPE_KEYS
        | {
            *("intermediate_size", "hidden_act", "layer_norm_eps", "attention_bias", "use_parallel_residual"),
            *("rotary_pct", "rotary_emb_base", "head_dim"),
        },
        prefix="gpt_neox.",
        aliases={"lm_head.weight": "embed_out.weight"},
        norm="layer",
        norm_eps="layer_norm_eps",
        gated=False,
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        mlp_bias=True,
        partly_rotary=True,
        parallel_residual="use_parallel_residual",
        explicit_head_dim=False,
        config_keys={"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"},
    ),
    "gemma2": Family(
        architecture="Gemma2ForCausalLM",
        tensors=GEMMA_MAPS,
        keys=_GEMMA_KEYS | {"attn_logit_softcapping"},
        required={"use_bidirectional_attention": False},
        prefix="model.",
        scalars={**_GEMMA_SCALARS, "attention_cap": lambda keys: keys.attn_logit_softcapping},
        norm_offset=1.0,
        post_norm=True,
        activation="hidden_activation",
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        window="by layer",
        heads_divide_hidden=True,
    ),
    "gemma3_text": Family(
        architecture="Gemma3ForCausalLM",
        tensors=GEMMA_MAPS + LLAMA_QK_NORM,
        keys=_GEMMA_KEYS | {"rope_local_base_freq", "sliding_window_pattern"},
        required={"use_bidirectional_attention": False},
        prefix="model.",
        scalars=_GEMMA_SCALARS,
        norm_offset=1.0,
        post_norm=True,
        activation="hidden_activation",
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        qk_norm="head",
        rope_by_kind=True,
        window="by layer",
        heads_divide_hidden=True,
    ),
    "smollm3": Family(
        architecture="SmolLM3ForCausalLM",
        tensors=LLAMA_MAPS,
        keys=_LLAMA_KEYS
        | {"attention_bias", "mlp_bias", "sliding_window", "use_sliding_window", "layer_types"}
        | {"no_rope_layers", "no_rope_layer_interval"},
        prefix="model.",
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        mlp_bias="mlp_bias",
        window="by layer",
    ),
    "phi3": Family(
        architecture="Phi3ForCausalLM",
        tensors=PHI3_MAPS,
        keys=_LLAMA_KEYS | {"sliding_window"},
        prefix="model.",
        partly_rotary=True,
        window="every layer",
    ),
    "granite": Family(
        architecture="GraniteForCausalLM",
        tensors=LLAMA_MAPS,
        keys=_LLAMA_KEYS
        | {"attention_bias", "mlp_bias", "embedding_multiplier", "logits_scaling"}
        | {"residual_multiplier", "attention_multiplier"},
        prefix="model.",
        scalars={
            "embedding_scale": lambda keys: keys.embedding_multiplier,
            "attention_scale": lambda keys: keys.attention_multiplier,
            "residual_scale": lambda keys: keys.residual_multiplier,
            "logits_scale": lambda keys: 1 / needed(keys, "logits_scaling"),
        },
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        mlp_bias="mlp_bias",
    ),
    "olmo2": Family(
        architecture="Olmo2ForCausalLM",
        tensors=OLMO2_MAPS,
        keys=_LLAMA_KEYS | {"attention_bias"},
        prefix="model.",
        pre_norm=False,
        post_norm=True,
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        qk_norm="width",
    ),
    "stablelm": Family(
        architecture="StableLmForCausalLM",
        tensors=STABLELM_MAPS,
        # its rotation reads a head_dim that its attention does not
        keys=_SHARED_KEYS
        | _ROPE_KEYS
        | {
            *("intermediate_size", "hidden_act", "num_key_value_heads", "layer_norm_eps", "head_dim", "rope_theta"),
            *("partial_rotary_factor", "use_qkv_bias", "qk_layernorm", "use_parallel_residual"),
        },
        required={"qk_layernorm": False, "use_parallel_residual": False},
        prefix="model.",
        norm="layer",
        norm_eps="layer_norm_eps",
        qkv_bias="use_qkv_bias",
        partly_rotary=True,
        explicit_head_dim=False,
    ),
}
