"""`flextron route`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flextron.cli.console import Json, default_of, progress, show
from flextron.cli.loading import merged
from flextron.training.router_recipe import RouterRecipe
from flextron.workflows.elastify import validate
from flextron.workflows.route import run_route, run_route_tokens

__all__ = ["route"]


def route(
    directory: Annotated[Path, typer.Argument(help="Elastic checkpoint; its routers and frontier are replaced.")],
    text: Annotated[
        str | None,
        typer.Option(
            help="Text to measure losses on: file, directory or datasets id. Default: Python's language reference."
        ),
    ] = None,
    num_tokens: Annotated[int, typer.Option(help="Tokens of the text that each measurement uses.")] = 1024,
    num_measured: Annotated[
        int | None,
        typer.Option(
            help=f"Sub-networks measured for the surrogate. Default: {default_of(RouterRecipe, 'num_measured')}."
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(help=f"Seed of targets, noise and initial weights. Default: {default_of(RouterRecipe, 'seed')}."),
    ] = None,
    frontier: Annotated[
        Path | None,
        typer.Option(help="Write the comparison with other ways of choosing (JSON and a picture) to this directory."),
    ] = None,
    token: Annotated[
        bool, typer.Option("--token", help="Train the input-adaptive router instead; the model must have a frontier.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Train the static router, and measure what it chooses beside uniform, mixed and random sub-networks."""
    if token:
        rows = run_route_tokens(merged(directory), directory, progress, text=text)
        show(rows, title=f"{directory}: tokens routed, and the static sub-network of equal cost", as_json=as_json)
        return
    given = {"num_measured": num_measured, "seed": seed}
    recipe = validate(RouterRecipe, {k: v for k, v in given.items() if v is not None}, "route")
    model = merged(directory)
    rows = run_route(model, directory, recipe, progress, text=text, num_tokens=num_tokens, picture=frontier)
    show(rows, title=f"{directory}: what the router chooses, and others at the same latency", as_json=as_json)
