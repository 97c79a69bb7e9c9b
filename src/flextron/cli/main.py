"""Entry point: registers the verbs, and turns errors that users can mend into one sentence and exit code 2."""

from __future__ import annotations

import os
import sys

import click
import typer

from flextron.cli import convert, demo, elastify, evaluate, generate, info, profile, train
from flextron.cli.console import message
from flextron.errors import FlextronError

__all__ = ["app", "main"]

app = typer.Typer(
    name="flextron",
    help="One pretrained LLM, a sub-network for every latency, memory and accuracy target.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("demo")(demo.demo)
app.command("convert")(convert.convert)
app.command("train")(train.train)
app.command("profile")(profile.profile)
app.command("elastify")(elastify.elastify)
app.command("info")(info.info)
app.command("generate")(generate.generate)
app.command("eval")(evaluate.evaluate)


def _is_out_of_memory(error: BaseException) -> bool:
    text = str(error)
    return isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text


def main() -> None:
    """Run the command line."""
    # rich and tqdm bars of the libraries below would interleave with ours
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        app(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        message("interrupted; the same command goes on from the last saved state, where the verb keeps one")
        sys.exit(130)
    except FlextronError as error:
        message(f"[red]error:[/red] {_escaped(error)}")
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        message("[red]error:[/red] out of memory; use a smaller model, context or batch, or a machine with more")
        sys.exit(2)
    except OSError as error:
        message(f"[red]error:[/red] {_escaped(error)}")
        sys.exit(2)


def _escaped(error: Exception) -> str:
    return str(error).replace("[", r"\[")
