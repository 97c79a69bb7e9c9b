"""The origin of a decoder's weights, if they are another checkpoint's in another order.

`convert` writes it beside an elastic checkpoint. With it an adapter can be told from one of the original, and the
latter be put into the same order (`flextron.checkpoints.peft.base`).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from flextron.checkpoints.permutation import Permutation
from flextron.errors import FlextronError
from flextron.files import new_file, read_json
from flextron.model.config import DecoderConfig, Origin

__all__ = ["PermutedFrom", "checked_origin", "read_origin", "write_origin"]

_TENSORS, _ELASTIC = "permutation.safetensors", "elastic.json"
_SOURCE, _WEIGHTS = "source", "weights"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PermutedFrom(Origin):
    """An order of another checkpoint."""

    mark: str
    """Tells this order of these weights from all others."""
    source: str
    """The original: a hub id, a directory or a file; empty where it is not known."""
    weights: str | None
    """Digest of the original's weights, see `weights_digest`."""
    permutation: Permutation | None
    """The order; None if an earlier version did not keep it."""
    directory: Path | None = None
    """Directory of the checkpoint, once it is on the disk."""

    @classmethod
    def of(
        cls, permutation: Permutation, source: str, weights: str | None, directory: Path | None = None
    ) -> PermutedFrom:
        """Make an origin, whose mark follows from the order and from the weights as far as they are known."""
        mark = hashlib.sha256(f"{permutation.digest} {weights or source}".encode()).hexdigest()[:32]
        return cls(mark=mark, source=source, weights=weights, permutation=permutation, directory=directory)


def read_origin(directory: Path) -> PermutedFrom | None:
    """Origin of a checkpoint's weights; None if it is not elastic.

    Raises:
        FlextronError: its files are damaged.
    """
    if not (directory / _ELASTIC).is_file():
        return None
    if (directory / _TENSORS).is_file():
        permutation, metadata = _read(directory / _TENSORS)
        return PermutedFrom.of(permutation, metadata.get(_SOURCE, ""), metadata.get(_WEIGHTS) or None, directory)
    # an earlier version kept no order; the scores of layers tell one conversion from another
    data = read_json(directory / _ELASTIC)
    elastic = data if isinstance(data, dict) else {}
    stated = elastic.get("provenance")
    return PermutedFrom(
        mark=hashlib.sha256(str(elastic.get("layer_scores")).encode()).hexdigest()[:32],
        source=str(stated.get("source") or "") if isinstance(stated, dict) else "",
        weights=None,
        permutation=None,
        directory=directory,
    )


def checked_origin(directory: Path, config: DecoderConfig) -> PermutedFrom | None:
    """The same as `read_origin`, checked for a model of this config.

    Raises:
        FlextronError: files are damaged, or the order is of another model.
    """
    origin = read_origin(directory)
    if origin is not None and origin.permutation is not None:
        try:
            origin.permutation.check(config)
        except FlextronError as error:
            raise FlextronError(f"{directory / _TENSORS}: {error}") from error
    return origin


def write_origin(directory: Path, origin: Origin | None) -> None:
    """Put it beside an elastic checkpoint, as far as it is known.

    Raises:
        FlextronError: the disk is full.
    """
    if not isinstance(origin, PermutedFrom) or origin.permutation is None:
        return
    metadata = {"format": "pt", _SOURCE: origin.source, _WEIGHTS: origin.weights or ""}
    with new_file(directory / _TENSORS) as temporary:
        save_file(origin.permutation.to_tensors(), temporary, metadata=metadata)


def _read(path: Path) -> tuple[Permutation, dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise FlextronError(f"{path} is corrupt or truncated ({error}); make the checkpoint again") from error
    try:
        return Permutation.from_tensors(tensors), metadata
    except FlextronError as error:
        raise FlextronError(f"{path}: {error}") from error
