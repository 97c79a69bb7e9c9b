"""`flextron profile`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flextron import api
from flextron.cli.console import Json, progress, show
from flextron.workflows.elastify import ProfileStage, run_profile, validate
from flextron.workflows.report import frontier_rows

__all__ = ["profile"]


def profile(
    directory: Annotated[Path, typer.Argument(help="Elastic checkpoint.")],
    text: Annotated[str | None, typer.Option(help="Text to measure losses on: file, directory or datasets id.")] = None,
    num_tokens: Annotated[int, typer.Option(help="Of that text.")] = 2048,
    batch_size: Annotated[int, typer.Option(help="Sequences of the timed decode step.")] = 1,
    decode_context: Annotated[int, typer.Option(help="Tokens that each of them holds.")] = 128,
    rounds: Annotated[int, typer.Option(help="Rounds of proposals at each target.")] = 2,
    mutations: Annotated[int, typer.Option(help="Mutations of the best at each target.")] = 1,
    as_json: Json = False,
) -> None:
    """Measure latencies on this device and search the frontier of loss over latency."""
    values = {
        "text": text,
        "num_tokens": num_tokens,
        "batch_size": batch_size,
        "decode_context": decode_context,
        "rounds": rounds,
        "mutations": mutations,
    }
    stage = validate(ProfileStage, values, "profile")
    model = api.load(directory)
    run_profile(model, stage, progress)
    model.save_profile(directory)
    show(frontier_rows(model), title=f"{directory}: best sub-networks on this device", as_json=as_json)
