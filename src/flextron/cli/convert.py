"""`flextron convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flextron import api
from flextron.cli.console import Json, message, show
from flextron.errors import FlextronError
from flextron.workflows.report import summary

__all__ = ["convert"]


def convert(
    source: Annotated[
        str, typer.Argument(help="Hub id, checkpoint directory or .gguf file. `tiny` names the packaged model.")
    ],
    output: Annotated[Path, typer.Argument(help="Directory of the elastic checkpoint to write.")],
    calibration: Annotated[
        str | None,
        typer.Option(help="Rank on this text: file, directory or datasets id. Default: text on this machine."),
    ] = None,
    method: Annotated[str, typer.Option(help="Rank by reconstruction or by activation.")] = "reconstruction",
    multiple_of: Annotated[
        int | None,
        typer.Option(help="MLP widths are multiples of this. Default: 64, or less where the width asks for it."),
    ] = None,
    max_skipped_layers: Annotated[
        int | None, typer.Option(help="Most layers that a sub-network may skip. Default: a third of the layers.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output directory.")] = False,
    as_json: Json = False,
) -> None:
    """Rank and permute a pretrained checkpoint into an elastic one (no training)."""
    if output.exists() and not overwrite:
        raise FlextronError(f"{output} exists already; choose another directory or pass --overwrite")
    if method not in ("reconstruction", "activation"):
        raise FlextronError(f"method {method!r} is unknown; choose reconstruction or activation")
    message(f"converting {source}")
    model = api.convert(
        source,
        calibration=calibration,
        method=method,  # type: ignore[arg-type]
        multiple_of=multiple_of,
        max_skipped_layers=max_skipped_layers,
    )
    model.save(output, overwrite=overwrite)
    show([summary(model)], title=str(output), as_json=as_json, result=summary(model))
