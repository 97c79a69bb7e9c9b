"""One way in for all formats: which there are, whether they hold a sub-network, and writing it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from flextron.errors import FlextronError
from flextron.export.format import Format, Order
from flextron.export.gguf.file import Gguf
from flextron.export.huggingface import HuggingFace
from flextron.export.nemotron_nas import NemotronNas
from flextron.export.source import Exported, Source
from flextron.export.widen import widened
from flextron.model.config import DecoderConfig
from flextron.model.cost import num_parameters
from flextron.spec import SubnetSpec

__all__ = ["FORMATS", "export", "format_for", "holds"]

FORMATS: Mapping[str, Format] = {format.name: format for format in (HuggingFace(), Gguf(), NemotronNas())}
"""Formats by name."""


def format_for(path: Path, name: str | None) -> Format:
    """The format of that name; without a name, the one of the path's suffix, and `hf` for a directory.

    Raises:
        FlextronError: there is none of that name.
    """
    if name is None:
        return next((f for f in FORMATS.values() if f.suffix and f.suffix == path.suffix), FORMATS["hf"])
    if name not in FORMATS:
        raise FlextronError(f"there is no export format {name!r}; choose one of {', '.join(FORMATS)}")
    return FORMATS[name]


def holds(format: Format, config: DecoderConfig, spec: SubnetSpec) -> bool:
    """Whether a format can hold a sub-network without widening its layers to the widest."""
    try:
        format.widths(config, spec)
    except FlextronError:
        return False
    return True


def export(
    source: Source,
    path: Path,
    spec: SubnetSpec,
    *,
    format: Format,
    precision: str | None = None,
    pad: bool = False,
    overwrite: bool = False,
) -> Exported:
    """Write a sub-network for another program.

    Args:
        source: the elastic model.
        path: file or directory to write.
        spec: the sub-network.
        format: one of `FORMATS`.
        precision: type of the matrices' numbers; by default the format's first.
        pad: widen layers with zeros to the widest where the format cannot hold them as they are.
        overwrite: replace what is there.

    Raises:
        FlextronError: the format cannot hold the sub-network, the model's tokenizer or the precision, or the place is
            taken.
    """
    config, precision = source.decoder.config, precision or format.precisions[0]
    if precision not in format.precisions:
        raise FlextronError(
            f"{format.name} files do not store {precision}; choose one of {', '.join(format.precisions)}"
        )
    if not spec.kept_layers:
        raise FlextronError("a sub-network without layers cannot be exported; keep at least one")
    widths, notes = _widths(source, format, spec, pad=pad), format.notes(config)
    if widths != spec:
        notes += (
            f"Widths are filled up with zeros, from {spec.describe()} to {widths.describe()}; what it computes is the "
            "same.",
        )
    order = Order(path=path, spec=spec, widths=widths, precision=precision, overwrite=overwrite, notes=notes)
    architecture = format.write(widened(source.decoder, spec, widths), source, order)
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return Exported(
        path=path,
        format=format.name,
        architecture=architecture,
        precision=precision,
        spec=spec,
        widths=widths,
        num_parameters=num_parameters(config, spec),
        num_bytes=sum(file.stat().st_size for file in files),
        notes=notes,
    )


def _widths(source: Source, format: Format, spec: SubnetSpec, *, pad: bool) -> SubnetSpec:
    """Widths to write.

    Raises:
        FlextronError: the format cannot hold the sub-network; names the nearest that it can.
    """
    config = source.decoder.config
    try:
        return format.widths(config, spec)
    except FlextronError as error:
        if pad:
            return format.padded(config, spec)
        others = [name for name, other in FORMATS.items() if holds(other, config, spec)]
        raise FlextronError("; ".join((str(error), *_remedies(source, format, spec, others)))) from error


def _remedies(source: Source, format: Format, spec: SubnetSpec, others: list[str]) -> list[str]:
    """What can be had instead of a sub-network that a format cannot hold."""
    config, found = source.decoder.config, []
    try:
        wide = format.padded(config, spec)
        size = num_parameters(config, wide) / num_parameters(config, spec)
        found.append(f"pad=True (--pad) writes it with zeros up to {wide.describe()}, {size:.2f} times as large")
    except FlextronError:
        pass
    if others:
        found.append(f"the format {' or '.join(others)} holds it as it is")
    if source.frontier is not None:
        size = num_parameters(config, spec)
        fitting = [p for p in source.frontier.points if holds(format, config, p.spec)]
        if fitting:
            nearest = min(fitting, key=lambda p: (abs(p.params - size), p.loss))
            found.append(
                f"the nearest measured one that fits has {nearest.params:,} parameters ({nearest.spec.describe()})"
            )
    return found
