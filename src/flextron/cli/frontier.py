"""`flextron frontier`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flextron import api
from flextron.cli.console import Json, message, show
from flextron.errors import FlextronError
from flextron.files import new_file
from flextron.server.page.frontier import frontier_html
from flextron.workflows.report import frontier_rows

__all__ = ["frontier"]


def frontier(
    directory: Annotated[Path, typer.Argument(help="Elastic checkpoint that was profiled.")],
    html: Annotated[
        Path | None,
        typer.Option(help="Write the chart to this HTML file, which shows values under the pointer and loads nothing."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show the measured sub-networks that nothing beats, as a table or as a chart to be sent around."""
    model = api.load(str(directory))
    if model.frontier is None:
        raise FlextronError(f"{directory} has no frontier; measure one with: flextron profile {directory}")
    if html is not None:
        name = directory.expanduser().resolve().name
        with new_file(html) as path:
            path.write_text(frontier_html(model.frontier, model.space.full, name=name), encoding="utf-8")
        message(f"wrote {html}")
    show(frontier_rows(model), title=f"best sub-networks, measured on {model.frontier.device}", as_json=as_json)
