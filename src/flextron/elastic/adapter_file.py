"""Elastic adapters on disk: `elastic.json` as in an elastic checkpoint, and `elastic_adapter.json` and `.safetensors`.

They hold all that turns the base into the elastic model: the search space, the order of neurons and groups, the
low-rank updates and the norms. The updates take 16 bits a number, or 8 with a scale for each row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from flextron.checkpoints.permutation import Permutation
from flextron.elastic.adapter import ElasticAdapter, norm_parameters
from flextron.elastic.checkpoint import ElasticInfo, read_elastic, read_tensors, write_tensors
from flextron.errors import FlextronError
from flextron.files import checked, new_directory, read_json, write_json
from flextron.kernels.quantization import quantize_rows
from flextron.model.adapter import Adapter
from flextron.model.decoder import Decoder

__all__ = ["Bits", "StoredAdapter", "is_adapter", "read_adapter", "write_adapter"]

_FACTS, _TENSORS = "elastic_adapter.json", "elastic_adapter.safetensors"
_INFO, _CARD, FORMAT_VERSION = "elastic.json", "README.md", 1
_LORA, _NORMS, _ORDER, _SKETCH = "lora.", "norms.", "order.", "base_sketch"
_SCALES = ".scales"
_REMEDY = "make the elastic adapter again with train --lora"
Bits = Literal[8, 16]


class _AdapterFile(BaseModel):
    """`elastic_adapter.json`."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    format_version: Literal[1]
    base: str
    rank: int = Field(ge=1, le=65536)
    alpha: float = Field(gt=0, le=1e6)
    bits: Bits


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredAdapter:
    """An elastic adapter with all that belongs to it."""

    base: str
    """Hub id or file for which it was made."""
    info: ElasticInfo
    permutation: Permutation
    """Order of the base's neurons and groups beside which the updates stand."""
    rank: int
    alpha: float
    tensors: Mapping[str, Tensor]
    """Updates and norms, float32, by name."""
    base_sketch: Tensor
    """Sketch of the permuted base, see `flextron.elastic.sketch`."""
    extra: Mapping[str, Any]
    """Further JSON documents by name: the losses of sub-networks."""

    def build(self, decoder: Decoder) -> ElasticAdapter:
        """The adapter for a decoder.

        Raises:
            FlextronError: it is for another shape.
        """
        lora = Adapter.lora(decoder.config, rank=self.rank, alpha=self.alpha)
        own = {name.removeprefix(_LORA): t for name, t in self.tensors.items() if name.startswith(_LORA)}
        norms = {name.removeprefix(_NORMS): t for name, t in self.tensors.items() if name.startswith(_NORMS)}
        wanted = {name: p.shape for name, p in lora.named_parameters()}
        shapes = {name: p.shape for name, p in norm_parameters(decoder).items()}
        if {n: t.shape for n, t in own.items()} != wanted or {n: t.shape for n, t in norms.items()} != shapes:
            raise FlextronError(f"the elastic adapter is for a model of another shape; give its base, {self.base}")
        lora.load_state_dict(own)
        return ElasticAdapter(lora=lora.requires_grad_(False), norms=norms, base_sketch=self.base_sketch)


def is_adapter(directory: Path) -> bool:
    """Whether a directory holds an elastic adapter."""
    return (directory / _FACTS).is_file()


def write_adapter(
    directory: Path,
    adapter: ElasticAdapter,
    info: ElasticInfo,
    permutation: Permutation,
    *,
    base: str,
    bits: Bits = 16,
    extra: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Mapping[str, Tensor]] | None = None,
    card: str | None = None,
    overwrite: bool = False,
) -> None:
    """Write an adapter directory, in one move.

    Args:
        directory: made here.
        adapter: updates and norms.
        info: search space, provenance, recipe.
        permutation: order of the base beside which the adapter was trained.
        base: its hub id or file.
        bits: bits per number of the updates.
        extra: further JSON documents by file name.
        tensors: further safetensors files by name (routers).
        card: the model card, if there is one.
        overwrite: replace an existing directory.

    Raises:
        FlextronError: the directory exists and is not to be overwritten, or the bits are neither 8 nor 16.
    """
    if bits not in (8, 16):
        raise FlextronError(f"an elastic adapter is stored in 8 or 16 bits, not {bits}")
    stored: dict[str, Tensor] = {_SKETCH: adapter.base_sketch}
    for name, parameter in adapter.lora.named_parameters():
        stored |= _packed(f"{_LORA}{name}", parameter.detach().cpu(), bits)
    stored |= {f"{_NORMS}{name}": t.detach().cpu().half() for name, t in adapter.norms.items()}
    stored |= {f"{_ORDER}{name}": t for name, t in permutation.to_tensors().items()}
    facts = {"format_version": FORMAT_VERSION, "base": base, "rank": adapter.rank, "alpha": adapter.alpha, "bits": bits}
    with new_directory(directory, overwrite=overwrite) as temporary:
        write_json(temporary / _INFO, info.to_dict())
        write_json(temporary / _FACTS, facts)
        write_tensors(temporary / _TENSORS, {name: t.contiguous() for name, t in stored.items()})
        if card is not None:
            (temporary / _CARD).write_text(card, encoding="utf-8")
        for name, data in (extra or {}).items():
            write_json(temporary / name, data)
        for name, weights in (tensors or {}).items():
            write_tensors(temporary / name, weights)


def _packed(name: str, values: Tensor, bits: Bits) -> dict[str, Tensor]:
    if bits == 16:
        return {name: values.half()}
    rows, scales = quantize_rows(values)
    return {name: rows, name + _SCALES: scales.half()}


def _unpacked(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Float32 numbers of what `_packed` gave."""
    out = {}
    for name, values in stored.items():
        if name.endswith(_SCALES):
            continue
        scales = stored.get(name + _SCALES)
        out[name] = values.float() if scales is None else values.float() * scales.float()[:, None]
    return out


def read_adapter(directory: Path) -> StoredAdapter:
    """Read an adapter directory.

    Raises:
        FlextronError: it is none, damaged, or of a newer format.
    """
    if not is_adapter(directory):
        raise FlextronError(f"{directory} is no elastic adapter (no {_FACTS}); make one with train --lora")
    facts = checked(_AdapterFile, read_json(directory / _FACTS), str(directory / _FACTS), _REMEDY)
    tensors = read_tensors(directory / _TENSORS)
    order = {n.removeprefix(_ORDER): t for n, t in tensors.items() if n.startswith(_ORDER)}
    parts = _unpacked({n: t for n, t in tensors.items() if n.startswith((_LORA, _NORMS))})
    if not all(bool(t.isfinite().all()) for t in parts.values()):
        raise FlextronError(f"{directory / _TENSORS} holds NaN or infinity; {_REMEDY}")
    if _SKETCH not in tensors:
        raise FlextronError(f"{directory / _TENSORS} lacks {_SKETCH}; {_REMEDY}")
    others = sorted(f for f in directory.glob("*.json") if f.name not in (_INFO, _FACTS))
    return StoredAdapter(
        base=facts.base,
        info=read_elastic(directory),
        permutation=Permutation.from_tensors(order),
        rank=facts.rank,
        alpha=facts.alpha,
        tensors=parts,
        base_sketch=tensors[_SKETCH].float(),
        extra={f.name: read_json(f) for f in others},
    )
