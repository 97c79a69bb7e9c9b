"""The form of a decoder that `transformers` knows: which sub-networks have one, and their `config.json`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flextron.errors import FlextronError
from flextron.families.config import FAMILIES, parsed_config
from flextron.model.config import DecoderConfig
from flextron.model.decoder import Decoder
from flextron.spec import SubnetSpec

__all__ = ["check_stock", "stock_config"]


def stock_config(decoder: Decoder, hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """The `config.json` of a uniform decoder.

    Raises:
        FlextronError: see `check_stock`.
    """
    config, widths, family = decoder.config, decoder.widths, FAMILIES[decoder.config.family]
    out = dict(hf_config) | {
        "architectures": [family.architecture],
        "model_type": config.family,
        "dtype": str(decoder.dtype).removeprefix("torch."),
        "tie_word_embeddings": config.tie_word_embeddings,
    }
    out.pop("torch_dtype", None)
    if isinstance(out.get("rope_parameters"), Mapping):
        out |= _rope_before_5(config, out["rope_parameters"])
    if widths == config.full_spec:
        return out
    check_stock(config, widths)
    layer = widths.layers[widths.kept_layers[0]]
    sizes = {"intermediate_size": layer.intermediate_size, "num_hidden_layers": len(widths.kept_layers)}
    for key in sizes:
        out.pop(key, None)  # a second name of the same size would win
    out |= {family.config_keys.get(key, key): value for key, value in sizes.items()}
    if family.explicit_head_dim:
        out["head_dim"] = config.head_dim
        out["num_attention_heads"] = _num_heads(config, layer.num_groups)
        out["num_key_value_heads"] = config.kv_rows(layer.num_groups) // config.head_dim
    return out | _layer_lists(config, widths, hf_config)


def _layer_lists(config: DecoderConfig, widths: SubnetSpec, hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """Lists with an entry a layer, of the layers that are left.

    A pattern (every sixth layer has no window) would fall on others, so what it stands for is written out. transformers
    counts the entries in every family, whether or not they say anything there.
    """
    given = {key: hf_config.get(key) for key in ("layer_types", "mlp_layer_types", "no_rope_layers")}
    if config.layer_windows is not None or config.layer_ropes is not None:
        parsed = parsed_config(hf_config)
        given |= {key: getattr(parsed, key, None) for key in FAMILIES[config.family].keys & given.keys()}
    return {
        key: [value[i] for i in widths.kept_layers]
        for key, value in given.items()
        if isinstance(value, list) and len(value) >= config.num_hidden_layers
    }


def _rope_before_5(config: DecoderConfig, given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of `rope_parameters` under the names that `transformers` 4 reads."""
    family, rope = FAMILIES[config.family], config.rope
    if any(isinstance(value, Mapping) for value in given.values()):
        return _kinds_before_5(given) if family.rope_by_kind else {}
    if rope is None:
        return {}
    older = {"rope_theta": rope.theta} | ({"partial_rotary_factor": rope.fraction} if family.partly_rotary else {})
    named = {family.config_keys.get(key, key): value for key, value in older.items()}
    if rope.scaling is not None and rope.scaling["rope_type"] == "longrope":
        # three keys exactly, and the context before the extension beside them
        if given.get("original_max_position_embeddings") is not None:
            named["original_max_position_embeddings"] = given["original_max_position_embeddings"]
        factors = {key: given[key] for key in ("short_factor", "long_factor")}
        return named | {"rope_scaling": {"type": "longrope", **factors}}
    scaling = {key: value for key, value in given.items() if key not in ("rope_theta", "partial_rotary_factor")}
    return named | {"rope_scaling": None if rope.scaling is None else scaling}


def _kinds_before_5(given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that differ by kind of layer, as Gemma 3 has them there."""
    full, sliding = ({**(given.get(f"{kind}_attention") or {})} for kind in ("full", "sliding"))
    older = {"rope_theta": full.pop("rope_theta", None), "rope_local_base_freq": sliding.get("rope_theta")}
    older["rope_scaling"] = None if full.get("rope_type", "default") == "default" else full
    return {key: value for key, value in older.items() if value is not None or key == "rope_scaling"}


def _num_heads(config: DecoderConfig, num_groups: int) -> int:
    return num_groups * config.query_rows_per_group // config.head_dim


def check_stock(config: DecoderConfig, widths: SubnetSpec) -> None:
    """Raise unless a sub-network is an ordinary checkpoint of its family.

    Raises:
        FlextronError: its layers differ in width, or the family's config cannot say its number of heads.
    """
    if not widths.is_uniform:
        raise FlextronError(
            "only a sub-network with equal widths in all its layers is a stock checkpoint; "
            "choose one with select(..., uniform=True)"
        )
    if config.scale_by_layer and widths.kept_layers != tuple(range(len(widths.kept_layers))):
        raise FlextronError(
            f"a stock {config.family} checkpoint rescales scores by the layer's number, which skipping a layer before "
            "others changes; skip none, or the last ones alone"
        )
    groups = widths.layers[widths.kept_layers[0]].num_groups
    rope = config.rope
    if groups != config.num_groups and rope is not None and rope.scaling and rope.scaling["rope_type"] == "longrope":
        raise FlextronError(
            f"transformers refuses a {config.family} with longrope whose heads do not make up the hidden size; "
            f"keep all {config.num_groups} groups and narrow the MLP or skip layers instead"
        )
    if FAMILIES[config.family].heads_divide_hidden and config.hidden_size % _num_heads(config, groups):
        raise FlextronError(
            f"transformers refuses a {config.family} with {_num_heads(config, groups)} heads, which do not divide the "
            f"hidden size {config.hidden_size}; choose another number of groups than {groups}"
        )
    if groups != config.num_groups and not FAMILIES[config.family].explicit_head_dim:
        raise FlextronError(
            f"a stock {config.family} checkpoint cannot have fewer heads than hidden size / head size; "
            f"keep all {config.num_groups} groups and narrow the MLP or skip layers instead"
        )
