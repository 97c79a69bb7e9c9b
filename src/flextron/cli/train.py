"""`flextron train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flextron import api
from flextron.cli.console import Json, progress, show
from flextron.training.recipe import TrainRecipe
from flextron.workflows.elastify import train_in_place, validate

__all__ = ["train"]


def train(
    directory: Annotated[Path, typer.Argument(help="Elastic checkpoint; replaced by the trained one.")],
    data: Annotated[str | None, typer.Option(help="Text: file, directory or datasets id.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Training tokens in all.")] = None,
    context: Annotated[int | None, typer.Option(help="Tokens of a sequence.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Sequences of a step.")] = None,
    micro_batch_size: Annotated[int | None, typer.Option(help="Sequences that run at once.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    precision: Annotated[str | None, typer.Option(help="fp32 or bf16.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of data order and sub-networks.")] = None,
    teacher: Annotated[str | None, typer.Option(help="Checkpoint to learn from; default: the model itself.")] = None,
    with_router: Annotated[
        bool, typer.Option("--with-router", help="Let the router draw the sub-networks, and train it along.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Train all sub-networks against the frozen full model; goes on after a kill."""
    given = {
        "tokens": tokens,
        "context": context,
        "batch_size": batch_size,
        "micro_batch_size": micro_batch_size,
        "lr": lr,
        "precision": precision,
        "seed": seed,
    }
    recipe = validate(TrainRecipe, {k: v for k, v in given.items() if v is not None}, "train")
    result = train_in_place(
        api.load(directory), directory, data, recipe, progress, teacher=teacher, with_router=with_router
    )
    row = {
        "steps": result.num_steps,
        "tokens": result.num_tokens,
        "seconds": round(result.seconds, 1),
        "tokens_per_second": round(result.tokens_per_second, 1),
        "loss": result.history[-1]["loss"],
    }
    show([row], title=str(directory), as_json=as_json, result=row)
