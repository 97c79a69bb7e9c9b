"""`flextron finetune`: alone, or by a server."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from flextron import api
from flextron.api.remote import RemoteFinetuning
from flextron.cli.console import Json, default_of, message, progress, show
from flextron.errors import FlextronError
from flextron.finetuning.hyperparameters import Hyperparameters
from flextron.progress import OnStep
from flextron.spec import Target
from flextron.workflows.elastify import StepCallback

__all__ = ["finetune"]

_USAGE = (
    "give a checkpoint, a file of examples and --output; or --server, --model and a file of examples; "
    "or --server and --job"
)


def finetune(
    paths: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[DIRECTORY] DATA", help="Elastic checkpoint to train beside, and JSONL file of examples."
        ),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Write the adapter to this new directory.")] = None,
    validation: Annotated[Path | None, typer.Option(help="JSONL file that is scored at the end of each epoch.")] = None,
    epochs: Annotated[
        int | None,
        typer.Option(help=f"Passes over the examples. Default: {default_of(Hyperparameters, 'n_epochs')}."),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(help=f"Examples in an optimizer step. Default: {default_of(Hyperparameters, 'batch_size')}."),
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(help=f"Peak learning rate. Default: {default_of(Hyperparameters, 'learning_rate')}."),
    ] = None,
    rank: Annotated[
        int | None, typer.Option(help=f"Rank of the adapter. Default: {default_of(Hyperparameters, 'rank')}.")
    ] = None,
    alpha: Annotated[
        float | None,
        typer.Option(help=f"Scale the adapter by alpha / rank. Default: {default_of(Hyperparameters, 'alpha')}."),
    ] = None,
    target_modules: Annotated[
        str | None, typer.Option(help="Adapt these linears, such as q_proj,v_proj. Default: all.")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Most tokens of an example. Default: the model's context length.")
    ] = None,
    over_long: Annotated[
        str | None,
        typer.Option(
            help=f"Either truncate longer examples or refuse them. Default: {default_of(Hyperparameters, 'over_long')}."
        ),
    ] = None,
    target: Annotated[
        float | None,
        typer.Option(
            help="Train in the sub-network for this fraction of the full model's latency. Default: the full model."
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of the initial weights and the data order. Default: 0; a server draws one.")
    ] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Start again from the first step, and replace the output.")
    ] = False,
    server: Annotated[str | None, typer.Option(help="Let the server at this URL train.")] = None,
    model: Annotated[str | None, typer.Option(help="Name of the model on the server.")] = None,
    suffix: Annotated[str | None, typer.Option(help="Put this word into the finetuned model's name.")] = None,
    checkpoint_every: Annotated[int | None, typer.Option(help="Steps between two intermediate adapters.")] = None,
    job: Annotated[str | None, typer.Option(help="Watch the job with this id again.")] = None,
    cancel: Annotated[bool, typer.Option("--cancel", help="Cancel the job that --job names.")] = False,
    api_key: Annotated[str | None, typer.Option(envvar="FLEXTRON_API_KEY", help="Send this key to the server.")] = None,
    as_json: Json = False,
) -> None:
    """Train a LoRA adapter on examples: here, going on after a kill, or by a server, which serves it at once."""
    is_here = bool(output or restart)
    named = None if target_modules is None else [name.strip() for name in target_modules.split(",")]
    hyperparameters: dict[str, Any] = {
        "n_epochs": epochs,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "rank": rank,
        "alpha": alpha,
        "target_modules": named,
        "max_tokens": max_tokens,
        "over_long": over_long,
        "checkpoint_every": checkpoint_every,
    }
    chosen = {key: value for key, value in hyperparameters.items() if value is not None}
    is_remote = bool(server or model or suffix or checkpoint_every or job or cancel)
    match paths or []:
        case [directory, data] if output is not None and not is_remote:
            with _progress_once_begun("finetuning") as step:
                result = api.finetune(
                    directory,
                    data,
                    output,
                    target=None if target is None else Target(latency=target),
                    validation=validation,
                    seed=seed or 0,
                    restart=restart,
                    on_step=step,
                    **chosen,
                )
            _report(result, as_json=as_json)
        case [data] if server and model and not (is_here or job or cancel):
            client = RemoteFinetuning(server, api_key)
            file, held_out = client.upload(data), None if validation is None else client.upload(validation)
            asked = model if target is None else f"{model}@{target:g}"
            made = client.create(asked, file, validation=held_out, suffix=suffix, seed=seed, hyperparameters=chosen)
            _watch(client, server, made["id"], as_json=as_json)
        case [] if server and job and not (is_here or model or suffix or chosen or seed or validation or target):
            client = RemoteFinetuning(server, api_key)
            # a job that there is, before anything is shown of it
            client.cancel(job) if cancel else client.job(job)
            _watch(client, server, job, as_json=as_json)
        case _:
            raise FlextronError(_USAGE)


@contextmanager
def _progress_once_begun(description: str) -> Iterator[OnStep]:
    """`progress` from the first step on: what is wrong with the arguments is said before that."""
    with ExitStack() as stack:
        shown: list[StepCallback] = []

        def step(done: int, total: int, figures: dict[str, float]) -> None:
            if not shown:
                shown.append(stack.enter_context(progress(description)))
            shown[0](done, total, figures)

        yield step


def _report(result: api.FinetuneResult, *, as_json: bool) -> None:
    if result.num_truncated:
        message(f"note: {result.num_truncated} examples were cut to the allowed length")
    row = {
        "adapter": str(result.adapter),
        "examples": result.num_examples,
        "steps": result.num_steps,
        "tokens": result.num_tokens,
        "seconds": round(result.seconds, 1),
        "tokens_per_second": round(result.tokens_per_second, 1),
        "loss": result.losses[-1],
    }
    if result.validations:
        _, row["validation_loss"], row["validation_accuracy"] = result.validations[-1]
    show([row], title=str(result.adapter), as_json=as_json, result=result.to_dict())


def _watch(client: RemoteFinetuning, server: str, job_id: str, *, as_json: bool) -> None:
    """Show a job until it has ended."""
    again = f"flextron finetune --server {server} --job {job_id}"
    try:
        with progress(job_id) as step:
            for event in client.follow(job_id):
                if event["type"] == "metrics":
                    data = event["data"]
                    names = {"loss": "train_loss", "validation loss": "valid_loss"}
                    figures = {name: data[key] for name, key in names.items() if key in data}
                    step(data["step"], data["total_steps"], figures)
                else:
                    message(event["message"])
    except KeyboardInterrupt:
        message(f"the job goes on; watch it again: {again}; end it: {again} --cancel")
        raise typer.Exit(130) from None
    ended = client.job(job_id)
    if ended["status"] == "failed":
        raise FlextronError(f"the job {job_id} has failed: {ended['error']['message']}")
    row = {key: ended[key] for key in ("id", "status", "fine_tuned_model", "trained_tokens")}
    show([row], title=server, as_json=as_json, result=ended)
