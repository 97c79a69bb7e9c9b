"""`flextron export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flextron import api
from flextron.cli.console import Json, message, show
from flextron.cli.targets import named
from flextron.errors import FlextronError

__all__ = ["export"]


def export(
    directory: Annotated[Path, typer.Argument(help="Elastic checkpoint. `tiny` names the packaged model.")],
    output: Annotated[Path, typer.Argument(help="File or directory to write.")],
    format: Annotated[
        str | None,
        typer.Option(
            help="Write for transformers (`hf`), llama.cpp (`gguf`), vLLM (`nemotron-nas`), or a table of all measured "
            "slices (`slices`). Default: `gguf` and `slices` for files .gguf and .csv, else `hf`."
        ),
    ] = None,
    latency: Annotated[
        float | None, typer.Option(help="Write the best sub-network of at most this fraction of the full latency.")
    ] = None,
    latency_ms: Annotated[
        float | None, typer.Option(help="Write the best one of at most this many milliseconds per token.")
    ] = None,
    params: Annotated[
        int | None, typer.Option(help="Write the best one of at most this many parameters, embeddings included.")
    ] = None,
    memory_gb: Annotated[
        float | None, typer.Option(help="Write the best one of at most this many gigabytes with its KV cache.")
    ] = None,
    context: Annotated[int, typer.Option(help="Tokens of context whose KV cache counts for --memory-gb.")] = 2048,
    max_loss_increase: Annotated[
        float | None, typer.Option(help="Write the fastest one whose loss rises by at most this fraction.")
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            help="Type of the numbers: float32, bfloat16, float16, and q8_0 or q4_0 in GGUF. Default: float32 for "
            "`hf`, float16 for `gguf`, bfloat16 for `nemotron-nas`."
        ),
    ] = None,
    pad: Annotated[
        bool, typer.Option("--pad", help="Fill layers up with zeros where the format wants equal widths.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output if it exists.")] = False,
    as_json: Json = False,
) -> None:
    """Write the sub-network for a target (the full one by default) for another program."""
    model = api.load(str(directory))
    target = named(
        latency=latency,
        latency_ms=latency_ms,
        params=params,
        memory_gb=memory_gb,
        max_loss_increase=max_loss_increase,
    )
    if format == "slices" or (format is None and output.suffix == ".csv"):
        if target or precision or pad:
            raise FlextronError("a table of slices holds all measured ones; leave targets, --precision and --pad out")
        rows = [{"path": str(output), "slices": model.export_slices(output, overwrite=overwrite)}]
        show(rows, title=str(output), as_json=as_json, result=rows[0])
        return
    if target:
        target["context"] = context
    made = model.export(output, format=format, precision=precision, pad=pad, overwrite=overwrite, **target)
    row = {
        "format": made.format,
        "architecture": made.architecture,
        "precision": made.precision,
        "subnet": made.spec.describe(),
        "parameters": made.num_parameters,
        "mb": made.num_bytes / 1e6,
    }
    for note in made.notes:
        message(note)
    show([row], title=str(output), as_json=as_json, result=row | {"path": str(output), "spec": made.spec.to_dict()})
