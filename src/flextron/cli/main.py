"""Entry point: registers the verbs, and turns errors that users can mend into one sentence and exit code 2."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable

import typer
from rich.text import Text

from flextron.cli import (
    apply,
    bench,
    convert,
    demo,
    elastify,
    evaluate,
    export,
    finetune,
    frontier,
    generate,
    info,
    profile,
    route,
    serve,
    simulate,
    train,
)
from flextron.cli.console import message
from flextron.errors import FlextronError
from flextron.parallel.processes import is_loss, leave, may_speak, num_launched

__all__ = ["app", "main"]

app = typer.Typer(
    name="flextron",
    help="One pretrained LLM, a sub-network for every latency, memory and accuracy target.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _is_out_of_memory(error: BaseException) -> bool:
    text = str(error)
    return isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text


def _fail(reason: str) -> typer.Exit:
    if may_speak():
        message(Text.assemble(("error:", "red"), " ", " ".join(reason.split())))
    return typer.Exit(2)


def _guarded(verb: Callable[..., object]) -> Callable[..., None]:
    """The verb, with its errors told in one sentence, once."""

    @functools.wraps(verb)
    def run(*args: object, **kwargs: object) -> None:
        try:
            _check_launch(verb)
            verb(*args, **kwargs)
            leave()
        except KeyboardInterrupt as error:
            if may_speak():
                message(str(error) or "interrupted")
            raise typer.Exit(130) from None
        except (FlextronError, OSError) as error:
            raise _fail(str(error)) from error
        except (MemoryError, RuntimeError) as error:
            if num_launched() > 1 and is_loss(error):
                raise _fail("another process was lost; the same command goes on from the last state") from error
            if not _is_out_of_memory(error):
                raise
            raise _fail("out of memory; use a smaller model, context or batch, or a machine with more") from error

    return run


_VERBS: dict[str, Callable[..., object]] = {
    "demo": demo.demo,
    "convert": convert.convert,
    "apply": apply.apply,
    "train": train.train,
    "profile": profile.profile,
    "route": route.route,
    "elastify": elastify.elastify,
    "info": info.info,
    "frontier": frontier.frontier,
    "generate": generate.generate,
    "export": export.export,
    "eval": evaluate.evaluate,
    "serve": serve.serve,
    "simulate": simulate.simulate,
    "finetune": finetune.finetune,
}
_TOGETHER = (train.train, elastify.elastify, route.route, serve.serve)
"""Verbs in which several processes work together."""


def _check_launch(verb: Callable[..., object]) -> None:
    """Refuse to do the same thing several times at once."""
    if num_launched() > 1 and verb not in _TOGETHER:
        raise FlextronError(
            f"a launcher started {num_launched()} processes, but {verb.__name__} works in one; run it without torchrun "
            "or accelerate launch"
        )


for _name, _verb in _VERBS.items():
    app.command(_name)(_guarded(_verb))

_bench = typer.Typer(help="Measure servers.", no_args_is_help=True)
_bench.callback()(lambda: None)  # keeps `serve` a verb of its own while it is the only one
_bench.command("serve")(_guarded(bench.serve))
app.add_typer(_bench, name="bench")


def main() -> None:
    """Run the command line."""
    # bars and notes of the libraries below would interleave with ours
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    app()
