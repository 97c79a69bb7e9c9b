"""The supported families, as data: traits, the keys of `config.json` that count in each, and tensor names.

Adding a family means adding one entry to `FAMILIES`; nothing else in the package knows a family's name. Configs are
parsed by `transformers`, so that its defaults hold wherever a `config.json` leaves a key out. It keeps whatever stands
in the file as an attribute, though, and its modelling code looks at some of them only. So a family gets to see its own
keys and no others; a key that changes the result and has no implementation is refused.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import AutoConfig, PretrainedConfig

from flextron.checkpoints.hf_keys import HfKeys, RopeKeys, check_keys
from flextron.checkpoints.tensor_maps import GPT2_MAPS, LLAMA_MAPS, LLAMA_QK_NORM, NEOX_MAPS, TensorMap
from flextron.errors import FlextronError, UnsupportedModelError
from flextron.model.config import DecoderConfig, Rope

__all__ = ["FAMILIES", "Family", "TensorMap", "config_from_hf", "family_of", "parsed_config"]

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
    """Keys among these of which only one value is implemented."""
    prefix: str
    """Prefix of the base model's tensors, which checkpoints of the base model alone leave out."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Tensor names that `transformers` reads as others."""
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: str = "rms_norm_eps"
    activation: str = "hidden_act"
    gated: bool = True
    qkv_bias: bool | str = False
    output_bias: bool | str = False
    mlp_bias: bool | str = False
    qk_norm: bool = False
    rotary: bool = True
    partly_rotary: bool = False
    """Whether its modelling code rotates a part of each head where the config says so; the others rotate all of it."""
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
        qk_norm=True,
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
        required={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False},
        prefix="transformer.",
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
    ),
}

_REFUSED: Mapping[str, tuple[Any, ...]] = {
    # what transformers reads in every family, and the values that change nothing
    "is_causal": (None, True),
    "per_layer_config": (None, {}),
    "transformers_weights": (None, "model.safetensors"),
    "fusion_config": (None,),
}
_SAME_ACTIVATION = {"swish": "silu"}
"""Names that `transformers` has for one function."""
_QUANTIZED = ("quantization_config", "compression_config")


def family_of(hf_config: Mapping[str, Any]) -> str:
    """The key of the checkpoint's family.

    Raises:
        UnsupportedModelError: no family describes it; lists those that exist.
        FlextronError: the config is no object, or its `model_type` and `architectures` are of two families.
    """
    if not isinstance(hf_config, Mapping):
        raise FlextronError("config.json holds no object of keys and values; restore it from the original checkpoint")
    name, listed = hf_config.get("model_type"), hf_config.get("architectures")
    named = [a for a in listed if isinstance(a, str)] if isinstance(listed, list) else []
    if not isinstance(name, str) or name not in FAMILIES:
        what = repr((named or [name or "without a model_type"])[0])[:100].strip("'")
        raise UnsupportedModelError(f"architecture {what} is not supported; supported are {', '.join(FAMILIES)}")
    others = {f.architecture for key, f in FAMILIES.items() if key != name}
    if named and set(named) <= others:
        raise FlextronError(
            f"config.json names model_type {name} and the architecture {named[0]}, which is another family's; "
            "restore it from the original checkpoint"
        )
    return name


def _check_refused(hf_config: Mapping[str, Any], name: str) -> None:
    for key in _QUANTIZED:
        if (found := hf_config.get(key)) is not None:
            method = found.get("quant_method", found.get("quant_algo")) if isinstance(found, Mapping) else None
            raise UnsupportedModelError(
                f"the checkpoint is quantised ({key}: {str(method or 'of an unnamed method')[:100]!r}), which is not "
                "supported; use the original in bf16, fp16 or fp32"
            )
    for key, harmless in _REFUSED.items():
        if not any(type(hf_config.get(key)) is type(value) and hf_config.get(key) == value for value in harmless):
            raise UnsupportedModelError(
                f"config.json sets {key}, which changes a {name} model and is not supported; use a plain checkpoint"
            )


def parsed_config(hf_config: Mapping[str, Any]) -> PretrainedConfig:
    """What `transformers` makes of a `config.json`, of the keys that count in its family.

    Raises:
        FlextronError: a key has a value of the wrong type or size.
        UnsupportedModelError: the family or one of its settings has no implementation.
    """
    name = family_of(hf_config)
    _check_refused(hf_config, name)
    # a copy, because transformers fills in the dictionaries that it is given
    own = copy.deepcopy({key: hf_config[key] for key in FAMILIES[name].keys if key in hf_config})
    check_keys(own, name)
    try:
        hf = AutoConfig.for_model(name, **own)
        if FAMILIES[name].rotary:
            _standardize_rope(hf)
    except Exception as error:  # transformers raises many kinds, all meaning that the config is malformed
        said = str(error).split("\n")[-1].strip()[:200]
        raise FlextronError(
            f"config.json is not a valid {name} config ({said}); restore it from the original checkpoint"
        ) from error
    return hf


def _standardize_rope(hf: PretrainedConfig) -> None:
    """Standardize RoPE settings as the modelling code does, so that keys outside `rope_parameters` count."""
    standardize = getattr(hf, "standardize_rope_params", None)  # since transformers 5
    if standardize is not None:
        standardize()


