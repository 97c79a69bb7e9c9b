"""Entry point: finds the verbs, and turns errors that users can mend into one sentence and exit code 2.

A verb's module is imported when the verb is asked for, since the libraries of models take seconds.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from importlib import import_module
from typing import Any

import typer
from rich.text import Text
from typer.core import TyperCommand, TyperGroup

from flextron.cli.console import message
from flextron.errors import FlextronError
from flextron.parallel.launcher import num_launched

__all__ = ["VERBS", "app", "main"]

VERBS = {
    "demo": "Measure a small elastic model on this device, ask it for targets, and train it a little further.",
    "convert": "Rank and permute a pretrained checkpoint into an elastic one (no training).",
    "apply": "Merge an elastic adapter into its base: an elastic checkpoint, ready to profile and serve.",
    "train": "Train all sub-networks against the frozen full model; goes on after a kill.",
    "profile": "Measure latencies on this device and search the frontier of loss over latency.",
    "route": "Train the static router, and measure what it chooses beside uniform, mixed and random sub-networks.",
    "elastify": "Convert, train and profile from a recipe; what is done already is not done again.",
    "info": "What an elastic checkpoint holds: search space, provenance, measured sub-networks.",
    "frontier": "Show the measured sub-networks that nothing beats, as a table or as a chart to be sent around.",
    "generate": "Continue a prompt in the sub-network for a target (the full one by default).",
    "export": "Write the sub-network for a target (the full one by default) for another program.",
    "eval": "Perplexity of sub-networks on sequences of text; or, with --tasks, their scores on tasks of lm-eval.",
    "serve": "Serve a model over HTTP as OpenAI does, with a web page at /; the sub-network is chosen request by "
    "request.",
    "simulate": "Play a load on simulated servers: the real scheduler and policies, in the time that a machine's "
    "numbers say.",
    "finetune": "Train a LoRA adapter on examples: here, going on after a kill, or by a server, which serves it at "
    "once.",
    "bench": "Measure servers.",
}
"""Each with the first sentence of its help."""
_TOGETHER = ("train", "elastify", "route", "serve")
"""Verbs in which several processes work together."""


class _Verbs(TyperGroup):
    """The verbs, which are imported one by one; an overview of all imports none."""

    _is_overview = False

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands.update({name: TyperCommand(name, help=said) for name, said in VERBS.items()})

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        known = super().get_command(ctx, cmd_name)
        return known if known is None or self._is_overview else _command(cmd_name)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        self._is_overview = True
        try:
            super().format_help(ctx, formatter)
        finally:
            self._is_overview = False


@functools.cache
def _command(name: str) -> Any:
    """A verb as typer runs it."""
    made = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    if name == "bench":
        made.info.help, made.info.no_args_is_help = VERBS[name], True
        made.callback()(lambda: None)  # keeps `serve` a verb of its own while it is the only one
        made.command("serve")(_guarded(name, import_module("flextron.cli.bench").serve))
    else:
        module = "evaluate" if name == "eval" else name
        made.command(name)(_guarded(name, getattr(import_module(f"flextron.cli.{module}"), module)))
    return typer.main.get_command(made)


app = typer.Typer(
    name="flextron",
    cls=_Verbs,
    help="One pretrained LLM, a sub-network for every latency, memory and accuracy target.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.callback()(lambda: None)  # a group, though its verbs are not told to typer


def _is_out_of_memory(error: BaseException) -> bool:
    text = str(error)
    return isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text


def _guarded(name: str, verb: Callable[..., object]) -> Callable[..., None]:
    """The verb, with its errors told in one sentence, once."""
    from flextron.parallel.processes import is_loss, leave, may_speak  # with the verb come the libraries

    def fail(reason: str) -> typer.Exit:
        if may_speak():
            message(Text.assemble(("error:", "red"), " ", " ".join(reason.split())))
        return typer.Exit(2)

    @functools.wraps(verb)
    def run(*args: object, **kwargs: object) -> None:
        try:
            _check_launch(name)
            verb(*args, **kwargs)
            leave()
        except KeyboardInterrupt as error:
            if may_speak():
                message(str(error) or "interrupted")
            raise typer.Exit(130) from None
        except (FlextronError, OSError) as error:
            raise fail(str(error)) from error
        except (MemoryError, RuntimeError) as error:
            if num_launched() > 1 and is_loss(error):
                raise fail("another process was lost; the same command goes on from the last state") from error
            if not _is_out_of_memory(error):
                raise
            raise fail("out of memory; use a smaller model, context or batch, or a machine with more") from error

    return run


def _check_launch(name: str) -> None:
    """Refuse to do the same thing several times at once."""
    if num_launched() > 1 and name not in _TOGETHER:
        raise FlextronError(
            f"a launcher started {num_launched()} processes, but {name} works in one; run it without torchrun "
            "or accelerate launch"
        )


def main() -> None:
    """Run the command line."""
    # bars and notes of the libraries below would interleave with ours
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    app()
