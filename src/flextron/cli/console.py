"""What all verbs share on the terminal: results go to stdout, progress and messages to stderr."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.text import Text

from flextron.cli.bars import ProgressLine
from flextron.cli.tables import print_one, print_rows
from flextron.parallel.launcher import is_first_launched

if TYPE_CHECKING:
    from flextron.api import ElasticModel
    from flextron.workflows.elastify import StepCallback

__all__ = ["Json", "default_of", "message", "progress", "show", "warn_of_latencies"]

Json = Annotated[bool, typer.Option("--json", help="Print machine-readable results on stdout.")]

_messages = Console(stderr=True)


def default_of(settings: type[Any], field: str) -> str:
    """Default of a field of a dataclass or Pydantic model, for help texts."""
    fields = getattr(settings, "model_fields", None) or settings.__dataclass_fields__
    value = fields[field].default
    return f"{value:g}" if isinstance(value, float) else str(value)


def message(text: str | Text) -> None:
    """A line for people, on stderr. Strings are shown as they are: paths and models' texts may look like markup."""
    _messages.print(Text(text) if isinstance(text, str) else text, highlight=False, soft_wrap=True)


def warn_of_latencies(model: ElasticModel) -> None:
    """Say so if latencies were measured beside busy programs."""
    if model.latency_warning is not None:
        message(Text.assemble(("warning:", "yellow"), " ", model.latency_warning))


@contextmanager
def progress(description: str) -> Iterator[StepCallback]:
    """A bar with an estimate, on stderr, from the first step on; where stderr is a log, a line now and then.

    Of several processes the first alone shows it.
    """
    if not is_first_launched():
        yield lambda done, total, figures=None, /: None
        return
    bar = Progress(ProgressLine(_messages), console=_messages)
    task = bar.add_task(description, total=None, figures=())
    last: int | None = None

    def step(done: int, total: int, figures: dict[str, float] | None = None, /) -> None:
        nonlocal last
        shown = [f"{name} {value:.4g}" for name, value in (figures or {}).items()]
        if not _messages.is_terminal:
            # a log, not a screen: a line at every tenth, however many steps are done at once
            before, last = (done - 1 if last is None else last), done
            if done == 1 or done == total or done * 10 // total > before * 10 // total:
                message(f"{description}: {done} of {total}  {'  '.join(shown)}".rstrip())
            return
        if not bar.live.is_started:
            bar.start()
        bar.update(task, completed=done, total=total, figures=shown)
        if done == total:
            bar.stop()

    try:
        if not _messages.is_terminal:
            message(description)
        yield step
    finally:
        bar.stop()


def _plain(value: Any) -> Any:
    """Without numbers that JSON does not have: they become null."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def show(rows: list[dict[str, Any]], *, title: str, as_json: bool, result: Any = None) -> None:
    """A table of rows on stdout, or `result` (the rows, by default) as JSON; of several processes the first does."""
    if not is_first_launched():
        return
    if as_json:
        typer.echo(json.dumps(_plain(rows if result is None else result), allow_nan=False))
        return
    if len(rows) == 1:
        print_one(Console(), rows[0], title)
    else:
        print_rows(Console(), rows, title)