def _rope(hf: PretrainedConfig, found: HfKeys, family: Family, head_dim: int) -> Rope:
    """Rotary settings: `rope_parameters` since transformers 5, scattered attributes before."""
    keys = found.rope_parameters or found.rope_scaling or RopeKeys()
    theta = keys.rope_theta or getattr(hf, "rope_theta", None) or getattr(hf, "rotary_emb_base", None)
    if theta is None:
        raise FlextronError("config.json has no rope_theta; restore it from the original checkpoint")
    kind = keys.rope_type or keys.type or "default"
    if kind not in ("default", "linear", "llama3"):
        raise UnsupportedModelError(f"rope scaling of type {kind!r} is not supported; default, linear and llama3 are")
    fraction = keys.partial_rotary_factor
    if fraction is None:
        fraction = getattr(hf, "rotary_pct", None) if family.partly_rotary else 1.0
    if fraction is None:
        raise FlextronError("config.json has no rotary_pct; restore it from the original checkpoint")
    if not family.partly_rotary and fraction != 1:
        if kind != "default":
            raise UnsupportedModelError(f"partial_rotary_factor with rope scaling of type {kind!r} is not supported")
        fraction = 1.0  # its modelling code does not read it
    rotated = int(head_dim * fraction)
    if rotated < 2 or rotated % 2:
        raise FlextronError(
            f"config.json asks to rotate {rotated} of the {head_dim} dimensions of each head; only even numbers work"
        )
    return Rope(theta=float(theta), fraction=float(fraction), scaling=_scaling(kind, keys))


def _scaling(kind: str, keys: RopeKeys) -> Mapping[str, Any] | None:
    if kind == "default":
        return None
    names = ["factor"]
    if kind == "llama3":
        names += ["low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]
    values = {name: getattr(keys, name) for name in names}
    if missing := [name for name, value in values.items() if value is None]:
        raise FlextronError(
            f"rope scaling of type {kind!r} lacks {missing[0]}; restore config.json from the original checkpoint"
        )
    if kind == "llama3" and values["high_freq_factor"] < values["low_freq_factor"]:
        raise FlextronError("rope scaling has high_freq_factor below low_freq_factor; restore config.json")
    return {"rope_type": kind, **values}


def _sliding_window(found: HfKeys, family: Family) -> int | None:
    """The window, where every layer has one; models that mix windowed and full layers are refused."""
    if family.window == "none":
        return None
    if family.window == "every layer" and not found.layer_types:
        return found.sliding_window
    kinds = set(found.layer_types or ())
    if kinds == {"full_attention"}:
        return None
    if kinds != {"sliding_attention"}:
        raise UnsupportedModelError(
            "models that mix sliding-window and full attention layers, or have layers of other kinds, are not supported"
        )
    if found.sliding_window is None:
        raise FlextronError("config.json has layers of sliding_attention but no sliding_window in use; restore it")
    return found.sliding_window


def _needed(found: HfKeys, key: str) -> Any:
    """The value of a key that every config must have, by itself or by its family's default."""
    value = getattr(found, key)
    if value is None:
        raise FlextronError(f"config.json lacks {key}; restore it from the original checkpoint")
    return value


def _heads(found: HfKeys, family: Family, name: str) -> tuple[int, int, int]:
    """Query heads, KV heads and head size, where they go together."""
    heads, hidden = int(_needed(found, "num_attention_heads")), int(_needed(found, "hidden_size"))
    kv_heads, head_dim = found.num_key_value_heads or heads, found.head_dim or hidden // heads
    if family.explicit_head_dim and "head_dim" in found.model_fields_set and found.head_dim is None:
        raise FlextronError(f"config.json sets head_dim of a {name} to null; leave the key out or give the number")
    if heads % kv_heads:
        raise FlextronError(
            f"config.json has {heads} attention heads (num_attention_heads), which is no multiple of its {kv_heads} "
            "key-value heads (num_key_value_heads); restore it from the original checkpoint"
        )
    if head_dim < 1 or (not family.explicit_head_dim and heads * head_dim != hidden):
        raise FlextronError(
            f"config.json has {heads} heads of {head_dim} dimensions, which do not make up the hidden size {hidden} of "
            f"a {name} model; restore it from the original checkpoint"
        )
    return heads, kv_heads, head_dim


def config_from_hf(hf_config: Mapping[str, Any]) -> DecoderConfig:
    """Read a `config.json`.

    Raises:
        UnsupportedModelError: the architecture, its activation or its rope scaling has no implementation.
        FlextronError: the config lacks what its family needs, or holds what is out of bounds.
    """
    hf = parsed_config(hf_config)
    name = family_of(hf_config)
    family = FAMILIES[name]
    found = check_keys({key: getattr(hf, key) for key in family.keys if hasattr(hf, key)}, name)
    for key, value in family.required.items():
        if getattr(found, key) != value:
            raise UnsupportedModelError(f"{name} with {key} = {getattr(found, key)} is not supported; only {value} is")
    heads, kv_heads, head_dim = _heads(found, family, name)

    def trait(value: bool | str) -> bool:
        return bool(getattr(found, value)) if isinstance(value, str) else value

    return DecoderConfig(
        family=name,
        vocab_size=_needed(found, "vocab_size"),
        hidden_size=_needed(found, "hidden_size"),
        intermediate_size=found.intermediate_size or found.n_inner or 4 * _needed(found, "hidden_size"),
        num_hidden_layers=_needed(found, "num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=_needed(found, "max_position_embeddings"),
        norm=family.norm,
        norm_eps=_needed(found, family.norm_eps),
        activation=_SAME_ACTIVATION.get(activation := _needed(found, family.activation), activation),
        gated=family.gated,
        qkv_bias=trait(family.qkv_bias),
        output_bias=trait(family.output_bias),
        mlp_bias=trait(family.mlp_bias),
        qk_norm=family.qk_norm,
        rope=_rope(hf, found, family, head_dim) if family.rotary else None,
        parallel_residual=trait(family.parallel_residual),
        sliding_window=_sliding_window(found, family),
        tie_word_embeddings=bool(found.tie_word_embeddings),
    )
