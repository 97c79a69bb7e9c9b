"""`flextron elastify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flextron.cli.console import Json, progress, show
from flextron.parallel.launcher import is_first_launched
from flextron.workflows.elastify import elastify as run
from flextron.workflows.elastify import read_recipe
from flextron.workflows.report import frontier_rows

__all__ = ["elastify"]


def elastify(
    recipe: Annotated[
        Path, typer.Argument(help="YAML recipe with the keys source, output, text, convert, train and profile.")
    ],
    as_json: Json = False,
) -> None:
    """Convert, train and profile from a recipe; what is done already is not done again."""
    model = run(read_recipe(recipe), progress)
    if not is_first_launched():
        return  # the first alone has profiled
    show(frontier_rows(model), title="best sub-networks on this device", as_json=as_json)
