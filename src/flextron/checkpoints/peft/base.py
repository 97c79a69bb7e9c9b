"""What an adapter takes for granted about the weights beside it: their order, and that they are as they were.

An adapter of the original checkpoint goes with an elastic one once it is in the same order. One of the elastic
checkpoint, which stock `transformers` loads and peft trains beside, goes as it is. Where neither is known, any guess
would be silently wrong in half of all cases.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flextron.checkpoints.fingerprint import weights_digest
from flextron.checkpoints.huggingface import open_pretrained
from flextron.checkpoints.origin import PermutedFrom, read_origin
from flextron.checkpoints.permutation import Permutation
from flextron.errors import FlextronError
from flextron.model.bypass import Bypass
from flextron.model.config import DecoderConfig
from flextron.spec import SubnetSpec

__all__ = ["MARK", "check_initialisation", "mark_of", "order_for", "reordered"]

MARK = "flextron_order"
"""Key of a weights file's metadata: the order of the weights beside which the adapter was made."""
_KEEP_THE_BASE = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
"""Ways to begin a LoRA adapter that leave the weights beside it as they are."""

_OF_ANOTHER = (
    "the adapter in {adapter} was made beside another elastic checkpoint, or a part of this one; use it with that"
)
_IN_PLACE = (
    "the adapter in {adapter} names {name} as its base model, where the original was before the elastic checkpoint "
    "took its place; move the latter, and set base_model_name_or_path in the adapter's config to {name} if it is of "
    "the original, or to where the elastic one is"
)
_OF_UNKNOWN = (
    "the adapter in {adapter} names {name} as its base model, which is neither this elastic checkpoint nor what it was "
    "made from; set base_model_name_or_path in its adapter_config.json to {source} if that was beside it, or to the "
    "elastic checkpoint's directory"
)
_ORDER_LOST = (
    "the adapter in {adapter} was made beside {name}, and this elastic checkpoint, of an earlier version, does not "
    "keep the order of its neurons; make it again with convert"
)


def check_initialisation(settings: Mapping[str, Any], directory: Path) -> None:
    """Raise if peft changes the weights themselves when it loads the adapter, or did when it began.

    Raises:
        FlextronError: it does (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA), or may.
    """
    way = settings.get("init_lora_weights")
    known = way.lower() if isinstance(way, str) else way
    if not any(known is keep or (isinstance(known, str) and known == keep) for keep in _KEEP_THE_BASE):
        raise FlextronError(
            f"the adapter in {directory} was made with init_lora_weights {way!r}, which changes the model's own "
            "weights; save it with peft's path_initial_model_for_weight_conversion, as an ordinary LoRA adapter"
        )


def mark_of(config: DecoderConfig, widths: SubnetSpec) -> dict[str, str]:
    """Metadata of an adapter that was made beside a decoder of these widths; a part of it has a mark of its own."""
    if not isinstance(config.origin, PermutedFrom):
        return {}
    return {MARK: config.origin.mark if widths == config.full_spec else f"part of {config.origin.mark}"}


def order_for(directory: Path, config: DecoderConfig, base: Any, mark: str | None) -> Permutation | None:
    """The order into which an adapter must be put to go with a decoder; None if it goes as it is.

    Args:
        directory: directory of the adapter.
        config: config of the full decoder.
        base: `base_model_name_or_path` of the adapter's config.
        mark: that `mark_of` gave when it was written, if this package wrote it.

    Raises:
        FlextronError: the adapter was made beside other weights, or it cannot be known beside which.
    """
    origin = config.origin
    if not isinstance(origin, PermutedFrom) or mark == origin.mark:
        return None
    name = base if isinstance(base, str) else ""
    words = {"adapter": directory, "name": repr(name), "source": repr(origin.source or "the original")}
    if mark is not None:
        raise FlextronError(_OF_ANOTHER.format(**words))
    found = _directory(name)
    is_elastic = found is not None and _mark_of_directory(found) == origin.mark
    is_original = _is_named(origin, name, found) or (not is_elastic and _has_weights(origin, found))
    if is_elastic and is_original:
        raise FlextronError(_IN_PLACE.format(**words))
    if is_elastic:
        return None
    if not is_original:
        raise FlextronError(_OF_UNKNOWN.format(**words))
    if origin.permutation is None:
        raise FlextronError(_ORDER_LOST.format(**words))
    return origin.permutation


def reordered(bypasses: Mapping[tuple[int, str], Bypass], order: Permutation, config: DecoderConfig) -> None:
    """Put bypasses, by layer and target, into an order, in place."""
    moves = {i: order.moves(config, i) for i in {layer for layer, _ in bypasses}}
    for (layer, target), bypass in bypasses.items():
        bypass.reorder(moves[layer][target].inputs, moves[layer][target].outputs)


def _directory(name: str) -> Path | None:
    try:
        path = Path(name).expanduser()
        return path if name and path.is_dir() else None
    except (OSError, RuntimeError, ValueError):  # too long, no such user, no path at all
        return None


def _mark_of_directory(directory: Path) -> str | None:
    try:
        origin = read_origin(directory)
        return None if origin is None else origin.mark
    except FlextronError:
        return None


def _is_named(origin: PermutedFrom, name: str, found: Path | None) -> bool:
    """Whether a name, or the directory that it is of, is the original's."""
    source = _directory(origin.source)
    return bool(name) and (
        name == origin.source or (found is not None and source is not None and source.samefile(found))
    )


def _has_weights(origin: PermutedFrom, found: Path | None) -> bool:
    """Whether a directory holds the original's weights."""
    if found is None or origin.weights is None:
        return False
    try:
        return weights_digest(open_pretrained(found).tensors()) == origin.weights
    except (FlextronError, OSError):
        return False
