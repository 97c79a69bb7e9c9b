"""`flextron profile`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flextron.cli.console import Json, progress, show, warn_of_latencies
from flextron.cli.loading import merged
from flextron.workflows.elastify import ProfileStage, run_profile, validate
from flextron.workflows.report import frontier_rows

__all__ = ["profile"]


def profile(
    directory: Annotated[Path, typer.Argument(help="Elastic checkpoint; the measurements are added to it.")],
    text: Annotated[
        str | None,
        typer.Option(
            help="Text to measure losses on: file, directory or datasets id. Default: Python's language reference."
        ),
    ] = None,
    num_tokens: Annotated[int, typer.Option(help="Tokens of the text that are used.")] = 2048,
    batch_size: Annotated[int, typer.Option(help="Sequences in the timed decode step.")] = 1,
    decode_context: Annotated[int, typer.Option(help="Tokens of context that each of these sequences holds.")] = 128,
    rounds: Annotated[int, typer.Option(help="Rounds of proposals at each target.")] = 2,
    refinements: Annotated[int, typer.Option(help="Refinements of the best sub-network at each target.")] = 1,
    prompts: Annotated[
        bool, typer.Option("--prompts", help="Time prompts as well, which flextron simulate needs.")
    ] = False,
    engine: Annotated[
        Path | None,
        typer.Option(
            help="Time the engine and its finetuning, too, and write them to this file for flextron simulate."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure latencies on this device and search the frontier of loss over latency."""
    values = {
        "text": text,
        "num_tokens": num_tokens,
        "batch_size": batch_size,
        "decode_context": decode_context,
        "rounds": rounds,
        "refinements": refinements,
    }
    stage = validate(ProfileStage, values, "profile")
    model = merged(directory)
    run_profile(model, stage, progress)
    if prompts:
        with progress("measuring prompts") as step:
            model.measure_latencies(phase="prefill", on_progress=step)
    model.save_profile(directory)
    if engine is not None:
        from flextron.simulation.measure import measure

        with progress("measuring the engine") as step:
            measure(model, on_progress=step).write(engine)
    show(frontier_rows(model), title=f"{directory}: best sub-networks on this device", as_json=as_json)
    warn_of_latencies(model)
