"""Rotary settings of a `config.json`: `rope_parameters` since transformers 5, scattered keys before.

All that a scaling needs is worked out here, so that what computes the frequencies (`model/rope.py`) reads one mapping.
Two kinds depend on a sequence's length: `dynamic` grows its base with it, and `longrope` goes over to another set of
factors. Of both, the settings of shorter sequences are read, and `longest` says how long these may be.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transformers import PretrainedConfig

from flextron.errors import FlextronError, UnsupportedModelError
from flextron.families.keys import HfKeys, RopeKeys, needed
from flextron.families.table import Family
from flextron.model.config import Rope

__all__ = ["read_ropes"]


def read_ropes(
    hf: PretrainedConfig, found: HfKeys, family: Family, head_dim: int, kinds: Sequence[str]
) -> tuple[Rope, tuple[Rope | None, ...] | None]:
    """Rotary settings, and those of each layer where layers differ.

    Args:
        hf: what `transformers` made of the config.
        found: its keys.
        family: the family.
        head_dim: size of a head.
        kinds: kind of each layer's attention.

    Raises:
        UnsupportedModelError: the scaling has no implementation.
        FlextronError: settings are missing or contradict each other.
    """
    if family.rope_by_kind:
        by_kind = _of_kinds(hf, found)
        ropes = {kind: _rope(keys, found, family, head_dim) for kind, keys in by_kind.items()}
        if missing := set(kinds) - set(ropes):
            raise FlextronError(f"config.json has no rotary settings for layers of {min(missing)}; restore it")
        own = tuple(ropes[kind] for kind in kinds)
        return own[-1], own if len(set(own)) > 1 else None
    keys = found.rope_parameters or found.rope_scaling or RopeKeys()
    theta = keys.rope_theta or getattr(hf, "rope_theta", None) or getattr(hf, "rotary_emb_base", None)
    fraction = keys.partial_rotary_factor
    if fraction is None and family.partly_rotary:
        fraction = getattr(hf, "rotary_pct", getattr(hf, "partial_rotary_factor", None))
        if fraction is None:
            raise FlextronError("config.json has no rotary_pct; restore it from the original checkpoint")
    rope = _rope(
        keys.model_copy(update={"rope_theta": theta, "partial_rotary_factor": fraction}), found, family, head_dim
    )
    flags = found.no_rope_layers
    if flags is None or all(flags[: len(kinds)]):
        return rope, None
    if len(flags) < len(kinds):
        raise FlextronError(f"config.json has {len(kinds)} layers and {len(flags)} no_rope_layers; restore it")
    return rope, tuple(rope if rotates else None for rotates in flags[: len(kinds)])


def _of_kinds(hf: PretrainedConfig, found: HfKeys) -> dict[str, RopeKeys]:
    """Settings of each kind of layer."""
    if found.ropes_by_kind is not None:
        return {kind: keys or RopeKeys() for kind, keys in found.ropes_by_kind.items()}
    scaling = found.rope_scaling or RopeKeys()
    return {
        "full_attention": scaling.model_copy(update={"rope_theta": getattr(hf, "rope_theta", None)}),
        "sliding_attention": RopeKeys(rope_theta=found.rope_local_base_freq),
    }


def _rope(keys: RopeKeys, found: HfKeys, family: Family, head_dim: int) -> Rope:
    if keys.rope_theta is None:
        raise FlextronError("config.json has no rope_theta; restore it from the original checkpoint")
    kind = keys.rope_type or keys.type or "default"
    if kind != "default" and kind not in _SCALINGS:
        raise UnsupportedModelError(
            f"rope scaling of type {kind!r} is not supported; default, {', '.join(_SCALINGS)} are"
        )
    fraction = 1.0 if keys.partial_rotary_factor is None else keys.partial_rotary_factor
    if not family.partly_rotary and fraction != 1:
        if kind != "default":
            raise UnsupportedModelError(f"partial_rotary_factor with rope scaling of type {kind!r} is not supported")
        fraction = 1.0  # its modelling code does not read it
    rotated = int(head_dim * fraction)
    if rotated < 2 or rotated % 2:
        raise FlextronError(
            f"config.json asks to rotate {rotated} of the {head_dim} dimensions of each head; only even numbers work"
        )
    scaling = None if kind == "default" else {"rope_type": kind, **_SCALINGS[kind](keys, found, rotated)}
    return Rope(theta=float(keys.rope_theta), fraction=float(fraction), scaling=scaling)


def _given(keys: RopeKeys, kind: str, *names: str) -> dict[str, Any]:
    """Settings that the kind cannot do without."""
    values = {name: getattr(keys, name) for name in names}
    if missing := [name for name, value in values.items() if value is None]:
        raise FlextronError(
            f"rope scaling of type {kind!r} lacks {missing[0]}; restore config.json from the original checkpoint"
        )
    return values


def _original(keys: RopeKeys, found: HfKeys) -> int:
    """Tokens of the context before it was extended."""
    own = keys.original_max_position_embeddings or found.original_max_position_embeddings
    return int(own or needed(found, "max_position_embeddings"))


def _linear(keys: RopeKeys, found: HfKeys, rotated: int) -> dict[str, Any]:
    return _given(keys, "linear", "factor")


def _llama3(keys: RopeKeys, found: HfKeys, rotated: int) -> dict[str, Any]:
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    values = _given(keys, "llama3", *names)
    if values["high_freq_factor"] < values["low_freq_factor"]:
        raise FlextronError("rope scaling has high_freq_factor below low_freq_factor; restore config.json")
    return values


def _dynamic(keys: RopeKeys, found: HfKeys, rotated: int) -> dict[str, Any]:
    return _given(keys, "dynamic", "factor") | {"longest": int(needed(found, "max_position_embeddings"))}


def _yarn(keys: RopeKeys, found: HfKeys, rotated: int) -> dict[str, Any]:
    if keys.rope_theta is None or keys.rope_theta <= 1:
        raise FlextronError("rope scaling of type 'yarn' needs a rope_theta above 1; restore config.json")
    original = _original(keys, found)
    factor = keys.factor or needed(found, "max_position_embeddings") / original

    def strength(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    attention = keys.attention_factor
    if attention is None:
        attention = strength(1.0)
        if keys.mscale and keys.mscale_all_dim:
            attention = strength(keys.mscale) / strength(keys.mscale_all_dim)
    return {
        "factor": factor,
        "original_max_position_embeddings": original,
        "beta_fast": keys.beta_fast or 32,
        "beta_slow": keys.beta_slow or 1,
        "truncate": keys.truncate is not False,
        "attention_factor": attention,
    }


def _longrope(keys: RopeKeys, found: HfKeys, rotated: int) -> dict[str, Any]:
    factors = _given(keys, "longrope", "short_factor", "long_factor")
    for name, own in factors.items():
        if len(own) != rotated // 2:
            raise FlextronError(
                f"rope scaling has {len(own)} numbers as {name} where {rotated // 2} pairs of dimensions are "
                "rotated; restore config.json"
            )
    original = _original(keys, found)
    factor = keys.factor or needed(found, "max_position_embeddings") / original
    attention = keys.attention_factor
    if attention is None:
        attention = math.sqrt(1 + math.log(factor) / math.log(max(original, 2))) if factor > 1 else 1.0
    known = {name: tuple(own) for name, own in factors.items()}
    return {**known, "attention_factor": attention, "longest": original}


_SCALINGS: Mapping[str, Callable[[RopeKeys, HfKeys, int], dict[str, Any]]] = {
    "linear": _linear,
    "llama3": _llama3,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "longrope": _longrope,
}
"""How the settings of each type are read."""
