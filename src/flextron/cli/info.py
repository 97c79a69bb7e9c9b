"""`flextron info`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flextron import api
from flextron.cli.console import Json, show
from flextron.workflows.report import frontier_rows, summary

__all__ = ["info"]


def info(
    directory: Annotated[Path, typer.Argument(help="Elastic checkpoint to describe. `tiny` names the packaged model.")],
    as_json: Json = False,
) -> None:
    """What an elastic checkpoint holds: search space, provenance, measured sub-networks."""
    model = api.load(str(directory))
    rows = frontier_rows(model)
    if as_json:
        facts = {"summary": summary(model), **model.info.to_dict(), "frontier": rows}
        show([], title="", as_json=True, result=facts)
        return
    show([summary(model)], title=str(directory), as_json=False)
    if model.frontier is not None:
        show(rows, title=f"best sub-networks, measured on {model.frontier.device}", as_json=False)
