"""Measured sub-networks as a table of slices, in the form that Google published for Gemma 3n.

The form is that of `google/gemma3n-slicing-configs`; mistral.rs reads such a file with `--matformer-config-path`. It
names an MLP width for each layer that is kept, and the layers that are skipped whole. Sub-networks with fewer attention
groups, or with a half skipped, are left out. Its column for an accuracy takes any text; here it is the loss.
"""

from __future__ import annotations

import csv
from pathlib import Path

from flextron.errors import FlextronError
from flextron.files import new_file
from flextron.routing import Frontier, FrontierPoint
from flextron.spec import SubnetSpec

__all__ = ["write_slices"]

_HEADER = ("name", "# Layers", "# Effective Params (B)", "MMLU PT accuracy", "FFN Hidden Dims", "Layers Skipped")


def write_slices(path: Path, frontier: Frontier | None, full: SubnetSpec, *, overwrite: bool = False) -> int:
    """Write the table; returns its number of slices.

    Args:
        path: the CSV file.
        frontier: the measured sub-networks.
        full: the full model's widths.
        overwrite: replace the file if it exists.

    Raises:
        FlextronError: nothing was measured, none of the sub-networks is a slice, or the file exists.
    """
    if frontier is None:
        raise FlextronError("the model has no measured sub-networks yet; run model.profile() (flextron profile) first")
    points = [point for point in frontier.points if _is_slice(point.spec, full)]
    if not points:
        raise FlextronError(
            "none of the measured sub-networks is a slice: a table of slices has MLP widths and skipped layers alone"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    with new_file(path, overwrite=overwrite) as temporary, temporary.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(_HEADER)
        writer.writerows(_row(point, full) for point in points)
    return len(points)


def _is_slice(spec: SubnetSpec, full: SubnetSpec) -> bool:
    """Whether all its layers have the full attention and an MLP, or are skipped."""
    return all(
        own.is_skipped or (own.num_groups == whole.num_groups and own.intermediate_size)
        for own, whole in zip(spec.layers, full.layers, strict=True)
    )


def _row(point: FrontierPoint, full: SubnetSpec) -> tuple[str, ...]:
    spec = point.spec
    skipped = [i for i, layer in enumerate(spec.layers) if layer.is_skipped]
    name = "full" if spec == full else f"latency {point.latency:.4g}, {point.params} parameters, {point.kind}"
    widths = [spec.layers[i].intermediate_size for i in spec.kept_layers]
    return (
        name,
        str(len(spec.kept_layers)),
        f"{point.params / 1e9:.6g}",
        f"loss {point.loss:.4f}",
        str(widths),
        str(skipped) if skipped else "",
    )
