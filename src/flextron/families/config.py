"""Reading `config.json`: which family it is of, and what its keys mean there.

Configs are parsed by `transformers`, so that its defaults hold wherever a `config.json` leaves a key out. It keeps
whatever stands in the file as an attribute, though, and its modelling code looks at some of them only. So a family gets
to see its own keys and no others; a key that changes the result and has no implementation is refused.
"""

from __future__ import annotations

import copy
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from flextron.errors import FlextronError, UnsupportedModelError
from flextron.families.keys import HfKeys, check_keys, needed
from flextron.families.rope import read_ropes
from flextron.families.table import FAMILIES, Family
from flextron.families.tensor_maps import TensorMap
from flextron.model.config import DecoderConfig

__all__ = ["FAMILIES", "Family", "TensorMap", "config_from_hf", "family_of", "layer_maps", "parsed_config"]

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
    check_keys(own, name, rope_by_kind=FAMILIES[name].rope_by_kind)
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


def _windows(found: HfKeys, family: Family, kinds: Sequence[str]) -> tuple[int | None, tuple[int | None, ...] | None]:
    """The sliding window, and that of each layer where layers differ."""
    if family.window == "none":
        return None, None
    if family.window == "every layer" and not found.layer_types:
        return found.sliding_window, None
    if set(kinds) == {"full_attention"}:
        return None, None
    if not set(kinds) <= {"full_attention", "sliding_attention"}:
        raise UnsupportedModelError(
            "models with layers other than of full_attention and sliding_attention are not read"
        )
    if found.sliding_window is None:
        raise FlextronError("config.json has layers of sliding_attention but no sliding_window in use; restore it")
    if set(kinds) == {"sliding_attention"}:
        return found.sliding_window, None
    return found.sliding_window, tuple(found.sliding_window if kind == "sliding_attention" else None for kind in kinds)


def _kinds(found: HfKeys) -> tuple[str, ...]:
    """Kinds of the layers' attention."""
    layers = int(needed(found, "num_hidden_layers"))
    kinds = tuple(found.layer_types or ("full_attention",) * layers)
    if len(kinds) != layers:
        raise FlextronError(f"config.json has {layers} layers and {len(kinds)} layer_types; restore it")
    return kinds


def _heads(found: HfKeys, family: Family, name: str) -> tuple[int, int, int]:
    """Query heads, KV heads and head size, where they go together."""
    heads, hidden = int(needed(found, "num_attention_heads")), int(needed(found, "hidden_size"))
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
    found = check_keys(
        {key: getattr(hf, key) for key in family.keys if hasattr(hf, key)}, name, rope_by_kind=family.rope_by_kind
    )
    for key, value in family.required.items():
        if bool(getattr(found, key)) != value:
            raise UnsupportedModelError(f"{name} with {key} = {getattr(found, key)} is not supported; only {value} is")
    heads, kv_heads, head_dim = _heads(found, family, name)

    def trait(value: bool | str) -> bool:
        return bool(getattr(found, value)) if isinstance(value, str) else value

    kinds = _kinds(found)
    window, layer_windows = _windows(found, family, kinds)
    rope, layer_ropes = read_ropes(hf, found, family, head_dim, kinds) if family.rotary else (None, None)
    config = DecoderConfig(
        family=name,
        vocab_size=needed(found, "vocab_size"),
        hidden_size=needed(found, "hidden_size"),
        intermediate_size=found.intermediate_size or found.n_inner or 4 * needed(found, "hidden_size"),
        num_hidden_layers=needed(found, "num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=needed(found, "max_position_embeddings"),
        norm=family.norm,
        norm_eps=needed(found, family.norm_eps),
        norm_offset=family.norm_offset,
        pre_norm=family.pre_norm,
        post_norm=family.post_norm,
        activation=_SAME_ACTIVATION.get(activation := needed(found, family.activation), activation),
        gated=family.gated,
        qkv_bias=trait(family.qkv_bias),
        output_bias=trait(family.output_bias),
        mlp_bias=trait(family.mlp_bias),
        qk_norm=family.qk_norm,
        rope=rope,
        layer_ropes=layer_ropes,
        parallel_residual=trait(family.parallel_residual),
        sliding_window=window,
        layer_windows=layer_windows,
        scale_by_layer=trait(family.scale_by_layer),
        tie_word_embeddings=bool(found.tie_word_embeddings),
    )
    scalars: dict[str, Any] = {key: of(found) for key, of in family.scalars.items()}
    config = replace(config, **{key: number for key, number in scalars.items() if number is not None})
    # what a rope scaling cannot do is beyond the model's context
    longest = config.max_position_embeddings if config.longest is None else config.longest
    return replace(config, max_position_embeddings=min(longest, config.max_position_embeddings))


def layer_maps(config: DecoderConfig, parameters: Container[str]) -> Iterator[tuple[str, TensorMap]]:
    """(Checkpoint name, map) of every tensor that the decoder needs, layer templates filled in.

    Layer by layer, which spreads the tensors that must be laid out anew for writing evenly over the files.
    """
    maps = FAMILIES[config.family].tensors
    outer = [(0, m) for m in maps if "{i}" not in m.hf]
    inner = [(i, m) for i in range(config.num_hidden_layers) for m in maps if "{i}" in m.hf]
    for i, m in outer + inner:
        ours = tuple(name.format(i=i) for name in m.ours)
        if all(name in parameters for name in ours):
            yield m.hf.format(i=i), replace(m, hf=m.hf.format(i=i), ours=ours)
