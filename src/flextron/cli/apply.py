"""`flextron apply`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flextron import api
from flextron.cli.console import message

__all__ = ["apply"]


def apply(
    base: Annotated[str, typer.Argument(help="Model for which the adapter was made: hub id, directory or .gguf file.")],
    adapter: Annotated[str, typer.Argument(help="Elastic adapter: directory or hub id.")],
    output: Annotated[Path, typer.Argument(help="Directory of the elastic checkpoint to write.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output if it exists.")] = False,
) -> None:
    """Merge an elastic adapter into its base: an elastic checkpoint, ready to profile and serve."""
    api.load(base, elastic=adapter).save(output, overwrite=overwrite)
    message(f"{output} holds the elastic model; flextron profile {output} measures it on this device")
