"""`flextron eval`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from flextron import api
from flextron.cli.console import Json, progress, show
from flextron.errors import FlextronError
from flextron.spec import SubnetSpec
from flextron.workflows.report import perplexity_rows

__all__ = ["evaluate"]

T = TypeVar("T")


def evaluate(
    directory: Annotated[Path, typer.Argument(help="Elastic checkpoint to evaluate. `tiny` names the packaged model.")],
    text: Annotated[
        str | None,
        typer.Option(help="Text to measure on: file, directory or datasets id. Default: Python's language reference."),
    ] = None,
    latency: Annotated[
        list[float] | None,
        typer.Option(help="Evaluate the sub-network for this latency target; repeatable. Default: the full network."),
    ] = None,
    num_tokens: Annotated[int, typer.Option(help="Tokens of the text to measure on.")] = 8192,
    context: Annotated[int, typer.Option(help="Tokens in a sequence.")] = 256,
    tasks: Annotated[str | None, typer.Option(help="Instead: tasks of lm-eval, such as piqa,mmlu.")] = None,
    targets: Annotated[str | None, typer.Option(help="With tasks: latency fractions, such as 1.0,0.5.")] = None,
    params: Annotated[str | None, typer.Option(help="Or parameters at most, embeddings included.")] = None,
    data: Annotated[Path | None, typer.Option(help="Folder of the tasks' files. Default: lm-eval's downloads.")] = None,
    limit: Annotated[int | None, typer.Option(help="Examples of each task, drawn at random. Default: all.")] = None,
    batch_size: Annotated[int, typer.Option(help="Sequences of a forward pass.")] = 16,
    chat_template: Annotated[bool, typer.Option("--chat-template", help="Prompts as messages of a chat.")] = False,
    as_json: Json = False,
) -> None:
    """Perplexity of sub-networks on sequences of text; or, with --tasks, their scores on tasks of lm-eval."""
    if tasks is not None:
        if text is not None or latency:
            raise FlextronError("--text and --latency are for perplexity; with --tasks take --data and --targets")
        options = {"data": data, "limit": limit, "batch_size": batch_size, "chat_template": chat_template}
        _tasks(directory, _listed(tasks, str, "--tasks"), targets, params, as_json=as_json, options=options)
        return
    given = {"--targets": targets, "--params": params, "--data": data, "--limit": limit}
    alone = [name for name, value in given.items() if value is not None]
    if alone:
        raise FlextronError(f"{alone[0]} goes with --tasks; perplexity takes --text and --latency")
    model = api.load(str(directory))
    specs = {f"latency {x:g}": model.select(latency=x) for x in latency or ()} or {"full": model.space.full}
    rows = perplexity_rows(model.evaluate(specs, text, num_tokens=num_tokens, context=context))
    show(rows, title=f"{directory}: perplexity in sequences of {context} tokens", as_json=as_json)


def _tasks(
    directory: Path,
    tasks: list[str],
    targets: str | None,
    params: str | None,
    *,
    as_json: bool,
    options: dict[str, Any],
) -> None:
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise FlextronError("tasks need lm-eval; install it with: pip install 'flextron[eval]'") from error
    from flextron.evals.report import network_rows, score_rows, to_json
    from flextron.evals.run import evaluate_tasks

    model = api.load(str(directory))
    specs = _specs(model, targets, params)
    with ExitStack() as stack:
        measured = evaluate_tasks(
            model, specs, tasks, on_network=lambda name: stack.enter_context(progress(f"tasks, {name}")), **options
        )
    if as_json:
        show([], title="", as_json=True, result=to_json(model, measured))
        return
    show(network_rows(model, measured), title=f"{directory}: sub-networks", as_json=False)
    show(score_rows(measured), title="scores and their standard errors", as_json=False)


def _specs(model: api.ElasticModel, targets: str | None, params: str | None) -> dict[str, SubnetSpec]:
    """Sub-networks by the names of their columns."""
    if targets is not None and params is not None:
        raise FlextronError("--targets and --params are two ways to name sub-networks; take one of them")
    if targets is not None:
        return {f"{x:g}": model.select(latency=x) for x in _listed(targets, float, "--targets")}
    if params is not None:
        return {f"{n:,}": model.select(params=n) for n in _listed(params, int, "--params")}
    return {"full": model.space.full}


def _listed(given: str, kind: Callable[[str], T], option: str) -> list[T]:
    """What commas separate, each once."""
    try:
        return list(dict.fromkeys(kind(part.strip()) for part in given.split(",")))
    except ValueError as error:
        raise FlextronError(f"{option} takes values with commas between them, not {given!r}") from error
