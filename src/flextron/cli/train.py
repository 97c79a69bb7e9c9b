"""`flextron train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flextron import api
from flextron.cli.console import Json, default_of, progress, show
from flextron.errors import FlextronError
from flextron.training.recipe import TrainRecipe
from flextron.workflows.elastify import train_in_place, validate

__all__ = ["train"]


def train(
    directory: Annotated[
        Path, typer.Argument(help="Elastic checkpoint or elastic adapter; replaced by the trained one.")
    ],
    data: Annotated[
        str | None,
        typer.Option(
            help="Train on this text: file, directory or datasets id. Default: docstrings of the installed Python code."
        ),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(help=f"Number of training tokens. Default: {default_of(TrainRecipe, 'tokens')}.")
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(help=f"Tokens in a sequence. Default: {default_of(TrainRecipe, 'context')}."),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(help=f"Sequences in an optimizer step. Default: {default_of(TrainRecipe, 'batch_size')}."),
    ] = None,
    micro_batch_size: Annotated[
        int | None,
        typer.Option(help=f"Sequences that run at once. Default: {default_of(TrainRecipe, 'micro_batch_size')}."),
    ] = None,
    lr: Annotated[
        float | None, typer.Option(help=f"Peak learning rate. Default: {default_of(TrainRecipe, 'lr')}.")
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(help=f"Compute activations in fp32 or bf16. Default: {default_of(TrainRecipe, 'precision')}."),
    ] = None,
    lora: Annotated[
        int | None,
        typer.Option(help="Freeze the weights and train low-rank updates of this rank. Default: all weights train."),
    ] = None,
    adapter: Annotated[
        Path | None,
        typer.Option(
            help="Write the elastic adapter to this new directory, and leave the checkpoint as it is; with --lora."
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(help=f"Seed of the data order and the sub-networks. Default: {default_of(TrainRecipe, 'seed')}."),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(help="Learn from this checkpoint, of the same shape and tokenizer. Default: the model itself."),
    ] = None,
    with_router: Annotated[
        bool, typer.Option("--with-router", help="Let the router draw the sub-networks, and train it with the model.")
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
    model = api.load(directory)
    rank = lora if model.adapter is None else model.adapter.rank
    if lora is not None and lora != rank:
        raise FlextronError(f"{directory} is an elastic adapter of rank {rank}; leave out --lora, or start a new one")
    if adapter is not None and (lora is None or adapter.exists()):
        raise FlextronError(
            "--adapter needs --lora, the rank"
            if lora is None
            else f"{adapter} exists already; choose another directory"
        )
    given["lora_rank"] = rank
    recipe = validate(TrainRecipe, {k: v for k, v in given.items() if v is not None}, "train")
    result = train_in_place(
        model,
        adapter or directory,
        data,
        recipe,
        progress,
        teacher=teacher,
        with_router=with_router,
        as_adapter=adapter is not None or model.adapter is not None,
    )
    row = {
        "steps": result.num_steps,
        "tokens": result.num_tokens,
        "seconds": round(result.seconds, 1),
        "tokens_per_second": round(result.tokens_per_second, 1),
        "loss": result.history[-1]["loss"],
    }
    show([row], title=str(adapter or directory), as_json=as_json, result=row)
