"""`flextron eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flextron import api
from flextron.cli.console import Json, show
from flextron.workflows.report import perplexity_rows

__all__ = ["evaluate"]


def evaluate(
    directory: Annotated[Path, typer.Argument(help="Elastic checkpoint to evaluate. `tiny` names the packaged model.")],
    text: Annotated[
        str | None,
        typer.Option(help="Text to measure on: file, directory or datasets id. Default: Python's language reference."),
    ] = None,
    latency: Annotated[
        list[float] | None,
        typer.Option(help="Evaluate the sub-network for this latency target; repeatable. Default: the full network."),
    ] = None,
    num_tokens: Annotated[int, typer.Option(help="Tokens of the text to measure on.")] = 8192,
    context: Annotated[int, typer.Option(help="Tokens in a window.")] = 256,
    as_json: Json = False,
) -> None:
    """Perplexity of sub-networks on windows of text."""
    model = api.load(str(directory))
    specs = {f"latency {x:g}": model.select(latency=x) for x in latency or ()} or {"full": model.space.full}
    rows = perplexity_rows(model.evaluate(specs, text, num_tokens=num_tokens, context=context))
    show(rows, title=f"{directory}: perplexity in windows of {context} tokens", as_json=as_json)
